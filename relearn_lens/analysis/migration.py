"""Where the concept went, in depth; which single neurons took it over is in `priming`.

1. Scores of one stage, as a share of their sum, are a distribution over layers: its centre and its distance from
   another stage's say how far it went.
2. The same neurons are compared on both sides (survivors of pruning): pruning takes from late layers by construction,
   so all neurons at base against survivors later, as published, moves towards early layers where nothing moves.
3. Survivors are chosen by their score at base, which grows back towards the mean by chance alone. So a move counts only
   beside that of a control arm on the very same neurons, seed by seed.

Works on any `Saliency`; for an attribution pass its `.saliency()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy import stats as st

from relearn_lens.analysis.intervals import FEWEST_SEEDS, ONE_SEED, Estimate, beside_control, bonferroni, over_seeds
from relearn_lens.analysis.priming import count_of, turnover
from relearn_lens.analysis.recovery import name_of
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.tracking import BASE, Snapshot, Trajectory
from relearn_lens.names import explained, meant, unknown
from relearn_lens.neurons.sites import Neurons

Selection = Literal["all", "matched", "published"]
"""Which neurons are compared: all on both sides, the same survivors on both, or all at base and survivors later."""


def is_mass(saliency: Saliency, among: Neurons | None = None) -> bool:
    """Whether the scores can be shared out: all of them finite and none below 0."""
    score = saliency.score if among is None else saliency.score[among.mask]
    return bool((score >= 0).all() and score.isfinite().all())


def layer_share(saliency: Saliency, among: Neurons | None = None) -> list[float]:
    """Share of the summed score that each layer has, among the given neurons; sums to 1, NaN where the sum is 0.

    Raises:
        ValueError: a score below 0 or not finite.
    """
    if not is_mass(saliency, among):
        score = saliency.score if among is None else saliency.score[among.mask]
        raise ValueError(
            f"layer shares need scores of at least 0, found {score[~(score >= 0) | score.isinf()][0]:.3g} in "
            f"{saliency.kind!r}; take its absolute value, or a score without a sign"
        )
    score = saliency.score.double()
    mass = (score if among is None else score.where(among.mask, 0.0)).sum(1)
    return (mass / mass.sum()).tolist()


def centre(saliency: Saliency, among: Neurons | None = None) -> float:
    """Centre of mass of the score over layers, 0 the first layer and 1 the last; NaN where all scores are 0.

    Raises:
        ValueError: a score below 0 or not finite.
    """
    share = layer_share(saliency, among)
    return float(np.dot(share, _depth(len(share))))


def rank_saliency_by_layer(
    saliency: Saliency, among: Neurons | None = None, *, bucket: int | None = None
) -> list[float]:
    """Mean rank saliency of each layer, 1 the most salient and 0 the least; ranks among the given neurons.

    `bucket` as in `Saliency.by_rank`. NaN for a layer without any of the neurons.
    """
    return saliency.by_rank(among, bucket=bucket).nanmean(1).tolist()


def score_by_layer(saliency: Saliency, among: Neurons | None = None) -> list[float]:
    """Mean score of each layer in the score's unit; NaN for a layer without any of the given neurons."""
    score = saliency.score if among is None else saliency.score.where(among.mask, torch.nan)
    return score.nanmean(1).tolist()


def saliency_by_layer(arm: Trajectory, selection: Selection = "matched") -> dict[str, list[float]]:
    """Mean rank saliency per layer at every stage.

    `"matched"` ranks the surviving neurons among themselves at every stage, base included (`Trajectory.matched`; in an
    unpruned arm, those that survive in the concept arm); `"all"` ranks all neurons; `"published"` ranks all of them
    too, and later takes the survivors' mean, as the release did. Pruning takes neurons from late layers by
    construction, so with the last two the concept seems to move to early layers even if nothing moves.
    """
    before, later = sides(arm.matched(), arm.survivors(), selection)
    by_stage = {}
    for stage, snapshot in arm.snapshots.items():
        chosen = before if stage == BASE else later
        ranked = snapshot.saliency.by_rank(None if selection == "published" else chosen)
        by_stage[stage] = (ranked if chosen is None else ranked.where(chosen.mask, torch.nan)).nanmean(1).tolist()
    return by_stage


@dataclass(frozen=True)
class Shift:
    """Where the concept sits in depth, at base and at a later stage."""

    base: float
    """Centre of mass of the score over layers, 0 the first layer and 1 the last."""
    later: float

    @property
    def moved(self) -> float:
        """Towards later layers if positive; in shares of the model's depth."""
        return self.later - self.base


