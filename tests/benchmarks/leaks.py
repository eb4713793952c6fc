"""A thousand measurements in one process: `python -m tests.benchmarks leaks`.

Resident memory now (not its peak), hooks of the model and open files after every hundred. Flat means: none of the three
grows from the 200th on, by when the allocator has settled.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

from torch import nn

from relearn_lens.measure.tracking import measure
from relearn_lens.models import toy
from relearn_lens.models.model import Model
from relearn_lens.text.concept import Concept

MEASUREMENTS, EVERY = 1000, 100


def resident_mb() -> float:
    """Resident memory of this process now, in MB (2**20 bytes); NaN where there is no /proc."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages.exists() else float("nan")


def handles() -> int:
    """Open files of this process; -1 where there is no /proc."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else -1


def hooks(model: nn.Module) -> int:
    """Hooks on all modules and weights of a model, and of its bridge."""
    parts = [model, *([model.bridge] if isinstance(model, Model) else [])]
    modules = {id(module): module for part in parts for module in part.modules()}.values()
    on_modules = sum(len(v) for m in modules for k, v in vars(m).items() if k.endswith("hooks") and v)
    return on_modules + sum(len(p._backward_hooks or ()) for part in parts for p in part.parameters())


def leaks(measurements: int = MEASUREMENTS) -> None:
    """Measure the toy again and again, and print the curve."""
    made, place, began = toy.load(sentences=60), Concept("place", ["place"]), time.monotonic()
    curve: list[tuple[int, float, int, int]] = []
    every = max(1, measurements // 10)
    for i in range(1, measurements + 1):
        what = ["auroc", "top_words"] if i % 10 else ["auroc", "top_words", "conductance"]
        measure(
            made.tagger,
            made.corpus,
            place,
            site="mlp_post",
            what=what,
            sentences=4,
            steps=2,
            seed=i,
        )
        if i % every == 0 or i == 1:
            gc.collect()
            curve.append((i, resident_mb(), hooks(made.tagger), handles()))
            print("after {:>5,}: {:7.1f} MB resident, {} hooks, {} open files".format(*curve[-1]), flush=True)
    settled = [row for row in curve if row[0] >= 2 * every]
    grown = settled[-1][1] - settled[0][1]
    per = 1024 * grown / (settled[-1][0] - settled[0][0])
    print(
        f"{measurements:,} measurements in {time.monotonic() - began:.0f} s: resident memory {grown:+.1f} MB from the "
        f"{settled[0][0]:,}th on ({per:+.2f} KB each; goal 0 within the allocator's noise), hooks "
        f"{curve[-1][2] - curve[0][2]:+d}, open files {curve[-1][3] - curve[0][3]:+d} (goal 0)"
    )


if __name__ == "__main__":
    leaks(int(sys.argv[1]) if len(sys.argv) > 1 else MEASUREMENTS)
