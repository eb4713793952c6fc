"""The experiment: fine-tune once per seed, then prune and retrain every arm, measuring at every stage.

`perform` is a generator of events; whoever runs it (a run folder, a notebook) takes what it wants from them. The base
model of a seed is trained once and shared by the arms, and every arm starts from the same weights.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from relearn_lens import readers, sources, toy
from relearn_lens.ablation import ablated, check_prunable, prune_
from relearn_lens.attribution import attribution_plan
from relearn_lens.concept import Concept
from relearn_lens.corpus import Corpus, Splits
from relearn_lens.encoding import Encoded, encode
from relearn_lens.evaluation import Label, SpanScores, evaluate
from relearn_lens.models import Tagger, load_tagger
from relearn_lens.neurons import Neurons, Site, random_neurons, site_of
from relearn_lens.retraining import Checkpoint, finetune_, retrain_
from relearn_lens.saliency import SCORES, score_of
from relearn_lens.settings import Experiment, Training
from relearn_lens.similarity import ActivationSimilarity, activation_similarity
from relearn_lens.tracking import BASE, FORMS, PRUNED, Snapshot, Trajectory, check_measures, measure, stage_name
from relearn_lens.vectors import WordVectors, input_embeddings

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Prepared:
    """Everything loaded and checked, before any training."""

    experiment: Experiment
    tagger: Tagger
    site: Site
    concept: Concept
    train: Encoded
    validation: Encoded
    probe: Encoded
    notes: tuple[str, ...]
    """What the user should know of the text: sentences cut, words lost."""
    inputs: Mapping[str, str]
    """Hash of every input."""


@dataclass(frozen=True)
class Base:
    """The fine-tuned base model of one seed, measured, and the neurons that will be pruned."""

    seed: int
    weights: Mapping[str, Tensor]
    snapshot: Snapshot
    chosen: Neurons
    vectors: WordVectors
    """Word vectors from the base model's input embeddings: what concept similarity compares top words by."""


@dataclass(frozen=True)
class Damage:
    """What pruning alone does to the base model: the concept's neurons, and random sets of the same size per layer."""

    seed: int
    concept: SpanScores
    random: tuple[SpanScores, ...]


@dataclass(frozen=True)
class Measured:
    """One stage of one arm was measured."""

    arm: str
    seed: int
    stage: str
    snapshot: Snapshot


@dataclass(frozen=True)
class Arm:
    """One arm of one seed is done."""

    trajectory: Trajectory
    weights: Mapping[str, Tensor] | None
    """The model's weights as they are now, no copies; None for an arm that an earlier process finished."""


Event = Prepared | Base | Damage | Measured | Arm


@runtime_checkable
class Kept(Protocol):
    """What an earlier process of the same run left."""

    def base(self, seed: int, site: Site) -> tuple[dict[str, Tensor], Snapshot] | None:
        """Weights and measurement of a seed's base model."""

    def damage(self, seed: int) -> Damage | None:
        """The random draws' damage of a seed."""

    def arm(self, name: str, seed: int, site: Site) -> Trajectory | None:
        """A finished arm."""


@dataclass
class Run:
    """A finished experiment: what a run folder loads into."""

    experiment: Experiment
    arms: dict[str, list[Trajectory]] = field(default_factory=dict)
    """Arm name to one trajectory per seed, in the order of the settings."""
    damage: list[Damage] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    """Versions, seeds, hashes of inputs, notes, seconds, memory."""
    folder: str | None = None

    @property
    def label(self) -> Label:
        """What the concept's F1 is looked up by."""
        return self.experiment.labels

    @property
    def interval(self) -> dict[str, Any]:
        """Coverage and bootstrap draws of every interval, as `analysis.estimate` takes them."""
        return {"level": self.experiment.measure.level, "draws": self.experiment.measure.draws}

    def to_dataframe(self) -> Any:
        """All arms' `Trajectory.to_dataframe` below each other."""
        import pandas as pd

        return pd.concat([t.to_dataframe() for arm in self.arms.values() for t in arm], ignore_index=True)

    def to_xarray(self) -> Any:
        """All arms' `Trajectory.to_xarray` along the axes `arm` and `seed`."""
        import xarray as xr

        arms = [
            xr.concat([t.to_xarray().drop_attrs() for t in arm], dim="seed").assign_coords(seed=[t.seed for t in arm])
            for arm in self.arms.values()
        ]
        return xr.concat(arms, dim="arm").assign_coords(arm=list(self.arms))

    def __repr__(self) -> str:
        arms = "\n  ".join(repr(t) for arm in self.arms.values() for t in arm)
        return f"Run({self.experiment.model}, {self.experiment.corpus}, {self.experiment.site})\n  {arms}"


