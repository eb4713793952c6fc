"""Speed and memory as ratios against a limit measured in the same run: `python -m tests.benchmarks [NAME ...]`.

Nothing here is a test: machines are shared and timings wander. Each benchmark interleaves its two sides, takes the
median of several rounds and prints their ratio beside its goal.
"""

from __future__ import annotations

import importlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from relearn_lens import sources
from relearn_lens.find.saliency import SCORES
from relearn_lens.measure.tracking import measure
from relearn_lens.models import toy
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger, hidden, reading
from relearn_lens.neurons.streaming import class_stats
from relearn_lens.runs.settings import Measure
from relearn_lens.text.bsb import read_bsb_names
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded, encode

ROUNDS = 7


def _model_and_text(sentences: int) -> tuple[Tagger, Corpus]:
    """MiniLM and names where they are in the cache, else the toy."""
    if all(map(sources.is_cached, ("minilm", "bsb-names"))):
        text = read_bsb_names().labelled().sample(sentences, seed=0)
        return load_tagger("minilm", text.label_names), text
    print("(minilm and bsb-names are not in the cache: relearn-lens fetch; measuring the toy)")
    return toy.tagger(), toy.corpus(sentences=sentences)


def _interleaved(*sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side over several rounds, the sides taking turns."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for k in range(ROUNDS):
        order = list(zip(sides, seconds, strict=True))
        for side, found in order if k % 2 else reversed(order):
            began = time.perf_counter()
            side()
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def saliency(site: str = "resid") -> None:
    """The saliency pass against a bare forward pass over the same batches."""
    tagger, text = _model_and_text(150)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    classes = Concept("place").classes(text)

    def bare() -> None:
        with reading(tagger):
            for batch in encoded.batches():
                hidden(tagger.bridge, batch.ids, batch.mask)

    plain, full = _interleaved(bare, lambda: class_stats(tagger, encoded, classes, site=site))
    print(
        f"saliency pass, {site}: {full / plain:.3f} x a bare forward pass over the same batches (goal <= 1.10); "
        f"{encoded.n_tokens / full:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )


def snapshot() -> None:
    """A cheap snapshot, as a run makes at every pause, against a bare forward pass over the texts that it reads."""
    tagger, text = _model_and_text(150)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    scores = [name for name in Measure().what if name in SCORES]

    def bare() -> None:
        with reading(tagger):
            for batch in encoded.batches():
                hidden(tagger.bridge, batch.ids, batch.mask)

    plain, full = _interleaved(
        bare, lambda: measure(tagger, encoded, Concept("place"), score="dprime", what=scores, shuffles=0)
    )
    print(f"cheap snapshot ({', '.join(scores)}, F1, margin): {full / plain:.2f} x a bare forward pass (goal <= 1.5)")


TIMES = (1, 4, 16)


def memory() -> None:
    """Peak memory over a corpus, and over the same corpus 4 and 16 times: the saliency pass, and a bare forward pass.

    Each in a process of its own. What a bare pass grows by is the text itself, which is held, and the allocator's.
    """
    found = {}
    for what in ("saliency", "bare forward"):
        peaks = []
        for times in TIMES:
            script = f"from tests.benchmarks.__main__ import _peak; print(_peak({times}, {what!r}))"
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            peaks.append(float(done.stdout.split()[-1]))
        found[what] = peaks
        said = ", ".join(f"{peak:,.0f} MB over it {n} x" for n, peak in zip(TIMES, peaks, strict=True))
        print(f"peak memory of the {what} pass: {said}; {peaks[-1] / peaks[0]:.3f} x from first to last")
    ratios = [mine / bare for mine, bare in zip(*found.values(), strict=True)]
    print(
        f"the saliency pass against the bare one: {', '.join(f'{r:.3f}' for r in ratios)} x (goal <= 1.00 at {TIMES} x)"
    )


def _peak(times: int, what: str) -> float:
    """Peak resident memory in MB within a pass over the corpus so many times; what came before is not counted."""
    from relearn_lens.runs.needs import peak_rss_mb

    tagger, text = _model_and_text(2000)
    # Sentences of one length: otherwise more copies of the longest would fill the widest batch, and that, not the
    # length of the corpus, would be measured. Enough of them for the allocator to settle.
    lengths = np.diff(text.start)
    alike = np.flatnonzero(lengths == np.bincount(lengths).argmax())
    text = text.take(np.tile(alike, 3 * times))
    encoded: Encoded = encode(text, tagger.tokenizer, context=tagger.context)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew, where reading the text no longer is
    if what == "saliency":
        class_stats(tagger, encoded, Concept("place").classes(text))
    else:
        with reading(tagger):
            for batch in encoded.batches():
                hidden(tagger.bridge, batch.ids, batch.mask)
    return peak_rss_mb()


def startup() -> None:
    """Seconds until `relearn-lens --help` is printed, against an empty Python."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    run = lambda *args: subprocess.run([sys.executable, *args], capture_output=True, check=True, env=env)  # noqa: E731
    empty, helped = _interleaved(lambda: run("-c", ""), lambda: run("-m", "relearn_lens", "--help"))
    print(f"relearn-lens --help: {helped:.3f} s (goal < 0.3 s), an empty Python {empty:.3f} s; {helped / empty:.1f} x")


def _elsewhere(module: str, name: str, *args: object) -> Callable[[], None]:
    """A benchmark of another file here, imported when it is run."""
    return lambda: getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)(*args)


def _begun_anew(module: str) -> None:
    """A file here that must not have the package imported, in the place of this process, with what options follow."""
    os.execv(sys.executable, [sys.executable, "-m", f"tests.benchmarks.{module}", *sys.argv[2:]])


BENCHMARKS: dict[str, Callable[[], None]] = {
    "saliency": saliency,
    "saliency-mlp": lambda: saliency("mlp_post"),
    "scores": _elsewhere("scores", "scores"),
    "attribution": _elsewhere("attribution", "attribution"),
    "top-words": _elsewhere("meaning", "top_words_benchmark"),
    "similarity": _elsewhere("similarity", "similarity"),
    "training": _elsewhere("training", "training"),
    "tracking": _elsewhere("whole", "tracking"),
    "first-picture": _elsewhere("whole", "first_picture"),
    "memory": memory,
    "ten-million-words": _elsewhere("growth", "ten_million_words"),
    "growth": _elsewhere("growth", "growth"),
    "startup": startup,
    "snapshot": snapshot,
}
"""Ratios of speed and memory: what runs without a name."""

BY_NAME: dict[str, Callable[[], None]] = {
    "fitted": _elsewhere("scores", "fitted"),
    "kills": _elsewhere("kills", "kills"),
    "ray-nodes": _elsewhere("ray_nodes", "ray_nodes"),
    "fuzz": _elsewhere("fuzz", "fuzz"),
    "leaks": _elsewhere("leaks", "leaks"),
    "defaults": _elsewhere("training", "defaults"),
    "false-alarms": _elsewhere("false_alarms", "false_alarms"),
    "returns": _elsewhere("returns", "returns"),
    "power": _elsewhere("power", "power"),
    "pictures": _elsewhere("pictures", "pictures"),
    "audits": _elsewhere("audits", "report"),
    "mutants": lambda: _begun_anew("mutants"),
    "alarm": _elsewhere("alarm", "report"),
    "needs": _elsewhere("needs", "report"),
}
"""What runs only when it is named."""

if __name__ == "__main__":
    # What follows the first option is the benchmark's own.
    wanted = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:])) or list(BENCHMARKS)
    known = BENCHMARKS | BY_NAME
    if unknown := sorted(set(wanted) - set(known)):
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; known: {', '.join(known)}")
    for name in wanted:
        known[name]()
