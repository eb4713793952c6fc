"""A finished run, and a removal, as tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from relearn_lens.analysis import story
from relearn_lens.measure.answers import Answered
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.tracking import BASE
from relearn_lens.runs.findings import layer_columns
from relearn_lens.runs.results import Run
from relearn_lens.runs.summary import selections, summary


def answer_rows(before: Mapping[str, Answered], after: Mapping[str, Answered]) -> tuple[list[str], list[list[str]]]:
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


def score_rows(run: Run) -> tuple[list[str], list[list[str]]]:
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


def layer_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the layer table: pruned share, then mean rank saliency per layer, matched and all."""
    layers = list(next(iter(run.arms.values()))[0].site.layers)
    numbers, columns = summary(run), layer_columns(layers)

    def cells(values: list[float]) -> list[str]:
        """Means over the layers of each column that have a value."""
        known = [[v for v in values[part] if np.isfinite(v)] for _, part in columns]
        return [_number(np.mean(some)) if some else "" for some in known]

    rows = [
        ["pruned share", name, "pruned", *cells(shares)]
        for name, shares in numbers["pruned_share_by_layer"].items()
        if any(shares)
    ]
    for which in selections(run):
        for name, by_selection in numbers["saliency_by_layer"].items():
            for stage, values in by_selection[which].items():
                rows.append([f"saliency, {which}", name, stage, *cells(values)])
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


def _number(value: float | np.floating | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3f}"
