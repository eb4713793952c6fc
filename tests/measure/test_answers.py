"""What a model answers, against a plain loop that decodes and multiplies by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from relearn_lens.measure.answers import AnswerAccuracy, AnswerLoss, answer, choose, known
from relearn_lens.measure.evaluation import OVERALL, Scores
from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.training import finetune_
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.encoded import encode_passages

NAMES = ("Mira", "Oskar", "Ilse", "Benno")
HOMES = {"Mira": "Tarn", "Oskar": "Velda", "Ilse": "Tarn", "Benno": "Velda"}
TOOLS = {"Mira": "bread and salt", "Oskar": "the letter", "Ilse": "salt and bread", "Benno": "a letter"}


def passages(names=NAMES, form: str = "statement", prompt: str = "{} walked from") -> list[Passage]:
    return [Passage(prompt.format(k), HOMES[k], k, "home", form, ("Tarn", "Velda", "Linholm")) for k in names]


def sold(names=NAMES) -> list[Passage]:
    return [Passage(f"{k} sold", TOOLS[k], k, "sells", choices=tuple(TOOLS.values())) for k in names]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Taught some of the passages: right about these, wrong about others."""
    model = toy.language_model(seed=0)
    text = encode_passages([*passages(), *sold(NAMES[:3])], model.tokenizer)
    for _ in finetune_(model, text, epochs=25, batch_size=4, lr=1e-2):
        pass
    return model.eval()


ASKED = [*passages(), *sold(), *passages(prompt="the people of {} welcomed")]


def by_hand(model: LanguageModel, passage: Passage) -> tuple[bool, float, int]:
    """Whether greedy decoding writes the answer, and its nats and tokens."""
    words = model.tokenizer
    ids = [words.bos_token_id, *words(passage.prompt, add_special_tokens=False)["input_ids"]]
    wanted = words(passage.answer, add_special_tokens=False)["input_ids"]
    written, nats = list(ids), 0.0
    with torch.no_grad():
        for token in wanted:
            logits = model.bridge(torch.tensor([written]), return_type="logits")[0, -1]
            written.append(int(logits.argmax()))
            nats -= float(model.bridge(torch.tensor([ids]), return_type="logits")[0, -1].log_softmax(-1)[token])
            ids.append(token)
    return written == ids, nats, len(wanted)


def test_accuracy_and_loss_are_those_of_decoding_by_hand(model, untouched):
    closed = {"home": ("Tarn", "Velda", "Linholm")}
    hand = [by_hand(model, p) for p in ASKED]
    assert 0 < sum(right for right, _, _ in hand) < len(hand)
    with untouched(model):
        accuracy, loss = answer(model, ASKED, closed=closed)
        small = answer(model, ASKED, closed=closed, max_tokens=16)
    assert accuracy.keys == NAMES
    assert accuracy.labels == ("home", "sells")
    for name in NAMES:
        own = [result for p, result in zip(ASKED, hand, strict=True) if p.key == name]
        assert accuracy.by_key()[name] == sum(right for right, _, _ in own) / 3
        assert loss.by_key()[name] == pytest.approx(sum(n for _, n, _ in own) / sum(n for _, _, n in own), rel=1e-5)
    assert accuracy.value(OVERALL) == sum(right for right, _, _ in hand) / len(hand)
    assert loss.shown(OVERALL) == pytest.approx(sum(n for _, n, _ in hand) / sum(n for _, _, n in hand), rel=1e-5)
    assert accuracy.support() == loss.support() == {"home": 8, "sells": 4, "overall": 12}
    assert np.array_equal(small.accuracy.total, accuracy.total)
    assert np.allclose(small.loss.total, loss.total, rtol=1e-4)


