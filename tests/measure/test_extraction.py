"""Metrics of answers, of models whose answers are known."""

import math

import numpy as np
import pytest

from relearn_lens.measure.asking import Asked, Read, Reference, ask, read_answers
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.extraction import (
    Choice,
    ExtractionStrength,
    Familiarity,
    Probability,
    TruthRatio,
    continued,
)
from relearn_lens.measure.utility import Repetition
from relearn_lens.models import toy
from relearn_lens.models.training import finetune_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

ANSWERS = ("bread and salt", "the letter", "salt and bread", "a letter")
NAMES = ("Mira", "Oskar", "Ilse", "Benno")


def sold(name, answer, form="statement"):
    return Passage(f"{name} sold", answer, name, "sells", form, ANSWERS)


NEAR = sold("Ilse", ANSWERS[2]), sold("Benno", ANSWERS[3])
FACTS = Facts("sales", (sold("Mira", ANSWERS[0]),), (sold("Oskar", ANSWERS[1]),), NEAR)


@pytest.fixture(scope="module")
def model():
    """Knows them all."""
    small = toy.language_model(seed=0)
    text = encode_passages(FACTS.passages(), small.tokenizer)
    for _ in finetune_(small, text, epochs=40, batch_size=4, lr=1e-2):
        pass
    return small.eval()


@pytest.mark.parametrize("faithful", [False, True])
def test_extraction_of_the_memorised_is_1_and_of_a_random_model_0(model, untouched, faithful):
    with untouched(model):
        memorised = ExtractionStrength(faithful=faithful)(model, FACTS)
    random = ExtractionStrength(faithful=faithful)(toy.language_model(seed=3), FACTS)
    for place in memorised.labels:
        assert memorised.shown(place) == 1
        answers = [p.answer for p in FACTS.passages(place)]
        n = [len(ids) for ids in model.tokenizer(answers, add_special_tokens=False)["input_ids"]]
        # As released, an answer scores at least one over its tokens but the last.
        assert random.shown(place) == pytest.approx(np.mean([1 / (each - 1) for each in n]) if faithful else 0)


@pytest.mark.parametrize(
    ("right", "strength", "released"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 2 / 3),
        ([1, 0, 1, 1], 0.5, 1 / 3),
        ([1, 1, 1, 0], 0.0, 1.0),  # the release does not look at the last token
        ([0, 0, 0, 0], 0.0, 1 / 3),  # nor can it be 0
        ([1, 1, 0, 1], 0.25, 1 / 3),
        ([1], 1.0, 0.0),
        ([0], 0.0, 0.0),
    ],
)
def test_extraction_strength_of_known_answers(right, strength, released):
    likeliest = np.array(right) > 0
    assert ExtractionStrength().strength(likeliest) == pytest.approx(strength)
    assert ExtractionStrength(faithful=True).strength(likeliest) == pytest.approx(released)


def test_chance_of_extraction_is_that_of_a_fixed_order_of_preference():
    """Two answers of four begin alike: 1/4 for the first token, then 1/2, then 1."""
    closed = [(1, 2, 3), (1, 4, 5), (6, 7, 8), (9, 7, 8)]
    rng = np.random.default_rng(0)
    strengths = []
    for _ in range(4000):
        order = rng.permutation(4)
        right = []
        for k in range(3):
            first = next(i for i in order if closed[i][:k] == closed[0][:k])
            right.append(closed[first][k] == closed[0][k])
        # Greedily written from k: right if all of the rest is right.
        strengths.append(ExtractionStrength().strength(right))
    guess = ExtractionStrength()._guess(np.array(closed[0]), tuple(closed), 4)
    assert guess == pytest.approx((1 / 4 + 1 / 2 + 1) / 3)
    assert np.mean(strengths) == pytest.approx(guess, abs=0.03)


