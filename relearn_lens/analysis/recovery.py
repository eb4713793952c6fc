"""How much came back, and how fast: shares of the damage made good, epochs and tokens to a target, savings.

Everything compares scores (F1, or what a language model gains over a uniform guess) that were measured on the same
sentences. An arm is a sequence of trajectories, one per
training seed; of one seed the interval is over sentences, of several over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.integrate import trapezoid

from relearn_lens.analysis.intervals import Estimate, estimate, over_seeds, over_sentences
from relearn_lens.measure.course import REMOVED, FactsTrajectory
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.names import explained

Arm = Trajectory | FactsTrajectory
"""Of facts, what is read is the first metric: `FactsTrajectory.by` chooses one."""
SHARES = (0.5, 0.9, 0.95, 0.99)
"""Shares of base F1 that `speeds` and `savings` wait for."""


@dataclass(frozen=True)
class Recovery:
    """How much of the damage was made good at a stage: 0 none, 1 all of it."""

    share: Estimate | None
    """None when the damage is within noise: then there is nothing to recover from."""
    damage: Estimate
    """F1 lost by pruning: base minus pruned."""


@dataclass(frozen=True)
class Reached:
    """When an arm first came to a share of its base F1, interpolated linearly between stages."""

    share: float
    epochs: Estimate | None
    """None where a seed never got there. The upper end is infinite where that cannot be ruled out."""
    tokens: Estimate | None
    seeds: int
    """Seeds that got there."""


@dataclass(frozen=True)
class Speeds:
    """How fast an arm came back."""

    reached: dict[float, Reached]
    """By share of base F1."""
    area: Estimate | None
    """Mean share of the damage made good over the epochs of retraining (trapezoid); None when the damage is within
    noise."""
    damage: Estimate
    """F1 lost by pruning: base minus pruned."""


@dataclass(frozen=True)
class Savings:
    """How much sooner an arm relearns than a model that never had the concept learns it."""

    saved: dict[float, Estimate | None]
    """By share of the relearning arm's base F1: 1 - epochs to relearn / epochs to learn. 0 no savings, 1 nothing to
    relearn, negative slower. None where either never gets there, or the fresh model is there at once."""
    area: Estimate
    """Mean F1 over the epochs that both have, relearning minus fresh (trapezoid)."""


def measured_by(arms: Sequence[Arm]) -> Literal["step", "epoch"]:
    """What the stages of some arms are named by."""
    last = arms[0][arms[0].stages[-1]].at
    return "epoch" if last is None else last.by


def name_of(arm: Arm) -> str:
    """The name of an arm's concept."""
    if isinstance(arm, FactsTrajectory):
        return arm.facts.name
    return arm.concept.name if arm.concept else "the concept"


def retraining_stages(arm: Arm) -> tuple[str, ...]:
    """The stages after pruning."""
    return tuple(stage for stage in arm.stages if stage not in (BASE, PRUNED, REMOVED))


def start_of(arm: Arm) -> str:
    """The stage that retraining starts from: right after something was taken out."""
    return REMOVED if REMOVED in arm.stages else PRUNED


@explained
def recovery(
    arms: Sequence[Arm],
    label: Label,
    stage: str,
    *,
    unpruned: Sequence[Arm] | None = None,
    **interval,
) -> Recovery:
    """(F1 at the stage - F1 pruned) / (F1 to be had - F1 pruned) of one arm over its seeds.

    What is to be had is what the `unpruned` arm of the seed has at that stage, since retraining also trains; without
    one it is the base. Refused (`share` is None) when the interval of the damage, or that of what is to be had less
    what pruning left, does not exclude 0.

    Raises:
        ValueError: unpruned arms of other seeds, or without the stage.
    """
    base, pruned, now = ([arm[s or start_of(arm)].scores for arm in arms] for s in (BASE, None, stage))
    to_be_had = [had for (had,) in _to_be_had(arms, unpruned, (stage,))]
    damage = estimate(np.subtract, label, base, pruned, **interval)
    if not damage.low > 0 or (unpruned and not estimate(np.subtract, label, to_be_had, pruned, **interval).low > 0):
        return Recovery(None, damage)
    return Recovery(estimate(_made_good, label, to_be_had, pruned, now, **interval), damage)


@explained
def mean_share(arm: Arm, label: Label, unpruned: Arm | None = None) -> float:
    """Share of the damage made good, mean over the stages of retraining; see `recovery`, whose refusal comes first.

    Raises:
        ValueError: an unpruned arm of another seed, or without a stage.
    """
    stages = retraining_stages(arm)
    had = _to_be_had([arm], [unpruned] if unpruned else None, stages)[0]
    pruned, *now = (arm[stage].scores.value(label) for stage in (start_of(arm), *stages))
    return float(np.mean(_made_good([each.value(label) for each in had], pruned, now)))


