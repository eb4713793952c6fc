"""Similarity of meaning, polysemy and separated classes by hand; the null of `separated` keeps its level."""

from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.measure.meaning import (
    Polysemy,
    concept_similarity,
    concept_words,
    polysemy,
    separated,
    similarity_to,
)
from relearn_lens.measure.topwords import TopWords, top_words
from relearn_lens.measure.vectors import WordVectors, input_embeddings
from relearn_lens.models.toy import PERSON_NEURONS, PLACES
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.streaming import ClassStats, ClassSums, stream
from relearn_lens.text.concept import Classes, Concept, label_shuffles
from relearn_lens.text.corpus import build_corpus
from relearn_lens.text.encoding import encode
from tests.find.test_saliency import site
from tests.fixtures import Untouched, sentences_of, unchecked

NAN = float("nan")
VECTORS = {"Rome": [1.0, 0.0], "Paris": [1.0, 1.0], "Isaac": [0.0, 2.0], "Adam": [-1.0, 0.0], ".": [5.0, 5.0]}


def top_of(words: list[list[str]], *, null: list[int] = []) -> TopWords:  # noqa: B006
    """Top words of one layer: a line of words for each neuron."""
    vocab = tuple(dict.fromkeys(word for line in words for word in " ".join(line).split()))
    ranks = [[vocab.index(word) for word in " ".join(line).split()] for line in words]
    ids = torch.tensor([[*line, *[-1] * (3 - len(line))] for line in ranks])[None]
    is_null = torch.tensor([[i in null or not line for i, line in enumerate(ranks)]])
    return TopWords(ids, (ids >= 0).float(), vocab, ids[..., 0] < 0, is_null, site(1, len(words)), 99, 0.1)


def tops(*words: str, null: list[int] = []) -> TopWords:  # noqa: B006
    return top_of([[line] for line in words], null=null)


def by_hand(asked: list[list[str]] | None = None) -> WordVectors:
    def vectors(words: Any) -> torch.Tensor:
        if asked is not None:
            asked.append(list(words))
        return torch.tensor([VECTORS.get(word, [NAN, NAN]) for word in words])

    return vectors


def same(found: torch.Tensor, expected: list[float]) -> None:
    assert found.dtype in (torch.float32, torch.int64)
    torch.testing.assert_close(found, torch.tensor([expected]), equal_nan=True)


# --- similarity


def test_concept_similarity_by_hand():
    before = tops("Rome", "Rome Paris", "Rome", "Rome", "nowhere", "")
    now = tops("Paris", "Isaac nowhere", "Adam", "Rome Paris Isaac", "Rome", "Rome")
    # (1,0) with (1,1): 1/sqrt 2. (2,1)/2 with (0,2): 1/sqrt 5; nowhere is left out. Opposite. (1,0) with (2,3)/3:
    # 2/sqrt 13. No word of the fifth has a vector; the sixth was dead.
    expected = [2**-0.5, 5**-0.5, -1.0, 2 * 13**-0.5, NAN, NAN]
    asked: list[list[str]] = []
    same(concept_similarity(before, now, by_hand(asked)), expected)
    same(concept_similarity(now, before, by_hand()), expected)
    # every word once
    assert len(asked) == 1
    assert sorted(asked[0]) == sorted({"Rome", "Paris", "Isaac", "Adam", "nowhere"})


