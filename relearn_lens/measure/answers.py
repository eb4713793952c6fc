"""What a model answers: greedily, in nats, and among choices, with the sums that intervals over keys are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.measure.evaluation import OVERALL, Label, Scores
from relearn_lens.models import processes
from relearn_lens.models.model import LanguageModel
from relearn_lens.neurons.streaming import stream
from relearn_lens.text.corpus import Strings
from relearn_lens.text.encoding import Batch
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class AnswerAccuracy(Scores):
    """Share of passages that are answered right. Intervals are over keys: the passages of a key are drawn together."""

    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share answered right, 0 to 1"
    quantity: ClassVar[str] = "accuracy"
    better: ClassVar[str] = "above"
    worse: ClassVar[str] = "below"

    right: Float[np.ndarray, "key relation"]
    guessed: Float[np.ndarray, "key relation"]
    """How many a guess would be expected to answer right."""
    passages: Int[np.ndarray, "key relation"]
    keys: Strings
    labels: Strings
    """The relations."""

    def __repr__(self) -> str:
        low, high = self.interval(OVERALL)
        return (
            f"AnswerAccuracy({self.shown(OVERALL):.3f} [{low:.3f}, {high:.3f}] over {len(self.keys)} keys, chance "
            f"{self.chance(OVERALL):.3f})"
        )

    def support(self) -> dict[str, int]:
        """Passages of each relation."""
        return _support(self.labels, self.passages)

    def chance(self, label: Label) -> float:
        """Accuracy of a guess that knows what may be an answer and nothing of the key."""
        return _share(self.labels, label, self.guessed, self.passages)

    def by_key(self) -> dict[str, float]:
        """The accuracy of each key."""
        return dict(zip(self.keys, self.of_sums(self.sums(OVERALL)).tolist(), strict=True))

    def sums(self, label: Label) -> Float[np.ndarray, "key statistic"]:
        """Passages answered right and all passages of each key."""
        columns = _columns(self.labels, label)
        return np.stack([self.right[:, columns].sum(1), self.passages[:, columns].sum(1).astype(float)], 1)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """The share of passages answered right; NaN where there is none."""
        return _divided(sums[..., 0], sums[..., 1])

    def displayed(self, value: float) -> float:
        """The accuracy itself."""
        return value


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class AnswerLoss(Scores):
    """Loss on the tokens of answers, each given all before it. Intervals are over keys.

    `value` is what the model gains over a uniform guess among all tokens, so that shares can be taken of it.
    """

    metric: ClassVar[str] = "answer loss"
    unit: ClassVar[str] = "nats per answer token"
    quantity: ClassVar[str] = "gain over a uniform guess"
    better: ClassVar[str] = "nats better than"
    worse: ClassVar[str] = "nats worse than"

    nats: Float[np.ndarray, "key relation"]
    """Summed over the tokens of the answers."""
    guessed: Float[np.ndarray, "key relation"]
    """The same of a guess."""
    tokens: Int[np.ndarray, "key relation"]
    passages: Int[np.ndarray, "key relation"]
    keys: Strings
    labels: Strings
    """The relations."""
    vocabulary: int
    """Number of tokens that a uniform guess chooses from."""

    def __repr__(self) -> str:
        low, high = self.interval(OVERALL)
        return (
            f"AnswerLoss({self.shown(OVERALL):.3f} [{low:.3f}, {high:.3f}] nats per answer token over "
            f"{len(self.keys)} keys, chance {self.chance(OVERALL):.3f})"
        )

    def support(self) -> dict[str, int]:
        """Passages of each relation."""
        return _support(self.labels, self.passages)

    def chance(self, label: Label) -> float:
        """Nats per answer token of a guess that knows what may be an answer and nothing of the key."""
        return _share(self.labels, label, self.guessed, self.tokens)

    def by_key(self) -> dict[str, float]:
        """Nats per answer token of each key."""
        return {
            key: self.displayed(float(value))
            for key, value in zip(self.keys, self.of_sums(self.sums(OVERALL)), strict=True)
        }

    def sums(self, label: Label) -> Float[np.ndarray, "key statistic"]:
        """Nats and tokens of the answers of each key."""
        columns = _columns(self.labels, label)
        return np.stack([self.nats[:, columns].sum(1), self.tokens[:, columns].sum(1).astype(float)], 1)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Nats per answer token gained over a uniform guess."""
        return np.asarray(math.log(self.vocabulary) - _divided(sums[..., 0], sums[..., 1]))

    def displayed(self, value: float) -> float:
        """The loss, in nats per answer token."""
        return math.log(self.vocabulary) - value


