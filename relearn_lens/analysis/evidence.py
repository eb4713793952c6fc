"""Evidence: what the arms of a run show, measured arm by arm, before anything is claimed of it.

A measurement takes one arm and the neurons that it is about. `Evidence.each` takes it in the concept arm and in the
random arm of the same seed, on the neurons that survive in both. `Missing` says what a run would have had to measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats as st

from relearn_lens.analysis import migration, priming, recovery
from relearn_lens.analysis.intervals import Estimate, estimate
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure import meaning
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.neurons.sites import Neurons

Arms = Mapping[str, Sequence[Trajectory]]


class Missing(Exception):
    """A measurement that this run did not take."""


class Evidence:
    """The arms of a run, and how to compare them.

    Raises:
        ValueError: a concept arm without retraining, or arms whose seeds do not pair.
    """

    def __init__(
        self,
        arms: Arms,
        label: Label,
        random_sets: Sequence[Sequence[Scores]],
        level: float,
        draws: int,
    ):
        self.arms, self.label, self.random_sets = arms, label, random_sets
        self.concept = arms["concept"]
        self.random = arms.get("random", ())
        self.level, self.draws = level, draws
        self.stages = recovery.retraining_stages(self.concept[0])
        if not {BASE, PRUNED} <= set(self.concept[0].stages) or not self.stages:
            raise ValueError(
                f"claims need the stages {BASE}, {PRUNED} and training after them, found "
                f"{', '.join(self.concept[0].stages)}"
            )
        seeds = [[arm.seed for arm in side] for side in (self.concept, self.random)]
        if self.random and seeds[0] != seeds[1]:
            raise ValueError(
                f"the arms are compared seed by seed, got seeds {seeds[0]} of concept and {seeds[1]} of random"
            )
        self.last = self.stages[-1]

    @property
    def name(self) -> str:
        """Of the concept."""
        return recovery.name_of(self.concept[0])

    def score(self, arm: Trajectory, stage: str) -> float:
        """The concept's score at a stage of an arm."""
        return arm[stage].scores.value(self.label)

    @property
    def quantity(self) -> str:
        """What shares are taken of: F1, or what a language model gains over a uniform guess."""
        return self.concept[0][BASE].scores.quantity

    def unknown(self) -> str:
        """Why shares of the base score are not defined; empty if they are."""
        base = [self.score(arm, BASE) for arm in (*self.concept, *self.random)]
        return (
            "" if all(score > 0 for score in base) else f"a base model has no {self.quantity} on {self.name!r} to lose"
        )

    def estimate(self, of: Callable[..., object], arms: Sequence[Trajectory], *stages: str) -> Estimate:
        """A function of the scores at some stages, over the seeds of an arm, with its interval."""
        columns = [[arm[stage].scores for arm in arms] for stage in stages]
        return estimate(of, self.label, *columns, level=self.level, draws=self.draws)

    def shared(self) -> list[Neurons]:
        """Per seed, the neurons that survive in the concept arm and in the random arm."""
        return [c.survivors() & r.survivors() for c, r in zip(self.concept, self.random, strict=True)]

    def each(self, of: Callable[[Trajectory, Neurons], float]) -> tuple[list[float], list[float]]:
        """A measurement per seed in the concept arm and in the random arm, on the same neurons."""
        pairs = list(zip(self.concept, self.random, self.shared(), strict=True))
        return [of(c, among) for c, _, among in pairs], [of(r, among) for _, r, among in pairs]

    def random_losses(self) -> list[list[float]]:
        """Per seed, the share of the base score that each random set takes; nothing is trained."""
        found = []
        for i, concept in enumerate(self.concept):
            base = self.score(concept, BASE)
            scores = [s.value(self.label) for s in self.random_sets[i]] if i < len(self.random_sets) else []
            if i < len(self.random):
                scores.append(self.score(self.random[i], PRUNED))
            found.append([float(1 - s / base) for s in scores] if base > 0 else [])
        return found


