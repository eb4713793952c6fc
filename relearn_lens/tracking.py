"""Measure once, and at every pause of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
import xarray as xr

from relearn_lens.concept import Concept
from relearn_lens.corpus import Corpus
from relearn_lens.encoding import Encoded, encode
from relearn_lens.evaluation import OVERALL, Label, SpanScores, check_labels, evaluate
from relearn_lens.models import Tagger
from relearn_lens.neurons import Neurons, Site
from relearn_lens.retraining import Checkpoint
from relearn_lens.saliency import Contrast, Saliency, Score, saliency, score_of
from relearn_lens.streams import ClassStats, class_stats

BASE, PRUNED = "base", "pruned"
"""Names of the stages before and right after pruning; later stages are named by their epoch of retraining."""


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """Everything measured at one pause."""

    saliency: Saliency
    scores: SpanScores
    stats: ClassStats
    """Class statistics of the probe corpus: any other score follows from them without the model."""
    at: Checkpoint | None = None
    """Where in training; None before any."""

    @property
    def f1(self) -> dict[str, float]:
        """Strict span F1 by label and `"overall"`."""
        return self.scores.f1

    def __repr__(self) -> str:
        return f"Snapshot({self.saliency!r}, {self.scores!r})"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One arm: snapshots by stage (`"base"`, `"pruned"`, then epochs of retraining), in order."""

    snapshots: Mapping[str, Snapshot]
    pruned: Neurons | None = None
    """What was pruned between base and the next stage; None when nothing was."""
    arm: str = ""
    seed: int = 0
    concept: Concept | None = None
    compare: Neurons | None = None
    """The neurons of matched comparisons, where they are not the survivors: an unpruned arm is compared on the
    neurons that survive in the concept arm, or choosing those by their score at base would look like a move."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        return tuple(self.snapshots)

    @property
    def site(self) -> Site:
        """What the neurons are."""
        return next(iter(self.snapshots.values())).saliency.site

    @property
    def label(self) -> Label:
        """What the concept's F1 is looked up by; all labels together for a concept that is a list of words."""
        return tuple(self.concept.labels) or OVERALL if self.concept else OVERALL

    def survivors(self) -> Neurons:
        """The neurons that were not pruned: what a matched comparison looks at on both sides."""
        site = self.site
        everything = Neurons(torch.ones(len(site.layers), site.width, dtype=torch.bool), site)
        return everything if self.pruned is None else everything - self.pruned

    def matched(self) -> Neurons:
        """The neurons that a matched comparison looks at, on both sides."""
        return self.survivors() if self.compare is None else self.compare

    def __getitem__(self, stage: str) -> Snapshot:
        return self.snapshots[stage]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per stage and label: epoch, step, tokens seen, loss (nats per sub-word), F1, precision, recall."""
        rows = []
        for stage, snapshot in self.snapshots.items():
            scores, at = snapshot.scores, snapshot.at
            support = scores.support()
            for label in (*scores.labels, OVERALL):
                rows.append(
                    {
                        "arm": self.arm,
                        "seed": self.seed,
                        "stage": stage,
                        "epoch": at.epoch if at else 0.0,
                        "step": at.step if at else 0,
                        "tokens_seen": at.tokens_seen if at else 0,
                        "loss": at.loss if at else float("nan"),
                        "label": label,
                        "f1": scores.f1[label],
                        "precision": scores.precision[label],
                        "recall": scores.recall[label],
                        "support": support[label],
                    }
                )
        return pd.DataFrame(rows)

    def to_xarray(self) -> xr.Dataset:
        """`saliency[stage, layer, neuron]`, `f1[stage, label]` and `pruned[layer, neuron]`, axes by name."""
        first = next(iter(self.snapshots.values()))
        labels = [*first.scores.labels, OVERALL]
        return xr.Dataset(
            {
                "saliency": (
                    ("stage", "layer", "neuron"),
                    torch.stack([s.saliency.score for s in self.snapshots.values()]).numpy(),
                    {"units": first.saliency.unit, "kind": first.saliency.kind},
                ),
                "f1": (("stage", "label"), [[s.f1[k] for k in labels] for s in self.snapshots.values()]),
                "pruned": (("layer", "neuron"), (~self.survivors().mask).numpy()),
            },
            coords={"stage": list(self.stages), "layer": list(self.site.layers), "label": labels},
            attrs={
                "arm": self.arm,
                "seed": self.seed,
                "concept": self.concept.name if self.concept else "",
                "site": self.site.name,
            },
        )

    def __repr__(self) -> str:
        curve = " > ".join(f"{stage} {s.scores.value(self.label):.3f}" for stage, s in self.snapshots.items())
        what = self.concept.name if self.concept else OVERALL
        return f"Trajectory({self.arm or 'arm'}, seed {self.seed}, F1 of {what}: {curve})"


def measure(
    tagger: Tagger,
    probe: Corpus | Encoded,
    concept: Concept,
    *,
    validation: Corpus | Encoded | None = None,
    site: str | Site = "resid",
    score: str | Score | Callable = "probeless",
    contrast: Contrast = "classes",
    at: Checkpoint | None = None,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> Snapshot:
    """Saliency of every neuron for a concept over the probe corpus, and span F1 on `validation` (or on the probe).

    The model is read only: mode, gradients, weights and random state are as before.

    Raises:
        ValueError: an unknown site, score or label; a concept that no word of the probe corpus carries.
    """
    encoded = _encoded(tagger, probe)
    classes = concept.classes(encoded.corpus)
    score = score_of(score, contrast)
    scored = encoded if validation is None else _encoded(tagger, validation)
    check_labels(tagger, scored.corpus)
    stats = class_stats(tagger, encoded, classes, site=site, max_tokens=max_tokens, tick=tick)
    return Snapshot(
        saliency=saliency(stats, concept, torch.from_numpy(classes.carries), score=score, contrast=contrast),
        scores=evaluate(
            tagger,
            scored,
            max_tokens=max_tokens,
            tick=tick,
        ),
        stats=stats,
        at=at,
    )


def track(
    tagger: Tagger,
    probe: Corpus | Encoded,
    concept: Concept,
    checkpoints: Iterable[Checkpoint],
    *,
    before: Snapshot | None = None,
    pruned: Neurons | None = None,
    compare: Neurons | None = None,
    validation: Corpus | Encoded | None = None,
    arm: str = "",
    seed: int = 0,
    on_measured: Callable[[str, Snapshot], object] | None = None,
    **measuring,
) -> Trajectory:
    """Measure now, then at every checkpoint of a training loop.

    `checkpoints` is `retrain_(...)` or any loop that yields `Checkpoint`. `before` is the snapshot from before
    pruning (stage `"base"`), `pruned` the set that was pruned, `compare` the neurons of matched comparisons where they
    are not the survivors. Other keywords are those of `measure`; `on_measured` is called with each stage's name and
    snapshot as it comes.

    Raises:
        ValueError: as `measure`; or two checkpoints of one epoch.
    """
    probe = _encoded(tagger, probe)
    validation = probe if validation is None else _encoded(tagger, validation)
    snapshots: dict[str, Snapshot] = {} if before is None else {BASE: before}

    def take(stage: str, at: Checkpoint | None) -> None:
        snapshots[stage] = measure(tagger, probe, concept, validation=validation, at=at, **measuring)
        if on_measured:
            on_measured(stage, snapshots[stage])

    take(PRUNED, None)
    for checkpoint in checkpoints:
        stage = stage_name(checkpoint)
        if stage in snapshots:
            raise ValueError(f"two checkpoints are of epoch {stage}; each stage needs an epoch of its own")
        take(stage, checkpoint)
    return Trajectory(snapshots, pruned, arm, seed, concept, compare)


def stage_name(checkpoint: Checkpoint) -> str:
    """The name of a stage: its epoch of retraining, such as `"2"` or `"0.5"`."""
    return f"{round(checkpoint.epoch, 3):.10g}"


def _encoded(tagger: Tagger, text: Corpus | Encoded) -> Encoded:
    return text if isinstance(text, Encoded) else encode(text, tagger.tokenizer, context=tagger.context)
