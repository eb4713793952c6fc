"""What happened in a run, in two sentences: how much came back, how fast, where, and is it more than chance.

Reads results, never a model. The questions themselves are in `intervals`, `recovery` and `migration`; their names are
given here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from relearn_lens.analysis.intervals import FEWEST_SEEDS, Estimate, beside_control, bonferroni, estimate
from relearn_lens.analysis.migration import (
    Selection,
    Shift,
    is_mass,
    rank_saliency_by_layer,
    saliency_by_layer,
    score_by_layer,
    shift,
)
from relearn_lens.analysis.recovery import (
    Recovery,
    first_stage_at,
    measured_by,
    name_of,
    recovery,
    retraining_stages,
)
from relearn_lens.measure.evaluation import Label
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory

__all__ = [
    "Estimate",
    "Recovery",
    "Selection",
    "Shift",
    "estimate",
    "first_stage_at",
    "gap_at",
    "name_of",
    "rank_saliency_by_layer",
    "recovery",
    "retraining_stages",
    "saliency_by_layer",
    "score_by_layer",
    "shift",
    "what_happened",
]


def what_happened(arms: Mapping[str, Sequence[Trajectory]], label: Label, **interval) -> str:
    """Two sentences on a run, from its numbers and with its controls; no more than these support.

    `arms` is arm name to one trajectory per seed. The first sentence says how much came back and how fast, beside the
    random arm; the second where.
    """
    if "concept" not in arms:
        return "There is no concept arm in this run, so it says nothing about pruning a concept."
    concept = arms["concept"]
    last = retraining_stages(concept[0])[-1]
    unpruned = arms.get("unpruned")
    back = recovery(concept, label, last, unpruned=unpruned, **interval)
    before, cut, now = (_shown(concept, stage, label) for stage in (BASE, PRUNED, last))
    metric, by = concept[0][BASE].scores.metric, measured_by(concept)
    first = f"Pruning the neurons of {name_of(concept[0])!r} took its {metric} from {before} to {cut}"
    if metric != "F1":
        first += f" {concept[0][BASE].scores.unit}"
    if back.share is None:
        first += f" (change {back.damage}), which is within noise, so there is nothing to recover from"
    else:
        first += (
            f", and {last} {by}(s) of retraining brought it to {now}: {_percent(back.share)} of "
            f"the loss came back, {_half(concept, label, unpruned, **interval)}"
        )
    first += _against_random(arms, label, last, **interval)
    return f"{first}. {_where(arms, last, interval.get('level', 0.95))}"


def gap_at(ours: Sequence[Trajectory], theirs: Sequence[Trajectory], label: Label, stage: str, **interval) -> Estimate:
    """Ours minus a control arm's score at a stage, by the rule of the claims; with fewer seeds than that needs, the
    interval of `estimate`, which holds for these models alone.

    Raises:
        ValueError: arms of different numbers of seeds.
    """
    columns = [[arm[stage].scores for arm in side] for side in (ours, theirs)]
    if len(ours) < FEWEST_SEEDS:
        return estimate(np.subtract, label, *columns, **interval)
    values, control = ([scores.value(label) for scores in side] for side in columns)
    return beside_control(values, [[value] for value in control], interval.get("level", 0.95)).effect


def _against_random(arms: Mapping[str, Sequence[Trajectory]], label: Label, last: str, **interval) -> str:
    """How the random arm did, and whether the concept arm differs from it."""
    if "random" not in arms:
        return "; there is no random arm, so whether this is about the concept's neurons cannot be said"
    concept, random = arms["concept"], arms["random"]
    cut, now = _shown(random, PRUNED, label), _shown(random, last, label)
    result = f"; pruning as many random neurons in every layer took it to {cut}, and retraining to {now}"
    if recovery(random, label, last, unpruned=arms.get("unpruned"), **interval).share is not None:
        result += f" ({_half(random, label, arms.get('unpruned'), **interval)})"
    stages = (PRUNED, *retraining_stages(concept[0]))
    # Several comparisons: each interval is widened so that together they keep the level (Bonferroni).
    level = interval.get("level", 0.95)
    widened = {**interval, "level": bonferroni(level, len(stages))}
    apart, alike = [], []
    for stage in stages:
        when = {PRUNED: "right after pruning", last: "at the end"}.get(stage, f"at {measured_by(concept)} {stage}")
        gap = gap_at(concept, random, label, stage, **widened)
        if gap.excludes(0):
            scores = concept[0][BASE].scores
            apart.append(f"{abs(gap.value):.2f} {scores.worse if gap.value < 0 else scores.better} it {when}")
        else:
            alike.append(when)
    verdicts = [
        f"{verb} {_listed(labels)}" for verb, labels in (("is", apart), ("does not differ from it", alike)) if labels
    ]
    over = f"{len(concept)} seeds by Student's t" if len(concept) >= FEWEST_SEEDS else gap.over
    noise = f"{100 * level:g} % intervals over {over}, corrected for {len(stages)} comparisons"
    if len(concept) < FEWEST_SEEDS:
        # Two random sets, or two training seeds, often differ by more than sentences do.
        noise += "; they hold for these two models, and another random set or training seed may differ as much"
    return f"{result}, so the concept arm {' and '.join(verdicts)} ({noise})"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def _where(arms: Mapping[str, Sequence[Trajectory]], last: str, level: float) -> str:
    """Where the saliency of the surviving neurons went, beside the random and the unpruned arm."""
    concept = arms["concept"]
    n = len(concept)
    trained = [arm for side in arms.values() for arm in side if last in arm.stages]
    if not all(is_mass(arm[stage].saliency) for arm in trained for stage in (BASE, last)):
        return (
            f"Where it went cannot be said of the score {concept[0][BASE].saliency.kind!r}: some of its values are "
            "below 0 or undefined."
        )
    # On the very same neurons in every control: see `shift` for what choosing survivors does by itself.
    mine = float(np.mean([shift(arm, last).moved for arm in concept]))
    clear = []
    controls: dict[str, float] = {}
    for name in (name for name in ("random", "unpruned") if name in arms):
        shared = [c.survivors() & a.survivors() for c, a in zip(concept, arms[name], strict=True)]
        if not all(len(s) for s in shared):
            continue
        theirs = np.array([shift(a, last, among=s).moved for a, s in zip(arms[name], shared, strict=True)])
        ours = np.array([shift(c, last, among=s).moved for c, s in zip(concept, shared, strict=True)])
        controls[name] = float(theirs.mean())
        clear.append(beside_control(ours, [[float(v)] for v in theirs], level).effect.excludes(0))
    if not np.isfinite(mine):
        return "No neuron survived, so there is nowhere for the concept to have moved."
    text = (
        f"Among the neurons that survived, the concept's saliency moved by {abs(mine):.3f} of the model's depth "
        f"towards {'later' if mine > 0 else 'earlier'} layers"
        if abs(mine) >= 0.0005
        else "Among the neurons that survived, the concept's saliency stayed at its depth"
    )
    if not controls:
        return f"{text}; without a control arm this is not evidence of a move."
    beside = " and ".join(f"{value:+.3f} in the {name} arm" for name, value in controls.items())
    if any(value * mine > 0 and abs(value) >= abs(mine) / 2 for value in controls.values()):
        verdict = "a control moved the same way at least half as far, so this is not specific to pruning the concept"
    elif n < FEWEST_SEEDS:
        verdict = f"with {n} seed(s) there is no interval on this, so it is a description, not a finding"
    else:
        verdict = (
            f"the difference from every control is beyond noise over {n} seeds"
            if all(clear)
            else f"the difference from the controls is within noise over {n} seeds"
        )
    return f"{text} (the same neurons: {beside}): {verdict}."


def _half(arms: Sequence[Trajectory], label: Label, unpruned: Sequence[Trajectory] | None, **interval) -> str:
    """By when half of the loss was back."""
    half = first_stage_at(arms, label, unpruned=unpruned, **interval)
    return f"half of it by {measured_by(arms)} {half}" if half else "less than half of it at any stage"


def _shown(arms: Sequence[Trajectory], stage: str, label: Label) -> str:
    return f"{np.mean([arm[stage].scores.shown(label) for arm in arms]):.2f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
