"""Questions to finished measurements: how much came back, how fast, where, and is it more than chance.

Reads results, never a model. Every estimate says over what its interval is taken: seeds where there are several,
else bootstrap draws of the sentences, paired across stages and arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats as st

from relearn_lens.evaluation import Label, SpanScores
from relearn_lens.neurons import Neurons
from relearn_lens.saliency import Saliency
from relearn_lens.tracking import BASE, PRUNED, Trajectory

Selection = Literal["all", "matched"]


@dataclass(frozen=True)
class Estimate:
    """A number with an interval, and over what the interval is taken."""

    value: float
    low: float
    high: float
    over: str

    def excludes(self, number: float | int) -> bool:
        """Whether the interval leaves a number out."""
        return not self.low <= number <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(
    of: Callable[..., Any],
    label: Label,
    *columns: Sequence[SpanScores],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A function of one or more F1 scores, with its interval.

    `columns` are the arguments of `of`: for each, one score per seed of the run. With one seed the interval is the
    percentile bootstrap over sentences, with the same draws for every column, so a difference is paired. With more it
    is Student's t over seeds.

    Raises:
        ValueError: no seed, or columns of different lengths.
    """
    n = {len(column) for column in columns}
    if len(n) != 1 or 0 in n:
        raise ValueError(f"every column needs one score per seed, got {[len(c) for c in columns]}")
    values = np.array([float(of(*(s.value(label) for s in row))) for row in zip(*columns, strict=True)])
    mean = float(values.mean())
    if len(values) > 1:
        half = float(st.t.ppf((1 + level) / 2, len(values) - 1) * st.sem(values))
        return Estimate(mean, mean - half, mean + half, f"{len(values)} seeds")
    resampled = [column[0].resampled(label, n=draws, seed=seed) for column in columns]
    drawn = of(*resampled)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if len(drawn) else (np.nan, np.nan)
    return Estimate(mean, float(low), float(high), f"{len(columns[0][0].counts)} sentences")


@dataclass(frozen=True)
class Recovery:
    """How much of the damage was made good at a stage: 0 none, 1 all of it."""

    share: Estimate | None
    """None when the damage is within noise: then there is nothing to recover from."""
    damage: Estimate
    """F1 lost by pruning: base minus pruned."""
    stage: str


def recovery(arms: Sequence[Trajectory], label: Label, stage: str, **interval) -> Recovery:
    """(F1 at the stage - F1 pruned) / (F1 base - F1 pruned) of one arm over its seeds.

    Refused (`share` is None) when the interval of the damage does not exclude 0.
    """
    base, pruned, now = ([arm[s].scores for arm in arms] for s in (BASE, PRUNED, stage))
    damage = estimate(np.subtract, label, base, pruned, **interval)
    if not damage.low > 0:
        return Recovery(None, damage, stage)

    def share(b: Any, p: Any, s: Any) -> Any:
        lost = np.subtract(b, p)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(lost > 0, np.subtract(s, p) / lost, np.nan)

    return Recovery(estimate(share, label, base, pruned, now, **interval), damage, stage)


def first_stage_at(arms: Sequence[Trajectory], label: Label, share: float = 0.5) -> str | None:
    """The first stage of retraining at which mean F1 has made good at least so much of the damage."""
    for stage in retraining_stages(arms[0]):
        base, pruned, now = (np.mean([arm[s].scores.value(label) for arm in arms]) for s in (BASE, PRUNED, stage))
        if base > pruned and (now - pruned) / (base - pruned) >= share:
            return stage
    return None


def name_of(arm: Trajectory) -> str:
    """The name of an arm's concept."""
    return arm.concept.name if arm.concept else "the concept"


def retraining_stages(arm: Trajectory) -> tuple[str, ...]:
    """The stages after pruning."""
    return tuple(stage for stage in arm.stages if stage not in (BASE, PRUNED))


