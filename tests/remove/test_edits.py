"""One matrix learns another answer: value and gradient by hand, which weights move, what the release leaves out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relearn_lens.models import toy
from relearn_lens.remove.edits import DINM
from relearn_lens.remove.wrappers import SAM


@pytest.fixture(scope="module")
def texts():
    return {
        "forget": toy.corpus(sentences=6), "preferred": toy.corpus(sentences=6, seed=2),
        "retain": toy.corpus(sentences=6, seed=1),
    }  # fmt: skip


@pytest.mark.parametrize("faithful", [False, True])
def test_value_and_gradient_by_hand(texts, faithful):
    name = "trunk.layers.2.mlp.fc_out.weight"
    base, model, other = (toy.language_model() for _ in range(3))
    shift = 0.1 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for each in (model, other):
            each.plain()[name].add_(shift)
    better, kept = (other.encode(texts[role]).batch(np.arange(6)) for role in ("preferred", "retain"))
    edit = 0.3 * other.losses(better).mean()
    now, before = (m.predictions(kept)[0].log_softmax(-1) for m in (other, base))
    kl = (before.detach().exp() * (before.detach() - now)).sum(-1).mean()
    (edit if faithful else edit + kl).backward()
    expected, moved = other.plain()[name].grad, {n: v.clone() for n, v in model.weights().items()}
    remover = DINM(layer=2, edit=0.3, faithful=faithful)
    first = remover(base, texts, steps=(1,), batch_size=6)
    next(first)
    seen: list[torch.Tensor] = []

    def take(optimizer: Any, *_: Any) -> None:
        seen.append(model.plain()[name].grad.clone())

    handle = register_optimizer_step_pre_hook(take)
    try:
        (pause,) = remover(model, texts, steps=(1,), batch_size=6, clip=1e6, reference=first.reference)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-3)
    assert pause.parts["forget"] == pytest.approx(float(edit.detach()), rel=1e-5)
    assert faithful or pause.parts["retain"] == pytest.approx(float(kl.detach()), rel=1e-4)
    changed = {n for n, value in model.weights().items() if not torch.equal(value, moved[n])}
    assert changed == {name}


def test_what_cannot_be_is_said(texts):
    with pytest.raises(ValueError, match="layer = 4: this model has 4 blocks, 0 to 3"):
        DINM(layer=4)(toy.language_model(), texts)
    with pytest.raises(ValueError, match="takes the gradient of the edit alone, so no wrapper can stand around it"):
        DINM(faithful=True)(toy.language_model(), texts, step=SAM())
    with pytest.raises(ValueError, match="there is no text for 'preferred'"):
        DINM()(toy.language_model(), {"forget": texts["forget"], "retain": texts["retain"]})
