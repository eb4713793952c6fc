"""One small study for each of some families, and a small run, alone or in processes: `torchrun -m tests.processes DIR`.

The first process writes what it holds at the end, and a run folder; of several processes twice: in one go, and stopped
after every result that it gave and taken up again. `tests.models.test_processes` compares what two made with what one
made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from relearn_lens.measure.evaluation import evaluate
from relearn_lens.measure.topwords import top_words
from relearn_lens.measure.tracking import Snapshot, measure
from relearn_lens.models import processes
from relearn_lens.models.loading import load_language_model, load_tagger
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.models.training import finetune_
from relearn_lens.runs import store
from relearn_lens.runs.events import ArmDone, Paused, Prepared
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import build_corpus
from tests.families import small_tagger
from tests.fixtures import LABELS, TEXT, sentences_of, warmed
from tests.interruptions import Stopped, small_run

KINDS = ("bert", "llama")
PLACE = Concept("place", ["LOC"])


def study(model: Model, *, parts: int) -> dict[str, Tensor]:
    """Train with dropout, then measure everything over batches of few words: all that ought to be the same.

    `rows` is not: sentences that went through the model, in each process.
    """
    corpus = build_corpus(sentences_of(TEXT), name="tiny", label_names=LABELS)
    rows = torch.zeros(processes.size(), dtype=torch.int64)

    def count(_module: object, _args: object, given: dict[str, Tensor], _out: object) -> None:
        rows[processes.rank()] += len(given["input_ids"])

    model.trunk.register_forward_hook(count, with_kwargs=True)
    pauses = list(finetune_(model, corpus, epochs=3, every=1, lr=1e-3, batch_size=4, accumulate=parts, seed=0))
    found = {f"weights/{name}": value.clone() for name, value in model.weights().items()}
    found["loss"] = torch.tensor([pause.loss for pause in pauses])
    found["tokens"] = torch.tensor([pause.tokens_seen for pause in pauses])
    if isinstance(model, LanguageModel):
        loss = evaluate(model, corpus, concept=PLACE, max_tokens=40)
        found |= {"nats": torch.from_numpy(loss.nats), "n_tokens": torch.from_numpy(loss.tokens)}
        processes.sum_(rows)
        return found | {"rows": rows}
    found |= _tensors(
        measure(
            model, corpus, PLACE, what=["auroc", "elastic_net", "conductance"], shuffles=2, max_tokens=40,
            sample_words=20, steps=4, max_memory=1,
        )
    )  # fmt: skip
    found["word_values"] = top_words(model, corpus, max_tokens=40).value
    found["f1"] = torch.from_numpy(evaluate(model, corpus, max_tokens=40).counts)
    processes.sum_(rows)
    return found | {"rows": rows}


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """What a measurement found."""
    stats, attribution = snapshot.stats, snapshot.attribution
    assert stats is not None
    assert attribution is not None
    return {
        "count": stats.count, "mean": stats.mean, "m2": stats.m2, "probeless": snapshot.saliency.score,
        **{name: found.score for name, found in snapshot.also.items()},
        **{f"shuffled{i}": found.score for i, found in enumerate(snapshot.shuffled)},
        "conductance": attribution.score, "delta": attribution.delta,
    }  # fmt: skip


def stopped_and_taken_up_again(how: Experiment, out: Path) -> int:
    """Run into a folder, stopping in every process after each further event; how often it was stopped."""
    whole, stops = store.perform, 0

    def some(*args: Any, **settings: Any) -> Iterator[Any]:
        for event in whole(*args, **settings):
            if isinstance(event, Prepared) and not processes.is_first():
                time.sleep(0.2)  # what the first one keeps and removes meanwhile, this one has not looked at yet
            yield event
            if isinstance(event, Paused) or (isinstance(event, ArmDone) and event.weights is not None):
                raise Stopped  # what this process made, and a run can go on from

    store.perform = some
    try:
        while True:
            try:
                store.run(how, out)
                return stops
            except Stopped:
                stops += 1
                processes.wait()
    finally:
        store.perform = whole


def main(out: Path) -> None:
    """Study every family, run twice, and let the first process write what it holds."""
    with processes.joined():
        study_and_run(out, processes.size())
    processes.leave()


def study_and_run(out: Path, parts: int) -> None:
    """What `main` does in each process, each step of training in so many parts."""
    if processes.is_first():
        out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        folder = out / kind
        if processes.is_first():
            small_tagger(kind, folder)
        processes.wait()
        found = study(warmed(load_tagger(folder, LABELS, device="cpu")), parts=parts)
        if kind != "bert":
            language = study(load_language_model(folder, device="cpu"), parts=parts)
            found |= {f"language/{name}": value for name, value in language.items()}
        if processes.is_first():
            save_file({k: v.contiguous() for k, v in found.items()}, out / f"{kind}.safetensors")
    how = small_run(
        f"finetune.accumulate={parts}", f"retrain.accumulate={parts}", "measure.max_tokens=100", 'arms=["concept"]'
    )
    store.run(how, out / "run")
    if processes.size() > 1:
        stops = stopped_and_taken_up_again(how, out / "stopped")
        if processes.is_first():
            (out / "stops").write_text(str(stops))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