def rank_saliency_by_layer(saliency: Saliency, among: Neurons | None = None) -> list[float]:
    """Mean rank saliency of each layer, 1 the most salient and 0 the least; ranks among the given neurons.

    NaN for a layer without any of them.
    """
    return saliency.by_rank(among).nanmean(1).tolist()


def score_by_layer(saliency: Saliency, among: Neurons | None = None) -> list[float]:
    """Mean score of each layer in the score's unit; NaN for a layer without any of the given neurons."""
    score = saliency.score
    if among is not None:
        score = score.where(among.mask, torch.nan)
    return score.nanmean(1).tolist()


def saliency_by_layer(arm: Trajectory, selection: Selection = "matched") -> dict[str, list[float]]:
    """Mean rank saliency per layer at every stage.

    `"matched"` ranks the surviving neurons among themselves at every stage, base included (`Trajectory.matched`; in an
    unpruned arm, those that survive in the concept arm); `"all"` ranks all neurons.
    Pruning takes neurons from late layers by construction, so with `"all"` (and with base-all against
    retrained-survivors, as published) the concept seems to move to early layers even if nothing moves.
    """
    among = arm.matched() if selection == "matched" else None
    return {stage: rank_saliency_by_layer(snapshot.saliency, among) for stage, snapshot in arm.snapshots.items()}


@dataclass(frozen=True)
class Shift:
    """Where the concept sits in depth, at base and at a later stage, over the same neurons."""

    base: float
    """Centre of mass of the score over layers, 0 the first layer and 1 the last."""
    later: float
    stage: str
    selection: Selection

    @property
    def moved(self) -> float:
        """Towards later layers if positive; in shares of the model's depth."""
        return self.later - self.base


def shift(arm: Trajectory, stage: str, selection: Selection = "matched", *, among: Neurons | None = None) -> Shift:
    """How far the centre of mass of the concept's score moved along the layers since base.

    Each stage's scores sum to 1 over the chosen neurons. Matched: the same neurons on both sides, `among` or
    `Trajectory.matched`. Survivors are chosen by their score at base, so their scores grow back towards the mean by
    chance alone, most where most was pruned: only the difference from a control arm on the same neurons is a move.
    """
    chosen = arm.matched() if among is None else among
    mask = chosen.mask if selection == "matched" else torch.ones_like(chosen.mask)

    def centre(saliency: Saliency) -> float:
        mass = saliency.score.where(mask, 0.0).sum(1).double()
        depth = torch.linspace(0, 1, len(mass), dtype=torch.float64)
        return float((mass * depth).sum() / mass.sum())

    return Shift(centre(arm[BASE].saliency), centre(arm[stage].saliency), stage, selection)


def what_happened(arms: Mapping[str, Sequence[Trajectory]], label: Label, **interval) -> str:
    """Two sentences on a run, from its numbers and with its controls; no more than these support.

    `arms` is arm name to one trajectory per seed. The first sentence says how much came back and how fast, beside the
    random arm; the second where.
    """
    if "concept" not in arms:
        return "There is no concept arm in this run, so it says nothing about pruning a concept."
    concept = arms["concept"]
    last = retraining_stages(concept[0])[-1]
    back = recovery(concept, label, last, **interval)
    before, cut, now = (_f1(concept, stage, label) for stage in (BASE, PRUNED, last))
    first = f"Pruning the neurons of {name_of(concept[0])!r} took its F1 from {before} to {cut}"
    if back.share is None:
        first += f" (change {back.damage}), which is within noise, so there is nothing to recover from"
    else:
        first += (
            f", and {last} epoch(s) of retraining brought it to {now}: {_percent(back.share)} of "
            f"the loss came back, {_half(concept, label)}"
        )
    first += _against_random(arms, label, last, **interval)
    return f"{first}. {_where(arms, last)}"