def concept_of(experiment: Experiment) -> Concept:
    """The concept that the settings name."""
    return Concept("+".join(experiment.labels), experiment.labels)


def prepare(experiment: Experiment, *, progress: Progress | None = None) -> Prepared:
    """Load text and model, draw the sentences, and check all that can be checked before training.

    Raises:
        ValueError: an unknown name, a label that the text lacks, a concept that the probe corpus lacks.
        OSError: a model or a text that cannot be had.
    """
    score_of(experiment.score, experiment.contrast)
    check_measures(experiment.measure.what)
    _check_device(experiment.device)
    concept = concept_of(experiment)
    if progress:
        progress("reading the text", 0, 1)
    splits = _read(experiment)
    for part in splits:
        concept.classes(part)
    data = experiment.data
    sizes = (data.train_sentences, data.validation_sentences, data.probe_sentences)
    drawn = [_draw(part, size, concept, experiment) for part, size in zip(splits, sizes, strict=True)]
    concept.classes(drawn[2])
    if progress:
        progress("loading the model", 0, 1)
    tagger = _load(experiment, drawn[0].label_names)
    site = site_of(tagger.bridge, experiment.site)
    if {"concept", "random"} & set(experiment.arms):
        check_prunable(tagger, site)
    train, validation, probe = (
        encode(part, tagger.tokenizer, context=tagger.context, long=data.long) for part in drawn
    )
    notes = [note for part in (train, validation, probe) for note in part.notes()]
    notes += _plans(experiment, tagger, probe, concept, site)
    return Prepared(
        experiment, tagger, site, concept, train, validation, probe, tuple(notes), _hashes(experiment, drawn)
    )


def perform(experiment: Experiment, *, kept: Kept | None = None, progress: Progress | None = None) -> Iterator[Event]:
    """Run an experiment, yielding every result as it comes.

    What `kept` gives back is not computed again. Each seed: fine-tune the base, measure it, choose the neurons; then
    each arm from the same weights. Order of events: `Prepared`; per seed `Base`, `Damage`, and per arm `Measured` for
    each stage and `Arm`.
    """
    threads = torch.get_num_threads()
    try:
        if experiment.threads:
            torch.set_num_threads(experiment.threads)
        yield from _perform(experiment, kept, progress)
    finally:
        torch.set_num_threads(threads)


def _perform(experiment: Experiment, kept: Kept | None, progress: Progress | None) -> Iterator[Event]:
    ready = prepare(experiment, progress=progress)
    yield ready
    for seed in experiment.seeds:
        base = _base(ready, seed, kept, progress)
        yield base
        yield (kept.damage(seed) if kept else None) or _damage(ready, base, progress)
        for arm in experiment.arms:
            done = kept.arm(arm, seed, ready.site) if kept else None
            if done is not None:
                yield Arm(done, None)
            else:
                done = yield from _arm(ready, base, arm, progress)
                yield Arm(done, ready.tagger.weights())


def _base(ready: Prepared, seed: int, kept: Kept | None, progress: Progress | None) -> Base:
    """The fine-tuned model of a seed, from the run folder if it is there."""
    tagger, experiment = ready.tagger, ready.experiment
    found = kept.base(seed, ready.site) if kept else None
    if found:
        weights, snapshot = found
        tagger.load_weights({name: value.to(tagger.device) for name, value in weights.items()})
    else:
        _finetune(ready, seed, ready.train, progress)
        snapshot = _measure(ready, progress, "measuring the base model", seed=seed)
        weights = {name: value.detach().clone() for name, value in tagger.weights().items()}
    chosen = snapshot.saliency.top(fraction=experiment.prune.fraction)
    return Base(seed, weights, snapshot, chosen, input_embeddings(tagger))


def _finetune(ready: Prepared, seed: int, train: Encoded, progress: Progress | None) -> None:
    """Put freshly loaded weights and a fresh head into the model, and fine-tune it."""
    experiment = ready.experiment
    ready.tagger.load_weights(_load(experiment, ready.tagger.label_names, seed=seed).weights())
    for _ in finetune_(
        ready.tagger, train, seed=seed, prior_bias=experiment.finetune.prior_bias,
        tick=_steps(progress, "fine-tuning"), **_training(experiment.finetune),
    ):  # fmt: skip
        pass


