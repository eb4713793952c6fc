"""The experiment: what is gone when a concept's neurons are cut, whether and how fast it is back, and where.

Per seed: (1) fine-tune and measure; (2) find the concept's neurons and those of another label, and the size of the cut;
(3) cut without training, beside random sets; (4) each arm: cut, train on, measure as it goes (a control
of the cut alone is not trained on); (5) move parts of the
model between the cut and the retrained weights; (6) cut again what carries the concept now, and, where asked for, train
with a part held.

`perform` is a generator of events; whoever runs it (a run folder, a notebook) takes what it wants from them. The base
model of a seed is trained once and shared by the arms, and every arm starts from the same weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import or_
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from relearn_lens import progress
from relearn_lens.find.localisers import locate
from relearn_lens.find.saliency import SCORES
from relearn_lens.measure.evaluation import Scores, evaluate
from relearn_lens.measure.examples import Examples, examples
from relearn_lens.measure.grafting import CUT, Grafts, grafts, share_old
from relearn_lens.measure.guesses import guesses, to_read
from relearn_lens.measure.prefixes import recorded, resumed, unchanged_before
from relearn_lens.measure.similarity import ActivationSimilarity, activation_similarity
from relearn_lens.measure.tracking import BASE, FORMS, PRUNED, Snapshot, Trajectory, measure
from relearn_lens.measure.vectors import input_embeddings
from relearn_lens.models import processes
from relearn_lens.models.lora import adapter_weights, load_adapter_weights
from relearn_lens.models.model import LanguageModel, computing
from relearn_lens.models.training import Checkpoint, cross_entropy, train_
from relearn_lens.models.withheld import as_outside, withheld
from relearn_lens.neurons.sites import Neurons, random_neurons
from relearn_lens.neurons.weights import Parts, WeightMask, apart, parts, severed
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import prune_
from relearn_lens.remove.pruning import Prune
from relearn_lens.remove.recipes import recipe
from relearn_lens.remove.removal import FORGET, RETAIN
from relearn_lens.runs.arms import COMPARED, Arm, arms_of
from relearn_lens.runs.cuts import cuts_of, damage, draw_seed, size
from relearn_lens.runs.events import (
    BACK,
    Again,
    ArmDone,
    Base,
    Blocked,
    Cuts,
    Damage,
    Event,
    Grafted,
    GraftedAt,
    Measured,
    Own,
    Paused,
    Prepared,
    Round,
    SeedDone,
    Sized,
    Weighed,
)
from relearn_lens.runs.preparation import adapters, load, precision_of, prepare
from relearn_lens.runs.protocol import placed
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.stages import StageRecipe
from relearn_lens.runs.units import (
    AGAIN,
    BLOCKED,
    CUTS,
    DAMAGE,
    END,
    FIRST,
    GRAFTED,
    OWN,
    TWIN,
    Unit,
    units_of,
)
from relearn_lens.runs.units import BASE as BASE_UNIT
from relearn_lens.text.facts import from_concept

if TYPE_CHECKING:
    from relearn_lens.runs.folder import RunFolder

EXAMPLES = 50
"""Neurons whose activations at a few sentences are kept: half of them cut, half of them carriers at the end."""


def perform(experiment: Experiment, *, kept: RunFolder | None = None) -> Iterator[Event]:
    """Run an experiment, yielding every result as it comes.

    What `kept` gives back is not computed again. Order of events: `Prepared`; per seed `Base`, `Sized`, `Cuts`, per arm
    `Measured` for each stage and `ArmDone`, behind the first arm `Damage`; then `Own`, `GraftedAt` for each stage and
    `Grafted`, `Again` and `Blocked`, and `SeedDone`; `Paused` wherever a training can be taken up again.
    """
    threads = torch.get_num_threads()
    try:
        if experiment.threads:
            torch.set_num_threads(experiment.threads)
        ready = prepare(experiment)
        with computing(ready.model, precision_of(experiment, ready.model.device)):
            yield ready
            with kept.shared_out(ready, units_of_run(ready)) if kept else contextlib.nullcontext() as turns:
                for seed in experiment.seeds:
                    under_way = _Seed(ready, seed, kept)
                    for unit in units_of(experiment, seed, other=ready.other.name if ready.other else None):
                        yield from under_way.unit(unit) if turns is None else turns.take(unit, under_way.unit)
                    yield SeedDone(seed)
    finally:
        torch.set_num_threads(threads)


def units_of_run(ready: Prepared) -> list[Unit]:
    """All units of a run, in the order of their results."""
    other = ready.other.name if ready.other else None
    return [unit for seed in ready.experiment.seeds for unit in units_of(ready.experiment, seed, other=other)]


def alone(ready: Prepared, unit: Unit, kept: RunFolder) -> Iterator[Event]:
    """The events of one unit, all that it needs being kept: as they are in the whole run, to the bit."""
    seed = _Seed(ready, unit.seed, kept)
    needed = {each.name: each for each in units_of_run(ready) if each.seed == unit.seed}
    for name in unit.needs:
        for _ in seed.unit(needed[name]):
            pass
    yield from seed.unit(unit)


def seed_for(role: str, seed: int) -> int:
    """The seed of one training of a seed: no two roles draw the same batches and dropout."""
    roles = ("base", "never", "retrain", "again", "blocked", "remove")
    return int(np.random.SeedSequence([seed, roles.index(role)]).generate_state(1)[0])


@dataclass
class _Seed:
    """One seed of an experiment under way."""

    ready: Prepared
    seed: int
    kept: RunFolder | None
    weighed: dict[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict)
    """Weights that grafts are made from, where there is no folder to look them up in."""
    cuts: Cuts = field(init=False)
    done: dict[str, Trajectory] = field(default_factory=dict)
    back: str | None = None
    """The stage at which the concept is first back."""
    twin: Snapshot | None = None
    """Of the model that never had the concept, where it was measured just now."""
    grafted_at: dict[str, Grafted] = field(default_factory=dict)
    grafted: Grafted | None = None
    base: Base = field(init=False)

    def __post_init__(self) -> None:
        self.cuts = Cuts(self.seed, {})
        other = self.ready.other.name if self.ready.other else None
        self.arms = {arm.name: arm for arm in arms_of(self.experiment, other=other)}

    @property
    def experiment(self) -> Experiment:
        return self.ready.experiment

    @property
    def sever(self) -> Literal["out", "both", "gain", "writes"]:
        """Which weights a cut zeroes."""
        sever = self.experiment.prune.sever
        assert sever != "auto"  # resolved() decided
        return sever

    def unit(self, unit: Unit) -> Iterator[Event]:
        """The results of a unit, computed or as they were kept; those of the units that it needs come first."""
        name, ready = unit.name, self.ready
        if name == BASE_UNIT:
            self.base = yield from self._base()
            yield self.base
        elif unit.part_of and self.kept and self.kept.holds(unit):
            return
        elif name == CUTS:
            sized = self._result(Sized) or size(ready, self.base, whole=self.seed == self.experiment.seeds[0])
            yield sized
            self.cuts = self._result(Cuts) or Cuts(self.seed, cuts_of(ready, self.base, sized.fraction))
            yield self.cuts
        elif name == DAMAGE:
            yield self._result(Damage) or damage(ready, self.base, self.cuts.sets)
        elif name == TWIN:
            yield from self._finetune("never")
            yield from self._weigh("never", BASE)
            self.twin = self._measure("measuring the model that never had the concept")
            yield Measured("never", self.seed, BASE, self.twin)
        elif name in self.arms:
            finished = self.kept.arm(name, self.seed) if self.kept else None
            if finished is None or (name in COMPARED and self._lacks_weights):
                finished = yield from self._arm(self.arms[name])
                yield ArmDone(finished, ready.model.weights())
            else:
                yield ArmDone(finished, None)
            self.done[name] = finished
            if name == "concept":
                self.back = first_back(finished)
        elif unit.part_of:
            yield from self._grafted_at(unit.part_of[1])
        else:
            yield from self._afterwards(name)

    @cached_property
    def _lacks_weights(self) -> bool:
        """Whether grafts, or what follows them, are to be made anew from arms that were finished, and whose weights are
        gone: then these arms are trained again, to the same bits."""
        concept = self.kept.arm("concept", self.seed) if self.kept else None
        how = self.experiment
        if concept is None or how.grafts.skip or how.retrain.lora_rank:
            return False
        wanted = [self._result(Grafted), self._result(Again), *(self._result(Blocked, name) for name in how.block.held)]
        return None in wanted and self._weights_at("concept", concept.stages[-1]) is None

    def _result(self, kind: type, name: str = "") -> Any:
        return self.kept.result(kind, self.seed, name) if self.kept else None

    def _base(self) -> Generator[Event, None, Base]:
        """The fine-tuned model of a seed, from the run folder if it is there."""
        model = self.ready.model
        kept = self.kept.base(self.seed) if self.kept else None
        if kept:
            weights, snapshot = kept
            model.load_weights(weights)
        else:
            yield from self._finetune("base")
            snapshot = self._measure("measuring the base model")
            weights = {name: value.detach().clone() for name, value in model.weights().items()}
        return Base(self.seed, weights, snapshot, input_embeddings(model))

    def _finetune(self, role: str) -> Generator[Event, None, None]:
        """Put freshly loaded weights and a fresh head into the model, or those of the last pause, and fine-tune it."""
        ready, model, how = self.ready, self.ready.model, self.experiment.finetune
        training = "base" if role == "base" else f"{role}-fine"
        resume = self._resumed(training)
        if resume is None:
            labels, knows = ready.train.corpus.label_names, role != "never"
            model.load_weights(load(self.experiment, labels, seed=self.seed, knows=knows).weights())
        if how.epochs == 0:
            return
        shared = self.kept.shared if self.kept and processes.size() == 1 else None
        if shared is None:
            yield from self._trained(role, training, resume)
            return
        recipe = self._recipe(role)
        with shared.locked(recipe):
            stage = shared.read(recipe) if resume is None else None
            if stage is not None:
                model.load_weights(stage.tensors)
                return
            yield from self._trained(role, training, resume)
            shared.keep(recipe, {"role": role, "seed": self.seed}, model.weights())

    def _recipe(self, role: str) -> StageRecipe:
        """What the fine-tuned model depends on, of all that a run's settings say."""
        ready, experiment = self.ready, self.experiment
        fields = experiment.model_dump(mode="json", include={"model", "task", "head", "threads", "finetune"})
        hashes = {name: each for name, each in ready.inputs.items() if name.startswith(("model:", "sentences:train"))}
        if role == "never":
            fields |= {"never": experiment.never, "concept": [*experiment.labels], "words": [*experiment.words]}
        return StageRecipe(
            role,
            {
                **fields, "seed": self.seed, "device": ready.model.device.type,
                "precision": str(precision_of(experiment, ready.model.device)), "long": experiment.data.long,
                "labels": [*ready.train.corpus.label_names], "inputs": hashes,
            },
        )  # fmt: skip

    def _trained(
        self, role: str, training: str, resume: tuple[Checkpoint, Mapping[str, Tensor]] | None
    ) -> Generator[Event, None, None]:
        """Fine-tune the model as it is, from its last pause if there is one."""
        ready, model, how = self.ready, self.ready.model, self.experiment.finetune
        text, objective, what = ready.train, cross_entropy, "fine-tuning"
        if role == "never":
            what = "fine-tuning the twin that never had it"
            if self.experiment.never == "absent":
                objective = withheld(text, ready.concept)
            else:
                text = as_outside(text, ready.concept)
        checkpoints = train_(
            model, text, how, objective=objective, seed=seed_for(role, self.seed), resume=resume, what=what
        )
        for checkpoint in checkpoints:
            yield Paused(training, self.seed, checkpoint, model.weights(), checkpoints.state())

    def _resumed(self, training: str) -> tuple[Checkpoint, Mapping[str, Tensor]] | None:
        """Put the weights of a training's last pause into the model, if an earlier process left one."""
        kept = self.kept.state(training, self.seed) if self.kept else None
        if kept is None:
            return None
        at, weights, state = kept
        self.ready.model.load_weights(weights)
        return at, state

    def _arm(self, arm: Arm) -> Generator[Event, None, Trajectory]:
        """Prune and retrain one arm, from its last pause if there is one; returns its trajectory."""
        ready, model, how = self.ready, self.ready.model, self.experiment.retrain
        base, cuts = self.base, self.cuts
        name, prune = arm.name, self.experiment.prune
        measured = self.kept.stages(name, self.seed) if self.kept else {}
        kept = self.kept.state(name, self.seed) if self.kept and PRUNED in measured else None
        # What was kept of adapters is added to the pruned base again; whole weights take its place.
        resume = (kept[0], kept[2]) if kept else None
        if kept and not how.lora_rank:
            model.load_weights(kept[1])
        else:
            model.load_weights(base.weights)
        first = base.snapshot
        if not arm.knows:
            if resume is None:
                twin = self._weights_at(name, BASE)
                assert twin is not None  # the unit before this one left them
                model.load_weights(twin)
            first = self.twin or measured[BASE]
        removed = None if arm.own or arm.where is None else placed(cuts.sets[arm.where], prune.embedding)
        if first is not self.twin:  # which its own unit gave
            yield Measured(name, self.seed, BASE, first)
        snapshots = {BASE: first}
        if arm.own:
            if resume:
                model.load_weights(base.weights)  # where it was found
            where = self._where(arm, cuts)
            removed = where if isinstance(where, Neurons) else None
            if kept:
                model.load_weights(kept[1])
            else:
                self._remove(arm, where)
                if not self.experiment.grafts.skip:
                    yield from self._weigh(name, PRUNED)
            what = f"measuring what was removed from ({name})"
            snapshots[PRUNED] = measured.get(PRUNED) or self._measure(what, base=base)
        elif removed is None:  # nothing was taken away, so there is nothing new to measure
            snapshots[PRUNED] = first
        else:
            if resume is None or how.lora_rank:
                prune_(model, removed, sever=self.sever)
            snapshots[PRUNED] = measured.get(PRUNED) or self._measure(f"measuring the cut model ({name})", base=base)
        yield Measured(name, self.seed, PRUNED, snapshots[PRUNED])
        if arm.retrain:
            yield from self._retrained(arm, snapshots, kept)
        compare = ~placed(cuts.sets["concept"], prune.embedding) if removed is None and cuts.sets else None
        similarity = self._similarity(base, f"comparing activations with the base model ({name})", arm)
        path = Trajectory(snapshots, removed, name, self.seed, ready.concept, compare, similarity, arm.remove or "")
        return replace(path, examples=self._examples(path)) if name == "concept" and self._is_dear(arm) else path

    def _retrained(
        self, arm: Arm, snapshots: dict[str, Snapshot], kept: tuple[Checkpoint, Any, Any] | None
    ) -> Iterator[Event]:
        """Train the model on as it is, from what was kept of its last pause, and measure every stage."""
        model, how, name, seed = self.ready.model, self.experiment.retrain, arm.name, seed_for("retrain", self.seed)
        resume = (kept[0], kept[2]) if kept else None
        measured = self.kept.stages(name, self.seed) if self.kept and kept else {}
        for stage, snapshot in sorted(measured.items(), key=lambda entry: entry[1].at.step if entry[1].at else 0):
            if resume and snapshot.at and snapshot.at.step <= resume[0].step:
                snapshots[stage] = snapshot
                yield Measured(name, self.seed, stage, snapshot)
        with adapters(model, how.lora_rank, seed=seed):
            if kept and how.lora_rank:
                load_adapter_weights(model, kept[1])
            training = retrain_(model, self.ready.train, how, seed=seed, resume=resume, what=f"retraining ({name})")
            for checkpoint in training:
                stage = checkpoint.stage
                last = checkpoint.step == training.last_step
                snapshots[stage] = self._measure(
                    f"measuring ({name}, {checkpoint.by} {stage})", base=self.base, last=last, at=checkpoint, arm=arm
                )
                yield Measured(name, self.seed, stage, snapshots[stage])
                if not how.lora_rank and self._is_grafted(arm, snapshots, stage, last):
                    yield from self._weigh(name, stage)
                weights = adapter_weights(model) if how.lora_rank else model.weights()
                yield Paused(name, self.seed, checkpoint, weights, training.state())

    def _is_grafted(self, arm: Arm, snapshots: Mapping[str, Snapshot], stage: str, last: bool) -> bool:
        """Whether grafts are made from an arm's weights at a stage: where the concept is first back, and at the end."""
        wanted = "concept" in self.experiment.arms and not self.experiment.grafts.skip
        if wanted and arm.own:
            return last
        if not wanted or arm.name not in COMPARED:
            return False
        if arm.name != "concept":
            if "concept" in self.done:
                return last or stage == self.back
            # Its arm is another process's, now or later: until the concept is back there, any stage may be the one.
            back = self.kept.stages_weighed("concept", self.seed) if self.kept else []
            return last or not back or stage in back
        return last or first_back(Trajectory(dict(snapshots), None, concept=self.ready.concept)) == stage

    def _where(self, arm: Arm, cuts: Cuts) -> Neurons | WeightMask | None:
        """Where an arm of one's own removes: found in the model as it is."""
        model, old, pruning = self.ready.model, cuts.sets["concept"], arm.remove == Prune.name
        if arm.where is None:
            return placed(old, self.experiment.prune.embedding) if pruning else None
        corpus, concept, seed = self.ready.train.corpus, self.ready.concept, seed_for("remove", self.seed)
        if isinstance(model, LanguageModel):
            choice = locate(model, from_concept(corpus, concept), arm.where, seed=seed)
        else:
            choice = locate(model, corpus, arm.where, concept=concept, seed=seed)
        if isinstance(choice, WeightMask):
            return choice
        neurons = choice.top(min(len(old), choice.score.numel()))
        return neurons if pruning else WeightMask.of(model, neurons)

    def _remove(self, arm: Arm, where: Neurons | WeightMask | None) -> None:
        """Take the concept out of the model as an arm of one's own says."""
        model, corpus, concept = self.ready.model, self.ready.train.corpus, self.ready.concept
        if isinstance(model, LanguageModel):
            texts = from_concept(corpus, concept)
        else:
            classes = concept.classes(corpus)
            sentence_of = np.repeat(np.arange(corpus.n_sentences), np.diff(corpus.start))
            holds = np.unique(sentence_of[classes.carries[classes.of_word]])
            others = np.setdiff1d(np.arange(corpus.n_sentences), holds)
            texts = {FORGET: corpus.take(holds), RETAIN: corpus.take(others)}
        assert arm.remove is not None
        given = {"sever": self.experiment.prune.sever} if arm.remove == Prune.name else {}
        removal = recipe(None, arm.remove, {**given, **arm.set})
        with progress.task(f"removing ({arm.name})"):
            for _ in removal(model, texts, where, seed=seed_for("remove", self.seed)):
                pass

    def _own(self, path: Trajectory) -> Own | None:
        """Which parts brought the concept back in an arm of one's own."""
        start, end = (self._weights_at(path.arm, stage) for stage in (PRUNED, path.stages[-1]))
        if start is None or end is None:
            return None
        model, how = self.ready.model, self.experiment.grafts
        with progress.task(f"grafting ({path.arm})"):
            made = grafts(
                model, start, end, self._outcomes, parts=parts(model, bands=how.bands), cumulative=how.cumulative,
                label=path.label,
            )  # fmt: skip
        return Own(self.seed, path.arm, made)

    def _weigh(self, arm: str, stage: str) -> Iterator[Event]:
        weights = self.ready.model.weights()
        # Of several processes one alone writes, and what it writes now the others do not see.
        if self.kept is None or processes.size() > 1:
            self.weighed[arm, stage] = {name: value.detach().clone() for name, value in weights.items()}
        yield Weighed(arm, self.seed, stage, weights)

    def _weights_at(self, arm: str, stage: str) -> Mapping[str, Tensor] | None:
        here = self.weighed.get((arm, stage))
        return self.kept.weighed(arm, self.seed, stage) if here is None and self.kept is not None else here

    def _afterwards(self, name: str) -> Iterator[Event]:
        """Where it came back, by intervention: nothing where the weights for it are gone."""
        if name.startswith(OWN):
            arm = name.removeprefix(OWN)
            if (own := self._result(Own, arm) or self._own(self.done[arm])) is not None:
                yield own
            return
        path = self.done["concept"]
        if name == GRAFTED:
            self.grafted = self._result(Grafted) or self._grafted()
            if self.grafted is not None:
                yield self.grafted
            return
        held = name.removeprefix(BLOCKED)
        result: Any = self._result(Again) if name == AGAIN else self._result(Blocked, held)
        end = None if result is not None else self._weights_at("concept", path.stages[-1])
        if result is None and end is not None:
            if name == AGAIN:
                result = self._again(end, path)
            elif self.grafted is not None:
                result = self._blocked(held, end, path, self.grafted)
        if result is not None:
            yield result

    def _grafted(self) -> Grafted | None:
        """What was made at both stages; None where the weights for it are gone."""
        kept = {at: self.kept.grafted_at(self.seed, at) for at in (FIRST, END)} if self.kept else {}
        first, end = (self.grafted_at.get(at) or kept.get(at) for at in (FIRST, END))
        if first is None or end is None:
            return None
        return Grafted(self.seed, {**first.stages, **end.stages}, {**first.within, **end.within})

    def _grafted_at(self, at: str) -> Iterator[Event]:
        """Grafts of the concept's arm where it is first back or at its end, and within the part that does most."""
        end, whole, within = self.done["concept"].stages[-1], {}, {}
        stage = end if at == END else self.back
        if at == END or stage not in (None, end):
            assert stage is not None
            made = self._graft(stage)
            if made is None:
                return
            whole[stage] = made
            finer = self._finer(made)
            if finer and (inner := self._graft(stage, finer)) is not None:
                within[stage] = inner
        self.grafted_at[at] = Grafted(self.seed, whole, within)
        yield GraftedAt(self.seed, at, self.grafted_at[at])

    def _cut_weights(self, base: Base, neurons: Neurons) -> dict[str, Tensor]:
        """Weights of the base model after a cut; the model holds them too."""
        model = self.ready.model
        model.load_weights(base.weights)
        prune_(model, placed(neurons, self.experiment.prune.embedding), sever=self.sever)
        return {name: value.detach().clone() for name, value in model.weights().items()}

    def _finer(self, made: Grafts) -> Parts:
        """The part that alone brings back most, taken apart; nothing where it cannot be, or is not to be."""
        how = self.experiment.grafts
        if how.within == "none" or (how.within == "first" and self.seed != self.experiment.seeds[0]):
            return {}
        part = _most(made, [part for part in made.parts if part != CUT])
        return apart(self.ready.model, part, bands=how.bands) if part else {}

    def _graft(self, stage: str, within: Parts | None = None) -> Grafts | None:
        model, how, prune = self.ready.model, self.experiment.grafts, self.experiment.prune
        base, cuts, done = self.base, self.cuts, self.done
        retrained = self._weights_at("concept", stage)
        if retrained is None:
            return None
        controls = {}
        for name in COMPARED:
            end = self._weights_at(name, stage) if name in done and name != "concept" else None
            if end is not None:
                where = self.arms[name].where
                controls[name] = (base.weights if where is None else self._cut_weights(base, cuts.sets[where]), end)
        cut = self._cut_weights(base, cuts.sets["concept"])
        mask = WeightMask.of(model, placed(cuts.sets["concept"], prune.embedding), sever=self.sever)
        with progress.task(f"grafting (stage {stage})"):
            return grafts(
                model, cut, retrained, self._outcomes, parts=within or parts(model, bands=how.bands), cut=mask,
                controls=controls, cumulative=how.cumulative, label=done["concept"].label,
                max_memory=self.experiment.measure.max_memory,
            )  # fmt: skip

    def _outcomes(self, _: object = None) -> dict[str, Scores]:
        """What grafts are judged by: the margin first, and beside it what people read."""
        scores = self._evaluated()
        return {scores.margin.quantity: scores.margin, scores.metric: scores}  # pyright: ignore[reportAttributeAccessIssue]

    def _evaluated(self) -> Any:
        ready, how = self.ready, self.experiment.measure
        return evaluate(ready.model, ready.scored, concept=ready.concept, max_tokens=how.max_tokens)

    def _again(self, end: Mapping[str, Tensor], path: Trajectory) -> Again:
        """The first cut made again in the retrained model; and what carries the concept now, found, cut, retrained."""
        model, prune, sever = self.ready.model, self.experiment.prune, self.sever
        old = self.cuts.sets["concept"]
        model.load_weights(end)
        drawn = [random_neurons(like=old, seed=draw_seed(self.seed, 1 + k)) for k in range(prune.control_draws)]
        after = []
        with recorded(model, max_bytes=self.experiment.measure.max_bytes) as states:
            self._evaluated()
        with progress.task("cutting again", 1 + len(drawn)):
            for neurons in (old, *drawn):
                model.load_weights(end)
                again = placed(neurons, prune.embedding)
                prune_(model, again, sever=sever)
                with resumed(model, states, unchanged_before(model, WeightMask.of(model, again, sever=sever))):
                    after.append(self._evaluated())
                progress.advance()
        rounds: list[Round] = []
        model.load_weights(end)
        snapshot, ever = path[path.stages[-1]], old
        for k in range(self.experiment.rounds):
            there = ~self._severed(ever)
            new = snapshot.saliency.top(min(len(old), len(there)), among=there)
            prune_(model, placed(new, prune.embedding), sever=sever)
            cut = self._evaluated()
            course = self._course(f"retraining (round {k + 2})", path, "again", k)
            per_layer = (ever & there).mask.sum(1) / there.mask.sum(1).clamp(min=1)
            by_chance = float((new.mask.sum(1) * per_layer).sum() / len(new))
            rounds.append(Round(new, share_old(new, ever), by_chance, cut, course))
            ever = ever | new
            if k + 1 < self.experiment.rounds:
                snapshot = self._measure("measuring after another round")
        return Again(self.seed, after[0], tuple(after[1:]), tuple(rounds))

    def _course(self, what: str, path: Trajectory, role: str, k: int = 0, **how: Any) -> dict[int, Scores]:
        """Retrain the model as it is, and evaluate at every pause until the concept is back."""
        ready, label = self.ready, self.experiment.labels
        course: dict[int, Scores] = {}
        reference = path[BASE].scores.value(label)
        for checkpoint in retrain_(
            ready.model, ready.train, self.experiment.retrain, seed=seed_for(role, self.seed) + k, what=what, **how
        ):
            course[checkpoint.step] = self._evaluated()
            if course[checkpoint.step].value(label) >= BACK * reference:
                break
        return course

    def _severed(self, neurons: Neurons) -> Neurons:
        """Those of some cut neurons that the model as it is now does without: however salient, they carry nothing."""
        where = neurons | placed(neurons, self.experiment.prune.embedding)
        return severed(self.ready.model, where, sever=self.sever)

    def _blocked(self, held: str, end: Mapping[str, Tensor], path: Trajectory, grafted: Grafted) -> Blocked:
        """The concept's arm retrained once more, with a part, its heirs or as many others held as the cut left them."""
        model, old = self.ready.model, self.cuts.sets["concept"]
        if held == "part":
            known_parts = parts(model, bands=self.experiment.grafts.bands)
            last = grafted.stages.get(path.stages[-1])
            part = _most(last, known_parts) if last else None
            if part is None:
                return Blocked(self.seed, held, {})
            mask = WeightMask.of_parts(model, part, among=known_parts)
        else:
            model.load_weights(end)
            heirs = ~(self._severed(old) | old)
            if not len(heirs):
                return Blocked(self.seed, held, {})
            which = path[path.stages[-1]].saliency.top(min(len(old), len(heirs)), among=heirs)
            if held == "random":
                which = random_neurons(like=which, seed=draw_seed(self.seed, 99), apart=which | old)
            mask = WeightMask.of(model, which, sever=self.sever)
        self._cut_weights(self.base, old)
        return Blocked(self.seed, held, self._course(f"retraining ({held} held)", path, "retrain", only=~mask))

    def _examples(self, path: Trajectory) -> Examples | None:
        """What the neurons that were cut, and those that carry the concept at the end, do at a few sentences' words."""
        cut, there = path.removed or ~path.survivors(), path.survivors()
        groups = ((path[BASE], cut), (path[path.stages[-1]], there))
        chosen = (at.saliency.top(min(EXAMPLES // 2, len(among)), among=among) for at, among in groups if len(among))
        return examples(self.ready.model, self.ready.scored.corpus, self.ready.concept, functools.reduce(or_, chosen))

    def _similarity(self, base: Base, what: str, arm: Arm) -> dict[str, ActivationSimilarity]:
        """Activations of the base model against those of the model as it is now."""
        ready, how = self.ready, self.experiment.measure
        if "similarity" not in how.what or not self._is_dear(arm):
            return {}
        with progress.task(what, 2 * ready.probe.n_tokens):
            return activation_similarity(
                base.weights, ready.model, ready.probe, concept=ready.concept, site=ready.site,
                max_memory=how.max_memory, max_tokens=how.max_tokens,
            )  # fmt: skip

    def _is_dear(self, arm: Arm | None) -> bool:
        """Whether a seed's arm gets the measurements that take long."""
        if arm is not None and arm.name not in COMPARED:
            return False
        return self.experiment.measure.dear == "all" or self.seed == self.experiment.seeds[0]

    def _measure(
        self,
        what: str,
        *,
        base: Base | None = None,
        last: bool = False,
        at: Checkpoint | None = None,
        arm: Arm | None = None,
    ) -> Snapshot:
        """One snapshot. Base and last stage get every measurement, others the cheap ones."""
        ready, how, settings = self.ready, self.experiment.measure, self.experiment
        ends = base is None or last
        ends_or_all = (ends or how.everywhere) and (arm is None or arm.name in COMPARED)
        wanted = [
            name
            for name in how.what
            if (name in (*SCORES, "top_words") and ends_or_all)
            or (name in FORMS and ends_or_all and self._is_dear(arm))
        ]
        scored = ready.scored
        now = how.model_copy(update={"what": tuple(wanted), "shuffles": how.shuffles if ends else 0})
        total = ready.probe.n_tokens * (2 if "top_words" in wanted else 1) + scored.n_tokens
        with progress.task(what, total):
            snapshot = measure(
                ready.model, ready.probe, ready.concept, now, validation=scored, site=ready.site, score=settings.score,
                contrast=settings.contrast, base=base.snapshot if base else None,
                vectors=base.vectors if base else None, seed=self.seed, at=at,
            )  # fmt: skip
        if self.seed != settings.seeds[0] or (arm is not None and arm.name != "concept"):
            return snapshot
        sentences = to_read(scored.corpus, ready.concept)
        guessed = guesses(ready.model, sentences, ready.concept) if sentences.n_sentences else None
        return replace(snapshot, guesses=guessed)


def _most(made: Grafts, among: Collection[str]) -> str | None:
    """The part that alone brings back most; None where that is known of none."""
    shares = {part: made.enough(part).value for part in made.parts if part in among}
    known = {part: share for part, share in shares.items() if share == share}
    return max(known, key=known.__getitem__, default=None)


def first_back(path: Trajectory) -> str | None:
    """The first stage at which the concept has `BACK` of what it was before the cut; None while it has not, and where
    the base model did not know it."""
    label, reference = path.label, path[BASE].scores.value(path.label)
    if not reference > 0:
        return None
    stages = [stage for stage in path.stages if stage not in (BASE, PRUNED)]
    return next((stage for stage in stages if path[stage].scores.value(label) >= BACK * reference), None)
