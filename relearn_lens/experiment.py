"""The experiment: fine-tune once per seed, then prune and retrain every arm, measuring at every stage.

`perform` is a generator of events; whoever runs it (a run folder, a notebook) takes what it wants from them. The base
model of a seed is trained once and shared by the arms, and every arm starts from the same weights.
"""

from __future__ import annotations

import contextlib
import importlib
import resource
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from relearn_lens import markup, sources, toy
from relearn_lens.ablation import ablated, prune_
from relearn_lens.attribution import attribution_plan
from relearn_lens.concept import Concept
from relearn_lens.corpus import Corpus, Splits
from relearn_lens.encoding import Encoded, Reading
from relearn_lens.evaluation import Label, evaluate
from relearn_lens.lora import adapted
from relearn_lens.models import Model, computing, load_language_model, load_tagger
from relearn_lens.neurons import Neurons, Site, random_neurons, site_of
from relearn_lens.protocol import choose, control_of, placed, resolved
from relearn_lens.retraining import Checkpoint, finetune_, retrain_
from relearn_lens.saliency import SCORES, score_of
from relearn_lens.settings import Experiment, Training
from relearn_lens.similarity import ActivationSimilarity, activation_similarity
from relearn_lens.texts import draw, read_texts
from relearn_lens.tracking import BASE, FORMS, PRUNED, Snapshot, Trajectory, check_measures, measure, stage_name
from relearn_lens.vectors import WordVectors, input_embeddings

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Prepared:
    """Everything loaded and checked, before any training."""

    experiment: Experiment
    """The settings, with what depends on the model's family decided."""
    tagger: Model
    """The model that is trained: a tagger, or a language model."""
    site: Site
    concept: Concept
    train: Encoded
    validation: Encoded
    probe: Encoded
    notes: tuple[str, ...]
    """What the user should know: sentences cut, words lost, what was decided by the model's family."""
    inputs: Mapping[str, str]
    """Hash of every input."""


@dataclass(frozen=True)
class Base:
    """The fine-tuned base model of one seed, measured, and the neurons that were chosen there."""

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
    concept: Any
    """`Scores`"""
    random: tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """One stage of one arm was measured."""

    arm: str
    seed: int
    stage: str
    snapshot: Snapshot


@dataclass(frozen=True)
class Paused:
    """A training stands at a pause. What is here is enough to go on from it; no copies."""

    training: str
    """`"base"`, the name of an arm, or `"never-fine"` for the fine-tuning of the arm that never had the concept."""
    seed: int
    at: Checkpoint
    weights: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    """Of the optimiser: `Training.state`."""


@dataclass(frozen=True)
class Arm:
    """One arm of one seed is done."""

    trajectory: Trajectory
    weights: Mapping[str, Tensor] | None
    """The model's weights as they are now, no copies; None for an arm that an earlier process finished."""


Event = Prepared | Base | Damage | Measured | Paused | Arm


@runtime_checkable
class Kept(Protocol):
    """What an earlier process of the same run left."""

    def base(self, seed: int, site: Site) -> tuple[dict[str, Tensor], Snapshot] | None:
        """Weights and measurement of a seed's base model."""

    def damage(self, seed: int) -> Damage | None:
        """The random draws' damage of a seed."""

    def arm(self, name: str, seed: int, site: Site) -> Trajectory | None:
        """A finished arm."""

    def stages(self, arm: str, seed: int) -> dict[str, Snapshot]:
        """The measured stages of an unfinished arm."""
        ...

    def state(self, training: str, seed: int) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]] | None:
        """Last pause, weights and optimiser state of an unfinished training."""


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

    def neuron(self, name: str | tuple[str, int], **how: Any) -> Any:
        """The card of a neuron, such as `"L4N217"`: `plots.neuron_card`."""
        # By name: what reads results is below this module in the order.
        return importlib.import_module("relearn_lens.plots").neuron_card(self, name, **how)

    def explore(self, **how: Any) -> Any:
        """An interactive view in a notebook, else a plain figure: `explore.explore`."""
        return importlib.import_module("relearn_lens.explore").explore(self, **how)

    def _repr_html_(self) -> str:
        """The concept's score by arm and stage, means over seeds."""
        stages = list(dict.fromkeys(stage for arms in self.arms.values() for stage in arms[0].stages))
        rows = []
        for name, arms in self.arms.items():
            shown = {s: sum(arm[s].scores.shown(self.label) for arm in arms) / len(arms) for s in arms[0].stages}
            rows.append([name, len(arms), *(f"{shown[s]:.3f}" if s in shown else "" for s in stages)])
        metric = next((arm[BASE].scores.metric for arms in self.arms.values() for arm in arms), "F1")
        how = self.experiment
        title = f"{how.model}, {how.corpus}, {how.site}: {metric} of {'+'.join(how.labels)}"
        return markup.box(title, markup.table(["arm", "seeds", *stages], rows))

    def __repr__(self) -> str:
        arms = "\n  ".join(repr(t) for arm in self.arms.values() for t in arm)
        return f"Run({self.experiment.model}, {self.experiment.corpus}, {self.experiment.site})\n  {arms}"


