"""What a user waits for: a whole run beside its trainings alone, and the first picture of the first notebook."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from relearn_lens import sources
from relearn_lens.models.training import finetune_
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.runs.events import Prepared
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.preparation import prepare
from relearn_lens.runs.presets import settings_of

SMALL = [
    "data.train_sentences=150", "data.validation_sentences=100", "data.probe_sentences=60", "finetune.epochs=1",
    "retrain.epochs=2", "retrain.every=1", "prune.control_draws=1",
]  # fmt: skip


def tracking() -> None:
    """A whole run against the same fine-tuning and retrainings without any measuring, at the run's own settings."""
    fetched = all(map(sources.is_cached, ("minilm", "bsb-names")))
    if not fetched:
        print("(minilm and bsb-names are not in the cache: relearn-lens fetch; measuring the toy)")
    for says, sets in (
        ("as `names` measures", []),
        ("saliency and F1 alone", ["measure.what=[]", "measure.shuffles=0"]),
    ):
        experiment = settings_of("names", {}, [*SMALL, *sets]) if fetched else settings_of("toy", {}, sets)
        ready = prepare(experiment)
        alone = _trainings(ready)
        began = time.perf_counter()
        for event in perform(experiment):
            if isinstance(event, Prepared):
                began = time.perf_counter()  # loading is not tracking
        whole = time.perf_counter() - began
        print(
            f"tracking, {says}: the run takes {whole / alone:.2f} x its trainings alone ({whole:.0f} s against "
            f"{alone:.0f} s; {len(experiment.arms)} arms, {ready.train.n_tokens:,} tokens an epoch to train on, "
            f"{ready.probe.n_tokens:,} to probe, {ready.validation.n_tokens:,} to score)"
        )


def _trainings(ready: Prepared) -> float:
    """Seconds of the run's trainings, nothing measured in between."""
    experiment = ready.experiment
    began = time.perf_counter()
    for _ in finetune_(ready.model, ready.train, experiment.finetune):
        pass
    for _ in experiment.arms:
        for _ in retrain_(ready.model, ready.train, experiment.retrain):
            pass
    return time.perf_counter() - began


def first_picture() -> None:
    """Seconds from a new kernel to the first picture of notebook 00, imports included."""
    path = next(Path(__file__).parents[2].glob("notebooks/00_*.ipynb"))
    book = nbformat.read(path, as_version=4)
    cells = [i for i, cell in enumerate(book.cells) if "first-picture" in cell.metadata.get("tags", [])]
    book.cells = book.cells[: cells[0] + 1]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        NotebookClient(book, timeout=600, resources={"metadata": {"path": folder}}).execute()
        seconds = time.perf_counter() - began
    drawn = any("application/vnd.plotly.v1+json" in o.get("data", {}) for o in book.cells[-1].outputs)
    print(f"{path.name}: {seconds:.0f} s from a new kernel to the first picture (goal < 60 s); drawn: {drawn}")
