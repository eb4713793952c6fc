"""The experiment: fine-tune once per seed, then prune and retrain every arm, measuring at every stage.

`perform` is a generator of events; whoever runs it (a run folder, a notebook) takes what it wants from them. The base
model of a seed is trained once and shared by the arms, and every arm starts from the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from relearn_lens.find.saliency import SCORES
from relearn_lens.measure.evaluation import evaluate
from relearn_lens.measure.similarity import ActivationSimilarity, activation_similarity
from relearn_lens.measure.tracking import BASE, PRUNED, Snapshot, Trajectory, measure, stage_name
from relearn_lens.measure.vectors import input_embeddings
from relearn_lens.models import processes
from relearn_lens.models.lora import adapter_weights, load_adapter_weights
from relearn_lens.models.model import computing
from relearn_lens.models.training import Checkpoint, finetune_
from relearn_lens.neurons.sites import Neurons, random_neurons
from relearn_lens.relearn.retraining import retrain_
from relearn_lens.remove.ablation import ablated, prune_
from relearn_lens.runs.events import Arm, Base, Damage, Event, Kept, Measured, Paused, Prepared, Progress
from relearn_lens.runs.preparation import adapters, attribution_settings, load, megabytes, prepare
from relearn_lens.runs.protocol import choose, control_of, placed
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import Encoded


def perform(experiment: Experiment, *, kept: Kept | None = None, progress: Progress | None = None) -> Iterator[Event]:
    """Run an experiment, yielding every result as it comes.

    What `kept` gives back is not computed again. Each seed: fine-tune the base, measure it, choose the neurons; then
    each arm from the same weights. Order of events: `Prepared`; per seed `Base`, `Damage`, and per arm `Measured` for
    each stage and `Arm`; `Paused` wherever a training can be taken up again.
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
    # Unlike machines round differently, and processes must not disagree about a neuron at the edge.
    chosen = Neurons(processes.agreed(chosen.mask.byte()).bool(), chosen.site)
    return Base(seed, weights, snapshot, chosen, input_embeddings(tagger))


def _finetune(
    ready: Prepared, name: str, seed: int, train: Encoded, kept: Kept | None, progress: Progress | None
) -> Generator[Event, None, None]:
    """Put freshly loaded weights and a fresh head into the model, or those of the last pause, and fine-tune it."""
    experiment, tagger = ready.experiment, ready.tagger
    resume = _resumed(ready, name, seed, kept)
    if resume is None:
        tagger.load_weights(load(experiment, ready.train.corpus.label_names, seed=seed).weights())
    if experiment.finetune.epochs == 0:
        return
    training = finetune_(tagger, train, experiment.finetune, seed=seed, resume=resume)
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
    found = kept.state(name, base.seed) if kept and PRUNED in measured else None
    # What was kept of adapters is added to the pruned base again; whole weights take its place.
    resume = (found[0], found[2]) if found else None
    if found and not settings.lora_rank:
        tagger.load_weights({key: value.to(tagger.device) for key, value in found[1].items()})
    else:
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
        if resume is None or settings.lora_rank:
            prune_(tagger, pruned, sever=asked.sever)
        what = f"measuring the pruned model ({name})"
        snapshots[PRUNED] = measured.get(PRUNED) or _measure(ready, progress, what, seed=base.seed, base=base)
    yield Measured(name, base.seed, PRUNED, snapshots[PRUNED])
    before = [(stage, s) for stage, s in measured.items() if resume and s.at and s.at.step <= resume[0].step]
    for stage, snapshot in sorted(before, key=lambda entry: entry[1].at.step if entry[1].at else 0):
        snapshots[stage] = snapshot
        yield Measured(name, base.seed, stage, snapshot)
    with adapters(tagger, settings.lora_rank, seed=base.seed + 1):
        if found and settings.lora_rank:
            load_adapter_weights(tagger, found[1])
        training = retrain_(
            tagger, ready.train, settings, seed=base.seed + 1, resume=resume, what=f"retraining ({name})"
        )
        for checkpoint in training:
            stage = stage_name(checkpoint)
            last = checkpoint.epoch >= settings.epochs
            what = f"measuring ({name}, epoch {stage})"
            snapshots[stage] = _measure(ready, progress, what, seed=base.seed, base=base, last=last, at=checkpoint)
            yield Measured(name, base.seed, stage, snapshots[stage])
            weights = adapter_weights(tagger) if settings.lora_rank else tagger.weights()
            yield Paused(name, base.seed, checkpoint, weights, training.state())
    compare = ~placed(chosen, asked.embedding) if pruned is None else None
    similarity = _similarity(ready, base, progress, f"comparing activations with the base model ({name})")
    return Trajectory(snapshots, pruned, name, base.seed, ready.concept, compare, similarity)


def _similarity(ready: Prepared, base: Base, progress: Progress | None, what: str) -> dict[str, ActivationSimilarity]:
    """Activations of the base model against those of the model as it is now."""
    measuring = ready.experiment.measure
    if "similarity" not in measuring.what:
        return {}
    return activation_similarity(
        base.weights, ready.tagger, ready.probe, concept=ready.concept, site=ready.site,
        max_memory=megabytes(measuring.max_memory), max_tokens=measuring.max_tokens,
        tick=_tokens(progress, what, 2 * ready.probe.n_tokens),
    )  # fmt: skip


def _draw_seed(seed: int, draw: int) -> int:
    """Seed of a random set of neurons: 0 is the random arm, the others are the draws beside it."""
    return 1000 * (seed + 1) + draw


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
    wanted = [name for name in asked.what if name != "similarity" and (ends or asked.everywhere or name in SCORES)]
    tick = _tokens(
        progress, what, ready.probe.n_tokens * (2 if "top_words" in wanted else 1) + ready.validation.n_tokens
    )
    return measure(
        ready.tagger, ready.probe, ready.concept, validation=ready.validation, site=ready.site, score=settings.score,
        contrast=settings.contrast, what=wanted, base=base.snapshot if base else None,
        vectors=base.vectors if base else None, shuffles=asked.shuffles if ends else 0, seed=seed,
        rank_bucket=asked.rank_bucket, nulls=asked.nulls,
        attribution=attribution_settings(settings), sample_words=asked.sample_words,
        max_memory=megabytes(asked.max_memory), at=at, max_tokens=asked.max_tokens, tick=tick,
    )  # fmt: skip


def _tokens(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """Progress in tokens."""
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done = min(total, done + tokens)
        if progress:
            progress(what, done, total)

    return tick