def _without_concept(encoded: Encoded, concept: Concept) -> Encoded:
    """The same text, in which the words of the concept have no label."""
    corpus = encoded.corpus
    classes = concept.classes(corpus)
    keep = ~classes.carries[classes.of_word]
    return replace(encoded, corpus=replace(corpus, label=corpus.label * keep, begins=corpus.begins & keep))


def _damage(ready: Prepared, base: Base, progress: Progress | None) -> Damage:
    """F1 of the base model with the concept's neurons ablated, and with random sets; no training."""
    tagger, draws = ready.tagger, ready.experiment.prune.control_draws
    tagger.load_weights(base.weights)
    sets = [
        base.chosen,
        *(random_neurons(like=base.chosen, seed=_draw_seed(base.seed, 1 + k)) for k in range(draws)),
    ]
    scores = []
    for k, neurons in enumerate(sets):
        if progress:
            progress("ablating random sets for comparison", k, len(sets))
        with ablated(tagger, neurons):
            scores.append(evaluate(tagger, ready.validation, max_tokens=ready.experiment.measure.max_tokens))
    return Damage(base.seed, scores[0], tuple(scores[1:]))


def _arm(ready: Prepared, base: Base, name: str, progress: Progress | None) -> Generator[Event, None, Trajectory]:
    """Prune and retrain one arm; a generator that returns its trajectory."""
    tagger, experiment = ready.tagger, ready.experiment
    tagger.load_weights(base.weights)
    if name == "never":
        _finetune(ready, base.seed, _without_concept(ready.train, ready.concept), progress)
        first = _measure(ready, progress, "measuring the model that never had the concept", seed=base.seed)
    else:
        first = base.snapshot
    pruned = {
        "concept": lambda: base.chosen,
        "random": lambda: random_neurons(like=base.chosen, seed=_draw_seed(base.seed, 0)),
        "unpruned": lambda: None,
        "never": lambda: base.chosen,
    }[name]()
    yield Measured(name, base.seed, BASE, first)
    snapshots = {BASE: first}
    if pruned is None:  # nothing was taken away, so there is nothing new to measure
        snapshots[PRUNED] = first
    else:
        prune_(tagger, pruned, sever=experiment.prune.sever)
        snapshots[PRUNED] = _measure(ready, progress, f"measuring the pruned model ({name})", seed=base.seed, base=base)
    yield Measured(name, base.seed, PRUNED, snapshots[PRUNED])
    settings = experiment.retrain
    training = retrain_(
        tagger, ready.train, seed=base.seed + 1, every=settings.every, restart=settings.restart,
        tick=_steps(progress, f"retraining ({name})"), **_training(settings),
    )  # fmt: skip
    for checkpoint in training:
        stage = stage_name(checkpoint)
        last = checkpoint.epoch >= settings.epochs
        what = f"measuring ({name}, epoch {stage})"
        snapshots[stage] = _measure(ready, progress, what, seed=base.seed, base=base, last=last, at=checkpoint)
        yield Measured(name, base.seed, stage, snapshots[stage])
    compare = ~base.chosen if pruned is None else None
    similarity = _similarity(ready, base, progress, f"comparing activations with the base model ({name})")
    return Trajectory(snapshots, pruned, name, base.seed, ready.concept, compare, similarity)


def _similarity(ready: Prepared, base: Base, progress: Progress | None, what: str) -> dict[str, ActivationSimilarity]:
    """Activations of the base model against those of the model as it is now."""
    measuring = ready.experiment.measure
    if "similarity" not in measuring.what:
        return {}
    return activation_similarity(
        base.weights, ready.tagger, ready.probe, concept=ready.concept, site=ready.site,
        max_memory=_bytes(measuring.max_memory), max_tokens=measuring.max_tokens,
        tick=_tokens(progress, what, 2 * ready.probe.n_tokens),
    )  # fmt: skip


def _read(experiment: Experiment) -> Splits:
    """The corpus that the settings name, in its three parts."""
    data = experiment.data
    if experiment.corpus == "toy":
        return toy.corpus().split(seed=data.split_seed, parts=data.parts)
    return readers.read_splits_named(
        experiment.corpus, seed=data.split_seed, parts=data.parts, scheme=data.scheme, column=data.column
    )


def _draw(corpus: Corpus, sentences: int, concept: Concept, experiment: Experiment) -> Corpus:
    """At most so many sentences of a part, with the share that holds the concept that the settings ask for."""
    data = experiment.data
    rng = np.random.default_rng(data.split_seed)
    classes = concept.classes(corpus)
    holds = np.add.reduceat(classes.carries[classes.of_word], corpus.start[:-1]) > 0
    labelled = np.add.reduceat(corpus.label > 0, corpus.start[:-1]) > 0
    usable = np.flatnonzero(labelled | ~np.array(data.labelled_only))
    if data.concept_share is None:
        chosen = rng.permutation(usable)[:sentences]
    else:
        with_it = rng.permutation(usable[holds[usable]])[: round(sentences * data.concept_share)]
        without = rng.permutation(usable[~holds[usable]])[: sentences - len(with_it)]
        chosen = np.concatenate([with_it, without])
    return corpus.take(np.sort(chosen))


