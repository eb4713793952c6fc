"""What a run measured besides F1 and saliency, as plain numbers for `summary.json` and as rows for tables.

Claims, attribution, how well the scores agree, how fast F1 came back, activation similarity and top words. A part whose
measurement was not taken is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy import stats as st

from relearn_lens.analysis import migration, priming, recovery, story
from relearn_lens.analysis.claims import Claim, claims
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.measure import meaning
from relearn_lens.measure.evaluation import Scores, SpanScores
from relearn_lens.measure.tracking import BASE, PRUNED, Snapshot, Trajectory
from relearn_lens.runs.preparation import FEWEST_SPANS
from relearn_lens.runs.results import Run, once

CORRECTED = (
    "An effect is positive in the direction of the claim. Each verdict holds at the level of the run's intervals by "
    "itself; p (Holm) is corrected for all claims of the table."
)

Table = tuple[list[str], list[list[str]]]


@once
def claims_of(run: Run) -> list[Claim]:
    """C1 to C9 of a run."""
    return claims(
        run.arms, run.label, random_sets=[damage.random.get("layers", ()) for damage in run.damage],
        level=run.interval["level"], draws=run.interval["draws"],
    )  # fmt: skip


@once
def findings(run: Run) -> dict[str, Any]:
    """Everything here as plain values."""
    return {
        "claims": [asdict(claim) for claim in claims_of(run)],
        "migration": migration_of(run),
        "recovery_speed": {name: _speeds(speeds) for name, speeds in speeds_of(run).items()},
        "savings": _savings(run),
        "attribution": _by_stage(run, _attribution),
        "scores_agreement": agreement(run),
        "similarity": {name: [_similarity(arm) for arm in arms] for name, arms in run.arms.items()},
        "meaning": _by_stage(run, _meaning),
        "heirs": {name: [str(row) for row in rows] for name, rows in heirs_of(run).items()},
        "probe_quality": {kind: asdict(s.quality) for kind, s in _base(run).also.items() if s.quality is not None},
    }


@once
def migration_of(run: Run) -> dict[str, Any]:
    """Where the concept went, by the main score and by attribution, all three selections.

    Where it cannot be said (a score with a sign, no neuron that survived in both arms) there is `says` alone.
    """
    if "concept" not in run.arms:
        return {}

    def told(**how: Any) -> dict[str, Any]:
        try:
            moved = migration.migration(run.arms, level=run.interval["level"], **how)
        except ValueError as error:
            return {"says": f"Not measured: {error}."}
        return {**asdict(moved), "says": str(moved)}

    migrations = {which: told(selection=which) for which in ("matched", "all", "published")}
    if all(arm[last(arm)].attribution and arm[BASE].attribution for arms in run.arms.values() for arm in arms):
        migrations["attribution"] = told(score=lambda snapshot: snapshot.by("attribution"))
    return migrations


def last(arm: Trajectory) -> str:
    """The last stage."""
    return arm.stages[-1]


@once
def agreement(run: Run) -> dict[str, float]:
    """Spearman correlation over neurons of the ranking score with every other score, at base, mean over seeds."""
    bases = [arm[BASE] for arm in next(iter(run.arms.values()))]
    # What takes long was measured for the first seed alone, unless the settings say otherwise.
    return {
        kind: float(np.mean([_rank_correlation(s, kind) for s in bases if kind in s.also or kind in s.attributions]))
        for kind in (*bases[0].also, *bases[0].attributions)
    }


def _rank_correlation(snapshot: Snapshot, kind: str) -> float:
    """Spearman, NaN where a score is the same for every neuron."""
    mine, other = (saliency.score.flatten().numpy() for saliency in (snapshot.saliency, snapshot.by(kind)))
    if np.ptp(mine) == 0 or np.ptp(other) == 0:
        return float("nan")
    correlation: Any = st.spearmanr(mine, other)  # stubs and scipy do not agree on what this is
    return float(correlation.statistic)


def heirs(run: Run, name: str, k: int = 8) -> list[str]:
    """`heir_rows`, a line each."""
    return [str(row) for row in heir_rows(run, name, k)]


def heir_rows(run: Run, name: str, k: int = 8) -> list[meaning.Meaning]:
    """The words of the neurons that are new in the top tenth of the survivors, most gained first; up to 8."""
    return heirs_of(run)[name][:k]


@once
def heirs_of(run: Run) -> dict[str, list[meaning.Meaning]]:
    """`heir_rows` of every arm."""
    return {name: _heirs(arms[0]) for name, arms in run.arms.items()}


def _heirs(arm: Trajectory) -> list[meaning.Meaning]:
    base, now = arm[BASE], arm[last(arm)]
    if base.words is None or now.words is None or not len(arm.matched()):
        return []
    among = arm.matched()
    new = priming.heirs(base.saliency, now.saliency, max(1, len(among) // 10), among)
    return meaning.polysemy(base.words, now.words, base.concept_words, neurons=new).rows(8)


def _base(run: Run) -> Any:
    return next(iter(run.arms.values()))[0][BASE]


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


@once
def speeds_of(run: Run) -> dict[str, recovery.Speeds]:
    """How fast each arm came back."""
    return {
        name: recovery.speeds(arms, run.label, unpruned=run.arms.get("unpruned"), **run.interval)
        for name, arms in run.arms.items()
    }


@once
def what_happened(run: Run) -> str:
    """The run in two sentences."""
    return story.what_happened(run.arms, run.label, **run.interval)


def _speeds(speeds: recovery.Speeds) -> dict[str, Any]:
    return {
        "reached": {f"{share:g}": asdict(when) for share, when in speeds.reached.items()},
        "area": None if speeds.area is None else asdict(speeds.area),
    }


def _savings(run: Run) -> dict[str, Any] | None:
    if not {"concept", "never"} <= set(run.arms):
        return None
    savings = recovery.savings(run.arms["concept"], run.arms["never"], run.label, **run.interval)
    saved = {f"{share:g}": None if each is None else asdict(each) for share, each in savings.saved.items()}
    return {"saved": saved, "area": asdict(savings.area)}


HARDLY = 0.1
"""F1 of a base model below which a label has hardly anything that a cut could take."""


def notes(run: Run) -> list[str]:
    """What a reader should know first: the run's notes, labels that the base model hardly knows, and natural scores."""
    lines = list(run.manifest.get("notes", []))
    seeds = _bases(run)
    if seeds and isinstance(seeds[0], SpanScores):
        support = seeds[0].support()
        for label in seeds[0].labels:
            f1 = float(np.mean([scores.value(label) for scores in seeds]))
            if support[label] >= FEWEST_SPANS and f1 < HARDLY:
                lines.append(
                    f"the base model hardly knows {label!r} (F1 {f1:.2f}): it has nothing to lose, and says nothing of "
                    "what a cut takes; fine-tune for longer, or with a larger finetune.lr"
                )
    if pairs := natural_scores(run):
        drawn = np.mean([scores.shown(run.label) for _, scores, _ in pairs])
        plain = np.mean([scores.shown(run.label) for _, _, scores in pairs])
        lines.append(
            f"{pairs[0][1].metric} of {'+'.join(run.label)} before any cut: {drawn:.3f} on the sentences that are "
            f"scored, drawn by data.labelled_only and data.concept_share; {plain:.3f} on as many as they come"
        )
    return lines


