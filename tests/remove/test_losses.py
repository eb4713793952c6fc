"""Every objective's value and gradient against a plain loop, with a second model as the reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relearn_lens.models import toy
from relearn_lens.models.loading import load_language_model
from relearn_lens.models.model import LanguageModel
from relearn_lens.remove.losses import NPO, GradDiff, GradientAscent
from relearn_lens.remove.removal import Remover
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded
from tests.families import small_tagger


@pytest.fixture(scope="module")
def texts() -> dict[str, Corpus]:
    return {"forget": toy.corpus(sentences=7), "retain": toy.corpus(sentences=5, seed=1)}


Make = Callable[[], LanguageModel]


@pytest.fixture(params=["native", "llama"])
def make(request, tmp_path) -> Make:
    """A causal model with random weights, anew at every call."""
    if request.param == "native":
        return toy.language_model
    small_tagger("llama", tmp_path)
    return lambda: load_language_model(tmp_path, device="cpu").eval()  # type: ignore[return-value]


def moved(make: Make) -> LanguageModel:
    """The model some steps later: the reference is another one now, of head and embedding too."""
    model, noise = make(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.05 * float(weight.std(correction=0)) + 1e-3)
    return model


# --- by hand


def predictions(model: LanguageModel, text: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Per sentence, read alone: log-probabilities of every token at each sub-word, and what the sub-words are."""
    each = []
    for i in range(text.n_pieces):
        batch = text.batch(np.array([i]))
        logs, positions = model(batch.ids, batch.mask)[0].log_softmax(-1), batch.subword.tolist()
        each.append((torch.stack([logs[p - 1] for p in positions]), batch.ids[0][positions]))
    return each


def nats(model: LanguageModel, text: Encoded) -> list[Tensor]:
    return [-torch.stack([log[i] for log, i in zip(logs, ids, strict=True)]) for logs, ids in predictions(model, text)]


def ce(model: LanguageModel, text: Encoded) -> Tensor:
    return torch.cat(nats(model, text)).mean()


def kl(model: LanguageModel, base: LanguageModel, text: Encoded) -> Tensor:
    each = []
    for (now, _), (before, _) in zip(predictions(model, text), predictions(base, text), strict=True):
        before = before.detach()
        each += [(b.exp() * (b - n)).sum() for n, b in zip(now, before, strict=True)]
    return torch.stack(each).mean()


def kl_everywhere(model: LanguageModel, base: LanguageModel, text: Encoded) -> Tensor:
    batch = text.batch(np.arange(text.n_pieces))
    now, before = (m(batch.ids, batch.mask).log_softmax(-1).flatten(0, 1) for m in (model, base))
    assert len(now) > len(batch.subword) + text.n_pieces  # there is padding
    return (before.detach().exp() * (before.detach() - now)).sum() / len(now)


def npo(model: LanguageModel, base: LanguageModel, text: Encoded, beta: float) -> Tensor:
    each = []
    for now, before in zip(nats(model, text), nats(base, text), strict=True):
        ratio = -now.sum() + before.sum().detach()
        each.append(-2 / beta * torch.log(torch.sigmoid(-beta * ratio)))
    return torch.stack(each).mean()


def npo_of_batch(model: LanguageModel, base: LanguageModel, text: Encoded, beta: float) -> Tensor:
    return -2 / beta * torch.log(torch.sigmoid(beta * (ce(model, text) - ce(base, text).detach())))


Plain = Callable[[LanguageModel, LanguageModel, Encoded, Encoded], Tensor]
CASES: dict[str, tuple[Remover, Plain]] = {
    "gradient_ascent": (GradientAscent(), lambda m, b, f, r: -ce(m, f)),
    "grad_diff": (GradDiff(gamma=0.5, alpha=3), lambda m, b, f, r: -0.5 * ce(m, f) + 3 * ce(m, r)),
    "grad_diff, nothing retained": (GradDiff(alpha=0), lambda m, b, f, r: -ce(m, f)),
    "grad_diff, kl": (GradDiff(retain="kl", alpha=3), lambda m, b, f, r: -ce(m, f) + 3 * kl(m, b, r)),
    "grad_diff, kl as released": (
        GradDiff(retain="kl", faithful=True), lambda m, b, f, r: -ce(m, f) + kl_everywhere(m, b, r),
    ),
    "npo": (NPO(beta=0.7, alpha=2), lambda m, b, f, r: npo(m, b, f, 0.7) + 2 * ce(m, r)),
    "npo, kl": (NPO(retain="kl"), lambda m, b, f, r: npo(m, b, f, 0.1) + kl(m, b, r)),
    "npo as released": (NPO(faithful=True), lambda m, b, f, r: npo_of_batch(m, b, f, 0.1) + ce(m, r)),
}  # fmt: skip