def _load(experiment: Experiment, labels: tuple[str, ...], *, seed: int = 0) -> Tagger:
    """The model with its head; the planted toy comes with its own."""
    device = None if experiment.device == "auto" else experiment.device
    if experiment.model == "toy":
        if labels != toy.LABELS:
            raise ValueError(f"model 'toy' knows the labels {toy.LABELS} of corpus 'toy', not {labels}")
        return toy.tagger(seed=seed).to(device or "cpu")
    return load_tagger(experiment.model, labels, seed=seed, device=device)


def _hashes(experiment: Experiment, drawn: list[Corpus]) -> dict[str, str]:
    """sha256 of the sentences that are used and of the files they and the model come from."""
    found = {f"sentences:{part}": text.sha256() for part, text in zip(Splits._fields, drawn, strict=True)}
    for role, name in (("model", experiment.model), ("corpus", experiment.corpus)):
        if name == "toy":
            continue  # made by this package: its version says what it is
        if name in sources.SOURCES:
            found |= {f"{role}:{name}/{file}": digest for file, digest in sources.hashes(name).items()}
        else:
            path = Path(name.partition(":")[2] if role == "corpus" else name).expanduser()
            found |= {f"{role}:{file}": digest for file, digest in sources.hash_files(path).items()}
    return found


def _check_device(device: str) -> None:
    """Refuse a device that this machine lacks."""
    kind, _, index = device.partition(":")
    there = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= there:
        raise ValueError(f"device = {device!r}: this machine has {there} CUDA device(s); use device=cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps': this machine has none; use device=cpu or auto")


def _training(settings: Training) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("epochs", "lr", "batch_size", "weight_decay", "clip")}


def _draw_seed(seed: int, draw: int) -> int:
    """Seed of a random set of neurons: 0 is the random arm, the others are the draws beside it."""
    return 1000 * (seed + 1) + draw


def _steps(progress: Progress | None, what: str) -> Callable[[int, int], object] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _measure(
    ready: Prepared,
    progress: Progress | None,
    what: str,
    *,
    seed: int,
    base: Base | None = None,
    last: bool = False,
    at: Checkpoint | None = None,
) -> Snapshot:
    """One snapshot, with progress in tokens. Base and last stage get every measurement, others the cheap ones."""
    settings, asked = ready.experiment, ready.experiment.measure
    ends = base is None or last
    wanted = [name for name in asked.what if ends or asked.everywhere or name in SCORES]
    tick = _tokens(
        progress, what, ready.probe.n_tokens * (2 if "top_words" in wanted else 1) + ready.validation.n_tokens
    )
    return measure(
        ready.tagger, ready.probe, ready.concept, validation=ready.validation, site=ready.site, score=settings.score,
        contrast=settings.contrast, what=wanted, base=base.snapshot if base else None,
        vectors=base.vectors if base else None, shuffles=asked.shuffles if ends else 0, seed=seed,
        attribution=_attribution(settings), sample_words=asked.sample_words, max_memory=_bytes(asked.max_memory), at=at,
        max_tokens=asked.max_tokens, tick=tick,
    )  # fmt: skip


def _attribution(experiment: Experiment) -> dict[str, Any]:
    """The settings of attribution, as `attribute` takes them."""
    asked = experiment.measure
    return {
        **{name: getattr(asked, name) for name in ("target", "reference", "quadrature", "steps", "sentences")},
        "max_memory": _bytes(asked.max_memory),
        "seed": experiment.data.split_seed,
    }


def _plans(experiment: Experiment, tagger: Tagger, probe: Encoded, concept: Concept, site: Site) -> list[str]:
    """What the costly measurements will take, and an error now if their settings cannot work."""
    said = []
    for name in experiment.measure.what:
        if name in FORMS:
            plan = attribution_plan(tagger, probe, concept, site=site, form=FORMS[name], **_attribution(experiment))
            said.append(f"{name}: {plan}")
    return said


def _bytes(megabytes: float) -> int:
    return int(megabytes * 2**20)


def _tokens(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """Progress in tokens."""
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done = min(total, done + tokens)
        if progress:
            progress(what, done, total)

    return tick


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
