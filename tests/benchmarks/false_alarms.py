"""How often a verdict finds something where there is nothing: `python -m tests.benchmarks.false_alarms [N]`.

Each replication trains the toy anew, three arms of three seeds, and tells its claims. By construction nothing is there:

1. *random*: the concept arm's neurons are drawn as the random arm's are, so the two arms differ by chance alone.
2. *shuffled*: the concept is a shuffle of the labels, and so are the shuffles that it is compared with.
3. *unpruned*: claims that have no control arm are asked of an arm from which nothing was pruned.

C9 is a fall within the arm, and no arm is known to have none: its rates are simulated, as is power, in
`tests.benchmarks.power`.

The base models are trained once; pruned sets, shuffles and the order of retraining are fresh. They start from the same
weights, as the seeds of a pretrained model do, which makes seeds more alike than independent draws would be.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from scipy import stats as st

from relearn_lens.analysis import migration, story
from relearn_lens.analysis.claims import claims
from relearn_lens.find.saliency import gather, saliency
from relearn_lens.measure.evaluation import SpanScores, evaluate
from relearn_lens.measure.tracking import BASE, PRUNED, Snapshot, Trajectory, measure
from relearn_lens.measure.vectors import input_embeddings
from relearn_lens.models import toy
from relearn_lens.models.model import Tagger
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, random_neurons
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import ablated, prune_
from relearn_lens.runs.events import Base
from relearn_lens.text.concept import Concept, label_shuffles
from relearn_lens.text.encoding import Encoded, encode

SEEDS, SHUFFLES, SETS = 3, 19, 3
LEVEL = 0.05
UNCONTROLLED = ("C1", "C2", "C5 unmatched")
LABEL = ("place",)
CONCEPT = Concept("place", LABEL)
SITE = "mlp_post"
FRACTION, WEAK = 0.5, 0.5
"""Share that is pruned, and what the planted neurons write as a share of the toy's: random sets then do damage that
differs from one to the next. The toy's own planted neurons would stand in for each other."""


RATES = (5e-4, 2e-2)
"""Learning rates, in turn: with the first F1 differs from arm to arm, with the second neurons change hands."""


@dataclass(frozen=True)
class World:
    """What all replications share: the text and the fine-tuned base models."""

    tagger: Tagger
    train: Encoded
    validation: Encoded
    probe: Encoded
    bases: tuple[Base, ...]


@cache
def world(sentences: int = 80) -> World:
    """The toy's text, and one base model per seed."""
    text = toy.corpus(sentences=sentences).split(seed=0)
    tagger = toy.tagger()
    train, validation, probe = (encode(part, tagger.tokenizer, context=tagger.context) for part in text)
    with torch.no_grad():
        for layer, index in toy.PLANTED:
            layers: Any = tagger.trunk.layers
            layers[int(layer)].mlp.fc_out.weight[:, index] *= WEAK
    planted = {name: weight.clone() for name, weight in tagger.weights().items()}
    bases = []
    for seed in range(SEEDS):
        tagger.load_weights(planted)
        for _ in finetune_(tagger, train, epochs=1, lr=1e-4, batch_size=8, seed=seed):
            pass
        snapshot = measure(tagger, probe, CONCEPT, validation=validation, site=SITE, what=["top_words"])
        weights = {name: weight.clone() for name, weight in tagger.weights().items()}
        bases.append(Base(seed, weights, snapshot, input_embeddings(tagger)))
    return World(tagger, train, validation, probe, tuple(bases))


