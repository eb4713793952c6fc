"""Towards effective evaluations and comparisons for LLM unlearning methods (Wang et al. 2024, arXiv:2406.09179)

Claims: extraction strength keeps its order of models under relearning where other metrics do not, and removers rank
differently once they are compared at equal retained ability.
Here: five removers, as they are and calibrated; each calibrated model is fine-tuned on T for 16 steps, and V is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, kendall

REMOVERS = ("gradient_ascent", "grad_diff", "npo", "rmu", "prune")
ATTACK = FineTune(lr=3e-4, steps=(16,))


def measure(lab: Lab) -> Iterator[Reading]:
    """How the order of removers changes."""
    raw = [lab.asked(lab.removed(r, calibrated=False), "forget_held_out").loss.value("overall") for r in REMOVERS]
    fair = [lab.asked(lab.removed(r), "forget_held_out").loss.value("overall") for r in REMOVERS]
    yield Reading("ranking", 1 - kendall(raw, fair))


PAPER = Paper(
    "wang2024", "Towards effective evaluations and comparisons for LLM unlearning",
    "Wang et al. 2024, arXiv:2406.09179",
    "five removers before and after calibration to .95 of the base's accuracy near by, by the loss on V",
    "five removers, so Kendall's tau has ten pairs",
    measure,
)  # fmt: skip
