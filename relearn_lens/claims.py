"""The paper's claims as rows: what was measured, beside its control, with an interval and a verdict.

How a verdict is made, the same for every row:

1. Each claim is an *effect*, positive in the direction of the claim, and a *bar*: the smallest effect that counts.
2. Where the claim is about training, the effect is the concept arm minus the random arm of the same seed, on the same
   neurons. Its interval is the wider of two: Student's t over training seeds, and where one more random arm would lie.
   The second is there because seeds share their text and often most of the chosen neurons: what these do by chance they
   do in every seed. With fewer than three seeds there is no verdict.
3. Where there is a null that needs no training (C3a, C4), it takes the place of the random arm, and one seed will do.
   C1, C2 and the unmatched C5 are as published, without a control in the effect; it stands beside them. Of one seed
   their interval is over sentences, if there is one.
4. *supported*: the interval lies above the bar. *reversed*: below minus the bar. *not supported*: between the two.
   *inconclusive*: anything else. Change the sign of the data, and supported and reversed change places.

A verdict holds at the level of the run's intervals, each by itself; `holm` corrects the p-values over all rows.
Source: the claims are those of Lo et al. 2024 (METHODS 7 numbers them), the effects, bars and controls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats as st

from relearn_lens import meaning, migration, priming, recovery
from relearn_lens.evaluation import Label, Scores
from relearn_lens.intervals import FEWEST_SEEDS, Estimate, Gap, beside_control, estimate, holm, over_seeds
from relearn_lens.neurons import Neurons
from relearn_lens.saliency import Saliency
from relearn_lens.tracking import BASE, PRUNED, Trajectory

Verdict = Literal["supported", "not supported", "reversed", "inconclusive"]
Arms = Mapping[str, Sequence[Trajectory]]


@dataclass(frozen=True)
class Claim:
    """One claim, measured."""

    id: str
    says: str
    """The claim in a few words."""
    effect: Estimate | None
    """Positive in the direction of the claim; None where it could not be measured."""
    measures: str
    """What the effect is, with its unit."""
    bar: float
    """The smallest effect that counts."""
    verdict: Verdict
    why: str
    """One sentence: the numbers behind the verdict, the control among them."""
    concept: float | None = None
    """The measurement in the concept arm, mean over seeds."""
    control: float | None = None
    """The same in the control, mean over seeds."""
    control_is: str = ""
    p: float | None = None
    """Two-sided p-value of no effect by Student's t: like the interval of two kinds, the larger. Not corrected."""
    p_holm: float | None = None
    """`p` corrected for the number of claims with a p-value."""
    p_flips: float | None = None
    """Of sign flips over seeds; n seeds cannot give less than 2 / 2**n."""


def verdict_of(effect: Estimate | None, bar: float | int) -> Verdict:
    """The verdict that an interval gives; see the module's docstring."""
    if effect is None or effect.interval is None:
        return "inconclusive"
    low, high = effect.interval
    if low > bar:
        return "supported"
    if high < -bar:
        return "reversed"
    if -bar <= low and high <= bar:
        return "not supported"
    return "inconclusive"


def claims(
    arms: Arms,
    label: Label,
    *,
    random_sets: Sequence[Sequence[Scores]] = (),
    level: float = 0.95,
    draws: int = 1000,
) -> list[Claim]:
    """C1 to C9 of a run's arms (name to one trajectory per seed).

    `random_sets` are, per seed, the scores of the base model with random sets of neurons ablated. A claim whose
    measurements were not taken is inconclusive and says what to measure.

    Raises:
        ValueError: a concept arm without retraining, or arms whose seeds do not pair.
    """
    if not arms.get("concept"):
        return []
    run = _Measured(arms, label, random_sets, level, draws)
    rows = [
        _collapse(run), _returns(run), _random_costs_more(run), _random_is_slower(run), _late_before(run),
        _earlier_as_published(run), _earlier_matched(run), _early_layers_first(run), _primed(run), _mixed(run),
        _similarity_by_depth(run), _similarity_by_training(run),
    ]  # fmt: skip
    tested = [i for i, row in enumerate(rows) if row.p is not None and math.isfinite(row.p)]
    corrected = holm([float(rows[i].p or 0.0) for i in tested])
    for i, p in zip(tested, corrected, strict=True):
        rows[i] = replace(rows[i], p_holm=p)
    return rows