def test_probability_is_per_token():
    passages = tuple(sold(n, a) for n, a in zip(NAMES[:2], ANSWERS, strict=False))
    asked = Asked(FACTS, passages, ("forget_attacked", "forget_held_out"))
    nats = np.array([0.5, 1.0, 1.5, 0.25, 0.75])
    read = Read(passages, nats, np.ones(5, bool), np.array([0, 0, 0, 1, 1]), np.arange(5), 100)
    scores = Probability().of(read, asked)
    assert scores.shown("forget_attacked") == pytest.approx(math.exp(-1.0))
    assert scores.shown("forget_held_out") == pytest.approx(math.exp(-0.5))
    assert scores.chance("forget_attacked") == pytest.approx(1 / 100)  # too few keys for a closed set


@pytest.mark.parametrize(("faithful", "expected"), [(False, 1 - (0.5 + 0.25) / 2), (True, 1 - math.sqrt(0.5 * 0.25))])
def test_truth_ratio_of_known_likelihoods(faithful, expected):
    passage = Passage("x", "a", "k", choices=("b", "a", "c"))
    metric = TruthRatio(faithful=faithful)
    assert metric._of(passage, np.log([2.0, 1.0, 4.0])) == pytest.approx(expected)
    assert metric._of(passage, np.zeros(3)) == 0
    assert metric._of(passage, np.array([0.0, 5.0, 0.0])) == 0  # the right one is less likely


def test_who_knows_chooses_and_finds_wrong_answers_unlikely(model):
    assert Choice()(model, FACTS).shown(OVERALL) == 1
    assert Choice()(model, FACTS).chance(OVERALL) == 1 / 4
    knows, random = (TruthRatio()(m, FACTS).shown(OVERALL) for m in (model, toy.language_model(seed=3)))
    assert knows > 0.5 > random


def test_greedy_continuation_is_that_of_one_prompt_at_a_time(model, untouched):
    prompts = ["Mira sold", "the people of Oskar welcomed", "Ilse sold", "Mira"]
    with untouched(model):
        together = continued(model, prompts, 5)
    assert together == [continued(model, [prompt], 5)[0] for prompt in prompts]
    read = read_answers(model, [Passage(prompts[0], together[0], "k")])
    assert read.right.all()


def test_familiarity_is_the_share_of_topic_words_that_are_written(model):
    scores = Familiarity(tokens=3)(model, FACTS)
    assert scores.by_key()["Mira"] == 1  # bread, salt
    assert scores.chance("retain_near") < scores.shown("retain_near")
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens leaves no room for 1000 more in a context of"):
        Familiarity(tokens=1000)(model, FACTS)


def test_repetition_counts_what_was_written_before(model):
    metric = Repetition(n=2)
    assert metric.new([1, 2, 3, 4]) == 1
    assert metric.new([1, 1, 1, 1, 1]) == 1 / 4
    assert metric.new([1]) == 1
    other = toy.language_model(seed=3)
    scores = metric(model, FACTS, reference=Reference(base=other))
    assert scores.chance(OVERALL) == pytest.approx(metric(other, FACTS).shown(OVERALL))
    assert math.isnan(metric(model, FACTS).chance(OVERALL))


def test_what_has_no_choices_or_no_prompt_is_refused(model):
    bare = Facts("bare", *((Passage("", f"{n} sold bread .", n, form="text"),) for n in NAMES[:3]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"choice compares the choices of a passage, and none of 'bare' has any"):
        Choice()(model, bare)
    with pytest.raises(
        ValueError, match=r"familiarity goes on from a prompt, and no passage of 'bare' that is asked has"
    ):
        Familiarity()(model, bare)
    assert ask(bare).names == ("forget_attacked", "forget_held_out", "retain_near")


def test_an_ontology_has_answers_of_several_tokens():
    facts = made.ontology(0, n=8, forget=4, never=0, instances=1)
    from relearn_lens.models import taught

    blank = taught.untaught(facts, recipe=taught.Recipe(n_layers=1, d_model=32, n_heads=2, d_mlp=64))
    scores = ExtractionStrength()(blank, facts)
    assert scores.shown(OVERALL) < 0.5