def natural_scores(run: Run) -> list[tuple[int, Scores, Scores]]:
    """Seed, and scores of the base model on the drawn sentences and on sentences as they come, where both are known."""
    pairs = zip(run.damage, _bases(run), strict=False)
    return [(damage.seed, drawn, damage.natural) for damage, drawn in pairs if damage.natural is not None]


def _bases(run: Run) -> list[Scores]:
    """Scores of the base model of each seed."""
    arms: Sequence[Trajectory] = next((arms for name, arms in run.arms.items() if name != "never"), [])
    return [arm[BASE].scores for arm in arms]


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
        if arms[0].removed is None:
            continue
        speeds = speeds_of(run)[name]
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
                rows.append(
                    [
                        name,
                        f"{which}, {similarities[0].n_words:,} words",
                        what,
                        *_by_column(layers, torch.stack(values).mean(0)),
                    ]
                )
    return ["arm", "over", "base against last stage", *(name for name, _ in layer_columns(layers))], rows


def agreement_rows(run: Run) -> Table:
    """Rank correlation of the ranking score with the others, at base; fitted scores with their held-out quality."""
    rows = []
    also = _base(run).also
    for name, value in agreement(run).items():
        quality = also[name].quality if name in also else None
        rows.append([name, _number(value), "" if quality is None else str(quality)])
    return ["score", f"Spearman with {_base(run).saliency.kind}", "held-out quality, beside its controls"], rows


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _number(value: float | np.floating | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3f}"
