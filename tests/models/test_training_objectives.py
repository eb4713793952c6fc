"""The seam of the training loop: several texts, parts of a loss, steps, masked entries, a reference, resuming."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relearn_lens.models import toy as toy_module
from relearn_lens.models.model import LanguageModel, Tagger
from relearn_lens.models.training import Checkpoint, Objective, cross_entropy, finetune_, plain, train_
from relearn_lens.text.corpus import Corpus
from tests.families import small_tagger
from tests.made import Pool

MODELS = Pool(toy_module.language_model)


@pytest.fixture
def model() -> LanguageModel:
    return MODELS.lend()()


@pytest.fixture(scope="module")
def text() -> Corpus:
    """Twelve sentences: three steps of four."""
    return toy_module.corpus(sentences=12)


@pytest.fixture(scope="module")
def other() -> Corpus:
    """Ten other sentences: three batches of four, the last of two."""
    return toy_module.corpus(sentences=10, seed=1)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.weights().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Difference:
    """Up on one text and down on another: two parts, one of them over sentences."""

    def __init__(self) -> None:
        self.pieces: list[dict[str, list[int]]] = []

    def __call__(self, model, batches, reference):
        self.pieces.append({role: batch.pieces.tolist() for role, batch in batches.items()})
        forget, retain = model.losses(batches["forget"]), model.losses(batches["retain"])
        return {"forget": (-forget.sum(), len(forget)), "retain": (2 * retain.sum(), len(batches["retain"].ids))}

    def counts(self, texts, pieces):
        return {"forget": texts["forget"].n_subwords(pieces["forget"]), "retain": len(pieces["retain"])}


# --- several texts


def test_texts_are_gone_through_beside_each_other(model, text, other):
    objective = Difference()
    pauses = list(train_(model, {"forget": text, "retain": other}, objective=objective, epochs=4, batch_size=4))
    assert [pause.step for pause in pauses] == [3, 6, 9, 12]
    for role, n in (("forget", 12), ("retain", 10)):
        orders = []
        for epoch in range(4):
            steps = objective.pieces[3 * epoch : 3 * epoch + 3]
            orders.append([piece for step in steps for piece in step[role]])
            assert sorted(orders[-1]) == list(range(n))
        assert orders[0] != orders[1]


def test_no_text_gives_more_pieces_than_the_first(model, text):
    objective = Difference()
    short, long = toy_module.corpus(sentences=5), text
    list(train_(model, {"forget": short, "retain": long}, objective=objective, epochs=3, batch_size=4))
    sizes = [(len(step["forget"]), len(step["retain"])) for step in objective.pieces]
    assert sorted(set(sizes)) == [(1, 1), (4, 4)]


def test_tokens_of_all_texts_are_counted(model, text, other):
    one, two = model.encode(text), model.encode(other)
    (pause,) = train_(model, {"forget": one, "retain": two}, objective=Difference(), epochs=1, batch_size=4)
    assert pause.tokens_seen == one.n_tokens + two.n_tokens


def test_equal_texts_are_not_read_in_step(model, text):
    objective = Difference()
    list(train_(model, {"forget": text, "retain": text}, objective=objective, epochs=1, batch_size=4))
    assert any(step["forget"] != step["retain"] for step in objective.pieces)


def test_no_text_at_all_is_refused(model):
    with pytest.raises(ValueError, match="no text to train on: texts is empty"):
        train_(model, {})


# --- parts and their counts


def test_loss_is_the_sum_of_its_parts_each_over_its_own_count(model, text, other):
    how: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 1e-12}
    (pause,) = train_(model, {"forget": text, "retain": other}, objective=Difference(), **how)
    nats = {}
    for role, corpus in (("forget", text), ("retain", other)):
        with torch.no_grad():
            nats[role] = torch.cat([model.losses(batch) for batch in model.encode(corpus).batches()])
    assert pause.parts["forget"] == pytest.approx(-float(nats["forget"].mean()), rel=1e-5)
    assert pause.parts["retain"] == pytest.approx(2 * float(nats["retain"].sum()) / 10, rel=1e-5)
    assert pause.loss == pytest.approx(sum(pause.parts.values()))


def test_a_batch_in_several_parts_is_one_big_batch(text, other):
    ends, pauses = [], []
    for parts in (1, 2, 3, 7):
        model, objective = toy_module.language_model(), Difference()
        texts = {"forget": text, "retain": other}
        pauses.append(list(train_(model, texts, objective=objective, epochs=1, batch_size=5, accumulate=parts)))
        assert len(objective.pieces) == 3 if parts == 1 else len(objective.pieces) > 5
        ends.append(weights(model))
    for (pause,), end in zip(pauses[1:], ends[1:], strict=True):
        assert pauses[0][0].parts == pytest.approx(pause.parts, rel=1e-5)
        for name, value in ends[0].items():
            if not name.endswith("attn.k.bias"):  # its gradient is 0 but for rounding, which Adam blows up
                torch.testing.assert_close(end[name], value, atol=1e-5, rtol=1e-4)


def test_a_plain_function_is_an_objective(text):
    def mine(model, batches, reference):
        nats = model.losses(batches["train"])
        return {"mine": (nats.sum(), len(nats))}

    one, two = toy_module.language_model(), toy_module.language_model()
    (pause,) = train_(one, text, objective=mine, epochs=1)
    (as_usual,) = train_(two, text, epochs=1)
    assert pause.parts == {"mine": as_usual.loss}
    assert same(weights(one), weights(two))


def test_an_objective_that_does_not_count_cannot_be_taken_in_parts(model, text):
    def mine(model, batches, reference):
        return cross_entropy(model, batches)

    before = weights(model)
    with pytest.raises(ValueError, match=r"objective 'mine' does not say over how many .*`counts\(texts, pieces\) ->"):
        train_(model, text, objective=mine, accumulate=2)
    assert same(before, weights(model))


def test_counts_of_other_parts_are_refused(model, text):
    def mine(model, batches, reference):
        return cross_entropy(model, batches)

    mine.counts = lambda texts, pieces: {"else": 1}  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(ValueError, match="gives the parts loss, but its `counts` those of else"):
        list(train_(model, text, objective=mine, accumulate=2))


# --- steps


def test_a_step_may_ask_for_parts(text, other):
    """Forget, then all others by name, is what the plain step does."""

    def by_parts(model, gradient):
        names = gradient("forget")
        assert names == ("forget", "retain")
        gradient(*(name for name in names if name != "forget"))

    ends = []
    for step in (plain, by_parts):
        model = toy_module.language_model()
        pauses = list(train_(model, {"forget": text, "retain": other}, objective=Difference(), epochs=1, step=step))
        ends.append((pauses[0].parts, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0])
    for name, value in ends[0][1].items():
        if not name.endswith("attn.k.bias"):
            torch.testing.assert_close(ends[1][1][name], value, atol=1e-5, rtol=1e-4)


def test_a_step_that_asks_for_a_part_that_is_not_there(model, text):
    with pytest.raises(ValueError, match="the objective has no part 'forget'; its parts are loss"):
        list(train_(model, text, step=lambda model, gradient: gradient("forget")))


def test_the_loss_that_is_reported_is_that_of_the_first_look(text):
    """A step that looks again elsewhere does not change what is said of this batch."""

    def twice(model, gradient):
        gradient()
        with torch.no_grad():
            model.trunk.head.weight.mul_(3.0)
        gradient()
        with torch.no_grad():
            model.trunk.head.weight.div_(3.0)

    losses = []
    for step in (plain, twice):
        (pause,) = train_(toy_module.language_model(), text, epochs=1, batch_size=12, step=step)
        losses.append(pause.loss)
    assert losses[0] == losses[1]


# --- entries that may move


def half(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(weight.numel()).view_as(weight) % 3 == 0


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_only_masked_entries_move(model, text, schedule):
    """Under weight decay, which moves a weight without a gradient, and over steps that carry momentum."""
    before = weights(model)
    names = ("trunk.layers.1.mlp.fc_out.weight", "trunk.layers.2.ln1.bias")
    only = {name: half(before[name]) for name in names}
    only["trunk.layers.0.attn.q.weight"] = torch.ones_like(before["trunk.layers.0.attn.q.weight"], dtype=torch.bool)
    only["trunk.pos.weight"] = torch.zeros_like(before["trunk.pos.weight"], dtype=torch.bool)
    for _ in train_(model, text, only=only, epochs=2, batch_size=4, lr=1e-2, weight_decay=2.0, schedule=schedule):
        pass
    for name, value in weights(model).items():
        mask = only.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~mask], before[name][~mask]), name
        assert not (value[mask] == before[name][mask]).any(), name
    assert all(weight.grad is None for weight in model.parameters())


def test_a_mask_of_everything_is_no_mask(text):
    ends = []
    for all_of_it in (False, True):
        model = toy_module.language_model()
        only = {n: torch.ones_like(w, dtype=torch.bool) for n, w in model.plain().items() if w.requires_grad}
        list(train_(model, text, only=only if all_of_it else None, epochs=2))
        ends.append(weights(model))
    # Named in another order: the norm by which gradients are clipped is summed in another one.
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-5)


def test_a_step_sees_no_gradient_of_what_may_not_move(model, text):
    name = "trunk.layers.1.mlp.fc_out.weight"
    mask, seen = half(model.weights()[name]), []

    def look(model, gradient):
        gradient()
        seen.append({n: w.grad.clone() for n, w in model.plain().items() if w.grad is not None})

    list(train_(model, text, only={name: mask}, step=look, epochs=1, batch_size=12))
    (gradients,) = seen
    assert gradients.keys() == {name}
    assert not gradients[name][~mask].any()
    assert gradients[name][mask].any()


def test_the_prior_of_tags_does_not_move_a_bias_that_may_not(toy, text):
    before = weights(toy.tagger)
    only = {"head.weight": half(before["head.weight"])}
    list(finetune_(toy.tagger, text, only=only, epochs=1))
    assert torch.equal(toy.tagger.head.bias, before["head.bias"])
    only = {"head.bias": torch.tensor([True, False, True, False, False])}
    list(finetune_(toy.tagger, text, only=only, epochs=1, lr=1e-12))
    bias, mask = toy.tagger.head.bias.detach(), only["head.bias"]
    assert torch.equal(bias[~mask], before["head.bias"][~mask])
    assert (bias[mask] - before["head.bias"][mask]).abs().min() > 1e-2


@pytest.mark.parametrize(
    ("only", "says"),
    [
        ({"head": torch.ones(2, dtype=torch.bool)}, r"this model has no weight 'head'; it has trunk.tok_embed.weight"),
        ({"trunk.head.weight": torch.ones(2, dtype=torch.bool)}, r"head.weight has shape .*bool of \(2,\); a mask"),
        ({"trunk.ln_out.bias": torch.ones(32)}, r"ln_out.bias has shape \(32,\), its mask is torch.float32"),
        ({"trunk.ln_out.bias": torch.zeros(32, dtype=torch.bool)}, "no entry of any weight may move"),
        ({}, "no entry of any weight may move"),
    ],
)  # fmt: skip
def test_masks_of_another_model_are_refused_at_the_call(model, text, only, says):
    with pytest.raises(ValueError, match=says):
        train_(model, text, only=only)


def test_weights_that_nothing_computes_with_cannot_train(text, model, tmp_path, corpus):
    gpt2 = small_tagger("gpt2", tmp_path)  # computes with queries, keys and values, each by themselves
    joint = "trunk.h.0.attn.c_attn.weight"
    with pytest.raises(ValueError, match="nothing that may move has a part in the loss; name weights in only= that"):
        list(train_(gpt2, corpus, only={joint: torch.ones_like(gpt2.weights()[joint], dtype=torch.bool)}))
    with torch.no_grad(), pytest.raises(ValueError, match="do not train under no_grad"):
        list(train_(model, text))


# --- by steps


@pytest.mark.parametrize("warmup", [0, 3])
def test_step_8_of_16_is_step_8_of_64(text, warmup):
    ends: list[dict[str, torch.Tensor]] = []
    for steps in ((8, 16), (2, 4, 8, 64)):
        model = toy_module.language_model()
        how: dict[str, Any] = {"schedule": "constant", "warmup": warmup, "batch_size": 4, "seed": 3}
        for pause in train_(model, text, steps=steps, **how):
            assert pause.stage == str(pause.step)
            if pause.step == 8:
                ends.append(weights(model))
                break
    assert same(*ends)


def test_pauses_by_step_say_their_epoch(model, text):
    pauses = list(train_(model, text, steps=(1, 3, 7), batch_size=4))
    assert [(pause.step, pause.epoch, pause.stage) for pause in pauses] == [
        (1, 1 / 3, "1"),
        (3, 1, "3"),
        (7, 7 / 3, "7"),
    ]


def test_warm_up_raises_the_rate_step_by_step(model, text):
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        list(train_(model, text, steps=(5,), batch_size=4, lr=0.4, schedule="constant", warmup=3))
    finally:
        handle.remove()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


# --- what an objective compares with


def against(calls: list[str]) -> Objective:
    """Cross-entropy beside what it was: of a model before its first step the two are equal."""

    def objective(model, batches, reference):
        calls.append("step")
        nats = model.losses(batches["train"])
        before = torch.cat([reference[i] for i in batches["train"].pieces.tolist()])
        return {"rise": ((nats - before).sum(), len(nats))}

    def reference(model, texts):
        calls.append("reference")
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        text = texts["train"]
        return [model.losses(text.batch(np.array([i]))) for i in range(text.n_pieces)]

    objective.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return objective


def test_reference_is_taken_once_before_the_first_step(model, text, untouched):
    calls: list[str] = []
    model.train()
    training = train_(model, text, objective=against(calls), steps=(1, 3), batch_size=12, lr=1e-2)
    assert training.reference is None
    assert calls == []
    with untouched(model, weights=False):
        first, second = training
    assert calls == ["reference", "step", "step", "step"]
    assert training.reference is not None
    assert len(training.reference) == 12
    assert first.loss == pytest.approx(0, abs=1e-6)
    assert second.loss < -1e-2


def test_resuming_with_a_reference_ends_in_the_same_weights(text):
    how: dict[str, Any] = {"steps": (2, 4), "batch_size": 4, "lr": 1e-2, "objective": against([])}
    whole = toy_module.language_model()
    pauses = list(train_(whole, text, **how))
    model, calls = toy_module.language_model(), list[str]()
    training = train_(model, text, **how)
    (pause,) = islice(training, 1)
    state = {name: value.clone() for name, value in training.state().items()}
    training.close()
    how["objective"] = against(calls)
    again = train_(model, text, **how, resume=(pause, state), reference=training.reference)
    assert list(again) == pauses[1:]
    assert "reference" not in calls
    assert same(weights(model), weights(whole))


def test_resuming_without_the_reference_is_refused(model, text):
    how: dict[str, Any] = {"steps": (2, 4), "batch_size": 4, "objective": against([])}
    training = train_(model, text, **how)
    pause = next(training)
    with pytest.raises(ValueError, match=r"'objective' compares with the model as it was before .*reference="):
        train_(model, text, **how, resume=(pause, training.state()))


def test_resuming_under_a_mask_ends_in_the_same_weights_to_the_bit(text, other):
    name = "trunk.layers.1.mlp.fc_out.weight"
    texts = {"forget": text, "retain": other}
    how: dict[str, Any] = {"steps": (1, 2, 5), "batch_size": 4, "lr": 1e-2, "weight_decay": 1.0}
    ends: list[tuple[list[Checkpoint], dict[str, torch.Tensor]]] = []
    for stop in (None, 2):
        model = toy_module.language_model()
        only = {name: half(model.weights()[name]), "trunk.ln_out.bias": torch.ones(32, dtype=torch.bool)}
        training = train_(model, texts, objective=Difference(), only=only, **how)
        pauses = list(islice(training, stop))
        if stop:
            state = {n: value.clone() for n, value in training.state().items()}
            pauses += train_(model, texts, objective=Difference(), only=only, **how, resume=(pauses[-1], state))
        ends.append((pauses, weights(model)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_a_tagger_and_a_language_model_share_the_loop(toy, model, text):
    for each in (toy.tagger, model):
        before = weights(each)
        assert isinstance(each, Tagger | LanguageModel)
        (pause,) = train_(each, {"forget": text, "retain": text}, objective=Difference(), epochs=1)
        assert set(pause.parts) == {"forget", "retain"}
        assert not same(before, weights(each))
