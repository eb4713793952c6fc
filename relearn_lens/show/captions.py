"""What each figure shows in this run, in two sentences: the numbers of the concept arm, and those of its controls.

Plain text, written from the same results as the figures; no sentence says more than the numbers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats as st

from relearn_lens.analysis import migration, priming, story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.intervals import FEWEST_SEEDS
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.runs.results import Run

TOP = 0.1
"""Share of the neurons that count as the top."""


def recovery(run: Run) -> str:
    """What pruning took and training brought back, beside the random and the unpruned arm."""
    name = explained(run)
    arms, last = run.arms[name], run.arms[name][0].stages[-1]
    scores = arms[0][BASE].scores
    text = (
        f"In the {name} arm the {scores.metric} of {story.name_of(arms[0])!r} was {_shown(run, name, BASE)} "
        f"at base, {_shown(run, name, PRUNED)} after pruning and {_shown(run, name, last)} at stage {last}."
    )
    others = [other for other in run.arms if other != name]
    if not others:
        return f"{text} There is no control arm in this run, so this is not evidence about the concept's neurons."
    still = [other for other in others if last not in run.arms[other][0].stages]
    if still:
        beside = ", ".join(f"{_shown(run, other, PRUNED)} in the {other} arm" for other in still)
        text += f" After pruning it was {beside}, which is not trained on."
    if not (trained := [other for other in others if other not in still]):
        return text
    beside = "; ".join(
        f"in the {other} arm {_shown(run, other, PRUNED)} and {_shown(run, other, last)}" for other in trained
    )
    text += f" At the same two later stages it was, {beside}"
    if "random" not in others:
        return f"{text}."
    gap = story.gap_at(arms, run.arms["random"], run.label, last, **run.interval)
    if gap.interval is None:
        return f"{text}."
    verdict = "differ beyond noise" if gap.excludes(0) else "do not differ beyond noise"
    few = "" if len(arms) >= FEWEST_SEEDS else "; another training seed may differ as much"
    return f"{text}: at stage {last} the {name} and the random arm {verdict} ({gap}, over {gap.over}{few})."


def pruned_share(run: Run) -> str:
    """Where the cut fell, and whether the control's fell there too."""
    name = explained(run)
    arms = run.arms[name]
    layers = arms[0].site.layers
    share = np.mean([(~arm.survivors()).share_by_layer() for arm in arms], axis=0)
    if not share.any():
        return f"The {name} arm pruned nothing. There is no cut to compare with a control."
    low, high = int(share.argmin()), int(share.argmax())
    text = (
        f"{share.mean():.0%} of all neurons were pruned, from {share[low]:.0%} of layer {layers[low]} to "
        f"{share[high]:.0%} of layer {layers[high]}."
    )
    if "random" not in run.arms or name == "random":
        return f"{text} There is no random arm beside it."
    other = np.mean([(~arm.survivors()).share_by_layer() for arm in run.arms["random"]], axis=0)
    pairs = zip(arms, run.arms["random"], strict=False)
    both = np.mean([len(c.removed & r.removed) / len(r.removed) for c, r in pairs if c.removed and r.removed])
    as_many = "took as many from every layer" if np.allclose(share, other) else "took other numbers from the layers"
    return f"{text} The random arm {as_many} and shares {both:.0%} of its neurons with this cut."


def layer_map(run: Run, against: str | None = None) -> str:
    """The layer whose saliency changed most, and how much it changed in the controls; `against` another arm, the layer
    in which the two differ most at the end."""
    name = explained(run)
    if against is not None and name != against:
        return _difference(run, name, against)
    last = run.arms[name][0].stages[-1]
    layers = run.arms[name][0].site.layers
    change = {each: _change(arms, last) for each, arms in run.arms.items() if last in arms[0].stages}
    mine = change[name]
    if not np.isfinite(mine).any():
        return f"In the {name} arm no layer has survivors on both sides. There is nothing to compare."
    most = int(np.nanargmax(np.abs(mine)))
    text = (
        f"From base to stage {last} the mean rank saliency of the {name} arm's survivors changed most in layer "
        f"{layers[most]}, by {mine[most]:+.2f}."
    )
    return f"{text} {_beside(change, name, most, 'It changed there by')}"