@explained
def first_stage_at(
    arms: Sequence[Arm],
    label: Label,
    share: float = 0.5,
    *,
    unpruned: Sequence[Arm] | None = None,
    **interval,
) -> str | None:
    """The first stage of retraining at which an arm has made good at least so much of its damage, mean over seeds.

    None where there is none, and where the damage is within noise: then nothing was lost that could come back.
    """
    stages = retraining_stages(arms[0])
    shares = ((stage, recovery(arms, label, stage, unpruned=unpruned, **interval).share) for stage in stages)
    return next((stage for stage, back in shares if back is not None and back.value >= share - 1e-9), None)


@explained
def speeds(
    arms: Sequence[Arm],
    label: Label,
    *,
    shares: Sequence[float] = SHARES,
    unpruned: Sequence[Arm] | None = None,
    **interval,
) -> Speeds:
    """Epochs and tokens until an arm first has each share of its base F1, and the area under its recovery.

    Stages are counted from pruning, which is epoch 0; an arm that is there already needs 0. Nothing is extrapolated:
    a target that no stage reaches is None. The area is of shares of what the `unpruned` arm has at each stage, as in
    `recovery`.

    Raises:
        ValueError: no arm, an arm without base, pruned or retraining, a stage that does not say its epoch, or unpruned
            arms of other seeds or without a stage.
    """
    curves = _curves(arms, "speeds", (BASE, start_of(arms[0]) if arms else PRUNED))
    base, pruned = ([arm[s or start_of(arm)].scores for arm in arms] for s in (BASE, None))
    damage = estimate(np.subtract, label, base, pruned, **interval)

    def when(clock: str, share: float) -> tuple[Estimate | None, int]:
        def of(curve: _Curve) -> Callable[..., Any]:
            return lambda first, *f1: _reach(np.stack(f1), getattr(curve, clock), share * np.asarray(first))

        rows = [(of(c), (arm[BASE].scores, *c.scores)) for c, arm in zip(curves, arms, strict=True)]
        return _over(rows, label, **interval)

    def reached(share: float) -> Reached:
        (epochs, n), (tokens, _) = when("epochs", share), when("tokens", share)
        return Reached(share, epochs, tokens, n)

    area = None
    if damage.low > 0:

        def under(curve: _Curve) -> Callable[..., Any]:
            k = len(curve.epochs)
            return lambda *f1: _mean_over(_made_good(np.stack(f1[:k]), f1[k], np.stack(f1[k:])), curve.epochs)

        had = _to_be_had(arms, unpruned, retraining_stages(arms[0]))
        rows = [(under(c), (b, *h, *c.scores)) for c, b, h in zip(curves, base, had, strict=True)]
        area, _ = _over(rows, label, **interval)
    return Speeds({share: reached(share) for share in shares}, area, damage)


@explained
def savings(
    relearn: Sequence[Arm],
    fresh: Sequence[Arm],
    label: Label,
    *,
    shares: Sequence[float] = SHARES,
    **interval,
) -> Savings:
    """Savings of relearning over learning anew: what a model that lost the concept still has of it.

    `fresh` are runs of a model that never had the concept (new head, or trained on shuffled labels), one for each of
    `relearn`, with the same training; their first stage that is not `"base"` is epoch 0. Both go for the same F1: a
    share of what the relearning arm had at base. Source: Ebbinghaus 1885; in epochs instead of readings, and ours adds
    the difference of the areas, which is there also where a target is never reached.

    Raises:
        ValueError: arms of different numbers of seeds, without base (relearn) or without training.
    """
    if len(relearn) != len(fresh):
        raise ValueError(f"savings pairs seeds, got {len(relearn)} relearning and {len(fresh)} fresh runs")
    pairs = list(zip(_curves(relearn, "savings", (BASE,)), _curves(fresh, "savings"), strict=True))
    bases = [arm[BASE].scores for arm in relearn]

    def saved(share: float) -> Estimate | None:
        def of(mine: _Curve, theirs: _Curve) -> Callable[..., Any]:
            def ratio(first: Any, *f1: Any) -> Any:
                values, target = np.stack(f1), share * np.asarray(first)
                ours = _reach(values[: len(mine.epochs)], mine.epochs, target)
                anew = _reach(values[len(mine.epochs) :], theirs.epochs, target)
                known = np.isfinite(ours) & np.isfinite(anew) & (anew > 0)
                return 1 - np.divide(ours, anew, out=np.full(ours.shape, np.nan), where=known)

            return ratio

        rows = [(of(m, t), (b, *m.scores, *t.scores)) for (m, t), b in zip(pairs, bases, strict=True)]
        return _over(rows, label, **interval)[0]

    def area_of(mine: _Curve, theirs: _Curve) -> Callable[..., Any]:
        end = min(mine.epochs[-1], theirs.epochs[-1])

        def gap(*f1: Any) -> Any:
            values = np.stack(f1)
            k = len(mine.epochs)
            return _mean_over(values[:k], mine.epochs, end) - _mean_over(values[k:], theirs.epochs, end)

        return gap

    rows = [(area_of(m, t), (*m.scores, *t.scores)) for m, t in pairs]
    area, _ = _over(rows, label, **interval)
    if area is None:
        raise ValueError(f"label {label!r} has no score at some stage: there is nothing of it to score")
    return Savings({share: saved(share) for share in shares}, area)


