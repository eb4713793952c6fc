"""Removers that work on hidden states: what is to be forgotten is led astray inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from relearn_lens.methods import Training
from relearn_lens.models.model import Model, hidden
from relearn_lens.neurons.sites import parameter, site_of, streaming
from relearn_lens.remove.removal import (
    FORGET,
    RETAIN,
    Remover,
    Removing,
    Term,
    by_sentence,
    kept_by_piece,
    kept_of,
    n_subwords,
)
from relearn_lens.text.encoding import Batch, Reading


class RMU(Remover):
    """Representation misdirection: hidden states of the forgotten text go to one random direction, those of the
    retained text stay.

    h_l is the output of block l at each sub-word that carries the loss, or (`reading="before"`) at the token before it,
    from which it is predicted: of an answer of one sub-word that alone has a part in answering. u is a vector of
    entries from U[0, 1] (all positive, as released), of length 1, drawn from the seed. Squared errors are means over
    the d_model coordinates.

    Unless `where` says something else, the MLPs' output matrices of `matrices` blocks up to l train. What the retained
    text's states were is kept on the CPU: sub-words x d_model.

    Published: Li et al. 2024 for Zephyr, the defaults; Che et al. 2025: c 20, alpha 100; open-unlearning: c 2, alpha 1,
    layer 7, all weights.

    Source: Li et al. 2024 (WMDP).
    """

    name: ClassVar[str] = "rmu"
    formula: ClassVar[str] = "|h_l - c u|^2_f / d + alpha |h_l - h0_l|^2_r / d"
    source: ClassVar[str] = "Li et al. 2024 (WMDP)"
    usual: ClassVar[Training] = Removing(lr=5e-5)

    layer: int | None = Field(
        default=None, ge=0, le=10_000,
        description="block whose output is led astray, from 0; none: as deep as 7 is of Zephyr's 32 (Li et al. 2024)",
    )  # fmt: skip
    coefficient: float = Field(
        default=6.5, gt=0, le=1e6, description="c, length of the vector that is led to, in activation units (Zephyr)"
    )
    alpha: float = Field(default=1200.0, ge=0, le=1e9, description="weight of retaining (Zephyr); 0: no retained text")
    reading: Reading = Field(
        default="word",
        description="where hidden states are read; word: at the sub-words themselves, as released; before: at the "
        "token before each, from which it is predicted (ours)",
    )
    matrices: int = Field(default=3, ge=1, le=10_000, description="blocks up to `layer` whose W_out trains (Zephyr)")

    def at(self, model: Model) -> int:
        """The block whose output is led astray.

        Raises:
            ValueError: the model does not have it.
        """
        n = int(model.bridge.cfg.n_layers)
        layer = round(7 / 32 * n) if self.layer is None else self.layer
        if layer >= n:
            raise ValueError(f"layer = {layer}: this model has {n} blocks, 0 to {n - 1}")
        return layer

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        """As of `Remover`."""
        layer, before = self.at(model), self.reading == "before"
        goal = torch.rand(int(model.bridge.cfg.d_model), generator=torch.Generator().manual_seed(seed))
        goal = self.coefficient * goal / goal.norm()

        def astray(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            return _distance(states(model, batch, layer, before=before), goal.to(model.device))

        def still(model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
            return _distance(states(model, batch, layer, before=before), kept_of(kept, batch))

        keep = kept_by_piece(lambda model, batch: by_sentence(states(model, batch, layer, before=before), batch))
        retained = {RETAIN: Term(still, n_subwords, keep, self.alpha)} if self.alpha else {}
        return {FORGET: Term(astray, n_subwords), **retained}

    def entries(self, model: Model) -> Mapping[str, Bool[Tensor, ...]]:
        """All of the MLPs' output matrices of the last blocks up to `layer`."""
        site, layer = site_of(model.bridge, "mlp_post"), self.at(model)
        parts = [part for writes in site.writes[max(0, layer + 1 - self.matrices) : layer + 1] for part in writes]
        trained = {id(parameter(model.bridge, part)) for part in parts}
        return {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in model.plain().items()
            if id(weight) in trained
        }


def states(model: Model, batch: Batch, layer: int, *, before: bool = False) -> Float[Tensor, "subword d_model"]:
    """The output of a block at each sub-word of a batch that carries the loss, or at the token `before` it."""
    site = site_of(model.bridge, "resid")
    index, seen = site.layers.index(str(layer)), {}
    with streaming(model.bridge, site, lambda i, activations: seen.update({i: activations}) if i == index else None):
        hidden(model.bridge, batch.ids, batch.mask)
    return seen[index].flatten(0, 1)[batch.subword - int(before)]


def _distance(here: Tensor, there: Tensor) -> tuple[Tensor, int]:
    return (here.float() - there.float()).square().mean(-1).sum(), len(here)
