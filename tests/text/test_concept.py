"""The classes of one small text, worked out by hand."""

import re
from typing import Any

import pytest

from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus


@pytest.fixture
def corpus() -> Corpus:
    sentences = [
        [("Rome", "LOC", True), ("saw", "O", False), ("Paul", "PER", True)],
        [("rome", "O", False), ("France", "GPE", True), ("ROME", "LOC", True)],
    ]
    return build_corpus(sentences, name="tiny", label_names=("O", "LOC", "GPE", "PER", "ORG"))


def test_concept_is_carried_by_the_label_of_its_name(corpus):
    classes = Concept("LOC").classes(corpus)
    assert classes.names == ("O", "LOC", "GPE", "PER", "ORG")
    assert classes.of_word.tolist() == [1, 0, 3, 0, 2, 1]
    assert classes.carries.tolist() == [False, True, False, False, False]


def test_concept_is_carried_by_several_labels(corpus):
    classes = Concept("place", labels=("GPE", "LOC")).classes(corpus)
    assert classes.names == ("O", "LOC", "GPE", "PER", "ORG")
    assert classes.carries.tolist() == [False, True, True, False, False]


def test_concept_is_carried_by_words_in_any_case(corpus):
    classes = Concept("city", words=("Rome", "PARIS")).classes(corpus)
    assert classes.names == ("O", "city")
    assert classes.of_word.tolist() == [1, 0, 0, 1, 0, 1]
    assert classes.carries.tolist() == [False, True]


def test_concept_takes_lists():
    listed: Any = ["LOC"]
    assert Concept("place", labels=listed) == Concept("place", labels=("LOC",))
    assert Concept("LOC").labels == ("LOC",)
    assert Concept("city", words=("Rome",)).labels == ()


def test_concept_can_be_outside_itself(corpus):
    assert Concept("none", labels=("O",)).classes(corpus).carries.tolist() == [True] + [False] * 4


def test_concept_refuses_labels_and_words():
    with pytest.raises(ValueError, match=r"concept 'place' has labels and words; give one of them"):
        Concept("place", labels=("LOC",), words=("Rome",))


def test_concept_lists_the_labels_of_the_corpus_for_an_unknown_one(corpus):
    with pytest.raises(
        ValueError,
        match=r"corpus 'tiny' has no label 'CITY' for concept 'place'; its labels are O, LOC, GPE, PER, ORG",
    ):
        Concept("place", labels=("LOC", "CITY")).classes(corpus)


@pytest.mark.parametrize("concept", [Concept("ORG"), Concept("city", words=("Berlin",))])
def test_concept_refuses_a_corpus_where_no_word_carries_it(corpus, concept):
    said = f"no word of corpus 'tiny' (6 words) carries concept '{concept.name}'; a score compares words that carry it"
    with pytest.raises(ValueError, match=re.escape(said)):
        concept.classes(corpus)


@pytest.mark.parametrize(
    "concept",
    [Concept("all", labels=("O", "LOC", "GPE", "PER")), Concept("all", words=("rome", "saw", "paul", "france"))],
)
def test_concept_refuses_a_corpus_where_every_word_carries_it(corpus, concept):
    with pytest.raises(ValueError, match=r"every word of corpus 'tiny' \(6 words\) carries concept 'all'"):
        concept.classes(corpus)


def test_concept_looks_at_the_words_of_its_own_corpus_alone(corpus):
    """A part of a corpus keeps the vocabulary and the labels of the whole."""
    first = corpus.take([0])
    assert Concept("LOC").classes(first).of_word.tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match=r"no word of corpus 'tiny' .* carries concept 'GPE'"):
        Concept("GPE").classes(first)
    with pytest.raises(ValueError, match=r"no word of corpus 'tiny' .* carries concept 'land'"):
        Concept("land", words=("France",)).classes(first)
