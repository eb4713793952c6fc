"""Removers that teach a model what a model predicts: itself as it was, changed where it is to forget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel, Model, lent
from relearn_lens.models.training import Checkpoint, Objective, train_
from relearn_lens.remove.losses import NPO, GradDiff, Keeping, SimNPO, against, divergence
from relearn_lens.remove.removal import (
    FORGET,
    RETAIN,
    Entries,
    Remover,
    Removing,
    Term,
    by_sentence,
    kept_by_piece,
    kept_of,
    n_subwords,
)
from relearn_lens.text.encoding import Batch, Encoded


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


class WhoIs(Remover):
    """Who's Harry Potter: learns the words that a model would say that has not just read much more of the text.

    A reinforced model is trained from this one on what is to be forgotten; v are logits. The words are chosen once,
    before the first step, and the model is then as it was, to the bit. Of another kind is the code of MUSE, which keeps
    both models and subtracts logits when it answers.

    On the taught toy of seed 0, where .95 of what is near is kept, .80 of what was to be forgotten is still answered,
    reworded .79 (`RESULTS.md`): a toy that is certain is hardly reinforced, we think.

    Source: Eldan & Russinovich 2023.
    """

    name: ClassVar[str] = "who_is"
    formula: ClassVar[str] = "CE(argmax(v0 - alpha relu(v_reinforced - v0)), pi)_f"
    source: ClassVar[str] = "Eldan & Russinovich 2023"

    alpha: float = Field(default=5.0, ge=0, le=1e6, description="how far what was reinforced is taken back")
    reinforcing: Removing = Field(
        default=Removing(epochs=3, lr=3e-6), description="training of the reinforced model (Eldan & Russinovich 2023)"
    )

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        def keep(model: Model, text: Encoded) -> list[Tensor]:
            logits = kept_by_piece(lambda model, batch: by_sentence(model.predictions(batch)[0], batch))
            base = logits(model, text)
            with aside(model, lambda: train_(model, text, self.reinforcing, seed=seed, what="reinforcing")):
                more = logits(model, text)
            return [(v - self.alpha * (w - v).relu()).argmax(-1) for v, w in zip(base, more, strict=True)]

        def value(model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
            logits, _ = model.predictions(batch)
            return F.cross_entropy(logits, kept_of(kept, batch), reduction="sum"), len(logits)

        return {FORGET: Term(value, n_subwords, keep)}


class Undo(Remover):
    """Suppress, then distil into a noised copy: what only stood aside is not handed on.

    First another remover suppresses; its predictions on both texts are what the student learns (KL). The student is the
    suppressed model, moved into noise: theta <- (1 - alpha) theta + alpha beta N, with N Xavier-uniform for matrices
    and 0 for vectors, so that gains of norms shrink, unless `gains` keeps them.

    Published: alpha .1 to .7 and beta .01 to .1 at a learning rate of 9e-4 for language; alpha .25, beta 0 and 2e-5 for
    WMDP.

    Source: Lee et al. 2025 (UNDO).
    """

    name: ClassVar[str] = "undo"
    formula: ClassVar[str] = "KL(pi_suppressed, pi)_f + KL(pi_suppressed, pi)_r, from (1 - alpha) theta + alpha beta N"
    source: ClassVar[str] = "Lee et al. 2025 (UNDO)"
    usual: ClassVar[Training] = Removing(lr=9e-4)

    alpha: float = Field(default=0.6, ge=0, le=1, description="share of the way into noise")
    beta: float = Field(default=0.1, ge=0, le=1e3, description="size of the noise, in units of Xavier's")
    gains: bool = Field(default=False, description="vectors (biases, gains of norms) stay as they are (ours)")
    first: GradDiff | NPO | SimNPO = Field(default=GradDiff(), description="what suppresses")
    suppressing: Removing = Field(default=Removing(), description="how that trains")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        if not isinstance(model, LanguageModel):
            raise ValueError("undo distils next-token predictions, and this model is a tagger; use a language model")
        return {FORGET: against(divergence, 1.0), RETAIN: against(divergence, 1.0)}

    def objective(self, model: Model, terms: Mapping[str, Term], where: Entries, seed: int) -> Objective:
        """As of `Remover`; takes predictions, and weights, from the model that is suppressed first."""
        objective = super().objective(model, terms, where, seed)
        taken = objective.reference  # pyright: ignore[reportFunctionMemberAccess]

        def reference(model: Model, texts: Mapping[str, Encoded]) -> dict[str, Any]:
            with aside(model, lambda: self.first(model, texts, where, seed=seed, how=self.suppressing)):
                kept = taken(model, texts)
                return kept | {"suppressed": {name: value.clone() for name, value in model.plain().items()}}

        objective.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
        objective.begin = lambda _, moving, kept: self._noised(kept, moving, seed)  # pyright: ignore[reportFunctionMemberAccess]
        return objective

    def _noised(self, reference: Any, moving: Mapping[str, Tensor], seed: int) -> None:
        """Put the noised student in the model's place."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in moving.items():
            student = reference["suppressed"][name]
            if student.ndim >= 2:
                uniform = 2 * torch.rand(student.shape, generator=generator) - 1
                noise = (uniform * (6 / sum(student.shape[:2])) ** 0.5).to(student)
                student = (1 - self.alpha) * student + self.alpha * self.beta * noise
            elif not self.gains:
                student = (1 - self.alpha) * student
            weight.copy_(student)


@contextlib.contextmanager
def aside(model: Model, training: Callable[[], Iterator[Checkpoint]]) -> Iterator[None]:
    """For a while, the model as a training leaves it; then its weights are back, to the bit."""
    with lent(model):
        with torch.enable_grad():
            for _ in training():
                pass
        yield


_IGNORED = 100
"""What marks no label is -100, which counts from the end of the vocabulary."""
