"""Runs that are killed and taken up again, and what must be the same afterwards: shared by pytest and the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import Experiment

TIMINGS = ("seconds", "peak_rss_mb", "outputs", "seal")
"""What differs from run to run: clocks, memory, and the hashes of what these are written in."""


def small_run(*sets: str) -> Experiment:
    """The toy with little of everything, every arm, two pauses and every kind of measurement."""
    return settings_of(
        "toy",
        {},
        [
            "data.train_sentences=60", "data.validation_sentences=40", "data.probe_sentences=40",
            "prune.control_draws=1", "finetune.epochs=0.5", "retrain.epochs=1", "retrain.every=0.5",
            'arms=["concept", "random", "never"]', "measure.draws=100", "measure.sentences=4", "measure.steps=3",
            "measure.shuffles=2", *sets,
        ],
    )  # fmt: skip


def difference(one: Path, other: Path) -> str:
    """The first thing in which two finished run folders differ, timings aside; empty if they are the same."""
    names = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        for run in (one, other)
    ]
    if names[0] != names[1]:
        return f"files: {sorted(names[0] ^ names[1])}"
    for name in sorted(names[0]):
        if name.endswith(".json"):
            left, right = (_without_timings(json.loads((run / name).read_text())) for run in (one, other))
            if left != right:
                return f"{name}: {[key for key in left if left.get(key) != right.get(key)]}"
        elif name != "report.html" and (one / name).read_bytes() != (other / name).read_bytes():
            return f"{name}: the bytes"
    return ""


def _without_timings(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in TIMINGS}
