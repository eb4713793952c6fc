"""Which neurons a run cuts: how many, the concept's and another label's, and what is drawn beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from relearn_lens import progress
from relearn_lens.analysis import intervals
from relearn_lens.find.saliency import Saliency, saliency
from relearn_lens.measure.evaluation import Scores, evaluate
from relearn_lens.measure.prefixes import States, recorded, resumed, unchanged_before
from relearn_lens.measure.tracking import Snapshot
from relearn_lens.models import processes
from relearn_lens.neurons.sites import Neurons, random_neurons
from relearn_lens.remove.ablation import ablated, prune_
from relearn_lens.runs.events import Base, Damage, Dose, Prepared, Sized
from relearn_lens.runs.preparation import FEWEST_SPANS
from relearn_lens.runs.protocol import choose, control_of, placed
from relearn_lens.text.concept import Concept

KINDS = ("layers", "disjoint", "scale")
"""Kinds of random sets: as many in every layer, from all neurons; none of the cut; alike in how much they vary."""


def saliency_of(ready: Prepared, snapshot: Snapshot, concept: Concept) -> Saliency:
    """The ranking of a snapshot's neurons for a concept: its own, or another label's from the same statistics."""
    if concept == ready.concept:
        return snapshot.saliency
    carries = torch.from_numpy(concept.classes(ready.probe.corpus).carries)
    how = ready.experiment
    return saliency(snapshot.stats, concept, carries, score=how.score, contrast=how.contrast)


def sets_of(ready: Prepared, snapshot: Snapshot, fraction: float) -> dict[str, Neurons]:
    """The neurons of the concept and, where there is an arm for it, as many of the other label, by name.

    Those that both want go to neither, unless that would leave none.
    """
    which = ready.experiment.prune.which
    sets = {"concept": choose(snapshot.saliency, fraction, which)}
    if ready.other is not None and "other" in ready.experiment.arms:
        other = choose(saliency_of(ready, snapshot, ready.other), fraction, which)
        shared = sets["concept"] & other
        if len(shared) == len(other):
            shared = shared - shared
        sets = {"concept": sets["concept"] - shared, "other": other - shared}
    # Unlike machines round differently, and processes must not disagree about a neuron at the edge.
    return {name: Neurons(processes.agreed(chosen.mask.byte()).bool(), chosen.site) for name, chosen in sets.items()}


def cuts_of(ready: Prepared, base: Base, fraction: float) -> dict[str, Neurons]:
    """All sets of neurons that the arms of a seed cut."""
    sets = sets_of(ready, base.snapshot, fraction)
    random = control_of(sets["concept"], ready.experiment.prune.control, seed=draw_seed(base.seed, 0))
    return {**sets, "random": random}


def draw_seed(seed: int, draw: int) -> int:
    """Seed of a random set of neurons: 0 is the random arm, the others are the draws beside it."""
    return 1000 * (seed + 1) + draw


def size(ready: Prepared, base: Base, *, whole: bool) -> Sized:
    """How large the cut is: as set, or the smallest dose that takes the concept and leaves the others; where there is
    none, of those that leave the others the dose that takes most, if that is half of the concept or more.

    Every dose ablates the concept's neurons, and with `whole` the other label's and a random set too, on sentences that
    neither train, nor find neurons, nor are scored; without `whole`, doses end at the first that will do.

    Raises:
        ValueError: no dose will do, with what each did.
    """
    how = ready.experiment.prune
    if how.fraction != "auto":
        return Sized(base.seed, how.fraction, None)
    ready.model.load_weights(base.weights)
    doses: list[Dose] = []
    chosen: float | None = None
    with progress.task("dose and response", len(how.grid) * (1 + 2 * whole) + 1):
        before, states = _read(ready, on=ready.validation)
        if not _interval(ready, before)[0] > 0:
            raise ValueError(_nothing_to_take(ready, base, before))
        for fraction in sorted(how.grid):
            sets = sets_of(ready, base.snapshot, fraction)
            if whole:
                sets["random"] = random_neurons(
                    like=sets["concept"], seed=draw_seed(base.seed, 0), apart=sets["concept"]
                )
            for name, neurons in sets.items():
                if name == "concept" or whole:
                    with _without(ready, base, neurons, states):
                        doses.append(Dose(fraction, name, _scores(ready, on=ready.validation)))
                    progress.advance()
                    if name == "concept" and chosen is None and takes(ready, before, doses[-1].scores):
                        chosen = fraction
            if chosen is not None and not whole:
                break
    if chosen is None:
        label = ready.experiment.labels
        sparing = [dose for dose in doses if dose.cut == "concept" and leaves(ready, before, dose.scores)]
        most = min(sparing, key=lambda dose: dose.scores.value(label), default=None)
        if most is None or not most.scores.value(label) < before.value(label) / 2:
            raise ValueError(_no_dose(ready, base, before, doses))
        chosen = most.fraction
    return Sized(base.seed, chosen, before, tuple(doses))


def takes(ready: Prepared, before: Scores, after: Scores) -> bool:
    """Whether a cut takes the concept and leaves the other labels, as the settings ask."""
    how, label = ready.experiment.prune, ready.experiment.labels
    return after.value(label) < how.gone * before.value(label) and leaves(ready, before, after)


def leaves(ready: Prepared, before: Scores, after: Scores) -> bool:
    """Whether a cut leaves the other labels, as the settings ask."""
    others, spared = bystanders(before, ready.experiment.labels), ready.experiment.prune.spared
    return not others or kept_share(before, after, others, **interval_of(ready)).low >= spared


def bystanders(scores: Scores, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that a cut of others should leave alone and that can be judged: with `FEWEST_SPANS` spans or more."""
    support = scores.support()
    return tuple(name for name in scores.labels if name not in labels and support[name] >= FEWEST_SPANS)


