"""The paper's claims as rows: what was measured, beside its control, with an interval and a verdict.

How a verdict is made, the same for every row:

1. Each claim is an *effect*, positive in the direction of the claim, and a *bar*: the smallest effect that counts.
2. Where the claim is about training, the effect is the concept arm minus the random arm of the same seed, on the same
   neurons; its interval is where one more seed's difference would lie (`intervals.beside_control`). Student's t over
   seeds alone would be narrower and wrong: what the chosen neurons do by luck they do in every seed. With fewer than
   three seeds there is no verdict. C7 is beside the unpruned arm where there is one: there, neurons stay as they are.
3. Where there is a null that needs no training (C3a, C4), it takes the place of the random arm, and one seed will do.
   C9 is a fall within the arm and is tested there. C1, C2 and the unmatched C5 are as published, without a control in
   the effect. What the control shows stands beside all of these. Of one seed C1's and C2's interval is over sentences.
4. Where both sides are at the same end of their scale there is no verdict: they could not differ. Nor has a control
   without any spread an interval, but that of the sentences.
5. *supported*: the interval lies above the bar. *reversed*: below minus the bar. *not supported*: between the two.
   *inconclusive*: anything else. Change the sign of the data, and supported and reversed change places.

A verdict holds at the level of the run's intervals, each by itself; `holm` corrects the p-values over all rows, and a
verdict that does not survive that says so. Verdicts rest on Student's t (4.3 standard errors for three seeds), not on
sign flips, whose smallest p-value of three seeds is .25.
Source: the claims are those of Lo et al. 2024, the effects, bars and controls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from relearn_lens.analysis import evidence, recovery
from relearn_lens.analysis.evidence import Arms, Evidence, Missing
from relearn_lens.analysis.intervals import (
    FEWEST_SEEDS,
    SENTENCES,
    Estimate,
    Gap,
    beside_control,
    holm,
    over_seeds,
    over_seeds_and_neurons,
    same_end,
)
from relearn_lens.analysis.recovery import measured_by
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.names import explained
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


@explained
def claims(
    arms: Arms,
    label: Label,
    *,
    random_sets: Sequence[Sequence[Scores]] = (),
    level: float = 0.95,
    draws: int = 1000,
) -> list[Claim]:
    """C1 to C9 of a run's arms (name to one trajectory per seed).

    `random_sets` are, per seed, the scores of the base model with random sets of neurons ablated, as many in every
    layer; without them the damage is beside the random arm's own set. A claim whose measurements were not taken is
    inconclusive and says what to measure.

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
        if rows[i].verdict in ("supported", "reversed") and p > 1 - level:
            but = f"; it does not survive Holm's correction for {len(tested)} claims (p = {p:.2g})."
            rows[i] = replace(rows[i], why=rows[i].why.removesuffix(".") + but)
    return rows


def _versus(
    run: Evidence,
    id: str,
    says: str,
    measures: str,
    bar: float,
    of: Callable[[Trajectory, Neurons], float],
    beside: str = "random",
) -> Claim:
    """A claim about training: the concept arm against a control arm, over seeds."""
    if not run.random and beside == "random":
        return _unmeasured(id, says, measures, bar, "there is no random arm to compare with (arms with random)")
    if not all(map(len, run.shared())):
        return _unmeasured(id, says, measures, bar, "no neuron survived in both arms (a smaller prune.fraction)")
    try:
        values = {
            name: run.each(of, run.arms[name]) for name in {"concept": 0, beside: 0, "random": 0} if run.arms.get(name)
        }
    except Missing as missing:
        return _unmeasured(id, says, measures, bar, str(missing))
    ours, theirs = values["concept"], values[beside]
    if not np.isfinite([*ours, *theirs]).all():
        return _unmeasured(
            id, says, measures, bar, "it is not defined here, in an arm there was nothing to take it over"
        )
    gap = beside_control(ours, [[value] for value in theirs], run.level)
    shown = [f"{np.mean(each):.3f} in the {name} arm" for name, each in values.items() if np.isfinite(each).all()]
    row = Claim(
        id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), float(np.mean(theirs)),
        f"{beside} arm, same neurons", p_flips=gap.p_flips,
    )  # fmt: skip
    return _few(row, len(ours), ", ".join(shown)) or _judged(row, gap, ", ".join(shown))


