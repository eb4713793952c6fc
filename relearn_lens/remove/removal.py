"""What all removers that train share: a weighted sum of terms, each on the text of its role, that the one loop lowers.

A remover is a frozen object that says what it lowers; called on a model and texts it is a training like any other. A
remover of one's own is a function with the signature of an objective: `removers.remove_` takes it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from torch import Tensor

from relearn_lens import methods
from relearn_lens.methods import Method, Rate, Training
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.models.training import Checkpoint, Checkpoints, Objective, Parts, Step, Stepped, plain, train_
from relearn_lens.names import meant
from relearn_lens.neurons.weights import WeightMask, output_matrices
from relearn_lens.text import facts
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded
from relearn_lens.text.facts import Facts
from relearn_lens.text.facts.encoded import encode_facts

FORGET, RETAIN = "forget", "retain"
"""The roles of texts: what is to go, and what is to stay."""
ROLES: Mapping[str, tuple[str, ...]] = {FORGET: facts.FORGET, RETAIN: facts.RETAIN}
"""Of facts, what goes into the text of each role: in the wordings that a model is trained in."""
Texts = Mapping[str, Corpus | Encoded] | Facts
"""Texts by role, or facts, whose roles say the same."""


Entries = Mapping[str, Bool[Tensor, "..."]] | None
"""Of weights by plain name, which of their entries may move; None: all."""


class Removing(Training):
    """Training that takes something out. Defaults: those of open-unlearning for all of its methods (8 sentences in each
    of 4 parts)."""

    epochs: float = Field(default=10, gt=0, le=10_000, description="passes over what is to be forgotten")
    lr: Rate = Field(default=1e-5, description="highest learning rate")
    batch_size: int = Field(default=32, ge=1, le=100_000, description="sentences of each text per step")


@dataclass(frozen=True)
class Term:
    """One term of a loss, on the text of one role."""

    value: Callable[[Any, Any, Any], tuple[Tensor, int]]
    """Its sum on a batch, and over how many it is a mean; the third argument is what `keep` gave."""
    count: Callable[[Any, np.ndarray], int] | None
    """Over how many it is for some pieces of a text; None: only a whole batch can say, so it cannot go in parts."""
    keep: Callable[[Any, Any], Any] | None = None
    """What it compares with: taken from the model, for a whole text, before the first step."""
    weight: float = 1.0
    beside: str | None = None
    """A role whose text says something of the same pieces: `value` is given a pair of batches, and `keep` and
    `count` of texts."""
    memory: dict[str, Tensor] | None = None
    """What it knows from one step to the next; terms of a loss share one."""
    after: Callable[[Model, Stepped, Any], object] | None = None
    """Called when a step was taken, with what `keep` gave."""


def weighted(name: str, terms: Mapping[str, Term]) -> Objective:
    """The objective that is a sum of terms by role."""

    def objective(model: Model, batches: Mapping[str, Batch], reference: Any) -> Parts:
        parts = {}
        for role, term in terms.items():
            value, n = term.value(model, _with_beside(term, role, batches), (reference or {}).get(role))
            parts[role] = (term.weight * value, n)
        return parts

    def after(model: Model, stepped: Stepped) -> None:
        for role, term in terms.items():
            if term.after:
                term.after(model, stepped, (stepped.reference or {}).get(role))

    objective.__name__ = name
    objective.memory = next((term.memory for term in terms.values() if term.memory is not None), {})
    if any(term.after for term in terms.values()):
        objective.after = after
    if any(term.keep for term in terms.values()):
        objective.reference = lambda model, texts: {
            role: term.keep(model, _with_beside(term, role, texts)) for role, term in terms.items() if term.keep
        }
    if all(term.count for term in terms.values()):
        objective.counts = lambda texts, pieces: {
            role: term.count(_with_beside(term, role, texts), pieces[role])
            for role, term in terms.items()
            if term.count
        }
    return objective


def _with_beside(term: Term, role: str, of: Mapping[str, Any]) -> Any:
    return of[role] if term.beside is None else (of[role], of[term.beside])


def texts_of(model: Model, texts: Texts | None, roles: Iterable[str], what: str) -> dict[str, Corpus | Encoded]:
    """The texts of some roles; `what` needs them, in its own words.

    Raises:
        ValueError: a role has no text, or facts for a model that does not predict words.
    """
    if not isinstance(texts, Facts):
        texts = texts or {}
        if missing := [role for role in roles if role not in texts]:
            raise ValueError(
                f"{what}, and there is no text for {missing[0]!r}; texts are there for {', '.join(texts) or 'nothing'}"
            )
        return {role: texts[role] for role in roles}
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"facts {texts.name!r} are answered by a language model, and this model is a tagger; give labelled texts "
            f"as {{{', '.join(map(repr, ROLES))}}}, or a language model"
        )
    if unknown := [role for role in roles if role not in ROLES]:
        raise ValueError(
            f"{what}, and facts have no text for {unknown[0]!r}; they have {', '.join(ROLES)}{meant(unknown[0], ROLES)}"
        )
    try:
        return {
            role: encode_facts(texts, *ROLES[role], tokenizer=model.tokenizer, context=model.context) for role in roles
        }
    except ValueError as error:
        raise ValueError(f"{what}; {error}") from None


def block_of(model: Model, wanted: int | None, usual: Callable[[int], int]) -> int:
    """A block, or the one that is usual in so many.

    Raises:
        ValueError: the model does not have it.
    """
    n = int(model.bridge.cfg.n_layers)
    layer = usual(n) if wanted is None else wanted
    if layer >= n:
        raise ValueError(f"layer = {layer}: this model has {n} blocks, 0 to {n - 1}")
    return layer


def blocks_of(model: Model, wanted: tuple[int, ...] | None, usual: Callable[[int], Iterable[int]]) -> tuple[int, ...]:
    """Blocks, or those that are usual in so many.

    Raises:
        ValueError: the model does not have one of them.
    """
    n = int(model.bridge.cfg.n_layers)
    layers = tuple(sorted(set(usual(n)))) if wanted is None else wanted
    if not layers or not all(0 <= layer < n for layer in layers):
        raise ValueError(f"layers = {list(layers)}: this model has {n} blocks, 0 to {n - 1}")
    return layers


def written(model: Model, blocks: Iterable[int]) -> dict[str, Bool[Tensor, ...]]:
    """All of the MLPs' output matrices of some blocks, as entries that may move."""
    plain = model.plain()
    return {name: torch.ones_like(plain[name], dtype=torch.bool) for name in output_matrices(model, blocks)}