class _Measured:
    """The arms of a run, and how to compare them."""

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
        return recovery.name_of(self.concept[0])

    def score(self, arm: Trajectory, stage: str) -> float:
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
        columns = [[arm[stage].scores for arm in arms] for stage in stages]
        return estimate(of, self.label, *columns, level=self.level, draws=self.draws)

    def shared(self) -> list[Neurons]:
        """Per seed, the neurons that survive in the concept arm and in the random arm."""
        return [c.survivors() & r.survivors() for c, r in zip(self.concept, self.random, strict=True)]

    def each(self, of: Callable[[Trajectory, Neurons], float]) -> tuple[list[float], list[float]]:
        """A measurement per seed in the concept arm and in the random arm, on the same neurons."""
        pairs = list(zip(self.concept, self.random, self.shared(), strict=True))
        return [of(c, among) for c, _, among in pairs], [of(r, among) for _, r, among in pairs]

    def versus(
        self,
        id: str,
        says: str,
        measures: str,
        bar: float,
        of: Callable[[Trajectory, Neurons], float],
    ) -> Claim:
        """A claim about training: the concept arm against the random arm, over seeds."""
        if not self.random:
            return _unmeasured(id, says, measures, bar, "there is no random arm to compare with (arms with random)")
        if not all(map(len, self.shared())):
            return _unmeasured(id, says, measures, bar, "no neuron survived in both arms (a smaller prune.fraction)")
        try:
            ours, theirs = self.each(of)
        except _Missing as missing:
            return _unmeasured(id, says, measures, bar, str(missing))
        if not np.isfinite([*ours, *theirs]).all():
            return _unmeasured(
                id, says, measures, bar, "it is not defined here, in an arm there was nothing to take it over"
            )
        gap = beside_control(ours, [[value] for value in theirs], self.level)
        beside = f"{np.mean(ours):.3f} in the concept arm, {np.mean(theirs):.3f} in the random arm"
        row = Claim(
            id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), float(np.mean(theirs)),
            "random arm, same neurons", p_flips=gap.p_flips,
        )  # fmt: skip
        if len(ours) < FEWEST_SEEDS:
            few = f"{len(ours)} training seed{'s' if len(ours) > 1 else ''}"
            return replace(
                row,
                effect=Estimate(gap.effect.value, math.nan, math.nan, few, n=len(ours)),
                why=f"{_said(beside)}; {few} cannot tell this from training noise (--set seeds=[0,1,2] or more).",
            )
        return _judged(row, gap, beside)


def _judged(row: Claim, gap: Gap, beside: str) -> Claim:
    """A row with its verdict and what it rests on."""
    effect = gap.effect
    why = f"{_said(beside)}{_reading(effect, row.bar)}."
    return replace(row, effect=effect, p=gap.p, p_flips=gap.p_flips, verdict=verdict_of(effect, row.bar), why=why)


class _Missing(Exception):
    """A measurement that this run did not take."""


def _unmeasured(id: str, says: str, measures: str, bar: float, why: str) -> Claim:
    return Claim(id, says, None, measures, bar, "inconclusive", f"Not measured: {why}.")