def _within(
    run: Evidence,
    id: str,
    says: str,
    measures: str,
    bar: float,
    of: Callable[[Trajectory, Neurons, float], Estimate],
) -> Claim:
    """A claim about the concept arm itself, over seeds and neurons; what the random arm shows stands beside it."""
    if not all(map(len, run.shared())):
        return _unmeasured(id, says, measures, bar, "no neuron survived in both arms (a smaller prune.fraction)")
    try:
        ours = run.each(lambda arm, among: of(arm, among, run.level), run.concept)
        theirs = run.each(lambda arm, among: of(arm, among, run.level), run.random) if run.random else []
    except Missing as missing:
        return _unmeasured(id, says, measures, bar, str(missing))
    effect = over_seeds_and_neurons(ours, level=run.level)
    beside, control = f"{effect.value:.3f} in the concept arm", None
    if theirs:
        control = float(np.mean([one.value for one in theirs]))
        beside += f", {control:.3f} in the random arm"
    row = Claim(
        id, says, effect, measures, bar, "inconclusive", "", effect.value, control,
        "random arm, same neurons; it is not in the effect" if theirs else "",
    )  # fmt: skip
    if few := _few(row, len(ours), beside):
        return few
    verdict = verdict_of(effect, bar)
    reading = {
        "supported": ": beyond the bar",
        "reversed": ": beyond the bar, the other way",
        "not supported": ": within the bar",
    }.get(verdict, ": the interval reaches across the bar")
    alike = control is not None and control * effect.value > 0 and abs(control) >= abs(effect.value) / 2
    if verdict in ("supported", "reversed") and alike:
        reading += ", and in the random arm at least half as much, so it is not about the concept"
    why = f"{_said(beside)}{reading} (the wider of Student's t over seeds and of the neurons)."
    return replace(row, verdict=verdict, p=effect.p, why=why)


def _few(row: Claim, n: int, beside: str) -> Claim | None:
    """The row of fewer seeds than training needs, whose number is told and whose interval is not; else None."""
    if n >= FEWEST_SEEDS or row.effect is None:
        return None
    few = f"{n} training seed{'s' if n > 1 else ''}"
    return replace(
        row,
        effect=Estimate(row.effect.value, math.nan, math.nan, few, n=n),
        why=f"{_said(beside)}; {few} cannot tell this from training noise (--set seeds=[0,1,2] or more).",
    )


def _judged(row: Claim, gap: Gap, beside: str) -> Claim:
    """A row with its verdict and what it rests on."""
    effect = gap.effect
    over = effect.over if effect.over == SENTENCES else f"Student's t over {effect.over}"
    why = f"{_said(beside)}{_reading(effect, row.bar)}{f' (by {over})' if effect.interval else ''}."
    return replace(row, effect=effect, p=gap.p, p_flips=gap.p_flips, verdict=verdict_of(effect, row.bar), why=why)


def _unmeasured(id: str, says: str, measures: str, bar: float, why: str) -> Claim:
    return Claim(id, says, None, measures, bar, "inconclusive", f"Not measured: {why}.")


