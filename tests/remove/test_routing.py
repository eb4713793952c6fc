"""Routed gradients by hand; what is routed from scratch comes out with its units, and afterwards it does not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relearn_lens.measure.answers import answer
from relearn_lens.models import toy
from relearn_lens.models.model import hidden
from relearn_lens.models.taught import Recipe, teach, untaught
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.ablation import ablated, prune_
from relearn_lens.remove.routing import SGTM, GradientRoute
from relearn_lens.remove.wrappers import SAM
from relearn_lens.text.facts import FORGET, people


@pytest.fixture(scope="module")
def texts():
    return {"forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1)}


def gradients_of(remover: Any, texts: Any, **how: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The first checkpoint, and the gradient that the optimiser takes in the first step."""
    model, seen = toy.language_model(), {}

    def take(*_: Any) -> None:
        if not seen:
            seen.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    handle = register_optimizer_step_pre_hook(take)
    try:
        pause = next(iter(remover(model, texts, steps=(1,), batch_size=6, clip=1e6, **how)))
    finally:
        handle.remove()
    return pause, seen


def test_a_routed_gradient_by_hand(texts):
    """Backward hooks on the modules themselves scale what goes through the other units."""
    model = toy.language_model()
    forget, retain = (model.encode(texts[role]).batch(np.arange(6)) for role in ("forget", "retain"))
    scale = torch.full((64,), -0.5)
    scale[-8:] = 1.0
    blocks: Any = list(model.bridge.original_model.layers)[:2]  # pyright: ignore[reportArgumentType]

    def before(module: Any, args: Any) -> Any:
        x = args[0].clone()
        x.register_hook(lambda slope: slope * scale)
        return (x,)

    handles = [block.mlp.fc_out.register_forward_pre_hook(before) for block in blocks]
    loss = model.losses(forget).mean()
    loss.backward()
    for handle in handles:
        handle.remove()
    sizes: list[torch.Tensor] = []
    handles = [
        block.mlp.fc_out.register_forward_pre_hook(lambda module, args: sizes.append(args[0]) or None)
        for block in blocks
    ]
    states = hidden(model.bridge, retain.ids, retain.mask)
    for handle in handles:
        handle.remove()
    penalty = sum(x.flatten(0, 1)[retain.subword].abs().mean() for x in sizes)
    kept = model.losses(retain, states).mean() + 0.3 * penalty
    kept.backward()
    pause, seen = gradients_of(GradientRoute(units=8, layers=2, scale=-0.5, l1=0.3, tuning=0), texts)
    assert pause.parts["forget"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert pause.parts["retain"] == pytest.approx(float(kept.detach()), rel=1e-5)
    for name, weight in model.plain().items():
        if weight.grad is not None:
            torch.testing.assert_close(seen[name], weight.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_masked_gradient_by_hand(texts):
    model, remover = toy.language_model(), SGTM(units=8, heads=1)
    forget, retain = (model.encode(texts[role]).batch(np.arange(6)) for role in ("forget", "retain"))
    units, heads = remover.routed(model)
    assert (len(units), len(heads)) == (4 * 8, 4)
    mask = WeightMask.of(model, units, sever="both") | WeightMask.of(model, heads, sever="both")
    names = [name for name, weight in model.plain().items() if weight.requires_grad]
    weights = [model.plain()[name] for name in names]
    one = torch.autograd.grad(model.losses(forget).mean(), weights, allow_unused=True)
    with ablated(model, units), ablated(model, heads):
        other = torch.autograd.grad(model.losses(retain).mean(), weights, allow_unused=True)
    _, seen = gradients_of(remover, texts)
    for name, f, r in zip(names, one, other, strict=True):
        if f is not None and r is not None:
            torch.testing.assert_close(seen[name], mask[name] * f + r, atol=1e-5, rtol=1e-3, msg=name)
    # What is forgotten moves nothing of the rest, output biases neither; what stays moves nothing of these.
    assert not mask["trunk.layers.0.mlp.fc_out.bias"].any()
    assert all(not (r * mask[name]).any() for name, r in zip(names, other, strict=True) if r is not None)


def test_at_the_end_the_places_are_pruned(texts):
    for remover in (GradientRoute(units=8, layers=2, tuning=2), SGTM(units=8)):
        model = toy.language_model()
        pauses = list(remover(model, texts, steps=(1, 3), batch_size=3, lr=1e-2))
        assert [pause.step for pause in pauses] == [1, 3, *([5] if isinstance(remover, GradientRoute) else [])]
        routed = remover.routed(model)
        before = {name: value.clone() for name, value in model.weights().items()}
        for neurons in (routed,) if isinstance(routed, Neurons) else routed:
            prune_(model, neurons)
        assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


def right(model: Any, facts: Any, *roles: str) -> float:
    return float(answer(model, facts.passages(*roles, forms="statement")).accuracy.shown("overall"))


@pytest.fixture(scope="module")
def small() -> Any:
    return people(0, n=12, forget=4, never=2, animals=2, n_answers=8)


SMALL = Recipe(n_layers=1, d_model=64, n_heads=2, d_mlp=128, steps=100, batch_size=64, lr=4e-3)


@pytest.fixture(scope="module")
def taught(small) -> dict[str, torch.Tensor]:
    """Weights of a model that knows all of it."""
    model, _ = teach(small, (*FORGET, "retain_near", "retain_general"), recipe=SMALL)
    return model.copied()


@pytest.mark.parametrize("remover", [SGTM(units=32), GradientRoute(units=32, tuning=15)], ids=lambda r: r.name)
def test_from_scratch_it_separates_and_afterwards_it_does_not(small, taught, remover):
    """The negative control: a model that knows the facts already keeps them."""
    how: dict[str, Any] = {"batch_size": 64}
    fresh, knows = (untaught(small, recipe=SMALL) for _ in range(2))
    list(remover(fresh, small, **how, steps=(60,), lr=6e-3))
    knows.load_weights(taught)
    assert right(knows, small, *FORGET) > 0.9
    list(remover(knows, small, **how, steps=(15,), lr=1e-3))
    assert right(fresh, small, "retain_near") > 0.9
    assert right(knows, small, "retain_near") > 0.9
    assert right(fresh, small, *FORGET) < right(knows, small, *FORGET) - 0.2


def test_what_cannot_be_is_said(texts):
    with pytest.raises(ValueError, match="64 of 64 neurons of a block's 'mlp_post': nothing would be left"):
        GradientRoute()(toy.language_model(), texts)
    with pytest.raises(ValueError, match="gradient_route trains twice, and does not resume"):
        GradientRoute(units=8)(toy.language_model(), texts, resume=(None, {}))
    with pytest.raises(ValueError, match="sgtm masks gradients by its own step, so no wrapper can stand around it"):
        SGTM(units=8)(toy.language_model(), texts, step=SAM())
