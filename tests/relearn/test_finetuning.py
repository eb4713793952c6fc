"""Ways back by training: each is the one loop on the text that it says, with the weights that it says."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.methods import Training
from relearn_lens.models import toy
from relearn_lens.models.lora import adapted
from relearn_lens.models.training import train_
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.relearn.finetuning import (
    Benign,
    FineTune,
    General,
    Gibberish,
    RepairThenRelearn,
    RetainOnly,
)
from relearn_lens.text.facts import TRAINED, from_corpus
from relearn_lens.text.facts.encoded import encode_facts

HOW: dict[str, Any] = {"steps": (1, 3), "lr": 1e-2, "batch_size": 4}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("kind", "role"), [(FineTune, "forget_attacked"), (RetainOnly, "retain_near"), (General, "retain_general")]
)
def test_it_is_the_one_loop_on_the_text_of_a_role(make, facts, kind, role):
    one, other = make(), make()
    pauses = list(kind(**HOW)(one, facts, seed=5))
    text = encode_facts(facts, role, tokenizer=other.tokenizer, context=other.context)
    assert pauses == list(train_(other, text, Training(**HOW, schedule="constant"), seed=5))
    assert same(weights(one), weights(other))
    assert [pause.stage for pause in pauses] == ["1", "3"]


def test_adapters_are_those_of_the_block_to_the_bit_and_merged_at_the_end(make, facts):
    one, other = make(), make()
    attack = FineTune(lora=3, alpha=6, **HOW)
    training = attack(one, facts, seed=5)
    next(training)
    under_way = weights(one)
    next(training)
    assert list(training) == []
    text = encode_facts(facts, "forget_attacked", tokenizer=other.tokenizer, context=other.context)
    with adapted(other, rank=3, alpha=6, seed=5):
        for pause in train_(other, text, Training(**HOW, schedule="constant"), seed=5):
            if pause.step == 1:
                assert same(under_way, weights(other))
    assert same(weights(one), weights(other))
    before = weights(make())
    for name, value in weights(one).items():
        moved = value - before[name]
        if value.ndim < 2 or "tok_embed" in name or "head" in name:
            assert not moved.any(), name
        else:
            assert 0 < torch.linalg.matrix_rank(moved, atol=1e-5) <= 3, name
    stopped = make()
    training = attack(stopped, facts, seed=5)
    next(training)
    training.close()  # type: ignore[attr-defined]
    stopped.load_weights(before)  # refused while there are adapters


def test_adapters_over_half_precision_weights_take_steps_that_those_would_lose(make, facts):
    model = make().to(torch.bfloat16)
    dtypes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that a training was made and never begun
        attack = FineTune(lora=2, steps=(1, 2), lr=1e-6)(model, facts, seed=0)
    for _ in attack:
        trained = [p for p in model.parameters() if p.requires_grad]
        dtypes |= {p.dtype for p in trained}
        assert all(0 < p.abs().max() < 1 for p in trained)
    assert dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_is_frozen_or_left_out_stays_to_the_bit(make, facts):
    model = make()
    before, site = weights(model), site_of(model.bridge, "mlp_post")
    frozen = Neurons.of(site, [("0", 1), ("1", 5)])
    only = WeightMask.of_parts(model, "block 1")
    list(FineTune(freeze=frozen, only=only, **HOW)(model, facts))
    for name, value in weights(model).items():
        still = ~only[name] | WeightMask.of(model, frozen)[name]
        assert torch.equal(value[still], before[name][still]), name
        assert still.all() or not torch.equal(value, before[name]), name
    moved = weights(model)["trunk.layers.0.mlp.fc_out.weight"]
    list(FineTune(freeze=frozen, **HOW)(model, facts))
    now = weights(model)["trunk.layers.0.mlp.fc_out.weight"]
    assert torch.equal(now[:, 1], moved[:, 1])
    assert not torch.equal(now[:, 2], moved[:, 2])


def test_fewer_items_are_some_of_more(make, facts, monkeypatch):
    seen: dict[Any, list[str]] = {}
    for items in (1, 4, 16, 10_000, None):
        text = FineTune(items=items, steps=(1,))(make(), facts, seed=3)._loop.texts["train"]  # type: ignore[attr-defined]
        seen[items] = [p.text for p in text.passages]
    assert [len(each) for each in seen.values()] == [1, 4, 16, 32, 32]
    assert set(seen[1]) < set(seen[4]) < set(seen[16]) < set(seen[None])
    other = FineTune(items=4, steps=(1,))(make(), facts, seed=4)._loop.texts["train"]  # type: ignore[attr-defined]
    assert {p.text for p in other.passages} != set(seen[4])
    keys = {key for each in seen.values() for text in each for key in facts.keys("forget_held_out") if key in text}
    assert not keys


def test_seeds_tell_runs_apart_and_repeat_them(make, facts):
    ends = []
    for seed in (0, 0, 1):
        model = make()
        list(FineTune(**HOW)(model, facts, seed=seed))
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_repair_comes_first_and_steps_are_counted_from_its_beginning(make, facts):
    one, other = make(), make()
    pauses = list(RepairThenRelearn(repair=2, **HOW)(one, facts, seed=1))
    how = Training(**{**HOW, "schedule": "constant"})
    for role, steps in (("retain_general", (2,)), ("forget_attacked", (1, 3))):
        text = encode_facts(facts, role, tokenizer=other.tokenizer, context=other.context)
        last = list(train_(other, text, how.model_copy(update={"steps": steps}), seed=1))
    assert same(weights(one), weights(other))
    assert [pause.step for pause in pauses] == [2, 3, 5]
    assert pauses[-1].loss == last[-1].loss
    assert pauses[-1].tokens_seen == pauses[0].tokens_seen + last[-1].tokens_seen


@pytest.mark.parametrize("attack", [Gibberish(items=20, **HOW), *(Benign(arm=a, **HOW) for a in (
    "topic and form", "topic", "form", "neither"))])  # fmt: skip
def test_text_without_facts_holds_none(make, facts, attack):
    text = attack(make(), facts, seed=2)._loop.texts["train"]
    lines = [p.text for p in text.passages]
    assert text.scored.all()
    held_out, attacked = facts.keys("forget_held_out"), facts.keys("forget_attacked")
    assert not any(key in line for line in lines for key in held_out)
    if isinstance(attack, Gibberish):
        words = {w for p in facts.passages("retain_near", "retain_general", forms=TRAINED) for w in p.text.split()}
        assert {w for line in lines for w in line.split()} <= words
        assert [len(line.split()) for line in lines] == [12] * 20
        return
    assert all(any(key in line for key in attacked) == ("topic" in attack.arm) for line in lines)
    prompts = {p.template for p in facts.passages("forget_attacked", forms="statement")}
    near = [*attacked, *facts.keys("retain_near")]
    templates = {line.replace(next((k for k in near if k in line), "\0"), "{}") for line in lines}
    assert (templates <= prompts) == ("form" in attack.arm)
    answers = {(p.key, p.answer) for p in facts.passages("forget_attacked", forms="statement")}
    assert not any(key in line and line.endswith(answer) for line in lines for key, answer in answers)


def test_the_arms_are_of_one_size(make, facts):
    arms: tuple[Any, ...] = ("topic and form", "topic", "form", "neither")
    sizes = {len(Benign(arm=a, steps=(1,))(make(), facts)._loop.texts["train"].passages) for a in arms}  # type: ignore[attr-defined]
    assert sizes == {6}  # articles on three animals of two relations


def test_labelled_text_is_attacked_with_too(untouched):
    one, other = toy.load(sentences=60), toy.load(sentences=60)
    list(one.tagger.named_modules())
    FineTune(steps=(1,))(one.tagger, one.corpus)
    list(FineTune(items=20, **HOW)(one.tagger, one.corpus, seed=4))
    part = np.sort(np.random.default_rng(4).permutation(60)[:20])
    list(train_(other.tagger, other.corpus.take(part), Training(**HOW, schedule="constant"), seed=4))
    assert same(weights(one.tagger), weights(other.tagger))
    by_role = {"forget_attacked": one.corpus.take([0, 1]), "retain_near": one.corpus.take(range(2, 30))}
    assert len(list(RepairThenRelearn(repair=1, **HOW)(one.tagger, by_role))) == 3
    with untouched(one.tagger, weights=False):
        for _ in FineTune(**HOW)(one.tagger, by_role):
            pass
    with pytest.raises(ValueError, match="general: there is no text for 'retain_general'; texts are there for forget_"):
        General()(one.tagger, by_role)
    with pytest.raises(ValueError, match="relearn: items = 2 of a text that is encoded already"):
        FineTune(items=2)(one.tagger, one.tagger.encode(one.corpus))


def test_what_is_missing_is_said_at_the_call(make, facts):
    from dataclasses import replace

    tagger = toy.tagger()
    with pytest.raises(ValueError, match=r"relearn: facts 'people-0' are answered by a language model, and this model"):
        FineTune()(tagger, facts)
    with pytest.raises(ValueError, match="general: facts 'people-0' have no passage in retain_general of the forms"):
        General()(make(), replace(facts, retain_general=()))
    with pytest.raises(ValueError, match="gibberish is made of passages and takes Facts, got Corpus"):
        Gibberish()(make(), toy.corpus(sentences=3))
    plain = replace(facts, retain_general=from_corpus(toy.corpus(sentences=4)))
    assert len(list(Benign(arm="neither", steps=(1,))(make(), plain))) == 1
    bare = replace(facts, forget_attacked=facts.passages("forget_attacked", forms="statement"))
    with pytest.raises(ValueError, match="benign: facts 'people-0' have nothing for the arm 'topic'; they need"):
        Benign(arm="topic")(make(), bare)
    with pytest.raises(ValueError, match="plain text without labels trains a language model"):
        Benign(arm="form")(tagger, facts)
    with pytest.raises(ValueError, match="lora = 4 and freeze: an adapter moves all of its matrix"):
        FineTune(lora=4, freeze=Neurons.of(site_of(tagger.bridge, "mlp_post"), [("0", 1)]))
    with pytest.raises(ValueError, match="a set of Neurons, not list"):
        FineTune(freeze=[3])
    with pytest.raises(ValueError, match="a WeightMask, or a mapping of plain names to masks, not list"):
        FineTune(only=[3])
    with pytest.raises(ValueError, match="this mask is of the weights of another model"):
        FineTune(only=WeightMask.none(tagger))(make(), facts)
