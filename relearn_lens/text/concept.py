"""A concept: a name, and which words of a corpus carry it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from relearn_lens.names import explained, meant
from relearn_lens.text.corpus import OUTSIDE, Corpus


class Classes(NamedTuple):
    """The classes into which a concept cuts the words of a corpus."""

    names: tuple[str, ...]
    of_word: Int[np.ndarray, " word"]
    """Class of each word, an index into `names`."""
    carries: Bool[np.ndarray, " class"]
    """The classes that are the concept."""


@explained
@dataclass(frozen=True)
class Concept:
    """What is looked for: a name, and the labels (or the words) that carry it.

    `Concept("place")` is carried by the label `place`; `Concept("place", labels=("LOC", "GPE"))` by two of them;
    `Concept("colour", words=("red", "blue"))` by the words themselves, in any case.
    """

    name: str
    labels: Sequence[str] = ()
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(
                f"a concept has one name, got {self.name!r}; several labels are Concept('both', labels=...)"
            )
        if self.labels and self.words:
            raise ValueError(f"concept {self.name!r} has labels and words; give one of them")
        labels, words = ((v,) if isinstance(v, str) else tuple(v) for v in (self.labels, self.words))
        object.__setattr__(self, "labels", labels or (() if words else (self.name,)))
        object.__setattr__(self, "words", words)

    def classes(self, corpus: Corpus) -> Classes:
        """The classes of a corpus's words and which of them carry the concept.

        For a concept by labels these are the corpus's labels; for one by words, `"O"` and the concept.

        Raises:
            ValueError: the corpus has no such label, or no word that carries the concept, or no other word.
        """
        if self.words:
            wanted = {word.lower() for word in self.words}
            is_wanted = np.array([word.lower() in wanted for word in corpus.vocab], dtype=bool)
            names, of_word = (OUTSIDE, self.name), is_wanted[corpus.word].astype(np.int64)
            carries = np.array([False, True])
        else:
            if unknown := [label for label in self.labels if label not in corpus.label_names]:
                raise ValueError(
                    f"corpus {corpus.name!r} has no label {unknown[0]!r} for concept {self.name!r}; its labels are "
                    f"{', '.join(corpus.label_names)}{meant(unknown[0], corpus.label_names)}"
                )
            names, of_word = corpus.label_names, corpus.label.astype(np.int64)
            carries = np.isin(np.array(names), self.labels)
        positive = int(carries[of_word].sum())
        if positive == 0 or positive == corpus.n_words:
            which = "no word" if positive == 0 else "every word"
            raise ValueError(
                f"{which} of corpus {corpus.name!r} ({corpus.n_words:,} words) carries concept {self.name!r}; a score "
                "compares words that carry it with words that do not, so use a larger or another probe corpus"
            )
        return Classes(names, of_word, carries)

    def held_by(self, corpus: Corpus) -> Bool[np.ndarray, " sentence"]:
        """Which sentences of a corpus have a word that carries the concept.

        Raises:
            ValueError: as `classes`.
        """
        classes = self.classes(corpus)
        return np.add.reduceat(classes.carries[classes.of_word], corpus.start[:-1]) > 0


def concept_of(concept: Concept | str) -> Concept:
    """A concept by its name, which is then the label that carries it; a `Concept` is given back as it is.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(concept, str | Concept):
        raise ValueError(f"a concept is wanted, by name or as a Concept, got a {type(concept).__name__}")
    return Concept(concept) if isinstance(concept, str) else concept


def label_shuffles(
    classes: Classes, types: Int[np.ndarray, " word"], n: int, *, seed: int
) -> list[Int[np.ndarray, " word"]]:
    """The classes dealt anew to the word types, `n` times: what `ClassSums` takes as `relabelled`, for a null.

    `types` is the word type of each word, as in `Corpus.word`. Labels belong to word types ("Rome" is a place
    wherever it stands), so a null that shuffled single words would have far more independent words than there are: what
    is merely alike among the occurrences of a word would pass for a class. A type takes over the labels of another that
    is as frequent (up to a factor of 2), with their mixture where it has several; so classes keep about their numbers
    of words, and their numbers of types. A type that no other is as frequent as keeps its labels.

    Source: ours; permutation within blocks that are exchangeable. For probes see Hewitt and Liang 2019 (control tasks).
    """
    rng = np.random.default_rng(seed)
    _, type_of, count = np.unique(types, return_inverse=True, return_counts=True)
    block = np.frexp(count)[1]  # by powers of 2
    start = np.cumsum(count) - count
    shuffles = []
    for _ in range(n):
        # The words of a type stand together, in a random order; those of one block change places with each other.
        order = np.lexsort((rng.random(len(type_of)), type_of))
        within = np.lexsort((rng.random(len(count)), block))
        donor = np.empty(len(count), dtype=np.int64)
        donor[np.argsort(block, kind="stable")] = within
        donor = donor[type_of[order]]
        place = np.arange(len(order)) - start[type_of[order]]
        dealt = np.empty_like(classes.of_word)
        dealt[order] = classes.of_word[order][start[donor] + place % count[donor]]
        shuffles.append(dealt)
    return shuffles
