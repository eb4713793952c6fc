"""A finished run as numbers: `summary.json`, and the rows of `layers.parquet`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from relearn_lens.analysis import story
from relearn_lens.analysis.migration import Selection, sides
from relearn_lens.measure.evaluation import OVERALL, Label, Scores
from relearn_lens.measure.tracking import BASE, Snapshot, Trajectory
from relearn_lens.runs.answers import answers
from relearn_lens.runs.events import Again, Grafted, Sized
from relearn_lens.runs.findings import findings, natural_scores, notes, what_happened
from relearn_lens.runs.results import Run, once


@once
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
        "settings": result.experiment.model_dump(mode="json"),
        "concept": story.name_of(first),
        "site": site.name,
        "layers": list(site.layers),
        "n_neurons": site.n_neurons,
        "stages": list(first.stages),
        "units": {
            first.snapshots[first.stages[0]].scores.metric.lower(): first.snapshots[first.stages[0]].scores.unit,
            "saliency_by_layer": "mean rank saliency, 1 the most salient neuron and 0 the least, mean over seeds",
            "score_by_layer": f"mean score of the matched neurons, {first.snapshots[first.stages[0]].saliency.unit}",
            "seconds": "seconds per phase",
            "natural": "scores of the base model on the drawn sentences, and on sentences as they come",
            "claims": "effect and bar as `measures` says, positive in the direction of the claim",
            "migration": "shares of the model's depth, positive towards later layers; `share`: shares of the score",
            "recovery_speed": "epochs and tokens of retraining",
            "attribution": "`unit` per concept word",
            "similarity": "correlations and shares, base against the last stage",
            "meaning": "means over a layer's neurons; cosines; counts",
        },
        "text": result.manifest.get("text"),
        "notes": notes(result),
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
                    "n_pruned": 0 if arm.removed is None else len(arm.removed),
                }
                for arm in arms
            ]
            for name, arms in result.arms.items()
        },
        "natural": [
            {"seed": seed, "drawn": _each(drawn), "natural": _each(plain)}
            for seed, drawn, plain in natural_scores(result)
        ],
        "random_draws": [
            {
                "seed": d.seed,
                "concept": _each(d.concept),
                "other": None if d.other is None else _each(d.other),
                **{kind: [_each(scores) for scores in each] for kind, each in d.random.items()},
                "overlap": {kind: list(each) for kind, each in d.overlap.items()},
            }
            for d in result.damage
        ],
        "overlap_random_with_concept": _overlap(result),
        "pruned_share_by_layer": {
            name: np.mean([(~arm.survivors()).share_by_layer() for arm in arms], axis=0).tolist()
            for name, arms in result.arms.items()
        },
        "saliency_by_layer": {
            name: {
                which: mean([story.saliency_by_layer(arm, which) for arm in arms]) for which in selections(result)
            }
            for name, arms in result.arms.items()
        },
        "score_by_layer": {
            name: mean([_score_by_stage(arm) for arm in arms]) for name, arms in result.arms.items()
        },
        "what_happened": what_happened(result),
        "questions": [asdict(question) for question in answers(result)],
        "grafts": [_grafts(grafted) for grafted in result.grafted],
        "again": [_again(again, label) for again in result.again],
        "doses": [_doses(sized) for sized in result.sized],
        **findings(result),
        "seconds": result.manifest.get("seconds"),
        "peak_rss_mb": result.manifest.get("peak_rss_mb"),
        "versions": result.manifest.get("versions"),
    }  # fmt: skip


def _grafts(grafted: Grafted) -> dict[str, Any]:
    return {
        "seed": grafted.seed,
        "stages": {
            stage: {
                "outcome": made.outcomes[0],
                "cut": made.value(made.cut),
                "retrained": made.value(made.retrained),
                "parts": {
                    part: {
                        "enough": made.enough(part).value,
                        "needed": made.needed(part).value,
                        "controls": {
                            name: made.control(name, part).value for name, by in made.controls.items() if part in by
                        },
                        "alone": {outcome: made.value(made.alone[part], outcome) for outcome in made.outcomes},
                        "reverted": {outcome: made.value(made.reverted[part], outcome) for outcome in made.outcomes},
                    }
                    for part in made.parts
                },
            }
            for stage, made in grafted.stages.items()
        },
        "within": {
            stage: {part: {"enough": made.enough(part).value, "needed": made.needed(part).value} for part in made.parts}
            for stage, made in grafted.within.items()
        },
    }


def _again(again: Again, label: Label) -> dict[str, Any]:
    return {
        "seed": again.seed,
        "same": again.same.shown(label),
        "random": [scores.shown(label) for scores in again.random],
        "rounds": [
            {
                "share_old": each.share_old,
                "share_old_by_chance": each.share_by_chance,
                "cut": _each(each.cut),
                "course": {step: scores.shown(label) for step, scores in each.course.items()},
            }
            for each in again.rounds
        ],
    }


def _doses(sized: Sized) -> dict[str, Any]:
    return {
        "seed": sized.seed,
        "fraction": sized.fraction,
        "base": None if sized.base is None else _each(sized.base),
        "doses": [{"fraction": d.fraction, "cut": d.cut, **_each(d.scores)} for d in sized.doses],
    }


def _score_by_stage(arm: Trajectory) -> dict[str, list[float]]:
    """Mean score of each layer's surviving neurons at every stage."""
    chosen = arm.matched()
    return {stage: story.score_by_layer(s.saliency, chosen) for stage, s in arm.snapshots.items()}


def layers_table(result: Run) -> pd.DataFrame:
    """One row per arm, seed, stage, selection and layer: mean rank saliency and mean score."""
    rows = []
    for name, arms in result.arms.items():
        for arm in arms:
            for which in selections(result):
                for stage, ranks in story.saliency_by_layer(arm, which).items():
                    before, later = sides(arm.matched(), arm.survivors(), which)
                    scores = story.score_by_layer(arm[stage].saliency, before if stage == BASE else later)
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
    return float(np.mean([len(c.removed & r.removed) / len(r.removed) for c, r in pairs if c.removed and r.removed]))


def _each(scores: Scores) -> dict[str, float]:
    return {label: scores.shown(label) for label in (*scores.labels, OVERALL)}


def selections(run: Run) -> tuple[Selection, ...]:
    """The neurons that layers are compared on: first as the settings ask, then matched and all."""
    return tuple(dict.fromkeys((run.experiment.measure.selection, "matched", "all")))
