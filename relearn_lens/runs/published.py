"""The numbers of the paper's released runs, and a run of ours beside them.

Source: the release of Lo, Cohen, Barez 2024, "Large Language Models Relearn Removed Concepts" (arXiv 2401.01814), one
run each: span F1 from its logs, layer means recomputed from its per-neuron tables.

The release's layer means after retraining cannot be those of survivors ranked among themselves: such ranks average 0.5
over the survivors, and theirs are above 0.5 in six layers of seven. They fit ranks among all neurons, null ones left
out. So ours are ranks among all neurons too, of those that are not null and of survivors, in buckets of 100 as there,
whatever the protocol of the run; only what the release itself ranks among survivors is so here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats as st

from relearn_lens.analysis.migration import rank_saliency_by_layer
from relearn_lens.measure.evaluation import OVERALL, SpanScores
from relearn_lens.measure.topwords import is_dead
from relearn_lens.measure.tracking import BASE, PRUNED, Snapshot, Trajectory
from relearn_lens.names import explained
from relearn_lens.neurons.sites import Neurons
from relearn_lens.runs.protocol import choose, placed
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import PROTOCOLS, Experiment

BUCKET = 100
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Variant:
    """One released run: what was pruned, and overall span F1 on CoNLL-2003 validation."""

    name: str
    score: str
    n_pruned: int
    f1: Numbers
    """Before pruning, right after, and after the epochs of `Release.epochs`."""


@dataclass(frozen=True)
class Release:
    """What the release says of DistilBERT and the concept location; layers are the embedding, then the blocks."""

    model: str
    n_neurons: int
    layers: tuple[str, ...]
    epochs: tuple[str, ...]
    variants: tuple[Variant, ...]
    f1_after_pruning: dict[str, float]
    """By entity, right after pruning the top half."""
    mean_rank_saliency: dict[str, Numbers]
    """By stage and layer, top 3,000 pruned."""
    share_base: Numbers
    """Of the neurons with a rank saliency above 0.5, the share in each layer, in percent: all neurons at base."""
    share_all: Numbers
    """After 8 epochs, all neurons."""
    share_survivors: Numbers
    """After 8 epochs, survivors ranked among themselves."""
    percentile: dict[str, Numbers]
    """Mean percentile of each layer's survivors among all survivors, by stage; 1 the most salient."""
    spearman: tuple[float | tuple[float, float], ...]
    """By layer, rank correlation of the survivors' saliency at base and after 8 epochs; a pair where only the range
    over the layers is known."""


RELEASE = Release(
    model="distilbert-base-cased",
    n_neurons=5376,
    layers=("embed", "0", "1", "2", "3", "4", "5"),
    epochs=("2", "4", "6", "8"),
    variants=(
        Variant("probeless, top 3,000", "probeless", 3000, (0.9355, 0.0277, 0.9138, 0.9238, 0.9280, 0.9293)),
        Variant("probeless, top 2,688", "probeless", 2688, (0.9382, 0.0576, 0.9142, 0.9226, 0.9287, 0.9264)),
        Variant("linear probe, top 2,688", "linear probe", 2688, (0.9384, 0.0912, 0.9104, 0.9187, 0.9241, 0.9244)),
    ),
    f1_after_pruning={"LOC": 0.037, "PER": 0.055, "ORG": 0.111, "MISC": 0.010},
    mean_rank_saliency={
        "base": (0.401, 0.426, 0.413, 0.462, 0.515, 0.635, 0.639),
        "2": (0.718, 0.585, 0.562, 0.560, 0.603, 0.575, 0.423),
        "4": (0.716, 0.580, 0.549, 0.544, 0.569, 0.553, 0.390),
        "6": (0.715, 0.578, 0.543, 0.529, 0.559, 0.547, 0.376),
        "8": (0.715, 0.577, 0.532, 0.528, 0.556, 0.539, 0.366),
    },
    share_base=(10.7, 11.4, 11.2, 12.7, 15.2, 19.1, 19.7),
    share_all=(28.1, 16.7, 15.6, 13.9, 12.3, 9.1, 4.3),
    share_survivors=(8.8, 14.2, 17.3, 17.9, 18.7, 14.7, 8.5),
    percentile={
        "base": (0.51, 0.49, 0.50, 0.50, 0.50, 0.52, 0.49),
        "8": (0.29, 0.43, 0.46, 0.55, 0.67, 0.76, 0.52),
    },
    spearman=(0.99, 0.28, *[(-0.14, 0.19)] * 5),
)
LINEAR_PROBES = ("elastic_net", "k_sparse")


