"""A finished run, and a removal, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from relearn_lens.analysis import migration, recovery, story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.measure.answers import Answered
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.tracking import BASE, PRUNED
from relearn_lens.runs.results import Run

CORRECTED = (
    "An effect is positive in the direction of the claim. Each verdict holds at the level of the run's intervals by "
    "itself; p (Holm) is corrected for all claims of the table."
)

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def answer_rows(before: Mapping[str, Answered], after: Mapping[str, Answered]) -> Table:
    """Header and rows of what was answered before and after: accuracy and loss of each row of `measure.facts.asked`.

    The interval is that of the accuracy after, over keys; the chance that of a guess which knows what may be an answer.
    Of plain text there is only a loss.
    """
    rows = []
    for name, there in before.items():
        here = after[name]
        low, high = here.accuracy.interval(OVERALL)
        texts = there.accuracy.chance(OVERALL) == 0 and there.accuracy.labels == ("text",)
        rows.append(
            [
                name,
                "" if texts else f"{there.accuracy.shown(OVERALL):.2f} → {here.accuracy.shown(OVERALL):.2f}",
                "" if texts else f"{low:.2f} to {high:.2f}",
                "" if texts else f"{here.accuracy.chance(OVERALL):.2f}",
                f"{there.loss.shown(OVERALL):.2f} → {here.loss.shown(OVERALL):.2f}",
            ]
        )
    return ["", "accuracy", "95 % after", "chance", "nats/token"], rows


def score_title(run: Run) -> str:
    """What the numbers of `score_rows` are."""
    scores = next(iter(run.arms.values()))[0][BASE].scores
    return scores.unit[:1].upper() + scores.unit[1:] if scores.metric == "F1" else f"{scores.metric}, {scores.unit}"


def score_rows(run: Run) -> Table:
    """Header and rows of the table of F1 (or loss): every arm and stage, every label, means over seeds; the concept's
    interval."""
    first = next(iter(run.arms.values()))[0]
    labels = [*next(iter(first.snapshots.values())).scores.labels, "overall"]
    rows = []
    for name, arms in run.arms.items():
        for stage in arms[0].stages:
            scores = [arm[stage].scores for arm in arms]
            concept = story.estimate(np.asarray, run.label, scores, **run.interval)
            low, high = sorted((scores[0].displayed(concept.low), scores[0].displayed(concept.high)))
            rows.append(
                [
                    name,
                    stage,
                    *(_number(np.mean([s.shown(k) for s in scores])) for k in labels),
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    return ["arm", "stage", *labels, f"{story.name_of(first)} interval"], rows


def layer_rows(run: Run) -> Table:
    """Header and rows of the layer table: pruned share, then mean rank saliency per layer, matched and all."""
    columns = layer_columns(next(iter(run.arms.values()))[0].site.layers)

    def cells(values: list[float]) -> list[str]:
        """Means over the layers of each column that have a value."""
        known = [[v for v in values[part] if np.isfinite(v)] for _, part in columns]
        return [_number(np.mean(some)) if some else "" for some in known]

    rows = [
        ["pruned share", name, "pruned", *cells(shares)]
        for name, shares in run.numbers.pruned_share.items()
        if any(shares)
    ]
    rows += [
        [f"saliency, {which}", name, stage, *cells(values)]
        for which in run.numbers.selections
        for name, by_selection in run.numbers.saliency.items()
        for stage, values in by_selection[which].items()
    ]
    return ["", "arm", "stage", *(name for name, _ in columns)], rows


def draws_row(run: Run) -> str:
    """In words: what ablating the concept's neurons, and random sets, does to the concept without any training."""
    draws = [scores.shown(run.label) for damage in run.damage for scores in damage.random.get("layers", ())]
    concept = np.mean([damage.concept.shown(run.label) for damage in run.damage])
    metric = run.damage[0].concept.metric
    if not draws:
        return f"Ablated, not retrained: {metric} {concept:.3f} without the concept's neurons."
    return (
        f"Ablated, not retrained: {metric} {concept:.3f} without the concept's neurons; {len(draws)} random sets "
        f"of the same size per layer: {np.mean(draws):.3f} on average, {min(draws):.3f} to {max(draws):.3f}."
    )


MOST_LAYERS = 14
"""Columns of layers that a terminal and a page have room for; deeper models are shown in groups of neighbours."""


