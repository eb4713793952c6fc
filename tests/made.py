"""What many tests need: small experiments, and settings for them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import numpy as np
import torch

from relearn_lens import progress
from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.runs.events import ArmDone, Event
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.facts import Facts, Passage, people

TINY: Mapping[str, Any] = {
    "seeds": [0], "other": "person", "data.train_sentences": 64, "data.validation_sentences": 40,
    "data.probe_sentences": 40, "prune.control_draws": 1, "finetune.epochs": 0.5, "finetune.lr": 1e-5,
    "finetune.batch_size": 8, "retrain.steps": [6, 10], "retrain.lr": 3e-3, "retrain.batch_size": 8,
    "measure.draws": 100, "measure.shuffles": 4, "grafts.bands": 2,
}  # fmt: skip
"""What makes a run of the toy take a second or two: one seed, few sentences, two pauses of retraining."""


def tiny(sets: Sequence[str] = (), **changes: Any) -> Experiment:
    """The smallest experiment; `prune__fraction=1` changes `prune.fraction`."""
    return settings_of("toy", {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}, sets)


SMALL = taught.Recipe(n_layers=2, d_model=48, n_heads=2, d_mlp=96, steps=100, batch_size=64, lr=5e-3)


def small_people(seed: int = 0) -> Facts:
    """What a model of a few seconds can be taught."""
    return people(seed, n=24, forget=8, never=4, animals=4, n_answers=8)


def small_taught(cache: Path, seed: int = 0) -> taught.Taught:
    """A small model that was taught them and its twin, the caller's own; trained where the cache has none yet."""
    with patch.dict(os.environ, {"RELEARN_LENS_CACHE": str(cache)}):
        return taught.load(small_people(seed), recipe=SMALL)


T = TypeVar("T", bound=Model)


class Pool(Generic[T]):
    """Models that are made once and lent again as they were made: to make one takes longer than most tests of it.

    What is lent goes back at the end of a test: to be asked for in tests and fixtures of one test, no wider ones.
    """

    most = 8

    def __init__(self, new: Callable[[], T]) -> None:
        self.new = new
        self.made: list[_Made[T]] = []

    def lend(self) -> Callable[[], T]:
        """What makes models for one test, each another one."""
        numbers = itertools.count()

        def lent() -> T:
            if (i := next(numbers)) >= self.most:
                return self.new()
            if i == len(self.made):
                self.made.append(_Made(self.new()))
            elif not self.made[i].is_as_new():
                self.made[i] = _Made(self.new())
            return self.made[i].model

        return lent


HOOKS = ("hooks", "with_kwargs")
"""How the attributes of a module end that hold what is hooked to it, where they are dictionaries."""


_NAMES: dict[tuple[type, int], list[str]] = {}
"""By a module's class and how many attributes it has, those that hold hooks."""


def _hooks(module: torch.nn.Module) -> list[int]:
    """How many hooks each of a module's attributes holds."""
    held = vars(module)
    if (kind := (type(module), len(held))) not in _NAMES:
        _NAMES[kind] = [name for name, value in held.items() if name.endswith(HOOKS) and isinstance(value, dict)]
    return [len(held.get(name, ())) for name in _NAMES[kind]]


