"""Removers that edit one place: a few steps on one matrix teach another answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from relearn_lens.methods import Training
from relearn_lens.models.model import Model
from relearn_lens.models.training import Step, plain
from relearn_lens.remove.losses import Retained
from relearn_lens.remove.preference import Preferring, likelier
from relearn_lens.remove.removal import FORGET, Removing, Term, Texts, block_of, written


class DINM(Preferring):
    """Detoxification by one matrix: some steps on the MLP output matrix of one block teach the preferred answer.

    The block is to be that at which preferred and forgotten answers lie farthest apart: give its matrix as `where`
    (`find`'s `layer_distance`, which divides by the length of the hidden states, as these grow with depth), or `layer`.

    In the release no gradient goes through the KL: `faithful=True` leaves it out of the gradient. It also stops when
    the loss is below 1e-4, which here is left to the number of steps.

    On the taught toy of seed 0, where .95 of what is near is kept, .72 of what was to be forgotten is still answered,
    reworded .59 (`RESULTS.md`): one matrix of one block holds too little, we think.

    Source: Wang et al. 2024 (DINM); for Mistral a learning rate of 1e-5.
    """

    name: ClassVar[str] = "dinm"
    formula: ClassVar[str] = "edit CE(preferred) + alpha KL_r(pi0, pi), on W_out of one block"
    source: ClassVar[str] = "Wang et al. 2024 (DINM)"
    usual: ClassVar[Training] = Removing(lr=5e-4, steps=(10,))

    layer: int | None = Field(default=None, ge=0, le=10_000, description="block, from 0; none: the last, or `where`")
    edit: float = Field(default=0.1, gt=0, le=1e6, description="weight of the preferred answers")
    retain: Retained = Field(default="kl", description=Preferring.model_fields["retain"].description)
    faithful: bool = Field(default=False, description="no gradient of what is retained, as released")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {FORGET: likelier(self.edit), **self.kept(model)}

    def entries(self, model: Model) -> Mapping[str, Bool[Tensor, ...]]:
        """All of the MLP's output matrix of the block.

        Raises:
            ValueError: the model does not have it.
        """
        return written(model, [block_of(model, self.layer, lambda n: n - 1)])

    def __call__(self, model: Model, texts: Texts, where: Any = None, *, step: Step = plain, **keywords: Any) -> Any:
        """As of `Remover`.

        Raises:
            ValueError: as of `Remover`, or `faithful` with a wrapper.
        """
        if self.faithful and step is not plain:
            raise ValueError("faithful = True takes the gradient of the edit alone, so no wrapper can stand around it")
        edit_alone: Step = lambda _, gradient: gradient(FORGET)  # noqa: E731
        return super().__call__(model, texts, where, step=edit_alone if self.faithful else step, **keywords)
