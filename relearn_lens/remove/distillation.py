"""Removers that teach a model what a model predicts: itself as it was, changed where it is to forget."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.remove.losses import Keeping, against
from relearn_lens.remove.removal import FORGET, Removing, Term
from relearn_lens.text.encoding import Batch


class UNDIAL(Keeping):
    """Self-distillation from adjusted logits: what it predicted before, with less of the right token.

    open-unlearning's release averages over prompt and padding too, and takes beta from the last token but 99 of the
    vocabulary there: `faithful=True` does so, and then batches cannot go through the model in parts.

    Source: Dong et al. 2025 (UNDIAL), with the defaults of open-unlearning.
    """

    name: ClassVar[str] = "undial"
    formula: ClassVar[str] = "CE(softmax(logits0 - beta onehot(y)), pi)_f + alpha (CE_r or KL_r(pi0, pi))"
    source: ClassVar[str] = "Dong et al. 2025 (UNDIAL)"
    usual: ClassVar[Training] = Removing(lr=1e-4)

    beta: float = Field(default=10.0, gt=0, le=1e4, description="taken from the right token's logit (open-unlearning)")
    alpha: float = Field(
        default=0.0, ge=0, le=1e6, description="weight of retaining (open-unlearning); 0: no retained text"
    )
    faithful: bool = Field(default=False, description="prompt and padding too, as open-unlearning released it")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        """As of `Remover`."""
        if not isinstance(model, LanguageModel):
            raise ValueError("undial distils next-token predictions, and this model is a tagger; use a language model")
        if self.faithful and model.vocabulary < _IGNORED:
            raise ValueError(
                f"faithful = True takes from the token {_IGNORED} before the end of the vocabulary, and this model has "
                f"{model.vocabulary} tokens"
            )
        return {FORGET: against(self._distilled, 1.0, everywhere=self.faithful), **self.kept(model)}

    def _distilled(self, now: Tensor, before: Tensor, batch: Batch) -> tuple[Tensor, int]:
        right = batch.ids.flatten()[batch.subword]
        if self.faithful:
            # Every position but a row's last predicts the next one, be it in an answer or not.
            labels = batch.ids.new_full(batch.ids.shape, now.shape[1] - _IGNORED)
            labels.view(-1)[batch.subword] = right
            now, before = (x.unflatten(0, batch.ids.shape)[:, :-1].flatten(0, 1) for x in (now, before))
            right = labels[:, 1:].flatten()
        target = (before - self.beta * F.one_hot(right, now.shape[1])).softmax(-1)
        return F.cross_entropy(now, target, reduction="sum"), len(now)


_IGNORED = 100
"""What marks no label is -100, which counts from the end of the vocabulary."""