def n_pieces(_: Any, pieces: np.ndarray) -> int:
    """Of some pieces of a text, their number: a `Term.count`."""
    return len(pieces)


def n_subwords(text: Encoded, pieces: np.ndarray) -> int:
    """Sub-words of some pieces of a text: a `Term.count`."""
    return text.n_subwords(pieces)


def by_sentence(values: Float[Tensor, "subword ..."], batch: Batch) -> Sequence[Tensor]:
    """What there is of each sub-word of a batch, cut into sentences."""
    return values.split(torch.bincount(batch.sentence, minlength=len(batch.ids)).tolist())


def kept_by_piece(of: Callable[[Model, Batch], Sequence[Tensor]]) -> Callable[[Model, Encoded], list[Tensor]]:
    """What `of` gives for each sentence of a batch, for every piece of a text, on the CPU: a `Term.keep`."""

    def keep(model: Model, text: Encoded) -> list[Tensor]:
        each: list[Tensor] = [torch.empty(0)] * text.n_pieces
        for pieces in text.cuts():
            for piece, value in zip(pieces, of(model, text.batch(pieces).to(model.device)), strict=True):
                each[piece] = value.detach().cpu()
        return each

    return keep


def kept_of(kept: list[Tensor], batch: Batch) -> Shaped[Tensor, "subword ..."]:
    """What was kept of a batch's pieces, where the batch is."""
    return torch.cat([kept[piece] for piece in batch.pieces.tolist()]).to(batch.ids.device)


class Remover(Method):
    """Takes what one text says out of a model by training, and may keep what another says."""

    name: ClassVar[str]
    formula: ClassVar[str]
    """What it lowers. pi: the model; pi0: as it was; y: an answer; f, r: what is forgotten and what retained."""
    source: ClassVar[str]
    usual: ClassVar[Training] = Removing()
    """How it trains unless something else is asked for."""
    fresh: ClassVar[bool] = False
    """Whether it teaches a model that knows nothing yet; used on one that does, it is a negative control."""

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        """What it lowers, by role of text; the first role gives the steps of an epoch."""
        raise NotImplementedError

    def texts(self, model: Model, texts: Texts | None, roles: Iterable[str], seed: int) -> dict[str, Corpus | Encoded]:
        """The texts of the roles that it needs; what it makes of facts beside what `ROLES` says.

        Raises:
            ValueError: as `texts_of`.
        """
        return texts_of(model, texts, roles, f"{self.name} lowers {self.formula}")

    def objective(self, model: Model, terms: Mapping[str, Term], where: Entries, seed: int) -> Objective:
        """What the loop lowers: the sum of the terms."""
        return weighted(self.name, terms)

    def entries(self, model: Model) -> Entries:
        """Which entries of the weights move unless something else is asked for; None: all."""
        return None

    def __call__(
        self,
        model: Model,
        texts: Texts,
        where: Mapping[str, Bool[Tensor, ...]] | None = None,
        *,
        seed: int = 0,
        how: Training | None = None,
        step: Step = plain,
        reference: Any = None,
        resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
        **fields: Any,
    ) -> Checkpoints:
        """Train it out; yields as `train_` does.

        `texts` has a text for each role: `forget`, and `retain` where something is to be kept; of facts both forget
        halves and all that is to stay, in the wordings that a model is trained in. `where` maps plain names of weights
        to which of their entries may move (None: what is usual for this remover). `how` says all about the optimiser,
        and `fields` are single fields of it; `step` is a wrapper (`wrappers.SAM`). Other keywords as of `train_`.

        Raises:
            ValueError: no text for a role that it needs, facts for a tagger, a mask of another model, and as `train_`;
                at the call.
        """
        terms = self.terms(model, seed)
        beside = {term.beside: role for role, term in terms.items() if term.beside}
        if isinstance(where, WeightMask):
            where.check(model)
        where = self.entries(model) if where is None else where
        return train_(
            model,
            self.texts(model, texts, [*terms, *beside], seed),
            methods.of(Removing, how or self.usual, fields),
            objective=self.objective(model, terms, where, seed),
            step=step,
            only=where,
            beside=beside,
            reference=reference,
            seed=seed,
            resume=resume,
            what=f"removing by {self.name}",
        )
