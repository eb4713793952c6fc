"""Span F1 of a tagger, with the counts that intervals are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped
from nervaluate import Evaluator
from nervaluate.loaders import ListLoader

from relearn_lens.corpus import OUTSIDE, Corpus, Strings, bio
from relearn_lens.encoding import Encoded, encode
from relearn_lens.models import Tagger, reading

OVERALL = "overall"
Label = str | tuple[str, ...]
"""A label, several that are scored together, or `OVERALL`."""


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class SpanScores:
    """Strict span scores: a predicted span counts when its words and its label are both right."""

    f1: dict[str, float]
    """By label, and `"overall"` over all spans together (micro). 0 where there is nothing right; NaN for a label that
    neither text nor prediction has."""
    precision: dict[str, float]
    recall: dict[str, float]
    counts: Int[np.ndarray, "sentence label 3"]
    """Spans of each sentence and label (in the order of `labels`): right, predicted, true."""
    labels: Strings

    def __repr__(self) -> str:
        return "SpanScores(F1 " + ", ".join(f"{label} {value:.3f}" for label, value in self.f1.items()) + ")"

    def support(self) -> dict[str, int]:
        """True spans of each label."""
        true = self.counts[..., 2].sum(0)
        return dict(zip(self.labels, true.tolist(), strict=True)) | {OVERALL: int(true.sum())}

    def value(self, label: Label) -> float:
        """F1 of a label, of several together, or `"overall"`; NaN where neither text nor prediction has a span."""
        right, predicted, true = self.counts_of(label).sum(0)
        return float(2 * right / (predicted + true)) if predicted + true else float("nan")

    def counts_of(self, label: Label) -> Int[np.ndarray, "sentence 3"]:
        """Right, predicted and true spans of each sentence for a label or several together."""
        if label == OVERALL:
            return self.counts.sum(1)
        names = (label,) if isinstance(label, str) else label
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(f"no scores of label {unknown[0]!r}; known: {', '.join(self.labels)}, {OVERALL}")
        return self.counts[:, [self.labels.index(name) for name in names]].sum(1)

    def resampled(self, label: Label, *, n: int = 1000, seed: int = 0) -> Float[np.ndarray, " draw"]:
        """F1 of a label over `n` bootstrap draws of the sentences, NaN in a draw without any span of it.

        The draws depend on `seed` alone, so two scores over the same sentences are paired: their difference has an
        interval too.
        """
        counts = self.counts_of(label)
        draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=n)
        right, predicted, true = (draws @ counts).T.astype(float)
        return np.divide(2 * right, predicted + true, out=np.full(n, np.nan), where=predicted + true > 0)

    def interval(self, label: Label, *, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap interval of a label's F1 over sentences."""
        drawn = self.resampled(label, n=n, seed=seed)
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            return float("nan"), float("nan")
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def evaluate(
    tagger: Tagger,
    text: Corpus | Encoded,
    *,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> SpanScores:
    """Strict span F1 of a tagger on labelled text, by nervaluate.

    A word's tag is that of its first sub-word; a word that the context cut off is predicted `"O"`. An `I-` that
    follows no span of its type opens one (as conlleval counts).

    Raises:
        ValueError: the text has a label that the tagger does not know.
    """
    encoded = text if isinstance(text, Encoded) else encode(text, tagger.tokenizer, context=tagger.context)
    check_labels(tagger, encoded.corpus)
    return score_spans(encoded.corpus, predict(tagger, encoded, max_tokens=max_tokens, tick=tick), tagger.tags)


def check_labels(tagger: Tagger, corpus: Corpus) -> None:
    """Refuse a text with a label that the tagger does not know."""
    if unknown := sorted(set(corpus.label_names) - set(tagger.label_names)):
        raise ValueError(
            f"corpus {corpus.name!r} has labels {unknown} that the tagger does not know; it was made for "
            f"{', '.join(tagger.label_names)}"
        )


def predict(
    tagger: Tagger,
    encoded: Encoded,
    *,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> Int[np.ndarray, " word"]:
    """The tag of every word of the corpus, an index into `tagger.tags`."""
    tags = torch.zeros(encoded.corpus.n_words, dtype=torch.int64)
    with reading(tagger):
        for batch in encoded.batches(max_tokens=max_tokens):
            here = batch.to(tagger.device)
            best = tagger(here.ids, here.mask).argmax(-1).flatten()
            tags[batch.words] = best[here.subword[here.offset]].cpu()
            if tick:
                tick(batch.n_tokens)
    return tags.numpy()


def score_spans(corpus: Corpus, predicted: Int[np.ndarray, " word"], tags: tuple[str, ...]) -> SpanScores:
    """Strict span scores of predicted word tags against a corpus's labels."""
    labels = tuple(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))
    true, guess = [], []
    for i in range(corpus.n_sentences):
        span = slice(corpus.start[i], corpus.start[i + 1])
        true.append(bio([corpus.label_names[k] for k in corpus.label[span]], corpus.begins[span].tolist()))
        guess.append([tags[k] for k in predicted[span]])
    strict = Evaluator(true, guess, tags=list(labels), loader="list").evaluate()
    results = {name: result["strict"] for name, result in strict["entities"].items()}
    if results:  # without a span on either side there is no overall F1 either
        results[OVERALL] = strict["overall"]["strict"]

    counts = np.zeros((corpus.n_sentences, len(labels), 3), dtype=np.int64)
    loader = ListLoader()
    for i, (there, here) in enumerate(zip(loader.load(true), loader.load(guess), strict=True)):
        there, here = ({(e.label, e.start, e.end) for e in side} for side in (there, here))
        for k, found in enumerate((there & here, here, there)):
            for label, _, _ in found:
                counts[i, labels.index(label), k] += 1

    def each(metric: str) -> dict[str, float]:
        return {
            name: float(getattr(results[name], metric)) if name in results else float("nan")
            for name in (*labels, OVERALL)
        }

    return SpanScores(each("f1"), each("precision"), each("recall"), counts, labels)
