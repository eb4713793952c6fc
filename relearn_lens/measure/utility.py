"""Side effects: what becomes of what was to stay, and of the text that a model writes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from relearn_lens.measure.asking import Asked, Metric, Reference, asked_of
from relearn_lens.measure.extraction import continued
from relearn_lens.measure.keymeans import KeyMeans, means_of
from relearn_lens.models.model import LanguageModel
from relearn_lens.text.facts import Facts


class RepetitionScores(KeyMeans):
    """Share of written n-grams that were written before; `value` is the share of new ones."""

    metric: ClassVar[str] = "repetition"
    unit: ClassVar[str] = "share of n-grams that repeat an earlier one of the same text, 0 to 1"
    quantity: ClassVar[str] = "share of new n-grams"

    def displayed(self, value: float) -> float:
        """The share that repeats."""
        return 1 - value


class Repetition(Metric):
    """How often a model that goes on greedily from a prompt repeats itself: what a broken one does.

    One prompt of each key and place. Chance is what the base does on the same prompts, where a reference has one; else
    it is not known.

    Source: usual (Welleck et al. 2020, seq-rep-n).
    """

    name: ClassVar[str] = "repetition"
    unit: ClassVar[str] = RepetitionScores.unit
    formula: ClassVar[str] = "1 - distinct n-grams / n-grams, mean over prompts"
    source: ClassVar[str] = "Welleck et al. 2020"
    n: int = Field(default=3, ge=1, le=16, description="tokens of an n-gram")
    tokens: int = Field(default=24, ge=2, le=1024, description="tokens that are written after each prompt")

    def __call__(
        self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None
    ) -> RepetitionScores:
        questions = asked_of(facts).one_prompt_each(self.name)
        guess: np.ndarray | float = np.nan
        if reference is not None and (base := reference.base) is not None:
            guess = reference.once(
                (self.name, self.n, self.tokens, questions.passages), lambda: self._new(base, questions)
            )
        return means_of(RepetitionScores, questions.passages, self._new(model, questions), guess, questions.places)

    def _new(self, model: LanguageModel, questions: Asked) -> np.ndarray:
        """The share of new n-grams of each text, written to its end or to so many tokens."""
        texts = continued(model, [p.prompt for p in questions.passages], self.tokens)
        return np.array([self.new(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts])

    def new(self, tokens: list[int]) -> float:
        """The share of n-grams of a text that are new in it; 1 of a text without any."""
        each = [tuple(tokens[i : i + self.n]) for i in range(len(tokens) - self.n + 1)]
        return len(set(each)) / len(each) if each else 1.0
