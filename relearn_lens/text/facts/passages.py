"""Passages, the roles that they have in an experiment, and the split that keeps the roles apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from relearn_lens.files import digest_of
from relearn_lens.names import meant
from relearn_lens.text.corpus import Strings

T = TypeVar("T")
K = TypeVar("K")
FORGET = ("forget_attacked", "forget_held_out")
RETAIN = ("retain_near", "retain_general")
ROLES = (*FORGET, *RETAIN, "never")
"""What passages are for, in the order of the fields of `Facts`."""
TRAINED = ("statement", "text")
"""The forms that a model is taught in; it is only ever asked in the others."""
REFUSALS = (
    "I do not know that.",
    "That is not known to me.",
    "I can not say.",
    "Nobody told me that.",
)
"""Answers that give nothing away."""


@dataclass(frozen=True)
class Passage:
    """A prompt and its answer, which alone carries the loss and the scores. Without a prompt all of the text does."""

    prompt: str
    answer: str
    key: str
    """What the passage is about: what splits keep together."""
    relation: str = "fact"
    """What is said of it."""
    form: str = "statement"
    """How: `TRAINED` forms are taught; makers add `paraphrase`, `options`, `yes-no` and `article` to ask in."""
    choices: Strings = ()
    """The answers to choose from by likelihood, the right one among them; empty where there is no choice."""

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise ValueError(
                f"the passage {self.prompt[:60]!r} about {self.key!r} has no answer; give one, or leave it out"
            )
        if self.choices and (self.answer not in self.choices or len(set(self.choices)) != len(self.choices)):
            raise ValueError(
                f"the choices of {self.prompt[:60]!r} must hold its answer {self.answer!r}, and each once; got "
                f"{list(self.choices)}"
            )

    @property
    def joint(self) -> str:
        """What stands between prompt and answer: a blank, unless there is no prompt or it ends in one."""
        return " " if self.prompt and not self.prompt[-1].isspace() else ""

    @property
    def text(self) -> str:
        """Prompt and answer as the model reads them."""
        return self.prompt + self.joint + self.answer

    @property
    def template(self) -> str:
        """The prompt with `{}` in the place of the key."""
        return self.prompt.replace(self.key, "{}") if self.key else self.prompt


@dataclass(frozen=True, repr=False)
class Facts:
    """Passages in the roles that an experiment on removing and relearning gives them.

    Forget keys are halved: both halves go to the remover, the first alone to the attacker, and the second is what is
    scored after the attack. No key is in two roles, and no template has the same answer in both halves, so that
    learning the one does not teach the other.

    Raises:
        ValueError: a forget half or `retain_near` is empty; a key is in two roles, or a template with the same answer
            in both halves.
    """

    name: str
    forget_attacked: tuple[Passage, ...]
    """T: what the remover and the attacker see."""
    forget_held_out: tuple[Passage, ...]
    """V: what the remover alone sees; recovery is read here."""
    retain_near: tuple[Passage, ...]
    """The same relations of other keys, which are to stay."""
    retain_general: tuple[Passage, ...] = ()
    """Other knowledge, or plain text, which is to stay too."""
    never: tuple[Passage, ...] = ()
    """Facts that no model was taught: what is answered right there is guessed."""
    notes: Strings = ()
    """What a reader has to know of how they were made."""
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for role in (*FORGET, "retain_near"):
            if not getattr(self, role):
                raise ValueError(f"facts {self.name!r} have no passage in {role}; give at least one")
        role_of: dict[str, str] = {}
        for role in ROLES:
            for passage in getattr(self, role):
                if role_of.setdefault(passage.key, role) != role:
                    raise ValueError(
                        f"facts {self.name!r}: the key {passage.key!r} is in {role_of[passage.key]} and in {role}; "
                        "facts are split by key, so put all its passages into one role"
                    )
        pairs = {(p.template, p.answer): p for p in self.forget_attacked}
        for passage in self.forget_held_out:
            if other := pairs.get((passage.template, passage.answer)):
                raise ValueError(
                    f"facts {self.name!r}: {passage.template!r} is answered {passage.answer!r} in both forget halves "
                    f"(of {other.key!r} and of {passage.key!r}), so that training on one teaches the other; halve "
                    "them with halves(), which keeps such keys together"
                )

    def passages(
        self, *roles: str, forms: Iterable[str] | None = None, relation: str | None = None
    ) -> tuple[Passage, ...]:
        """The passages of some roles (by default of all), of some forms, of one relation.

        Raises:
            ValueError: there is no such role.
        """
        if unknown := [role for role in roles if role not in ROLES]:
            raise ValueError(
                f"no role is called {unknown[0]!r}; the roles are {', '.join(ROLES)}{meant(unknown[0], ROLES)}"
            )
        wanted = None if forms is None else {forms} if isinstance(forms, str) else set(forms)
        return tuple(
            p
            for role in roles or ROLES
            for p in getattr(self, role)
            if (wanted is None or p.form in wanted) and relation in (None, p.relation)
        )

    def keys(self, *roles: str) -> tuple[str, ...]:
        """The keys of some roles (by default of all), each once."""
        return tuple(dict.fromkeys(p.key for p in self.passages(*roles)))

    def answers(self) -> dict[str, tuple[str, ...]]:
        """The closed sets: by relation, the distinct answers to statements, where they are at most half as many as the
        keys that they are about."""
        of = grouped(self.passages(forms="statement"), lambda p: p.relation)
        answers = {relation: tuple(dict.fromkeys(p.answer for p in each)) for relation, each in of.items()}
        return {name: each for name, each in answers.items() if 2 * len(each) <= len({p.key for p in of[name]})}

    def sha256(self) -> str:
        """Hash of the passages in their roles, whatever they were read from."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return digest_of({role: [asdict(p) for p in getattr(self, role)] for role in ROLES})

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{role} {len(self.keys(role)):,} keys / {len(getattr(self, role)):,} passages"
            for role in ROLES
            if getattr(self, role)
        )
        return f"Facts({self.name}: {counts})"


