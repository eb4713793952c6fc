"""Passages from labelled text: as it is, or cut before every word that carries a concept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relearn_lens.text.concept import Concept, concept_of
from relearn_lens.text.corpus import OUTSIDE, Corpus
from relearn_lens.text.facts.passages import Facts, Passage, halves


def from_corpus(corpus: Corpus) -> tuple[Passage, ...]:
    """Every sentence as plain text; the key is its document or chapter."""
    return tuple(_plain(corpus, i) for i in range(corpus.n_sentences))


def from_concept(corpus: Corpus, concept: Concept | str, *, seed: int = 0) -> Facts:
    """A next-token concept as facts: what comes before a word that carries it is the prompt, the word the answer.

    The answer is a whole span, and the key is its text in lower case. What is to stay near by is the words of the other
    labels, each in its place, and in general the sentences without any of these as plain text; without other labels
    those sentences are what is near. Left out are words that open a sentence, for nothing is before them, words that no
    blank stands before, and words of other labels whose text carries the concept elsewhere. Only answers are kept
    apart: a prompt may hold words of the other half.

    Raises:
        ValueError: as `Concept.classes` and `halves`; or nothing is left that is to stay.
    """
    concept = concept_of(concept)
    classes = concept.classes(corpus)
    # For a concept by words the classes are two, and every word of it is a span by itself.
    begins = corpus.begins if not concept.words else np.ones(corpus.n_words, dtype=bool)
    carried = classes.carries[classes.of_word]
    named = np.array([name != OUTSIDE for name in classes.names])[classes.of_word]
    forget = list(_cut(corpus, carried, begins, classes.of_word, classes.names))
    if not forget:
        raise ValueError(
            f"every word of corpus {corpus.name!r} that carries concept {concept.name!r} opens its sentence or follows "
            "another word without a blank, so that no prompt ends before it; use another corpus"
        )
    keys = {p.key for p in forget}
    others = list(_cut(corpus, named & ~carried, begins, classes.of_word, classes.names))
    near = [p for p in others if p.key not in keys]
    sentence_of = np.repeat(np.arange(corpus.n_sentences), np.diff(corpus.start))
    bare = np.setdiff1d(np.arange(corpus.n_sentences), sentence_of[named | carried])
    general = [_plain(corpus, int(i)) for i in bare]
    if not near:
        near, general = general, []
    attacked, held_out = halves(forget, seed=seed)
    notes = (f"{len(others) - len(near)} words of other labels were left out: they carry the concept elsewhere",)
    return Facts(
        f"{corpus.name}/{concept.name}", attacked, held_out, tuple(near), tuple(general),
        notes=notes if len(near) < len(others) else (), source=corpus.source, licence=corpus.licence,
    )  # fmt: skip


def _plain(corpus: Corpus, sentence: int) -> Passage:
    text = _running(corpus, *corpus.start[sentence : sentence + 2].tolist())
    return Passage("", text, f"{corpus.name}, group {corpus.group[sentence]}", "text", "text")


def _cut(
    corpus: Corpus, wanted: np.ndarray, begins: np.ndarray, of_word: np.ndarray, names: tuple[str, ...]
) -> Iterator[Passage]:
    """A passage for every span of wanted words after a blank."""
    for first, end in zip(corpus.start[:-1].tolist(), corpus.start[1:].tolist(), strict=True):
        at = first
        while at < end:
            here, at = at, at + 1
            if not wanted[here]:
                continue
            while at < end and of_word[at] == of_word[here] and not begins[at]:
                at += 1
            if here > first and corpus.after_blank[here]:
                answer = _running(corpus, here, at)
                yield Passage(_running(corpus, first, here), answer, answer.lower(), names[of_word[here]])


def _running(corpus: Corpus, first: int, end: int) -> str:
    """Some words of a corpus as they stand in running text."""
    words = (corpus.vocab[i] for i in corpus.word[first:end])
    blanks = corpus.after_blank[first:end]
    return "".join(f" {word}" if blank else word for word, blank in zip(words, blanks, strict=True)).strip()
