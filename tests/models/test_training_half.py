"""Weights in 16 bits: what moves is stepped in float32, what stands still stays as it is."""

from itertools import islice
from typing import Any

import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.loading import load_language_model
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.training import train_
from tests.neurons.test_sites import save_decoder

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_decoder("llama", path)
    return path


@pytest.fixture(scope="module")
def text():
    return toy.corpus(sentences=12)


def model_of(folder: Any) -> LanguageModel:
    return load_language_model(folder, device="cpu", dtype=BF16)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


NAME = "trunk.layers.1.mlp.down_proj.weight"
HOW: dict[str, Any] = {"batch_size": 4, "schedule": "constant", "seed": 3, "weight_decay": 1.0}


def masks(model: LanguageModel) -> dict[str, torch.Tensor]:
    weight = model.weights()[NAME]
    return {NAME: torch.arange(weight.numel()).view_as(weight) % 3 == 0}


def test_steps_that_16_bits_would_lose_add_up(folder, text):
    """Each step is a fortieth of the distance between two numbers of 16 bits; a hundred of them are not nothing."""
    model = model_of(folder)
    before, only = weights(model), masks(model)
    size = before[NAME].abs().float()
    lr = float(size.median()) * 2**-8 / 40
    large = only[NAME] & (size > size.median())
    (end,) = train_(model, text, only=only, steps=(1,), lr=lr, **HOW)
    assert end.loss > 0
    assert torch.equal(model.weights()[NAME][large], before[NAME][large])  # rounded into the model, not yet seen
    again = model_of(folder)
    list(train_(again, text, only=only, steps=(100,), lr=lr, **HOW))
    assert (again.weights()[NAME][large] != before[NAME][large]).float().mean() > 0.5


def test_what_may_not_move_stays_to_the_bit_in_its_16_bits(folder, text, untouched):
    model = model_of(folder)
    list(train_(model, text, steps=(1,), lr=1e-3, **HOW))  # a bridge hooks up at its first pass
    before, only = weights(model), masks(model)
    with untouched(model, weights=False):
        list(train_(model, text, only=only, steps=(3,), lr=0.1, **HOW))
    for name, value in model.weights().items():
        assert value.dtype == BF16
        still = ~only[name] if name in only else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[still], before[name][still]), name
    assert (model.weights()[NAME][only[NAME]] != before[NAME][only[NAME]]).float().mean() > 0.99


def test_it_is_the_training_of_float32_weights_rounded(folder, text):
    """Of one step: the first update of AdamW is lr times the sign of the gradient, in float32."""
    model = model_of(folder)
    before, only = weights(model), masks(model)
    training = train_(model, text, only=only, steps=(1,), lr=0.01, **{**HOW, "weight_decay": 0.0})
    list(training)
    (full,) = (value for name, value in training.state().items() if name.endswith(".full"))
    assert full.dtype == torch.float32
    step = (full - before[NAME].float())[only[NAME]]
    assert step.abs() == pytest.approx(0.01, rel=1e-2)
    assert torch.equal(full.to(BF16), model.weights()[NAME])


def test_resuming_goes_on_to_the_bit(folder, text):
    how = {**HOW, "steps": (2, 6), "lr": 1e-5}
    whole = model_of(folder)
    only = masks(whole)
    pauses = list(train_(whole, text, only=only, **how))
    model = model_of(folder)
    training = train_(model, text, only=only, **how)
    (pause,) = islice(training, 1)
    state = {name: value.clone() for name, value in training.state().items()}
    kept = weights(model)
    fresh = model_of(folder)
    fresh.load_weights(kept)
    assert list(train_(fresh, text, only=only, **how, resume=(pause, state))) == pauses[1:]
    assert all(torch.equal(value, whole.weights()[name]) for name, value in fresh.weights().items())


def test_what_a_step_does_afterwards_goes_on(folder, text):
    """A wrapper that writes into the weights, as averaging does, writes into what is stepped too."""

    class Set:
        def __call__(self, model, gradient):
            gradient()

        def after(self, model, stepped):
            stepped.moving[NAME].fill_(0.5)

    model = model_of(folder)
    only = {NAME: torch.ones_like(model.weights()[NAME], dtype=torch.bool)}
    training = train_(model, text, only=only, steps=(1,), lr=1e-3, step=Set(), **HOW)
    list(training)
    (full,) = (value for name, value in training.state().items() if name.endswith(".full"))
    assert (full == 0.5).all()


def test_adapters_train_in_float32_beside_weights_in_16_bits(folder, text):
    model = model_of(folder)
    before = weights(model)
    with adapted(model, rank=2):
        training = train_(model, text, steps=(3,), lr=1e-2, **HOW)
        list(training)
        state = training.state()
    moments = {name: value for name, value in state.items() if name.endswith("exp_avg")}
    assert moments
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert sum(value.numel() for value in moments.values()) < sum(value.numel() for value in before.values()) / 4
    after = model.weights()
    assert {value.dtype for value in after.values()} == {BF16}
    assert not torch.equal(after[NAME], before[NAME])
    assert torch.equal(after["trunk.embed_tokens.weight"], before["trunk.embed_tokens.weight"])