def _against_random(arms: Mapping[str, Sequence[Trajectory]], label: Label, last: str, **interval) -> str:
    """How the random arm did, and whether the concept arm differs from it."""
    if "random" not in arms:
        return "; there is no random arm, so whether this is about the concept's neurons cannot be said"
    concept, random = arms["concept"], arms["random"]
    cut, now = _f1(random, PRUNED, label), _f1(random, last, label)
    result = f"; pruning as many random neurons in every layer took it to {cut}, and retraining to {now}"
    if cut < _f1(random, BASE, label):
        result += f" ({_half(random, label)})"
    stages = (PRUNED, *retraining_stages(concept[0]))
    # Several comparisons: each interval is widened so that together they keep the level (Bonferroni).
    level = interval.get("level", 0.95)
    widened = {**interval, "level": 1 - (1 - level) / len(stages)}
    apart, alike = [], []
    for stage in stages:
        when = {PRUNED: "right after pruning", last: "at the end"}.get(stage, f"at epoch {stage}")
        columns = [[arm[stage].scores for arm in side] for side in (concept, random)]
        gap = estimate(np.subtract, label, *columns, **widened)
        if gap.excludes(0):
            apart.append(f"{abs(gap.value):.2f} {'below' if gap.value < 0 else 'above'} it {when}")
        else:
            alike.append(when)
    verdicts = [f"{verb} {_listed(said)}" for verb, said in (("is", apart), ("does not differ from it", alike)) if said]
    noise = f"{100 * level:g} % intervals, corrected for {len(stages)} comparisons"
    return f"{result}, so the concept arm {' and '.join(verdicts)} ({noise})"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def _where(arms: Mapping[str, Sequence[Trajectory]], last: str) -> str:
    """Where the saliency of the surviving neurons went, beside the random and the unpruned arm."""
    concept = arms["concept"]
    n = len(concept)
    # On the very same neurons in every control: see `shift` for what choosing survivors does by itself.
    own = np.array([shift(arm, last).moved for arm in concept])
    gaps: dict[str, np.ndarray] = {}
    controls: dict[str, float] = {}
    for name in (name for name in ("random", "unpruned") if name in arms):
        shared = [c.survivors() & a.survivors() for c, a in zip(concept, arms[name], strict=True)]
        if not all(len(s) for s in shared):
            continue
        theirs = np.array([shift(a, last, among=s).moved for a, s in zip(arms[name], shared, strict=True)])
        ours = np.array([shift(c, last, among=s).moved for c, s in zip(concept, shared, strict=True)])
        gaps[name], controls[name] = ours - theirs, float(theirs.mean())
    mine = float(own.mean())
    if not np.isfinite(mine):
        return "No neuron survived, so there is nowhere for the concept to have moved."
    way = "later" if mine > 0 else "earlier"
    said = (
        f"Among the neurons that survived, the concept's saliency moved by {abs(mine):.3f} of the model's depth "
        f"towards {way} layers"
        if abs(mine) >= 0.0005
        else "Among the neurons that survived, the concept's saliency stayed at its depth"
    )
    if not controls:
        return f"{said}; without a control arm this is not evidence of a move."
    beside = " and ".join(f"{value:+.3f} in the {name} arm" for name, value in controls.items())
    beside = f"the same neurons: {beside}"
    if any(value * mine > 0 and abs(value) >= abs(mine) / 2 for value in controls.values()):
        verdict = "a control moved the same way at least half as far, so this is not specific to pruning the concept"
    elif n < 3:
        verdict = f"with {n} seed(s) there is no interval on this, so it is a description, not a finding"
    else:
        clear = all(abs(gap.mean()) > st.t.ppf(0.975, n - 1) * st.sem(gap) for gap in gaps.values())
        verdict = (
            f"the difference from every control is beyond noise over {n} seeds"
            if clear
            else f"the difference from the controls is within noise over {n} seeds"
        )
    return f"{said} ({beside}): {verdict}."


def _half(arms: Sequence[Trajectory], label: Label) -> str:
    """By when half of the loss was back."""
    half = first_stage_at(arms, label)
    return f"half of it by epoch {half}" if half else "less than half of it at any stage"


def _f1(arms: Sequence[Trajectory], stage: str, label: Label) -> str:
    return f"{np.mean([arm[stage].scores.value(label) for arm in arms]):.2f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
