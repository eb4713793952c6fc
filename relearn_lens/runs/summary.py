"""A finished run as numbers: `summary.json`, and the rows of `layers.parquet`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd

from relearn_lens.analysis import migration, recovery, story
from relearn_lens.analysis.migration import sides
from relearn_lens.measure.evaluation import OVERALL, Label, Scores
from relearn_lens.measure.tracking import BASE, Snapshot, Trajectory
from relearn_lens.runs.events import Again, Grafted, Sized
from relearn_lens.runs.numbers import mean
from relearn_lens.runs.results import Run


def summary(result: Run) -> dict[str, Any]:
    """The numbers of a run as plain values; lists by layer and means over seeds where the name says so."""
    label, interval, numbers = result.label, result.interval, result.numbers
    first = next(iter(result.arms.values()))[0]
    site = first.site
    metric = first.snapshots[first.stages[0]].scores.metric.lower()

    def by_stage(arm: Trajectory, of: Callable[[Snapshot], Any]) -> dict[str, Any]:
        return {stage: of(snapshot) for stage, snapshot in arm.snapshots.items()}

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
        "notes": numbers.notes,
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
            for seed, drawn, plain in numbers.natural
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
        "overlap_random_with_concept": numbers.overlap,
        "pruned_share_by_layer": numbers.pruned_share,
        "saliency_by_layer": numbers.saliency,
        "score_by_layer": {
            name: mean([_score_by_stage(arm) for arm in arms]) for name, arms in result.arms.items()
        },
        "what_happened": numbers.what_happened,
        "questions": [asdict(question) for question in numbers.questions],
        "grafts": [_grafts(grafted) for grafted in result.grafted],
        "again": [_again(again, label) for again in result.again],
        "blocked": [
            {"seed": each.seed, "held": each.held, "course": {n: _each(scores) for n, scores in each.course.items()}}
            for each in result.blocked
        ],
        "doses": [_doses(sized) for sized in result.sized],
        **findings(result),
        "seconds": result.manifest.get("seconds"),
        "peak_rss_mb": result.manifest.get("peak_rss_mb"),
        "versions": result.manifest.get("versions"),
    }  # fmt: skip


def findings(run: Run) -> dict[str, Any]:
    """What was measured besides scores and saliency, as plain values; a part that was not measured is empty."""
    numbers = run.numbers
    base = next(iter(run.arms.values()))[0][BASE]
    return {
        "claims": [asdict(claim) for claim in numbers.claims],
        "migration": {
            which: {"says": moved} if isinstance(moved, str) else {**asdict(moved), "says": str(moved)}
            for which, moved in numbers.migrations.items()
        },
        "recovery_speed": {name: _speeds(speeds) for name, speeds in numbers.speeds.items()},
        "savings": None if numbers.savings is None else _savings(numbers.savings),
        "attribution": _by_stage(run, _attribution),
        "scores_agreement": numbers.agreement,
        "similarity": {name: [_similarity(arm) for arm in arms] for name, arms in run.arms.items()},
        "meaning": _by_stage(run, _meaning),
        "heirs": {name: [str(row) for row in rows] for name, rows in numbers.heirs.items()},
        "probe_quality": {kind: asdict(s.quality) for kind, s in base.also.items() if s.quality is not None},
    }


def _by_stage(run: Run, of: Any) -> dict[str, Any]:
    """Arm to one mapping of stages per seed; stages without the measurement are left out."""
    by_arm = {}
    for name, arms in run.arms.items():
        each = [{stage: entry for stage in arm.stages if (entry := of(arm, stage))} for arm in arms]
        if any(each):
            by_arm[name] = each
    return by_arm


def _attribution(arm: Trajectory, stage: str) -> dict[str, Any] | None:
    each = [
        {
            "layer_share": migration.layer_share(attribution.saliency()),
            "score_by_layer": attribution.score.sum(1).tolist(),
            "delta": attribution.delta.tolist(),
            "delta_is_error": attribution.is_cut_set,
            "change": attribution.change,
            "unit": attribution.unit,
            **{
                key: getattr(attribution, key)
                for key in ("form", "target", "baseline", "quadrature", "steps", "n_words")
            },
        }
        for attribution in arm[stage].attributions.values()
    ]
    return None if not each else {**each[0], "also": each[1:]} if each[1:] else each[0]


def _similarity(arm: Trajectory) -> dict[str, Any]:
    return {
        which: {
            "flow": similarity.flow.tolist(),
            "cka": similarity.cka.tolist(),
            "same_by_layer": similarity.same.nanmedian(1).values.tolist(),
            "best_by_layer": similarity.best.abs().nanmedian(1).values.tolist(),
            "chance": similarity.chance,
            "above_chance": similarity.above_chance(),
            "n_words": similarity.n_words,
        }
        for which, similarity in arm.similarity.items()
    }


def _meaning(arm: Trajectory, stage: str) -> dict[str, Any] | None:
    snapshot = arm[stage]
    if snapshot.words is None:
        return None
    return {
        "null_by_layer": snapshot.words.null.sum(1).tolist(),
        "similarity_by_layer": None if snapshot.meaning is None else snapshot.meaning.nanmean(1).tolist(),
        "near_concept_by_layer": None if snapshot.near_concept is None else snapshot.near_concept.nanmean(1).tolist(),
        "classes_separated_by_layer": None
        if snapshot.separated is None
        else snapshot.separated.double().mean(1).tolist(),
    }


def _speeds(speeds: recovery.Speeds) -> dict[str, Any]:
    return {
        "reached": {f"{share:g}": asdict(when) for share, when in speeds.reached.items()},
        "area": None if speeds.area is None else asdict(speeds.area),
    }


def _savings(savings: recovery.Savings) -> dict[str, Any]:
    saved = {f"{share:g}": None if each is None else asdict(each) for share, each in savings.saved.items()}
    return {"saved": saved, "area": asdict(savings.area)}


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
            for which in result.numbers.selections:
                for stage, ranks in story.saliency_by_layer(arm, which).items():
                    before, later = sides(arm.matched(), arm.survivors(), which)
                    scores = story.score_by_layer(arm[stage].saliency, before if stage == BASE else later)
                    rows += [
                        {"arm": name, "seed": arm.seed, "stage": stage, "selection": which, "layer": layer,
                         "rank_saliency": rank, "score": score}
                        for layer, rank, score in zip(arm.site.layers, ranks, scores, strict=True)
                    ]  # fmt: skip
    return pd.DataFrame(rows)


def _each(scores: Scores) -> dict[str, float]:
    return {label: scores.shown(label) for label in (*scores.labels, OVERALL)}
