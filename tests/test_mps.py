"""Devices without float64, as Apple's are, emulated: every tensor that comes from a model's weights is on the device,
and no operation on such a tensor may take or give float64. What is brought to the CPU is off it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from relearn_lens.find.attribution import attribute
from relearn_lens.measure.evaluation import evaluate
from relearn_lens.measure.similarity import activation_similarity
from relearn_lens.measure.tracking import measure
from relearn_lens.models import model as models
from relearn_lens.models import toy
from relearn_lens.models.training import finetune_
from relearn_lens.remove.ablation import ablated, held, prune_
from relearn_lens.text.concept import Concept


class NoFloat64(TorchDispatchMode):
    """Follows what is on the device, and refuses float64 there."""

    def __init__(self, model: models.Model):
        super().__init__()
        self.operations = 0
        for weight in model.parameters():
            weight._on_device = True  # pyright: ignore[reportAttributeAccessIssue]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(getattr(t, "_on_device", False) for t in given):
            self.operations += 1
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if any(t.dtype == torch.float64 and t.ndim for t in (*given, *made)):
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({func})")
            for t in made:
                t._on_device = True  # pyright: ignore[reportAttributeAccessIssue]
        return result


@contextlib.contextmanager
def without_float64(monkeypatch: pytest.MonkeyPatch, model: models.Model) -> Iterator[NoFloat64]:
    def brought(self: Tensor, *_: Any, **__: Any) -> Tensor:
        with _disable_current_modes():
            return self.detach().clone()

    device = NoFloat64(model)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_NARROW", {"mps", "cpu"})
        patch.setattr(Tensor, "cpu", brought)
        with device:
            yield device
    for weight in model.parameters():
        del weight._on_device  # pyright: ignore[reportAttributeAccessIssue]


PLACE = Concept("place")


@pytest.fixture(scope="module")
def text():
    return toy.corpus(sentences=40)


def trained(model, text):
    for _ in finetune_(model, text, lr=1e-3, batch_size=8, epochs=1, seed=0):
        pass


TASKS = {
    "finetune_": trained,
    "evaluate": lambda model, text: evaluate(model, text, concept=PLACE),
    "attribute": lambda model, text: attribute(model, text, PLACE, sentences=4, steps=4),
    "measure": lambda model, text: measure(model, text, PLACE, what=["dprime", "auroc", "top_words"]),
    "similarity": lambda model, text: activation_similarity(
        {name: w.clone() for name, w in model.weights().items()}, model, text
    ),
}


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("kind", ["tagger", "language_model"])
def test_nothing_is_float64_on_the_device(task, kind, text, monkeypatch):
    model = getattr(toy, kind)()
    with without_float64(monkeypatch, model) as device:
        TASKS[task](model, text)
    assert device.operations > 20


def test_cutting_and_holding(text, monkeypatch):
    model = toy.tagger()
    chosen = measure(model, text, PLACE, site="mlp_post").saliency.top(fraction=0.1)
    with without_float64(monkeypatch, model) as device:
        with ablated(model, chosen):
            evaluate(model, text)
        prune_(model, chosen)
        with held(model, chosen):
            trained(model, text)
    assert device.operations > 20


def test_the_emulation_refuses_float64(monkeypatch):
    model = toy.tagger()
    weight = model.head.weight
    with without_float64(monkeypatch, model):
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
            weight.double()
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
            (weight * 2).sum(0, dtype=torch.float64)
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
            torch.add(weight, torch.zeros(weight.shape, dtype=torch.float64))
        assert weight.cpu().double().dtype == torch.float64


def test_training_is_seeded_on_the_device(monkeypatch):
    """Dropout draws from the device's own generator, which is seeded for the block and put back."""
    state, seeds = [torch.zeros(4, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda *_: state[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, *_: state.append(new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: (seeds.append(seed), state.append(state[0] + 1)))
    with models.seeded(7, torch.device("mps")):
        assert not torch.equal(state[-1], state[0])
    assert seeds == [7]
    assert torch.equal(state[-1], state[0])
