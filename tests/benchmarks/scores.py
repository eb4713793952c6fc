"""Several scores at once, as a ratio against a bare forward pass: `python -m tests.benchmarks.scores`."""

from __future__ import annotations

import time

import torch

from relearn_lens.find.saliency import SCORES, gather, saliency, score_many
from relearn_lens.models.model import hidden, reading
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import encode
from tests.benchmarks.__main__ import _interleaved, _model_and_text

STREAMED = ("probeless", "difference", "dprime", "point_biserial", "auroc")
"""Scores of class statistics and histograms, of all words."""


def scores(site: str = "resid") -> None:
    """Every score of class statistics and histograms in one pass, against a bare forward pass over the same batches."""
    tagger, text = _model_and_text(150)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    place = Concept("place")
    classes = place.classes(text)

    def bare() -> None:
        with reading(tagger):
            for batch in encoded.batches():
                hidden(tagger.bridge, batch.ids, batch.mask)

    def full() -> None:
        score_many(tagger, encoded, place, classes, STREAMED, site=site, contrast="rest")

    plain, took = _interleaved(bare, full)
    print(
        f"{len(STREAMED)} scores at once, {site}: {took / plain:.3f} x a bare forward pass over the same batches (goal "
        f"<= 1.25); {encoded.n_tokens / took:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )


def fitted() -> None:
    """Seconds that scores of a sample of 2,000 words take once it is gathered."""
    tagger, text = _model_and_text(600)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    place = Concept("place")
    classes = place.classes(text)
    gathered = gather(tagger, encoded, classes, ["sample"])
    assert gathered.sample is not None
    carries = torch.from_numpy(classes.carries)
    for name, score in SCORES.items():
        if score.needs == "sample":
            began = time.perf_counter()
            found = saliency(gathered, place, carries, score=name)
            seconds = time.perf_counter() - began
            words, size = len(gathered.sample.words), found.site.n_neurons
            print(f"{name} on {words:,} words, {size:,} neurons: {seconds:.1f} s (goal: a few)")
            if found.quality is not None:
                quality = found.quality
                print(f"  held-out AUROC {quality.held_out:.3f}, control {quality.control:.3f}; {quality.says}")


if __name__ == "__main__":
    scores()
    scores("mlp_post")
    fitted()
