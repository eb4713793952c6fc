"""Values worked out by hand on three sentences in two documents, and invariants of any corpus."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, Word, bio, build_corpus
from tests.fixtures import unchecked

SENTENCES = [
    [("Paul", "PER", True), ("saw", "O", False), ("Rome", "LOC", True)],
    [("he", "O", False), ("left", "O", False)],
    [("New", "LOC", True), ("York", "LOC", False), ("Rome", "LOC", True), ("saw", "O", False)],
]


@pytest.fixture
def corpus() -> Corpus:
    return build_corpus(SENTENCES, name="tiny", groups=[7, 7, 9])


WORD = st.tuples(st.sampled_from("abc"), st.sampled_from(["O", "X", "Y"]), st.booleans())
SENTENCE = st.tuples(st.lists(WORD, min_size=1, max_size=5), st.integers(0, 6))
DRAWN = st.lists(SENTENCE, min_size=3, max_size=12)


def built(drawn) -> Corpus:
    """A corpus of drawn sentences, of three groups at least."""
    words = [word for s, _ in drawn for word in s]
    spaced = [text != "c" or opens for text, _, opens in words]
    return build_corpus([s for s, _ in drawn], name="any", groups=[0, 1, 2, *(g for _, g in drawn[3:])], spaced=spaced)


def test_build_stores_words_flat_and_outside_first(corpus):
    assert corpus.vocab == ("Paul", "saw", "Rome", "he", "left", "New", "York")
    assert corpus.word.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 1]
    assert corpus.label_names == ("O", "LOC", "PER")
    assert corpus.label.tolist() == [2, 0, 1, 0, 0, 1, 1, 1, 0]
    assert corpus.begins.tolist() == [True, False, True, False, False, True, False, True, False]
    assert corpus.start.tolist() == [0, 3, 5, 9]
    assert corpus.group.tolist() == [7, 7, 9]
    assert (corpus.n_words, corpus.n_sentences, len(corpus)) == (9, 3, 3)


def test_build_leaves_out_empty_sentences_and_keeps_the_others_groups():
    corpus = build_corpus([[], SENTENCES[1], [], SENTENCES[0]], name="gaps")
    assert corpus.group.tolist() == [1, 3]
    assert corpus.sentence(0) == [Word("he", "O"), Word("left", "O")]


def test_build_never_begins_a_span_outside():
    assert not build_corpus([[("a", "O", True)]], name="x").begins.any()


def test_build_takes_label_names_that_do_not_occur():
    corpus = build_corpus(SENTENCES, name="x", label_names=("O", "PER", "ORG", "LOC"))
    assert corpus.words_per_label() == {"O": 4, "PER": 1, "ORG": 0, "LOC": 4}


def test_build_refuses_no_words():
    with pytest.raises(ValueError, match=r"corpus 'empty' has no words"):
        build_corpus([[], []], name="empty")


def test_build_refuses_labels_that_are_not_among_label_names():
    with pytest.raises(ValueError, match=r"'tiny' has labels \['PER'\] that are not among \['O', 'LOC'\]"):
        build_corpus(SENTENCES, name="tiny", label_names=("O", "LOC"))


def test_corpus_checks_shapes(corpus):
    with pytest.raises(TypeCheckError, match="label"):
        replace(corpus, label=corpus.label[:-1])
    with pytest.raises(TypeCheckError, match="start"):
        replace(corpus, start=corpus.start[:-1])
    with pytest.raises(TypeCheckError, match="begins"):
        replace(corpus, begins=corpus.begins.astype(int))


def test_iteration_gives_words_with_labels(corpus):
    assert list(corpus)[2] == [("New", "LOC"), ("York", "LOC"), ("Rome", "LOC"), ("saw", "O")]


def test_words_per_label_counts(corpus):
    assert corpus.words_per_label() == {"O": 4, "LOC": 4, "PER": 1}


def test_repr_counts_sentences_words_and_labels(corpus):
    assert repr(corpus) == "Corpus(tiny: 3 sentences, 9 words; O 4, LOC 4, PER 1)"


def test_take_keeps_the_given_order_and_repeats(corpus):
    taken = corpus.take([2, 0, 2], name="mine")
    assert [[w.text for w in s] for s in taken] == [
        ["New", "York", "Rome", "saw"],
        ["Paul", "saw", "Rome"],
        ["New", "York", "Rome", "saw"],
    ]
    assert taken.begins.tolist() == [True, False, True, False, True, False, True, True, False, True, False]
    assert taken.group.tolist() == [9, 7, 9]
    assert (taken.name, taken.label_names) == ("mine", corpus.label_names)


def test_take_nothing_is_an_empty_corpus(corpus):
    assert (corpus.take([]).n_sentences, corpus.take([]).n_words) == (0, 0)


def test_labelled_keeps_sentences_with_a_label(corpus):
    assert [s[0].text for s in corpus.labelled()] == ["Paul", "New"]


def test_sample_is_deterministic_ordered_and_without_replacement():
    corpus = build_corpus([[(str(i), "O", False)] for i in range(50)], name="numbers")
    drawn = [int(s[0].text) for s in corpus.sample(20, seed=3)]
    assert drawn == [int(s[0].text) for s in corpus.sample(20, seed=3)]
    assert drawn != [int(s[0].text) for s in corpus.sample(20, seed=4)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20


def test_sample_of_more_than_there_is_is_everything(corpus):
    assert corpus.sample(3, seed=0) is corpus


@pytest.mark.parametrize("concept", ["LOC", Concept("place", ["LOC"])])
@pytest.mark.parametrize(("share", "with_it"), [(None, 5), (0.3, 3), (1, 10)])
def test_sample_of_a_concept_holds_it_in_its_share_and_fills_up_with_others(concept, share, with_it):
    text = [[(str(i), "LOC" if i % 2 else "PER", True), ("x", "O", False)] for i in range(40)]
    drawn = build_corpus(text, name="numbers").sample(10, seed=1, concept=concept, share=share)
    numbers = [int(sentence[0].text) for sentence in drawn]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10
    assert sum(number % 2 for number in numbers) == with_it


def test_sample_of_a_rare_concept_is_filled_with_others_as_far_as_there_are():
    text = [[(str(i), "LOC" if i < 3 else "O", i < 3)] for i in range(9)]
    corpus = build_corpus(text, name="numbers")
    assert [int(sentence[0].text) < 3 for sentence in corpus.sample(8, seed=0, concept="LOC")] == [True] * 3 + [
        False
    ] * 5
    assert corpus.sample(20, seed=0, concept="LOC").n_sentences == 9


def test_sample_of_a_label_that_there_is_not_is_refused(corpus):
    with pytest.raises(ValueError, match="unknown label 'MISC'; known: O, "):
        corpus.sample(2, seed=0, concept="MISC")


def test_drawing_leaves_the_global_generator_alone(corpus):
    np.random.seed(5)  # noqa: NPY002  (the generator that must not move)
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    corpus.sample(2, seed=0)
    build_corpus(SENTENCES, name="x").split(seed=0)
    assert np.random.random() == expected  # noqa: NPY002


def test_split_meets_the_shares_where_groups_allow():
    corpus = build_corpus([[(str(i), "O", False)] for i in range(100)], name="hundred")
    parts = corpus.split(seed=0, parts=(0.5, 0.3, 0.2))
    assert [len(part) for part in parts] == [50, 30, 20]
    assert [part.name for part in parts] == ["hundred/train", "hundred/validation", "hundred/probe"]


def test_split_depends_on_the_seed():
    corpus = build_corpus([[(str(i), "O", False)] for i in range(100)], name="hundred")
    groups = [corpus.split(seed=seed).train.group.tolist() for seed in (0, 0, 1)]
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize("parts", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.6, 0.6, -0.2)])
def test_split_refuses_parts_that_are_no_shares(corpus, parts):
    with pytest.raises(ValueError, match="must be above 0 and sum to 1"):
        corpus.split(seed=0, parts=parts)


def test_split_refuses_fewer_than_three_groups(corpus):
    with pytest.raises(ValueError, match=r"'tiny' has 2 group\(s\).* at least 3 .*-DOCSTART-"):
        corpus.split(seed=0)


def test_blanks_go_with_their_words():
    corpus = build_corpus(
        SENTENCES, name="tiny", groups=[7, 8, 9], spaced=[True, True, False, True, False, *[True] * 3, False]
    )
    glued = {(i, w) for i in range(3) for w in range(4) if (i, w) in [(0, 2), (1, 1), (2, 3)]}
    taken = corpus.take([2, 0, 2])
    assert taken.spaced is not None
    assert taken.spaced.tolist() == [True] * 3 + [False] + [True, True, False] + [True] * 3 + [False]
    assert corpus.labelled().spaced.tolist() == [True, True, False, True, True, True, False]  # pyright: ignore
    for part in corpus.split(seed=0):
        assert part.spaced is not None
        assert [bool(x) for x in ~part.spaced] == [(part.group[0] - 7, w) in glued for w in range(part.n_words)]
    assert corpus.take([]).spaced is not None


def test_a_corpus_that_does_not_know_its_blanks_reads_each_word_after_one(corpus):
    assert corpus.spaced is None
    assert corpus.after_blank.all()
    assert corpus.take([1]).spaced is None
    assert [part.spaced for part in build_corpus(SENTENCES, name="x").split(seed=0)] == [None] * 3


def test_the_hash_tells_missing_blanks_apart(corpus):
    all_spaced, glued = (replace(corpus, spaced=np.array([True] * 8 + [last])) for last in (True, False))
    assert corpus.sha256() == all_spaced.sha256() != glued.sha256()


def test_build_refuses_blanks_of_another_number():
    with pytest.raises(ValueError, match="spaced has 2 entries for the 9 words of corpus 'tiny'; give one each"):
        build_corpus(SENTENCES, name="tiny", spaced=[True, True])


def test_notes_go_with_every_part_and_are_shown():
    corpus = build_corpus(SENTENCES, name="x", notes=["read <well>"])
    assert [part.notes for part in corpus.split(seed=0)] == [("read <well>",)] * 3
    assert "read &lt;well&gt;" in corpus._repr_html_()


def test_the_parts_of_a_split_have_the_title_of_the_whole(corpus):
    assert {part.title for part in build_corpus(SENTENCES, name="a/b").split(seed=0)} == {"a/b"}
    assert corpus.title == "tiny"


@settings(max_examples=50, deadline=None)
@given(DRAWN, st.integers(0, 5), st.sampled_from([(0.6, 0.2, 0.2), (0.1, 0.1, 0.8), (0.34, 0.33, 0.33)]))
def test_split_keeps_groups_together_and_loses_nothing(drawn, seed, parts):
    corpus = built(drawn)
    split, again = corpus.split(seed=seed, parts=parts), corpus.split(seed=seed, parts=parts)
    groups = [set(part.group.tolist()) for part in split]
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(set(corpus.group.tolist()))
    for part, same, mine in zip(split, again, groups, strict=True):
        kept = [s for s, g in zip(corpus, corpus.group, strict=True) if g in mine]
        assert list(part) == list(same) == kept


@settings(max_examples=50, deadline=None)
@given(DRAWN, st.data())
def test_take_agrees_with_a_slow_loop_and_can_be_undone(drawn, data):
    corpus = built(drawn)
    order = data.draw(st.permutations(range(len(corpus))))
    shuffled = corpus.take(order)
    assert list(shuffled) == [corpus.sentence(i) for i in order]
    back = shuffled.take(np.argsort(order))
    for field in ("word", "label", "begins", "group", "start", "spaced"):
        np.testing.assert_array_equal(getattr(back, field), getattr(corpus, field))


def test_bio_opens_each_span_with_b():
    assert bio(["X", "X", "X", "O"], [True, False, True, False]) == ["B-X", "I-X", "B-X", "O"]


@pytest.mark.parametrize(
    ("word", "label", "message"),
    [
        ("", "LOC", "has the word ''; every word must be a string, not empty"),
        (5, "LOC", "has the word 5; every word must be a string"),
        ("Rome", None, "has the label None; every label must be a string"),
        ("Rome", b"LOC", "has the label b'LOC'; every label must be"),
        ("R\udfff", "LOC", r"the word 'R\\udfff' with half a character"),
        ("R", "L\x1b[31m", r"the label 'L\\x1b\[31m' with a control character"),
    ],
)
def test_build_corpus_refuses_what_is_no_text(word, label, message):
    with pytest.raises(ValueError, match=message):
        unchecked(build_corpus)([[(word, label, True)]], name="odd")


def test_build_corpus_refuses_a_label_name_twice():
    with pytest.raises(ValueError, match=r"label names of corpus 'twice' hold one twice: \['O', 'O'\]; name each once"):
        build_corpus([[("a", "O", False)]], name="twice", label_names=["O", "O"])


def test_split_refuses_parts_that_are_not_numbers(corpus):
    with pytest.raises(ValueError, match="parts must be above 0 and sum to 1"):
        corpus.split(seed=0, parts=(float("nan"), 0.5, 0.5))