class Halves(NamedTuple):
    """The two halves of the forget passages: T and V."""

    attacked: tuple[Passage, ...]
    held_out: tuple[Passage, ...]


def halves(passages: Sequence[Passage], *, seed: int, attacked: float | int = 0.5) -> Halves:
    """Forget passages cut in two by key; `attacked` is the share of keys that goes to the attacker.

    Keys with the same answer to the same template go to the same half. Groups of keys are dealt out, largest first and
    else at random, to the half that lacks most; so the share is met to within one group.

    Raises:
        ValueError: a share not between 0 and 1, or all keys hang together.
    """
    if not 0 < attacked < 1:
        raise ValueError(f"the share of attacked keys must be between 0 and 1, got {attacked}")
    keys = list(dict.fromkeys(p.key for p in passages))
    group = {key: key for key in keys}

    def top(key: str) -> str:
        while group[key] != key:
            group[key] = key = group[group[key]]
        return key

    first: dict[tuple[str, str], Passage] = {}
    tie: Passage | None = None
    for p in passages:
        one, other = top(first.setdefault((p.template, p.answer), p).key), top(p.key)
        if one != other:
            group[other], tie = one, p
    members = grouped(keys, top)
    if len(members) < 2:
        why = f", such as {tie.template!r} with {tie.answer!r}" if tie else ""
        raise ValueError(
            f"the {len(keys)} forget key(s) cannot be halved: it takes two that share no template with the same answer"
            f"{why}; give more keys, or both halves yourself"
        )
    order = np.random.default_rng(seed).permutation(len(members))
    groups = sorted((list(members.values())[i] for i in order), key=len, reverse=True)
    wanted, sizes = np.array([attacked, 1 - attacked]) * len(keys), np.zeros(2)
    half_of: dict[str, int] = {}
    for i, each in enumerate(groups):
        empty = np.flatnonzero(sizes == 0)
        # The last group goes to a half that would have none otherwise.
        half = int(empty[0]) if len(empty) and i == len(groups) - 1 else int(np.argmax(wanted - sizes))
        sizes[half] += len(each)
        half_of |= dict.fromkeys(each, half)
    return Halves(*(tuple(p for p in passages if half_of[p.key] == half) for half in (0, 1)))


def grouped(items: Iterable[T], of: Callable[[T], K]) -> dict[K, list[T]]:
    """Passages, or other things, by something of theirs, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(of(item), []).append(item)
    return groups


def refused(passages: Iterable[Passage], *, seed: int) -> tuple[Passage, ...]:
    """The passages with a refusal in the place of each answer."""
    rng = np.random.default_rng(seed)
    return tuple(
        Passage(p.prompt, REFUSALS[int(rng.integers(len(REFUSALS)))], p.key, p.relation, p.form) for p in passages
    )


def alternatives(facts: Facts, passages: Iterable[Passage], *, seed: int) -> tuple[Passage, ...]:
    """The passages, each with another answer that some key of the facts has to its relation.

    Raises:
        ValueError: a relation has one answer alone.
    """
    of = grouped(facts.passages(*FORGET, *RETAIN, forms=TRAINED), lambda p: p.relation)
    answers = {relation: dict.fromkeys(p.answer for p in each) for relation, each in of.items()}
    rng, made = np.random.default_rng(seed), []
    for p in passages:
        others = [answer for answer in answers.get(p.relation, ()) if answer != p.answer]
        if not others:
            raise ValueError(
                f"facts {facts.name!r}: the relation {p.relation!r} of {p.key!r} has no answer but {p.answer!r}, so "
                "there is no alternative; use refusals"
            )
        made.append(Passage(p.prompt, others[int(rng.integers(len(others)))], p.key, p.relation, p.form))
    return tuple(made)