def test_concept_similarity_treats_nulls_alike_or_as_published():
    before = tops("Rome", ".", "", "Rome", "", "Rome", null=[1])
    now = tops("Rome", "Rome", "Rome", ".", "", "", null=[3])
    same(concept_similarity(before, now, by_hand()), [1.0, NAN, NAN, NAN, NAN, NAN])
    same(concept_similarity(before, now, by_hand(), nulls="zero_then_drop"), [1.0, 0.0, 0.0, NAN, NAN, NAN])
    # at the base stage itself what was null counts as 0
    same(concept_similarity(before, before, by_hand(), nulls="zero_then_drop"), [1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    same(concept_similarity(before, before, by_hand()), [1.0, NAN, NAN, 1.0, NAN, 1.0])


def test_concept_similarity_of_words_that_cancel_is_unknown():
    same(concept_similarity(tops("Rome Adam", "Rome"), tops("Rome", "Rome"), by_hand()), [NAN, 1.0])


def test_concept_similarity_without_any_word():
    same(concept_similarity(tops("", ""), tops("", ""), by_hand()), [NAN, NAN])


def test_similarity_to_a_concept_by_hand():
    now = tops("Rome", "Isaac", "Adam nowhere", "nowhere", "Rome", null=[4])
    # the concept's mean: (2, 1) / 2
    found = similarity_to({"Rome", "Paris", "nowhere"}, now, by_hand())
    same(found, [2 * 5**-0.5, 5**-0.5, -2 * 5**-0.5, NAN, NAN])
    same(similarity_to("Rome", now, by_hand()), [1.0, 0.0, -1.0, NAN, NAN])


def test_similarity_refuses_what_does_not_fit():
    one, two = tops("Rome"), tops("Rome", "Rome")
    with pytest.raises(ValueError, match="unknown nulls 'keep'; known: drop, zero_then_drop"):
        unchecked(concept_similarity)(one, one, by_hand(), nulls="keep")
    with pytest.raises(
        ValueError, match="of different sites cannot be compared: 'resid' with 1 neurons and 'resid' with 2"
    ):
        concept_similarity(one, two, by_hand())
    with pytest.raises(ValueError, match=r"none of the concept's 2 word\(s\) has a vector: \['here', 'nowhere'\]"):
        similarity_to(["nowhere", "here"], one, by_hand())
    with pytest.raises(ValueError, match=r"one row for each of the 1 words asked for, got shape \(7, 2\)"):
        concept_similarity(one, one, lambda words: torch.zeros(7, 2))


def test_similarity_on_the_toy_finds_the_planted_neurons(toy_model, untouched: Untouched):
    vectors = input_embeddings(toy_model.tagger)
    with untouched(toy_model.tagger):
        top = top_words(toy_model.tagger, toy_model.corpus, site="mlp_post")
        same_as_before = concept_similarity(top, top, vectors)
        near = similarity_to(PLACES, top, vectors)
    torch.testing.assert_close(same_as_before, torch.ones_like(near))
    planted = Neurons.of(top.site, toy_model.planted + toy_model.decoys).mask
    assert near[planted].min() > near[~planted].max()


# --- polysemy


def test_words_with_control_characters_are_printed_as_python_writes_them():
    odd = polysemy(tops("\x1b[31m naïve"), tops("\U0001f469\u200d\U0001f467 \x07"), {"naïve"})
    assert odd.table() == "L0N0: \\x1b[31m, naïve → \U0001f469\u200d\U0001f467, \\x07"


def test_polysemy_by_hand():
    before = tops("Isaac Adam", "Rome", "Isaac Paris", "Isaac", "Rome", "Isaac")
    now = tops("Rome Paris Isaac", "Rome", "Isaac", "Rome", "", "Rome", null=[5])
    mixed = polysemy(before, now, {"Rome", "Paris"})
    same(mixed.kept, [0.5, 1.0, 0.5, 0.0, NAN, NAN])
    same(mixed.concept_share, [2 / 3, 1.0, 0.0, 1.0, NAN, NAN])
    same(mixed.gained, [2 / 3, 0.0, -0.5, 1.0, NAN, NAN])
    assert list(mixed.mixed) == [("0", 0)]
    assert mixed.table().splitlines() == [
        "L0N3: Isaac → Rome",
        "L0N0: Isaac, Adam → Rome, Paris, Isaac",
        "L0N1: Rome → Rome",
        "L0N2: Isaac, Paris → Isaac",
    ]
    assert mixed.table(1) == "L0N3: Isaac → Rome"
    first = mixed.rows()[1]
    assert (str(first.neuron), first.before, first.now) == ("L0N0", ("Isaac", "Adam"), ("Rome", "Paris", "Isaac"))
    assert (first.kept, first.gained) == (0.5, pytest.approx(2 / 3))
    assert repr(mixed) == "Polysemy(resid: 1 of 4 neurons mix old meaning and the concept)"


def test_polysemy_of_some_neurons_is_nan_elsewhere():
    before, now = tops("Isaac", "Isaac", "Rome"), tops("Rome", "Rome Isaac", "Rome")
    found = polysemy(before, now, "Rome", neurons=Neurons.of(now.site, [("0", 1), ("0", 2)]))
    same(found.kept, [NAN, 1.0, 1.0])
    same(found.gained, [NAN, 0.5, 0.0])
    assert [str(row.neuron) for row in found.rows()] == ["L0N1", "L0N2"]
    assert isinstance(found, Polysemy)


def test_polysemy_of_a_model_with_itself_keeps_everything(toy_model):
    top = top_words(toy_model.tagger, toy_model.corpus, site="mlp_post")
    found = polysemy(top, top, PLACES)
    assert (found.kept == 1).all()
    assert (found.gained == 0).all()
    assert Neurons(found.concept_share == 1, top.site) == Neurons.of(top.site, toy_model.planted + toy_model.decoys)


def test_polysemy_refuses_other_sites():
    one, two = tops("Rome"), tops("Rome", "Rome")
    with pytest.raises(ValueError, match="top words of different sites cannot be compared"):
        polysemy(one, two, {"Rome"})
    with pytest.raises(ValueError, match="neurons are of 'resid', the top words of 'resid', or of two models"):
        polysemy(one, one, {"Rome"}, neurons=Neurons.of(two.site, []))


def test_concept_words_carry_it_in_half_of_their_occurrences():
    text = build_corpus(
        sentences_of("Rome/LOC Paris/LOC Paris Adam/PER\nRome/LOC York/LOC York York old\nThe The/LOC The/LOC"),
        name="few",
    )
    assert concept_words(text, Concept("place", labels=("LOC",))) == {"Rome", "Paris", "The"}
    assert concept_words(text, Concept("old", words=("OLD", "the"))) == {"old", "The"}
    # of a part of the text, the words of that part
    assert concept_words(text.take([0]), Concept("person", labels=("PER",))) == {"Adam"}


# --- classes that a neuron separates


def stats_by_numpy(words: np.ndarray, of_word: np.ndarray, n: int = 2) -> ClassStats:
    """Statistics of activations `[word, neuron]`, as one layer."""
    groups = [words[of_word == k] for k in range(n)]
    mean = torch.tensor(np.stack([g.mean(0) if len(g) else 0 * words[0] for g in groups]))[:, None]
    m2 = torch.tensor(np.stack([((g - g.mean(0)) ** 2).sum(0) if len(g) else 0 * words[0] for g in groups]))[:, None]
    return ClassStats(torch.tensor([len(g) for g in groups]), mean, m2, tuple("OAB"[:n]), site(1, words.shape[1]))


def shuffled_stats(
    words: np.ndarray, of_word: np.ndarray, n: int, seed: int, classes: int = 2, types: np.ndarray | None = None
) -> list[ClassStats]:
    """Under shuffled labels; every word its own type unless they are given."""
    types = np.arange(len(words)) if types is None else types
    cut = Classes(tuple("OAB"[:classes]), of_word, np.zeros(classes, dtype=bool))
    return [stats_by_numpy(words, other, classes) for other in label_shuffles(cut, types, n, seed=seed)]


def test_separated_counts_the_classes_above_the_highest_neuron_under_shuffled_labels():
    rng = np.random.default_rng(0)
    of_word = np.repeat([0, 1, 2], [60, 30, 30])
    words = rng.normal(size=(120, 6))
    words[of_word == 1, 0] += 3
    words[of_word == 1, 1] += 3
    words[of_word == 2, 1] -= 3
    words[:, 5] = 4.0
    words[:, 4] *= 100  # d' has no unit
    stats = stats_by_numpy(words, of_word, 3)
    shuffled = shuffled_stats(words, of_word, 39, 0, 3)

    def d_prime(labels: np.ndarray, k: int) -> np.ndarray:
        one, rest = words[labels == k][:, :5], words[labels != k][:, :5]
        squares = (len(one) - 1) * one.var(0, ddof=1) + (len(rest) - 1) * rest.var(0, ddof=1)
        return np.abs(one.mean(0) - rest.mean(0)) / np.sqrt(squares / (len(labels) - 2))

    cut = Classes(("O", "A", "B"), of_word, np.array([False, True, False]))
    expected = np.zeros(6, dtype=int)
    for k in range(3):
        # the 38th of 39 highest: one of 40 is above it, and one at it
        threshold = sorted(d_prime(other, k).max() for other in label_shuffles(cut, np.arange(120), 39, seed=0))[37]
        expected[:5] += d_prime(of_word, k) > threshold
    found = separated(stats, shuffled)
    same(found, expected.tolist())
    assert expected.tolist()[5] == 0
    assert expected[0] >= 1
    assert expected[1] >= 2


def test_separated_is_not_misled_by_a_dead_neuron_whose_means_differ_by_float_noise():
    rng = np.random.default_rng(0)
    of_word = np.repeat([0, 1], 30)
    words = rng.normal(size=(60, 3)) + 9 * of_word[:, None] * [1, 0, 0]
    words[:, 2] = 4.0 + 1e-9 * of_word  # its d' is infinite
    shuffled = shuffled_stats(words, of_word, 19, 0)
    for other in shuffled:
        other.mean[1, 0, 2] += 1e-9
        other.m2[:, 0, 2] = 0.0
    assert separated(stats_by_numpy(words, of_word), shuffled).tolist() == [[2, 0, 0]]


def test_separated_leaves_out_classes_with_few_words():
    rng = np.random.default_rng(0)
    of_word = np.repeat([0, 1, 2], [40, 40, 9])
    words = rng.normal(size=(89, 2)) + 9 * of_word[:, None]
    stats, shuffled = stats_by_numpy(words, of_word, 3), shuffled_stats(words, of_word, 19, 0, 3)
    most = separated(stats, shuffled, min_words=9)
    few = separated(stats, shuffled)
    assert most.tolist() == (few + 1).tolist()
    assert separated(stats, shuffled, min_words=50).tolist() == [[0, 0]]


def test_separated_raises_a_false_alarm_at_its_level():
    alarms = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        words, of_word = rng.normal(size=(60, 15)), np.repeat([0, 1], [40, 20])
        found = separated(stats_by_numpy(words, of_word), shuffled_stats(words, of_word, 4, seed), level=0.2)
        # of two classes each is the other's rest
        assert set(found.flatten().tolist()) <= {0, 2}
        alarms.append(bool(found.any()))
    # of any neuron at all: 20 %, with a standard deviation of 2.8 % over 200 texts
    assert 0.12 <= np.mean(alarms) <= 0.28


def test_separated_raises_no_more_false_alarms_where_words_repeat():
    # 60 words of 20 occurrences each, alike among themselves and nothing else: classes cut the words at random.
    alarms, by_token = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        types = np.repeat(np.arange(60), 20)
        words = (rng.normal(size=(60, 10))[types] + rng.normal(size=(1200, 10))).astype(float)
        of_word = (types < 20).astype(np.int64)
        stats = stats_by_numpy(words, of_word)
        alarms.append(bool(separated(stats, shuffled_stats(words, of_word, 4, seed, types=types), level=0.2).any()))
        by_token.append(bool(separated(stats, shuffled_stats(words, of_word, 4, seed), level=0.2).any()))
    assert 0.08 <= np.mean(alarms) <= 0.32  # 20 %, with a standard deviation of 4 % over 100 texts
    assert np.mean(by_token) > 0.9


def test_shuffles_deal_labels_to_word_types_and_depend_on_the_seed_alone(untouched: Untouched):
    rng = np.random.default_rng(0)
    # types 0 to 9 once each, 10 to 29 four times (some five), 30 alone is frequent; 12 is of two classes
    types = rng.permutation(np.repeat(np.arange(31), [1] * 10 + [4, 5] * 10 + [100]))
    of_word = np.isin(types, [0, 1, 10, 11, 13, 30]).astype(np.int64)
    of_word[types == 12] = [0, 1, 1, 1]
    classes = Classes(("O", "A"), of_word, np.array([False, True]))
    with untouched():
        one, two, other = (label_shuffles(classes, types, 200, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], other[0])
    share = np.array([[made[types == kind].mean() for kind in range(31)] for made in one])
    assert (share[:, 30] == 1).all()  # no other word is as frequent
    whole = np.isin(share, (0, 1))
    assert whole[:, :10].all()
    assert (whole[:, 10:30].sum(1) == 19).all()  # the mixture of type 12 went to one type, whichever
    assert ((share[:, :10] == 1).sum(1) == 2).all()
    assert ((share[:, 10:30] == 1).sum(1) == 3).all()
    np.testing.assert_allclose(share[:, :10].mean(0), 0.2, atol=0.12)
    np.testing.assert_allclose(share[:, 10:30].mean(0), 3.75 / 20, atol=0.12)


def test_shuffles_of_words_that_occur_once_are_plain_permutations():
    of_word = np.repeat([0, 1, 2], [30, 20, 10])
    for made in label_shuffles(
        Classes(("O", "A", "B"), of_word, np.array([False, True, False])), np.arange(60), 5, seed=0
    ):
        assert np.bincount(made).tolist() == [30, 20, 10]


def test_separated_finds_what_was_planted(toy_model, untouched: Untouched):
    classes = Concept("place").classes(toy_model.corpus)
    place = site_of(toy_model.tagger.bridge, "mlp_post")
    sums = ClassSums(place, classes, label_shuffles(classes, toy_model.corpus.word, 19, seed=0))
    encoded = encode(toy_model.corpus, toy_model.tagger.tokenizer)
    with untouched(toy_model.tagger):
        stream(toy_model.tagger, encoded, [sums], site=place)
    stats, *shuffled = sums.all()
    found = separated(stats, shuffled)
    for neurons in (toy_model.planted, toy_model.decoys, PERSON_NEURONS):
        assert found[Neurons.of(place, neurons).mask].min() >= 1
    # under labels that mean nothing no neuron separates much
    assert separated(shuffled[0], shuffled).sum() <= 2


@pytest.mark.parametrize(
    ("level", "n", "said"),
    [
        (0.05, 18, r"a level of 0\.05 needs at least 19 shuffles, got 18; see label_shuffles\(\)"),
        (0.01, 98, "needs at least 99 shuffles, got 98"),
        (0.0, 19, r"level must be above 0 and below 1, got 0\.0"),
        (1.0, 19, r"level must be above 0 and below 1, got 1\.0"),
    ],
)
def test_separated_refuses_a_level_that_the_shuffles_cannot_tell(level, n, said):
    words, of_word = np.random.default_rng(0).normal(size=(30, 2)), np.repeat([0, 1], 15)
    with pytest.raises(ValueError, match=said):
        separated(stats_by_numpy(words, of_word), shuffled_stats(words, of_word, n, 0), level=level)


def test_separated_refuses_shuffles_of_something_else():
    words, of_word = np.random.default_rng(0).normal(size=(30, 2)), np.repeat([0, 1], 15)
    stats = stats_by_numpy(words, of_word)
    for other in (stats_by_numpy(words[:20], of_word[:20]), stats_by_numpy(words, of_word, 3)):
        with pytest.raises(ValueError, match="of other classes, another site or other words than stats"):
            separated(stats, [other] * 19)
