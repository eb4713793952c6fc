"""Misdirection against Hugging Face's own hidden states; which weights it moves; the direction it leads to."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from relearn_lens.models import toy
from relearn_lens.models.loading import load_language_model
from relearn_lens.remove.representations import RMU, CircuitBreaker, RepNoise, mmd, states


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


# --- rerouting, and noise


def shifted():
    model, noise = toy.language_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=noise))
    return model


def by_modules(model, batch):
    """The output of every block, from the modules themselves, and what its MLP writes."""
    inner = model.bridge.original_model
    position = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    x, outputs, written = inner.tok_embed(batch.ids) + inner.pos(position), [], []
    for block in inner.layers:
        handle = block.mlp.register_forward_hook(lambda module, args, out: written.append(out))
        (x,) = block(x, attention_mask=batch.mask, position_ids=position)
        handle.remove()
        outputs.append(x)
    return outputs, written


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("reading", ["word", "before"])
def test_rerouting_equals_a_plain_loop(texts, reading, faithful):
    base, model, other = toy.language_model(), shifted(), shifted()
    remover = CircuitBreaker(layers=(1, 3), alpha=4, horizon=4, reading=reading, faithful=faithful)
    turned, still, shift = [], [], int(reading == "before")
    for role, each in (("forget", turned), ("retain", still)):
        text = base.encode(texts[role])
        for i in range(text.n_pieces):
            batch = text.batch(np.array([i]))
            now, was = by_modules(model, batch)[0], by_modules(base, batch)[0]
            for position in batch.subword.tolist():
                for layer in (1, 3):
                    here, there = now[layer][0, position - shift], was[layer][0, position - shift].detach()
                    cosine = (here @ there) / (here.norm() * there.norm())
                    each.append(cosine.clamp(min=0) if role == "forget" else (here - there).square().sum().sqrt())
    retain = base.encode(texts["retain"])
    n = retain.batch(np.arange(retain.n_pieces)).ids.numel() if faithful else len(still) / 2
    parts, gradients = (torch.stack(turned).mean(), torch.stack(still).sum() / 2 / n), {}

    def look(model, gradient):
        gradient()
        gradients[len(gradients)] = {n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None}
        for weight in model.parameters():  # so that the model stands still while t grows
            weight.grad = None if weight.grad is None else torch.zeros_like(weight)

    first = remover(base, texts, steps=(1,), batch_size=16)
    next(first)
    how = {"steps": (1, 2, 3, 4, 5, 6), "batch_size": 16, "weight_decay": 0}
    training = remover(other, texts, **how, step=look, reference=first.reference)
    for t, pause in enumerate(training):
        share = min(1.0, t / 4)
        assert pause.parts["forget"] == pytest.approx(4 * (1 - share) * float(parts[0].detach()), rel=1e-4, abs=1e-7)
        assert pause.parts["retain"] == pytest.approx(4 * share * float(parts[1].detach()), rel=1e-4, abs=1e-7)
    assert float(training.state()["memory.step"]) == 6
    (4 * (0.75 * parts[0] + 0.25 * parts[1])).backward()
    for name, gradient in gradients[1].items():
        slope = model.plain()[name].grad
        expected = torch.zeros_like(gradient) if slope is None else slope
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3, msg=name)


def test_layers_that_turn():
    assert CircuitBreaker().at(toy.language_model()) == (1, 2)
    with pytest.raises(ValueError, match=r"layers = \[1, 4\]: this model has 4 blocks, 0 to 3"):
        CircuitBreaker(layers=(1, 4)).at(toy.language_model())


def test_discrepancy_by_hand():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=draws, dtype=torch.float64)
    y = 2 + torch.randn(5, 3, generator=draws, dtype=torch.float64)
    both = [*x, *y]
    width = sum(float((a - b).square().sum()) for a in both for b in both) / (9 * 8)

    def kernel(a, b):
        return sum(np.exp(-float((a - b).square().sum()) / (width * 2.0**k)) for k in (-2, -1, 0, 1, 2))

    def mean(one, other):
        return np.mean([[kernel(a, b) for b in other] for a in one])

    assert float(mmd(x, y)) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-8)
    assert abs(float(mmd(x, x))) < 1e-12


def test_noise_equals_a_plain_loop(texts, monkeypatch):
    drawn, gradients, randn_like = [], {}, torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    model, other = shifted(), shifted()

    def look(model, gradient):
        gradient()
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    (pause,) = RepNoise(alpha=2, beta=0.5)(model, texts, steps=(1,), batch_size=16, step=look)
    forget, retain = (other.encode(texts[role]) for role in ("forget", "retain"))
    # In the order of the shuffled batch, in which the noise was drawn.
    batch = forget.batch(forget.shuffled(batch_size=16, seed=0, epoch=0)[0])
    outputs, written = by_modules(other, batch)
    right, losses = batch.ids.flatten()[batch.subword], []
    for x in outputs:
        norm: Any = other.bridge.original_model.ln_out
        logs = other.head(norm(x)).flatten(0, 1)[batch.subword - 1].log_softmax(-1)
        losses.append(-logs[torch.arange(len(right)), right].mean())
    losses.append(losses[-1])  # the model's own reading is that of the last block
    pairs = zip(written, drawn, strict=True)
    noise = sum(mmd(x.flatten(0, 1)[batch.subword], normal) for x, normal in pairs) / 4
    kept = torch.cat([other.losses(b) for b in retain.batches()]).mean()
    loss = kept + 0.5 * noise - 2 * torch.log(1 + torch.stack(losses).sum() / 5)
    loss.backward()
    assert pause.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, weight in other.plain().items():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, atol=1e-5, rtol=1e-3, msg=name)
    with pytest.raises(ValueError, match="does not say over how many each of its parts is"):
        RepNoise()(model, texts, accumulate=2)


def test_noise_is_for_language_models(toy_model, texts):
    with pytest.raises(ValueError, match="through the vocabulary head, and this model is a tagger"):
        RepNoise()(toy_model.tagger, texts)