def _difference(run: Run, name: str, against: str) -> str:
    by_arm, last = {}, run.arms[name][0].stages[-1]
    for each, arms in run.arms.items():
        if each == against or last not in arms[0].stages:
            continue
        pairs = [
            [side[last].saliency.by_rank(arm.matched()).nanmean(1) for side in (arm, twin)]
            for arm, twin in zip(arms, run.arms[against], strict=True)
        ]
        by_arm[each] = np.mean([(here - there).numpy() for here, there in pairs], axis=0)
    layers = run.arms[name][0].site.layers
    if not np.isfinite(by_arm[name]).any():
        return f"In the {name} arm no layer has survivors. There is nothing to compare."
    most = int(np.nanargmax(np.abs(by_arm[name])))
    text = (
        f"At stage {last} the mean rank saliency of the {name} arm's neurons differs most from the {against} arm in "
        f"layer {layers[most]}, by {by_arm[name][most]:+.2f}."
    )
    return f"{text} {_beside(by_arm, name, most, 'It differs there by')}"


def _change(arms: Sequence[Trajectory], last: str) -> np.ndarray:
    by_seed = [story.saliency_by_layer(arm) for arm in arms]
    return np.mean([np.subtract(by_stage[last], by_stage[BASE]) for by_stage in by_seed], axis=0)


def _beside(change: dict[str, np.ndarray], name: str, layer: int, what: str) -> str:
    """The controls' numbers, and whether one of them shows the same."""
    own = float(change[name][layer])
    others = {each: float(at[layer]) for each, at in change.items() if each != name and np.isfinite(at[layer])}
    if not others:
        return "There is no control arm to compare with, so this is not evidence of a change by pruning the concept."
    beside = " and ".join(f"{value:+.2f} in the {each} arm" for each, value in others.items())
    alike = [each for each, value in others.items() if value * own > 0 and abs(value) >= abs(own) / 2]
    if alike:
        return f"{what} {beside}: at least half as much in the {' and the '.join(alike)} arm, so it is not specific."
    return f"{what} {beside}; the figure has no interval for this difference, so it is a description."


def neuron_map(run: Run) -> str:
    """How much of the top of the ranking changed hands, beside the controls and chance."""
    name = explained(run)
    left, chance = {}, 0.0
    for each, arms in run.arms.items():
        turnovers = []
        for arm in arms:
            among = arm.matched()
            if len(among):
                k = max(1, round(TOP * len(among)))
                turn = priming.turnover(arm[BASE].saliency, arm[arm.stages[-1]].saliency, k, among)
                turnovers.append(turn.left)
                chance = turn.by_chance if each == name else chance
        if turnovers:
            left[each] = float(np.mean(turnovers))
    if name not in left:
        return f"No neuron survived in the {name} arm. There is nothing to compare."
    text = (
        f"Of the survivors that were in the top {TOP:.0%} at base, {left[name]:.0%} are no longer in it at the last "
        f"stage of the {name} arm (two unrelated rankings: {chance:.0%})."
    )
    beside = " and ".join(f"{value:.0%} in the {each} arm" for each, value in left.items() if each != name)
    return f"{text} It is {beside}, each among the neurons it compares." if beside else f"{text} There is no control."


def migrated(run: Run) -> str:
    """The matched comparison in words, then the unmatched one."""
    moved = run.numbers.migrations
    return f"{moved['matched']} {moved['published']}"


def attribution(run: Run) -> str:
    """The layer that the output owes most to, before and after, beside the controls; and what is missing."""
    name = explained(run)
    layers = run.arms[name][0].site.layers
    parts, errors = [], []
    for each, arms in run.arms.items():
        for stage in ([BASE] if each == name else []) + [arms[0].stages[-1]]:
            known = [attributed for arm in arms if (attributed := arm[stage].attribution) is not None]
            if not known:
                continue
            share = np.mean([migration.layer_share(attributed.saliency()) for attributed in known], axis=0)
            most = int(np.nanargmax(share))
            where = "at base" if stage == BASE else f"in the {each} arm at stage {stage}"
            parts.append(f"{where} layer {layers[most]} ({share[most]:.0%})")
            errors += [
                float((attributed.delta / attributed.change).abs().max())
                for attributed in known
                if attributed.is_cut_set
            ]
    text = f"The summed attribution is largest {', '.join(parts)}; an even share is {1 / len(layers):.0%}"
    text += "." if len(run.arms) > 1 else ", and there is no control arm."
    if not errors:
        return f"{text} MLP units are by-passed by the residual stream, so a layer need not account for everything."
    return (
        f"{text} The account is complete to within {max(errors):.0%} of the output's change (lower panel); look at it "
        "before a close call, and make it smaller with more measure.steps."
    )


