"""How well a model does what a concept is needed for, with the sums that intervals are made from.

A tagger is judged by the F1 of its spans, a language model by its loss on the concept's tokens and on all others.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped
from nervaluate import Evaluator
from nervaluate.loaders import ListLoader

from relearn_lens.find.targets import TARGETS
from relearn_lens.models import processes
from relearn_lens.models.model import LanguageModel, Model, Tagger, encoded_for, reading
from relearn_lens.text.concept import Concept
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
    better: ClassVar[str]
    """How a model with a higher `value` compares, in words; `worse` the other way round."""
    worse: ClassVar[str]

    labels: Strings
    """What is scored apart."""

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """What a label's value is made from, per sentence."""
        ...

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Values from sums over sentences; NaN where there is nothing to score."""
        ...

    def displayed(self, value: float) -> float:
        """The number that people read for a value."""
        ...

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
        draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n)
        return self.of_sums(draws @ sums)

    def shown(self, label: Label) -> float:
        """The number that people read."""
        return self.displayed(self.value(label))

    def interval(self, label: Label, *, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap interval of `shown` over sentences."""
        drawn = self.resampled(label, n=n, seed=seed)
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            return float("nan"), float("nan")
        ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        low, high = sorted(self.displayed(float(end)) for end in ends)
        return low, high


def _columns(labels: Strings, label: Label) -> list[int]:
    """The columns of some labels."""
    names = (label,) if isinstance(label, str) else label
    if unknown := [name for name in names if name not in labels]:
        raise ValueError(f"no scores of label {unknown[0]!r}; known: {', '.join(labels)}, {OVERALL}")
    return [labels.index(name) for name in names]


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

    def support(self) -> dict[str, int]:
        """What each label's mean is over."""
        return dict(zip((*self.labels, OVERALL), self.count.sum(0).tolist(), strict=True))

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """Summed margin and number of words of each sentence."""
        columns = [len(self.labels)] if label == OVERALL else _columns(self.labels, label)
        return np.stack([self.total[:, columns].sum(1), self.count[:, columns].sum(1).astype(float)], 1)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Means; NaN where there are no words."""
        total, count = sums[..., 0], sums[..., 1]
        return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)

    def displayed(self, value: float) -> float:
        """The mean itself."""
        return value


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
    better: ClassVar[str] = "above"
    worse: ClassVar[str] = "below"

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

    def __repr__(self) -> str:
        return "SpanScores(F1 " + ", ".join(f"{label} {value:.3f}" for label, value in self.f1.items()) + ")"

    def support(self) -> dict[str, int]:
        """True spans of each label."""
        true = self.counts[..., 2].sum(0)
        return dict(zip(self.labels, true.tolist(), strict=True)) | {OVERALL: int(true.sum())}

    def counts_of(self, label: Label) -> Int[np.ndarray, "sentence 3"]:
        """Right, predicted and true spans of each sentence for a label or several together."""
        return self.counts.sum(1) if label == OVERALL else self.counts[:, _columns(self.labels, label)].sum(1)

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """`counts_of`, as floats."""
        return self.counts_of(label).astype(float)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """F1 from right, predicted and true spans; NaN where neither text nor prediction has a span."""
        right, spans = sums[..., 0], sums[..., 1] + sums[..., 2]
        return np.divide(2 * right, spans, out=np.full(np.shape(right), np.nan), where=spans > 0)

    def displayed(self, value: float) -> float:
        """The F1 itself."""
        return value


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

    @property
    def margin(self) -> LogProbability:
        """What stands in for a tagger's margin: higher is better, and nothing is taken off."""
        return LogProbability(-self.nats, self.tokens, self.labels)

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token, by label and `"overall"`; summed over tokens before dividing."""
        return {label: self.shown(label) for label in (*self.labels, OVERALL)}

    def support(self) -> dict[str, int]:
        """Tokens of each label."""
        return dict(zip((*self.labels, OVERALL), self.tokens.sum(0).tolist(), strict=True))

    def sums(self, label: Label) -> Float[np.ndarray, "sentence statistic"]:
        """Nats and tokens of each sentence."""
        columns = [len(self.labels)] if label == OVERALL else _columns(self.labels, label)
        return np.stack([self.nats[:, columns].sum(1), self.tokens[:, columns].sum(1).astype(float)], 1)

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Nats per token gained over a uniform guess."""
        nats, tokens = sums[..., 0], sums[..., 1]
        loss = np.divide(nats, tokens, out=np.full(np.shape(nats), np.nan), where=tokens > 0)
        return np.asarray(math.log(self.vocabulary) - loss)

    def displayed(self, value: float) -> float:
        """The loss, in nats per token."""
        return math.log(self.vocabulary) - value