@explained
def shift(arm: Trajectory, stage: str, selection: Selection = "matched", *, among: Neurons | None = None) -> Shift:
    """How far the centre of mass of the concept's score moved along the layers since base.

    Each stage's scores sum to 1 over the chosen neurons. Matched: the same neurons on both sides, `among` or
    `Trajectory.matched`. Survivors are chosen by their score at base, so their scores grow back towards the mean by
    chance alone, most where most was pruned: only the difference from a control arm on the same neurons is a move
    (`migration`). `"all"` takes all neurons on both sides, `"published"` all at base and the survivors later.

    Raises:
        ValueError: a score below 0 or not finite.
    """
    before, later = sides(arm.matched() if among is None else among, arm.survivors(), selection)
    return Shift(centre(arm[BASE].saliency, before), centre(arm[stage].saliency, later))


@dataclass(frozen=True)
class Compared:
    """A number of the concept arm, beside the control arm's; means over seeds, with an interval from three seeds on."""

    concept: Estimate
    control: Estimate | None
    gap: Estimate | None
    """Concept minus control, seed by seed, with the p-value of sign flips; None without a control."""


@dataclass(frozen=True)
class Migration:
    """Where the concept went between base and a stage, beside a control arm on the same neurons."""

    concept: str
    score: str
    """Kind of the score that was followed."""
    stage: str
    selection: Selection
    control: str | None
    """Name of the control arm; None without one."""
    seeds: int
    moved: Compared
    """Change of the centre of mass, in shares of the model's depth; positive towards later layers."""
    distance: Compared
    """Wasserstein distance between the layer distributions, in shares of the model's depth."""
    turnover: Compared | None
    """Share of the most salient neurons that are so no longer; None for the published comparison, whose two sides are
    not the same neurons."""
    share: dict[str, Compared]
    """Change of each layer's share of the score, by layer; intervals hold for all layers together (Bonferroni)."""
    to: str | None
    """The layer whose share gained most, beside the control where there is one; None if none gained."""
    from_: str | None
    """The layer whose share lost most."""

    def __str__(self) -> str:
        what = f"the {self.score} saliency of {self.concept!r}"
        if not math.isfinite(self.moved.concept.value):
            return (
                f"At base or stage {self.stage}, {what} is 0 in all of these neurons, so there is no move to speak of."
            )
        text = (
            f"From base to stage {self.stage}, {what} moved by {self.moved.concept.value:+.3f} of the model's depth "
            f"({_SAYS[self.selection]})"
        )
        gap, theirs = self.moved.gap, self.moved.control
        if gap is None or theirs is None or not math.isfinite(theirs.value):
            return f"{text}; without a control arm to compare with this is not evidence of a move."
        text += f", and by {theirs.value:+.3f} in the {self.control} arm"
        if self.selection != "matched":
            return f"{text}; pruning alone makes such a move, so this comparison is not evidence of one."
        if gap.interval is None:
            return f"{text}; {gap.over}, so this is a description, not a finding."
        verdict = "beyond" if gap.excludes(0) else "within"
        text += (
            f"; the difference, {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], is {verdict} noise over {gap.over} "
            f"(sign-flip p = {gap.p:.2g})."
        )
        clear = []
        for layer, verb in ((self.from_, "lost"), (self.to, "gained")):
            change = self.share[layer].gap if layer is not None else None
            if change is not None and change.excludes(0):
                clear.append(f"layer {layer} {verb} most ({100 * change.value:+.1f} % of the saliency)")
        return f"{text} Beside the {self.control} arm, {' and '.join(clear)}." if clear else text


_SAYS = {
    "matched": "the same surviving neurons on both sides",
    "all": "all neurons, pruned ones included",
    "published": "as published: all neurons at base, survivors later",
}


