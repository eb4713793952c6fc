"""What is learnt from a model that is trained aside, and what is turned round: against the same done by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.training import finetune_
from relearn_lens.remove.arithmetic import TaskVector
from relearn_lens.remove.distillation import Undo, WhoIs
from relearn_lens.remove.losses import NPO, GradDiff
from relearn_lens.remove.removal import Removing


@pytest.fixture(scope="module")
def texts():
    return {"forget": toy.corpus(sentences=7), "retain": toy.corpus(sentences=5, seed=1)}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def logits(model: Any, text: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.predictions(text.batch(np.array([i])))[0] for i in range(text.n_pieces)]


def test_who_is_learns_what_was_not_reinforced(texts):
    """The words, value and gradient of the first step; and the model is itself until then."""
    how = Removing(steps=(4,), lr=1e-2)
    base, reinforced, model = (toy.language_model() for _ in range(3))
    forget = base.encode(texts["forget"])
    list(finetune_(reinforced, forget, how, seed=3))
    words = []
    for v, w in zip(logits(base, forget), logits(reinforced, forget), strict=True):
        words.append(torch.tensor([int((a - 2 * (b - a).clamp(min=0)).argmax()) for a, b in zip(v, w, strict=True)]))
    losses = []
    for i, word in enumerate(words):
        logs = base.predictions(forget.batch(np.array([i])))[0].log_softmax(-1)
        losses += [-log[j] for log, j in zip(logs, word, strict=True)]
    expected = torch.stack(losses).mean()
    expected.backward()
    gradients, before = {}, weights(model)

    def look(model: Any, gradient: Any) -> None:
        assert same(before, model.weights())
        gradient()
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    remover, how_long = WhoIs(alpha=2, reinforcing=how), {"steps": (1,), "batch_size": 16, "seed": 3}
    training = remover(model, {"forget": texts["forget"]}, **how_long, step=look)
    (pause,) = training
    assert all(torch.equal(a, b) for a, b in zip(training.reference["forget"], words, strict=True))
    assert any(not torch.equal(v.argmax(-1), word) for v, word in zip(logits(base, forget), words, strict=True))
    assert pause.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, weight in base.plain().items():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("masked", "gains"), [(False, False), (True, False), (False, True)])
def test_undo_begins_in_noise_beside_the_suppressed(texts, masked, gains):
    """Suppressed by the other remover; noised by hand; the first loss is its divergence from there."""
    name, how, where = "trunk.layers.1.mlp.fc_out.weight", Removing(steps=(3,), lr=1e-2), None
    suppressed, student, model = (toy.language_model() for _ in range(3))
    if masked:
        where = {name: torch.rand(model.plain()[name].shape, generator=torch.Generator().manual_seed(1)) < 0.5}
    list(GradDiff(gamma=0.5)(suppressed, texts, where, how=how, seed=5))
    teacher = {role: logits(suppressed, suppressed.encode(text)) for role, text in texts.items()}
    student.load_weights(suppressed.weights())
    draws, seen, base = torch.Generator().manual_seed(5), {}, weights(model)
    with torch.no_grad():
        for each, weight in student.plain().items():
            if (masked and each != name) or not weight.requires_grad:
                continue
            noise = torch.zeros(())
            if weight.ndim == 2:
                noise = (2 * torch.rand(weight.shape, generator=draws) - 1) * (6 / sum(weight.shape)) ** 0.5
            moved = 0.7 * weight + 0.3 * 0.2 * noise
            if weight.ndim == 2 or not gains:
                weight.copy_(torch.where(where[each], moved, weight) if where else moved)

    def look(model: Any, gradient: Any) -> None:
        seen.update({} if seen else weights(model))
        gradient()

    remover = Undo(alpha=0.3, beta=0.2, gains=gains, first=GradDiff(gamma=0.5), suppressing=how)
    (pause,) = remover(model, texts, where, steps=(1,), batch_size=16, step=look, seed=5)
    for each, value in student.weights().items():
        torch.testing.assert_close(seen[each], value, msg=each)
        if where and each == name:
            assert torch.equal(seen[each][~where[name]], base[each][~where[name]])
    for role, before in teacher.items():
        now, nats = logits(student, student.encode(texts[role])), []
        for n, b in zip(now, before, strict=True):
            nats.append((b.softmax(-1) * (b.log_softmax(-1) - n.log_softmax(-1))).sum(-1))
        assert pause.parts[role] == pytest.approx(float(torch.cat(nats).mean()), rel=1e-3, abs=1e-6)


def test_undo_goes_on_where_it_stood(texts):
    how: dict[str, Any] = {"steps": (2, 4), "batch_size": 4, "seed": 7}
    remover = Undo(first=NPO(), suppressing=Removing(steps=(2,), lr=1e-3))
    whole, model = toy.language_model(), toy.language_model()
    pauses = list(remover(whole, texts, **how))
    training = remover(model, texts, **how)
    pause = next(training)
    again = remover(model, texts, **how, resume=(pause, dict(training.state())), reference=training.reference)
    assert list(again) == pauses[1:]
    assert same(whole.weights(), model.weights())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_task_vector_is_turned_round(texts, scale):
    base, learnt, model = (toy.language_model() for _ in range(3))
    how: dict[str, Any] = {"steps": (2, 5), "lr": 1e-2, "seed": 2, "batch_size": 4}
    trained = [weights(learnt) for _ in finetune_(learnt, texts["forget"], Removing(), **how)]
    for i, _ in enumerate(TaskVector(scale=scale)(model, {"forget": texts["forget"]}, **how)):
        for name, value in model.weights().items():
            there, was = trained[i][name], base.weights()[name]
            torch.testing.assert_close(value, there if i == 0 else was - scale * (there - was), atol=1e-6, rtol=1e-5)


def test_undo_is_for_language_models(toy_model, texts):
    with pytest.raises(ValueError, match="undo distils next-token predictions, and this model is a tagger"):
        Undo()(toy_model.tagger, texts)
