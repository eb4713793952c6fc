"""A plain training loop with AdamW written out as oracle; pauses and tokens worked out by hand; the same bits."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relearn_lens import progress
from relearn_lens.measure.evaluation import evaluate
from relearn_lens.methods import Retraining
from relearn_lens.models import toy as toy_module
from relearn_lens.models import training
from relearn_lens.models.model import Tagger
from relearn_lens.models.training import Checkpoint, finetune_, train_
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode
from tests.made import Pool

TAGGERS = Pool(toy_module.tagger)


@pytest.fixture
def tagger() -> Tagger:
    return TAGGERS.lend()()


@pytest.fixture(scope="module")
def text() -> Corpus:
    """Twelve sentences: six steps of two."""
    return toy_module.corpus(sentences=12)


def weights(tagger: Tagger) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tagger.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def run(text: Corpus, between=None, **settings) -> tuple[list[Checkpoint], dict[str, torch.Tensor]]:
    """Train a toy from its planted weights; `between` is called with it at every pause."""
    tagger, pauses = toy_module.tagger(), []
    for pause in finetune_(tagger, text, **({"epochs": 1.5, "batch_size": 2, "lr": 1e-3} | settings)):
        pauses.append(pause)
        if between:
            between(tagger)
    return pauses, weights(tagger)


# --- when it pauses, and what it says


@pytest.mark.parametrize(
    ("epochs", "every", "pauses"),
    [
        (1.5, 0.5, [(0.5, 3), (1, 6), (1.5, 9)]),
        (2, None, [(1, 6), (2, 12)]),
        (2.5, 1, [(1, 6), (2, 12), (2.5, 15)]),
        (2, 0.7, [(0.7, 4), (1.4, 8), (2, 12)]),
        (0.5, 2, [(0.5, 3)]),
        (1, 1 / 3, [(1 / 3, 2), (2 / 3, 4), (1, 6)]),
        (0.01, 1, [(0.01, 1)]),
    ],
)  # fmt: skip
def test_finetune_pauses_where_it_should(tagger, text, epochs, every, pauses):
    found = list(finetune_(tagger, text, epochs=float(epochs), every=every and float(every), batch_size=2))
    assert [(c.epoch, c.step) for c in found] == [(pytest.approx(epoch), step) for epoch, step in pauses]


def test_finetune_counts_a_last_smaller_batch_as_a_step(tagger, text):
    assert [c.step for c in finetune_(tagger, text, epochs=2.0, batch_size=5)] == [3, 6]


def toy_kind(word: str) -> str:
    return "place" if word in toy_module.PLACES else "person" if word in toy_module.PERSONS else "O"


@pytest.fixture(scope="module")
def two() -> Corpus:
    """4 words; 5 words of which Castor and Linholm are two sub-words each. The toy has no special tokens."""
    lines = ["in Tarn the baker", "Castor walked from Linholm ."]
    words = [[(w, toy_kind(w), toy_kind(w) != "O") for w in line.split()] for line in lines]
    return build_corpus(words, name="two", label_names=toy_module.LABELS)


def test_tokens_seen_by_hand(tagger, two):
    pauses = list(finetune_(tagger, two, epochs=3.0, batch_size=2))
    assert [c.tokens_seen for c in pauses] == [11, 22, 33]
    one = list(finetune_(tagger, two, epochs=1.0, every=0.5, batch_size=1))
    assert one[0].tokens_seen in (4, 7)
    assert one[1].tokens_seen == 11


def test_tokens_seen_counts_special_tokens_and_no_padding(bert, encoded):
    (pause,) = finetune_(bert, encoded, epochs=1.0, batch_size=4)
    assert pause.tokens_seen == encoded.n_tokens == len(encoded.ids) + 2 * encoded.n_pieces


def test_retrain_is_finetune_with_stages(text):
    one, other = toy_module.tagger(), toy_module.tagger()
    how = {"epochs": 1.0, "every": 0.5, "batch_size": 4, "seed": 3}
    stages = list(retrain_(one, text, **how, schedule="linear", warmup=0))
    assert list(finetune_(other, text, **how, lr=Retraining().lr, prior_bias=False)) == stages
    assert same(weights(one), weights(other))
    assert len(stages) == 2


def test_progress_counts_the_steps(tagger, text):
    seen = []
    with progress.reported(lambda *how_far: seen.append(how_far)):
        list(finetune_(tagger, text, epochs=1.5, batch_size=4))
    # Each stage says where it begins; the first one ends after an epoch.
    assert seen == [("fine-tuning", step, 4) for step in (0, 1, 2, 3, 3, 4)]


def test_training_within_a_task_counts_towards_it(tagger, text):
    seen = []
    with progress.reported(lambda *how_far: seen.append(how_far)), progress.task("an experiment"):
        list(finetune_(tagger, text, epochs=1.0, batch_size=4))
    assert seen == [("an experiment", step, 3) for step in (1, 2, 3)]


def test_finetune_takes_a_corpus_or_its_encoding(tagger, text):
    one = list(finetune_(tagger, encode(text, tagger.tokenizer, context=tagger.context), epochs=1.0))
    assert one == list(finetune_(toy_module.tagger(), text, epochs=1.0))


# --- nothing but the seed decides


def test_pausing_and_measuring_cannot_change_a_run(text):
    def disturb(tagger):
        evaluate(tagger, text)
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        tagger.eval()

    plain, once = run(text, every=1.5)
    often, disturbed = run(text, disturb, every=0.25)
    assert len(often) == 6
    assert len(plain) == 1
    assert same(once, disturbed)
    assert often[-1].tokens_seen == plain[-1].tokens_seen


def test_global_random_state_cannot_change_a_run(text):
    torch.manual_seed(1)
    one = run(text)[1]
    torch.manual_seed(2)
    assert same(one, run(text)[1])


def test_seed_decides_a_run(text):
    assert same(run(text, seed=1)[1], run(text, seed=1)[1])
    assert not same(run(text, seed=1)[1], run(text, seed=2)[1])


def test_dropout_differs_from_step_to_step(tagger, text, monkeypatch):
    masks = []
    monkeypatch.setattr(tagger.dropout, "forward", lambda x: masks.append(torch.rand(4)) or x)
    list(finetune_(tagger, text, epochs=1.0, batch_size=2))
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


def test_finetune_leaves_random_state_flags_and_gradients(toy, untouched):
    evaluate(toy.tagger, toy.corpus)  # TransformerLens hooks up its norms at the first forward pass
    toy.tagger.trunk.requires_grad_(False)
    with untouched(toy.tagger, weights=False):
        for _ in finetune_(toy.tagger, toy.corpus, epochs=1.0, batch_size=30, every=0.5):
            pass


def test_finetune_trains_only_what_asks_for_a_gradient(tagger, text):
    tagger.trunk.requires_grad_(False)
    before = weights(tagger)
    list(finetune_(tagger, text, epochs=1.0, lr=1e-2))
    changed = {name for name, value in tagger.weights().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


# --- the arithmetic


def by_hand(tagger: Tagger, text: Corpus, epochs: float, size: int, lr: float, decay: float, clip: float, seed: int):
    """Plain loop: cross-entropy, clipping, AdamW and its schedule written out; losses of every epoch."""
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    order = [b for e in range(int(epochs)) for b in encoded.shuffled(batch_size=size, seed=seed, epoch=e)]
    total, losses = len(order), []
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in tagger.named_parameters()}
    sums = [0.0, 0]
    tagger.train()
    for k, pieces in enumerate(order):
        batch = encoded.batch(pieces)
        logits = tagger(batch.ids, batch.mask)
        chosen = torch.stack([logits.reshape(-1, logits.shape[-1])[i] for i in batch.subword])
        loss = -torch.stack([row.log_softmax(0)[t] for row, t in zip(chosen, batch.tag, strict=True)]).mean()
        names = dict(tagger.named_parameters())
        grads = dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True))
        norm = torch.sqrt(sum((g.square().sum() for g in grads.values() if g is not None), torch.zeros(())))
        rate, t = lr * (1 - k / total), k + 1
        with torch.no_grad():
            for name, p in names.items():
                g = grads[name]
                if g is None:
                    continue
                g = g * min(1.0, float(clip / (norm + 1e-6)))
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g.square(), alpha=0.001)
                undecayed = name.endswith(".bias") or ".ln" in name
                p.mul_(1 - rate * (0 if undecayed else decay))
                p.sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        sums = [sums[0] + float(loss.detach()) * len(batch.tag), sums[1] + len(batch.tag)]
        if (k + 1) % (total // int(epochs)) == 0:
            losses.append(sums[0] / sums[1])
            sums = [0.0, 0]
    return losses


@pytest.mark.parametrize(("clip", "decay"), [(1.0, 0.01), (0.05, 0.0), (100.0, 5.0)])
def test_finetune_equals_a_loop_by_hand(tagger, text, clip, decay):
    other = toy_module.tagger()
    for model in (tagger, other):
        model.dropout.p = 0.0
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 1e-3, "clip": clip, "seed": 4}
    how = {"epochs": 2.0, "batch_size": 5, "weight_decay": decay, "prior_bias": False}
    pauses = list(finetune_(tagger, text, **how, **settings))
    losses = by_hand(other, text, epochs=2.0, size=5, decay=decay, **settings)
    assert [c.loss for c in pauses] == pytest.approx(losses, abs=1e-6)
    for name, value in other.weights().items():
        if name.endswith("attn.k.bias"):  # its gradient is 0 but for rounding, which Adam blows up
            continue
        torch.testing.assert_close(tagger.weights()[name], value, atol=2e-5, rtol=1e-4)


def test_loss_is_summed_over_sub_words_before_dividing(tagger):
    # A sentence of 1 sub-word and one of 30, a step each: the mean of the two steps' losses is another number.
    text = build_corpus(
        [[("Tarn", "O", False)], [("the", "O", False)] * 30], name="uneven", label_names=toy_module.LABELS
    )
    tagger.dropout.p = 0.0
    (pause,) = finetune_(tagger, text, epochs=1.0, batch_size=1, lr=1e-12, prior_bias=False)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    with torch.no_grad():
        losses = [
            -tagger(b.ids, b.mask)[0].log_softmax(-1)[:, 0] for b in (encoded.batch(np.array([i])) for i in (0, 1))
        ]
    assert pause.loss == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)
    assert pause.loss != pytest.approx(float((losses[0].mean() + losses[1].mean()) / 2), abs=0.1)


def test_prior_bias_is_the_log_share_of_each_tag(tagger, two):
    # Sub-words: O 6, B-person 1, I-person 1, B-place 2, I-place 1, and one more of each.
    before = weights(tagger)
    training = finetune_(tagger, two, epochs=1.0, lr=1e-12)
    assert same(before, weights(tagger))
    next(training)
    assert tagger.tags == ("O", "B-person", "I-person", "B-place", "I-place")
    shares = torch.tensor([7, 2, 2, 3, 2]) / 16
    torch.testing.assert_close(tagger.head.bias.detach(), shares.log(), atol=1e-6, rtol=0)


@pytest.fixture
def rates():
    """The learning rate of every optimiser step, and whether the optimiser was new."""
    seen: list[tuple[float, bool]] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append((optimizer.param_groups[0]["lr"], not optimizer.state))
    )
    yield seen
    handle.remove()


def test_learning_rate_falls_to_zero_over_all_stages(tagger, text, rates):
    list(finetune_(tagger, text, epochs=1.5, every=0.5, batch_size=2, lr=0.9))
    assert [rate for rate, _ in rates] == pytest.approx([0.9 - 0.1 * k for k in range(9)])
    assert [new for _, new in rates] == [True] + [False] * 8


def test_restart_begins_optimiser_and_learning_rate_anew(tagger, text, rates):
    list(finetune_(tagger, text, epochs=1.25, every=0.5, batch_size=2, lr=0.9, restart=True))
    # 6 steps an epoch: stages of 3, 3 and 2 steps
    assert [rate for rate, _ in rates] == pytest.approx([0.9, 0.6, 0.3] * 2 + [0.9, 0.45])
    assert [new for _, new in rates] == [True, False, False] * 2 + [True, False]


# --- the generator's manners


def test_finetune_does_nothing_until_it_is_asked(tagger, text):
    before = weights(tagger)
    training = finetune_(tagger, text, epochs=1.0)
    assert same(before, weights(tagger))
    next(training)
    assert not same(before, weights(tagger))


@pytest.mark.parametrize("mode", [True, False])
def test_finetune_is_in_the_mode_it_came_in_at_every_pause(tagger, text, mode):
    tagger.train(mode)
    during = {}
    training = finetune_(tagger, text, epochs=1.0, every=0.5, batch_size=4)
    with progress.reported(lambda _, step, __: during.setdefault(step, tagger.training)):
        for _ in training:
            assert tagger.training is mode
            assert all(p.grad is None for p in tagger.parameters())
    assert during == {0: mode, 1: True, 2: True, 3: True}


def test_finetune_can_be_left_at_a_pause(tagger, text):
    training = finetune_(tagger, text, epochs=2.0)
    next(training)
    there = weights(tagger)
    del training
    assert same(there, weights(tagger))


@pytest.mark.parametrize("train", [finetune_, retrain_, train_])
@pytest.mark.parametrize("name", ["every", "batch_size", "lr", "clip"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_setting_out_of_range_is_refused_at_the_call(tagger, text, train, name, value):
    setting: dict[str, Any] = {name: value if name == "batch_size" else float(value)}
    with pytest.raises(ValueError, match=rf"^{name} = {setting[name]}: Input should be greater than"):
        train(tagger, text, **setting)


@pytest.mark.parametrize(("name", "value"), [("epochs", -1.0), ("weight_decay", -0.1), ("warmup", -1)])
def test_a_negative_setting_is_refused_at_the_call(tagger, text, name, value):
    with pytest.raises(ValueError, match=rf"^{name} = {value}: Input should be greater than or equal to 0"):
        finetune_(tagger, text, **{name: value})


@pytest.mark.parametrize("train", [retrain_, train_])
def test_only_a_fine_tuning_may_have_no_epochs(tagger, text, train):
    with pytest.raises(ValueError, match=r"^epochs = 0: Input should be greater than 0"):
        train(tagger, text, epochs=0)
    before = weights(tagger)
    assert list(finetune_(tagger, text, epochs=0)) == []
    assert same(before, weights(tagger))


def test_a_setting_that_a_training_does_not_have_is_refused(tagger, text):
    with pytest.raises(ValueError, match=r"Retraining has no field 'prior_bias'; it has epochs, every, steps, lr"):
        retrain_(tagger, text, prior_bias=True)
    with pytest.raises(ValueError, match=r"steps = \[2, 4\] and epochs or every: a training has one of them"):
        finetune_(tagger, text, steps=(2, 4), epochs=1)
    with pytest.raises(ValueError, match=r"steps = \[4, 2\]: numbers of steps that rise"):
        finetune_(tagger, text, steps=(4, 2))


@pytest.mark.parametrize("names", [("O", "place", "person"), ("O", "place"), ("O", "person", "place", "river")])
def test_finetune_refuses_other_labels_at_the_call(tagger, names):
    text = build_corpus([[("Tarn", "place", True)]], name="other", label_names=names)
    with pytest.raises(
        ValueError, match=r"corpus 'other' has labels \('O', 'p.*the tagger was made for \('O', 'person', 'place'\)"
    ):
        finetune_(tagger, text)  # fmt: skip


@pytest.mark.parametrize("mode", [True, False])
def test_finetune_says_when_the_loss_is_no_longer_finite(tagger, text, mode):
    tagger.train(mode)
    with torch.no_grad():
        tagger.head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0 \(batch 0 of epoch 0.*smaller learning rate"):
        list(finetune_(tagger, text, epochs=1.0, batch_size=4))
    assert tagger.training is mode


@pytest.mark.parametrize("restart", [False, True])
def test_resuming_ends_in_the_same_weights_to_the_bit(tagger, text, restart):
    settings = {"epochs": 2.0, "every": 0.5, "batch_size": 2, "lr": 1e-3, "seed": 4, "restart": restart}
    whole, kept = copy.deepcopy(tagger), []
    training = finetune_(whole, text, **settings)
    for pause in training:
        kept.append((pause, {name: value.clone() for name, value in training.state().items()}, whole.copied()))
    pauses = [pause for pause, *_ in kept]
    assert len(pauses) == 4
    for at, (*before, weights) in enumerate(kept[:-1]):
        with torch.no_grad():
            for weight in tagger.parameters():
                weight.normal_()
        tagger.load_weights(weights)
        assert list(finetune_(tagger, text, **settings, resume=tuple(before))) == pauses[at + 1 :]
        for name, value in tagger.weights().items():
            assert torch.equal(value, whole.weights()[name]), (at, name)


def test_resuming_refuses_what_is_of_another_training(tagger, text, bert, encoded):
    training = finetune_(tagger, text, epochs=1.0, every=0.5, batch_size=2)
    assert training.state() == {}
    pause, state = next(training), training.state()
    with pytest.raises(ValueError, match=r"pauses at steps 6, 12.*so it cannot go on from step 3"):
        finetune_(tagger, text, epochs=2.0, every=1.0, batch_size=2, resume=(pause, state))
    with pytest.raises(ValueError, match="of another model: its moments have other shapes"):
        finetune_(bert, encoded, epochs=1.0, every=0.5, batch_size=2, resume=(pause, state))


# --- embeddings of which few rows are read


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A text that reads less than half of the toy's words, and embeddings that count as large."""
    monkeypatch.setattr(training, "LARGE", 1)
    text = toy_module.corpus(sentences=3)
    read = toy_module.tagger().encode(text).vocabulary
    whole: Any = toy_module.tagger().bridge.original_model
    assert 2 * len(read) < len(whole.tok_embed.weight)
    return text


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_training_the_rows_that_are_read_is_training_all(few_rows, monkeypatch, decay):
    how = {"epochs": 4.0, "batch_size": 1, "weight_decay": decay, "clip": 0.5}
    pauses, few = run(few_rows, **how)
    monkeypatch.setattr(training, "LARGE", 10**9)
    whole_pauses, whole = run(few_rows, **how)
    assert [pause.loss for pause in pauses] == pytest.approx([pause.loss for pause in whole_pauses])
    for name, value in few.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6)
    name = next(name for name in few if name.endswith("tok_embed.weight"))
    before, rest = weights(toy_module.tagger())[name], np.ones(len(few[name]), bool)
    rest[toy_module.tagger().encode(few_rows).vocabulary] = False
    assert torch.equal(few[name][rest], before[rest]) == (decay == 0)


def test_rows_that_are_read_are_resumed_to_the_bit_and_follow_what_is_done_at_a_pause(few_rows):
    how: dict[str, Any] = {"epochs": 2.0, "batch_size": 1, "lr": 1e-3}
    _, whole = run(few_rows, **how)
    tagger = toy_module.tagger()
    first = finetune_(tagger, few_rows, **how)
    at = next(first)
    kept, state = weights(tagger), {name: value.clone() for name, value in first.state().items()}
    first.close()
    other = toy_module.tagger()
    other.load_weights(kept)
    list(finetune_(other, few_rows, **how, resume=(at, state)))
    assert same(weights(other), whole)

    largest: list[float] = []

    def erase(tagger: Tagger) -> None:
        whole: Any = tagger.bridge.original_model
        weight = whole.tok_embed.weight.detach()
        largest.append(float(weight.abs().max()))
        weight.zero_()

    run(few_rows, erase, **how)
    assert largest[0] > 0.1 > 4 * how["lr"] > largest[1]  # three steps from zero, and not back to where it was
    modules = [module for module in tagger.trunk.modules() if isinstance(module, torch.nn.Embedding)]
    assert not any(module.sparse for module in modules)