def layer_columns(layers: Sequence[str]) -> list[tuple[str, slice]]:
    """Name and layers of each column of a table: one layer each, or groups such as `"3-5"` where there are many."""
    size = -(-len(layers) // MOST_LAYERS)
    parts = [slice(i, min(i + size, len(layers))) for i in range(0, len(layers), size)]
    return [(layers[p.start] if p.stop - p.start == 1 else f"{layers[p.start]}-{layers[p.stop - 1]}", p) for p in parts]


def _by_column(layers: Sequence[str], values: Any, of: Any = np.mean) -> list[str]:
    """Values by layer as cells: means (or sums) over the layers of each column."""
    values = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):
        return [_number(of(values[part])) for _, part in layer_columns(layers)]


def claims_rows(each_claim: Sequence[Claim]) -> Table:
    """The claims table: the number in the concept arm and in its control, effect with interval, verdict."""
    rows = [
        [
            claim.id, claim.says, claim.verdict, _number(claim.concept), _number(claim.control),
            _interval(claim.effect), f"{claim.bar:g}", _number(claim.p), _number(claim.p_holm),
        ]
        for claim in each_claim
    ]  # fmt: skip
    return ["", "claim", "verdict", "concept", "control", "effect", "bar", "p", "p (Holm)"], rows


def speed_rows(run: Run) -> Table:
    """Epochs until each arm has a share of its base F1 again."""
    rows = []
    for name, arms in run.arms.items():
        speeds = run.numbers.speeds.get(name)
        if arms[0].removed is None or speeds is None:
            continue
        area = "within noise" if speeds.area is None else _interval(speeds.area)
        rows.append([name, *(_interval(when.epochs) or "not reached" for when in speeds.reached.values()), area])
    shares = [f"epochs to {share:.0%}" for share in recovery.SHARES]
    return ["arm", *shares, "area under recovery"], rows


def attribution_rows(run: Run) -> Table:
    """Share of the attribution in each layer, its change of the output and the largest completeness error."""
    first = next(iter(run.arms.values()))[0]
    rows, layers = [], list(first.site.layers)
    kinds = list(dict.fromkeys(kind for snapshot in first.snapshots.values() for kind in snapshot.attributions))
    for kind in kinds:
        shown_base = False
        for name, arms in run.arms.items():
            for stage in arms[0].stages:
                known = [arm[stage].attributions[kind] for arm in arms if kind in arm[stage].attributions]
                again = (stage == BASE and shown_base and name != "never") or (
                    stage == PRUNED and arms[0].removed is None
                )
                if again or not known:
                    continue
                shown_base = shown_base or stage == BASE
                shares = np.mean([migration.layer_share(each.saliency()) for each in known], axis=0)
                largest = max(float((each.delta / each.change).abs().max()) for each in known)
                error = f"{largest:.1%}" if known[0].is_cut_set else "no cut set"
                change = float(np.mean([each.change for each in known]))
                who = "all arms" if stage == BASE and name != "never" else name
                who += f", {kind}" if len(kinds) > 1 else ""
                rows.append([who, stage, *_by_column(layers, shares, np.sum), f"{change:.2f}", error])
    return ["arm", "stage", *(name for name, _ in layer_columns(layers)), "output change", "completeness error"], rows


def similarity_rows(run: Run) -> Table:
    """Per layer, base against last stage: CKA, correlation of a neuron with itself, share that stays in its layer."""
    rows, layers = [], list(next(iter(run.arms.values()))[0].site.layers)
    for name, arms in run.arms.items():
        for which in ("all", "concept"):
            similarities = [arm.similarity[which] for arm in arms if which in arm.similarity]
            if not similarities:
                continue
            for what, values in (
                ("linear CKA, same layer", [each.cka.diagonal() for each in similarities]),
                ("correlation with itself, median", [each.same.nanmedian(1).values for each in similarities]),
                ("best match in the same layer, share", [each.flow.diagonal() for each in similarities]),
            ):
                means = _by_column(layers, torch.stack(values).mean(0))
                rows.append([name, f"{which}, {similarities[0].n_words:,} words", what, *means])
    return ["arm", "over", "base against last stage", *(name for name, _ in layer_columns(layers))], rows


def agreement_rows(run: Run) -> Table:
    """Rank correlation of the ranking score with the others, at base; fitted scores with their held-out quality."""
    base = next(iter(run.arms.values()))[0][BASE]
    quality = {name: str(score.quality) for name, score in base.also.items() if score.quality is not None}
    rows = [[name, _number(value), quality.get(name, "")] for name, value in run.numbers.agreement.items()]
    return ["score", f"Spearman with {base.saliency.kind}", "held-out quality, beside its controls"], rows


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _number(value: float | np.floating | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3f}"