@explained
def migration(
    arms: Mapping[str, Sequence[Trajectory]],
    stage: str | None = None,
    *,
    selection: Selection = "matched",
    score: Callable[[Snapshot], Saliency] | None = None,
    control: str = "random",
    top: float = 0.1,
    level: float = 0.95,
) -> Migration:
    """Where the concept's score went from base to a stage (by default the last), and whether a control went there too.

    `arms` is arm name to one trajectory per seed. Matched: the neurons that survived in both arms, the same in both and
    at both stages, seed by seed. `score` takes a snapshot and gives what is followed, by default its saliency. With
    fewer than three seeds there is no interval. `top` is the share of neurons whose turnover is counted.

    Raises:
        ValueError: no concept arm, an unknown stage or selection, seeds that do not pair, no neuron that survived in
            both arms, or a score below 0.
    """
    ours, theirs, stage = _sides(arms, stage, selection, control)
    shared = [arm.matched() for arm in ours]
    if theirs is not None:
        shared = [mine.survivors() & other.survivors() for mine, other in zip(ours, theirs, strict=True)]
    if selection == "matched" and not all(len(neurons) for neurons in shared):
        raise ValueError("no neuron survived in both arms, so there is nothing to compare; prune a smaller fraction")

    def taken(snapshot: Snapshot) -> Saliency:
        return snapshot.saliency if score is None else score(snapshot)

    def followed(arm: Trajectory, neurons: Neurons) -> _Followed:
        before, later = (taken(arm[s]) for s in (BASE, stage))
        then, now = sides(neurons, arm.survivors(), selection)
        old, new = np.array(layer_share(before, then)), np.array(layer_share(later, now))
        depth = _depth(len(old))
        k = max(1, round(top * count_of(before, then)))
        left = math.nan if selection == "published" else turnover(before, later, k, then).left
        return _Followed(float((new - old) @ depth), _distance(old, new), left, new - old)

    mine = [followed(arm, neurons) for arm, neurons in zip(ours, shared, strict=True)]
    other = None if theirs is None else [followed(arm, neurons) for arm, neurons in zip(theirs, shared, strict=True)]

    def beside(of: Callable[[_Followed], float], level: float = level) -> Compared:
        return _compared([of(f) for f in mine], [of(f) for f in other] if other is not None else None, level)

    layers = ours[0].site.layers
    share = {
        name: beside(lambda f, i=i: float(f.share[i]), bonferroni(level, len(layers))) for i, name in enumerate(layers)
    }
    change = {name: (shares.gap or shares.concept).value for name, shares in share.items()}
    to, from_ = max(change, key=lambda name: change[name]), min(change, key=lambda name: change[name])
    return Migration(
        concept=name_of(ours[0]),
        score=taken(ours[0][BASE]).kind,
        stage=stage,
        selection=selection,
        control=control if theirs is not None else None,
        seeds=len(ours),
        moved=beside(lambda f: f.moved),
        distance=beside(lambda f: f.distance),
        turnover=None if selection == "published" else beside(lambda f: f.left),
        share=share,
        # Shares are rounded: a change of 1e-17 is none.
        to=to if change[to] > 1e-9 else None,
        from_=from_ if change[from_] < -1e-9 else None,
    )


def _sides(
    arms: Mapping[str, Sequence[Trajectory]], stage: str | None, selection: str, control: str
) -> tuple[Sequence[Trajectory], Sequence[Trajectory] | None, str]:
    """The concept's arm, the control's and the stage, as far as they can be compared."""
    if not arms.get("concept"):
        raise ValueError(f"migration needs a concept arm, found {', '.join(arms) or 'none'}")
    if selection not in get_args(Selection):
        raise ValueError(unknown("selection", selection, get_args(Selection)))
    ours, theirs = arms["concept"], arms.get(control)
    if theirs is not None and [arm.seed for arm in ours] != [arm.seed for arm in theirs]:
        raise ValueError(
            f"the arms are compared seed by seed, got seeds {[arm.seed for arm in ours]} of concept and "
            f"{[arm.seed for arm in theirs]} of {control}"
        )
    stage = ours[0].stages[-1] if stage is None else stage
    for arm in (*ours, *(theirs or ())):
        if missing := [name for name in (BASE, stage) if name not in arm.stages]:
            raise ValueError(
                f"{arm.arm or 'an arm'} has no stage {missing[0]!r}; it has {', '.join(arm.stages)}"
                f"{meant(missing[0], arm.stages)}"
            )
    return ours, theirs, stage


class _Followed(NamedTuple):
    moved: float
    distance: float
    left: float
    share: np.ndarray


def _compared(ours: Sequence[float], theirs: Sequence[float] | None, level: float) -> Compared:
    """Concept and control, with intervals if there are seeds enough."""

    def explained(beside: Estimate) -> Estimate:
        if len(ours) >= FEWEST_SEEDS:
            return beside
        over = ONE_SEED if len(ours) == 1 else f"{len(ours)} training seeds: too few for an interval"
        return Estimate(beside.value, math.nan, math.nan, over, n=len(ours))

    control = None if theirs is None else explained(over_seeds(theirs, level=level))
    gap = None
    if theirs is not None:
        beside = beside_control(ours, [[value] for value in theirs], level)
        over = f"{len(ours)} seeds and the spread of the control"
        gap = explained(replace(beside.effect, p=beside.p_flips, over=over, n=len(ours)))
    return Compared(explained(over_seeds(ours, level=level)), control, gap)


def sides(matched: Neurons, survivors: Neurons, selection: Selection) -> tuple[Neurons | None, Neurons | None]:
    """The neurons at base and later; None for all."""
    if selection == "matched":
        return matched, matched
    return None, survivors if selection == "published" else None


def _depth(layers: int) -> np.ndarray:
    return np.linspace(0, 1, layers)


def _distance(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> float:
    """Least share of the depth that the score must travel from one distribution over layers to the other, 0 to 1.

    Never below the distance of the centres; above it where the score spreads, gathers or swaps places. Noise alone
    makes it positive, so it needs a control beside it.
    """
    if not np.isfinite([*before, *after]).all():
        return math.nan
    depth = _depth(len(before))
    return float(st.wasserstein_distance(depth, depth, before, after))