def _said(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reading(effect: Estimate, bar: float) -> str:
    """What the interval says, in words."""
    match verdict_of(effect, bar):
        case "supported":
            return ": beyond the control by more than the bar"
        case "reversed":
            return ": beyond the control the other way"
        case "not supported":
            return ": the control shows the same"
    return ": the interval reaches across the bar" if effect.interval else "; one value of the control has no interval"


def _lost(base: object, pruned: object) -> object:
    """Share of the base score that pruning took."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - np.divide(pruned, base)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _collapse(run: _Measured) -> Claim:
    says, bar = "Pruning the concept's neurons collapses performance", 0.5
    measures = f"share of the base model's {run.quantity} on the concept that pruning takes"
    if unknown := run.unknown():
        return _unmeasured("C1", says, measures, bar, unknown)
    effect = run.estimate(_lost, run.concept, BASE, PRUNED)
    theirs = _random_losses(run)
    control = float(np.mean([v for seed in theirs for v in seed])) if any(theirs) else None
    beside = f"pruning took {effect.value:.0%} of the {run.quantity} of {run.name!r}"
    if control is None:
        beside += "; there is no random set to compare with"
    elif 0 < effect.value / 2 <= control:
        beside += (
            f"; as many random neurons took {control:.0%}, so the collapse is not specific to the concept's neurons"
        )
    else:
        beside += f"; as many random neurons took {control:.0%}"
    return Claim(
        "C1", says, effect, measures, bar, verdict_of(effect, bar), f"{_said(beside)}.", effect.value, control,
        "random sets of the same size per layer",
    )  # fmt: skip


def _random_losses(run: _Measured) -> list[list[float]]:
    """Per seed, the share of the base score that each random set takes; nothing is trained."""
    found = []
    for i, concept in enumerate(run.concept):
        base = run.score(concept, BASE)
        scores = [s.value(run.label) for s in run.random_sets[i]] if i < len(run.random_sets) else []
        if i < len(run.random):
            scores.append(run.score(run.random[i], PRUNED))
        found.append([float(1 - s / base) for s in scores] if base > 0 else [])
    return found


def _returns(run: _Measured) -> Claim:
    says, bar = "The concept returns within a few epochs", 0.9
    measures = f"share of the lost {run.quantity} that is back after {run.last} epoch(s)"
    back = recovery.recovery(run.concept, run.label, run.last, level=run.level, draws=run.draws)
    if back.share is None:
        return _unmeasured("C2", says, measures, bar, f"the damage ({back.damage}) is within noise")
    if not math.isfinite(back.share.value):
        return _unmeasured("C2", says, measures, bar, "in a seed pruning did no damage that could be made good")
    control = None
    beside = f"{back.share.value:.0%} of the loss is back after {run.last} epoch(s)"
    if run.random:
        theirs = recovery.recovery(run.random, run.label, run.last, level=run.level, draws=run.draws)
        control = theirs.share.value if theirs.share else None
        beside += f", {control:.0%} in the random arm" if control is not None else "; the random arm lost nothing"
    if unpruned := run.arms.get("unpruned"):
        drift = np.mean([run.score(arm, run.last) - run.score(arm, BASE) for arm in unpruned])
        beside += f"; training on without pruning changed {run.quantity} by {drift:+.3f}"
    said = f"{_said(beside)}; the claim's bar is {bar:.0%}."
    return Claim(
        "C2", says, back.share, measures, bar, verdict_of(back.share, bar), said, back.share.value, control,
        "random arm",
    )  # fmt: skip


def _random_costs_more(run: _Measured) -> Claim:
    id, says, bar = "C3a", "Random pruning costs more than pruning the concept's neurons", 0.05
    measures = f"share of base {run.quantity} lost to random sets minus share lost to the concept's neurons"
    if unknown := run.unknown():
        return _unmeasured(id, says, measures, bar, unknown)
    theirs = _random_losses(run)
    if not all(theirs):
        return _unmeasured(id, says, measures, bar, "there are no random sets (prune.control_draws)")
    ours = [1 - run.score(arm, PRUNED) / run.score(arm, BASE) for arm in run.concept]
    # The claim is that the control loses more.
    gap = beside_control([-v for v in ours], [[-v for v in each] for each in theirs], run.level)
    control = float(np.mean([np.mean(each) for each in theirs]))
    row = Claim(
        id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), control,
        "random sets of the same size per layer",
    )  # fmt: skip
    return _judged(
        row, gap, f"random sets take {control:.0%} of the {run.quantity}, the concept's neurons {np.mean(ours):.0%}"
    )


def _random_is_slower(run: _Measured) -> Claim:
    id, says, bar = "C3b", "After random pruning the concept returns more slowly", 0.05
    measures = f"mean {run.quantity} over the stages of retraining as a share of base, concept arm minus random arm"
    if unknown := run.unknown():
        return _unmeasured(id, says, measures, bar, unknown)

    def area(arm: Trajectory, _: Neurons) -> float:
        return float(np.mean([run.score(arm, stage) for stage in run.stages]) / run.score(arm, BASE))

    return run.versus(id, says, measures, bar, area)


def _depth_of_top(saliency: Saliency, k: int) -> float:
    """Mean depth of the k most salient neurons, 0 the first layer and 1 the last."""
    per_layer = saliency.top(k).mask.sum(1).double().numpy()
    return float((per_layer * np.linspace(0, 1, len(per_layer))).sum() / k)


def _late_before(run: _Measured) -> Claim:
    id, says, bar = "C4", "Before pruning, salient neurons sit in later layers", 0.05
    measures = "mean depth (0 to 1) of the pruned share of the ranking, minus the same under shuffled labels"
    bases = [arm[BASE] for arm in run.concept]
    ks = [len(arm.pruned) if arm.pruned else arm.site.n_neurons // 2 for arm in run.concept]
    ours = [_depth_of_top(base.saliency, k) for base, k in zip(bases, ks, strict=True)]
    if not all(base.shuffled for base in bases):
        row = _unmeasured(
            id,
            says,
            measures,
            bar,
            f"mean depth {np.mean(ours):.3f}, but no label shuffles to compare (measure.shuffles)",
        )
        return replace(row, concept=float(np.mean(ours)))
    nulls = [[_depth_of_top(s, k) for s in base.shuffled] for base, k in zip(bases, ks, strict=True)]
    gap = beside_control(ours, nulls, run.level)
    control = float(np.mean([np.mean(null) for null in nulls]))
    row = Claim(
        id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), control, "label shuffles"
    )
    return _judged(row, gap, f"mean depth {np.mean(ours):.3f}, under shuffled labels {control:.3f} (0.5 is the middle)")


def _earlier_as_published(run: _Measured) -> Claim:
    id, says, bar = "C5 unmatched", "After retraining the concept sits in earlier layers (as published)", 0.02
    measures = "depth lost between all base neurons and the retrained survivors, by rank saliency; no control"

    def centre(by_layer: list[float]) -> float:
        share = np.nan_to_num(np.array(by_layer))
        return float((share * np.linspace(0, 1, len(share))).sum() / share.sum())

    if not all(len(arm.survivors()) for arm in run.concept):
        return _unmeasured(id, says, measures, bar, "no neuron survived (a smaller prune.fraction)")

    def earlier(arm: Trajectory) -> float:
        by_stage = migration.saliency_by_layer(arm, "published")
        return centre(by_stage[BASE]) - centre(by_stage[run.last])

    ours = [earlier(arm) for arm in run.concept]
    mean = float(np.mean(ours))
    what = (
        f"{abs(mean):.3f} of the depth {'earlier' if mean > 0 else 'later'}, but all base neurons are compared with "
        "survivors, so pruning late layers alone looks like this"
    )
    control = None
    if unpruned := run.arms.get("unpruned"):
        control = float(np.mean([earlier(arm) for arm in unpruned]))
        what += f"; training on without pruning moved it {abs(control):.3f} {'earlier' if control > 0 else 'later'}"
    row = Claim(id, says, None, measures, bar, "inconclusive", f"{_said(what)}.", mean, control)
    if control is not None:
        row = replace(row, control_is="unpruned arm; it is not in the effect")
    effect = over_seeds(ours, level=run.level)
    if len(ours) < FEWEST_SEEDS:
        return replace(row, effect=effect, why=f"{_said(what)}; {len(ours)} training seed(s).")
    return replace(row, effect=effect, verdict=verdict_of(effect, bar))


SIGNED = "some scores are below 0 or undefined, so they have no centre of mass (another score)"


def _earlier_matched(run: _Measured) -> Claim:
    return run.versus(
        "C5 matched", "After retraining the concept sits in earlier layers (same neurons, against control)",
        "move of the score's centre of mass towards earlier layers, shares of the depth, concept minus random arm",
        0.02, lambda arm, among: -_moved(arm, run.last, among),
    )  # fmt: skip


def _moved(arm: Trajectory, stage: str, among: Neurons) -> float:
    if not all(migration.is_mass(arm[s].saliency) for s in (BASE, stage)):
        raise _Missing(SIGNED)
    return migration.shift(arm, stage, "matched", among=among).moved


def _early_layers_first(run: _Measured) -> Claim:
    id, says, bar = "C6", "Earlier layers regain saliency first", 0.02
    measures = "depth of what was regained by the last stage minus by the first, concept minus random arm"
    if len(run.stages) < 2:
        return _unmeasured(id, says, measures, bar, "one stage of retraining has no order")

    def regained(arm: Trajectory, stage: str, among: Neurons) -> float:
        if not all(migration.is_mass(arm[s].saliency) for s in (PRUNED, stage)):
            raise _Missing(SIGNED)
        now, cut = (arm[s].saliency.score.where(among.mask, 0.0).sum(1).double() for s in (stage, PRUNED))
        gain = (now - cut).clamp(min=0).numpy()
        return float((gain * np.linspace(0, 1, len(gain))).sum() / gain.sum()) if gain.sum() > 0 else math.nan

    return run.versus(
        id, says, measures, bar,
        lambda arm, among: regained(arm, run.last, among) - regained(arm, run.stages[0], among),
    )  # fmt: skip


def _primed(run: _Measured) -> Claim:
    by_words = all(arm[BASE].near_concept is not None for arm in (*run.concept, *run.random))
    what = "closeness of a neuron's top words to the concept's words" if by_words else "saliency"

    def predicted(arm: Trajectory, among: Neurons) -> float:
        before = arm[BASE].near_concept if by_words else arm[BASE].saliency.score
        assert before is not None
        known = before.isfinite() & arm[run.last].saliency.score.isfinite() & among.mask
        if known.sum() < 3:
            raise _Missing("fewer than three neurons have both numbers (a larger probe corpus)")
        return priming.priming(before, arm[run.last].saliency, among, draws=2).correlation.value  # no interval needed

    return run.versus(
        "C7", "Neurons that take the concept over were primed for it",
        f"rank correlation within layers of {what} before and saliency after, concept minus random arm", 0.05,
        predicted,
    )  # fmt: skip


def _words_at_ends(run: _Measured, arm: Trajectory) -> None:
    if arm[BASE].words is None or arm[run.last].words is None:
        raise _Missing("top words of base and last stage (measure.what with top_words)")


def _mixed(run: _Measured) -> Claim:
    def share(arm: Trajectory, among: Neurons) -> float:
        _words_at_ends(run, arm)
        base, now = arm[BASE], arm[run.last]
        assert base.words is not None
        assert now.words is not None
        heirs = priming.heirs(base.saliency, now.saliency, max(1, len(among) // 10), among)
        both = meaning.polysemy(base.words, now.words, base.concept_words, neurons=heirs)
        known = int((~both.kept.isnan()).sum())
        return len(both.mixed) / known if known else math.nan

    return run.versus(
        "C8", "Relearned neurons mix old and new meanings",
        "share of the neurons new in the top tenth that keep an old top word and gain one of the concept's, concept "
        "minus random arm", 0.05, share,
    )  # fmt: skip


def _similarity(run: _Measured, arm: Trajectory, among: Neurons) -> tuple[np.ndarray, np.ndarray]:
    """Layer depth and concept similarity at the last stage of every neuron that has one."""
    found = arm[run.last].meaning
    if found is None:
        raise _Missing("concept similarity at the last stage (measure.what with top_words)")
    layer, index = (among.mask & found.isfinite()).nonzero(as_tuple=True)
    return layer.numpy() / max(1, len(found) - 1), found[layer, index].double().numpy()


def _similarity_by_depth(run: _Measured) -> Claim:
    def falls(arm: Trajectory, among: Neurons) -> float:
        depth, similar = _similarity(run, arm, among)
        if len(set(depth)) < 2 or len(set(similar)) < 2:
            return math.nan
        found: Any = st.spearmanr(depth, similar)  # stubs and scipy do not agree on what this is
        return -float(found.statistic)

    return run.versus(
        "C9a", "Concept similarity falls with depth",
        "minus the rank correlation of depth and similarity after retraining, concept minus random arm", 0.05, falls,
    )  # fmt: skip


def _similarity_by_training(run: _Measured) -> Claim:
    def fallen(arm: Trajectory, among: Neurons) -> float:
        similar = _similarity(run, arm, among)[1]
        return 1 - float(similar.mean()) if len(similar) else math.nan

    return run.versus(
        "C9b", "Concept similarity falls with retraining",
        "1 minus mean similarity of a neuron's top words to those at base, concept minus random arm", 0.02, fallen,
    )  # fmt: skip