def kept_share(before: Scores, after: Scores, labels: tuple[str, ...], **interval: Any) -> intervals.Estimate:
    """Share of the labels' score, together, that a cut leaves, with its interval over sentences."""

    def share(then: Any, now: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(now, then)

    return intervals.over_sentences(share, labels, before, after, **interval)


def interval_of(ready: Prepared) -> dict[str, Any]:
    """Coverage and bootstrap draws of intervals."""
    return {"level": ready.experiment.measure.level, "draws": ready.experiment.measure.draws}


def _nothing_to_take(ready: Prepared, base: Base, before: Scores) -> str:
    label, (low, high) = ready.experiment.labels, _interval(ready, before)
    return (
        f"prune.fraction = 'auto': the base model of seed {base.seed} does not know {'+'.join(label)!r}, so there is "
        f"nothing to take from it: its F1 on the {ready.validation.corpus.n_sentences:,} validation sentences is "
        f"{before.shown(label):.2f} [{low:.2f}, {high:.2f}]; train it longer or faster (finetune.epochs, finetune.lr, "
        "data.train_sentences), or give a size: --set prune.fraction=0.05"
    )


def _interval(ready: Prepared, scores: Scores) -> tuple[float, float]:
    return scores.interval(
        ready.experiment.labels, level=ready.experiment.measure.level, n=ready.experiment.measure.draws
    )


def _no_dose(ready: Prepared, base: Base, before: Scores, doses: list[Dose]) -> str:
    how, label = ready.experiment.prune, ready.experiment.labels
    others = bystanders(before, label)
    rows = "; ".join(
        f"{dose.fraction:g}: {dose.scores.shown(label):.2f}"
        + (f", others {dose.scores.shown(others):.2f}" if others else "")
        for dose in doses
        if dose.cut == "concept"
    )
    beside = f", others {before.shown(others):.2f}" if others else ""
    return (
        f"prune.fraction = 'auto': no cut of seed {base.seed} takes {'+'.join(label)!r} (below {how.gone:g} of its "
        f"{before.shown(label):.2f}{beside}) and leaves the other labels ({how.spared:g} of theirs, at the lower end "
        f"of the interval). F1 by fraction cut: {rows}. Choose a size by --set prune.fraction=0.1, say, and see in the "
        "run what else it takes; or another score or site"
    )


def damage(ready: Prepared, base: Base, sets: Mapping[str, Neurons]) -> Damage:
    """What the cuts of a seed, and random sets beside the concept's, do to the base model; no training."""
    draws, concept = ready.experiment.prune.control_draws, sets["concept"]
    ready.model.load_weights(base.weights)
    scale = base.snapshot.stats.total.variance[0].sqrt().float()
    _, states = _read(ready, on=ready.scored)
    drawn = {
        kind: [
            random_neurons(
                like=concept, seed=draw_seed(base.seed, 1 + k), apart=None if kind == "layers" else concept,
                scale=scale if kind == "scale" else None,
            )
            for k in range(draws)
        ]
        for kind in KINDS
    }  # fmt: skip

    def cut(neurons: Neurons) -> Scores:
        with _without(ready, base, placed(neurons, ready.experiment.prune.embedding), states):
            result = _scores(ready, on=ready.scored)
        progress.advance()
        return result

    natural = None if ready.natural is None else _scores(ready, on=ready.natural)
    with progress.task("cutting without training", 1 + ("other" in sets) + draws * len(KINDS)):
        return Damage(
            base.seed, cut(concept), cut(sets["other"]) if "other" in sets else None,
            {kind: tuple(map(cut, each)) for kind, each in drawn.items()},
            {kind: tuple(len(one & concept) / len(concept) for one in each) for kind, each in drawn.items()},
            natural,
        )  # fmt: skip


def _scores(ready: Prepared, *, on: object) -> Scores:
    return evaluate(ready.model, on, concept=ready.concept, max_tokens=ready.experiment.measure.max_tokens)  # pyright: ignore[reportArgumentType]


def _read(ready: Prepared, *, on: object) -> tuple[Scores, States]:
    """Scores of the model as it is, and what its blocks give, for the same model with something cut further up."""
    with recorded(ready.model, max_bytes=ready.experiment.measure.max_bytes) as states:
        return _scores(ready, on=on), states


@contextlib.contextmanager
def _without(ready: Prepared, base: Base, neurons: Neurons, states: States) -> Iterator[None]:
    """For a while, the base model, which gave these states, as pruning leaves it."""
    sever = ready.experiment.prune.sever
    if sever in ("auto", "out", "both"):  # the same by hooks, and for any site; auto is left where no arm prunes
        with ablated(ready.model, neurons), resumed(ready.model, states, unchanged_before(ready.model, neurons)):
            yield
    else:
        prune_(ready.model, neurons, sever=sever)
        try:
            yield
        finally:
            ready.model.load_weights(base.weights)
