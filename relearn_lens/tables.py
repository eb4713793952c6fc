"""A finished run as numbers: `summary.json`, the tables that are printed, and their rows for Parquet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from relearn_lens import analysis
from relearn_lens.evaluation import OVERALL, Scores
from relearn_lens.findings import findings, layer_columns
from relearn_lens.migration import Selection, sides
from relearn_lens.results import Run
from relearn_lens.settings import Experiment
from relearn_lens.tracking import BASE, Snapshot, Trajectory


def summary(result: Run) -> dict[str, Any]:
    """The numbers of a run as plain values; lists by layer and means over seeds where the name says so."""
    label, interval = result.label, result.interval
    first = next(iter(result.arms.values()))[0]
    site = first.site
    metric = first.snapshots[first.stages[0]].scores.metric.lower()

    def by_stage(arm: Trajectory, of: Callable[[Snapshot], Any]) -> dict[str, Any]:
        return {stage: of(snapshot) for stage, snapshot in arm.snapshots.items()}

    def mean(values: list[dict[str, list[float]]]) -> dict[str, list[float]]:
        return {stage: np.mean([v[stage] for v in values], axis=0).tolist() for stage in values[0]}

    return {
        "settings": plain_settings(result.experiment),
        "concept": analysis.name_of(first),
        "site": site.name,
        "layers": list(site.layers),
        "n_neurons": site.n_neurons,
        "stages": list(first.stages),
        "units": {
            first.snapshots[first.stages[0]].scores.metric.lower(): first.snapshots[first.stages[0]].scores.unit,
            "saliency_by_layer": "mean rank saliency, 1 the most salient neuron and 0 the least, mean over seeds",
            "score_by_layer": f"mean score of the matched neurons, {first.snapshots[first.stages[0]].saliency.unit}",
            "seconds": "seconds per phase",
            "claims": "effect and bar as `measures` says, positive in the direction of the claim",
            "migration": "shares of the model's depth, positive towards later layers; `share`: shares of the score",
            "recovery_speed": "epochs and tokens of retraining",
            "attribution": "`unit` per concept word",
            "similarity": "correlations and shares, base against the last stage",
            "meaning": "means over a layer's neurons; cosines; counts",
        },
        "text": result.manifest.get("text"),
        "notes": result.manifest.get("notes"),
        "arms": {
            name: [
                {
                    "seed": arm.seed,
                    metric: by_stage(arm, lambda s: s.shown),
                    f"{metric}_interval": by_stage(
                        arm,
                        lambda s: s.scores.interval(label, level=interval["level"], n=interval["draws"]),
                    ),
                    "support": next(iter(arm.snapshots.values())).scores.support(),
                    "training_loss": by_stage(arm, lambda s: s.at.loss if s.at else None),
                    "n_pruned": 0 if arm.pruned is None else len(arm.pruned),
                }
                for arm in arms
            ]
            for name, arms in result.arms.items()
        },
        "random_draws": [
            {"seed": d.seed, "concept": _each(d.concept), "random": [_each(scores) for scores in d.random]}
            for d in result.damage
        ],
        "overlap_random_with_concept": _overlap(result),
        "pruned_share_by_layer": {
            name: np.mean([(~arm.survivors()).share_by_layer() for arm in arms], axis=0).tolist()
            for name, arms in result.arms.items()
        },
        "saliency_by_layer": {
            name: {
                which: mean([analysis.saliency_by_layer(arm, which) for arm in arms]) for which in selections(result)
            }
            for name, arms in result.arms.items()
        },
        "score_by_layer": {
            name: mean([_score_by_stage(arm) for arm in arms]) for name, arms in result.arms.items()
        },
        "what_happened": analysis.what_happened(result.arms, label, **interval),
        **findings(result),
        "seconds": result.manifest.get("seconds"),
        "peak_rss_mb": result.manifest.get("peak_rss_mb"),
        "versions": result.manifest.get("versions"),
    }  # fmt: skip


def _score_by_stage(arm: Trajectory) -> dict[str, list[float]]:
    """Mean score of each layer's surviving neurons at every stage."""
    chosen = arm.matched()
    return {stage: analysis.score_by_layer(s.saliency, chosen) for stage, s in arm.snapshots.items()}


def layers_table(result: Run) -> pd.DataFrame:
    """One row per arm, seed, stage, selection and layer: mean rank saliency and mean score."""
    rows = []
    for name, arms in result.arms.items():
        for arm in arms:
            for which in selections(result):
                for stage, ranks in analysis.saliency_by_layer(arm, which).items():
                    before, later = sides(arm.matched(), arm.survivors(), which)
                    scores = analysis.score_by_layer(arm[stage].saliency, before if stage == BASE else later)
                    rows += [
                        {"arm": name, "seed": arm.seed, "stage": stage, "selection": which, "layer": layer,
                         "rank_saliency": rank, "score": score}
                        for layer, rank, score in zip(arm.site.layers, ranks, scores, strict=True)
                    ]  # fmt: skip
    return pd.DataFrame(rows)


def _overlap(result: Run) -> float | None:
    """Share of the random arm's neurons that the concept arm pruned too, mean over seeds."""
    if not {"concept", "random"} <= set(result.arms):
        return None
    pairs = zip(result.arms["concept"], result.arms["random"], strict=True)
    return float(np.mean([len(c.pruned & r.pruned) / len(r.pruned) for c, r in pairs if c.pruned and r.pruned]))


def _each(scores: Scores) -> dict[str, float]:
    return {label: scores.shown(label) for label in (*scores.labels, OVERALL)}


def selections(run: Run) -> tuple[Selection, ...]:
    """The neurons that layers are compared on: first as the settings ask, then matched and all."""
    return tuple(dict.fromkeys((run.experiment.measure.selection, "matched", "all")))


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
            concept = analysis.estimate(np.asarray, run.label, scores, **run.interval)
            low, high = sorted((scores[0].displayed(concept.low), scores[0].displayed(concept.high)))
            rows.append(
                [
                    name,
                    stage,
                    *(_number(np.mean([s.shown(k) for s in scores])) for k in labels),
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    return ["arm", "stage", *labels, f"{analysis.name_of(first)} interval"], rows


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
    draws = [scores.shown(run.label) for damage in run.damage for scores in damage.random]
    concept = np.mean([damage.concept.shown(run.label) for damage in run.damage])
    metric = run.damage[0].concept.metric
    if not draws:
        return f"Ablated, not retrained: {metric} {concept:.3f} without the concept's neurons."
    return (
        f"Ablated, not retrained: {metric} {concept:.3f} without the concept's neurons; {len(draws)} random sets "
        f"of the same size per layer: {np.mean(draws):.3f} on average, {min(draws):.3f} to {max(draws):.3f}."
    )


def plain_settings(experiment: Experiment) -> dict[str, Any]:
    """Settings as JSON takes them."""
    return experiment.model_dump(mode="json")


def plain(value: Any) -> Any:
    """Values as JSON takes them; NaN is null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.floating | np.integer | np.bool_):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _number(value: float | np.floating | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3f}"