def lost(base: object, pruned: object) -> object:
    """Share of the base score that pruning took."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - np.divide(pruned, base)  # pyright: ignore[reportCallIssue, reportArgumentType]


def depth_of_top(saliency: Saliency, k: int) -> float:
    """Mean depth of the k most salient neurons, 0 the first layer and 1 the last."""
    per_layer = saliency.top(k).mask.sum(1).double().numpy()
    return float((per_layer * np.linspace(0, 1, len(per_layer))).sum() / k)


def earlier_unmatched(arm: Trajectory, stage: str) -> float:
    """How much earlier rank saliency sits in a stage's survivors than in all base neurons, in shares of the depth."""
    by_stage = migration.saliency_by_layer(arm, "published")

    def centre(by_layer: list[float]) -> float:
        share = np.nan_to_num(np.array(by_layer))
        return float((share * np.linspace(0, 1, len(share))).sum() / share.sum())

    return centre(by_stage[BASE]) - centre(by_stage[stage])


_SIGNED = "some scores are below 0 or undefined, so they have no centre of mass (another score)"


def moved(arm: Trajectory, stage: str, among: Neurons) -> float:
    """How far the score's centre of mass moved from base to a stage, in shares of the depth; later is above 0."""
    if not all(migration.is_mass(arm[s].saliency) for s in (BASE, stage)):
        raise Missing(_SIGNED)
    return migration.shift(arm, stage, "matched", among=among).moved


def regained(arm: Trajectory, stage: str, among: Neurons) -> float:
    """Mean depth of the score that neurons have gained since pruning, 0 the first layer and 1 the last."""
    if not all(migration.is_mass(arm[s].saliency) for s in (PRUNED, stage)):
        raise Missing(_SIGNED)
    now, cut = (arm[s].saliency.score.where(among.mask, 0.0).sum(1).double() for s in (stage, PRUNED))
    gain = (now - cut).clamp(min=0).numpy()
    return float((gain * np.linspace(0, 1, len(gain))).sum() / gain.sum()) if gain.sum() > 0 else math.nan


def predicted(arm: Trajectory, stage: str, among: Neurons, *, by_words: bool) -> float:
    """Rank correlation, within layers, of what neurons were before with their saliency at a stage; before is how near
    their top words were to the concept's, or their saliency."""
    before = arm[BASE].near_concept if by_words else arm[BASE].saliency.score
    assert before is not None
    known = before.isfinite() & arm[stage].saliency.score.isfinite() & among.mask
    if known.sum() < 3:
        raise Missing("fewer than three neurons have both numbers (a larger probe corpus)")
    return priming.priming(before, arm[stage].saliency, among, draws=2).correlation.value  # no interval needed


def mixed(arm: Trajectory, stage: str, among: Neurons) -> float:
    """Share of the neurons new in the top tenth that keep an old top word and gained one of the concept's."""
    base, now = arm[BASE], arm[stage]
    if base.words is None or now.words is None:
        raise Missing("top words of base and last stage (measure.what with top_words)")
    heirs = priming.heirs(base.saliency, now.saliency, max(1, len(among) // 10), among)
    both = meaning.polysemy(base.words, now.words, base.concept_words, neurons=heirs)
    known = int((~both.kept.isnan()).sum())
    return len(both.mixed) / known if known else math.nan


def similarity(arm: Trajectory, stage: str, among: Neurons) -> tuple[np.ndarray, np.ndarray]:
    """Layer depth and concept similarity at a stage of every neuron that has one."""
    found = arm[stage].meaning
    if found is None:
        raise Missing("concept similarity at the last stage (measure.what with top_words)")
    layer, index = (among.mask & found.isfinite()).nonzero(as_tuple=True)
    return layer.numpy() / max(1, len(found) - 1), found[layer, index].double().numpy()


def falls_with_depth(arm: Trajectory, stage: str, among: Neurons) -> float:
    """Minus the rank correlation of layer depth and concept similarity."""
    depth, similar = similarity(arm, stage, among)
    if len(set(depth)) < 2 or len(set(similar)) < 2:
        return math.nan
    found: Any = st.spearmanr(depth, similar)  # stubs and scipy do not agree on what this is
    return -float(found.statistic)
