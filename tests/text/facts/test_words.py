"""Labelled text as passages."""

from dataclasses import replace

import numpy as np
import pytest

from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.facts import from_concept, from_corpus
from tests.fixtures import sentences_of

TEXT = """
    We went to New/LOC York/-LOC and Paris/LOC with Anna/PER .
    Paris/LOC was cold .
    Then Paul/PER saw Rome/LOC Oslo/LOC .
    The road was old .
    There Rome/PER slept .
"""


@pytest.fixture
def text() -> Corpus:
    return build_corpus(sentences_of(TEXT), name="text", groups=[0, 0, 1, 1, 2])


def test_sentences_are_plain_text_with_the_key_of_their_document(text):
    passages = from_corpus(text)
    assert [p.key for p in passages] == [f"text, group {i}" for i in (0, 0, 1, 1, 2)]
    assert (passages[3].prompt, passages[3].answer, passages[3].form) == ("", "The road was old .", "text")


def test_a_concept_is_cut_before_each_of_its_spans(text):
    facts = from_concept(text, Concept("place", labels=("LOC",)))
    forget = {(p.prompt, p.answer, p.key) for p in facts.passages("forget_attacked", "forget_held_out")}
    assert forget == {
        ("We went to", "New York", "new york"),
        ("We went to New York and", "Paris", "paris"),
        ("Then Paul saw", "Rome", "rome"),
        ("Then Paul saw Rome", "Oslo", "oslo"),
    }
    assert {(p.prompt, p.answer, p.relation) for p in facts.retain_near} == {
        ("We went to New York and Paris with", "Anna", "PER"),
        ("Then", "Paul", "PER"),
    }
    assert [p.answer for p in facts.retain_general] == ["The road was old ."]
    assert facts.notes == ("1 words of other labels were left out: they carry the concept elsewhere",)
    assert len(facts.keys("forget_attacked")) == len(facts.keys("forget_held_out")) == 2


def test_a_concept_by_words_keeps_plain_text_near(text):
    facts = from_concept(text, Concept("weather", words=("cold", "old")))
    assert {p.answer for p in facts.passages("forget_attacked", "forget_held_out")} == {"cold", "old"}
    assert len(facts.retain_near) == 3
    assert facts.retain_general == facts.notes == ()


def test_a_concept_that_opens_every_sentence_is_refused():
    text = build_corpus(sentences_of("Rome/LOC is old\nParis/LOC is cold"), name="text")
    with pytest.raises(
        ValueError, match=r"every word of corpus 'text' that carries concept 'LOC' opens its sentence or"
    ):
        from_concept(text, Concept("LOC"))


def test_text_is_put_together_with_the_blanks_that_it_has(text):
    spaced = np.array([word != "." and word != "York" for sentence in text for word, _ in sentence])
    tight = replace(text, spaced=spaced)
    facts = from_concept(tight, Concept("LOC"))
    assert {p.answer for p in facts.passages("forget_attacked", "forget_held_out")} == {
        "NewYork",
        "Paris",
        "Rome",
        "Oslo",
    }
    assert [p.answer for p in facts.retain_general] == ["The road was old."]
    spaced[list(text.label_names).index("LOC") == text.label] = False
    with pytest.raises(ValueError, match=r"or follows another word without a blank, so that no prompt ends before it"):
        from_concept(replace(text, spaced=spaced), Concept("LOC"))