def flow(run: Run) -> str:
    """The share of neurons that stayed in their layer, beside the controls."""
    name = explained(run)
    flows = {
        each: [arm.similarity["all"].flow for arm in arms if "all" in arm.similarity] for each, arms in run.arms.items()
    }
    stayed = {each: float(torch.stack(of).mean(0).diagonal().nanmean()) for each, of in flows.items() if of}
    mine = next(arm for arm in run.arms[name] if "all" in arm.similarity)
    n, above = len(mine.site.layers), mine.similarity["all"].above_chance()
    text = (
        f"In the {name} arm, {stayed[name]:.0%} of a layer's neurons on average have their best match in the same "
        f"layer after ({1 / n:.0%} if matches fell anywhere), and {above:.0%} of all matches are better than 95% of "
        "those by chance."
    )
    return f"{text} {_controls(stayed, name, '.0%')}"


def saliency_against_similarity(run: Run) -> str:
    """The rank correlation over the survivors, beside the controls."""
    name = explained(run)
    by_arm = {each: [_correlation(arm) for arm in arms] for each, arms in run.arms.items()}
    known = {each: [value for value in values if value is not None] for each, values in by_arm.items()}
    rho = {each: float(np.mean(values)) for each, values in known.items() if values}
    text = (
        f"Over the survivors of the {name} arm, saliency at the last stage and likeness of meaning to base have a rank "
        f"correlation of {rho[name]:+.2f}: salient neurons mean {'less' if rho[name] < 0 else 'no less'} of what "
        "they meant."
    )
    return f"{text} {_controls(rho, name, '+.2f')}"


def _controls(by_arm: Mapping[str, float], name: str, form: str) -> str:
    beside = " and ".join(f"{value:{form}} in the {each} arm" for each, value in by_arm.items() if each != name)
    return f"It is {beside}." if beside else "There is no control arm."


def _correlation(arm: Trajectory) -> float | None:
    snapshot = arm[arm.stages[-1]]
    if snapshot.meaning is None:
        return None
    rank = snapshot.saliency.by_rank(arm.matched())
    known = ~(rank.isnan() | snapshot.meaning.isnan())
    if int(known.sum()) < 3:
        return None
    value = float(st.spearmanr(rank[known].numpy(), snapshot.meaning[known].numpy())[0])  # pyright: ignore[reportArgumentType]
    return value if np.isfinite(value) else None


def verdicts(claims: Sequence[Claim], seeds: int) -> str:
    """How many claims got which verdict, and which of the supported ones their control shows too."""
    count = Counter(claim.verdict for claim in claims)
    order = ("supported", "reversed", "not supported", "inconclusive")
    counted = ", ".join(f"{count[verdict]} {verdict}" for verdict in order if count[verdict])
    text = f"Of {len(claims)} claims in this run: {counted}."
    shared = [
        claim.id
        for claim in claims
        if claim.verdict == "supported" and claim.effect is not None and claim.control is not None
        and claim.control > claim.bar and claim.id in ("C1", "C9a", "C9b")
    ]  # fmt: skip
    if shared:
        what = "are supported as published, and their controls show" if len(shared) > 1 else (
            "is supported as published, and its control shows"
        )  # fmt: skip
        text += f" {', '.join(shared)} {what} the same."
    if seeds < FEWEST_SEEDS:
        text += (
            f" With {seeds} training seed{'s' * (seeds > 1)} nothing that compares trained arms has an interval, so "
            "those claims stay inconclusive."
        )
    elif not shared:
        text += (
            " Effects of training are those of the concept arm beside its control, so what both do is no support; C9's "
            "are of that arm alone."
        )
    return text


def explained(run: Run) -> str:
    """The arm that is told of: the concept's where there is one."""
    return "concept" if "concept" in run.arms else next(iter(run.arms))


def _shown(run: Run, name: str, stage: str) -> str:
    """The mean over seeds of what people read, or that the stage was not measured."""
    values = [arm[stage].scores.shown(run.label) for arm in run.arms[name] if stage in arm.stages]
    return f"{np.mean(values):.2f}" if values and np.isfinite(np.mean(values)) else "not measured"
