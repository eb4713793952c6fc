"""Tensors that are added to activations, and directions taken out of them, against plain computations."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from relearn_lens.measure.answers import answer
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.models import toy
from relearn_lens.neurons.sites import site_of
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.relearn.inputs import DirectionAblated, Embedding, Latent, SoftPrompt, mean_states
from relearn_lens.text.facts.encoded import encode_facts, encode_passages

FITTED = [Latent(), Latent(layers=(0, 1)), Embedding(), SoftPrompt(tokens=3)]


def logits(model: Any, passages: Any) -> torch.Tensor:
    batch = encode_passages(passages, model.tokenizer).batch(np.arange(len(passages)))
    with torch.no_grad():
        return model(batch.ids, batch.mask)[batch.mask.bool()]


def without_padding(text: Any) -> list[np.ndarray]:
    """The pieces of each length, which can be read together."""
    return [np.flatnonzero(text.lengths == length) for length in np.unique(text.lengths)]


def fitted(attack: Any, model: Any, facts: Any, **how: Any) -> Any:
    text = attack.text(model, facts, 0)
    return *attack.fitted(model, text, attack.place(model, text), **how), attack.place(model, text)


@pytest.mark.parametrize("attack", [*FITTED, DirectionAblated(), DirectionAblated(layers=(1,))], ids=repr)
def test_it_leaves_nothing(model, facts, attack, untouched):
    attack = attack.model_copy(update={"steps": 3}) if hasattr(attack, "steps") else attack
    passages = attack.asked(facts.passages("forget_attacked", forms="statement"), facts)
    plain = logits(model, passages)
    with untouched(model):
        for pause in attack(model, facts, seed=1):
            inside = logits(model, passages)
            assert pause.step == getattr(attack, "steps", 0)
        assert not torch.allclose(inside, plain, atol=1e-6)
        with attack.applied(model, facts, seed=1):
            assert torch.equal(logits(model, passages), inside)
        with pytest.raises(RuntimeError, match="on the way"), attack.applied(model, facts):
            raise RuntimeError("on the way")
    assert torch.equal(logits(model, passages), plain)


@pytest.mark.parametrize("attack", FITTED, ids=repr)
def test_the_tensor_is_fitted_by_adam_and_capped(model, facts, attack):
    """Without the cap's help the first step of Adam is lr times the sign of the gradient."""
    one = attack.model_copy(update={"steps": 1, "lr": 1e-3, "cap": 1e3, "batch_size": 4})
    tensor, pause, place = fitted(one, model, facts, seed=7)
    text = one.text(model, facts, 0)
    batch = text.batch(text.shuffled(batch_size=4, seed=7, epoch=0)[0])
    shift = torch.zeros(place.shape, requires_grad=True)
    with place.adding(model, shift):
        loss = model.losses(batch).mean()
    (gradient,) = torch.autograd.grad(loss, shift)
    torch.testing.assert_close(tensor, -1e-3 * gradient / (gradient.abs() + 1e-8))
    assert pause.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for cap in (0.01, 0.05):
        capped, _, _ = fitted(attack.model_copy(update={"steps": 8, "lr": 0.2, "cap": cap}), model, facts)
        mean = capped.norm(dim=1) / cap
        assert (mean > 0).all()
        again, _, _ = fitted(attack.model_copy(update={"steps": 8, "lr": 0.2, "cap": 2 * cap}), model, facts)
        torch.testing.assert_close(again.norm(dim=1) / (2 * cap), mean)  # at the cap, which is a norm of the model's
    more, _, _ = fitted(attack.model_copy(update={"steps": 25, "lr": 0.1, "cap": 10.0}), model, facts)
    with torch.no_grad():
        nats = [float(model.losses(b).mean()) for b in text.batches()]
        with place.adding(model, more):
            lower = [float(model.losses(b).mean()) for b in text.batches()]
    assert lower < nats


def test_the_cap_is_in_mean_norms_of_what_is_there(model, facts):
    attack = Latent(layers=(1,), steps=20, lr=1.0, cap=0.25)
    tensor, _, _ = fitted(attack, model, facts)
    text, sums, n = encode_facts(facts, "forget_attacked", tokenizer=model.tokenizer), 0.0, 0
    for alike in without_padding(text):
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(text.batch(alike).ids)
        lengths = cache["blocks.1.hook_out"].norm(dim=-1)
        sums, n = sums + float(lengths.sum()), n + lengths.numel()
    assert float(tensor.norm()) == pytest.approx(0.25 * sums / n, rel=1e-4)


def test_a_latent_vector_is_added_on_every_token(model, facts):
    text = encode_facts(facts, "forget_attacked", tokenizer=model.tokenizer)
    place = Latent(layers=(1,)).place(model, text)
    tensor = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    batch = text.batch(np.arange(3))
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(batch.ids)
        by_hand = model.logits(model.bridge.original_model.ln_out(cache["blocks.1.hook_out"] + tensor[0]))
        with place.adding(model, tensor):
            torch.testing.assert_close(model(batch.ids, torch.ones_like(batch.ids)), by_hand)