class Answered(NamedTuple):
    """What `answer` gives."""

    accuracy: AnswerAccuracy
    loss: AnswerLoss


def answer(
    model: LanguageModel,
    passages: Sequence[Passage] | EncodedPassages,
    *,
    closed: Mapping[str, Sequence[str]] | None = None,
    max_tokens: int = 4096,
) -> Answered:
    """How many passages a model answers greedily, word for word, and its loss on the tokens of the answers.

    A passage is right where every token of its answer is the likeliest after the prompt and the answer so far: that is
    what decoding greedily would write. Nothing is sampled; what would follow the answer is not looked at.

    `closed` gives the possible answers of a relation (`Facts.answers()`). A guess is even among them; of other
    relations it is never right, and even among all tokens.

    Raises:
        ValueError: no passage; or as `encode_passages`.
    """
    encoded = _encoded(model, passages)
    nats, wrong = _read(model, encoded, max_tokens)
    relations = [p.relation for p in encoded.passages]
    tokens = np.bincount(encoded.word_of[encoded.scored], minlength=len(relations))
    sizes = np.array([len((closed or {}).get(relation, ())) for relation in relations])
    known = sizes > 0
    sizes = np.maximum(sizes, 1)
    vocabulary = model.vocabulary
    keys, labels, sums = _tables(
        encoded.passages, (wrong == 0).astype(float), known / sizes, nats,
        np.where(known, np.log(sizes), tokens * math.log(vocabulary)), tokens.astype(float), np.ones(len(nats)),
    )  # fmt: skip
    right, guessed, nats, guessed_nats, tokens, count = sums
    count = count.astype(np.int64)
    return Answered(
        AnswerAccuracy(right, guessed, count, keys, labels),
        AnswerLoss(nats, guessed_nats, tokens.astype(np.int64), count, keys, labels, vocabulary),
    )


def choose(
    model: LanguageModel,
    passages: Sequence[Passage],
    *,
    per_token: bool = False,
    max_tokens: int = 4096,
) -> AnswerAccuracy:
    """How often the right one of a passage's choices is the likeliest answer.

    Likelihood is summed over the tokens of a choice, or with `per_token` their mean, which favours long choices less
    than the sum does short ones. Of choices that are alike to the bit, each counts as an even share.

    Raises:
        ValueError: no passage, or one without choices; or as `encode_passages`.
    """
    if without := [p for p in passages if not p.choices]:
        raise ValueError(
            f"{len(without)} of {len(passages)} passages have no choices, such as {without[0].prompt[:60]!r} of form "
            f"{without[0].form!r}; pass only forms that have (statement, paraphrase, options, yes-no of made facts)"
        )
    every = [replace(p, answer=choice) for p in passages for choice in p.choices]
    encoded = _encoded(model, every)
    nats, _ = _read(model, encoded, max_tokens)
    if per_token:
        nats = nats / np.bincount(encoded.word_of[encoded.scored], minlength=len(every))
    sizes = np.array([len(p.choices) for p in passages])
    starts = np.cumsum(sizes) - sizes
    best = np.minimum.reduceat(nats, starts)
    tied = np.add.reduceat((nats == np.repeat(best, sizes)).astype(float), starts)
    own = nats[starts + np.array([p.choices.index(p.answer) for p in passages])]
    keys, labels, (right, guessed, count) = _tables(passages, (own == best) / tied, 1 / sizes, np.ones(len(sizes)))
    return AnswerAccuracy(right, guessed, count.astype(np.int64), keys, labels)


