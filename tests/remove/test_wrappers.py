"""A sharpness-aware step against one written out; without a radius it is no wrapper; what it leaves."""

from typing import Any

import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.training import finetune_, plain
from relearn_lens.remove.losses import GradDiff
from relearn_lens.remove.wrappers import SAM


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
