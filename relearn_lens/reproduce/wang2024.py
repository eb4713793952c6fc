"""Towards effective evaluations and comparisons for LLM unlearning methods (Wang et al. 2024, arXiv:2406.09179)

Claims: extraction strength keeps its order of models under relearning where other metrics do not, and removers rank
differently once they are compared at equal retained ability.
Here: five removers, as they are and calibrated; for the metrics each at three shares of its way from the base,
fine-tuned on T for 16 steps; V is asked before and after. Of one-token answers extraction strength is accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.measure.asking import ask
from relearn_lens.measure.extraction import ExtractionStrength, TruthRatio
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, kendall, rank_correlation

REMOVERS = ("gradient_ascent", "grad_diff", "npo", "rmu", "prune")
SHARES = (0.5, 0.75, 1.0)
ATTACK = FineTune(lr=3e-4, steps=(16,))
ROLE = "forget_held_out"
METRICS = {"strength": ExtractionStrength(), "truth ratio": TruthRatio()}


def measure(lab: Lab) -> Iterator[Reading]:
    """How the order of models changes under relearning, and that of removers by calibration."""
    asked = ask(lab.facts, roles=[ROLE], keys=24, wordings=1)
    before: dict[str, list[float]] = {name: [] for name in METRICS}
    after: dict[str, list[float]] = {name: [] for name in METRICS}
    for remover in REMOVERS:
        for share in SHARES:
            with lab.loaded(lab.towards(lab.removed(remover), share)) as model:
                for values in (before, after):
                    for name, metric in METRICS.items():
                        values[name].append(metric(model, asked).shown(ROLE))
                    if values is before:
                        for _ in ATTACK(model, lab.facts, seed=lab.seed):
                            pass
    kept = {name: rank_correlation(before[name], after[name]) for name in METRICS}
    yield Reading("strength", kept["strength"] - kept["truth ratio"], kept["truth ratio"])
    raw = [lab.asked(lab.removed(r, calibrated=False), "forget_held_out").loss.value("overall") for r in REMOVERS]
    fair = [lab.asked(lab.removed(r), "forget_held_out").loss.value("overall") for r in REMOVERS]
    yield Reading("ranking", 1 - kendall(raw, fair))


PAPER = Paper(
    "wang2024", "Towards effective evaluations and comparisons for LLM unlearning",
    "Wang et al. 2024, arXiv:2406.09179",
    "five removers before and after calibration to .95 of the base's accuracy near by, by the loss on V",
    "five removers, so Kendall's tau has ten pairs",
    measure,
    toy_only="thirty removals and trainings take a pretrained model hours without a GPU; not tried",
)  # fmt: skip
