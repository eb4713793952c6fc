"""Ways back without training: fewer bits, or fewer weights, may undo a removal that moved them only a little."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relearn_lens.models.model import Model, encoded_for, hidden, lent, reading, wearing, widest
from relearn_lens.models.training import Checkpoint
from relearn_lens.relearn.attack import GENERAL, NEAR, STILL, Material, Passing, texts
from relearn_lens.text.encoding import Encoded


class Quantised(Passing):
    """Rounds the matrices of the blocks to int8 or int4 and back: what a quantised copy of the model computes by.

    Symmetric, one scale for each output channel: w becomes q max|w| / Q with q = round(w Q / max|w|) and Q = 127 or 7.
    Embeddings, head, norms and biases stay. Rounding what is rounded already changes nothing.

    Source: Zhang et al. 2024 (unlearning undone by rounding to the nearest).
    """

    name: ClassVar[str] = "quantised"
    source: ClassVar[str] = "Zhang et al. 2024"

    bits: Literal[4, 8] = Field(default=4, description="of a weight; 4 is what undid removals (Zhang et al. 2024)")

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        """As of `Passing`; `facts` and `seed` are what other attacks take."""
        matrices = _matrices(model, self.name)
        return _instead(model, matrices, lambda matrix: quantised(matrix.weight, matrix.outputs, self.bits))


class Pruned(Passing):
    """Sets a share of the weights of every matrix of the blocks to 0, the same share of each output channel.

    By `magnitude` the smallest |w|; by `wanda` the smallest |w| times the L2 norm of its input over the retained text,
    general where there is any.

    Source: Sun et al. 2024 (Wanda); as an attack: Jaiswal et al. 2024 and Che et al. 2025.
    """

    name: ClassVar[str] = "pruned"
    source: ClassVar[str] = "Sun et al. 2024; Che et al. 2025"

    share: float = Field(default=0.3, gt=0, lt=1, description="of the weights of each output channel, 0 to 1")
    by: Literal["magnitude", "wanda"] = Field(default="magnitude", description="what small means")

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        matrices = _matrices(model, self.name)
        norms: Mapping[int, Tensor] = {}
        if self.by == "wanda":
            norms = input_norms(model, encoded_for(model, texts(model, facts, GENERAL, NEAR, what=self.name)))
            matrices = [matrix for matrix in matrices if id(matrix.weight) in norms]
        return _instead(
            model,
            matrices,
            lambda matrix: pruned(matrix.weight, matrix.outputs, self.share, norms.get(id(matrix.weight))),
        )


def quantised(weight: Float[Tensor, "row column"], outputs: int, bits: int) -> Float[Tensor, "row column"]:
    """A matrix rounded to so many bits, symmetrically; `outputs` is its axis of output channels."""
    most = 2 ** (bits - 1) - 1
    wide = weight.detach().to(widest(weight.device))
    largest = wide.abs().amax(1 - outputs, keepdim=True)
    steps = (wide * most / largest.clamp(min=torch.finfo(wide.dtype).tiny)).round()
    return (steps * largest / most).to(weight.dtype)


def pruned(
    weight: Float[Tensor, "row column"], outputs: int, share: float, norms: Float[Tensor, " input"] | None = None
) -> Float[Tensor, "row column"]:
    """A matrix without the given share of each output channel's weights, those that are smallest; of equal ones, the
    first go."""
    by_output = weight.detach().movedim(outputs, 0)
    size = by_output.float().abs() * (1.0 if norms is None else norms)
    gone = size.argsort(dim=1, stable=True)[:, : round(share * size.shape[1])]
    return by_output.scatter(1, gone, 0.0).movedim(0, outputs)


def input_norms(model: Model, text: Encoded) -> dict[int, Float[Tensor, " input"]]:
    """The L2 norm of every input of the blocks' matrices over all tokens of a text, padding left out; by the identity
    of the matrix's weight. A matrix that is not computed with has none."""
    squares: dict[int, Tensor] = {}
    mask: Tensor = torch.empty(0)

    def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        real = x.flatten(0, 1)[mask.flatten().bool()] if x.shape[:2] == mask.shape else x.flatten(0, -2)
        sums = real.to(widest(x.device)).square().sum(0)
        squares[id(module.weight)] = squares.get(id(module.weight), 0) + sums

    with contextlib.ExitStack() as stack:
        for matrix in _matrices(model, "pruned"):
            handle = matrix.module.register_forward_pre_hook(see)
            stack.callback(handle.remove)
        stack.enter_context(reading(model))
        for batch in text.batches(device=model.device):
            mask = batch.mask
            hidden(model.bridge, batch.ids, mask)
    return {at: sums.sqrt().float() for at, sums in squares.items()}


class Matrix(NamedTuple):
    """A linear layer of a block."""

    module: Any
    weight: Tensor
    outputs: int
    """Axis of its output channels."""


def _matrices(model: Model, what: str) -> list[Matrix]:
    """The linear layers of the blocks, each once."""
    if wearing(model.bridge):
        raise ValueError(f"{what}: this model has low-rank adapters now; attack it when their block has ended")
    modules = {id(module): module for module in model.bridge.blocks.modules() if isinstance(module, nn.Linear | Conv1D)}
    if not modules:
        raise ValueError(
            f"{what}: the blocks of a {model.bridge.cfg.architecture} model have no plain linear layers; use an attack "
            "that trains"
        )
    return [Matrix(m, m.weight, 1 if isinstance(m, Conv1D) else 0) for m in modules.values()]


@contextlib.contextmanager
def _instead(model: Model, matrices: list[Matrix], of: Any) -> Iterator[Checkpoint]:
    """For a while, other weights in the place of these; the same to the bit afterwards."""
    with lent(model):
        with torch.no_grad():
            # All from what was there: two layers may share a matrix.
            for matrix, value in zip(matrices, [of(matrix) for matrix in matrices], strict=True):
                matrix.weight.copy_(value)
        yield STILL
