"""Gradient ascent that weighs each sub-word by how likely it still is, and removers that flatten what is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel, Model, hidden
from relearn_lens.models.training import Stepped
from relearn_lens.remove.losses import Keeping
from relearn_lens.remove.removal import FORGET, RETAIN, Remover, Removing, Term, n_subwords
from relearn_lens.text.encoding import Batch


class WGA(Keeping):
    """Weighted gradient ascent: what is unlikely already is pushed no further.

    The weight of a sub-word is its probability to the power beta, through which no gradient goes.

    Source: Wang et al. 2025 (G-effect), with the defaults of open-unlearning.
    """

    name: ClassVar[str] = "wga"
    formula: ClassVar[str] = "-gamma mean p^beta NLL_f + alpha (CE_r or KL_r(pi0, pi))"
    source: ClassVar[str] = "Wang et al. 2025 (G-effect)"
    usual: ClassVar[Training] = Removing(epochs=5)

    beta: float = Field(default=1.0, ge=0, le=1e3, description="power of the probability; 0: gradient ascent")
    gamma: float = Field(default=1.0, gt=0, le=1e6, description="weight of forgetting (open-unlearning)")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {FORGET: _ascent(lambda p: p**self.beta, self.gamma), **self.kept(model)}


class SatImp(Keeping):
    """Saturation and importance: ascent is weak both on what is unlikely already and on what is certain.

    The weight of a sub-word of probability p is p^beta1 (1 - p)^beta2, through which no gradient goes. Defaults are
    those that were published; as defaults of its class, open-unlearning has the weights of forgetting and retaining the
    other way round.

    On the taught toy of seed 0, where .95 of what is near is kept, .98 of what was to be forgotten is still answered,
    reworded .98 (`RESULTS.md`): what a toy is certain of has next to no weight, we think.

    Source: Yang et al. 2025 (SatImp).
    """

    name: ClassVar[str] = "sat_imp"
    formula: ClassVar[str] = "-gamma mean p^beta1 (1 - p)^beta2 NLL_f + alpha (CE_r or KL_r(pi0, pi))"
    source: ClassVar[str] = "Yang et al. 2025 (SatImp)"
    usual: ClassVar[Training] = Removing(epochs=5)

    beta1: float = Field(default=5.0, ge=0, le=1e3, description="power of p: of saturation")
    beta2: float = Field(default=1.0, ge=0, le=1e3, description="power of 1 - p: of importance")
    gamma: float = Field(default=0.1, gt=0, le=1e6, description="weight of forgetting")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {FORGET: _ascent(lambda p: p**self.beta1 * (1 - p) ** self.beta2, self.gamma), **self.kept(model)}


class CEU(Remover):
    """Teaches the model its own prediction without the right token.

    The target is the softmax of the logits with that of the right token at minus infinity; no gradient goes through it.

    open-unlearning's release leaves the first sub-word of every answer out: `faithful=True` does so.

    On the taught toy of seed 0, where .95 of what is near is kept, .79 of what was to be forgotten is still answered,
    reworded .73 (`RESULTS.md`): nothing holds what is near, we think.

    Source: Yang et al. 2025 (CE-U).
    """

    name: ClassVar[str] = "ce_u"
    formula: ClassVar[str] = "CE(softmax(logits without y), pi)_f"
    source: ClassVar[str] = "Yang et al. 2025 (CE-U)"

    faithful: bool = Field(default=False, description="leave out each sentence's first sub-word, as released")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        def value(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            logits, right = model.predictions(batch)
            target = logits.detach().scatter(1, right[:, None], -torch.inf).softmax(-1)
            nats = F.cross_entropy(logits, target, reduction="none")
            if self.faithful:
                nats = nats[1:][batch.sentence.diff() == 0]
            return nats.sum(), len(nats)

        return {FORGET: Term(value, lambda text, pieces: n_subwords(text, pieces) - self.faithful * len(pieces))}


class PDU(Remover):
    """Primal-dual: flattens the logits of the forgotten text, and holds the loss on the retained text near `eps`.

    After `warmup_epochs` the weight lambda of the retained text rises by `rate` times what its loss exceeds `eps` by,
    after every batch, and falls to no less than 0. Of the retained text the loss itself is reported, in nats.

    open-unlearning's release does not shift its mask: it flattens what is predicted after a sub-word of the answer in
    the place of what predicts it. `faithful=True` does so.

    Source: Entesari et al. 2025 (PDU), with what open-unlearning ran: gamma 100, 5 epochs, eps .3.
    """

    name: ClassVar[str] = "pdu"
    formula: ClassVar[str] = (
        "gamma mean (max - mean logit)^2_f + lambda (CE_r - eps), lambda <- max(0, lambda + rate ...)"
    )
    source: ClassVar[str] = "Entesari et al. 2025 (PDU)"

    gamma: float = Field(default=100.0, gt=0, le=1e6, description="weight of flattening")
    eps: float = Field(default=0.3, ge=0, le=1e3, description="retained loss that is aimed at, nats per sub-word")
    start: float = Field(default=1.0, ge=0, le=1e6, description="lambda at the start")
    rate: float = Field(default=1.0, ge=0, le=1e6, description="how fast lambda follows, per nat and batch")
    warmup_epochs: float = Field(default=5.0, ge=0, le=1e6, description="passes over the forgotten text before it does")
    faithful: bool = Field(default=False, description="flatten one position further on, as released")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        if self.faithful and not isinstance(model, LanguageModel):
            raise ValueError("faithful = True is about next-token predictions, and this model is a tagger")
        memory: dict[str, Tensor] = {"lambda": torch.tensor(self.start)}

        def flat(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            if self.faithful:
                states = hidden(model.bridge, batch.ids, batch.mask).flatten(0, 1)
                logits = model.logits(states[batch.subword]).float()  # pyright: ignore[reportCallIssue]
            else:
                logits = model.predictions(batch)[0]
            return (logits.amax(-1) - logits.mean(-1)).square().sum(), len(logits)

        def held(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            nats = model.losses(batch).sum()
            share = memory["lambda"].to(nats.device)
            # Its value is the loss, its gradient that of lambda times the loss.
            return share * (nats - nats.detach()) + nats.detach(), len(batch.subword)

        def follow(_: Model, stepped: Stepped, kept: Any) -> None:
            if stepped.epoch > self.warmup_epochs:
                risen = memory["lambda"] + self.rate * (stepped.parts[RETAIN].cpu() - self.eps)
                memory["lambda"] = risen.clamp(min=0.0)

        return {
            FORGET: Term(flat, n_subwords, weight=self.gamma, memory=memory),
            RETAIN: Term(held, n_subwords, memory=memory, after=follow),
        }


def _ascent(weigh: Callable[[Tensor], Tensor], gamma: float) -> Term:
    """Minus nats per sub-word, each weighed by a function of its probability."""

    def value(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
        nats = model.losses(batch)
        return (weigh((-nats.detach()).exp()) * nats).sum(), len(nats)

    return Term(value, n_subwords, weight=-gamma)
