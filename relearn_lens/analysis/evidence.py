"""Evidence: what the arms of a run show, measured arm by arm, before anything is claimed of it.

A measurement takes one arm and the neurons that it is about. `Evidence.each` takes it in an arm seed by seed, on the
neurons that survive in the concept arm and in the random arm. `Missing` says what a run would have had to measure.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from relearn_lens.analysis import migration, priming, recovery
from relearn_lens.analysis.intervals import Estimate, estimate, over_neurons, over_sentences
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure import meaning
from relearn_lens.measure.evaluation import Label, Scores, TokenLoss
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.neurons.sites import Neurons

Arms = Mapping[str, Sequence[Trajectory]]
T = TypeVar("T")


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
        self.unpruned = arms.get("unpruned", ())
        self.level, self.draws = level, draws
        self.stages = recovery.retraining_stages(self.concept[0])
        if not {BASE, PRUNED} <= set(self.concept[0].stages) or not self.stages:
            raise ValueError(
                f"claims need the stages {BASE}, {PRUNED} and training after them, found "
                f"{', '.join(self.concept[0].stages)}"
            )
        seeds = [arm.seed for arm in self.concept]
        for name, side in (("random", self.random), ("unpruned", self.unpruned)):
            if side and [arm.seed for arm in side] != seeds:
                raise ValueError(
                    f"the arms are compared seed by seed, got seeds {seeds} of concept and "
                    f"{[arm.seed for arm in side]} of {name}"
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

    @property
    def in_nats(self) -> bool:
        """Whether the score is a language model's gain in nats, which has no upper end."""
        return isinstance(self.concept[0][BASE].scores, TokenLoss)

    def unknown(self) -> str:
        """Why shares of the base score are not defined; empty if they are."""
        known = all(self.score(arm, BASE) > 0 for arm in (*self.concept, *self.random))
        return "" if known else f"a base model has no {self.quantity} on {self.name!r} to lose"

    def estimate(self, of: Callable[..., object], arms: Sequence[Trajectory], *stages: str) -> Estimate:
        """A function of the scores at some stages, over the seeds of an arm, with its interval."""
        columns = [[arm[stage].scores for arm in arms] for stage in stages]
        return estimate(of, self.label, *columns, level=self.level, draws=self.draws)

    def shared(self) -> list[Neurons]:
        """Per seed, the neurons that survive in the concept arm and in the random arm, if there is one."""
        if not self.random:
            return [arm.survivors() for arm in self.concept]
        return [c.survivors() & r.survivors() for c, r in zip(self.concept, self.random, strict=True)]

    def each(self, of: Callable[[Trajectory, Neurons], T], arms: Sequence[Trajectory]) -> list[T]:
        """A measurement per seed in an arm, on the neurons that all arms share."""
        return [of(arm, among) for arm, among in zip(arms, self.shared(), strict=True)]

    def random_sets_of(self, i: int) -> list[Scores]:
        """The scores of a seed's random sets; without any, that of the random arm right after pruning.

        The arm's set may be of another kind than the sets are, so it is never counted among them.
        """
        if self.has_sets:
            return list(self.random_sets[i])
        return [self.random[i][PRUNED].scores] if i < len(self.random) else []

    @property
    def has_sets(self) -> bool:
        """Whether every seed has random sets besides the random arm."""
        return len(self.random_sets) >= len(self.concept) and all(self.random_sets)

    @property
    def sets(self) -> str:
        """What the concept's damage is beside."""
        return "random sets of the same size per layer" if self.has_sets else "the random arm's set"

    def random_losses(self) -> list[list[float]]:
        """Per seed, the share of the base score that each random set takes; nothing is trained."""
        return [
            [float(1 - s.value(self.label) / base) for s in self.random_sets_of(i)] if base > 0 else []
            for i, base in enumerate(self.score(concept, BASE) for concept in self.concept)
        ]

    def least(self) -> float | None:
        """How finely the text tells the concept's damage from a random set's: half the width of the paired interval
        over sentences, the widest of the seeds; None without an interval."""
        halves = []
        for i, arm in enumerate(self.concept):
            scores = (arm[BASE].scores, arm[PRUNED].scores, *self.random_sets_of(i))
            with contextlib.suppress(ValueError):  # sets that were scored on other sentences cannot be paired
                interval = over_sentences(_random_less_own, self.label, *scores, level=self.level, draws=self.draws)
                half = max(interval.high - interval.value, interval.value - interval.low)
                if half == 0 and np.ptp([s.value(self.label) for s in self.random_sets_of(i)]) == 0:
                    # Not one of n sentences is an exception: up to 3 of n could be (Hanley & Lippman-Hand 1983).
                    half = 3 / len(arm[BASE].scores.sums(self.label))
                halves.append(half)
        return max((half for half in halves if math.isfinite(half)), default=None)