def evaluate(
    model: Model,
    text: Corpus | Encoded,
    *,
    concept: Concept | None = None,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> Any:
    """Strict span F1 of a tagger on labelled text, by nervaluate; of a language model, its loss per class of tokens.

    Tagger: a word's tag is that of its first sub-word; a word that the context cut off is predicted `"O"`. An `I-`
    that follows no span of its type opens one (as conlleval counts). Language model: `token_loss` for the concept.
    A `SpanScores` or a `TokenLoss`; both are `Scores`, and so is the `margin` of either, from the same pass.

    Raises:
        ValueError: the text has a label that the tagger does not know; a language model without a concept.
    """
    encoded = encoded_for(model, text)
    check_labels(model, encoded.corpus)
    if isinstance(model, Tagger):
        tags, margin = _tags_and_margin(model, encoded, max_tokens, tick)
        return replace(score_spans(encoded.corpus, tags, model.tags), margin=margin)
    if not isinstance(model, LanguageModel) or concept is None:
        raise ValueError(
            "a language model is judged on the tokens of a concept: give evaluate(..., concept=Concept(...))"
        )
    return token_loss(model, encoded, concept, max_tokens=max_tokens, tick=tick)


def token_loss(
    model: LanguageModel,
    text: Corpus | Encoded,
    concept: Concept,
    *,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> TokenLoss:
    """Loss of a language model on the tokens of the concept, of every other label of the text, and of all other words.

    Every token of a word counts, special tokens do not. Words that the context cut off are left out.

    Raises:
        ValueError: no word of the text carries the concept.
    """
    encoded = encoded_for(model, text)
    corpus, classes = encoded.corpus, concept.classes(encoded.corpus)
    named = [k for k, name in enumerate(classes.names) if name != OUTSIDE]
    sentence_of = np.repeat(np.arange(corpus.n_sentences), np.diff(corpus.start))
    member = np.stack(
        [*(classes.of_word == k for k in named), ~classes.carries[classes.of_word], np.ones(corpus.n_words, bool)], 1
    )
    nats, tokens = np.zeros(corpus.n_words), np.zeros(corpus.n_words, dtype=np.int64)
    with reading(model), _sharing(encoded, max_tokens, (nats, tokens)) as batches:
        for batch, n_tokens in batches:
            losses, words = model.losses(batch.to(model.device)).cpu().numpy(), batch.word_of.numpy()
            np.add.at(nats, words, losses)
            np.add.at(tokens, words, 1)
            if tick:
                tick(n_tokens)
    if not np.isfinite(nats).all():
        raise ValueError(
            "the loss of the language model is not finite (NaN or infinite); look at its weights and at the learning "
            "rate"
        )

    def by_sentence(of_word: np.ndarray) -> np.ndarray:
        table = np.zeros((corpus.n_sentences, member.shape[1]), dtype=of_word.dtype)
        np.add.at(table, sentence_of, of_word[:, None] * member)
        return table

    labels = (*(classes.names[k] for k in named), OTHERS)
    return TokenLoss(by_sentence(nats), by_sentence(tokens), labels, model.vocabulary)


@dataclass(frozen=True)
class Guesses:
    """What a model says of some sentences, word by word: to be read, not to be scored."""

    words: tuple[Strings, ...]
    """By sentence."""
    true: tuple[Strings, ...]
    """The class of each word: its label, or the concept's name where it is a list of words; `"O"` for the others."""
    said: tuple[tuple[Strings, ...], ...]
    """Of each word, a tagger's label alone; of a word that carries the concept, the tokens that a language model finds
    most likely at its beginning, the likeliest first (none of other words)."""


def guesses(model: Model, text: Corpus, concept: Concept, *, k: int = 3) -> Guesses:
    """What a model says of each word of a few sentences (of a language model, at the concept's words, `k` tokens)."""
    encoded, classes = encoded_for(model, text), concept.classes(text)
    said: list[Strings] = [()] * text.n_words
    if isinstance(model, Tagger):
        said = [(tag[2:] or OUTSIDE,) for tag in (model.tags[i] for i in predict(model, encoded))]
    elif isinstance(model, LanguageModel):
        with reading(model):
            for batch in encoded.batches():
                here = batch.to(model.device)
                at = here.subword[here.first]
                logits = model(here.ids, here.mask).flatten(0, 1)[at - 1]
                best = logits.topk(k).indices.cpu().tolist()
                for word, tokens in zip(batch.words.tolist(), best, strict=True):
                    if classes.carries[classes.of_word[word]]:
                        said[word] = tuple(model.tokenizer.decode([token]).strip() for token in tokens)
    spans = [slice(a, b) for a, b in itertools.pairwise(text.start.tolist())]
    return Guesses(
        tuple(tuple(text.vocab[w] for w in text.word[span]) for span in spans),
        tuple(tuple(classes.names[c] for c in classes.of_word[span]) for span in spans),
        tuple(tuple(said[span]) for span in spans),
    )


def to_read(text: Corpus, concept: Concept, n: int = 6, *, longest: int = 24) -> Corpus:
    """The first `n` sentences of a text that hold the concept and are not longer than so many words, those with another
    label beside it first, none twice: chosen by the text alone."""
    classes = concept.classes(text)
    carries, other = classes.carries[classes.of_word], (text.label > 0) & ~classes.carries[classes.of_word]

    def per_sentence(which: np.ndarray) -> np.ndarray:
        return np.add.reduceat(which.astype(int), text.start[:-1]) if text.n_sentences else np.zeros(0, int)

    fits = (per_sentence(carries) > 0) & (np.diff(text.start) <= longest)
    seen: set[bytes] = set()
    for i in np.flatnonzero(fits):  # the same words again say nothing new
        words = text.word[text.start[i] : text.start[i + 1]].tobytes()
        fits[i] = words not in seen
        seen.add(words)
    order = np.lexsort((np.arange(text.n_sentences), per_sentence(other) == 0, ~fits))
    return text.take(np.sort(order[: min(n, int(fits.sum()))]))


def check_labels(model: Model, corpus: Corpus) -> None:
    """Refuse a text with a label that a tagger does not know."""
    if isinstance(model, Tagger):
        _check_tags(model, corpus)


def _check_tags(tagger: Tagger, corpus: Corpus) -> None:
    if unknown := sorted(set(corpus.label_names) - set(tagger.label_names)):
        raise ValueError(
            f"corpus {corpus.name!r} has labels {unknown} that the tagger does not know; it was made for "
            f"{', '.join(tagger.label_names)}"
        )


def predict(
    tagger: Tagger,
    encoded: Encoded,
    *,
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> Int[np.ndarray, " word"]:
    """The tag of every word of the corpus, an index into `tagger.tags`.

    Raises:
        ValueError: logits that are not finite.
    """
    return _tags_and_margin(tagger, encoded, max_tokens, tick)[0]


def _tags_and_margin(
    tagger: Tagger, encoded: Encoded, max_tokens: int, tick: Callable[[int], object] | None
) -> tuple[Int[np.ndarray, " word"], Margin]:
    """The tag that the first sub-word of each word gets, and the margins of those that have a label."""
    corpus, labels = encoded.corpus, _labels_of(tagger.tags)
    column = np.array([labels.index(name) if name in labels else -1 for name in corpus.label_names])[corpus.label]
    own = torch.tensor([[tag[2:] == label for tag in tagger.tags] for label in labels])
    tags, margins, seen = np.zeros((3, corpus.n_words))
    with reading(tagger), _sharing(encoded, max_tokens, (tags, margins, seen)) as batches:
        for batch, n_tokens in batches:
            here, words = batch.to(tagger.device), batch.words.numpy()
            logits = tagger(here.ids, here.mask).flatten(0, 1)[here.subword[here.first]]
            best = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
            tags[words], seen[words] = best.cpu().numpy(), 1
            margin = logits.new_zeros(len(words), dtype=torch.float32)
            for k in np.unique(column[words[column[words] >= 0]]):
                rows = torch.from_numpy(np.flatnonzero(column[words] == k)).to(tagger.device)
                margin[rows] = TARGETS["margin"].of(logits[rows].float(), own[k].to(tagger.device))
            margins[words] = margin.cpu().numpy()
            if tick:
                tick(n_tokens)
    if (tags < 0).any():
        raise ValueError(
            "the logits of the tagger are not finite (NaN or infinite), so it says nothing; look at the weights of the "
            "model and at the learning rate"
        )
    labelled = np.flatnonzero((column >= 0) & (seen > 0))
    sentence = np.searchsorted(corpus.start, labelled, side="right") - 1
    total, count = np.zeros((corpus.n_sentences, len(labels) + 1)), np.zeros((corpus.n_sentences, len(labels) + 1), int)
    for where in (column[labelled], np.full(len(labelled), len(labels))):
        np.add.at(total, (sentence, where), margins[labelled])
        np.add.at(count, (sentence, where), 1)
    return tags.astype(np.int64), Margin(total, count, labels)


@contextlib.contextmanager
def _sharing(encoded: Encoded, max_tokens: int, sums: Sequence[np.ndarray]) -> Iterator[Iterator[tuple[Batch, int]]]:
    """This process's batches of a text, each with the tokens that go by meanwhile; afterwards `sums`, which are 0
    where this process read nothing, are those of all processes."""
    cuts = encoded.cuts(max_tokens=max_tokens)
    shared = processes.is_shared(len(cuts))
    mine = map(encoded.batch, processes.share(cuts))
    yield ((batch, batch.n_tokens * (processes.size() if shared else 1)) for batch in mine)
    if shared:
        processes.sum_(*map(torch.from_numpy, sums))


def _labels_of(tags: Strings) -> Strings:
    """The labels that BIO tags are made of, in their order."""
    return tuple(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))


def score_spans(corpus: Corpus, predicted: Int[np.ndarray, " word"], tags: tuple[str, ...]) -> SpanScores:
    """Strict span scores of predicted word tags against a corpus's labels."""
    labels = _labels_of(tags)
    true, guess = [], []
    for i in range(corpus.n_sentences):
        span = slice(corpus.start[i], corpus.start[i + 1])
        true.append(bio([corpus.label_names[k] for k in corpus.label[span]], corpus.begins[span].tolist()))
        guess.append([tags[k] for k in predicted[span]])
    strict = Evaluator(true, guess, tags=list(labels), loader="list").evaluate()
    results = {name: result["strict"] for name, result in strict["entities"].items()}
    if results:  # without a span on either side there is no overall F1 either
        results[OVERALL] = strict["overall"]["strict"]

    counts = np.zeros((corpus.n_sentences, len(labels), 3), dtype=np.int64)
    loader = ListLoader()
    for i, (there, here) in enumerate(zip(loader.load(true), loader.load(guess), strict=True)):
        there, here = ({(e.label, e.start, e.end) for e in side} for side in (there, here))
        for k, found in enumerate((there & here, here, there)):
            for label, _, _ in found:
                counts[i, labels.index(label), k] += 1

    def each(metric: str) -> dict[str, float]:
        return {
            name: float(getattr(results[name], metric)) if name in results else float("nan")
            for name in (*labels, OVERALL)
        }

    return SpanScores(each("f1"), each("precision"), each("recall"), counts, labels)