def concept_of(experiment: Experiment) -> Concept:
    """The concept that the settings name."""
    if experiment.words:
        return Concept(experiment.labels[0], words=experiment.words)
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
    splits = read_texts(experiment, concept)
    for part in splits:
        concept.classes(part)
    data = experiment.data
    sizes = (data.train_sentences, data.validation_sentences, data.probe_sentences)
    drawn = [draw(part, size, concept, experiment) for part, size in zip(splits, sizes, strict=True)]
    concept.classes(drawn[2])
    if progress:
        progress("loading the model", 0, 1)
    tagger = _load(experiment, drawn[0].label_names)
    site = site_of(tagger.bridge, experiment.site)
    with _adapters(tagger, experiment.retrain.lora_rank, seed=0):
        pass  # peft, and layers to adapt, are there
    decided: list[str] = []
    if set(experiment.arms) - {"unpruned"}:
        experiment, decided = resolved(experiment, tagger.bridge, site)
    train, validation, probe = (tagger.encode(part, long=data.long, reading=_reading(experiment)) for part in drawn)
    notes = [note for part in (train, validation, probe) for note in part.notes()] + decided
    notes += _plans(experiment, tagger, probe, concept, site)
    return Prepared(
        experiment, tagger, site, concept, train, validation, probe, tuple(notes), _hashes(experiment, drawn)
    )


def perform(experiment: Experiment, *, kept: Kept | None = None, progress: Progress | None = None) -> Iterator[Event]:
    """Run an experiment, yielding every result as it comes.

    What `kept` gives back is not computed again. Each seed: fine-tune the base, measure it, choose the neurons; then
    each arm from the same weights. Order of events: `Prepared`; per seed `Base`, `Damage`, and per arm `Measured` for
    each stage and `Arm`; `Paused` wherever a training can be taken up again (not with `retrain.lora_rank`).
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
    with computing(ready.tagger, getattr(torch, experiment.precision)):
        yield from _perform_prepared(ready, kept, progress)


def _perform_prepared(ready: Prepared, kept: Kept | None, progress: Progress | None) -> Iterator[Event]:
    experiment = ready.experiment
    yield ready
    for seed in experiment.seeds:
        base = yield from _base(ready, seed, kept, progress)
        yield base
        yield (kept.damage(seed) if kept else None) or _damage(ready, base, progress)
        for arm in experiment.arms:
            done = kept.arm(arm, seed, ready.site) if kept else None
            if done is not None:
                yield Arm(done, None)
            else:
                done = yield from _arm(ready, base, arm, kept, progress)
                yield Arm(done, ready.tagger.weights())


def _base(ready: Prepared, seed: int, kept: Kept | None, progress: Progress | None) -> Generator[Event, None, Base]:
    """The fine-tuned model of a seed, from the run folder if it is there."""
    tagger, experiment = ready.tagger, ready.experiment
    found = kept.base(seed, ready.site) if kept else None
    if found:
        weights, snapshot = found
        tagger.load_weights({name: value.to(tagger.device) for name, value in weights.items()})
    else:
        yield from _finetune(ready, "base", seed, ready.train, kept, progress)
        snapshot = _measure(ready, progress, "measuring the base model", seed=seed)
        weights = {name: value.detach().clone() for name, value in tagger.weights().items()}
    chosen = choose(snapshot.saliency, experiment.prune.fraction, experiment.prune.which)
    return Base(seed, weights, snapshot, chosen, input_embeddings(tagger))


def _finetune(
    ready: Prepared, name: str, seed: int, train: Encoded, kept: Kept | None, progress: Progress | None
) -> Generator[Event, None, None]:
    """Put freshly loaded weights and a fresh head into the model, or those of the last pause, and fine-tune it."""
    experiment, tagger = ready.experiment, ready.tagger
    resume = _resumed(ready, name, seed, kept)
    if resume is None:
        tagger.load_weights(_load(experiment, ready.train.corpus.label_names, seed=seed).weights())
    if experiment.finetune.epochs == 0:
        return
    prior_bias = experiment.finetune.prior_bias and experiment.task == "tag"
    training = finetune_(
        tagger, train, seed=seed, prior_bias=prior_bias, resume=resume,
        tick=_steps(progress, "fine-tuning"), **_training(experiment.finetune),
    )  # fmt: skip
    for checkpoint in training:
        yield Paused(name, seed, checkpoint, tagger.weights(), training.state())


def _resumed(
    ready: Prepared, name: str, seed: int, kept: Kept | None
) -> tuple[Checkpoint, Mapping[str, Tensor]] | None:
    """Put the weights of a training's last pause into the model, if an earlier process left one."""
    found = kept.state(name, seed) if kept else None
    if found is None:
        return None
    at, weights, state = found
    ready.tagger.load_weights({key: value.to(ready.tagger.device) for key, value in weights.items()})
    return at, state


