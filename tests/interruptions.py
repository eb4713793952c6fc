"""Runs that are killed and taken up again, and what must be the same afterwards: shared by pytest and the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relearn_lens.runs import store
from relearn_lens.runs.events import Event, Paused
from relearn_lens.runs.settings import Experiment
from tests.made import tiny

TIMINGS = ("seconds", "peak_rss_mb", "outputs", "seal")
"""What differs from run to run: clocks, memory, and the hashes of what these are written in."""


def small_run(*sets: str) -> Experiment:
    """The toy with little of everything: arms that know the concept and one that does not, two pauses, every result."""
    return tiny(
        [
            "data.train_sentences=60", "data.validation_sentences=20", "data.probe_sentences=20",
            "retrain.steps=[2, 5]", 'arms=["concept", "unpruned", "never"]', 'block.held=["part"]', "grafts.bands=1",
            "measure.sentences=4", "measure.steps=3", "measure.shuffles=2", *sets,
        ]
    )  # fmt: skip


class Stopped(Exception):
    """A process that went away."""


def stopped_after_each(how: Experiment, out: Path) -> list[str]:
    """Run into a folder, stopped once after each kind of event and each training's first pause, and taken up again
    each time; gives where it was stopped."""
    stops: list[str] = []

    def stop(event: Event) -> None:
        name = type(event).__name__ + (f" {event.training}" if isinstance(event, Paused) else "")
        if name not in stops:
            stops.append(name)
            raise Stopped

    while True:
        try:
            store.run(how, out, on_event=stop)
            return stops
        except Stopped:
            pass


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
