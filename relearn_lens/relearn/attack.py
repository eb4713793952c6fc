"""What all ways back share: how they are called, what they train on, and how passages are asked under them.

An attack is a frozen object. `attack(model, facts, seed=0)` is an iterator of `Checkpoint`: at each of them the model
is as the attack has it. What a `Passing` attack does ends with its iterator, or with the block of `attack.applied`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

from relearn_lens.methods import Method
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts import ROLES, TRAINED, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

ATTACKED, NEAR, GENERAL = "forget_attacked", "retain_near", "retain_general"
"""The roles that an attacker has: T, and what was to stay."""
Material = Facts | Corpus | Encoded | Mapping[str, Corpus | Encoded]
"""What an attacker has: facts, of which V is never looked at; or labelled text by these roles, or as T alone."""


class Attack(Method):
    """A way back. T: the half of the forgotten keys that the attacker has; V: the half that is scored."""

    name: ClassVar[str]
    source: ClassVar[str]

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        """Attack the model, in place; yields wherever it is to be looked at.

        Raises:
            ValueError: the facts or texts lack what the attack takes, or the model cannot be attacked so; at the call.
        """
        raise NotImplementedError

    def asked(self, passages: Sequence[Passage], facts: Facts, *, seed: int = 0) -> tuple[Passage, ...]:
        """How passages are to be asked while the attack lasts: as they are, unless the attack is in the prompt.

        Raises:
            ValueError: the facts lack what the prompts are made from.
        """
        return tuple(passages)


class Passing(Attack):
    """A way back that undoes itself."""

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        """Attack the model for a while: yields once, and undoes it when the iterator is exhausted or closed.

        Raises:
            ValueError: as `Attack`; at the call.
        """
        return self._once(self.applied(model, facts, seed=seed))

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        """Attack the model for a while: `with attack.applied(model, facts) as checkpoint: ...`

        Raises:
            ValueError: as `Attack`; at the call.
        """
        raise NotImplementedError

    @staticmethod
    def _once(block: AbstractContextManager[Checkpoint]) -> Iterator[Checkpoint]:
        with block as checkpoint:
            yield checkpoint


STILL = Checkpoint(epoch=0.0, step=0, tokens_seen=0, loss=math.nan, by="step")
"""Where an attack that trains nothing stands."""


def texts(
    model: Model, facts: Material, *roles: str, what: str, items: int | None = None, seed: int = 0
) -> Corpus | Encoded:
    """The text of the first of some roles that has any, or a random part of it: so many passages or sentences.

    What is drawn for fewer items is part of what is drawn for more.

    Raises:
        ValueError: no such text, facts for a tagger, or a part of a text that is encoded already.
    """
    if isinstance(facts, Facts):
        if not isinstance(model, LanguageModel):
            raise ValueError(
                f"{what}: facts {facts.name!r} are answered by a language model, and this model is a tagger; give "
                f"labelled text, by role ({', '.join(ROLES)}) or as what it is attacked with"
            )
        passages = next(filter(None, (facts.passages(role, forms=TRAINED) for role in roles)), ())
        if not passages:
            raise ValueError(
                f"{what}: facts {facts.name!r} have no passage in {' or '.join(roles)} of the forms "
                f"{', '.join(TRAINED)}; give them some"
            )
        drawn = _drawn(passages, items, seed)
        return encode_passages(drawn, model.tokenizer, context=model.context, name=facts.name)
    by_role = facts if isinstance(facts, Mapping) else {ATTACKED: facts}
    role = next((role for role in roles if role in by_role), None)
    if role is None:
        raise ValueError(
            f"{what}: there is no text for {' or '.join(map(repr, roles))}; texts are there for "
            f"{', '.join(by_role) or 'nothing'}"
        )
    text = by_role[role]
    if items is None:
        return text
    if isinstance(text, Encoded):
        raise ValueError(
            f"{what}: items = {items} of a text that is encoded already; give the corpus itself, or take its part first"
        )
    return text.take(np.sort(np.random.default_rng(seed).permutation(text.n_sentences)[:items]))


def only_facts(facts: Material, what: str) -> Facts:
    """The facts, for an attack that is made of passages.

    Raises:
        ValueError: a text.
    """
    if not isinstance(facts, Facts):
        raise ValueError(
            f"{what} is made of passages and takes Facts, got {type(facts).__name__}; for labelled text use an attack "
            "that trains, quantises or prunes"
        )
    return facts


def _drawn(passages: tuple[Passage, ...], items: int | None, seed: int) -> tuple[Passage, ...]:
    if items is None or items >= len(passages):
        return passages
    order = np.random.default_rng(seed).permutation(len(passages))[:items]
    return tuple(passages[i] for i in sorted(order.tolist()))
