"""Measure once, and at every pause of a training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from relearn_lens import methods, progress
from relearn_lens.find.attribution import Attribution, Form, attribute
from relearn_lens.find.saliency import SCORES, Contrast, Gathered, Saliency, Score, gather, saliency, score_of
from relearn_lens.measure import course, meaning
from relearn_lens.measure.asking import Asked, Metric, Reference
from relearn_lens.measure.evaluation import OVERALL, Label, Scores, SpanScores, as_html, evaluate, judge_of
from relearn_lens.measure.examples import Examples
from relearn_lens.measure.guesses import Guesses
from relearn_lens.measure.meaning import concept_similarity, similarity_to
from relearn_lens.measure.similarity import ActivationSimilarity
from relearn_lens.measure.topwords import TopWords, top_words
from relearn_lens.measure.vectors import WordVectors, input_embeddings
from relearn_lens.methods import Measuring
from relearn_lens.models.model import LanguageModel, Model, encoded_for
from relearn_lens.models.training import Checkpoint
from relearn_lens.names import explained, meant, unknown
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import ClassStats, stream
from relearn_lens.text import markup
from relearn_lens.text.concept import Concept, concept_of, label_shuffles
from relearn_lens.text.corpus import Corpus, Strings
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts import Facts

BASE, PRUNED = course.BASE, "pruned"
"""Names of the stages before and right after pruning; later stages are named by their epoch of retraining."""


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """Everything measured at one pause."""

    saliency: Saliency
    scores: Any
    """`SpanScores` of a tagger, or the `TokenLoss` of a language model; both are `Scores`."""
    stats: ClassStats
    """Class statistics of the probe corpus: any score of class means and variances follows from them."""
    at: Checkpoint | None = None
    """Where in training; None before any."""
    also: Mapping[str, Saliency] = field(default_factory=dict)
    """The other scores that were measured, by name."""
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    """By `Saliency.kind`: `"conductance"`, `"layer_ig"`."""
    words: TopWords | None = None
    """Top words of every neuron."""
    meaning: Float[Tensor, "layer neuron"] | None = None
    """Concept similarity: cosine of the neuron's top words now and at base; NaN for null neurons."""
    near_concept: Float[Tensor, "layer neuron"] | None = None
    """Cosine of the neuron's top words and the concept's own words; NaN for null neurons."""
    shuffled: tuple[Saliency, ...] = ()
    """The main score under shuffled labels: what it gives by chance."""
    concept_words: Strings = ()
    """The words that carry the concept, where top words were measured."""
    separated: Int[Tensor, "layer neuron"] | None = None
    """Number of classes that the neuron separates from all other words beyond the label-shuffle null."""

    guesses: Guesses | None = None
    """What the model says of a few held-out sentences; None where it was not asked."""

    def by(self, name: str) -> Saliency:
        """The saliency of a score or of an attribution by name; `"attribution"` is the first of these.

        Raises:
            ValueError: it was not measured.
        """
        known = {self.saliency.kind: self.saliency, **self.also}
        known |= {kind: each.saliency() for kind, each in self.attributions.items()}
        if self.attribution is not None:
            known["attribution"] = self.attribution.saliency()
        if name not in known:
            raise ValueError(
                f"{name!r} was not measured at this stage; measured: {', '.join(known)}{meant(name, known)}"
            )
        return known[name]

    @property
    def attribution(self) -> Attribution | None:
        """The first of `attributions`; None without any."""
        return next(iter(self.attributions.values()), None)

    @property
    def f1(self) -> dict[str, float]:
        """Strict span F1 by label and `"overall"`.

        Raises:
            AttributeError: the model is no tagger; see `scores`.
        """
        if not isinstance(self.scores, SpanScores):
            raise AttributeError(f"a language model has no F1 but a {self.scores.metric}: see snapshot.scores")
        return self.scores.f1

    @property
    def shown(self) -> dict[str, float]:
        """The numbers that people read, by label and `"overall"`: F1, or loss in nats per token."""
        return {label: self.scores.shown(label) for label in (*self.scores.labels, OVERALL)}

    def __repr__(self) -> str:
        where = f"stage {self.at.stage}: " if self.at else ""
        shown = ", ".join(f"{label} {value:.3f}" for label, value in self.shown.items())
        best = next(iter(self.saliency.top(1)))
        most = f"{self.saliency.score.max():.3g} {self.saliency.unit}"
        return f"Snapshot({where}{self.scores.metric} {shown}; {self.saliency.kind} highest {best} at {most})"

    def _repr_html_(self) -> str:
        """Scores with their intervals over sentences, and the saliency."""
        title = "before retraining" if self.at is None else repr(self.at)
        return markup.box(title, as_html(self.scores), self.saliency._repr_html_())


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One arm: snapshots by stage (`"base"`, `"pruned"`, then epochs of retraining), in order."""

    snapshots: Mapping[str, Snapshot]
    removed: Neurons | None = None
    """The neurons that were pruned between base and the next stage; None where none were."""
    arm: str = ""
    seed: int = 0
    concept: Concept | None = None
    compare: Neurons | None = None
    """The neurons of matched comparisons, where they are not the survivors: an unpruned arm is compared on the
    neurons that survive in the concept arm, or choosing those by their score at base would look like a move."""
    similarity: Mapping[str, ActivationSimilarity] = field(default_factory=dict)
    """Activations at base against those at the last stage: over `"all"` words and over the `"concept"`'s."""
    by: str = ""
    """How it was removed: `"prune"`, or the name of another remover; empty where nothing was."""
    examples: Examples | None = None
    """What some neurons do at the words of a few sentences at the last stage, where that was kept."""
    ends: course.Ends | None = field(default=None, init=False, compare=False)
    """The weights of its start and end, where `track` kept them; no file holds them."""

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
        """What the concept's score is looked up by: its labels together, or its name where it is a list of words; then
        a tagger has no score of its own for it, and the overall one stands in."""
        if self.concept is None:
            return OVERALL
        names = tuple(self.concept.labels) or (self.concept.name,)
        known = next(iter(self.snapshots.values())).scores.labels if self.snapshots else names
        return names if set(names) <= set(known) or self.concept.labels else OVERALL

    def survivors(self) -> Neurons:
        """The neurons that were not pruned: what a matched comparison looks at on both sides."""
        everything = Neurons(torch.ones(len(self.site.layers), self.site.width, dtype=torch.bool), self.site)
        return everything if self.removed is None else everything - self.removed

    def there(self, stage: str) -> Neurons:
        """The neurons that are ranked at a stage: all at base, later the survivors.

        A neuron that is only cut off from what reads it stays as salient as it was, and carries nothing.
        """
        survivors = self.survivors()
        return survivors | ~survivors if stage == BASE else survivors

    def matched(self) -> Neurons:
        """The neurons that a matched comparison looks at, on both sides."""
        return self.survivors() if self.compare is None else self.compare

    def __getitem__(self, stage: str | int) -> Snapshot:
        if str(stage) not in self.snapshots:
            raise KeyError(
                f"no stage {str(stage)!r}; the stages are {', '.join(self.stages)}{meant(stage, self.stages)}"
            )
        return self.snapshots[str(stage)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per stage and label: epoch, step, tokens seen, loss in training (nats per sub-word), and F1,
        precision, recall of a tagger, or the loss of a language model on the label's tokens (`nats_per_token`)."""
        rows = [
            {
                "arm": self.arm,
                "seed": self.seed,
                "stage": stage,
                "epoch": snapshot.at.epoch if snapshot.at else 0.0,
                "step": snapshot.at.step if snapshot.at else 0,
                "tokens_seen": snapshot.at.tokens_seen if snapshot.at else 0,
                "loss": snapshot.at.loss if snapshot.at else float("nan"),
                "label": label,
                **_columns(snapshot.scores, label),
                "support": snapshot.scores.support()[label],
            }
            for stage, snapshot in self.snapshots.items()
            for label in (*snapshot.scores.labels, OVERALL)
        ]
        return pd.DataFrame(rows)

    def to_xarray(self) -> xr.Dataset:
        """`saliency[stage, layer, neuron]`, `f1[stage, label]` or `loss`, `removed[layer, neuron]`, axes by name."""
        first = next(iter(self.snapshots.values()))
        labels = [*first.scores.labels, OVERALL]
        return xr.Dataset(
            {
                "saliency": (
                    ("stage", "layer", "neuron"),
                    torch.stack([s.saliency.score for s in self.snapshots.values()]).numpy(),
                    {"units": first.saliency.unit, "kind": first.saliency.kind},
                ),
                first.scores.metric.lower(): (
                    ("stage", "label"),
                    [[s.shown[k] for k in labels] for s in self.snapshots.values()],
                    {"units": first.scores.unit},
                ),
                "removed": (("layer", "neuron"), (~self.survivors().mask).numpy()),
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
        curve = " → ".join(f"{stage} {s.scores.shown(self.label):.3f}" for stage, s in self.snapshots.items())
        what = self.concept.name if self.concept else OVERALL
        metric = next((s.scores.metric for s in self.snapshots.values()), "F1")
        return f"Trajectory({self.arm or 'arm'}, seed {self.seed}, {metric} of {what}: {curve})"

    def _repr_html_(self) -> str:
        """Scores, and the neuron that is highest, stage by stage."""
        rows, header = [], ["stage"]
        for stage, snapshot in self.snapshots.items():
            header = ["stage", *(f"{snapshot.scores.metric} {label}" for label in snapshot.shown), "highest neuron"]
            there = self.there(stage)
            best = next(iter(snapshot.saliency.top(1, among=there))) if len(there) else "none is left"
            rows.append([stage, *(f"{value:.3f}" for value in snapshot.shown.values()), best])
        otherwise = f"removed by {self.by}" if self.by else "nothing pruned"
        removed = otherwise if self.removed is None else f"{len(self.removed):,} neurons pruned"
        return markup.box(f"{self!r}; {removed}", markup.table(header, rows))


def _columns(scores: Scores, label: str) -> dict[str, float]:
    """A label's scores, as columns of a table."""
    if isinstance(scores, SpanScores):
        return {"f1": scores.f1[label], "precision": scores.precision[label], "recall": scores.recall[label]}
    return {"nats_per_token": scores.shown(label)}


FORMS: dict[str, Form] = {"conductance": "conductance", "layer_ig": "layer"}
"""The measurements that are attributions, and the form of each."""

MEASURES: dict[str, str] = {
    "conductance": "attribution of every neuron of every layer: conductance along the path from a baseline input",
    "layer_ig": "attribution by integrated gradients in each layer's own activations; a pass per layer",
    "top_words": "top words of every neuron, concept similarity to base, polysemy",
    "similarity": "activation similarity of base and last stage: correlation, best match, flow, CKA (a run only)",
}
"""What can be measured besides the scores."""


def check_measures(what: Sequence[str]) -> None:
    """Refuse a measurement that is not known.

    Raises:
        ValueError: it is no score and none of `MEASURES`.
    """
    if strange := [name for name in what if name not in SCORES and name not in MEASURES]:
        raise ValueError(unknown("measurement", strange[0], [*SCORES, *MEASURES]))


@overload
def measure(
    model: LanguageModel,
    probe: Facts | Asked,
    *,
    metrics: Sequence[str | Metric] = ...,
    reference: Reference | None = None,
    at: Checkpoint | None = None,
) -> course.FactsSnapshot: ...


@overload
def measure(
    model: Model, probe: Corpus | Encoded, concept: Concept | str, how: Measuring | None = None, **keywords: Any
) -> Snapshot: ...


def measure(model: Any, probe: Any, *args: Any, **keywords: Any) -> Any:
    """Everything that is measured of a model as it is: of labelled text and a concept, saliency and scores
    (`measure_text`); of facts, every metric in every place (`course.measure_facts`). The keywords are theirs."""
    if isinstance(probe, Facts | Asked):
        return course.measure_facts(model, probe, *args, **keywords)
    return measure_text(model, probe, *args, **keywords)


@explained
def measure_text(
    model: Model,
    probe: Corpus | Encoded,
    concept: Concept | str,
    how: Measuring | None = None,
    *,
    validation: Corpus | Encoded | None = None,
    site: str | Site = "resid",
    score: str | Score | Callable = "probeless",
    contrast: Contrast = "rest",
    base: Snapshot | None = None,
    vectors: WordVectors | None = None,
    seed: int = 0,
    at: Checkpoint | None = None,
    **fields: Any,
) -> Snapshot:
    """Saliency of every neuron for a concept over the probe corpus, and span F1 on `validation` (or on the probe); of a
    language model the loss there.

    `how` says what is measured besides and how; its fields can be given as keywords too. `what` names further
    measurements: scores (from the same pass), `"conductance"` and `"layer_ig"` (always on the same sentences),
    `"top_words"` (with `base` and `vectors`, concept similarity too; by default the vectors are the model's own input
    embeddings as they are now). With `shuffles`, the main score under so many shuffles of the labels, from the same
    pass. `rank_bucket` is the `Saliency.bucket` of every score, `nulls` is for `concept_similarity`, `seed` for
    shuffles and samples of words. The model is read only: mode, gradients, weights and random state are as before.

    Raises:
        ValueError: an unknown site, score, measurement, field or label; a concept that no word of the probe corpus
            carries.
    """
    how = methods.of(Measuring, how, fields)
    encoded, concept = encoded_for(model, probe), concept_of(concept)
    classes = concept.classes(encoded.corpus)
    main = score_of(score, contrast)
    check_measures(how.what)
    if "similarity" in how.what:
        raise ValueError(
            "similarity compares two models, and measure() has one: use activation_similarity(before, after, ...), or "
            "the setting measure.what of a run"
        )
    scored = encoded if validation is None else encoded_for(model, validation)
    place = site_of(model.bridge, site)

    others = [score_of(name) for name in how.what if name in SCORES and name != main.name]
    judge = judge_of(model, scored, concept)
    one_pass = scored is encoded
    passes = encoded.n_tokens * (2 if "top_words" in how.what else 1) + (0 if one_pass else scored.n_tokens)
    with progress.task("measuring", passes):
        gathered = gather(
            model, encoded, classes, {"stats", *(each.needs for each in (main, *others))}, site=place,
            relabelled=label_shuffles(classes, encoded.corpus.word, how.shuffles, seed=seed),
            sample_words=how.sample_words, max_memory=how.max_memory, seed=seed,
            readers=[judge] if one_pass else (), max_tokens=how.max_tokens,
        )  # fmt: skip
        if not one_pass:
            stream(model, scored, (), readers=[judge], max_tokens=how.max_tokens)
        stats = gathered.stats
        assert stats is not None
        words = None
        if "top_words" in how.what:
            words = top_words(
                model, encoded, site=place, stats=stats, max_memory=how.max_memory, max_tokens=how.max_tokens
            )
            vectors = vectors or input_embeddings(model)
    attributions = {
        name: attribute(model, encoded, concept, how, site=place, form=FORMS[name])
        for name in how.what
        if name in FORMS
    }
    by_chance, carries = gathered.shuffled, torch.from_numpy(classes.carries)
    spoken = tuple(sorted(meaning.concept_words(encoded.corpus, concept))) if words else ()

    def scored_by(score: Score, of: Gathered | ClassStats = gathered) -> Saliency:
        return replace(saliency(of, concept, carries, score=score, contrast=contrast), bucket=how.rank_bucket)

    return Snapshot(
        saliency=scored_by(main),
        scores=judge.scores(),
        stats=stats,
        at=at,
        also={each.name: scored_by(each) for each in others},
        attributions=attributions,
        words=words,
        meaning=concept_similarity(base.words, words, vectors, nulls=how.nulls)
        if base and base.words and words and vectors
        else None,
        near_concept=similarity_to(spoken, words, vectors) if words and vectors else None,
        concept_words=spoken,
        shuffled=tuple(scored_by(main, s) for s in by_chance) if main.needs == "stats" else (),
        separated=meaning.separated(stats, by_chance) if len(by_chance) >= 19 else None,
    )


@overload
def track(
    model: LanguageModel,
    probe: Facts | Asked,
    checkpoints: Iterable[Checkpoint],
    *,
    metrics: Sequence[str | Metric] = ...,
    reference: Reference | None = None,
    before: course.FactsSnapshot | None = None,
    removed: str = "",
    arm: str = "",
    seed: int = 0,
    keep_weights: bool = False,
    on_measured: Callable[[str, course.FactsSnapshot], object] | None = None,
) -> course.FactsTrajectory: ...


@overload
def track(
    model: Model,
    probe: Corpus | Encoded,
    concept: Concept | str,
    checkpoints: Iterable[Checkpoint],
    how: Measuring | None = None,
    **keywords: Any,
) -> Trajectory: ...


def track(model: Any, probe: Any, *args: Any, **keywords: Any) -> Any:
    """Measure now, then at every checkpoint of a training loop: labelled text for a concept (`track_text`), or facts
    (`course.track_facts`). The keywords are theirs."""
    if isinstance(probe, Facts | Asked):
        return course.track_facts(model, probe, *args, **keywords)
    return track_text(model, probe, *args, **keywords)


@explained
def track_text(
    model: Model,
    probe: Corpus | Encoded,
    concept: Concept | str,
    checkpoints: Iterable[Checkpoint],
    how: Measuring | None = None,
    *,
    before: Snapshot | None = None,
    removed: Neurons | None = None,
    compare: Neurons | None = None,
    validation: Corpus | Encoded | None = None,
    arm: str = "",
    seed: int = 0,
    keep_weights: bool = False,
    on_measured: Callable[[str, Snapshot], object] | None = None,
    **measuring,
) -> Trajectory:
    """Measure now, then at every checkpoint of a training loop.

    `checkpoints` is `retrain_(...)` or any loop that yields `Checkpoint`. `before` is the snapshot from before
    pruning (stage `"base"`), `removed` the set that was pruned, `compare` the neurons of matched comparisons where they
    are not the survivors. `how` and other keywords are those of `measure`; `on_measured` is called with each
    stage's name and snapshot as it comes. With `keep_weights` the trajectory holds copies of the weights after pruning
    and at its end, for `grafts`.

    Warns where there is nothing to lose: a label that the model of `before` does not know beyond noise. And where two
    stages measure the same to the bit: checkpoints that hold the same weights, such as one file saved
    under two names, draw a flat line that means nothing.

    Raises:
        ValueError: as `measure`; no training to go through; or two checkpoints of one epoch.
    """
    probe, concept = encoded_for(model, probe), concept_of(concept)
    if isinstance(checkpoints, methods.Method) or not isinstance(checkpoints, Iterable):
        raise ValueError(
            "track goes through a training of this model, such as retrain_(model, text, lr=..., seed=...), or your own "
            f"loop that yields Checkpoint; got a {type(checkpoints).__name__}"
        )
    if not isinstance(removed, Neurons | None):
        raise ValueError(f"removed= is the set that was pruned, Neurons.of(site, ...), got a {type(removed).__name__}")
    validation = probe if validation is None else encoded_for(model, validation)
    snapshots: dict[str, Snapshot] = {} if before is None else {BASE: before}
    if before is not None:
        _warn_of_unknown(before.scores)
    start = model.copied() if keep_weights else None
    course.followed(
        snapshots, PRUNED, checkpoints,
        lambda at: measure_text(model, probe, concept, how, validation=validation, at=at, **measuring),
        _same, on_measured, ("epoch", "an epoch"),
    )  # fmt: skip
    path = Trajectory(snapshots, removed, arm, seed, concept, compare, by="" if removed is None else "prune")
    if start is not None:

        def outcomes(model: Model) -> dict[str, Scores]:
            scores = evaluate(model, validation, concept=concept)
            return {scores.margin.quantity: scores.margin, scores.metric: scores}

        object.__setattr__(path, "ends", course.Ends(model, start, model.copied(), outcomes, path.label))
    return path


def _warn_of_unknown(scores: Scores) -> None:
    """Warn of labels that a model does not know, so that no cut can take them."""
    if not isinstance(scores, SpanScores):
        return
    support = scores.support()
    if unknown := [name for name in scores.labels if support[name] and not scores.interval(name)[0] > 0]:
        shown = ", ".join(f"{name} ({scores.f1[name]:.2f} over {support[name]} spans)" for name in unknown)
        warnings.warn(
            f"before the cut the model does not know {shown}, so there is nothing to lose and nothing to come back; "
            "train it longer, faster or on more text (finetune_ with epochs=, lr=)",
            stacklevel=3,
        )


def _same(one: Snapshot, other: Snapshot) -> bool:
    """Whether saliency is the very same, and what the head says: training may have moved it alone."""
    if not torch.equal(one.saliency.score, other.saliency.score):
        return False
    sums = [[s.scores.sums(label) for label in (*s.scores.labels, OVERALL)] for s in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*sums, strict=True))