def _random_less_own(base: Any, own: Any, *random: Any) -> Any:
    """Share of base that random sets take on average, less what the concept's own neurons take."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (own - np.mean(random, axis=0)) / base


def lost(base: object, pruned: object) -> object:
    """Share of the base score that pruning took."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - np.divide(pruned, base)  # pyright: ignore[reportCallIssue, reportArgumentType]


def depth_of_top(saliency: Saliency, k: int) -> float:
    """Mean depth of the k most salient neurons, 0 the first layer and 1 the last."""
    return _mean_depth(saliency.top(k).mask.sum(1).double().numpy())


def _mean_depth(mass: np.ndarray) -> float:
    """Of what each layer has, 0 the first layer and 1 the last."""
    return float((mass * np.linspace(0, 1, len(mass))).sum() / mass.sum())


def earlier_unmatched(arm: Trajectory, stage: str) -> float:
    """How much earlier rank saliency sits in a stage's survivors than in all base neurons, in shares of the depth."""
    by_stage = migration.saliency_by_layer(arm, "published")
    base, later = (_mean_depth(np.nan_to_num(np.array(by_stage[each]))) for each in (BASE, stage))
    return base - later


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
    return _mean_depth(gain) if gain.sum() > 0 else math.nan


def predicted(arm: Trajectory, stage: str, among: Neurons, *, by_words: bool) -> float:
    """How far what neurons were before foretells what they become, within layers.

    By words: partial rank correlation of how near their top words were to the concept's with their saliency at a stage,
    given their saliency before, or neurons that merely stay salient would look primed. Else the rank correlation of
    saliency before with what is gained by then, which regression to the mean makes negative: only a control arm on the
    same neurons says what it means.
    """
    base, now = arm[BASE], arm[stage].saliency
    before = base.near_concept if by_words else base.saliency.score
    assert before is not None
    known = before.isfinite() & base.saliency.score.isfinite() & now.score.isfinite() & among.mask
    if known.sum() < 3:
        raise Missing("fewer than three neurons have both numbers (a larger probe corpus)")
    if not by_words:
        now = replace(now, score=now.score - base.saliency.score)
    # No interval is needed.
    primed = priming.priming(before, now, among, given=base.saliency if by_words else None, draws=2)
    return primed.correlation.value


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
    cosines = arm[stage].meaning
    if cosines is None:
        raise Missing("concept similarity at the last stage (measure.what with top_words)")
    layer, index = (among.mask & cosines.isfinite()).nonzero(as_tuple=True)
    return layer.numpy() / max(1, len(cosines) - 1), cosines[layer, index].double().numpy()


def falls_with_depth(arm: Trajectory, stage: str, among: Neurons, level: float) -> Estimate:
    """Minus the rank correlation of layer depth and concept similarity, with its interval over neurons."""
    depth, similar = similarity(arm, stage, among)
    if len(set(depth)) < 2 or len(set(similar)) < 2:
        raise Missing("no two layers have neurons whose similarity differs (a smaller prune.fraction)")
    return over_neurons(_minus_rank_correlation, depth, similar, weighted=True, level=level, draws=200)


def _minus_rank_correlation(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of draws that hold each neuron so many times. Ranks are whole or half numbers, so no sum of them is rounded."""
    a, b = (_centred_rank(weight, values) for values in (x, y))
    spread = np.sqrt((weight * a * a).sum(-1) * (weight * b * b).sum(-1))
    return -np.divide((weight * a * b).sum(-1), spread, out=np.full(len(a), np.nan), where=spread > 0)


def _centred_rank(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The rank of each neuron in each draw less the mean rank; ties share theirs. To sort every draw takes longer."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    each = np.add.reduceat(weight[:, np.argsort(which)], np.cumsum(counts) - counts, axis=1)
    rank = np.cumsum(each, axis=1) - (each - 1) / 2
    return rank[:, which] - (weight.sum(-1, keepdims=True) + 1) / 2


def falls_with_training(arm: Trajectory, stage: str, among: Neurons, level: float) -> Estimate:
    """Mean concept similarity right after pruning, or 1 where it was not measured there, less that at a stage."""
    now = arm[stage].meaning
    if now is None:
        raise Missing("concept similarity at the last stage (measure.what with top_words)")
    first = arm[PRUNED].meaning
    before = torch.ones_like(now) if first is None else first
    known = among.mask & now.isfinite() & before.isfinite()
    if not known.any():
        raise Missing("no neuron has a similarity (a smaller prune.fraction, or a larger probe corpus)")
    return over_neurons(
        lambda weight, each: weight @ each / weight.sum(-1), (before - now)[known].double().numpy(), weighted=True,
        level=level, draws=200,
    )  # fmt: skip
