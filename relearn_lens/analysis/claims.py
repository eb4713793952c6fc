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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from relearn_lens.analysis import evidence, recovery
from relearn_lens.analysis.evidence import Arms, Evidence, Missing
from relearn_lens.analysis.intervals import FEWEST_SEEDS, Estimate, Gap, beside_control, holm, over_seeds
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.neurons.sites import Neurons

Verdict = Literal["supported", "not supported", "reversed", "inconclusive"]


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
    run = Evidence(arms, label, random_sets, level, draws)
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


def _versus(
    run: Evidence,
    id: str,
    says: str,
    measures: str,
    bar: float,
    of: Callable[[Trajectory, Neurons], float],
) -> Claim:
    """A claim about training: the concept arm against the random arm, over seeds."""
    if not run.random:
        return _unmeasured(id, says, measures, bar, "there is no random arm to compare with (arms with random)")
    if not all(map(len, run.shared())):
        return _unmeasured(id, says, measures, bar, "no neuron survived in both arms (a smaller prune.fraction)")
    try:
        ours, theirs = run.each(of)
    except Missing as missing:
        return _unmeasured(id, says, measures, bar, str(missing))
    if not np.isfinite([*ours, *theirs]).all():
        return _unmeasured(
            id, says, measures, bar, "it is not defined here, in an arm there was nothing to take it over"
        )
    gap = beside_control(ours, [[value] for value in theirs], run.level)
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


def _collapse(run: Evidence) -> Claim:
    says, bar = "Pruning the concept's neurons collapses performance", 0.5
    measures = f"share of the base model's {run.quantity} on the concept that pruning takes"
    if unknown := run.unknown():
        return _unmeasured("C1", says, measures, bar, unknown)
    effect = run.estimate(evidence.lost, run.concept, BASE, PRUNED)
    theirs = run.random_losses()
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


def _returns(run: Evidence) -> Claim:
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


def _random_costs_more(run: Evidence) -> Claim:
    id, says, bar = "C3a", "Random pruning costs more than pruning the concept's neurons", 0.05
    measures = f"share of base {run.quantity} lost to random sets minus share lost to the concept's neurons"
    if unknown := run.unknown():
        return _unmeasured(id, says, measures, bar, unknown)
    theirs = run.random_losses()
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


def _random_is_slower(run: Evidence) -> Claim:
    id, says, bar = "C3b", "After random pruning the concept returns more slowly", 0.05
    measures = f"mean {run.quantity} over the stages of retraining as a share of base, concept arm minus random arm"
    if unknown := run.unknown():
        return _unmeasured(id, says, measures, bar, unknown)

    def area(arm: Trajectory, _: Neurons) -> float:
        return float(np.mean([run.score(arm, stage) for stage in run.stages]) / run.score(arm, BASE))

    return _versus(run, id, says, measures, bar, area)


def _late_before(run: Evidence) -> Claim:
    id, says, bar = "C4", "Before pruning, salient neurons sit in later layers", 0.05
    measures = "mean depth (0 to 1) of the pruned share of the ranking, minus the same under shuffled labels"
    bases = [arm[BASE] for arm in run.concept]
    ks = [len(arm.pruned) if arm.pruned else arm.site.n_neurons // 2 for arm in run.concept]
    ours = [evidence.depth_of_top(base.saliency, k) for base, k in zip(bases, ks, strict=True)]
    if not all(base.shuffled for base in bases):
        row = _unmeasured(
            id,
            says,
            measures,
            bar,
            f"mean depth {np.mean(ours):.3f}, but no label shuffles to compare (measure.shuffles)",
        )
        return replace(row, concept=float(np.mean(ours)))
    nulls = [[evidence.depth_of_top(s, k) for s in base.shuffled] for base, k in zip(bases, ks, strict=True)]
    gap = beside_control(ours, nulls, run.level)
    control = float(np.mean([np.mean(null) for null in nulls]))
    row = Claim(
        id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), control, "label shuffles"
    )
    return _judged(row, gap, f"mean depth {np.mean(ours):.3f}, under shuffled labels {control:.3f} (0.5 is the middle)")