@dataclass(frozen=True)
class Row:
    """One number of the run beside the release's; None where either has none."""

    what: str
    stage: str
    at: str
    """The layer or the entity; empty for a number of the whole model."""
    run: float | None
    """Mean over seeds."""
    release: float | tuple[float, float] | None

    @property
    def difference(self) -> float | None:
        """Run less release; of a range the distance from its nearer end, 0 inside it."""
        if self.run is None or self.release is None:
            return None
        low, high = self.release if isinstance(self.release, tuple) else (self.release, self.release)
        return self.run - min(max(self.run, low), high)


@dataclass(frozen=True)
class Comparison:
    """A run beside the release."""

    variant: str
    """The released run that is nearest to this one's settings."""
    differs: tuple[str, ...]
    """In what the two differ, in words."""
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.differs:
            return f"Beside the release's run {self.variant!r}, whose settings these are."
        return (
            f"Beside the release's run {self.variant!r}. These numbers are not comparable: {'; '.join(self.differs)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, each row with its difference."""
        return {
            "variant": self.variant,
            "differs": list(self.differs),
            "source": (__doc__ or "").split("\n\n")[1],
            "rows": [{**asdict(row), "difference": row.difference} for row in self.rows],
        }


@explained
def compare(run: Run) -> Comparison:
    """A run beside the released one that is nearest to it; layer numbers only where the layers are the same.

    Raises:
        ValueError: the run has no concept arm, or measured something else than span F1.
    """
    arms = run.arms.get("concept")
    if not arms:
        raise ValueError(
            f"the release pruned a concept, and this run has the arms {', '.join(run.arms)}; run it with the arm "
            "concept"
        )
    scores = arms[0][BASE].scores
    if not isinstance(scores, SpanScores):
        raise ValueError(f"the release has span F1, and this run measured {scores.metric}; compare a run of a tagger")
    variant = nearest(run.experiment)
    rows = [
        Row("F1, overall", stage, "", _mean(arms, stage, lambda s: s.scores.value(OVERALL)), f1)
        for stage, f1 in zip((BASE, PRUNED, *RELEASE.epochs), variant.f1, strict=True)
    ]
    after = {
        label: _mean(arms, PRUNED, lambda s, k=label: s.scores.value(k)) if label in scores.labels else None
        for label in RELEASE.f1_after_pruning
    }
    rows += [Row("F1 after pruning", PRUNED, label, after[label], f1) for label, f1 in RELEASE.f1_after_pruning.items()]
    return Comparison(variant.name, differs(run, variant), (*rows, *_layer_rows(run.experiment, arms)))


def nearest(experiment: Experiment) -> Variant:
    """The released run with the same kind of score, and the nearest share of pruned neurons."""
    kind = "linear probe" if experiment.score in LINEAR_PROBES else "probeless"
    known = [variant for variant in RELEASE.variants if variant.score == kind]
    share = 0.5 if experiment.prune.fraction == "auto" else experiment.prune.fraction
    return min(known, key=lambda v: abs(v.n_pruned / RELEASE.n_neurons - share))


def differs(run: Run, variant: Variant) -> tuple[str, ...]:
    """In what a run differs from a released one, in words; empty if in nothing that its settings show."""
    made, differences = run.experiment, []

    def unlike(what: str, here: Any, there: Any) -> None:
        if here != there:
            differences.append(f"{what} {here}, there {there}")

    unlike("the model is", Path(made.model).name, RELEASE.model)
    if "conll2003" not in (made.corpus or "").lower().replace("-", "").replace("_", ""):
        differences.append(f"the corpus is {made.corpus}, there CoNLL-2003")
    if made.probe_corpus is None:
        differences.append("saliency is measured on the task's own text, there on a concept corpus")
    unlike("the concept is", "+".join(made.labels), "LOC")
    unlike("the site is", made.site, "resid")
    unlike("the score is", made.score if made.score not in LINEAR_PROBES else "linear probe", variant.score)
    share = variant.n_pruned / RELEASE.n_neurons
    here = float(np.mean([sized.fraction for sized in run.sized])) if run.sized else 0.0
    if abs(here - share) > 0.005:
        differences.append(f"{here:.1%} of the neurons are pruned, there {share:.1%}")
    unlike(
        "retraining has",
        f"{made.retrain.epochs:g} epochs in stages of {made.retrain.every or 1:g}"
        if made.retrain.steps is None
        else f"{made.retrain.steps[-1]} steps",
        "8 epochs in stages of 2",
    )
    unlike("every stage begins optimiser and learning rate anew:", made.retrain.restart, True)
    for name, group in (("fine-tuning", made.finetune), ("retraining", made.retrain)):
        unlike(f"{name} is at learning rate", f"{group.lr:g} in batches of {group.batch_size}", "2e-05 in batches of 8")
        if name == "fine-tuning":
            unlike(f"{name} takes", f"{group.epochs:g} epochs", "3 epochs")
    for name, value in PROTOCOLS["published"]["prune"].items():
        if name != "control":  # the random arm is not compared
            unlike(f"prune.{name} is", getattr(made.prune, name), value)
    unlike("the layers are", ", ".join(run.arms["concept"][0].site.layers), ", ".join(RELEASE.layers))
    return tuple(differences)


def _layer_rows(experiment: Experiment, arms: Sequence[Trajectory]) -> list[Row]:
    """Layer by layer; without the run's numbers where its layers are others."""
    alike = arms[0].site.layers == RELEASE.layers
    rows: list[Row] = []

    def add(what: str, stage: str, release: Sequence[Any], of: Callable[[Trajectory], Sequence[float]]) -> None:
        ours: list[float | None] = [None] * len(release)
        if alike and all(stage in arm.stages for arm in arms):
            ours = [_finite(x) for x in np.mean([of(arm) for arm in arms], axis=0)]
        rows.extend(
            Row(what, stage, layer, mine, theirs)
            for layer, mine, theirs in zip(RELEASE.layers, ours, release, strict=True)
        )

    def ranks(arm: Trajectory, stage: str, among: torch.Tensor) -> list[float]:
        """Ranks among all neurons, of which some are left out of the means."""
        return arm[stage].saliency.by_rank(bucket=BUCKET).where(among, torch.nan).nanmean(1).tolist()

    kept = partial(survivors, experiment=experiment)
    for stage, values in RELEASE.mean_rank_saliency.items():
        if stage == BASE:
            add(
                "mean rank saliency, all neurons",
                stage,
                values,
                lambda a: rank_saliency_by_layer(a[BASE].saliency, bucket=BUCKET),
            )
        else:
            add("mean rank saliency, all neurons but null ones", stage, values,
                lambda a, k=stage: ranks(a, k, _means_something(a[k])))  # fmt: skip
            add("mean rank saliency among all, survivors", stage, values, lambda a, k=stage: ranks(a, k, kept(a).mask))
    add("% of all s > 0.5, all neurons", BASE, RELEASE.share_base, lambda a: _high(a[BASE], None))
    add("% of all s > 0.5, all neurons", "8", RELEASE.share_all, lambda a: _high(a["8"], None))
    add("% of all s > 0.5, survivors", "8", RELEASE.share_survivors, lambda a: _high(a["8"], kept(a)))
    for stage, values in RELEASE.percentile.items():
        add("percentile of survivors", stage, values,
            lambda a, k=stage: rank_saliency_by_layer(a[k].saliency, kept(a), bucket=1))  # fmt: skip
    add("rank correlation of survivors, base to 8", "8", RELEASE.spearman, lambda a: _correlations(a, kept(a)))
    return rows


def survivors(arm: Trajectory, experiment: Experiment) -> Neurons:
    """The neurons that were not chosen: the release counts survivors by what was asked, not by what was pruned."""
    for which in ("most", "least"):
        if arm.removed is None or experiment.prune.fraction == "auto":
            continue
        chosen = choose(arm[BASE].saliency, experiment.prune.fraction, which)
        if placed(chosen, experiment.prune.embedding) == arm.removed:
            return ~chosen
    return arm.survivors()


def _means_something(snapshot: Snapshot) -> torch.Tensor:
    """Not null by its top words; where these were not measured, not dead."""
    return ~(is_dead(snapshot.stats) if snapshot.words is None else snapshot.words.null)


def _high(snapshot: Snapshot, among: Neurons | None) -> list[float]:
    """Of the neurons with a rank saliency above 0.5, the share in each layer, in percent."""
    high = (snapshot.saliency.by_rank(among, bucket=BUCKET) > 0.5).sum(1).double()
    return (100 * high / high.sum()).tolist()


def _correlations(arm: Trajectory, among: Neurons) -> list[float]:
    """By layer, Spearman of the score at base and after 8 epochs; NaN where either is constant."""
    rows = []
    for before, after, mask in zip(arm[BASE].saliency.score, arm["8"].saliency.score, among.mask, strict=True):
        a, b = before[mask].numpy(), after[mask].numpy()
        constant = len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0
        rows.append(math.nan if constant else float(np.asarray(st.spearmanr(a, b))[0]))
    return rows


def _mean(arms: Sequence[Trajectory], stage: str, of: Callable[[Snapshot], float]) -> float | None:
    if any(stage not in arm.stages for arm in arms):
        return None
    return _finite(np.mean([of(arm[stage]) for arm in arms]))


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def comparison_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each printed table: run, release and difference below each other."""
    f1 = [row for row in comparison.rows if row.what == "F1, overall"]
    entity = [row for row in comparison.rows if row.what == "F1 after pruning"]
    by_layer: dict[tuple[str, str], list[Row]] = {}
    for row in comparison.rows:
        if row.at in RELEASE.layers:
            by_layer.setdefault((row.what, row.stage), []).append(row)
    layers = [["", ""] if i else list(key) for key in by_layer for i in range(3)]
    lines = [line for rows in by_layer.values() for line in _lines(rows)]
    return [
        ("F1, overall, strict spans", ["", *(row.stage for row in f1)], _lines(f1)),
        ("F1 right after pruning, by entity (release: top 2,688)", ["", *(row.at for row in entity)], _lines(entity)),
        (
            "by layer, buckets of 100 (means of rank saliency in the release: top 3,000)",
            ["", "stage", "", *RELEASE.layers],
            [[*name, *line] for name, line in zip(layers, lines, strict=True)],
        ),
    ]


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    return [
        ["run", *(_shown(row.run) for row in rows)],
        ["release", *(_shown(row.release) for row in rows)],
        ["difference", *(_shown(row.difference, "+") for row in rows)],
    ]


def _shown(value: float | tuple[float, float] | None, sign: str = "") -> str:
    """A dash where there is no number."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{value[0]:.2f} to {value[1]:.2f}"
    return f"{value:{sign}.1f}" if abs(value) >= 2 else f"{value:{sign}.3f}"
