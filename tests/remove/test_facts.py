"""Facts go straight into a remover, and what is wrong with them is said before any work."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from relearn_lens.models import taught, toy
from relearn_lens.models.taught import Recipe
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.losses import NPO, GradDiff
from relearn_lens.remove.removal import Removing
from relearn_lens.remove.removers import REMOVERS, remove_
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED, Facts, Passage, from_concept, from_corpus, people
from relearn_lens.text.facts.encoded import encode_facts

SMALL = Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=16)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return people(0, n=12, forget=4, never=2, animals=2, n_answers=8)


@pytest.fixture
def model(facts: Facts) -> Any:
    return taught.untaught(facts, recipe=SMALL)


def test_facts_are_their_texts_by_role(facts, model):
    """As if both forget halves, and all that is to stay, had been encoded in their trained wordings by hand."""
    by_hand = {
        role: encode_facts(facts, *roles, tokenizer=model.tokenizer)
        for role, roles in (("forget", FORGET), ("retain", RETAIN))
    }
    assert {p.form for p in by_hand["forget"].passages} == {"statement"}
    assert by_hand["forget"].passages == facts.passages(*FORGET, forms=TRAINED)
    ends = []
    for texts in (facts, by_hand):
        other = taught.untaught(facts, recipe=SMALL)
        list(NPO(beta=0.1)(other, texts, seed=3, steps=(2,), lr=1e-2))
        ends.append({name: value.clone() for name, value in other.weights().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    before = {name: value.clone() for name, value in model.weights().items()}
    list(remove_(model, facts, "npo", seed=3, steps=(2,), lr=1e-2, beta=0.1))
    assert not all(torch.equal(value, before[name]) for name, value in model.weights().items())
    assert all(torch.equal(value, ends[0][name]) for name, value in model.weights().items())


def test_plain_text_that_is_to_stay_counts(facts, model):
    text = Passage("", "the pelican eats fish", "pelican", "text", "text")
    more = replace(facts, retain_general=(text,))
    encoded = encode_facts(more, *RETAIN, tokenizer=model.tokenizer)
    assert text in encoded.passages
    assert len(encoded.passages) == len(facts.passages("retain_near", forms=TRAINED)) + 1


def test_a_next_token_concept_goes_the_same_way():
    corpus = toy.corpus(sentences=40)
    facts, lm = from_concept(corpus, Concept("place")), toy.language_model()
    (pause,) = remove_(lm, facts, "grad_diff", steps=(1,))
    assert set(pause.parts) == {"forget", "retain"}
    plain = Facts("toy", facts.forget_attacked, facts.forget_held_out, from_corpus(toy.corpus(sentences=9, seed=4)))
    list(GradDiff()(lm, plain, steps=(1,)))


def test_a_function_of_ones_own_gets_both_texts(facts, model):
    roles = []

    def mine(model, batches, reference):
        roles.append(tuple(batches))
        nats = model.losses(batches["forget"])
        return {"forget": (-nats.sum(), len(nats))}

    list(remove_(model, facts, mine, steps=(1,)))
    assert roles == [("forget", "retain")]


def only(facts: Facts, form: str, *roles: str) -> Facts:
    return replace(facts, **{role: facts.passages(role, forms=form) for role in roles})


def test_nothing_to_train_on_is_refused(facts, model):
    with pytest.raises(
        ValueError,
        match=r"grad_diff lowers .*; facts 'people-0' have nothing to train on in retain_near and retain_general: it "
        r"takes passages of the form statement or text, and there are options$",
    ):
        GradDiff()(model, only(facts, "options", *RETAIN))
    with pytest.raises(ValueError, match=r"nothing to train on in forget_attacked and .* there are paraphrase$"):
        remove_(model, only(facts, "paraphrase", *FORGET), "gradient_ascent")
    # What needs nothing to retain asks for none.
    list(GradDiff(alpha=0)(model, only(facts, "options", *RETAIN), steps=(1,)))


def test_no_answer_and_a_key_in_both_halves_are_refused(facts):
    with pytest.raises(ValueError, match=r"^the passage 'The capital of X is' about 'X' has no answer; give one, or"):
        Passage("The capital of X is", " ", "X")
    with pytest.raises(ValueError, match=r"is in forget_attacked and in forget_held_out; facts are split by key"):
        replace(facts, forget_held_out=facts.forget_attacked)


def test_facts_are_for_language_models(facts):
    for remover in (NPO(), lambda *_: {}):
        with pytest.raises(ValueError, match=r"facts 'people-0' are answered by a language model, and this model is a"):
            remove_(toy.tagger(), facts, remover)


def test_a_mask_of_another_model_is_refused(facts, model):
    shallow = taught.untaught(facts, recipe=replace(SMALL, n_layers=1))
    # All of its weights are named as some of this model's are, and as large.
    mask = ~WeightMask.none(shallow)
    for remover in (NPO(), lambda *_: {}):
        with pytest.raises(ValueError, match=r"this mask is of the weights of another model: "):
            remove_(model, facts, remover, mask)


def test_a_field_out_of_range_is_one_line(facts, model):
    with pytest.raises(ValueError, match=r"^beta = 0: Input should be greater than 0$"):
        remove_(model, facts, "npo", beta=0)
    with pytest.raises(ValueError, match=r"^lr = -1: Input should be greater than 0$"):
        remove_(model, facts, "npo", lr=-1)


def test_no_field_of_a_remover_is_one_of_its_training():
    for kind in REMOVERS.values():
        assert not set(kind.model_fields) & set(Removing.model_fields), kind.name
