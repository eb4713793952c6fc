"""Misdirection against Hugging Face's own hidden states; which weights it moves; the direction it leads to."""

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from relearn_lens.models import toy
from relearn_lens.models.loading import load_language_model
from relearn_lens.remove.representations import RMU, states


@pytest.fixture(scope="module")
def texts():
    return {"forget": toy.corpus(sentences=7), "retain": toy.corpus(sentences=5, seed=1)}


def goal(seed: int, d_model: int, coefficient: float) -> Tensor:
    torch.manual_seed(seed)
    direction = torch.rand(d_model)
    return coefficient * direction / direction.square().sum().sqrt()


@pytest.mark.parametrize(("layer", "reading"), [(0, "word"), (1, "word"), (1, "before")])
def test_value_and_gradient_equal_a_plain_loop(tmp_path, texts, layer, reading):
    from tests.families import small_tagger

    small_tagger("llama", tmp_path)
    model, base = load_language_model(tmp_path, device="cpu"), load_language_model(tmp_path, device="cpu")
    plain, before = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    names = [f"layers.{i}.mlp.down_proj.weight" for i in range(layer + 1)]
    shift = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            noise = 0.1 * torch.randn(plain.get_parameter(f"model.{name}").shape, generator=shift)
            plain.get_parameter(f"model.{name}").add_(noise)
            model.plain()[f"trunk.{name}"].add_(noise)

    sums = []
    for role in ("forget", "retain"):
        text, errors = model.encode(texts[role]), []
        for i in range(text.n_pieces):
            batch = text.batch(np.array([i]))
            here, there = (
                m(batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states[layer + 1][0]
                for m in (plain, before)
            )
            here, there = (states[1:] if reading == "word" else states[:-1] for states in (here, there))
            target = goal(3, here.shape[1], 2.5) if role == "forget" else there.detach()
            errors += [(token - to).square().mean() for token, to in zip(here, target.expand_as(here), strict=True)]
        sums.append(torch.stack(errors).mean())
    (sums[0] + 7 * sums[1]).backward()

    remover, gradients = RMU(layer=layer, coefficient=2.5, alpha=7, reading=reading), {}

    def look(model, gradient):
        gradient()
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    first = remover(base, texts, steps=(1,), seed=3)
    next(first)
    (pause,) = remover(model, texts, steps=(1,), seed=3, step=look, reference=first.reference)
    assert pause.parts["forget"] == pytest.approx(float(sums[0].detach()), rel=1e-5)
    assert pause.parts["retain"] == pytest.approx(7 * float(sums[1].detach()), rel=1e-4)
    assert gradients.keys() == {f"trunk.{name}" for name in names}
    for name in names:
        expected = plain.get_parameter(f"model.{name}").grad
        torch.testing.assert_close(gradients[f"trunk.{name}"], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "layers"), [({}, (0, 1)), ({"layer": 3}, (1, 2, 3)), ({"layer": 3, "matrices": 1}, (3,))]
)
def test_output_matrices_up_to_the_layer_move_and_nothing_else(texts, fields, layers):
    model = toy.language_model()
    before = {name: value.clone() for name, value in model.weights().items()}
    list(RMU(**fields)(model, texts, steps=(2,), lr=1e-3))
    changed = {name for name, value in model.weights().items() if not torch.equal(value, before[name])}
    assert changed == {f"trunk.layers.{i}.mlp.fc_out.weight" for i in layers}


def test_states_go_to_the_direction_and_the_retained_stay(texts):
    model = toy.language_model()
    batch = {role: model.encode(text).batch(np.arange(4)) for role, text in texts.items()}

    def now() -> dict[str, Tensor]:
        with torch.no_grad():
            return {role: states(model, each, 1) for role, each in batch.items()}

    before = now()
    list(RMU(alpha=30)(model, texts, steps=(30,), lr=1e-2, seed=5))
    after = now()
    towards = goal(5, 32, 6.5)

    def far(here: Tensor, there: Tensor) -> float:
        return float((here - there).square().mean())

    assert far(after["forget"], towards) < 0.9 * far(before["forget"], towards)
    assert far(after["retain"], before["retain"]) < 0.3 * far(after["forget"], before["forget"])


def test_seed_draws_the_direction(texts):
    losses = [next(RMU()(toy.language_model(), texts, steps=(1,), seed=seed)).parts["forget"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_nothing_retained(texts):
    (pause,) = RMU(alpha=0)(toy.language_model(), {"forget": texts["forget"]}, steps=(1,))
    assert set(pause.parts) == {"forget"}


def test_a_tagger_is_led_astray_too(toy_model, toy, texts):
    name = "trunk.layers.1.mlp.fc_out.weight"
    before = toy.tagger.weights()[name].clone()
    list(RMU()(toy.tagger, texts, steps=(1,)))
    assert not torch.equal(before, toy.tagger.weights()[name])


def test_as_deep_as_in_zephyr():
    model = toy.language_model()
    assert RMU().at(model) == 1
    model.bridge.cfg.n_layers = 32
    assert RMU().at(model) == 7


def test_a_layer_that_is_not_there_is_refused(texts):
    with pytest.raises(ValueError, match=r"layer = 4: this model has 4 blocks, 0 to 3"):
        RMU(layer=4)(toy.language_model(), texts)