def one_step(remover: Remover, make: Make, texts: Any, model: LanguageModel | None = None, **how: Any) -> Any:
    """Loss and gradient of one step of the moved model, by the loop, with the reference taken from the base."""
    gradients: dict[str, Tensor] = {}

    def look(model: Any, gradient: Any) -> None:
        gradient()
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    first = remover(make(), texts, steps=(1,), batch_size=16)
    next(first)
    (pause,) = remover(
        model or moved(make), texts, steps=(1,), batch_size=16, step=look, reference=first.reference, **how
    )
    return pause.loss, gradients


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_a_plain_loop(make, texts, case):
    remover, by_hand = CASES[case]
    base, other = make(), moved(make)
    forget, retain = base.encode(texts["forget"]), base.encode(texts["retain"])
    value = by_hand(other, base, forget, retain)
    value.backward()
    loss, gradients = one_step(remover, make, texts)
    assert loss == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, weight in other.plain().items():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, atol=2e-5 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if "released" not in case])
def test_in_parts_is_the_same(texts, case):
    remover, _ = CASES[case]
    loss, gradients = one_step(remover, toy.language_model, texts)
    again, in_parts = one_step(remover, toy.language_model, texts, accumulate=3)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(in_parts[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if "released" in case])
def test_what_only_a_whole_batch_can_say_is_refused_in_parts(texts, case):
    with pytest.raises(ValueError, match="does not say over how many each of its parts is"):
        CASES[case][0](toy.language_model(), texts, accumulate=2)


@pytest.mark.parametrize("retain", ["ce", "kl"])
def test_reference_of_the_model_itself_is_no_rise(texts, retain):
    """At the first step pi is pi0: log sigmoid(0), and no divergence."""
    (pause,) = NPO(retain=retain, beta=0.5)(toy.language_model(), texts, steps=(1,), batch_size=3)
    assert pause.parts["forget"] == pytest.approx(4 * np.log(2), rel=1e-5)
    if retain == "kl":
        assert pause.parts["retain"] == pytest.approx(0, abs=1e-6)


def test_npo_tends_to_gradient_ascent():
    """Its gradient differs by at most beta |log pi - log pi0| / 2 of each sentence's own."""
    base, model = toy.language_model(), moved(toy.language_model)
    text = base.encode(toy.corpus(sentences=7))
    per_sentence = text.n_subwords(np.arange(text.n_pieces)) / text.n_pieces
    _, ascent = one_step(GradientAscent(), toy.language_model, {"forget": text})

    rise = [abs(float((a.sum() - b.sum()).detach())) for a, b in zip(nats(model, text), nats(base, text), strict=True)]
    own = torch.zeros(())
    for sentence in nats(model, text):
        gradient = torch.autograd.grad(sentence.sum(), list(model.parameters()), allow_unused=True)
        own = own + torch.stack([g.norm() for g in gradient if g is not None]).norm()
    errors = []
    for beta in (1.0, 0.1, 0.01, 0.001):
        _, gradients = one_step(NPO(beta=beta, alpha=0), toy.language_model, {"forget": text})
        error = torch.stack([(gradients[n] - per_sentence * g).norm() for n, g in ascent.items()]).norm()
        errors.append(float(error))
        assert errors[-1] <= beta * max(rise) / 2 * float(own) / text.n_pieces + 1e-4
    assert max(rise) > 0.3
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_kl_takes_the_head_as_it_was(texts):
    """Only the head moves: hidden states are those of before, predictions are not."""
    base, model = toy.language_model(), toy.language_model()
    with torch.no_grad():
        model.plain()["trunk.head.weight"].mul_(2.0)
        forget, retain = base.encode(texts["forget"]), base.encode(texts["retain"])
        loss, divergence = -ce(model, forget), float(kl(model, base, retain))
    assert one_step(GradDiff(retain="kl"), toy.language_model, texts, model)[0] == pytest.approx(
        float(loss) + divergence, rel=1e-4
    )
    assert divergence > 0.01


def test_a_tagger_has_no_next_token_to_keep(toy_model, texts):
    with pytest.raises(ValueError, match="retain = 'kl' compares next-token predictions, and this model is a tagger"):
        GradDiff(retain="kl")(toy_model.tagger, texts)


@pytest.mark.parametrize("remover", [GradientAscent(), GradDiff(), NPO()])
def test_taggers_forget_too(toy, remover, texts):
    before = toy.tagger.head.weight.detach().clone()
    (pause,) = remover(toy.tagger, texts, steps=(2,))
    assert set(pause.parts) >= {"forget"}
    assert not torch.equal(before, toy.tagger.head.weight)
