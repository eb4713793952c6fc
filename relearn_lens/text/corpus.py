"""Labelled sentences in flat storage.

A corpus of ten million words is a handful of arrays: each word is an index into a vocabulary of word types, each
sentence an offset. Nothing here knows of a model; `encoding.py` turns words into sub-words.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Bool, Int, jaxtyped

from relearn_lens.names import explained, known_name
from relearn_lens.text import markup

if TYPE_CHECKING:
    from relearn_lens.text.concept import Concept

    Strings = tuple[str, ...]
else:
    # beartype samples the items of a tuple[str, ...] with Python's global random generator, which must not move.
    Strings = tuple

OUTSIDE = "O"
"""The label of a word that belongs to no class. It is always label 0."""


MOST_LABELS = np.iinfo(np.int16).max
"""Labels are kept in 16 bits."""


class Word(NamedTuple):
    """One word of a corpus as a person reads it."""

    text: str
    label: str


class Splits(NamedTuple):
    """Three corpora that share no group (no chapter, no document) with each other."""

    train: Corpus
    validation: Corpus
    probe: Corpus

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a split has no {name!r}, its parts have: take .train, .validation or .probe")


_PART_NAMES = tuple(f"/{part}" for part in Splits._fields)


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Sentences of labelled words.

    A label is the *type* of a word (`"place"`), whatever tag scheme the file used; `begins` says where a span starts,
    so two neighbouring spans of one type stay two.
    """

    vocab: Strings
    """Word types; `word` indexes it."""
    word: Int[np.ndarray, " word"]
    label: Int[np.ndarray, " word"]
    """Index into `label_names`; 0 is `"O"`."""
    begins: Bool[np.ndarray, " word"]
    """The word opens a span; always false for `"O"`."""
    group: Int[np.ndarray, " sentence"]
    """Chapter or document of each sentence: what a split keeps together."""
    start: Int[np.ndarray, " sentence+1"]
    """Sentence i holds words `start[i]` to `start[i + 1]`."""
    label_names: Strings
    name: str
    source: str = ""
    licence: str = ""
    spaced: Bool[np.ndarray, " word"] | None = None
    """A blank stands before the word in the text (true for the first of a sentence); None where the text does not say,
    and then every word is read after a blank."""
    notes: Strings = ()
    """What its reader decided or missed, in words."""

    @property
    def n_sentences(self) -> int:
        """Number of sentences."""
        return len(self.start) - 1

    @property
    def n_words(self) -> int:
        """Number of words."""
        return len(self.word)

    def __len__(self) -> int:
        return self.n_sentences

    def sentence(self, index: int) -> list[Word]:
        """The words of one sentence with their labels."""
        span = slice(self.start[index], self.start[index + 1])
        return [
            Word(self.vocab[w], self.label_names[k]) for w, k in zip(self.word[span], self.label[span], strict=True)
        ]

    def spans(self, index: int) -> list[tuple[str, str]]:
        """One sentence cut at its spans, each with its label; words without a label are `"O"`, one by one."""
        begins = self.begins[self.start[index] : self.start[index + 1]]
        cut: list[tuple[str, str]] = []
        for (text, label), opens in zip(self.sentence(index), begins, strict=True):
            if cut and label != OUTSIDE and not opens and cut[-1][1] == label:
                cut[-1] = (f"{cut[-1][0]} {text}", label)
            else:
                cut.append((text, label))
        return cut

    @property
    def title(self) -> str:
        """The name of the whole text, where this is a part of a split."""
        return self.name.rpartition("/")[0] if self.name.endswith(_PART_NAMES) else self.name

    @property
    def after_blank(self) -> Bool[np.ndarray, " word"]:
        """`spaced`, or all true where the text does not say."""
        return np.ones(self.n_words, dtype=bool) if self.spaced is None else self.spaced

    def __iter__(self) -> Iterator[list[Word]]:
        return (self.sentence(i) for i in range(self.n_sentences))

    def words_per_label(self) -> dict[str, int]:
        """Number of words of each label."""
        counts = np.bincount(self.label, minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist(), strict=True))

    @explained
    def take(self, sentences: Sequence[int] | np.ndarray, *, name: str | None = None) -> Corpus:
        """The given sentences (indices, or a mask of all), in the given order, as a corpus of their own."""
        index = np.asarray(sentences)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        lengths = np.diff(self.start)[index]
        start = np.concatenate([[0], np.cumsum(lengths)])
        words = np.repeat(self.start[:-1][index] - start[:-1], lengths) + np.arange(start[-1])
        return replace(
            self,
            word=self.word[words],
            label=self.label[words],
            begins=self.begins[words],
            spaced=None if self.spaced is None else self.spaced[words],
            start=start,
            group=self.group[index],
            name=name or self.name,
        )

    def labelled(self) -> Corpus:
        """Only the sentences with at least one labelled word."""
        marked = np.concatenate([[0], np.cumsum(self.label > 0)])
        return self.take(np.flatnonzero(np.diff(marked[self.start]) > 0))

    @explained
    def sample(
        self, sentences: int, *, seed: int, concept: Concept | str | None = None, share: float | int | None = None
    ) -> Corpus:
        """At most so many sentences, drawn without replacement and kept in their order.

        With `concept`, at most a `share` of them (0 to 1, by default half) holds it: fewer where the corpus has fewer,
        and the rest is filled with others as far as there are.

        Raises:
            ValueError: a share without a concept or out of range, or a concept that the corpus has not.
        """
        if not isinstance(sentences, int | np.integer) or sentences < 1:
            raise ValueError(f"sentences = {sentences!r}: how many are drawn at most, a whole number from 1")
        if concept is None:
            if share is not None:
                raise ValueError(f"share = {share} of the sentences hold what? Give concept= too")
            if sentences >= self.n_sentences:
                return self
            chosen = np.random.default_rng(seed).choice(self.n_sentences, sentences, replace=False)
            return self.take(np.sort(chosen))
        share = 0.5 if share is None else share
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: above 0 and at most 1, of the sentences")
        rng, holds = np.random.default_rng(seed), self._holding(concept)
        with_it = rng.permutation(np.flatnonzero(holds))[: round(sentences * share)]
        without = rng.permutation(np.flatnonzero(~holds))[: sentences - len(with_it)]
        return self.take(np.sort(np.concatenate([with_it, without])))

    def _holding(self, concept: Concept | str) -> Bool[np.ndarray, " sentence"]:
        """Which sentences hold a concept, or a label."""
        if not isinstance(concept, str):
            return concept.held_by(self)
        label = self.label_names.index(known_name("label", concept, self.label_names))
        return np.add.reduceat(self.label == label, self.start[:-1]) > 0

    @explained
    def split(self, *, seed: int, parts: tuple[float, float, float] = (0.6, 0.2, 0.2)) -> Splits:
        """Train, validation and probe corpus, cut between groups (chapters, documents; sentences if it has neither).

        `parts` are shares of the sentences and sum to 1. Groups are shuffled and dealt out in turn until a part is
        full, so the shares are met to within one group.

        Raises:
            ValueError: the parts do not sum to 1, or there are fewer than three groups.
        """
        if len(parts) != 3:
            raise ValueError(f"split parts are three, of train, validation and probe, got {parts}")
        if not (min(parts) > 0 and abs(sum(parts) - 1) <= 1e-6):  # so that nan is refused too
            raise ValueError(f"split parts must be above 0 and sum to 1, got {parts}")
        groups, member = np.unique(self.group, return_inverse=True)
        if len(groups) < 3:
            raise ValueError(
                f"corpus {self.name!r} has {len(groups)} group(s) of sentences; a split into train, validation and "
                "probe needs at least 3 (documents are separated by -DOCSTART- lines; without them every sentence is "
                "a group)"
            )
        order = np.random.default_rng(seed).permutation(len(groups))
        ends = np.cumsum(np.bincount(member)[order])
        # A group goes to the part in which its middle falls; every part keeps at least one group.
        middle = (ends - np.bincount(member)[order] / 2) / ends[-1]
        cut = np.searchsorted(middle, np.cumsum(parts)[:2])
        first = int(np.clip(cut[0], 1, len(groups) - 2))
        second = int(np.clip(cut[1], first + 1, len(groups) - 1))
        part_of = np.empty(len(groups), dtype=np.int64)
        part_of[order[:first]], part_of[order[first:second]], part_of[order[second:]] = 0, 1, 2
        return Splits(
            *(
                self.take(np.flatnonzero(part_of[member] == k), name=f"{self.name}/{part}")
                for k, part in enumerate(Splits._fields)
            )
        )

    def sha256(self) -> str:
        """Hash of the words, labels, spans, sentences and missing blanks, whatever they were read from."""
        digest = hashlib.sha256()
        used, word = np.unique(self.word, return_inverse=True)
        digest.update("\0".join([*self.label_names, "", *(self.vocab[i] for i in used)]).encode())
        for part in (word, self.label, self.begins, self.start, np.flatnonzero(~self.after_blank)):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        counts = ", ".join(f"{k} {n:,}" for k, n in self.words_per_label().items())
        return f"Corpus({self.name}: {self.n_sentences:,} sentences, {self.n_words:,} words; {counts})"

    def _repr_html_(self) -> str:
        """Words of each label, and the first sentences."""
        rows = [[label, f"{count:,}"] for label, count in self.words_per_label().items()]
        colour = markup.colours(self.label_names[1:])
        first = [markup.sentence(self.spans(i), OUTSIDE, colour) for i in range(min(5, self.n_sentences))]
        notes = [markup.line(note) for note in self.notes]
        return markup.box(repr(self), *notes, markup.table(["label", "words"], rows), *first)


