"""Ways back that change no weight: other words for the same question, and facts of T before it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from relearn_lens.models.training import Checkpoint
from relearn_lens.relearn.attack import ATTACKED, GENERAL, NEAR, STILL, Material, Passing, only_facts
from relearn_lens.text.facts import Facts, Passage
from relearn_lens.text.facts.passages import grouped


class Asking(Passing):
    """A way back that is in how passages are asked (`asked`); the model is left as it is."""

    def check(self, facts: Facts) -> None:
        """Refuse facts that the prompts cannot be made from."""
        raise NotImplementedError

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        """As of `Passing`: nothing changes, ask passages as `asked` says."""
        self.check(only_facts(facts, self.name))
        return nullcontext(STILL)


class InContext(Asking):
    """Puts facts of T before each question, a line each.

    `facts`: statements of T, drawn for each passage by seed. `summary`: for so many keys of T one line each that says
    all relations. `unrelated`, the control: statements of other knowledge, or where there is none of retained facts
    near by. None is about the passage's own key.

    Source: Lynch et al. 2024, Shumailov et al. 2024 (in-context relearning).
    """

    name: ClassVar[str] = "in_context"
    source: ClassVar[str] = "Lynch et al. 2024; Shumailov et al. 2024"

    kind: Literal["facts", "summary", "unrelated"] = Field(default="facts", description="what stands before a question")
    examples: int = Field(default=4, ge=1, le=10_000, description="lines before a question")

    def check(self, facts: Facts) -> None:
        if not self._lines(facts):
            raise ValueError(f"in_context: facts {facts.name!r} have no statement to put before a question")

    def asked(self, passages: Sequence[Passage], facts: Facts, *, seed: int = 0) -> tuple[Passage, ...]:
        """Each behind so many lines; fewer where there are fewer."""
        self.check(facts)
        lines = self._lines(facts)
        made = []
        for i, passage in enumerate(passages):
            order = np.random.default_rng([seed, i]).permutation(len(lines))
            others = (lines[at][1] for at in order if lines[at][0] != passage.key)
            chosen = [line for line, _ in zip(others, range(self.examples), strict=False)]
            made.append(replace(passage, prompt="".join(f"{line}.\n" for line in chosen) + passage.prompt))
        return tuple(made)

    def _lines(self, facts: Facts) -> list[tuple[str, str]]:
        """Key and line."""
        if self.kind != "summary":
            roles = (ATTACKED,) if self.kind == "facts" else (GENERAL, NEAR)
            given = next(filter(None, (facts.passages(role, forms=("statement",)) for role in roles)), ())
            return [(p.key, p.text) for p in given]
        by_key = grouped(facts.passages(ATTACKED, forms=("statement",)), lambda p: p.key)
        known = {key: {p.relation: p.answer for p in each} for key, each in by_key.items()}
        return [(key, f"{key}: {', '.join(map(' '.join, each.items()))}") for key, each in known.items()]


class _Reworded(Asking):
    """Asks for the same in another form."""

    def forms(self) -> str:
        """The form that is asked in."""
        raise NotImplementedError

    def check(self, facts: Facts) -> None:
        if not facts.passages(forms=(self.forms(),)):
            there = dict.fromkeys(p.form for p in facts.passages())
            raise ValueError(
                f"{self.name}: facts {facts.name!r} have no passage of the form {self.forms()!r}; their forms are "
                f"{', '.join(there)}"
            )

    def asked(self, passages: Sequence[Passage], facts: Facts, *, seed: int = 0) -> tuple[Passage, ...]:
        """The passages of this form on the same keys and relations, in their order."""
        self.check(facts)
        by_fact = grouped(facts.passages(forms=(self.forms(),)), lambda p: (p.key, p.relation))
        wanted = dict.fromkeys((p.key, p.relation) for p in passages)
        return tuple(p for fact in wanted for p in by_fact.get(fact, ()))


class Paraphrase(_Reworded):
    """Asks in wordings that are never trained on.

    Source: Lynch et al. 2024; Patil et al. 2024.
    """

    name: ClassVar[str] = "paraphrase"
    source: ClassVar[str] = "Lynch et al. 2024; Patil et al. 2024"

    def forms(self) -> str:
        return "paraphrase"


class OtherForm(_Reworded):
    """Asks with four options, or for yes or no.

    Source: Lynch et al. 2024.
    """

    name: ClassVar[str] = "other_form"
    source: ClassVar[str] = "Lynch et al. 2024"

    form: Literal["options", "yes-no"] = Field(default="options", description="how it is asked")

    def forms(self) -> str:
        return self.form
