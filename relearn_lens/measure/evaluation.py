"""How well a model does what a concept is needed for, with the sums that intervals are made from.

A tagger is judged by the F1 of its spans, a language model by its loss on the concept's tokens and on all others.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped
from nervaluate import Evaluator
from torch import Tensor

from relearn_lens.find.targets import TARGETS
from relearn_lens.measure import bootstrap
from relearn_lens.methods import MAX_TOKENS
from relearn_lens.models import processes
from relearn_lens.models.model import LanguageModel, Model, Tagger, encoded_for
from relearn_lens.names import ByName, explained, meant
from relearn_lens.neurons.streaming import stream
from relearn_lens.text import markup
from relearn_lens.text.concept import Concept, concept_of
from relearn_lens.text.corpus import OUTSIDE, Corpus, Strings, bio
from relearn_lens.text.encoding import Batch, Encoded

OVERALL = "overall"
OTHERS = "others"
"""All tokens that do not carry the concept."""
Label = str | tuple[str, ...]
"""A label, several that are scored together, or `OVERALL`."""


@runtime_checkable
class Scores(Protocol):
    """What recovery, claims and intervals need of a score: a value that is 0 where a model knows nothing, and higher
    where it knows more, from sums over sentences."""

    metric: ClassVar[str]
    """Name of what people read."""
    unit: ClassVar[str]
    """Its unit."""
    quantity: ClassVar[str]
    """Name of what `value` gives, of which shares are taken."""
    better: ClassVar[str] = "above"
    """How a model with a higher `value` compares, in words; `worse` the other way round."""
    worse: ClassVar[str] = "below"
    over: ClassVar[str] = "sentences"
    """What is drawn again for its interval."""

    labels: Strings
    """What is scored apart."""

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """What a label's value is made from, per sentence."""
        ...

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Values from sums over sentences; NaN where there is nothing to score."""
        ...

    def displayed(self, value: float) -> float:
        """The number that people read for a value: itself, where nothing else is said."""
        return value

    def support(self) -> dict[str, int]:
        """How much there is to score, by label."""
        ...

    def value(self, label: Label) -> float:
        """0 where a model knows nothing, higher where it knows more; NaN where there is nothing to score."""
        return float(self.of_sums(self.sums(label).sum(0)))

    def resampled(self, label: Label, *, n: int = 1000, seed: int = 0) -> Float[np.ndarray, " draw"]:
        """`value` over `n` bootstrap draws of the sentences, NaN in a draw without anything to score.

        The draws depend on `seed` alone, so two scores over the same sentences are paired: their difference has an
        interval too.
        """
        sums = self.sums(label)
        return self.of_sums(bootstrap.weights(len(sums), n, seed) @ sums)

    def shown(self, label: Label) -> float:
        """The number that people read."""
        return self.displayed(self.value(label))

    def chance(self, label: Label) -> float:
        """What people read of a model that knows nothing."""
        return self.displayed(0.0)

    def interval(self, label: Label, *, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[float, float]:
        """BCa bootstrap interval of `shown` over sentences: the one of `over_sentences`, from the same draws."""
        sums, drawn = self.sums(label), self.resampled(label, n=n, seed=seed)
        without_each = [self.of_sums(sums.sum(0) - sums)]
        *ends, _ = bootstrap.ends(self.value(label), drawn, lambda: without_each, level)
        low, high = sorted(self.displayed(end) for end in ends)
        return low, high


def mean_of_sums(sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
    """The first of two sums over the second; NaN where that is 0."""
    total, n = sums[..., 0], sums[..., 1]
    return np.divide(total, n, out=np.full(np.shape(total), np.nan), where=n > 0)


def as_html(scores: Scores) -> str:
    """Scores as notebooks show them: a row for each label, with its interval and over how much."""
    support, rows = scores.support(), []
    for label in (*scores.labels, OVERALL):
        low, high = scores.interval(label)
        rows.append([label, f"{scores.shown(label):.3f}", f"{low:.3f} to {high:.3f}", f"{support[label]:,}"])
    return markup.table(["label", scores.unit, f"95 % interval over {scores.over}", "of"], rows)


def columns_of(labels: Strings, label: Label, lacking: str = "no scores of label") -> list[int]:
    """The columns of some labels, or of all.

    Raises:
        ValueError: there is no such label; begins with what is `lacking`.
    """
    names = labels if label == OVERALL else (label,) if isinstance(label, str) else label
    if unknown := [name for name in names if name not in labels]:
        raise ValueError(
            f"{lacking} {unknown[0]!r}; known: {', '.join(labels)}, {OVERALL}{meant(unknown[0], [*labels, OVERALL])}"
        )
    return [labels.index(name) for name in names]


def _totals(total: np.ndarray, count: np.ndarray, labels: Strings, label: Label) -> np.ndarray:
    """Two sums of each sentence for a label, where the columns are the labels, then overall."""
    columns = [len(labels)] if label == OVERALL else columns_of(labels, label)
    return np.stack([total[:, columns].sum(1), count[:, columns].sum(1).astype(float)], 1)


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Margin(Scores):
    """Mean margin of a tagger's words: the logit of a word's own label less the highest of all other tags.

    Attribution's target `margin`, for every label of the text: logits at the word's first sub-word, `B-` and `I-` of
    its label by logsumexp. About 0 where the tagger is undecided, negative where it says something else; unlike an F1
    it has no threshold and no floor. Averaged over the words of a label, of several labels over all their words,
    `"overall"` over all words that have a label. Words labelled `"O"` and words that the context cut off are left out.
    """

    metric: ClassVar[str] = "margin"
    unit: ClassVar[str] = "logits, mean over words"
    quantity: ClassVar[str] = "margin"
    better: ClassVar[str] = "logits above"
    worse: ClassVar[str] = "logits below"

    total: Float[np.ndarray, "sentence column"]
    """Margins summed over each sentence; the columns are `labels`, then overall."""
    count: Int[np.ndarray, "sentence column"]
    """Over how many words."""
    labels: Strings

    def __repr__(self) -> str:
        shown = (f"{label} {self.shown(label):.2f}" for label in (*self.labels, OVERALL))
        return f"{type(self).__name__}({self.unit}: {', '.join(shown)})"

    _repr_html_ = as_html

    def support(self) -> dict[str, int]:
        """What each label's mean is over."""
        return dict(zip((*self.labels, OVERALL), self.count.sum(0).tolist(), strict=True))

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """Summed margin and number of words of each sentence."""
        return _totals(self.total, self.count, self.labels, label)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Means; NaN where there are no words."""
        return mean_of_sums(sums)


class LogProbability(Margin):
    """Mean log-probability that a language model gives each token of a class of words: its `TokenLoss`, negative."""

    metric: ClassVar[str] = "log-probability"
    unit: ClassVar[str] = "nats, mean over tokens"
    quantity: ClassVar[str] = "log-probability"
    better: ClassVar[str] = "nats above"
    worse: ClassVar[str] = "nats below"


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class SpanScores(Scores):
    """Strict span scores: a predicted span counts when its words and its label are both right."""

    metric: ClassVar[str] = "F1"
    unit: ClassVar[str] = "strict span F1, 0 to 1"
    quantity: ClassVar[str] = "F1"

    f1: dict[str, float]
    """By label, and `"overall"` over all spans together (micro). 0 where there is nothing right; NaN for a label that
    neither text nor prediction has."""
    precision: dict[str, float]
    recall: dict[str, float]
    counts: Int[np.ndarray, "sentence label 3"]
    """Spans of each sentence and label (in the order of `labels`): right, predicted, true."""
    labels: Strings
    margin: Margin | None = None
    """By how many logits, of the same labels; None where tags were scored without a model."""

    def __post_init__(self) -> None:
        for name in ("f1", "precision", "recall"):
            object.__setattr__(self, name, ByName(getattr(self, name)))

    def __repr__(self) -> str:
        return "SpanScores(F1 " + ", ".join(f"{label} {value:.3f}" for label, value in self.f1.items()) + ")"

    _repr_html_ = as_html

    def support(self) -> dict[str, int]:
        """True spans of each label."""
        true = self.counts[..., 2].sum(0)
        return dict(zip(self.labels, true.tolist(), strict=True)) | {OVERALL: int(true.sum())}

    def counts_of(self, label: Label) -> Int[np.ndarray, "sentence 3"]:
        """Right, predicted and true spans of each sentence for a label or several together."""
        return self.counts[:, columns_of(self.labels, label)].sum(1)

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """`counts_of`, as floats."""
        return self.counts_of(label).astype(float)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """F1 from right, predicted and true spans; NaN where neither text nor prediction has a span."""
        return mean_of_sums(np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], -1))


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class TokenLoss(Scores):
    """Loss of a language model on the tokens of each class of words, every sub-word given all before it.

    Every token of a word counts. `value` is what the model gains over a uniform guess, log(vocabulary) - loss: 0 for a
    model that knows nothing, so that shares of it can be taken as of an F1.
    """

    metric: ClassVar[str] = "loss"
    unit: ClassVar[str] = "nats per token"
    quantity: ClassVar[str] = "gain over a uniform guess"
    better: ClassVar[str] = "nats better than"
    worse: ClassVar[str] = "nats worse than"

    nats: Float[np.ndarray, "sentence column"]
    """Summed over the tokens of each sentence; the columns are `labels`, then all tokens."""
    tokens: Int[np.ndarray, "sentence column"]
    labels: Strings
    """The classes that have a name, and `"others"`: all tokens that do not carry the concept."""
    vocabulary: int
    """Number of tokens that a uniform guess chooses from."""

    def __repr__(self) -> str:
        return f"TokenLoss(nats per token {', '.join(f'{k} {v:.3f}' for k, v in self.loss.items())})"

    _repr_html_ = as_html

    @property
    def margin(self) -> LogProbability:
        """What stands in for a tagger's margin: higher is better, and nothing is taken off."""
        return LogProbability(-self.nats, self.tokens, self.labels)

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token, by label and `"overall"`; summed over tokens before dividing."""
        return ByName({label: self.shown(label) for label in (*self.labels, OVERALL)})

    def support(self) -> dict[str, int]:
        """Tokens of each label."""
        return dict(zip((*self.labels, OVERALL), self.tokens.sum(0).tolist(), strict=True))

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """Nats and tokens of each sentence."""
        return _totals(self.nats, self.tokens, self.labels, label)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Nats per token gained over a uniform guess."""
        return np.asarray(math.log(self.vocabulary) - mean_of_sums(sums))

    def displayed(self, value: float) -> float:
        """The loss, in nats per token."""
        return math.log(self.vocabulary) - value


