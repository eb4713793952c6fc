"""Every objective's value and gradient against a plain loop, with a second model as the reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.taught import Recipe, untaught
from relearn_lens.remove.distillation import UNDIAL
from relearn_lens.remove.losses import ILU, NPO, GradDiff, GradientAscent, SimNPO
from relearn_lens.remove.preference import DPO, IDK, AltPO, preferred
from relearn_lens.remove.removal import Remover
from relearn_lens.remove.weighting import CEU, PDU, WGA, SatImp
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts import FORGET, REFUSALS, TRAINED, Facts, Passage, people
from relearn_lens.text.facts.encoded import encode_facts, encode_passages
from tests.families import lent_language_models

BETTER = toy.corpus(sentences=5, seed=2)


@pytest.fixture(scope="module")
def texts() -> dict[str, Corpus]:
    return {"forget": toy.corpus(sentences=5), "retain": toy.corpus(sentences=4, seed=1), "preferred": BETTER}


Make = Callable[[], LanguageModel]


@pytest.fixture(params=["native", "llama"])
def make(request) -> Make:
    """A causal model with random weights, another at every call."""
    return toy.language_model if request.param == "native" else lent_language_models("llama")


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


def simnpo(model: LanguageModel, text: Encoded, beta: float, delta: float) -> Tensor:
    each = [-2 / beta * torch.log(torch.sigmoid(beta * (now.mean() - delta))) for now in nats(model, text)]
    return torch.stack(each).mean()


def dpo(model: LanguageModel, base: LanguageModel, text: Encoded, beta: float) -> Tensor:
    each, better = [], model.encode(BETTER)
    for worse, worse_was, good, good_was in zip(
        nats(model, text), nats(base, text), nats(model, better), nats(base, better), strict=True
    ):
        margin = (good_was.sum().detach() - good.sum()) - (worse_was.sum().detach() - worse.sum())
        each.append(-2 / beta * torch.log(torch.sigmoid(beta * margin)))
    return torch.stack(each).mean()


def weighed(model: LanguageModel, text: Encoded, weigh: Callable[[float], float]) -> Tensor:
    each = [weigh(float(torch.exp(-nat.detach()))) * nat for sentence in nats(model, text) for nat in sentence]
    return -torch.stack(each).mean()


def without_the_right_one(model: LanguageModel, text: Encoded, first: int = 0) -> Tensor:
    each = []
    for logs, ids in predictions(model, text):
        for log, right in list(zip(logs, ids, strict=True))[first:]:
            others = [i for i in range(len(log)) if i != int(right)]
            p = log.detach().exp()
            each.append(-sum(p[i] / (1 - p[right]) * log[i] for i in others))
    return torch.stack(each).mean()


def flatness(model: LanguageModel, text: Encoded, shift: int = 0) -> Tensor:
    each = []
    for i in range(text.n_pieces):
        batch = text.batch(np.array([i]))
        rows = model(batch.ids, batch.mask)[0]
        for position in batch.subword.tolist():
            logits = rows[position - 1 + shift]
            each.append((logits.max() - logits.sum() / len(logits)) ** 2)
    return torch.stack(each).mean()


def undial(model: LanguageModel, base: LanguageModel, text: Encoded, beta: float) -> Tensor:
    each = []
    for (now, ids), (before, _) in zip(predictions(model, text), predictions(base, text), strict=True):
        for log, was, right in zip(now, before.detach(), ids, strict=True):
            target = was.exp() * torch.exp(-beta * (torch.arange(len(was)) == right))
            each.append(-(target / target.sum() * log).sum())
    return torch.stack(each).mean()


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
    "simnpo": (
        SimNPO(beta=2.5, gamma=0.3, delta=0.5), lambda m, b, f, r: 0.3 * simnpo(m, f, 2.5, 0.5) + ce(m, r),
    ),
    "idk": (IDK(alpha=2), lambda m, b, f, r: ce(m, m.encode(BETTER)) + 2 * ce(m, r)),
    "dpo": (DPO(beta=0.4), lambda m, b, f, r: dpo(m, b, f, 0.4) + ce(m, r)),
    "alt_po": (AltPO(retain="kl"), lambda m, b, f, r: dpo(m, b, f, 0.1) + kl(m, b, r)),
    "wga": (WGA(beta=0.5, gamma=2), lambda m, b, f, r: 2 * weighed(m, f, lambda p: p**0.5) + ce(m, r)),
    "sat_imp": (
        SatImp(beta1=0.3, beta2=2), lambda m, b, f, r: 0.1 * weighed(m, f, lambda p: p**0.3 * (1 - p) ** 2) + ce(m, r),
    ),
    "ce_u": (CEU(), lambda m, b, f, r: without_the_right_one(m, f)),
    "ce_u, without first sub-words": (CEU(faithful=True), lambda m, b, f, r: without_the_right_one(m, f, first=1)),
    "pdu": (PDU(gamma=2), lambda m, b, f, r: 2 * flatness(m, f) + ce(m, r)),
    "pdu, one position off": (PDU(gamma=2, faithful=True), lambda m, b, f, r: 2 * flatness(m, f, shift=1) + ce(m, r)),
    "undial": (UNDIAL(beta=3), lambda m, b, f, r: undial(m, b, f, 3)),
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


@pytest.mark.parametrize(
    ("make", "case"),
    [
        *(("native", case) for case in CASES),
        *(("llama", case) for case in ("grad_diff, kl", "npo", "alt_po", "pdu", "ce_u")),
    ],
    indirect=["make"],
)
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


@pytest.mark.parametrize(
    "remover", [GradientAscent(), GradDiff(), NPO(), SimNPO(), WGA(), SatImp(), CEU(), PDU(), DPO()]
)
def test_taggers_forget_too(toy, remover, texts):
    before = toy.tagger.head.weight.detach().clone()
    (pause,) = remover(toy.tagger, texts, steps=(2,))
    assert set(pause.parts) >= {"forget"}
    assert not torch.equal(before, toy.tagger.head.weight)


def test_the_released_undial_counts_every_position(texts):
    """Prompt and padding too, where it takes from the 100th token from the end."""
    facts = people(0, n=12, forget=4, never=2, animals=2, n_answers=8)
    small = Recipe(n_layers=1, d_model=16, n_heads=2, d_mlp=16)
    base, model = untaught(facts, recipe=small), moved(lambda: untaught(facts, recipe=small))
    text = encode_facts(facts, "forget_attacked", tokenizer=base.tokenizer)
    batch = text.batch(np.arange(text.n_pieces))
    assert int(batch.mask.min()) == 0  # there is padding
    now, before = (m(batch.ids, batch.mask) for m in (model, base))
    right, each = set(batch.subword.tolist()), []
    width, size = batch.ids.shape[1], now.shape[2]
    for row in range(len(now)):
        for i in range(width - 1):
            j = int(batch.ids[row, i + 1]) if row * width + i + 1 in right else size - 100
            target = torch.softmax(before[row, i].detach() - 5.0 * (torch.arange(size) == j), 0)
            each.append(-(target * now[row, i].log_softmax(0)).sum())
    expected = torch.stack(each).mean()
    expected.backward()
    remover, gradients = UNDIAL(beta=5, faithful=True), {}

    def look(model: Any, gradient: Any) -> None:
        gradient()
        gradients.update({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    first = remover(base, {"forget": text}, steps=(1,), batch_size=100)
    next(first)
    other = moved(lambda: untaught(facts, recipe=small))
    (pause,) = remover(other, {"forget": text}, steps=(1,), batch_size=100, step=look, reference=first.reference)
    assert pause.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, weight in model.plain().items():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, atol=1e-6, rtol=1e-3, msg=name)
    with pytest.raises(ValueError, match="the token 100 before the end of the vocabulary, and this model has 58"):
        remover(toy.language_model(), texts)


def test_the_dual_variable_follows_the_retained_loss(texts):
    """After its warm-up, batch by batch; and a training that is resumed goes on with it."""
    remover, how = PDU(gamma=0.01, eps=1.0, rate=0.5, start=0.2, warmup_epochs=1), {"batch_size": 4, "lr": 1e-2}
    model = toy.language_model()
    training = remover(model, texts, steps=tuple(range(1, 9)), **how)
    losses, duals = [], []
    for pause in training:
        losses.append(pause.parts["retain"])
        duals.append(float(training.state()["memory.lambda"]))
    expected, dual = [], 0.2
    for step, loss in enumerate(losses, 1):
        if step / 2 > 1:
            dual = max(0.0, dual + 0.5 * (loss - 1.0))
        expected.append(dual)
    assert duals == pytest.approx(expected, rel=1e-5)
    assert len(set(duals)) == 7
    other = toy.language_model()
    first = remover(other, texts, steps=(5, 8), **how)
    pause = next(first)
    rest = remover(other, texts, steps=(5, 8), **how, resume=(pause, dict(first.state())))
    list(rest)
    assert float(rest.state()["memory.lambda"]) == duals[-1]
    assert all(torch.equal(value, other.weights()[name]) for name, value in model.weights().items())


def test_pairs_have_as_many_pieces(texts):
    with pytest.raises(ValueError, match="'preferred' goes beside that of 'forget', piece by piece, and they have 6 "):
        DPO()(toy.language_model(), {**texts, "preferred": toy.corpus(sentences=6)})


def test_facts_give_preferred_answers():
    facts = people(0, n=12, forget=4, never=2, animals=2, n_answers=8)
    passages = facts.passages(*FORGET, forms=TRAINED)
    refusals, others = (preferred(facts, kind, seed=1) for kind in ("idk", "alt_po"))
    for was, refusal, other in zip(passages, refusals, others, strict=True):
        assert refusal.answer in REFUSALS
        assert other.answer != was.answer
        assert other.answer in {p.answer for p in facts.passages(relation=was.relation)}
        assert (was.prompt, was.key) == (refusal.prompt, refusal.key) == (other.prompt, other.key)
    assert others != preferred(facts, "alt_po", seed=2)
    small = Recipe(n_layers=1, d_model=16, n_heads=2, d_mlp=16)
    text = {
        "forget": encode_facts(facts, *FORGET, tokenizer=untaught(facts, recipe=small).tokenizer),
        "preferred": encode_passages(others, untaught(facts, recipe=small).tokenizer),
    }
    ends = []
    for given in (facts, text):
        model = untaught(facts, recipe=small)
        list(AltPO(alpha=0)(model, given, steps=(3,), seed=1, lr=1e-2))
        ends.append({name: value.clone() for name, value in model.weights().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_only_answer_has_no_alternative():
    facts = Facts(
        "few", (Passage("A is", "red", "A"),), (Passage("B has", "red", "B"),), (Passage("C says", "red", "C"),)
    )
    with pytest.raises(ValueError, match="the relation 'fact' of 'A' has no answer but 'red', so there is no altern"):
        preferred(facts, "alt_po", seed=0)


@pytest.mark.parametrize("remover", [UNDIAL(), PDU(faithful=True)], ids=repr)
def test_what_is_about_next_tokens_is_for_language_models(toy_model, texts, remover):
    with pytest.raises(ValueError, match="next-token predictions, and this model is a tagger"):
        remover(toy_model.tagger, texts)


def test_invariance_by_finite_differences(texts):
    """The squared slope of the loss in a factor of all logits; the rest is what npo lowers."""
    model = toy.language_model()
    batch = model.encode(texts["preferred"]).batch(np.arange(5))

    def loss(model: LanguageModel, factor: float) -> Tensor:
        logits, right = model.predictions(batch)
        return torch.nn.functional.cross_entropy(factor * logits.double(), right)

    slope = ((loss(model, 1 + 1e-4) - loss(model, 1 - 1e-4)) / 2e-4).detach()
    given = {"forget": texts["forget"], "retain": texts["retain"], "tuning": texts["preferred"]}
    how: dict[str, Any] = {"steps": (1,), "batch_size": 7}
    (pause,) = ILU(penalty=3)(model, given, **how)
    assert pause.parts["tuning"] == pytest.approx(3 * float(slope) ** 2, rel=1e-3)
    (bare,) = NPO()(toy.language_model(), given, **how)
    assert {role: pause.parts[role] for role in bare.parts} == pytest.approx(bare.parts, rel=1e-5)
    model = toy.language_model()
    (value, n), names = ILU().terms(model, 0)["tuning"].value(model, batch, None), ["trunk.ln_out.bias"]
    (gradient,) = torch.autograd.grad(value, [model.plain()[name] for name in names])
    assert n == 1
    for i in range(0, 32, 5):
        ends = []
        for by in (1e-2, -1e-2):
            other = toy.language_model()
            with torch.no_grad():
                other.plain()[names[0]][i] += by
            ends.append(float(((loss(other, 1 + 1e-3) - loss(other, 1 - 1e-3)) / 2e-3).detach() ** 2))
        assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.05, abs=1e-4)


def test_invariance_is_to_what_stays_in_general():
    facts = people(0, n=12, forget=4, never=2, animals=3, n_answers=8)
    model = untaught(facts, recipe=Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=16))
    for given, role in ((facts, "retain_general"), (replace(facts, retain_general=()), "retain_near")):
        texts: Any = ILU().texts(model, given, ["forget", "retain", "tuning"], 0)
        assert texts["tuning"].passages == given.passages(role, forms=TRAINED)
