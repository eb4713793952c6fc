"""What a model answers: greedily, in nats, and among choices, with the sums that intervals over keys are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped

from relearn_lens.measure.asking import Read, read_answers
from relearn_lens.measure.keymeans import KeyMeans, means_of, tabulated
from relearn_lens.methods import MAX_TOKENS
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import explained
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.encoded import EncodedPassages


class AnswerAccuracy(KeyMeans):
    """Share of passages that are answered right. Intervals are over keys: the passages of a key are drawn together."""

    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share answered right, 0 to 1"
    quantity: ClassVar[str] = "accuracy"


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class AnswerLoss(KeyMeans):
    """Loss on the tokens of answers, each given all before it. Intervals are over keys.

    `value` is what the model gains over a uniform guess among all tokens, so that shares can be taken of it.
    """

    metric: ClassVar[str] = "loss"
    unit: ClassVar[str] = "nats per answer token"
    quantity: ClassVar[str] = "gain over a uniform guess"
    better: ClassVar[str] = "nats better than"
    worse: ClassVar[str] = "nats worse than"
    _what: ClassVar[str] = "nats per answer token"

    tokens: Int[np.ndarray, "key label"]
    vocabulary: int
    """Number of tokens that a uniform guess chooses from."""

    @property
    def weight(self) -> Float[np.ndarray, "key label"]:
        """Tokens of answers."""
        return self.tokens.astype(float)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Nats per answer token gained over a uniform guess."""
        return np.asarray(math.log(self.vocabulary) - super().of_sums(sums))

    def displayed(self, value: float) -> float:
        """The loss, in nats per answer token."""
        return math.log(self.vocabulary) - value


class Answered(NamedTuple):
    """What `answer` gives."""

    accuracy: AnswerAccuracy
    loss: AnswerLoss


@explained
def answer(
    model: LanguageModel,
    passages: Sequence[Passage] | EncodedPassages,
    *,
    closed: Mapping[str, Sequence[str]] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Answered:
    """How many passages a model answers greedily, word for word, and its loss on the tokens of the answers.

    A passage is right where every token of its answer is the likeliest after the prompt and the answer so far: that is
    what decoding greedily would write. Nothing is sampled; what would follow the answer is not looked at.

    `closed` gives the possible answers of a relation (`Facts.answers()`). A guess is even among them; of other
    relations it is never right, and even among all tokens.

    Raises:
        ValueError: no passage; or as `encode_passages`.
    """
    read = read_answers(model, passages, max_tokens=max_tokens)
    return answered(read, [p.relation for p in read.passages], closed)


def answered(read: Read, labels: Sequence[str], closed: Mapping[str, Sequence[str]] | None = None) -> Answered:
    """What `answer` gives, of answers that were read already; labelled by one name per passage."""
    sizes = np.array([len((closed or {}).get(p.relation, ())) for p in read.passages])
    is_closed, sizes = sizes > 0, np.maximum(sizes, 1)
    n, nats, vocabulary = read.tokens, read.summed(read.nats), read.vocabulary
    keys, names, sums = tabulated(
        read.passages, labels, read.right.astype(float), is_closed / sizes, nats,
        np.where(is_closed, np.log(sizes), n * math.log(vocabulary)), n.astype(float), 1.0,
    )  # fmt: skip
    right, guessed, nats, guessed_nats, n, count = sums
    count, n = count.astype(np.int64), n.astype(np.int64)
    return Answered(
        AnswerAccuracy(right, guessed, count, keys, names),
        AnswerLoss(nats, guessed_nats, count, keys, names, n, vocabulary),
    )


@explained
def choose(
    model: LanguageModel,
    passages: Sequence[Passage],
    *,
    per_token: bool = False,
    labels: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> AnswerAccuracy:
    """How often the right one of a passage's choices is the likeliest answer.

    Likelihood is summed over the tokens of a choice, or with `per_token` their mean, which favours long choices less
    than the sum does short ones. Of choices that are alike to the bit, each counts as an even share. `labels` are one
    name per passage; by default its relation.

    Raises:
        ValueError: no passage, or one without choices; or as `encode_passages`.
    """
    if without := [p for p in passages if not p.choices]:
        raise ValueError(
            f"{len(without)} of {len(passages)} passages have no choices, such as {without[0].prompt[:60]!r} of form "
            f"{without[0].form!r}; pass only forms that have (statement, paraphrase, options, yes-no of made facts)"
        )
    best = [nats == nats.min() for nats in nats_of_choices(model, passages, per_token, max_tokens)]
    each = np.array([of[p.choices.index(p.answer)] / of.sum() for p, of in zip(passages, best, strict=True)])
    return means_of(AnswerAccuracy, passages, each, 1 / np.array([len(of) for of in best]), labels)


def nats_of_choices(
    model: LanguageModel, passages: Sequence[Passage], per_token: bool = False, max_tokens: int = MAX_TOKENS
) -> list[Float[np.ndarray, " choice"]]:
    """Nats of every choice of each passage, summed over its tokens or their mean."""
    every = [replace(p, answer=choice) for p in passages for choice in p.choices]
    read = read_answers(model, every, max_tokens=max_tokens)
    nats = read.summed(read.nats) / (read.tokens if per_token else 1)
    return np.split(nats, np.cumsum([len(p.choices) for p in passages])[:-1])


@explained
def known(model: LanguageModel, passages: Sequence[Passage]) -> tuple[Passage, ...]:
    """The passages of the facts that a model knows: of a key and relation, one statement at least is answered
    greedily, and every paraphrase that has choices prefers the right one.

    Raises:
        ValueError: no statement among the passages; or as `answer`.
    """
    statements = [p for p in passages if p.form == "statement"]
    right = read_answers(model, statements).right
    facts = {(p.key, p.relation) for p, is_right in zip(statements, right, strict=True) if is_right}
    reworded = [p for p in passages if p.form == "paraphrase" and p.choices and (p.key, p.relation) in facts]
    if reworded:
        each = [replace(p, key=str(i)) for i, p in enumerate(reworded)]
        chosen = choose(model, each).by_key()
        facts -= {(p.key, p.relation) for i, p in enumerate(reworded) if chosen[str(i)] < 1}
    return tuple(p for p in passages if (p.key, p.relation) in facts)
