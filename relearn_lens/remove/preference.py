"""Removers that teach another answer in the place of the forgotten one: a refusal, or one that is not true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.models.model import Model
from relearn_lens.remove.losses import Keeping, likely, nats_by_sentence
from relearn_lens.remove.removal import (
    FORGET,
    ROLES,
    Term,
    Texts,
    kept_by_piece,
    kept_of,
    n_pieces,
    n_subwords,
    texts_of,
)
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded
from relearn_lens.text.facts import TRAINED, Facts, Passage, alternatives, refused
from relearn_lens.text.facts.encoded import encode_passages

PREFERRED = "preferred"
"""The role of the text that says, piece by piece, what is to be answered in the place of the forgotten text."""
Answers = Literal["idk", "alt_po"]
"""Which preferred answers are made of facts: refusals, or other answers of the relation."""


def preferred(facts: Facts, answers: Answers, *, seed: int) -> tuple[Passage, ...]:
    """Of all passages that are to be forgotten, in the wordings that a model is trained in, those with another answer.

    Raises:
        ValueError: `alt_po`, and a relation has no other answer.
    """
    passages = facts.passages(*ROLES[FORGET], forms=TRAINED)
    return refused(passages, seed=seed) if answers == "idk" else alternatives(facts, passages, seed=seed)


class Preferring(Keeping):
    """What all of these need: a text of preferred answers, which are made where facts are given."""

    answers: Answers = Field(
        default="idk", description="preferred answers that are made of facts; idk: refusals; alt_po: other answers"
    )

    def texts(self, model: Model, texts: Texts | None, roles: Iterable[str], seed: int) -> dict[str, Corpus | Encoded]:
        """As of `Remover`, with the preferred answers."""
        if not isinstance(texts, Facts):
            return super().texts(model, texts, roles, seed)
        given = texts_of(model, texts, [r for r in roles if r != PREFERRED], f"{self.name} lowers {self.formula}")
        made = preferred(texts, self.answers, seed=seed)
        encoded = encode_passages(made, model.tokenizer, context=model.context, name=f"{texts.name}, {self.answers}")
        return {role: encoded if role == PREFERRED else given[role] for role in roles}


def likelier(weight: float) -> Term:
    """Cross-entropy of the preferred answers, in nats per sub-word, with a weight."""
    own = likely(weight)
    return replace(
        own,
        value=lambda model, batches, kept: own.value(model, batches[1], kept),
        count=lambda texts, pieces: n_subwords(texts[1], pieces),
        beside=PREFERRED,
    )


class IDK(Preferring):
    """Teaches to refuse, by the cross-entropy of refusals.

    Source: Maini et al. 2024 (TOFU).
    """

    name: ClassVar[str] = "idk"
    formula: ClassVar[str] = "CE(preferred) + alpha (CE_r or KL_r(pi0, pi))"
    source: ClassVar[str] = "Maini et al. 2024 (TOFU)"

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        return {FORGET: likelier(1.0), **self.kept(model)}


class DPO(Preferring):
    """Direct preference optimisation: the preferred answer over the forgotten one, each against what it was.

    s(y) is the log-probability of an answer, summed over its sub-words, minus what it was before; the mean is over
    answers. The text `preferred` goes beside `forget`, piece by piece; of facts it is made: refusals, or with
    `answers="alt_po"` other answers of the same relation.

    Source: Rafailov et al. 2023; Maini et al. 2024 (TOFU), scaled as in open-unlearning.
    """

    name: ClassVar[str] = "dpo"
    formula: ClassVar[str] = (
        "-(2 / beta) mean log sigmoid(beta (s(preferred) - s(forget))), s = log pi - log pi0; + alpha (CE_r or KL_r)"
    )
    source: ClassVar[str] = "Rafailov et al. 2023; Maini et al. 2024 (TOFU)"

    beta: float = Field(default=0.1, gt=0, le=1e3, description="inverse temperature, per nat (open-unlearning)")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        nats = kept_by_piece(nats_by_sentence)

        def value(model: Model, batches: tuple[Batch, Batch], kept: Sequence[list[Tensor]]) -> tuple[Tensor, int]:
            rises = []
            for batch, before in zip(batches, kept, strict=True):
                rise = model.losses(batch) - kept_of(before, batch)
                rises.append(rise.new_zeros(len(batch.ids)).index_add(0, batch.sentence, rise))
            forgotten, better = rises
            return -2 / self.beta * F.logsigmoid(self.beta * (forgotten - better)).sum(), len(better)

        forget = Term(value, n_pieces, lambda model, texts: [nats(model, text) for text in texts], beside=PREFERRED)
        return {FORGET: forget, **self.kept(model)}


class AltPO(DPO):
    """Preference optimisation of alternative answers: `DPO` with other answers of the same relation as the preferred.

    Published: beta .05, .1 or .5, alpha 1, 2 or 5; there the alternatives are written by the model itself, here they
    are answers that other keys have.

    Source: Mekala et al. 2024 (AltPO).
    """

    name: ClassVar[str] = "alt_po"
    source: ClassVar[str] = "Mekala et al. 2024 (AltPO)"

    answers: Answers = Field(default="alt_po", description=Preferring.model_fields["answers"].description)