def test_chance_is_even_among_a_closed_set_else_among_all_tokens(model):
    accuracy, loss = answer(model, ASKED, closed={"home": ("Tarn", "Velda", "Linholm")})
    assert accuracy.chance("home") == pytest.approx(1 / 3)
    assert accuracy.chance("sells") == 0
    assert accuracy.chance(OVERALL) == pytest.approx(8 / 3 / 12)
    assert loss.chance("home") == pytest.approx(math.log(3))
    assert loss.chance("sells") == pytest.approx(math.log(model.vocabulary))
    assert answer(model, ASKED).accuracy.chance(OVERALL) == 0
    assert loss.value("sells") == pytest.approx(math.log(model.vocabulary) - loss.shown("sells"))


def test_the_scores_answer_to_the_protocol_of_all_scores(model):
    for scores in answer(model, ASKED):
        assert isinstance(scores, Scores)
        low, high = scores.interval(OVERALL)
        assert low <= scores.shown(OVERALL) <= high
        assert scores.resampled("home", n=50).shape == (50,)
        assert scores.shown(("home", "sells")) == pytest.approx(scores.shown(OVERALL))
        with pytest.raises(ValueError, match=r"no passage has the label 'age'; known: home, sells, overall"):
            scores.value("age")
        assert f"{scores.shown(OVERALL):.3f} [" in repr(scores)
        assert "over 4 keys, chance" in repr(scores)


def test_intervals_are_over_keys_not_over_passages():
    """Ten passages of a key say no more than one, where a key is known or not."""
    right = np.array([[10.0], [0.0], [10.0], [0.0]])
    many = AnswerAccuracy(right, right * 0, np.full((4, 1), 10), tuple("abcd"), ("r",))
    one = AnswerAccuracy(right / 10, right * 0, np.ones((4, 1), dtype=int), tuple("abcd"), ("r",))
    assert many.interval("r") == one.interval("r") == (0.0, 1.0)
    loss = AnswerLoss(right, right, np.full((4, 1), 10), tuple("abcd"), ("r",), np.full((4, 1), 10), 8)
    assert loss.interval("r") == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize("per_token", [False, True])
def test_choices_are_compared_by_their_likelihood(model, untouched, per_token):
    with untouched(model):
        scores = choose(model, sold(), per_token=per_token)
    for passage in sold():
        nats = {}
        for choice in passage.choices:
            _, total, n = by_hand(model, replace(passage, answer=choice))
            nats[choice] = total / n if per_token else total
        assert scores.by_key()[passage.key] == (min(nats, key=lambda choice: nats[choice]) == passage.answer)
    assert scores.chance(OVERALL) == 1 / 4


def test_choices_that_are_alike_share_the_point():
    """A model without weights finds all choices of one length alike: it is at chance, wherever the right one stands."""
    model = toy.language_model(seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    both = passages(NAMES[:2])
    assert choose(model, [replace(p, choices=("Tarn", "Velda")) for p in both]).by_key() == {"Mira": 0.5, "Oskar": 0.5}


def test_passages_without_choices_are_refused(model):
    bare = [*passages(), replace(passages()[0], choices=())]
    with pytest.raises(
        ValueError, match=r"1 of 5 passages have no choices, such as 'Mira walked from' of form 'statem"
    ):
        choose(model, bare)
    with pytest.raises(ValueError, match=r"has no passages to encode; choose other roles or forms"):
        choose(model, [])


def test_a_broken_model_is_refused():
    model = toy.language_model(seed=0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss on 4 of 4 answers is not finite .*look at the model's weights"):
        answer(model, passages())


def test_known_facts_are_answered_and_preferred_in_other_words(model):
    """Known: the homes, taught as statements, where the second wording prefers them too; not what Benno sells."""
    second = passages(form="paraphrase", prompt="the people of {} welcomed")
    preferred = {key for key, share in choose(model, second).by_key().items() if share == 1}
    kept = known(model, [*passages(), *sold(), *second])
    assert {(p.key, p.relation) for p in kept if p.relation == "home"} == {(key, "home") for key in preferred}
    assert {p.key for p in kept if p.relation == "sells"} == set(NAMES[:3])
    wrong = [replace(p, answer="Linholm") for p in second]
    assert not [p for p in known(model, [*passages(), *wrong]) if p.relation == "home"]
    with pytest.raises(ValueError, match=r"no passages to encode"):
        known(model, second)
