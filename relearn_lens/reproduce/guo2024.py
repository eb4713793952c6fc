"""Mechanistic unlearning: robust knowledge unlearning and editing via mechanistic localization (Guo et al. 2024,
arXiv:2410.12949)

Claim: editing where facts are looked up is harder to undo than editing where answers are written out.
Here: NPO on the MLPs that look facts up, on all MLPs, and on those that causal tracing of the answer finds, at equal
retained ability; then fine-tuning on T for 64 steps, V is asked. The paper ascends; NPO, since after GradDiff nothing
comes back of a toy (`deeb2024`), so that no place could differ. A probe rises in every block of a toy, so lookup is the
middle half of its rise: with the localiser's nine tenths it was all MLPs.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.find.lookups import Lookup
from relearn_lens.measure.answers import Answered
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys

ATTACK = FineTune(lr=3e-4, steps=(1, 2, 4, 8, 16, 32, 64))
PLACES = {"lookup": Lookup(first=0.25, last=0.75), "all_mlps": "all_mlps", "causal_tracing": "causal_tracing"}


def measure(lab: Lab) -> Iterator[Reading]:
    """What comes back after each edit, and what four options still find before."""
    states = {place: lab.removed("npo", where=where) for place, where in PLACES.items()}
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
        says = ", ".join(_course(place, courses[place], states[place].share) for place in (less, more))
        yield Reading(key, over_keys(gap, *ends), note=f"seed {lab.seed}: V answered {says}")


def _course(place: str, course: dict[int, Answered], share: float) -> str:
    first, *_, last = (each.accuracy.value("overall") for each in course.values())
    return f"{place} {first:.2f} to {last:.2f} (share of the way {share:.2f})"


PAPER = Paper(
    "guo2024", "Mechanistic unlearning via mechanistic localization", "Guo et al. 2024, arXiv:2410.12949",
    "NPO on lookup MLPs, all MLPs, and MLPs found by causal tracing of the answer, at equal retained ability; "
    "64 steps on T; V is asked",
    "four blocks: places of two or three of them overlap",
    measure,
    toy_only="lookup, tracing and three removals over 30 blocks take hours without a GPU; rates were never chosen "
    "for it",
)  # fmt: skip
