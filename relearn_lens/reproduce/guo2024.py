"""Mechanistic unlearning: robust knowledge unlearning and editing via mechanistic localization (Guo et al. 2024,
arXiv:2410.12949)

Claim: editing where facts are looked up is harder to undo than editing where answers are written out.
Here: GradDiff on the MLPs that look facts up, on all MLPs, and on those that causal tracing of the answer finds, at
equal retained ability; then fine-tuning on T for 64 steps, V is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys

ATTACK = FineTune(lr=3e-4, steps=(1, 2, 4, 8, 16, 32, 64))
PLACES = ("lookup", "all_mlps", "causal_tracing")


def measure(lab: Lab) -> Iterator[Reading]:
    """What comes back after each edit, and what four options still find before."""
    states = {place: lab.removed("grad_diff", where=place) for place in PLACES}
    courses = {place: lab.course(state, ATTACK) for place, state in states.items()}
    options = {place: lab.chosen(state, "forget_held_out", form="options") for place, state in states.items()}
    yield Reading(
        "options", over_keys(lambda tracing, lookup: tracing - lookup, options["causal_tracing"], options["lookup"])
    )
    last = max(courses["lookup"])

    def gap(a: float, a0: float, b: float, b0: float) -> float:
        return (b - b0) - (a - a0)

    for key, less, more in (("lookup", "lookup", "all_mlps"), ("tracing", "all_mlps", "causal_tracing")):
        ends = [courses[place][step].accuracy for place in (less, more) for step in (last, 0)]
        shares = ", ".join(f"{place} {states[place].share:.2f}" for place in (less, more))
        yield Reading(key, over_keys(gap, *ends), note=f"seed {lab.seed}: share of the way after calibration: {shares}")


PAPER = Paper(
    "guo2024", "Mechanistic unlearning via mechanistic localization", "Guo et al. 2024, arXiv:2410.12949",
    "GradDiff on lookup MLPs, all MLPs, and MLPs found by causal tracing of the answer, at equal retained ability; "
    "64 steps on T; V is asked",
    "four blocks: a third of them is one or two MLPs, so places overlap",
    measure,
)  # fmt: skip