def known(model: LanguageModel, passages: Sequence[Passage], *, max_tokens: int = 4096) -> tuple[Passage, ...]:
    """The passages of the facts that a model knows: of a key and relation, one statement at least is answered
    greedily, and every paraphrase that has choices prefers the right one.

    Raises:
        ValueError: no statement among the passages; or as `answer`.
    """
    statements = [p for p in passages if p.form == "statement"]
    encoded = _encoded(model, statements)
    _, wrong = _read(model, encoded, max_tokens)
    facts = {(p.key, p.relation) for p, n in zip(statements, wrong, strict=True) if n == 0}
    asked = [p for p in passages if p.form == "paraphrase" and p.choices and (p.key, p.relation) in facts]
    if asked:
        each = [replace(p, key=str(i)) for i, p in enumerate(asked)]
        chosen = choose(model, each, max_tokens=max_tokens).by_key()
        facts -= {(p.key, p.relation) for i, p in enumerate(asked) if chosen[str(i)] < 1}
    return tuple(p for p in passages if (p.key, p.relation) in facts)


def _encoded(model: LanguageModel, passages: Sequence[Passage] | EncodedPassages) -> EncodedPassages:
    if isinstance(passages, EncodedPassages):
        return passages
    return encode_passages(passages, model.tokenizer, context=model.context)


class _Reader:
    """Reads, by passage, nats summed over the tokens of the answer, and how many of them are not the likeliest."""

    def __init__(self, model: LanguageModel, n: int):
        self.model = model
        self.nats, self.wrong = np.zeros(n), np.zeros(n, dtype=np.int64)

    def read(self, batch: Batch, states: Float[Tensor, "sentence token d_model"]) -> None:
        """The answers of a batch."""
        logits = self.model.logits(states.flatten(0, 1)[batch.subword - 1]).float()
        target, passages = batch.ids.flatten()[batch.subword], batch.word_of.cpu().numpy()
        np.add.at(self.nats, passages, F.cross_entropy(logits, target, reduction="none").cpu().numpy())
        np.add.at(self.wrong, passages, (logits.argmax(-1) != target).cpu().numpy())

    def together(self) -> None:
        """Take what other processes read; here it is still 0."""
        processes.sum_(torch.from_numpy(self.nats), torch.from_numpy(self.wrong))


def _read(
    model: LanguageModel, encoded: EncodedPassages, max_tokens: int
) -> tuple[Float[np.ndarray, " passage"], Int[np.ndarray, " passage"]]:
    """What `_Reader` reads in one pass over the passages."""
    answers = _Reader(model, len(encoded.passages))
    stream(model, encoded, (), readers=[answers], max_tokens=max_tokens)
    if not np.isfinite(answers.nats).all():
        raise ValueError(
            f"the loss on {int((~np.isfinite(answers.nats)).sum())} of {len(answers.nats)} answers is not finite (NaN "
            "or infinite); look at the model's weights and at the learning rate"
        )
    return answers.nats, answers.wrong


def _tables(
    passages: Sequence[Passage], *columns: np.ndarray
) -> tuple[tuple[str, ...], tuple[str, ...], list[Float[np.ndarray, "key relation"]]]:
    """Keys, relations, and sums over passages by key and relation."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(p.key for p in passages))}
    labels = {relation: i for i, relation in enumerate(dict.fromkeys(p.relation for p in passages))}
    row, column = [keys[p.key] for p in passages], [labels[p.relation] for p in passages]
    tables = []
    for values in columns:
        table = np.zeros((len(keys), len(labels)))
        np.add.at(table, (row, column), values)
        tables.append(table)
    return tuple(keys), tuple(labels), tables


def _columns(labels: Strings, label: Label) -> list[int]:
    """The columns of some relations, or of all."""
    names = labels if label == OVERALL else (label,) if isinstance(label, str) else label
    if unknown := [name for name in names if name not in labels]:
        raise ValueError(f"no passage has the relation {unknown[0]!r}; known: {', '.join(labels)}, {OVERALL}")
    return [labels.index(name) for name in names]


def _divided(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.divide(sums, n, out=np.full(np.shape(sums), np.nan), where=n > 0)


def _share(labels: Strings, label: Label, sums: np.ndarray, n: np.ndarray) -> float:
    columns = _columns(labels, label)
    return float(_divided(np.asarray(sums[:, columns].sum()), np.asarray(n[:, columns].sum())))


def _support(labels: Strings, passages: np.ndarray) -> dict[str, int]:
    return dict(zip((*labels, OVERALL), [*passages.sum(0).tolist(), int(passages.sum())], strict=True))
