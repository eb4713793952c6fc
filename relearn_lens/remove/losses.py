"""Removers that work on what a model predicts: the loss on what is to go rises, that on what is to stay does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from relearn_lens.models.model import LanguageModel, Model, hidden
from relearn_lens.remove.removal import (
    FORGET,
    RETAIN,
    Remover,
    Term,
    Texts,
    by_sentence,
    kept_by_piece,
    kept_of,
    n_pieces,
    n_subwords,
)
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded
from relearn_lens.text.facts import RETAIN as STAYING
from relearn_lens.text.facts import TRAINED, Facts
from relearn_lens.text.facts.encoded import encode_facts

Retained = Literal["ce", "kl"]
"""What keeps the retained text: its own cross-entropy, or how far predictions are from those of before."""


class Keeping(Remover):
    """Beside what it does to the forgotten text, it keeps what the retained one says."""

    alpha: float = Field(
        default=1.0, ge=0, le=1e6, description="weight of retaining (open-unlearning); 0: no retained text"
    )
    retain: Retained = Field(
        default="ce", description="ce: nats per sub-word of the retained text; kl: KL(pi0, pi) there, nats per sub-word"
    )

    def kept(self, model: Model) -> dict[str, Term]:
        """The term of the retained text; none where it weighs nothing."""
        if self.alpha == 0:
            return {}
        return {RETAIN: likely(self.alpha) if self.retain == "ce" else _divergence(model, self.alpha, False)}


class GradientAscent(Remover):
    """Raises the loss on what is to be forgotten, and nothing else: it diverges, so stop it early.

    Nothing holds what is near: on the taught toys, where .95 of that is kept, .83 of what was to be forgotten is still
    answered (five seeds, `RESULTS.md`).
    """

    name: ClassVar[str] = "gradient_ascent"
    formula: ClassVar[str] = "-CE_f"
    source: ClassVar[str] = "Jang et al. 2023"

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {FORGET: likely(-1.0)}


class GradDiff(Keeping):
    """Raises the loss on what is to be forgotten, and lowers it on what is to be retained.

    `retain="kl"` keeps the predictions of before instead; what they are computed from (one hidden state for each
    sub-word of the retained text, and the head) is taken from the model before the first step and kept on the CPU.

    The KL of open-unlearning's release counts every position: prompts, special tokens and padding too. Here it counts
    what carries the loss; `faithful=True` does as released, and then batches cannot go through the model in parts.

    Source: Liu et al. 2022; Maini et al. 2024 (TOFU).
    """

    name: ClassVar[str] = "grad_diff"
    formula: ClassVar[str] = "-gamma CE_f + alpha (CE_r or KL_r(pi0, pi))"
    source: ClassVar[str] = "Liu et al. 2022; Maini et al. 2024 (TOFU)"

    gamma: float = Field(default=1.0, gt=0, le=1e6, description="weight of forgetting (open-unlearning)")
    faithful: bool = Field(default=False, description="KL over prompt and padding too, as open-unlearning released it")

    @model_validator(mode="after")
    def _differs(self) -> GradDiff:
        if self.faithful and self.retain != "kl":
            raise ValueError(
                f"faithful = True and retain = {self.retain!r}: only the KL was released otherwise than written"
            )
        return self

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        kept = {RETAIN: _divergence(model, self.alpha, True)} if self.faithful and self.alpha else self.kept(model)
        return {FORGET: likely(-self.gamma), **kept}


class NPO(Keeping):
    """Negative preference optimisation: gradient ascent that fades on a sentence as it gets less likely than it was.

    Log-probabilities are summed over the sub-words of a sentence (its answer, where it has one), and the loss is the
    mean over sentences. With `beta` towards 0 its gradient becomes that of gradient ascent, times sub-words per
    sentence. What they were is one number for each sub-word, kept on the CPU.

    The release of Fan et al. 2025 puts the mean cross-entropy of the whole batch into the sigmoid, one scalar a batch:
    `faithful=True` does so, and then batches cannot go through the model in parts.

    Source: Zhang et al. 2024, with the retained loss of open-unlearning.
    """

    name: ClassVar[str] = "npo"
    formula: ClassVar[str] = (
        "-(2 / beta) mean log sigmoid(-beta (log pi(y) - log pi0(y)))_f + alpha (CE_r or KL_r(pi0, pi))"
    )
    source: ClassVar[str] = "Zhang et al. 2024"

    beta: float = Field(
        default=0.1, gt=0, le=1e3, description="inverse temperature, per nat (Zhang et al. 2024, open-unlearning)"
    )
    faithful: bool = Field(default=False, description="one sigmoid a batch, as Fan et al. 2025 released it")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        keep = kept_by_piece(nats_by_sentence)
        forget = (
            Term(partial(_npo_of_batch, self.beta), None, keep)
            if self.faithful
            else Term(partial(_npo, self.beta), n_pieces, keep)
        )
        return {FORGET: forget, **self.kept(model)}


class SimNPO(Keeping):
    """Negative preference optimisation without a reference: it fades on a sentence as its mean loss per sub-word gets
    higher than `delta`, so that long answers do not weigh more.

    gamma weighs the *forget* term, as released. Published: beta 4.5 with gamma .125 (the default), or 2.5 with .1375.

    Source: Fan et al. 2024 (SimNPO), with the defaults of its release and of open-unlearning.
    """

    name: ClassVar[str] = "simnpo"
    formula: ClassVar[str] = (
        "-gamma (2 / beta) mean log sigmoid(beta (NLL(y) / |y| - delta))_f + alpha (CE_r or KL_r(pi0, pi))"
    )
    source: ClassVar[str] = "Fan et al. 2024 (SimNPO)"

    beta: float = Field(default=4.5, gt=0, le=1e3, description="inverse temperature, per nat (SimNPO's release)")
    gamma: float = Field(default=0.125, gt=0, le=1e6, description="weight of forgetting (SimNPO's release)")
    delta: float = Field(default=0.0, ge=-1e3, le=1e3, description="margin, nats per sub-word (SimNPO's release)")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        def value(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            nats = model.losses(batch)
            zeros = nats.new_zeros(len(batch.ids))
            mean = zeros.index_add(0, batch.sentence, nats) / zeros.index_add(0, batch.sentence, torch.ones_like(nats))
            return -2 / self.beta * F.logsigmoid(self.beta * (mean - self.delta)).sum(), len(mean)

        return {FORGET: Term(value, n_pieces, weight=self.gamma), **self.kept(model)}


TUNING = "tuning"
"""The role of a text like those that the model may be fine-tuned on afterwards."""


class ILU(NPO):
    """Invariant unlearning: what `NPO` lowers, and a penalty that makes the model a stationary point of fine-tuning on
    other text, so that such fine-tuning does not move it back.

    The penalty is that of invariant risk minimisation: the squared slope of the mean cross-entropy on the text
    `tuning` in a factor w of all logits, at w = 1. Of facts, that text is what is to stay in general, or, where
    there is nothing, what is near. It is no sum over sub-words, so batches cannot go through the model in parts.

    Published over NPO and over RMU; this is the first.

    Source: Wang et al. 2025 (ILU); Arjovsky et al. 2019 (IRMv1).
    """

    name: ClassVar[str] = "ilu"
    formula: ClassVar[str] = "as npo, + penalty (d/dw CE_t(w logits) at w = 1)^2"
    source: ClassVar[str] = "Wang et al. 2025 (ILU)"

    penalty: float = Field(default=1.0, ge=0, le=1e6, description="weight of the squared slope, per nat squared")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {**super().terms(model, seed), TUNING: Term(_slope, None, weight=self.penalty)}

    def texts(self, model: Model, texts: Texts | None, roles: Iterable[str], seed: int) -> dict[str, Corpus | Encoded]:
        """As of `Remover`, with the text `tuning`."""
        if not isinstance(texts, Facts):
            return super().texts(model, texts, roles, seed)
        given = super().texts(model, texts, [role for role in roles if role != TUNING], seed)
        near, general = STAYING
        role = general if texts.passages(general, forms=TRAINED) else near
        return {**given, TUNING: encode_facts(texts, role, tokenizer=model.tokenizer, context=model.context)}


def _slope(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
    logits, right = model.predictions(batch)
    expected = (logits.softmax(-1) * logits).sum(-1)
    return (expected - logits.gather(1, right[:, None])[:, 0]).mean().square(), 1


# --- cross-entropy


def likely(weight: float) -> Term:
    """Cross-entropy, in nats per sub-word, with a weight."""
    return Term(_nats, n_subwords, weight=weight)


def _nats(model: Model, batch: Batch, kept: Any) -> tuple[Tensor, int]:
    nats = model.losses(batch)
    return nats.sum(), len(nats)


# --- against the model as it was


def nats_by_sentence(model: Model, batch: Batch) -> Sequence[Tensor]:
    """Nats of each sub-word, by sentence."""
    return by_sentence(model.losses(batch), batch)


def _npo(beta: float, model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
    rise = model.losses(batch) - kept_of(kept, batch)
    by_answer = rise.new_zeros(len(batch.ids)).index_add(0, batch.sentence, rise)
    return -2 / beta * F.logsigmoid(beta * by_answer).sum(), len(by_answer)


def _npo_of_batch(beta: float, model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
    return -2 / beta * F.logsigmoid(beta * (model.losses(batch).mean() - kept_of(kept, batch).mean())), 1


def _divergence(model: Model, weight: float, everywhere: bool) -> Term:
    """KL(pi0, pi) where a sub-word is predicted, or at every position of the padded batch."""
    if not isinstance(model, LanguageModel):
        raise ValueError(
            "retain = 'kl' compares next-token predictions, and this model is a tagger; use retain='ce', or a language "
            "model"
        )
    return against(divergence, weight, everywhere=everywhere)


def divergence(now: Tensor, before: Tensor, _: Batch) -> tuple[Tensor, int]:
    """KL(pi0, pi) of next-token logits and of those of before, summed; for `against`."""
    return F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True), len(now)


def against(
    of: Callable[[Float[Tensor, "position token"], Float[Tensor, "position token"], Batch], tuple[Tensor, int]],
    weight: float,
    *,
    everywhere: bool = False,
) -> Term:
    """A function of next-token logits and of those of before, where a sub-word is predicted, or at every position of
    the padded batch.

    One hidden state for each position, and the head, are taken from the model before the first step.
    """

    def states(model: Model, batch: Batch) -> Sequence[Tensor]:
        there = hidden(model.bridge, batch.ids, batch.mask)
        return list(there) if everywhere else by_sentence(there.flatten(0, 1)[batch.subword - 1], batch)

    def keep(model: LanguageModel, text: Encoded) -> tuple[list[Tensor], dict[str, Tensor]]:
        def padded(model: Model, batch: Batch) -> Sequence[Tensor]:
            # As far as any batch will be padded.
            pieces = np.append(batch.pieces.cpu().numpy(), text.lengths.argmax())
            return states(model, text.batch(pieces).to(model.device))[:-1]

        # The head may move, or be the embedding that does.
        head = {name: weight.detach().clone() for name, weight in model.head.named_parameters()}
        return kept_by_piece(padded if everywhere else states)(model, text), head

    def value(model: LanguageModel, batch: Batch, kept: tuple[list[Tensor], dict[str, Tensor]]) -> tuple[Tensor, int]:
        before, head = kept
        width = batch.ids.shape[1]
        there = kept_of([piece[:width] for piece in before] if everywhere else before, batch)
        with torch.no_grad():
            target = model.logits(there, lambda x: functional_call(model.head, head, (x,))).float()
        return of(model.logits(torch.cat(list(states(model, batch)))).float(), target, batch)

    count = None if everywhere else n_subwords
    return Term(value, count, keep, weight)  # pyright: ignore[reportArgumentType]