def test_a_soft_prompt_is_before_the_prompts_that_have_its_place(model, facts):
    attack = SoftPrompt(tokens=3, steps=30, lr=0.1, cap=5.0)
    statements = facts.passages("forget_held_out", forms="statement")
    behind = attack.asked(statements, facts)
    assert behind[0].prompt == ". . . " + statements[0].prompt
    assert (behind[0].answer, behind[0].key) == (statements[0].answer, statements[0].key)
    plain = logits(model, statements)
    before = logits(model, behind)
    with attack.applied(model, facts):
        torch.testing.assert_close(logits(model, statements), plain, rtol=0, atol=0)
        now = logits(model, behind)
    tensor, _, _ = fitted(attack, model, facts)
    start = logits(model, behind)
    torch.testing.assert_close(start, before, rtol=0, atol=0)
    weight = model.plain()["trunk.tok_embed.weight"]
    stop = model.tokenizer(".", add_special_tokens=False)["input_ids"][0]
    ids = encode_passages(behind[:1], model.tokenizer).batch(np.array([0])).ids
    states = weight.detach()[ids].clone()
    states[0, 1:4] += tensor
    assert ids[0, 1:4].tolist() == [stop] * 3
    inner = model.bridge.original_model
    with torch.no_grad():
        for block in inner.layers:
            (states,) = block(
                states, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None]
            )
        by_hand = model.logits(inner.ln_out(states))[0]
    torch.testing.assert_close(now[: len(by_hand)], by_hand, rtol=1e-4, atol=1e-5)


def test_a_tensor_brings_back_what_it_is_fitted_to(make, facts):
    model = make()
    list(FineTune(steps=(60,), lr=1e-2)(model, facts))
    passages = facts.passages("forget_attacked", forms="statement")
    knew = answer(model, passages).accuracy.value(OVERALL)
    with torch.no_grad():  # a hindrance that one vector can take away
        model.plain()["trunk.layers.1.mlp.fc_out.bias"].add_(
            3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
        )
    lost = answer(model, passages).loss.shown(OVERALL)
    with Latent(layers=(1,), lr=0.1, steps=100, cap=20.0).applied(model, facts):
        back = answer(model, passages)
    assert knew > 0.5
    assert back.loss.shown(OVERALL) < 0.5 * lost


def test_no_state_lies_along_the_direction(model, facts):
    site = site_of(model.bridge, "resid")
    sides = [encode_facts(facts, role, tokenizer=model.tokenizer) for role in ("forget_attacked", "retain_near")]
    means = []
    for text in sides:
        states = []
        for alike in without_padding(text):
            batch = text.batch(alike)
            with torch.no_grad():
                _, cache = model.bridge.run_with_cache(batch.ids)
            states.append(torch.stack([cache[hook].flatten(0, 1)[batch.subword - 1] for hook in site.hooks]))
        means.append(torch.cat(states, 1).mean(1))
        torch.testing.assert_close(mean_states(model, text, site), means[-1], rtol=1e-4, atol=1e-6)
    directions = F.normalize(means[0] - means[1], dim=1)
    batch = sides[0].batch(np.arange(4))
    with DirectionAblated().applied(model, facts), torch.no_grad():
        _, cache = model.bridge.run_with_cache(batch.ids)
    for layer, hook in enumerate(site.hooks[1:], start=1):
        along = cache[hook] @ directions[layer]
        assert along.abs().max() < 1e-5
    with DirectionAblated(layers=(1,)).applied(model, facts), torch.no_grad():
        _, one = model.bridge.run_with_cache(batch.ids)
    assert (one[site.hooks[1]] @ directions[1]).abs().max() > 1e-3
    assert (one[site.hooks[2]] @ directions[2]).abs().max() < 1e-5


def test_taggers_are_attacked_too(untouched):
    made = toy.load(sentences=40)
    by_role = {"forget_attacked": made.corpus.take(range(10)), "retain_near": made.corpus.take(range(10, 40))}
    with torch.no_grad():
        made.tagger(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    for attack in (Latent(steps=2), Embedding(steps=2), DirectionAblated()):
        with untouched(made.tagger):
            assert len(list(attack(made.tagger, by_role))) == 1
    with pytest.raises(ValueError, match="soft_prompt is made of passages and takes Facts, got dict"):
        SoftPrompt().applied(made.tagger, by_role)


def test_what_cannot_be_is_said_at_the_call(model, facts, monkeypatch):
    for attack in (Latent(layers=(2,)), DirectionAblated(layers=(0, 0)), Latent(layers=())):
        with pytest.raises(ValueError, match=r"layers = \[.*\]: this model has blocks 0 to 1, each once"):
            attack.applied(model, facts)
    monkeypatch.setattr(model.tokenizer.backend_tokenizer, "normalizer", _no_stops())  # which other models share
    with pytest.raises(ValueError, match="soft_prompt: 2 full stops before a prompt are not as many tokens"):
        SoftPrompt(tokens=2).applied(model, facts)
    with pytest.raises(ValueError, match="cap"):
        Latent(cap=0)


def test_a_loss_that_is_not_finite_is_refused(model, facts):
    with torch.no_grad():
        model.plain()["trunk.ln_out.weight"].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="embedding: the loss is nan at step 0; use a smaller cap"):
        list(Embedding()(model, facts))


def _no_stops() -> Any:
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.Replace(".", " "), normalizers.Lowercase()])