def _earlier_as_published(run: Evidence) -> Claim:
    id, says, bar = "C5 unmatched", "After retraining the concept sits in earlier layers (as published)", 0.02
    measures = "depth lost between all base neurons and the retrained survivors, by rank saliency; no control"
    if not all(len(arm.survivors()) for arm in run.concept):
        return _unmeasured(id, says, measures, bar, "no neuron survived (a smaller prune.fraction)")
    ours = [evidence.earlier_unmatched(arm, run.last) for arm in run.concept]
    mean = float(np.mean(ours))
    what = (
        f"{abs(mean):.3f} of the depth {'earlier' if mean > 0 else 'later'}, but all base neurons are compared with "
        "survivors, so pruning late layers alone looks like this"
    )
    control = None
    if unpruned := run.arms.get("unpruned"):
        control = float(np.mean([evidence.earlier_unmatched(arm, run.last) for arm in unpruned]))
        what += f"; training on without pruning moved it {abs(control):.3f} {'earlier' if control > 0 else 'later'}"
    row = Claim(id, says, None, measures, bar, "inconclusive", f"{_said(what)}.", mean, control)
    if control is not None:
        row = replace(row, control_is="unpruned arm; it is not in the effect")
    effect = over_seeds(ours, level=run.level)
    if len(ours) < FEWEST_SEEDS:
        return replace(row, effect=effect, why=f"{_said(what)}; {len(ours)} training seed(s).")
    return replace(row, effect=effect, verdict=verdict_of(effect, bar))


def _earlier_matched(run: Evidence) -> Claim:
    return _versus(
        run,
        "C5 matched", "After retraining the concept sits in earlier layers (same neurons, against control)",
        "move of the score's centre of mass towards earlier layers, shares of the depth, concept minus random arm",
        0.02, lambda arm, among: -evidence.moved(arm, run.last, among),
    )  # fmt: skip


def _early_layers_first(run: Evidence) -> Claim:
    id, says, bar = "C6", "Earlier layers regain saliency first", 0.02
    measures = "depth of what was regained by the last stage minus by the first, concept minus random arm"
    if len(run.stages) < 2:
        return _unmeasured(id, says, measures, bar, "one stage of retraining has no order")
    return _versus(
        run,
        id, says, measures, bar,
        lambda arm, among: evidence.regained(arm, run.last, among) - evidence.regained(arm, run.stages[0], among),
    )  # fmt: skip


def _primed(run: Evidence) -> Claim:
    by_words = all(arm[BASE].near_concept is not None for arm in (*run.concept, *run.random))
    what = "closeness of a neuron's top words to the concept's words" if by_words else "saliency"
    return _versus(
        run,
        "C7", "Neurons that take the concept over were primed for it",
        f"rank correlation within layers of {what} before and saliency after, concept minus random arm", 0.05,
        lambda arm, among: evidence.predicted(arm, run.last, among, by_words=by_words),
    )  # fmt: skip


def _mixed(run: Evidence) -> Claim:
    return _versus(
        run,
        "C8", "Relearned neurons mix old and new meanings",
        "share of the neurons new in the top tenth that keep an old top word and gain one of the concept's, concept "
        "minus random arm", 0.05, lambda arm, among: evidence.mixed(arm, run.last, among),
    )  # fmt: skip


def _similarity_by_depth(run: Evidence) -> Claim:
    return _versus(
        run,
        "C9a", "Concept similarity falls with depth",
        "minus the rank correlation of depth and similarity after retraining, concept minus random arm", 0.05,
        lambda arm, among: evidence.falls_with_depth(arm, run.last, among),
    )  # fmt: skip


def _similarity_by_training(run: Evidence) -> Claim:
    def fallen(arm: Trajectory, among: Neurons) -> float:
        similar = evidence.similarity(arm, run.last, among)[1]
        return 1 - float(similar.mean()) if len(similar) else math.nan

    return _versus(
        run,
        "C9b", "Concept similarity falls with retraining",
        "1 minus mean similarity of a neuron's top words to those at base, concept minus random arm", 0.02, fallen,
    )  # fmt: skip
