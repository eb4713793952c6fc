"""One cell of a bench: a model is removed from, calibrated and attacked; every stage is computed once, by its recipe.

base, never       a pretrained model taught the facts, and its twin (the small taught model is kept in the cache)
removed           the remover's weights, and what they leave
calibrated        how far towards them the base's retained ability is kept
attacked          one attack at one learning rate: what is answered at every checkpoint, and what metrics read there
grafted           which part of the model brought it back
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from relearn_lens import methods, progress
from relearn_lens.analysis.matrix import NEVER, Cell, Course, share
from relearn_lens.bench.plan import Bench, Column, Row
from relearn_lens.files import sha256_of
from relearn_lens.find.localisers import localiser_of
from relearn_lens.measure.answers import AnswerAccuracy, answer
from relearn_lens.measure.asking import Asked, Reference
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.grafting import grafts
from relearn_lens.measure.metrics import measured, metric_of
from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel, computing
from relearn_lens.models.training import train_
from relearn_lens.names import unknown
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import parts
from relearn_lens.relearn.attack import Attack
from relearn_lens.relearn.attacks import ATTACKS
from relearn_lens.remove.calibration import calibrate, mixed_
from relearn_lens.remove.recipes import Recipe
from relearn_lens.runs import removals
from relearn_lens.runs.stages import Stage, StageRecipe, Stages
from relearn_lens.text.facts import FORGET, RETAIN, Facts, Passage
from relearn_lens.text.facts.encoded import encode_facts

HELD_OUT = "forget_held_out"
Weights = Mapping[str, Tensor]
Rows = list[dict[str, Any]]


def check(bench: Bench) -> None:
    """Refuse removers, attacks and fields that there are not, before anything is computed.

    Raises:
        ValueError: all of them, one line each.
    """
    wrong = []
    made = {f"rows.{name}": partial(_recipe, bench, row) for name, row in bench.rows.items()}
    made |= {f"columns.{name}": partial(_attacks, bench, column) for name, column in bench.columns.items()}
    for name, make in made.items():
        try:
            make()
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    try:
        metrics = [metric_of(name) for name in bench.metrics]
    except ValueError as error:
        wrong.append(f"metrics: {error}")
    else:
        twin = bench.model == removals.TAUGHT or bench.teach is not None
        wrong += [
            f"metrics: {metric.name} compares with a twin that never knew, and model {bench.model!r} has none: give "
            "teach, or leave it out"
            for metric in metrics
            if NEVER in metric.needs and not twin
        ]
    if bench.model == removals.TAUGHT and bench.teach is not None:
        wrong.append("teach: the model 'taught' is taught these facts anyway; leave it out, or name a pretrained model")
    if wrong:
        raise ValueError("\n".join(wrong))


def _recipe(bench: Bench, row: Row) -> Recipe:
    kind = None if row.recipe == "auto" else row.recipe
    fields = {**row.fields, **{f"where.{name}": value for name, value in row.where.items()}}
    removal = removals.recipe_for(bench.model, row.remover, fields, kind=kind)
    if removal.where is not None:
        localiser_of(removal.where, **removal.where_fields)
    return removal


def _attacks(bench: Bench, column: Column) -> dict[str, Attack]:
    """By learning rate, as it is named (`""` of an attack that has none, or its own)."""
    if column.attack not in ATTACKS:
        raise ValueError(unknown("attack", column.attack, ATTACKS))
    kind = ATTACKS[column.attack]
    if not column.rates:
        return {"": methods.of(kind, None, column.fields)}
    if "lr" not in kind.model_fields:
        raise ValueError(f"{column.attack} trains nothing, so it has no learning rates; leave rates out")
    return {f"{lr:g}": methods.of(kind, None, {**column.fields, "lr": lr}) for lr in column.rates}


@dataclass
class Work:
    """The cells of one seed, which share a base and its twin."""

    bench: Bench
    seed: int
    stages: Stages
    _kept: dict[Any, Any] = field(default_factory=dict)
    """What metrics measured of the models that they compare with."""

    @cached_property
    def _subject(self) -> removals.Subject:
        bench = self.bench
        subject = removals.subject(bench.model, bench.facts, retain=bench.retain, seed=self.seed)
        if bench.device != "auto":
            subject.model.to(bench.device)
        return subject

    @property
    def model(self) -> LanguageModel:
        """The one model that all weights go through."""
        return self._subject.model

    @property
    def facts(self) -> Facts:
        """What it knows."""
        return self._subject.facts

    @cached_property
    def base(self) -> Weights:
        """The weights that everything is removed from."""
        if self.bench.teach is not None:
            return self._taught("base", (*FORGET, *RETAIN)).tensors
        return self.model.copied()

    @cached_property
    def never(self) -> Weights | None:
        """The twin's; None where there is none."""
        if self.bench.teach is not None:
            return self._taught(NEVER, RETAIN).tensors
        return None if self._subject.never is None else self._subject.never.copied()

    def _taught(self, name: str, roles: Sequence[str]) -> Stage:
        teach = self.bench.teach
        assert teach is not None
        start = self._start
        recipe = StageRecipe(
            name,
            {
                "weights": removals.weights_sha256(self.model), "facts": self.facts.sha256(), "roles": list(roles),
                "teach": teach.model_dump(mode="json"), **self._common,
            },
        )  # fmt: skip

        def train() -> tuple[dict[str, Any], Weights]:
            self.model.load_weights(start)
            text = encode_facts(self.facts, *roles, tokenizer=self.model.tokenizer, context=self.model.context)
            training = Training(**teach.model_dump())
            *_, end = train_(self.model, text, training, seed=self.seed, what=f"teaching ({name})")
            return {"loss": end.loss, "steps": end.step}, self.model.weights()

        try:
            return self.stages.made(recipe, train)
        finally:
            self.model.load_weights(start)

    @cached_property
    def _start(self) -> Weights:
        return self.model.copied()

    @property
    def _common(self) -> dict[str, Any]:
        bench = self.bench
        return {
            "seed": self.seed, "device": self.model.device.type, "precision": bench.precision, "threads": bench.threads,
        }  # fmt: skip

    @cached_property
    def _held_out(self) -> tuple[Passage, ...]:
        return drawn(self.facts, (HELD_OUT,), self.bench.keys, self.bench.wordings, self.seed)

    @cached_property
    def _retained(self) -> tuple[Passage, ...]:
        return drawn(self.facts, RETAIN, self.bench.keys, self.bench.wordings, self.seed)

    def _known(self, passages: Sequence[Passage]) -> AnswerAccuracy:
        if not all(
            bool(torch.isfinite(value).all()) for value in self.model.weights().values() if value.is_floating_point()
        ):
            raise FloatingPointError("weights that are not finite")
        return answer(self.model, passages, closed=self.facts.answers()).accuracy

    def _sums(self, passages: Sequence[Passage], attack: Attack | None = None) -> Float[np.ndarray, "key 2"]:
        """Passages answered right and asked, by key in the order of the passages as they are without any attack."""
        prompted = passages if attack is None else attack.asked(passages, self.facts, seed=self.seed)
        accuracy = self._known(prompted)
        by_key = dict(zip(accuracy.keys, accuracy.sums(OVERALL), strict=True))
        return np.stack([by_key.get(key, np.zeros(2)) for key in dict.fromkeys(p.key for p in passages)])

    # --- one cell

    def cell(self, name: str) -> dict[str, Any]:
        """Everything of one row; gives the folders of its stages."""
        common = {
            "facts": self.facts.sha256(), "held_out": _hash(self._held_out), "retained": _hash(self._retained),
            **self._common,
        }  # fmt: skip
        at_base = self._made("asked", {**common, "weights": self._sha(self.base)}, lambda: self._asked(self.base))
        index: dict[str, Any] = {"row": name, "seed": self.seed, "base": self._name(at_base[0])}
        neurons: Neurons | None = None
        if name == NEVER:
            assert self.never is not None
            start, origin = self.never, self._sha(self.never)
            left = self._made("asked", {**common, "weights": origin}, lambda: self._asked(start))
            index |= {"removed": self._name(left[0]), "calibrated": self._name(left[0]), "moved": 1.0}
        else:
            row = self.bench.rows[name]
            removed, stage, neurons = self._removed(row, common)
            index["removed"] = self._name(removed)
            calibrated, mixed = self._calibrated(removed, stage, common)
            index |= {"calibrated": self._name(calibrated), "moved": mixed.numbers["moved"]}
            self.model.load_weights(stage.tensors)
            mixed_(self.model, self.base, mixed.numbers["moved"])
            start, origin = self.model.copied(), calibrated.digest
        held = neurons if name != NEVER and self.bench.rows[name].held else None
        index["courses"] = {
            column: {
                rate: self._name(self._attacked(start, origin, column, rate, attack, held, common, name)[0])
                for rate, attack in _attacks(self.bench, how).items()
            }
            for column, how in self.bench.columns.items()
        }
        return index

    def _sha(self, weights: Weights) -> str:
        self.model.load_weights(weights)
        return removals.weights_sha256(self.model)

    def _name(self, recipe: StageRecipe) -> str:
        return self.stages.folder(recipe).name

    def _made(
        self, kind: str, fields: Mapping[str, Any], make: Callable[[], tuple[Mapping[str, Any], Weights | None]]
    ) -> tuple[StageRecipe, Stage]:
        recipe = StageRecipe(kind, fields)
        return recipe, self.stages.made(recipe, make)

    def _asked(self, weights: Weights) -> tuple[dict[str, Any], Weights]:
        """What some weights answer."""
        self.model.load_weights(weights)
        accuracy = self._known(self._held_out)
        tensors = {"held_out": self._sums(self._held_out), "retained": self._sums(self._retained)}
        return {"chance": accuracy.chance(OVERALL)}, {k: torch.from_numpy(v) for k, v in tensors.items()}

    def _removed(self, row: Row, common: Mapping[str, Any]) -> tuple[StageRecipe, Stage, Neurons | None]:
        """The remover's weights, what they answer, and the neurons that were cut, if any were."""
        removal = _recipe(self.bench, row)
        says = {**removals.fields_of(removal), "localiser": row.where, "rounds": row.rounds}
        if row.rounds > 1:
            says |= {"repair": row.repair, "repair_lr": row.repair_lr}
        cut: list[Neurons] = []

        def remove() -> tuple[dict[str, Any], Weights]:
            self.model.load_weights(self.base)
            steps = 0
            for k in range(row.rounds):
                if k:
                    self._repaired(row)
                where = removals.located(self.model, self.facts, removal, seed=self.seed + k)
                if isinstance(where, Neurons):
                    cut.append(where)
                for pause in removal(self.model, self.facts, where, seed=self.seed + k):
                    steps += 0 if math.isnan(pause.loss) else pause.step
            weights = self.model.copied()
            numbers, tensors = self._asked(weights)
            return {**numbers, "steps": steps, "site": cut[0].site.name if cut else None}, {
                **{f"asked.{name}": value for name, value in tensors.items()},
                **{f"cut.{k}": neurons.mask for k, neurons in enumerate(cut)},
                **{f"w.{name}": value for name, value in weights.items()},
            }

        recipe, stage = self._made("removed", {**common, "weights": self._sha(self.base), "how": says}, remove)
        weights = {name[2:]: value for name, value in stage.tensors.items() if name.startswith("w.")}
        answers = {name[6:]: value for name, value in stage.tensors.items() if name.startswith("asked.")}
        neurons = None
        masks = [value.bool() for name, value in stage.tensors.items() if name.startswith("cut.")]
        if masks:
            neurons = Neurons(torch.stack(masks).any(0), site_of(self.model.bridge, str(stage.numbers["site"])))
        return recipe, Stage({**stage.numbers, "asked": answers}, weights), neurons

    def _repaired(self, row: Row) -> None:
        """Train on what is to stay, between two rounds."""
        text = encode_facts(self.facts, *RETAIN, tokenizer=self.model.tokenizer, context=self.model.context)
        how = Training(steps=(row.repair,), lr=row.repair_lr, schedule="constant", batch_size=32)
        for _ in train_(self.model, text, how, seed=self.seed, what="repairing"):
            pass

    def _calibrated(self, removed: StageRecipe, stage: Stage, common: Mapping[str, Any]) -> tuple[StageRecipe, Stage]:
        """How far towards the removed model the base's retained ability is kept, and what is answered there."""
        bench = self.bench

        def search() -> tuple[dict[str, Any], Weights]:
            self.model.load_weights(stage.tensors)

            def ability(model: LanguageModel) -> float:
                return float(share(self._sums(self._retained).sum(0)))

            best = calibrate(self.model, self.base, ability, tau=bench.tau, points=bench.points)
            mixed_(self.model, self.base, best.share)
            numbers, tensors = self._asked(self.model.copied())
            searched = {"moved": best.share, "kept": best.score, "base": best.base, "removed": best.removed}
            return {**numbers, **searched}, tensors

        fields = {**common, "from": removed.digest, "tau": bench.tau, "points": bench.points}
        return self._made("calibrated", fields, search)

    def _attacked(
        self, start: Weights, origin: str, column: str, rate: str, attack: Attack, held: Neurons | None,
        common: Mapping[str, Any], row: str,
    ) -> tuple[StageRecipe, Stage]:  # fmt: skip
        """One attack at one learning rate, and on the first reported seed which part of the model brought it back."""
        bench = self.bench
        how = {"attack": attack.name, **attack.model_dump(mode="json"), "held": held is not None}
        first = next((name for name, each in bench.columns.items() if each.rates), None)
        looked_into = column == first and self.seed == bench.seeds[0] and self.seed != bench.chooses
        looked_into = looked_into and getattr(attack, "lora", None) is None  # whose adapters are no part of the model
        grafted = bench.grafts and looked_into and row != NEVER
        metrics = list(bench.metrics) if looked_into else []
        if held is not None and "freeze" in type(attack).model_fields:
            attack = attack.model_copy(update={"freeze": held})

        def run() -> tuple[dict[str, Any], Weights]:
            with self._from(start):
                steps, held_out, retained = [0], [self._sums(self._held_out)], [self._sums(self._retained)]
                best: tuple[float, Weights] | None = None
                diverged = False
                read: Rows = self._read(metrics, start, 0)
                iterator = attack(self.model, self.facts, seed=self.seed)
                try:
                    for pause in iterator:
                        now = self._sums(self._held_out, attack), self._sums(self._retained, attack)
                        steps.append(max(pause.step, 1))
                        held_out.append(now[0])
                        retained.append(now[1])
                        read += self._read(metrics, start, steps[-1])
                        if grafted and (best is None or share(now[0].sum(0)) > best[0]):
                            usable = Course(tuple(steps), np.stack(held_out), np.stack(retained)).usable(bench.bound)
                            if len(steps) - 1 in usable:
                                best = float(share(now[0].sum(0))), self.model.copied()
                except FloatingPointError:
                    diverged = True
                finally:
                    getattr(iterator, "close", lambda: None)()
                numbers: dict[str, Any] = {"steps": steps, "diverged": diverged, "metrics": read}
                if best is not None:
                    numbers["grafts"] = self._grafts(start, best[1])
            sums = {"held_out": held_out, "retained": retained}
            return numbers, {name: torch.from_numpy(np.stack(each)) for name, each in sums.items()}

        fields = {**common, "from": origin, "how": how, "grafted": [bench.bound, bench.bands] if grafted else None}
        if metrics:
            fields |= {"metrics": metrics, "base": self._base_sha}
        with progress.task(f"attacking ({row}, {column} {rate})"):
            return self._made("attacked", fields, run)

    @contextlib.contextmanager
    def _from(self, start: Weights) -> Iterator[None]:
        """Some weights for a while, and again afterwards."""
        self.model.load_weights(start)
        try:
            with computing(self.model, getattr(torch, self.bench.precision)):
                yield
        finally:
            self.model.load_weights(start)

    def _read(self, metrics: Sequence[str], start: Weights, step: int) -> Rows:
        """Metrics of the held-out half: of the whole model (`layer` is None), and by layer or part of it; `why` says
        why these facts do not have one."""
        if not metrics:
            return []
        made = [metric_of(name) for name in metrics]
        reference = None
        if any(metric.needs for metric in made):
            twin = self._never_model if any(NEVER in metric.needs for metric in made) else None
            reference = Reference(self._base_model, twin, start, self._kept)
        once = tuple({(p.key, p.relation): p for p in self._held_out}.values())
        questions = Asked(self.facts, once, (HELD_OUT,) * len(once))
        rows: Rows = []
        for metric in made:
            name = metric.name
            try:
                scores = measured(self.model, questions, [metric], reference)[name]
            except ValueError as error:
                rows.append({"metric": name, "step": step, "layer": None, "why": str(error)})
                continue
            layered = getattr(scores, "layers", None)
            each = [(None, scores, OVERALL)]
            if layered is not None:
                each += [(layer, scores.layer(layer), OVERALL) for layer in layered]  # pyright: ignore[reportAttributeAccessIssue]
            elif scores.over == "weights":
                each += [(part, scores, part) for part in scores.labels]
            rows += [
                {
                    "metric": name, "unit": scores.unit, "step": step, "layer": layer, "value": of.shown(label),
                    **dict(zip(("low", "high"), of.interval(label), strict=True)), "chance": of.chance(label),
                }
                for layer, of, label in each
            ]  # fmt: skip
        return rows

    @cached_property
    def _base_sha(self) -> str:
        return self._sha(self.base)

    @cached_property
    def _base_model(self) -> LanguageModel:
        return self._copy(self.base)

    @cached_property
    def _never_model(self) -> LanguageModel | None:
        if self.bench.teach is None:
            return self._subject.never
        return None if self.never is None else self._copy(self.never)

    def _copy(self, weights: Weights) -> LanguageModel:
        """A model of its own with some weights, for metrics that compare."""
        bench = self.bench
        model = removals.subject(bench.model, bench.facts, retain=bench.retain, seed=self.seed).model
        model.to(self.model.device)
        model.load_weights(weights)
        return model

    def _grafts(self, start: Weights, end: Weights) -> list[dict[str, Any]]:
        """By part, from input to output: what it alone brings back, and what is lost without it."""
        bands = self.bench.bands and min(self.bench.bands, int(self.model.bridge.cfg.n_layers))
        grafted = grafts(
            self.model, start, end, lambda _: {"accuracy": self._known(self._held_out)},
            parts=parts(self.model, bands=bands),
        )  # fmt: skip
        shares = {part: (grafted.enough(part), grafted.needed(part)) for part in grafted.parts}
        return [
            {
                "part": part, "enough": enough.value, "enough_low": enough.low, "enough_high": enough.high,
                "needed": needed.value, "needed_low": needed.low, "needed_high": needed.high,
                "refused": enough.refused,
            }
            for part, (enough, needed) in shares.items()
        ]  # fmt: skip