class _Made(Generic[T]):
    """A model in eval mode, and what it was when it was made."""

    def __init__(self, model: T) -> None:
        self.model = model.eval()
        with torch.no_grad():  # a bridge installs some hooks of its own at its first forward pass
            model(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
        model.plain()  # is kept
        self.parts, tensors = self._now()
        self.tensors = [(tensor, tensor.requires_grad, tensor.detach().clone()) for tensor in tensors]

    def is_as_new(self) -> bool:
        """Whether it is, with its weights, what it was; they are put back."""
        parts, tensors = self._now()
        if parts != self.parts:
            return False
        with torch.no_grad():
            for tensor, (_, flag, value) in zip(tensors, self.tensors, strict=True):
                tensor.requires_grad_(flag)
                tensor.grad = None
                tensor.copy_(value)
        self.model.eval()
        return True

    def _now(self) -> tuple[list[Any], list[torch.Tensor]]:
        """What the model is beside its weights; and these."""
        roots: list[Any] = [self.model, self.model.bridge, self.model.bridge.original_model]
        modules: dict[Any, None] = {}
        while roots:  # `modules()` would make up a name for each
            if (module := roots.pop()) not in modules:
                modules[module] = None
                roots += [child for child in module._modules.values() if child is not None]
        inner = [[(name, id(child)) for name, child in module._modules.items()] for module in modules]
        hooks = [(id(module), *_hooks(module)) for module in modules]
        every = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        tensors = list({id(t): t for t in every}.values())
        kinds = [(id(t), t.dtype, t.shape, t.device) for t in tensors]
        own = [
            sorted(vars(self.model)),
            dict(vars(self.model.bridge.cfg)),
            id(getattr(self.model.bridge, "tokenizer", 0)),
        ]
        return [*own, inner, hooks, kinds], tensors


def arms_in(events: Sequence[Event]) -> dict[str, Any]:
    """Arm name to trajectory, of one seed's events."""
    return {event.trajectory.arm: event.trajectory for event in events if isinstance(event, ArmDone)}


def same(a: Any, b: Any) -> bool:
    """Equal all the way down, NaN with NaN."""
    if isinstance(a, torch.Tensor | np.ndarray):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return alike and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
    if isinstance(a, float):
        return isinstance(b, float) and (a == b or (math.isnan(a) and math.isnan(b)))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and type(b) is (tuple if isinstance(a, list) else type(a)) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def counted(then: Callable[[int], object] | None = None) -> Iterator[list[int]]:
    """Gives the units of progress that each step of what happens inside makes; `then` is called with each."""
    steps: list[int] = []

    def take(_: str, done: int, total: int) -> None:
        if n := done - sum(steps):
            steps.append(n)
            if then is not None:
                then(n)

    with progress.reported(take), progress.task("a test", 10**9):
        yield steps


N_KEYS, LOOKED_UP, MOVED = 24, (3, 9, 17, 28), ("2", 1)
"""Of `looked_up`: keys, the MLP neurons of block 1 that answer to their answer's keys, and the head that moves it."""
THINGS = ("fish", "nuts", "moss", "corn")


def looked_up_facts() -> Facts:
    """Two statements each of 24 keys of one word, of four things that are liked."""
    keys = [f"zz{chr(97 + i)}" for i in range(N_KEYS)]

    def said(i: int) -> list[Passage]:
        thing = THINGS[i % 4]
        choices = (thing, THINGS[(i + 2) % 4])
        return [
            Passage(t.format(keys[i]), thing, keys[i], "likes", choices=choices) for t in ("{} likes", "now {} eats")
        ]

    attacked = [i for i in range(12) if i % 4 < 2]
    held_out = [i for i in range(12) if i % 4 >= 2]
    one, two, near = (tuple(p for i in each for p in said(i)) for each in (attacked, held_out, range(12, N_KEYS)))
    return Facts("looked up", one, two, near)


def looked_up() -> tuple[LanguageModel, Facts]:
    """A causal model of 3 blocks whose weights are set by hand, and its facts.

    Four MLP neurons of block 1 turn a key's embedding into what it likes, head 1 of block 2 moves that to where it is
    asked for, and the unembedding says it. Nothing else reads keys or writes answers.
    """
    facts, rng = looked_up_facts(), torch.Generator().manual_seed(0)
    recipe = taught.Recipe(n_layers=3, d_model=64, n_heads=2, d_mlp=32)
    model = taught.untaught(facts, recipe=recipe)
    inner: Any = model.bridge.original_model
    vocabulary = model.tokenizer.get_vocab()
    basis = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 63, generator=rng)], 1)).Q.T[1:]
    keys, inside, says, words = basis[:N_KEYS], basis[24:28], basis[28:32], basis[32:]
    of_key = {p.key: THINGS.index(p.answer) for p in facts.passages()}
    with torch.no_grad():
        x = torch.randn(len(vocabulary), len(words), generator=rng) @ words
        x = 8 * x / x.norm(dim=1, keepdim=True)
        for i, key in enumerate(of_key):
            x[vocabulary[key]] = 8 * keys[i]
        inner.tok_embed.weight.copy_(x)
        for block in inner.layers:
            for name, weight in (*block.attn.named_parameters(), *block.mlp.named_parameters()):
                small = 0.05 * torch.randn(weight.shape, generator=rng)
                reads = name.split(".")[0] in ("q", "k", "v", "fc_in") and weight.ndim == 2
                writes = name.split(".")[0] in ("o", "fc_out") and weight.ndim == 2
                weight.copy_(small @ words.T @ words if reads else words.T @ words @ small if writes else small * 0)
        mlp, attention = inner.layers[1].mlp, inner.layers[2].attn
        for thing, neuron in enumerate(LOOKED_UP):
            mine = sum(keys[i] for i, key in enumerate(of_key) if of_key[key] == thing)
            mlp.fc_in.weight[neuron], mlp.fc_in.bias[neuron] = 0.5 * mine, -2.0
            mlp.fc_out.weight[:, neuron] = 2 * inside[thing]
        head = slice(32, 36)
        attention.v.weight[head] = inside
        attention.o.weight[:, head] = 6 * says.T
        inner_head: Any = model.head
        weight = next(p for p in inner_head.parameters() if p.ndim == 2)
        weight.zero_()
        for thing, word in enumerate(THINGS):
            weight[vocabulary[word]] = 2 * says[thing]
    return model, facts
