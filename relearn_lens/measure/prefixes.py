"""Blocks that need no computing again: what a model computes before the first block that changed.

Models that differ from some block on alone share all that goes on before it. `recorded` keeps every block's output
while a model reads a text; `resumed` gives it back to another reading of it by a model that is the same up to there,
which then computes from that block on: to the bit what computing all of it gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models.model import Model
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import HEAD, NORM, WeightMask
from relearn_lens.neurons.weights import parts as parts_of


@dataclass(eq=False)
class _Pass:
    """One forward pass."""

    given: list[Tensor]
    """What the first block got: hidden states, masks, positions."""
    outputs: list[Tensor | tuple[Tensor | None, ...]] = field(default_factory=list)
    """Of every block, in order, alone or in a tuple with nothing; none where there was no room."""


@dataclass(eq=False)
class States:
    """What the blocks of a model gave in one reading of a text, pass by pass."""

    max_bytes: int
    """Passes beyond this are not kept, and are computed again in full."""
    passes: list[_Pass] = field(default_factory=list)
    whole: bool = True
    """False where passes cannot be shared: with gradients or dropout, or seen by hooks that the reading set."""
    n_bytes: int = 0


@contextlib.contextmanager
def recorded(model: Model, *, max_bytes: int) -> Iterator[States]:
    """For a while, keep what every block gives, pass by pass, as long as it takes no more than `max_bytes`."""
    blocks, states, hooks = list(model.bridge.blocks), States(max_bytes), _hooks(model.bridge)
    here: list[_Pass | None] = [None]

    def begin(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.whole &= not (torch.is_grad_enabled() or block.training or _hooks(model.bridge) != hooks)
        given = [tensor.clone() for tensor in _tensors((args, kwargs))]
        here[0] = _Pass(given)

    def end(i: int, output: Any) -> None:
        at, packed = here[0], isinstance(output, tuple)
        state, *rest = output if packed and output else [output]
        # A block that gives more than hidden states, or is called twice or out of turn, is not known well enough.
        alone = isinstance(state, Tensor) and not any(each is not None for each in rest)
        states.whole &= alone and at is not None and len(at.outputs) == i
        if not states.whole or at is None:
            return
        at.outputs.append((state.clone(), *rest) if packed else state.clone())
        states.n_bytes += state.nbytes
        if i + 1 == len(blocks):
            states.n_bytes += sum(tensor.nbytes for tensor in at.given)
            # An empty pass keeps the number of those that follow.
            states.passes.append(at if states.n_bytes <= states.max_bytes else _Pass([]))

    with contextlib.ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(lambda _, __, output, i=i: end(i, output)).remove)
        yield states


@contextlib.contextmanager
def resumed(model: Model, states: States | None, start: int) -> Iterator[None]:
    """For a while, compute nothing before block `start` where it was computed before: the model must be the one that
    was `recorded` in all that comes before that block, and gives what it gave there.

    A pass over something else than was read then is computed in full.
    """
    if states is None or not states.whole or start <= 0:
        yield
        return
    blocks = list(model.bridge.blocks)
    own = [block.__dict__.get("forward") for block in blocks[:start]]
    number, at = [0], list[_Pass | None]([None])
    computes = [block.forward for block in blocks[:start]]

    def forward(i: int, *args: Any, **kwargs: Any) -> Any:
        if i == 0:
            kept = states.passes[number[0]] if number[0] < len(states.passes) else None
            number[0] += 1
            at[0] = kept if kept is not None and kept.outputs and _same(kept.given, _tensors((args, kwargs))) else None
        if at[0] is None or torch.is_grad_enabled():
            return computes[i](*args, **kwargs)
        return at[0].outputs[i]

    try:
        for i, block in enumerate(blocks[:start]):
            block.__dict__["forward"] = lambda *args, i=i, **kwargs: forward(i, *args, **kwargs)
        yield
    finally:
        for block, before in zip(blocks, own, strict=False):
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = before


def unchanged_before(model: Model, where: WeightMask | Neurons) -> int:
    """How many blocks come before all of some weights, or of some neurons: those that need no computing again when only
    these change."""
    blocks = list(model.bridge.blocks)
    if isinstance(where, Neurons):
        layers = [layer for layer, row in zip(where.site.layers, where.mask, strict=True) if row.any()]
        return min((int(layer) if layer.isdigit() else 0 for layer in layers), default=len(blocks))
    homes = {
        id(w): i for i, block in reversed(list(enumerate(blocks))) for w in (*block.parameters(), *block.buffers())
    }
    plain, names, last = model.plain(), where.weights(), set[str]()
    if any(id(plain[name]) not in homes for name in names):
        known = parts_of(model)
        last = {name for part in (NORM, HEAD) for name in known.get(part, ())}
    first = (len(blocks) if name in last else homes.get(id(plain[name]), 0) for name in names)
    return min(first, default=len(blocks))


def _hooks(bridge: TransformerBridge) -> int:
    """How many hooks there are; some families have some of their own."""
    return sum(len(point.fwd_hooks) for point in bridge.hook_dict.values())


def _tensors(value: Any) -> list[Tensor]:
    """All tensors among some arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