def one_of(text: Any) -> Any:
    """A text as it is, unless it is all three parts of a split, or no text.

    Raises:
        ValueError: it is no `Corpus`.
    """
    if isinstance(text, Splits):
        raise ValueError(
            f"one text is wanted, got the three parts of {text.train.title!r}: give .train (to train on), .validation "
            "or .probe (to measure on)"
        )
    if not isinstance(text, Corpus):
        raise ValueError(
            f"a labelled text is wanted, got a {type(text).__name__}: read one (read_conll, read_bsb_names, read_hf), "
            "or make one (build_corpus)"
        )
    return text


@explained
def build_corpus(
    sentences: Iterable[Sequence[tuple[str, str, bool]]],
    *,
    name: str,
    groups: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
    source: str = "",
    licence: str = "",
    spaced: Sequence[bool] | np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Corpus:
    """A corpus from sentences of `(word, label, begins)`, in one pass.

    `label_names` fixes the order of the labels (and allows labels that do not occur); by default they are sorted, with
    `"O"` first. `spaced` says of every word, over all sentences, whether a blank stands before it. Sentences without
    words are left out.

    Raises:
        ValueError: no sentence has a word, `label_names` does not begin with `"O"`, a label is not among them, or
            `spaced` is not one for each word.
    """
    vocab: dict[str, int] = {}
    labels: dict[str, int] = {}
    word: list[int] = []
    label: list[int] = []
    begins: list[bool] = []
    start, group = [0], []
    for i, sentence in enumerate(sentences):
        if not sentence:
            continue
        if any(isinstance(each, str) or len(each) != 3 for each in sentence):
            raise ValueError(
                f"sentence {i} of corpus {name!r} is no list of (word, label, opens a span), such as "
                f"[('Rome', 'place', True)]: {sentence!r}"[:300]
            )
        for text, kind, opens in sentence:
            word.append(vocab.setdefault(text, len(vocab)))
            label.append(labels.setdefault(kind, len(labels)))
            begins.append(opens and kind != OUTSIDE)
        start.append(len(word))
        group.append(i if groups is None else groups[i])
    if not word:
        raise ValueError(f"corpus {name!r} has no words")
    _check_strings(vocab, labels, name)
    if spaced is not None and len(spaced) != len(word):
        raise ValueError(
            f"spaced has {len(spaced):,} entries for the {len(word):,} words of corpus {name!r}; give one each"
        )
    names = tuple(label_names or [OUTSIDE, *sorted(set(labels) - {OUTSIDE})])
    if len(names) > MOST_LABELS:
        raise ValueError(
            f"corpus {name!r} has {len(names):,} different labels, of at most {MOST_LABELS:,}; is its label column "
            "one of words or numbers? Choose another column"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"the label names of corpus {name!r} hold one twice: {list(names)}; name each once")
    if names[0] != OUTSIDE:
        raise ValueError(f"the first label of corpus {name!r} must be {OUTSIDE!r}, got {list(names)}")
    if strange := sorted(set(labels) - set(names)):
        raise ValueError(f"corpus {name!r} has labels {strange} that are not among {list(names)}")
    number = {kind: i for i, kind in enumerate(names)}
    renumber = np.array([number[k] for k in labels], dtype=np.int64)
    return Corpus(
        vocab=tuple(vocab),
        word=np.array(word, dtype=np.int32),
        label=renumber[np.array(label)].astype(np.int16),
        begins=np.array(begins, dtype=bool),
        start=np.array(start, dtype=np.int64),
        group=np.array(group, dtype=np.int64),
        label_names=names,
        name=name,
        source=source,
        licence=licence,
        spaced=None if spaced is None else np.array(spaced, dtype=bool),
        notes=tuple(notes),
    )


def _check_strings(words: Iterable[Any], labels: Iterable[Any], name: str) -> None:
    """Refuse what is no text: what tokenizers, hashes and files would each refuse later, and none of them clearly."""
    for what, values in (("word", words), ("label", labels)):
        for text in values:
            if not isinstance(text, str) or not text:
                raise ValueError(f"corpus {name!r} has the {what} {text!r}; every {what} must be a string, not empty")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(
                    f"corpus {name!r} has the {what} {text!r} with half a character (a lone surrogate), which is no "
                    "text; read the file with its own encoding="
                )
            if what == "label" and printable(text) != text:
                raise ValueError(f"corpus {name!r} has the label {text!r} with a control character, which is no name")


def printable(text: str) -> str:
    """A word with its control characters and line breaks as Python writes them: printed raw they steer a terminal."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def bio(labels: Sequence[str], begins: Sequence[bool]) -> list[str]:
    """BIO tags of one sentence: `B-` where a span opens, `I-` inside it."""
    return [
        OUTSIDE if kind == OUTSIDE else f"{'B' if opens else 'I'}-{kind}"
        for kind, opens in zip(labels, begins, strict=True)
    ]