def _said(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reading(effect: Estimate, bar: float) -> str:
    """What the interval says, in words."""
    if not effect.interval:
        return f"; {effect.over} has no interval"
    return {
        "supported": ": beyond the control by more than the bar",
        "reversed": ": beyond the control the other way",
        "not supported": ": the control shows the same",
        "inconclusive": ": the interval reaches across the bar",
    }[verdict_of(effect, bar)]


HALF_IN_NATS = math.log(2)
"""C1's bar for a language model: the concept's tokens have half of their probability left. A share of the gain over a
uniform guess would hardly ever be half lost: most of that gain is the language, not the concept."""


def _collapse(run: Evidence) -> Claim:
    says, bar = "Pruning the concept's neurons collapses performance", HALF_IN_NATS if run.in_nats else 0.5
    measures = f"share of the base model's {run.quantity} on the concept that pruning takes"
    lost: Any = evidence.lost
    amount = "{:.0%} of the " + run.quantity
    if run.in_nats:
        measures = "nats per token on the concept that pruning costs; the bar is half of the probability"
        lost, amount = np.subtract, "{:.2f} nats per token"
    if unknown := run.unknown():
        return _unmeasured("C1", says, measures, bar, unknown)
    effect = run.estimate(lost, run.concept, BASE, PRUNED)
    theirs = [
        float(lost(run.score(arm, BASE), scores.value(run.label)))
        for i, arm in enumerate(run.concept)
        for scores in run.random_sets_of(i)
    ]
    control = float(np.mean(theirs)) if theirs else None
    beside = f"pruning took {amount.format(effect.value)} of {run.name!r}"
    if control is None:
        beside += "; there is no random set to compare with"
    else:
        beside += f"; as many random neurons took {amount.format(control)}"
        if 0 < effect.value / 2 <= control:
            beside += ", so the collapse is not specific to the concept's neurons"
    return Claim(
        "C1", says, effect, measures, bar, verdict_of(effect, bar), f"{_said(beside)}.", effect.value, control,
        run.sets,
    )  # fmt: skip


def _returns(run: Evidence) -> Claim:
    says, bar, by = "The concept returns within a few epochs", 0.9, measured_by(run.concept)
    had = "what the unpruned arm has then" if run.unpruned else "what the base had"
    measures = f"share of the lost {run.quantity} that is back after {run.last} {by}(s), up to {had}"
    back = _back(run, run.concept)
    if back.share is None:
        return _unmeasured("C2", says, measures, bar, f"the damage ({back.damage}) is within noise")
    if not math.isfinite(back.share.value):
        return _unmeasured("C2", says, measures, bar, "in a seed pruning did no damage that could be made good")
    control = None
    beside = f"{back.share.value:.0%} of the loss is back after {run.last} {by}(s)"
    if run.random:
        theirs = _back(run, run.random)
        control = theirs.share.value if theirs.share and math.isfinite(theirs.share.value) else None
        beside += f", {control:.0%} in the random arm" if control is not None else "; the random arm lost nothing"
    if run.unpruned:
        drift = np.mean([run.score(arm, run.last) - run.score(arm, BASE) for arm in run.unpruned])
        beside += f"; training on without pruning changed {run.quantity} by {drift:+.3f}, which is not counted as back"
    return Claim(
        "C2", says, back.share, measures, bar, verdict_of(back.share, bar),
        f"{_said(beside)}; the claim's bar is {bar:.0%}.", back.share.value, control, "random arm",
    )  # fmt: skip


def _back(run: Evidence, arms: Sequence[Trajectory]) -> recovery.Recovery:
    """How much of an arm's damage is made good at the last stage."""
    return recovery.recovery(arms, run.label, run.last, unpruned=run.unpruned, level=run.level, draws=run.draws)


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
    gap = beside_control([-v for v in ours], [[-v for v in each] for each in theirs], run.level, least=run.least())
    control = float(np.mean([np.mean(each) for each in theirs]))
    row = Claim(
        id, says, gap.effect, measures, bar, "inconclusive", "", float(np.mean(ours)), control,
        run.sets,
    )  # fmt: skip
    if same_end(ours, np.concatenate(theirs)):
        what = "everything" if np.mean(ours) > 0.5 else "nothing"
        why = f"The concept's neurons and the random sets both take {what}, so they could not differ."
        return replace(row, why=why)
    return _judged(
        row, gap, f"random sets take {control:.0%} of the {run.quantity}, the concept's neurons {np.mean(ours):.0%}"
    )


def _random_is_slower(run: Evidence) -> Claim:
    id, says, bar = "C3b", "After random pruning the concept returns more slowly", 0.05
    measures = f"share of the lost {run.quantity} that is back, mean over the stages, concept arm minus random arm"
    if unknown := run.unknown():
        return _unmeasured(id, says, measures, bar, unknown)
    for name, arms in (("concept", run.concept), ("random", run.random)):
        if arms and (back := _back(run, arms)).share is None:
            # Speed of return is not told by what never left.
            return _unmeasured(id, says, measures, bar, f"the {name} arm's damage ({back.damage}) is within noise")
    unpruned = {arm.seed: arm for arm in run.unpruned}

    def area(arm: Trajectory, _: Neurons) -> float:
        return recovery.mean_share(arm, run.label, unpruned.get(arm.seed))

    row = _versus(run, id, says, measures, bar, area)
    if row.concept is not None and row.control is not None and same_end([row.concept], [row.control]):
        when = "all of it at the first stage" if row.concept > 0.5 else "nothing at any stage"
        why = f"In both arms {when} is back, so their speeds could not differ (other stages, or another rate)."
        return replace(row, verdict="inconclusive", p=None, p_flips=None, why=why)
    return row


def _late_before(run: Evidence) -> Claim:
    id, says, bar = "C4", "Before pruning, salient neurons sit in later layers", 0.05
    measures = "mean depth (0 to 1) of the pruned share of the ranking, minus the same under shuffled labels"
    bases = [arm[BASE] for arm in run.concept]
    ks = [len(arm.removed) if arm.removed else arm.site.n_neurons // 2 for arm in run.concept]
    ours = [evidence.depth_of_top(base.saliency, k) for base, k in zip(bases, ks, strict=True)]
    if not all(base.shuffled for base in bases):
        why = f"mean depth {np.mean(ours):.3f}, but no label shuffles to compare (measure.shuffles)"
        return replace(_unmeasured(id, says, measures, bar, why), concept=float(np.mean(ours)))
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
    effect, few = over_seeds(ours, level=run.level), len(ours) < FEWEST_SEEDS
    return Claim(
        id, says, effect, measures, bar, "inconclusive" if few else verdict_of(effect, bar),
        f"{_said(what)}{f'; {len(ours)} training seed(s)' if few else ''}.", mean, control,
        "" if control is None else "unpruned arm; it is not in the effect",
    )  # fmt: skip


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
    by_words = all(arm[BASE].near_concept is not None for arm in (*run.concept, *run.random, *run.unpruned))
    beside = "unpruned" if run.unpruned else "random"
    what = (
        "closeness of a neuron's top words to the concept's words with saliency after, given saliency before"
        if by_words
        else "saliency before with what is gained after"
    )
    return _versus(
        run,
        "C7", "Neurons that take the concept over were primed for it",
        f"rank correlation within layers of {what}, concept minus {beside} arm", 0.05,
        lambda arm, among: evidence.predicted(arm, run.last, among, by_words=by_words), beside,
    )  # fmt: skip


def _mixed(run: Evidence) -> Claim:
    return _versus(
        run,
        "C8", "Relearned neurons mix old and new meanings",
        "share of the neurons new in the top tenth that keep an old top word and gain one of the concept's, concept "
        "minus random arm", 0.05, lambda arm, among: evidence.mixed(arm, run.last, among),
    )  # fmt: skip


def _similarity_by_depth(run: Evidence) -> Claim:
    return _within(
        run,
        "C9a", "Concept similarity falls with depth",
        "minus the rank correlation of depth and similarity after retraining", 0.05,
        lambda arm, among, level: evidence.falls_with_depth(arm, run.last, among, level),
    )  # fmt: skip


def _similarity_by_training(run: Evidence) -> Claim:
    return _within(
        run,
        "C9b", "Concept similarity falls with retraining",
        "mean similarity of a neuron's top words to those at base, right after pruning (1 where it was not measured "
        "there) less after retraining", 0.02,
        lambda arm, among, level: evidence.falls_with_training(arm, run.last, among, level),
    )  # fmt: skip