def _to_be_had(arms: Sequence[Arm], unpruned: Sequence[Arm] | None, stages: Sequence[str]) -> list[list[Scores]]:
    """Per arm what there is to be had at each stage: the scores of the unpruned arm of its seed, else of its base."""
    by_seed = {arm.seed: arm for arm in unpruned or ()}
    reachable = []
    for arm in arms:
        if not unpruned:
            reachable.append([arm[BASE].scores] * len(stages))
            continue
        other = by_seed.get(arm.seed)
        if other is None or (missing := [stage for stage in stages if stage not in other.stages]):
            which = f"seed {arm.seed}" if other is None else f"stage {missing[0]!r} of seed {arm.seed}"
            raise ValueError(
                f"recovery beside the unpruned arm needs it at the same seeds and stages, found no {which}; unpruned "
                f"seeds: {', '.join(map(str, by_seed))}"
            )
        reachable.append([other[stage].scores for stage in stages])
    return reachable


@dataclass(frozen=True)
class _Curve:
    """The scores of one run after pruning, and when they were measured."""

    epochs: np.ndarray
    tokens: np.ndarray
    scores: tuple[Scores, ...]


def _curves(arms: Sequence[Arm], what: str, needed: Sequence[str] = ()) -> list[_Curve]:
    """Each run from its first stage after base on, refused if it is not a run of training."""
    if not arms:
        raise ValueError(f"{what} needs at least one trajectory, got none")
    curves = []
    for arm in arms:
        stages = [stage for stage in arm.stages if stage != BASE]
        if len(stages) < 2 or any(stage not in arm.stages for stage in needed):
            raise ValueError(
                f"{what} needs the stages {', '.join([*needed, 'and training after them'])}, found "
                f"{', '.join(arm.stages)}; track the arm from before pruning on"
            )
        times = [(0.0, 0)]
        for stage in stages[1:]:
            at = arm[stage].at
            if at is None:
                raise ValueError(
                    f"{what} needs to know when stage {stage!r} was: its snapshot has no checkpoint (`at`)"
                )
            times.append((at.epoch, at.tokens_seen))
        epochs, tokens = np.array(times, dtype=float).T
        curves.append(_Curve(epochs, tokens, tuple(arm[stage].scores for stage in stages)))
    return curves


def _over(rows: Sequence[tuple[Callable, Sequence[Scores]]], label: Label, **interval) -> tuple[Estimate | None, int]:
    """A function of each seed's scores over seeds, or over sentences if there is one; and for how many it is finite.

    None where it is not finite for all.
    """
    each = [float(of(*(np.float64(s.value(label)) for s in scores))) for of, scores in rows]
    n = sum(map(math.isfinite, each))
    if n < len(each):
        return None, n
    if len(rows) > 1:
        return over_seeds(each, level=interval.get("level", 0.95)), n
    return over_sentences(rows[0][0], label, *rows[0][1], **interval), n


def _made_good(base: Any, pruned: Any, now: Any) -> Any:
    """Share of the damage made good; NaN without damage."""
    lost = np.subtract(base, pruned)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost > 0, np.subtract(now, pruned) / lost, np.nan)


def _reach(f1: np.ndarray, when: np.ndarray, target: Any) -> np.ndarray:
    """When F1 `[stage, ...]` is first at its target, linear between stages; infinite if at none."""
    above = f1 >= target - 1e-9  # a share of an F1 is rounded
    k = above.argmax(0)
    before = np.maximum(k - 1, 0)
    there, here = (np.take_along_axis(f1, i[None], 0)[0] for i in (k, before))
    part = np.divide(target - here, there - here, out=np.zeros(k.shape), where=there > here)
    return np.where(above.any(0), when[before] + np.clip(part, 0, 1) * (when[k] - when[before]), np.inf)


def _mean_over(values: np.ndarray, when: np.ndarray, end: float | None = None) -> Any:
    """Mean of a curve `[stage, ...]` over time by trapezoids, from its start to `end` (by default its last stage)."""
    end = float(when[-1]) if end is None else end
    k = int((when < end).sum())  # the first stage that is not before the end
    last = values[k - 1] + (end - when[k - 1]) / (when[k] - when[k - 1]) * (values[k] - values[k - 1])
    return trapezoid(np.concatenate([values[:k], last[None]]), np.append(when[:k], end), axis=0) / (end - when[0])
