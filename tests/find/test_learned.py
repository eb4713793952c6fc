"""A learnt mask names the neurons that were planted for what is to be forgotten; a control of its size does not."""

from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.find.controls import equal_control
from relearn_lens.find.learned import LearnedMask
from relearn_lens.find.localising import statements
from relearn_lens.measure.answers import answer
from relearn_lens.models.model import LanguageModel
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.pruning import Prune
from relearn_lens.text.facts import FORGET, Facts
from relearn_lens.text.facts.encoded import encode_passages
from tests.made import LOOKED_UP, THINGS, looked_up

OTHERS = (5, 11, 20, 30)
"""The neurons that answer to the keys that stay."""


def planted() -> tuple[LanguageModel, Facts]:
    """As `looked_up`, with neurons of their own for the keys that are to be forgotten."""
    model, facts = looked_up()
    inner: Any = model.bridge.original_model
    mlp, embedding = inner.layers[1].mlp, inner.tok_embed.weight.detach()
    vocabulary = model.tokenizer.get_vocab()
    forgotten = set(facts.keys(*FORGET))
    of = {p.key: THINGS.index(p.answer) for p in facts.passages()}
    with torch.no_grad():
        for thing, (mine, other) in enumerate(zip(LOOKED_UP, OTHERS, strict=True)):
            mlp.fc_out.weight[:, other] = mlp.fc_out.weight[:, mine]
            for neuron, goes in ((mine, True), (other, False)):
                keys = [key for key in of if of[key] == thing and (key in forgotten) == goes]
                mlp.fc_in.weight[neuron] = sum(0.5 * embedding[vocabulary[key]] / 8 for key in keys)
                mlp.fc_in.bias[neuron] = -2.0
    return model, facts


def right(model: LanguageModel, facts: Facts, *roles: str) -> float:
    return float(answer(model, facts.passages(*roles, forms="statement")).accuracy.shown("overall"))


def test_the_planted_neurons_are_learnt_and_a_control_is_not():
    model, facts = planted()
    site = site_of(model.bridge, "mlp_post")
    own = Neurons.of(site, [("1", i) for i in LOOKED_UP])
    assert right(model, facts, *FORGET) == right(model, facts, "retain_near") == 1
    saliency = LearnedMask(steps=50)(model, facts, seed=0)
    assert Neurons(saliency.score > 0, site) == own
    list(Prune()(model, None, WeightMask.of(model, saliency.top(4))))
    assert right(model, facts, *FORGET) < 0.5
    assert right(model, facts, "retain_near") == 1
    other, _ = planted()
    control = equal_control(other, own, seed=0)
    assert len(control) == 4
    list(Prune()(other, None, control))
    assert right(other, facts, *FORGET) == 1


def test_loss_and_gradient_by_hand():
    """One drawn mask, in the model's own module, through the straight-through gradient by finite differences."""
    model, facts = planted()
    localiser, site = LearnedMask(tau=0.7, forget=2), site_of(model.bridge, "mlp_post")
    texts = [encode_passages(each, model.tokenizer) for each in (statements(facts), statements(facts, "retain_near"))]
    pieces = [np.arange(6), np.arange(5)]
    s = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(4)
    u = torch.rand(3, 32)
    torch.manual_seed(4)
    loss = localiser.loss(model, site, s, pieces, texts)
    (gradient,) = torch.autograd.grad(loss, [s])
    soft = torch.sigmoid((s.detach() + torch.log(u) - torch.log(1 - u)) / 0.7)
    keep = (soft <= 0.5).float().requires_grad_()
    total = torch.zeros(())
    for i, (text, which) in enumerate(zip(texts, pieces, strict=True)):
        batch = text.batch(which)
        before = model.predictions(batch)[0].softmax(-1).detach()
        handles = [
            block.mlp.fc_out.register_forward_pre_hook(lambda module, args, row=row: (args[0] * keep[row],))
            for row, block in enumerate(list(model.bridge.original_model.layers))  # pyright: ignore[reportArgumentType]
        ]
        p = model.predictions(batch)[0].softmax(-1)
        for handle in handles:
            handle.remove()
        v = p.shape[1]
        if i == 0:
            total = total + 2 * torch.stack([(1 / v * torch.log(1 / v / row)).sum() for row in p]).mean()
        else:
            total = total + torch.stack([(b * torch.log(b / a)).sum() for a, b in zip(p, before, strict=True)]).mean()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    (of_keep,) = torch.autograd.grad(total, [keep])
    torch.testing.assert_close(gradient, -of_keep * soft * (1 - soft) / 0.7, rtol=1e-3, atol=1e-5)


def test_what_cannot_go_alone_stays():
    """Where the same neurons answer to what stays, none is learnt."""
    model, facts = looked_up()
    assert not bool((LearnedMask(steps=50)(model, facts).score > 0).any())