class Read(NamedTuple):
    """One cell, from its stages."""

    cell: Cell
    parts: dict[str, Rows]
    """By attack and rate: what each part of the model brings back."""
    metrics: dict[str, Rows]
    """By attack and rate: what metrics read at every checkpoint, where they were asked for."""


def read_cell(index: Mapping[str, Any], stages: Stages) -> Read:
    """A cell from its stages.

    Raises:
        ValueError: a stage is missing or damaged.
    """

    def stage(name: str) -> Stage:
        kept = stages.named(name)
        if kept is None:
            raise ValueError(f"{str(stages.path)!r} lacks the stage {name}; the same command makes it again")
        return kept

    base, removed, calibrated = (stage(index[key]) for key in ("base", "removed", "calibrated"))
    attacked = {column: {rate: stage(name) for rate, name in by.items()} for column, by in index["courses"].items()}

    def course(one: Stage) -> Course:
        steps = tuple(int(step) for step in one.numbers["steps"])
        return Course(steps, one.tensors["held_out"].numpy(), one.tensors["retained"].numpy())

    courses = {column: {rate: course(one) for rate, one in by.items()} for column, by in attacked.items()}

    def rows_of(kind: str) -> dict[str, Rows]:
        each = {f"{column} {rate}".strip(): one for column, by in attacked.items() for rate, one in by.items()}
        return {name: one.numbers[kind] for name, one in each.items() if one.numbers.get(kind)}

    def sums_of(of: Stage, key: str) -> np.ndarray:
        return of.tensors[key if key in of.tensors else f"asked.{key}"].numpy()

    kept, removed_kept, calibrated_kept = (
        float(share(sums_of(of, "retained").sum(0))) for of in (base, removed, calibrated)
    )

    cell = Cell(
        index["row"], int(index["seed"]), sums_of(base, "held_out"), sums_of(removed, "held_out"),
        sums_of(calibrated, "held_out"), kept, removed_kept, calibrated_kept,
        moved=float(index["moved"]), courses=courses, chance=float(base.numbers["chance"]),
    )  # fmt: skip
    return Read(cell, rows_of("grafts"), rows_of("metrics"))


def drawn(facts: Facts, roles: Sequence[str], keys: int, wordings: int, seed: int) -> tuple[Passage, ...]:
    """Statements (or, where there are none, what else is taught) about at most so many keys of each role, in at most so
    many wordings of each relation."""
    passages: list[Passage] = []
    for role in roles:
        among = facts.keys(role)
        order = np.random.default_rng(seed).permutation(len(among))[:keys]
        chosen = {among[i] for i in order}
        statements = facts.passages(role, forms=("statement",)) or facts.passages(role, forms=("text",))
        n: dict[tuple[str, str], int] = {}
        for p in statements:
            fact = p.key, p.relation
            if p.key in chosen and n.get(fact, 0) < wordings:
                n[fact] = n.get(fact, 0) + 1
                passages.append(p)
    return tuple(passages)


def _hash(passages: Sequence[Passage]) -> str:
    return sha256_of("\n".join(p.text for p in passages))