@explained
def evaluate(
    model: Model,
    text: Corpus | Encoded,
    *,
    concept: Concept | str | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Any:
    """Strict span F1 of a tagger on labelled text, by nervaluate; of a language model, its loss per class of tokens.

    Tagger: a word's tag is that of its first sub-word; a word that the context cut off is predicted `"O"`. An `I-`
    that follows no span of its type opens one (as conlleval counts). Language model: its loss on the tokens of
    the concept, of every other label of the text, and of all other words.
    A `SpanScores` or a `TokenLoss`; both are `Scores`, and so is the `margin` of either, from the same pass.

    Raises:
        ValueError: the text has a label that the tagger does not know; a language model without a concept.
    """
    encoded = encoded_for(model, text)
    judge = judge_of(model, encoded, concept)
    stream(model, encoded, (), readers=[judge], max_tokens=max_tokens)
    return judge.scores()


def judge_of(model: Model, encoded: Encoded, concept: Concept | str | None = None) -> Tags | Losses:
    """What `evaluate` reads a text with: a `Reader` for `stream`, so that scores come from a pass that is made anyway.

    Raises:
        ValueError: as `evaluate`.
    """
    if isinstance(model, Tagger):
        if unknown := sorted(set(encoded.corpus.label_names) - set(model.label_names)):
            raise ValueError(
                f"corpus {encoded.corpus.name!r} has labels {unknown} that the tagger does not know; it was made for "
                f"{', '.join(model.label_names)}"
            )
        return Tags(model, encoded)
    if not isinstance(model, LanguageModel) or concept is None:
        raise ValueError(
            "a language model is judged on the tokens of a concept: give evaluate(..., concept=Concept(...))"
        )
    return Losses(model, encoded, concept_of(concept))


class Losses:
    """Reads the loss of a language model on the tokens of the concept, of every other label of the text, and of all
    other words.

    Every token of a word counts, special tokens do not. Words that the context cut off are left out.

    Raises:
        ValueError: no word of the text carries the concept.
    """

    def __init__(self, model: LanguageModel, encoded: Encoded, concept: Concept):
        self.model, self.corpus, self.classes = model, encoded.corpus, concept.classes(encoded.corpus)
        self.nats, self.tokens = np.zeros(self.corpus.n_words), np.zeros(self.corpus.n_words, dtype=np.int64)

    def read(self, batch: Batch, states: Float[Tensor, "sentence token d_model"]) -> None:
        """The losses of a batch."""
        losses, words = self.model.losses(batch, states).cpu().numpy(), batch.word_of.cpu().numpy()
        np.add.at(self.nats, words, losses)
        np.add.at(self.tokens, words, 1)

    def together(self) -> None:
        """Take the losses that other processes read; here they are still 0."""
        processes.sum_(torch.from_numpy(self.nats), torch.from_numpy(self.tokens))

    def scores(self) -> TokenLoss:
        """Sums by sentence.

        Raises:
            ValueError: losses that are not finite.
        """
        if not np.isfinite(self.nats).all():
            raise ValueError(
                "the loss of the language model is not finite (NaN or infinite); look at its weights and at the "
                "learning rate"
            )
        corpus, classes = self.corpus, self.classes
        named = [k for k, name in enumerate(classes.names) if name != OUTSIDE]
        others = ~classes.carries[classes.of_word]
        member = np.stack([*(classes.of_word == k for k in named), others, np.ones(corpus.n_words, bool)], 1)

        def by_sentence(of_word: np.ndarray) -> np.ndarray:
            return np.add.reduceat(of_word[:, None] * member, corpus.start[:-1])

        labels = (*(classes.names[k] for k in named), OTHERS)
        return TokenLoss(by_sentence(self.nats), by_sentence(self.tokens), labels, self.model.vocabulary)


def predict(
    tagger: Tagger,
    encoded: Encoded,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Int[np.ndarray, " word"]:
    """The tag of every word of the corpus, an index into `tagger.tags`.

    Raises:
        ValueError: logits that are not finite.
    """
    judge = Tags(tagger, encoded)
    stream(tagger, encoded, (), readers=[judge], max_tokens=max_tokens)
    return judge.predicted()


class Tags:
    """Reads the tag that the first sub-word of each word gets, and the margins of the words that have a label."""

    def __init__(self, tagger: Tagger, encoded: Encoded):
        self.tagger, self.corpus, self.labels = tagger, encoded.corpus, _labels_of(tagger.tags)
        column = [self.labels.index(name) if name in self.labels else -1 for name in self.corpus.label_names]
        self.column = np.array(column)[self.corpus.label]
        self.own = torch.tensor([[tag[2:] == label for tag in tagger.tags] for label in self.labels])
        self.tags, self.margins, self.seen = np.zeros((3, self.corpus.n_words))

    def read(self, batch: Batch, states: Float[Tensor, "sentence token d_model"]) -> None:
        """Tags and margins of a batch."""
        words = batch.words.cpu().numpy()
        logits = self.tagger.head(states.flatten(0, 1)[batch.subword[batch.first]])
        best = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
        self.tags[words], self.seen[words] = best.cpu().numpy(), 1
        margin = logits.new_zeros(len(words), dtype=torch.float32)
        here = self.column[words]
        for k in np.unique(here[here >= 0]):
            rows = torch.from_numpy(np.flatnonzero(here == k)).to(logits.device)
            margin[rows] = TARGETS["margin"].of(logits[rows].float(), self.own[k].to(logits.device))
        self.margins[words] = margin.cpu().numpy()

    def together(self) -> None:
        """Take what other processes read; here it is still 0."""
        processes.sum_(*map(torch.from_numpy, (self.tags, self.margins, self.seen)))

    def predicted(self) -> Int[np.ndarray, " word"]:
        """The tag of every word, an index into `tagger.tags`.

        Raises:
            ValueError: logits that are not finite.
        """
        if (self.tags < 0).any():
            raise ValueError(
                "the logits of the tagger are not finite (NaN or infinite), so it says nothing; look at the weights of "
                "the model and at the learning rate"
            )
        return self.tags.astype(np.int64)

    def scores(self) -> SpanScores:
        """Span scores and margins."""
        labelled = np.flatnonzero((self.column >= 0) & (self.seen > 0))
        sentence = np.searchsorted(self.corpus.start, labelled, side="right") - 1
        shape = self.corpus.n_sentences, len(self.labels) + 1
        total, count = np.zeros(shape), np.zeros(shape, int)
        for where in (self.column[labelled], np.full(len(labelled), len(self.labels))):
            np.add.at(total, (sentence, where), self.margins[labelled])
            np.add.at(count, (sentence, where), 1)
        spans = score_spans(self.corpus, self.predicted(), self.tagger.tags)
        return replace(spans, margin=Margin(total, count, self.labels))


def _labels_of(tags: Strings) -> Strings:
    """The labels that BIO tags are made of, in their order."""
    return tuple(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))


def score_spans(corpus: Corpus, predicted: Int[np.ndarray, " word"], tags: tuple[str, ...]) -> SpanScores:
    """Strict span scores of predicted word tags against a corpus's labels."""
    labels = _labels_of(tags)
    spans = [slice(first, last) for first, last in itertools.pairwise(corpus.start)]
    true = [bio([corpus.label_names[k] for k in corpus.label[at]], corpus.begins[at].tolist()) for at in spans]
    guess = [[tags[k] for k in predicted[at]] for at in spans]
    evaluator = Evaluator(true, guess, tags=list(labels), loader="list")
    evaluator.strategies = {"strict": evaluator.strategies["strict"]}  # the other three are read by nobody
    strict = evaluator.evaluate()
    results = {name: result["strict"] for name, result in strict["entities"].items()}
    if results:  # without a span on either side there is no overall F1 either
        results[OVERALL] = strict["overall"]["strict"]

    counts = np.zeros((corpus.n_sentences, len(labels), 3), dtype=np.int64)
    for i, (there, here) in enumerate(zip(evaluator.true, evaluator.pred, strict=True)):
        there, here = ({(e.label, e.start, e.end) for e in side} for side in (there, here))
        for k, side in enumerate((there & here, here, there)):
            for label, _, _ in side:
                counts[i, labels.index(label), k] += 1

    def each(metric: str) -> dict[str, float]:
        return {
            name: float(getattr(results[name], metric)) if name in results else float("nan")
            for name in (*labels, OVERALL)
        }

    return SpanScores(each("f1"), each("precision"), each("recall"), counts, labels)