def _without_concept(encoded: Encoded, concept: Concept) -> Encoded:
    """The same text, in which the words of the concept have no label."""
    corpus = encoded.corpus
    classes = concept.classes(corpus)
    keep = ~classes.carries[classes.of_word]
    return replace(encoded, corpus=replace(corpus, label=corpus.label * keep, begins=corpus.begins & keep))


def _damage(ready: Prepared, base: Base, progress: Progress | None) -> Damage:
    """F1 of the base model without the concept's neurons, and without random sets; no training."""
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
        with _without(ready, base, placed(neurons, ready.experiment.prune.embedding)):
            scores.append(
                evaluate(
                    tagger, ready.validation, concept=ready.concept, max_tokens=ready.experiment.measure.max_tokens
                )
            )
    return Damage(base.seed, scores[0], tuple(scores[1:]))


@contextlib.contextmanager
def _without(ready: Prepared, base: Base, neurons: Neurons) -> Iterator[None]:
    """For a while, the base model as pruning leaves it."""
    sever = ready.experiment.prune.sever
    if sever in ("auto", "out"):  # the same by hooks, and for any site; auto is left where no arm prunes
        with ablated(ready.tagger, neurons):
            yield
    else:
        prune_(ready.tagger, neurons, sever=sever)
        try:
            yield
        finally:
            ready.tagger.load_weights(base.weights)