def arm_of(here: World, base: Base, name: str, pruned: Neurons | None, draw: int, rate: float) -> Trajectory:
    """Prune and retrain for a few steps, measured as a run does: everything at the end, little in between."""
    tagger = here.tagger
    tagger.load_weights(base.weights)
    snapshots = {BASE: base.snapshot, PRUNED: base.snapshot}

    def take(what: list[str]) -> Snapshot:
        return measure(
            tagger, here.probe, CONCEPT, validation=here.validation, site=SITE, what=what, base=base.snapshot,
            vectors=base.vectors,
        )  # fmt: skip

    if pruned is not None:
        prune_(tagger, pruned)
        snapshots[PRUNED] = take([])
    for checkpoint in retrain_(tagger, here.train, epochs=2.0, every=1.0, lr=rate, batch_size=16, seed=draw):
        last = checkpoint.epoch >= 2
        snapshots[checkpoint.stage] = replace(take(["top_words"] if last and pruned is not None else []), at=checkpoint)
    return Trajectory(snapshots, pruned, name, base.seed, CONCEPT)


def damage_of(here: World, base: Base, sets: list[Neurons]) -> list[SpanScores]:
    """F1 of the base model without each of the sets; nothing is trained."""
    here.tagger.load_weights(base.weights)
    found = []
    for neurons in sets:
        with ablated(here.tagger, neurons):
            found.append(evaluate(here.tagger, here.validation))
    return found


def shuffled_base(here: World, base: Base, draw: int, own: int) -> Trajectory:
    """The base arm for a concept that is a shuffle (`draw`) of the labels, with shuffles of its own as a null."""
    here.tagger.load_weights(base.weights)
    classes = CONCEPT.classes(here.probe.corpus)
    types = here.probe.corpus.word
    relabelled = label_shuffles(classes, types, 1, seed=draw) + label_shuffles(classes, types, SHUFFLES, seed=own)
    gathered = gather(here.tagger, here.probe, classes, site=SITE, relabelled=relabelled)
    scored = [saliency(s, CONCEPT, torch.from_numpy(classes.carries)) for s in gathered.shuffled]
    snapshot = replace(base.snapshot, saliency=scored[0], shuffled=tuple(scored[1:]))
    stages = {stage: snapshot for stage in (BASE, PRUNED, "1")}
    return Trajectory(stages, scored[0].top(fraction=FRACTION), "concept", base.seed, CONCEPT)


Told = Iterator[tuple[str, bool | None]]
"""What was said, and whether it claimed that something is there; None where it was not measured."""


def of_claims(arms: dict[str, list[Trajectory]], ids: str, after: str = "", **given: Any) -> Told:
    """Whether each of some claims has a verdict for or against it."""
    for row in claims(arms, LABEL, **given):
        if row.id not in ids.split(", "):
            continue
        yield row.id + after, None if row.effect is None else row.verdict in ("supported", "reversed")
        if row.id not in UNCONTROLLED:  # the bar hides what an interval that is too narrow would claim
            yield f"{row.id}{after}, bar 0", None if row.effect is None else row.effect.excludes(0)


def random(here: World, fresh: int, rate: float) -> Told:
    """Two arms that differ by chance alone: with a set of neurons for each seed, and with one set for all seeds.

    One set is the harder case, and more like a concept's: seeds of one pretrained model choose much the same neurons.
    """
    arms: dict[str, list[Trajectory]] = {"concept": [], "one set": [], "random": []}
    sets = []
    for base in here.bases:
        draw = fresh + 1_000 * base.seed
        chosen = base.snapshot.saliency.top(fraction=FRACTION)
        mine, other, *more = (random_neurons(like=chosen, seed=draw + i) for i in range(2 + SETS))
        same = random_neurons(like=chosen, seed=fresh + 999)
        for name, pruned in (("concept", mine), ("one set", same), ("random", other)):
            arms[name].append(arm_of(here, base, name, pruned, draw, rate))
        sets.append(damage_of(here, base, more))
    for concept, after in (("concept", ""), ("one set", ", one set")):
        yield from told({"concept": arms[concept], "random": arms["random"]}, sets, after)


