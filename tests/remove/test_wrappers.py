"""A sharpness-aware step against one written out; without a radius it is no wrapper; what it leaves."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.training import finetune_, plain
from relearn_lens.remove.losses import GradDiff
from relearn_lens.remove.wrappers import LAT, SAM, Averaged, Curvature, GradientPenalty, Smoothed, TARLight


@pytest.fixture(scope="module")
def texts():
    return {"forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1)}


def run(texts: Any, step: Any, **how: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    model = toy.language_model()
    pauses = list(GradDiff()(model, texts, step=step, **({"steps": (1, 3), "batch_size": 3, "lr": 1e-3} | how)))
    return pauses, {name: value.clone() for name, value in model.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_a_radius_it_is_no_wrapper(texts):
    bare, wrapped = run(texts, plain), run(texts, SAM(rho=0))
    assert bare[0] == wrapped[0]
    assert same(bare[1], wrapped[1])
    assert not same(bare[1], run(texts, SAM(rho=0.1))[1])


def half(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(weight.numel()).view_as(weight) % 3 == 0


@pytest.mark.parametrize("rho", [1e-3, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_written_out(texts, rho, masked):
    """The forget gradient where a step of length rho, among what may move, makes the forget loss worst."""
    model, other = toy.language_model(), toy.language_model()
    names = ["trunk.layers.1.mlp.fc_out.weight", "trunk.layers.2.ln1.bias", "trunk.tok_embed.weight"]
    only = {name: half(weight) for name, weight in model.plain().items() if name in names} if masked else None
    trained = {n: w for n, w in other.plain().items() if w.requires_grad and (not masked or n in names)}
    forget, retain = (next(iter(other.encode(texts[role]).batches(max_tokens=10_000))) for role in ("forget", "retain"))

    def slopes(model: LanguageModel, batch: Any, sign: float) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(sign * model.losses(batch).mean(), list(trained.values()), allow_unused=True)
        got = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
        return {n: g * only[n] for n, g in got.items()} if only else got

    there, kept = slopes(other, forget, -1.0), slopes(other, retain, 1.0)
    length = torch.sqrt(sum((g.square().sum() for g in there.values()), torch.zeros(())))
    with torch.no_grad():
        for name, slope in there.items():
            trained[name] += rho * slope / length
    expected = {n: g + kept[n] for n, g in slopes(other, forget, -1.0).items()}

    gradients, before = {}, {name: value.clone() for name, value in model.weights().items()}

    def look(model: Any, gradient: Any) -> None:
        SAM(rho=rho)(model, gradient)
        assert same(before, model.weights())  # back where it was, to the bit
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    (pause,) = GradDiff()(model, texts, only, steps=(1,), batch_size=6, step=look)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3, msg=name)
    # What is reported is the loss where the model stands, not where it looked.
    (bare,) = GradDiff()(toy.language_model(), texts, steps=(1,), batch_size=6)
    assert pause.parts == bare.parts


def test_in_parts_it_is_the_same(texts):
    whole, parts = run(texts, SAM(rho=0.05), batch_size=6), run(texts, SAM(rho=0.05), batch_size=6, accumulate=3)
    for name, value in whole[1].items():
        if not name.endswith("attn.k.bias"):  # its gradient is 0 but for rounding, which Adam blows up
            torch.testing.assert_close(parts[1][name], value, atol=1e-4, rtol=1e-3)


def test_a_failure_there_leaves_the_weights_where_they_were():
    model, calls = toy.language_model(), []
    before = {name: value.clone() for name, value in model.weights().items()}

    def gradient(*parts: str) -> tuple[str, ...]:
        calls.append(parts)
        if len(calls) == 2:
            assert not same(before, model.weights())
            raise RuntimeError("out of memory")
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        return ("forget",)

    with pytest.raises(RuntimeError, match="out of memory"):
        SAM(rho=0.5)(model, gradient)
    assert same(before, model.weights())


def test_a_loss_without_a_part_to_forget_is_refused(toy, texts):
    from relearn_lens.models.training import train_

    with pytest.raises(ValueError, match="the objective has no part 'forget'; its parts are loss"):
        list(train_(toy.tagger, texts["forget"], step=SAM()))
    list(finetune_(toy.tagger, texts["forget"], epochs=1))  # and the model trains on


def test_a_radius_is_not_negative():
    with pytest.raises(ValueError, match="rho"):
        SAM(rho=-1)


# --- the other wrappers, with weights in float64 (losses are float32)


Vector = torch.Tensor


class Plain:
    """A float64 model as a function of one long vector of weights: the gradients of its two parts."""

    def __init__(self, texts: Any) -> None:
        self.model = toy.language_model().double()
        self.weights = [w for w in self.model.parameters() if w.requires_grad]
        self.batches = {role: self.model.encode(text).batch(np.arange(6)) for role, text in texts.items()}
        self.here = torch.cat([w.detach().flatten() for w in self.weights])

    def slope(self, role: str, at: Vector | None = None) -> Vector:
        sizes = [w.numel() for w in self.weights]
        with torch.no_grad():
            for weight, value in zip(self.weights, (self.here if at is None else at).split(sizes), strict=True):
                weight.copy_(value.view_as(weight))
        loss = self.model.losses(self.batches[role]).mean() * (-1 if role == "forget" else 1)
        slopes = torch.autograd.grad(loss, self.weights, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(w) if s is None else s).flatten() for w, s in zip(self.weights, slopes, strict=True)]
        )


@pytest.fixture
def by_hand(texts):
    return Plain(texts)


def step_of(wrapper: Any, texts: Any, by_hand: Plain) -> Vector:
    """The gradient that a wrapped step leaves, in the order of the weights by hand."""
    model, gradients = toy.language_model().double(), []

    def look(model: Any, gradient: Any) -> None:
        before = [w.detach().clone() for w in model.parameters()]
        wrapper(model, gradient)
        assert all(torch.equal(w, was) for w, was in zip(model.parameters(), before, strict=True))
        weights = [w for w in model.parameters() if w.requires_grad]
        gradients.append(torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]))

    list(GradDiff()(model, texts, steps=(1,), batch_size=6, step=look))
    return gradients[0]


def unit(vector: Vector) -> Vector:
    return vector / vector.norm()


def derivative(of: Any, here: Vector, along: Vector, h: float = 2e-3) -> float:
    """Of a number, along a direction."""
    return (float(of(here + h * along)) - float(of(here - h * along))) / (2 * h)


def directions(like: Vector, towards: Vector) -> list[Vector]:
    draws = torch.Generator().manual_seed(0)
    return [unit(towards), *(unit(torch.randn(like.shape, generator=draws, dtype=like.dtype)) for _ in range(2))]


def test_a_gradient_penalty_has_the_gradient_of_the_norm(texts, by_hand):
    forget, retain = by_hand.slope("forget"), by_hand.slope("retain")
    penalty = step_of(GradientPenalty(rho=3, radius=2e-3), texts, by_hand) - forget - retain
    assert float(penalty.norm()) > 0.1
    for along in directions(forget, penalty):
        slope = derivative(lambda at: 3 * by_hand.slope("forget", at).norm(), by_hand.here, along)
        assert float(penalty @ along) == pytest.approx(slope, rel=5e-3, abs=1e-3)


def test_a_curvature_penalty_has_the_gradient_of_the_change(texts, by_hand):
    forget, retain = by_hand.slope("forget"), by_hand.slope("retain")
    step = 0.05 * unit(forget)
    penalty = step_of(Curvature(rho=7, mu=0.05, radius=2e-3), texts, by_hand) - forget - retain
    assert float(penalty.norm()) > 0.1

    def change(at: Vector) -> Vector:
        return 7 * (by_hand.slope("forget", at + step) - by_hand.slope("forget", at)).norm()

    for along in directions(forget, penalty):
        assert float(penalty @ along) == pytest.approx(derivative(change, by_hand.here, along), rel=5e-3, abs=1e-3)


def test_the_released_penalties_have_no_gradient(texts, by_hand):
    forget, retain = by_hand.slope("forget"), by_hand.slope("retain")
    torch.testing.assert_close(step_of(GradientPenalty(rho=3, faithful=True), texts, by_hand), forget + retain)
    torch.testing.assert_close(step_of(Curvature(rho=7, faithful=True), texts, by_hand), 2 * forget + retain)


def test_an_adversary_of_several_steps(texts, by_hand):
    at = by_hand.here
    for _ in range(3):
        at = at + 0.2 * unit(by_hand.slope("forget", at))
    expected = by_hand.slope("forget", at) + by_hand.slope("retain")
    torch.testing.assert_close(step_of(TARLight(rho=0.2, adversary=3), texts, by_hand), expected)
    torch.testing.assert_close(
        step_of(TARLight(rho=0.2, adversary=1), texts, by_hand), step_of(SAM(rho=0.2), texts, by_hand)
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_latent_step_written_out(texts, accumulate):
    """Disturbances of the forgotten text alone, by steps of a length within a ball; the rest as it is."""
    model, other = toy.language_model(), toy.language_model()
    layers, eps, rate = (1, 3), 0.3, 0.2
    forget, retain = (other.encode(texts[role]).batch(np.arange(6)) for role in ("forget", "retain"))
    blocks: Any = list(other.bridge.original_model.layers)  # pyright: ignore[reportArgumentType]
    shape = (*forget.ids.shape, 32)
    disturbed = {layer: torch.zeros(shape, requires_grad=True) for layer in layers}

    def forgotten() -> torch.Tensor:
        handles = [
            blocks[layer].register_forward_hook(lambda module, args, out, d=d: (out[0] + d, *out[1:]))
            for layer, d in disturbed.items()
        ]
        try:
            return -other.losses(forget).mean()
        finally:
            for handle in handles:
                handle.remove()

    for _ in range(3):
        slopes = torch.autograd.grad(forgotten(), list(disturbed.values()))
        for (layer, d), slope in zip(disturbed.items(), slopes, strict=True):
            moved = d.detach() + rate * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            for i in range(shape[0]):
                for j in range(shape[1]):
                    moved[i, j] *= min(1.0, eps / max(float(moved[i, j].norm()), 1e-30))
            disturbed[layer] = moved.requires_grad_()
    (forgotten() + other.losses(retain).mean()).backward()
    expected = {name: w.grad for name, w in other.plain().items() if w.grad is not None}
    gradients, wrapper = {}, LAT(layers=layers, eps=eps, rate=rate, ascent=3)

    def look(model: Any, gradient: Any) -> None:
        wrapper(model, gradient)
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    (pause,) = GradDiff()(model, texts, steps=(1,), batch_size=6, step=look, accumulate=accumulate)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=5e-3, msg=name)
    (bare,) = GradDiff()(toy.language_model(), texts, steps=(1,), batch_size=6)
    assert pause.parts == pytest.approx(bare.parts)


def test_without_a_disturbance_it_is_no_wrapper(texts):
    bare = run(texts, plain)[1]
    assert same(bare, run(texts, LAT(eps=0))[1])
    assert not same(bare, run(texts, LAT(eps=0.5, ascent=2))[1])
    with pytest.raises(ValueError, match=r"layers = \[4\]: this model has 4 blocks, 0 to 3"):
        run(texts, LAT(layers=(4,)))


def test_smoothing_is_the_mean_over_noise(texts, by_hand, monkeypatch):
    bare = by_hand.slope("forget") + by_hand.slope("retain")
    torch.testing.assert_close(step_of(Smoothed(n=2, sigma=0), texts, by_hand), bare)
    drawn: list[Vector] = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    smooth = step_of(Smoothed(n=4, sigma=0.03), texts, by_hand)
    per_point = len(drawn) // 4
    model = toy.language_model().double()
    reached = [i for i, w in enumerate(w for w in model.parameters() if w.requires_grad)]
    assert 0 < per_point <= len(reached)
    expected = by_hand.slope("retain")
    sizes, forget = [w.numel() for w in by_hand.weights], by_hand.slope("forget")
    for i in range(4):
        draws, noise = iter(drawn[i * per_point : (i + 1) * per_point]), []
        for weight, slope in zip(by_hand.weights, forget.split(sizes), strict=True):
            has = bool((slope != 0).any())
            noise.append(next(draws).flatten() * (slope != 0) if has else torch.zeros_like(weight).flatten())
        expected = expected + by_hand.slope("forget", by_hand.here + 0.03 * torch.cat(noise)) / 4
    torch.testing.assert_close(smooth, expected)


def test_noise_is_that_of_the_seed(texts):
    noisy = {"step": Smoothed(n=2, sigma=0.1), "batch_size": 6}
    one = run(texts, **noisy, seed=3)[1]
    assert same(one, run(texts, **noisy, seed=3)[1])
    assert not same(one, run(texts, **noisy, seed=4)[1])


@pytest.mark.parametrize("masked", [False, True])
def test_averaged_weights_at_the_end(texts, masked):
    """The mean of the weights of steps 2, 4 and 6; resumed in between, the same."""
    names = ["trunk.layers.1.mlp.fc_out.weight"]
    how: dict[str, Any] = {"batch_size": 3, "lr": 1e-2, "steps": (1, 2, 3, 4, 5, 6)}
    model = toy.language_model()
    only = {name: half(weight) for name, weight in model.plain().items() if name in names} if masked else None
    seen = {}
    for pause in GradDiff()(model, texts, only, **how):
        seen[pause.step] = {name: value.clone() for name, value in model.weights().items()}
    other, states = toy.language_model(), []
    training = GradDiff()(other, texts, only, **how, step=Averaged(start=2, stride=2))
    for pause in training:
        if pause.step < 6:
            assert same(other.weights(), seen[pause.step])
        if pause.step == 3:
            states = [(pause, {name: value.clone() for name, value in training.state().items()})]
    for name, value in other.weights().items():
        mean = sum(seen[step][name] for step in (2, 4, 6)) / 3
        torch.testing.assert_close(value, mean)
        if only and name in names:
            assert torch.equal(value[~only[name]], toy.language_model().weights()[name][~only[name]])
    again = toy.language_model()
    again.load_weights(seen[3])
    list(GradDiff()(again, texts, only, **how, step=Averaged(start=2, stride=2), resume=states[0]))
    assert same(again.weights(), other.weights())


def test_an_average_of_nothing_is_refused(texts):
    with pytest.raises(ValueError, match="averaged: no step counts, the first is 100 and the last 3"):
        run(texts, Averaged())


# --- weights in 16 bits


def end_in(dtype: torch.dtype, texts: Any, step: Any) -> dict[str, torch.Tensor]:
    """The weights, in float32, that some steps of a model in a dtype end in."""
    model = toy.language_model().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        list(GradDiff()(model, texts, step=step, steps=(4,), batch_size=3, lr=1e-2, schedule="constant"))
    assert {value.dtype for value in model.weights().values() if value.is_floating_point()} == {dtype}
    return {n: v.float().clone() for n, v in model.weights().items()}


@pytest.fixture(scope="module")
def bare(texts) -> dict[torch.dtype, dict[str, torch.Tensor]]:
    """What they end in without a wrapper."""
    return {dtype: end_in(dtype, texts, plain) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize(
    "step",
    [
        SAM(rho=0.5), LAT(eps=0.5, ascent=2), TARLight(rho=0.3, adversary=2), Smoothed(sigma=0.05),
        GradientPenalty(radius=0.3), Curvature(rho=1, mu=0.3, radius=0.3), Averaged(start=1, stride=1),
    ],
    ids=lambda step: step.name,
)  # fmt: skip
def test_weights_in_16_bits_are_wrapped_too(texts, step, bare):
    """Near what weights in float32 do, and another way than without the wrapper."""
    wide, narrow = (end_in(dtype, texts, step) for dtype in (torch.float32, torch.bfloat16))
    base = toy.language_model().weights()

    def gap(one: Any, other: Any) -> float:
        return sum(float((one[n] - other[n]).square().sum()) for n in base if base[n].is_floating_point()) ** 0.5

    assert gap(narrow, bare[torch.bfloat16]) > 0
    assert gap(wide, narrow) < 0.5 * gap(wide, base)


def test_a_way_that_16_bits_round_off_is_told(texts):
    model = toy.language_model().bfloat16()
    with pytest.warns(
        RuntimeWarning, match=r"a way of length 0.0001 in weights of bfloat16 became one of .* by rounding"
    ):
        list(GradDiff()(model, texts, step=SAM(rho=1e-4), steps=(1,), batch_size=3))


def test_an_average_in_16_bits_is_summed_in_float32(texts):
    how: dict[str, Any] = {"batch_size": 3, "lr": 1e-2, "steps": tuple(range(1, 21)), "schedule": "constant"}
    model, other = toy.language_model().bfloat16(), toy.language_model().bfloat16()
    name, seen = "trunk.layers.1.mlp.fc_out.weight", []
    for _ in GradDiff()(model, texts, **how):
        seen.append(model.weights()[name].float().clone())
    how["steps"] = (20,)
    list(GradDiff()(other, texts, **how, step=Averaged(start=1, stride=1)))
    torch.testing.assert_close(other.weights()[name], torch.stack(seen).mean(0).bfloat16(), atol=1e-6, rtol=2**-7)