def _arm(
    ready: Prepared, base: Base, name: str, kept: Kept | None, progress: Progress | None
) -> Generator[Event, None, Trajectory]:
    """Prune and retrain one arm, from its last pause if there is one; a generator that returns its trajectory."""
    tagger, experiment = ready.tagger, ready.experiment
    measured = kept.stages(name, base.seed) if kept else {}
    settings = experiment.retrain
    # The optimiser's state is of the adapters, which merged weights no longer have: with them, from the beginning.
    resume = _resumed(ready, name, base.seed, kept) if PRUNED in measured and not settings.lora_rank else None
    if resume is None:
        tagger.load_weights(base.weights)
    first = base.snapshot
    if name == "never":
        if resume is None:
            without = _without_concept(ready.train, ready.concept)
            yield from _finetune(ready, "never-fine", base.seed, without, kept, progress)
        what = "measuring the model that never had the concept"
        first = measured.get(BASE) or _measure(ready, progress, what, seed=base.seed)
    asked = experiment.prune
    chosen = base.chosen
    if name == "random":
        chosen = control_of(chosen, asked.control, seed=_draw_seed(base.seed, 0))
    pruned = None if name == "unpruned" else placed(chosen, asked.embedding)
    yield Measured(name, base.seed, BASE, first)
    snapshots = {BASE: first}
    if pruned is None:  # nothing was taken away, so there is nothing new to measure
        snapshots[PRUNED] = first
    else:
        assert asked.sever != "auto"  # resolved() decided
        if resume is None:
            prune_(tagger, pruned, sever=asked.sever)
        what = f"measuring the pruned model ({name})"
        snapshots[PRUNED] = measured.get(PRUNED) or _measure(ready, progress, what, seed=base.seed, base=base)
    yield Measured(name, base.seed, PRUNED, snapshots[PRUNED])
    training = retrain_(
        tagger, ready.train, seed=base.seed + 1, every=settings.every, restart=settings.restart, resume=resume,
        tick=_steps(progress, f"retraining ({name})"), **_training(settings),
    )  # fmt: skip
    before = [(stage, s) for stage, s in measured.items() if resume and s.at and s.at.step <= resume[0].step]
    for stage, snapshot in sorted(before, key=lambda entry: entry[1].at.step if entry[1].at else 0):
        snapshots[stage] = snapshot
        yield Measured(name, base.seed, stage, snapshot)
    with _adapters(tagger, settings.lora_rank, seed=base.seed + 1):
        for checkpoint in training:
            stage = stage_name(checkpoint)
            last = checkpoint.epoch >= settings.epochs
            what = f"measuring ({name}, epoch {stage})"
            snapshots[stage] = _measure(ready, progress, what, seed=base.seed, base=base, last=last, at=checkpoint)
            yield Measured(name, base.seed, stage, snapshots[stage])
            if not settings.lora_rank:
                yield Paused(name, base.seed, checkpoint, tagger.weights(), training.state())
    compare = ~placed(chosen, asked.embedding) if pruned is None else None
    similarity = _similarity(ready, base, progress, f"comparing activations with the base model ({name})")
    return Trajectory(snapshots, pruned, name, base.seed, ready.concept, compare, similarity)


def _adapters(tagger: Model, rank: int | None, *, seed: int) -> contextlib.AbstractContextManager[None]:
    return adapted(tagger, rank=rank, seed=seed) if rank else contextlib.nullcontext()


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


def _reading(experiment: Experiment) -> Reading | None:
    """Where words are read; None for what suits the model."""
    return None if experiment.measure.reading == "auto" else experiment.measure.reading


def _load(experiment: Experiment, labels: tuple[str, ...], *, seed: int = 0) -> Model:
    """The model with its head; the planted toy comes with its own."""
    device = None if experiment.device == "auto" else experiment.device
    if experiment.task == "next_token":
        if experiment.model == "toy":
            return toy.language_model(seed=seed).to(device or "cpu")
        return load_language_model(experiment.model, device=device)
    if experiment.model == "toy":
        if labels != toy.LABELS:
            raise ValueError(f"model 'toy' knows the labels {toy.LABELS} of corpus 'toy', not {labels}")
        return toy.tagger(seed=seed).to(device or "cpu")
    return load_tagger(experiment.model, labels, seed=seed, device=device)


def _hashes(experiment: Experiment, drawn: list[Corpus]) -> dict[str, str]:
    """sha256 of the sentences that are used and of the files they and the model come from."""
    found = {f"sentences:{part}": text.sha256() for part, text in zip(Splits._fields, drawn, strict=True)}
    named = {"model": experiment.model, "corpus": experiment.corpus, "probe_corpus": experiment.probe_corpus}
    for role, name in named.items():
        if name is None or name == "toy":
            continue  # made by this package: its version says what it is
        if name in sources.SOURCES:
            found |= {f"{role}:{name}/{file}": digest for file, digest in sources.hashes(name).items()}
        else:
            path = Path(name if role == "model" else name.partition(":")[2]).expanduser()
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
    names = ("epochs", "lr", "batch_size", "weight_decay", "clip", "accumulate", "checkpointing")
    return {name: getattr(settings, name) for name in names}


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
        rank_bucket=asked.rank_bucket, nulls=asked.nulls,
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


def _plans(experiment: Experiment, tagger: Model, probe: Encoded, concept: Concept, site: Site) -> list[str]:
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