def told(arms: dict[str, list[Trajectory]], sets: list[list[SpanScores]], after: str) -> Told:
    """All that is said of two arms."""
    yield from of_claims(arms, "C3a, C3b, C5 matched, C6, C7, C8", after, random_sets=sets)
    moved = migration.migration(arms)
    gap = moved.moved.gap
    yield f"migration: beyond noise{after}", gap is not None and gap.excludes(0)
    yield f"migration: layers{after}", "of the saliency)" in str(moved)
    yield from of_story(arms, after)
    if not after:
        one = {name: side[:1] for name, side in arms.items()}
        yield from of_claims(one, "C3a", ", one seed", random_sets=sets[:1])
        yield from of_story(one, ", one seed")


def of_story(arms: dict[str, list[Trajectory]], after: str) -> Told:
    """Whether the two sentences on a run tell a difference."""
    how_much, where = story.what_happened(arms, LABEL).rsplit(". ", 1)
    yield f"story: F1 differs{after}", "below it" in how_much or "above it" in how_much
    yield f"story: it moved{after}", "is beyond noise" in where


def shuffled(here: World, fresh: int, rate: float) -> Told:
    """A concept that is a shuffle of the labels; as in a run, all seeds have the same labels."""
    arms = [shuffled_base(here, base, fresh, fresh + 1 + base.seed) for base in here.bases]
    yield from of_claims({"concept": arms}, "C4")
    yield from of_claims({"concept": arms[:1]}, "C4", ", one seed")


def unpruned(here: World, fresh: int, _: float) -> Told:
    """Nothing was pruned, so nothing collapsed, returned, or moved for being pruned.

    At the lower rate alone: at the higher one training by itself moves the saliency by 0.03 of the depth in every seed,
    which is true, and which a comparison without a control cannot tell from a move for being pruned.
    """
    arms = [arm_of(here, base, "concept", None, fresh + 1_000 * base.seed, RATES[0]) for base in here.bases]
    yield from of_claims({"concept": arms}, ", ".join(UNCONTROLLED))


NULLS = {"random": random, "shuffled": shuffled, "unpruned": unpruned}


@dataclass(frozen=True)
class Row:
    """How often one statement was made though nothing was there."""

    says: str
    null: str
    n: int
    """Replications in which it was measured."""
    claimed: int

    @property
    def bound(self) -> float:
        """The stated level and its binomial error for so many replications."""
        return LEVEL + 1.96 * math.sqrt(LEVEL * (1 - LEVEL) / self.n)

    @property
    def too_many(self) -> bool:
        """Whether the rate is above the level by more than its binomial error."""
        return self.claimed / self.n > self.bound

    def most(self, tail: float = 0.001) -> int:
        """Most claims that a level that holds would give, but for so small a share of cases."""
        return int(st.binom.isf(tail, self.n, LEVEL))

    def __str__(self) -> str:
        if not self.n:
            return f"{self.says:32s} {self.null:9s} {0:4d}  not measured, so not claimed"
        verdict = "too many" if self.too_many else "ok"
        return (
            f"{self.says:32s} {self.null:9s} {self.n:4d} {self.claimed:8d} {self.claimed / self.n:6.2f} {LEVEL:6.2f} "
            f"{self.bound:6.3f}  {verdict}"
        )


def rates(n: int, nulls: Collection[str] = tuple(NULLS)) -> list[Row]:
    """Every statement's count over so many replications."""
    here = world()
    found: dict[tuple[str, str], list[bool]] = {}
    for k in range(n):
        for null in nulls:
            for says, claimed in NULLS[null](here, 10_000 * (k + 1), RATES[k % len(RATES)]):
                found.setdefault((says, null), []).extend([] if claimed is None else [claimed])
    return [Row(says, null, len(each), sum(each)) for (says, null), each in found.items()]


def false_alarms(n: int = 100, *nulls: str) -> None:
    """Print how often every statement is made where nothing is to be found, beside its level."""
    print(f"{'statement':32s} {'null':9s} {'n':>4s} {'claimed':>8s} {'rate':>6s} {'level':>6s} {'bound':>6s}")
    for row in rates(n, nulls or tuple(NULLS)):
        print(row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    false_alarms(int(sys.argv[1]) if len(sys.argv) > 1 else 100, *sys.argv[2:])
