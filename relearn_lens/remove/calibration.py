"""Removers are compared at the same retained ability: how far towards the removed model may one go?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relearn_lens import progress
from relearn_lens.models.model import Model, lent

Score = Callable[[Any], float]
"""Of a model: higher is better, 0 is worst."""


@dataclass(frozen=True)
class Calibration:
    """The furthest point on the way from a base model to a removed one that keeps the base's ability."""

    share: float
    """Of the way, 0 (the base) to 1 (the removed model)."""
    score: float
    """Retained, there; in the score's own unit."""
    base: float
    """The score of the base."""
    removed: float
    """The score of the removed model."""


def calibrate(
    model: Model,
    base: Mapping[str, Tensor],
    score: Score,
    *,
    tau: float = 0.95,
    points: int = 64,
    ends: tuple[float | None, float | None] = (None, None),
) -> Calibration:
    """How much of a removal keeps `tau` of the base's score on what is to be retained?

    `model` is the removed one, `base` the weights that it had before (`Model.weights`, copied). Weights are
    theta = (1 - a) base + a removed, and a the largest of 0, 1/points, ..., 1 at which the score is at least tau times
    the base's, found by bisection: exact where the score falls along the way, else one place where it passes and the
    next one fails. The score is asked in place, at most 2 + log2(points) times; the model's weights are put back, to
    the bit. Compare removers there: `mixed_` goes there. `ends` are the scores of the base and of the removed model,
    where they are known already.

    Source: Wang et al. 2024 (UWC); their update ratio is 1 - a.

    Raises:
        ValueError: weights of another model, tau or points out of range, or a base whose score is not above 0.
    """
    if not 0 < tau <= 1 or points < 1:
        raise ValueError(f"tau must be above 0 and at most 1, points at least 1; got tau={tau}, points={points}")
    scores = {at: value for at, value in zip((0, points), ends, strict=True) if value is not None}

    def at(point: int) -> float:
        if point not in scores:
            mixed_(model, base, point / points, removed)
            scores[point] = float(score(model))
            progress.advance()
        return scores[point]

    with lent(model) as removed, progress.task("calibrating", 2 + max(0, points - 1).bit_length()):
        whole = at(0)
        if not whole > 0:
            raise ValueError(
                f"the base model scores {whole} on what is to be retained, so no share of that says anything; use a "
                "score that is above 0"
            )
        low, high = (points, points) if at(points) >= tau * whole else (0, points)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at(middle) >= tau * whole else (low, middle)
    return Calibration(low / points, scores[low], whole, scores[points])


def mixed_(model: Model, base: Mapping[str, Tensor], share: float, removed: Mapping[str, Tensor] | None = None) -> None:
    """Go back towards the base: weights become (1 - share) base + share of `removed`, by default of what they are.
    Both ends are themselves, to the bit, and so is what they share.

    Raises:
        ValueError: weights of another model.
    """
    removed = model.copied() if removed is None else removed
    if base.keys() != removed.keys():
        raise ValueError(f"the base's weights are of another model: {len(base.keys() ^ removed.keys())} names differ")
    model.load_weights(
        {
            name: torch.lerp(base[name].to(after.device), after, share) if after.is_floating_point() else after
            for name, after in removed.items()
        }
    )
