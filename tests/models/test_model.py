"""Plain Hugging Face models as oracle; what stays as it was."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from relearn_lens.models import toy as toy_module
from relearn_lens.models.loading import load_bridge, load_tagger
from relearn_lens.models.model import Tagger, hidden, n_wrappers, plain_name, reading, tags_of
from relearn_lens.text.encoding import Encoded, encode
from tests.fixtures import CONTEXT, D_MODEL, LABELS, Untouched


@pytest.fixture
def batch(encoded: Encoded):
    """All sentences, padded."""
    (batch,) = encoded.batches()
    assert (batch.mask == 0).any()
    return batch


def forbid(module: nn.Module) -> None:
    """Make a forward pass through a module, or a part of it, an error."""

    def refuse(*_, **__):
        raise AssertionError("the vocabulary head was computed")

    for part in module.modules():
        part.__dict__["forward"] = refuse


def bare(name: str) -> str:
    """A parameter's name without what the bridge adds to it."""
    return name.replace("_original_component.", "")


# --- hidden states


def test_hidden_equals_plain_bert(bert_model, plain, batch, untouched: Untouched):
    expected = plain(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    with untouched(bert_model), torch.no_grad():
        got = hidden(bert_model.bridge, batch.ids, batch.mask)
    assert got.std() > 0.5  # there is something to compare
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_hidden_has_the_gradients_of_plain_bert(bert, plain, batch):
    into = torch.randn(*batch.ids.shape, D_MODEL, generator=torch.Generator().manual_seed(0))
    into *= batch.mask[..., None] / 10
    (hidden(bert.bridge, batch.ids, batch.mask) * into).sum().backward()
    (plain(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state * into).sum().backward()
    got = {bare(name): p.grad for name, p in bert.trunk.named_parameters()}
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert max(float(g.abs().max()) for g in expected.values() if g is not None) > 0.1


def test_hidden_of_the_toy_is_what_its_own_forward_gives_to_the_unembedding(toy):
    batch = next(encode(toy.corpus, toy.tagger.tokenizer).batches(max_tokens=200))
    model = toy.tagger.bridge.original_model
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with reading(toy.tagger):
        toy.tagger.bridge(batch.ids, attention_mask=batch.mask)
        handle.remove()
        got = hidden(toy.tagger.bridge, batch.ids, batch.mask)
    here = batch.mask.bool()
    torch.testing.assert_close(got[here], seen[0][here], atol=1e-5, rtol=0)


def test_hidden_equals_plain_gpt2(tmp_path, bert_folder, batch):
    """A causal model, whose tokenizer comes without a padding token of its own."""
    config = GPT2Config(vocab_size=64, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_folder / name, tmp_path / name)
    bridge = load_bridge(tmp_path, device="cpu")
    model = GPT2Model.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        got = hidden(bridge, batch.ids, batch.mask)
    here = batch.mask.bool()
    torch.testing.assert_close(got[here], expected[here], atol=1e-5, rtol=0)


def test_tagger_never_computes_the_vocabulary_head_of_bert(bert, batch):
    forbid(bert.bridge.original_model.cls)
    with pytest.raises(AssertionError, match="the vocabulary head was computed"):
        bert.bridge.original_model(batch.ids)
    bert(batch.ids, batch.mask).sum().backward()


def test_tagger_never_computes_the_vocabulary_head_of_the_toy(toy):
    forbid(toy.tagger.bridge.original_model.head)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="the vocabulary head was computed"):
        toy.tagger.bridge(ids)
    toy.tagger(ids, ids).sum().backward()


def test_names_are_hugging_faces_without_the_wrappers():
    wrapped = "encoder._original_component.layer.0.attn._original_component.q.weight"
    assert (plain_name(wrapped), n_wrappers(wrapped)) == ("encoder.layer.0.attn.q.weight", 2)
    assert (plain_name("0.attn._original_component"), n_wrappers("head.weight")) == ("0.attn", 0)


# --- the tagger


def test_tagger_gives_logits_of_the_last_hidden_state(bert_model, plain, batch):
    state = plain(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    expected = state @ bert_model.head.weight.T + bert_model.head.bias
    torch.testing.assert_close(bert_model(batch.ids, batch.mask), expected, atol=1e-5, rtol=0)


def test_tagger_knows_its_tags_context_and_device(bert_model):
    assert bert_model.tags == tags_of(LABELS) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert bert_model.head.weight.shape == (5, D_MODEL)
    assert (bert_model.context, bert_model.device) == (CONTEXT, torch.device("cpu"))
    assert bert_model.tokenizer is bert_model.bridge.tokenizer


def test_tagger_trains_each_weight_once_and_no_vocabulary_head(bert_model, plain):
    names = [bare(name) for name, _ in bert_model.named_parameters()]
    assert sorted(names) == sorted([f"trunk.{n}" for n, _ in plain.named_parameters()] + ["head.weight", "head.bias"])


def test_tagger_sets_the_mode_of_the_bridge_too(bert):
    for mode in (True, False):
        bert.train(mode)
        assert {m.training for part in (bert, bert.bridge) for m in part.modules()} == {mode}


@pytest.mark.parametrize("labels", [(), ("O",), ("LOC", "PER"), ("LOC", "O"), ("O", "LOC", "LOC")])
def test_tagger_refuses_labels_without_outside_first_or_twice(bert_model, labels):
    with pytest.raises(ValueError, match="labels must be 'O' and at least one more, each once; got"):
        Tagger(bert_model.bridge, labels)


def test_head_depends_on_the_seed_alone(bert_folder, untouched: Untouched):
    with untouched():
        heads = [load_tagger(bert_folder, LABELS, seed=seed).head.weight for seed in (0, 0, 1)]
    torch.manual_seed(123)
    assert torch.equal(load_tagger(bert_folder, LABELS, seed=0).head.weight, heads[0])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std() < 0.03


def test_weights_have_the_names_of_the_plain_model(bert_model, plain):
    got, expected = bert_model.weights(), plain.state_dict()
    assert sorted(got) == sorted([f"trunk.{name}" for name in expected] + ["head.weight", "head.bias"])
    for name, value in expected.items():
        assert torch.equal(got[f"trunk.{name}"], value), name


def test_weights_are_no_copies(bert):
    bert.weights()["head.weight"].fill_(3)
    assert (bert.head.weight == 3).all()


def test_load_weights_puts_everything_back_in_place(bert, batch):
    kept = {name: value.clone() for name, value in bert.weights().items()}
    before = bert(batch.ids, batch.mask).detach()
    parameters = list(bert.parameters())
    with torch.no_grad():
        for weight in parameters:
            weight.add_(1)
    assert not torch.allclose(bert(batch.ids, batch.mask), before)
    bert.load_weights(kept)
    assert torch.equal(bert(batch.ids, batch.mask), before)
    assert all(a is b for a, b in zip(bert.parameters(), parameters, strict=True))


def test_load_weights_refuses_other_names(bert, toy):
    with pytest.raises(ValueError, match=r"these weights are of another model: \d+ names differ, such as \['trunk\."):
        bert.load_weights(toy.tagger.weights())
    kept = dict(bert.weights())
    del kept["head.bias"]
    with pytest.raises(ValueError, match=r"1 names differ, such as \['head.bias'\]"):
        bert.load_weights(kept)


def test_load_weights_refuses_other_shapes_and_changes_nothing(bert, untouched: Untouched):
    other = {name: value + 1 for name, value in bert.weights().items()}
    other["head.bias"] = torch.zeros(7)
    with (
        untouched(bert),
        pytest.raises(ValueError, match=r"head.bias has shape \(7,\), the model has \(5,\)"),
    ):
        bert.load_weights(other)


# --- reading


def test_reading_is_in_eval_mode_without_gradients(bert, untouched: Untouched):
    bert.train()
    with untouched(bert), reading(bert):
        assert not any(m.training for part in (bert, bert.bridge) for m in part.modules())
        assert not torch.is_grad_enabled()


def test_reading_restores_each_modules_own_mode(bert, untouched: Untouched):
    bert.train()
    layer = bert.trunk.encoder.layer[1]
    layer.eval()
    bert.bridge.unembed.eval()
    with untouched(bert):
        with reading(bert):
            pass
        assert bert.training
        assert not layer.training


def test_reading_restores_when_its_body_raises(bert, untouched: Untouched):
    bert.train()
    bert.trunk.embeddings.eval()

    def body() -> None:
        with reading(bert):
            raise KeyError("mine")

    with untouched(bert), pytest.raises(KeyError, match="mine"):
        body()


def test_reading_nests(bert, untouched: Untouched):
    bert.train()
    with untouched(bert), reading(bert), reading(bert):
        assert not bert.bridge.training


def test_reading_a_bridge_restores_every_modules_mode(bert, untouched: Untouched):
    bert.train()
    with untouched(bert), reading(bert.bridge):
        assert not bert.trunk.embeddings.dropout.training


def test_reading_leaves_accumulated_gradients(bert, batch, untouched: Untouched):
    bert(batch.ids, batch.mask).sum().backward()
    kept = bert.head.weight.grad.clone()
    with untouched(bert), reading(bert):
        bert(batch.ids, batch.mask)
    assert torch.equal(bert.head.weight.grad, kept)


def test_toy_is_loaded_without_moving_the_global_generators(untouched: Untouched):
    with untouched():
        toy_module.load(sentences=5)


# --- attention while a model is read


def test_reading_uses_fused_attention_and_puts_the_own_back(bert_model, batch, untouched: Untouched):
    config = bert_model.bridge.original_model.config
    with torch.no_grad():
        plainly = hidden(bert_model.bridge, batch.ids, batch.mask)
    with untouched(bert_model), reading(bert_model):
        assert config._attn_implementation == "sdpa"
        fused = hidden(bert_model.bridge, batch.ids, batch.mask)
        with reading(bert_model):
            assert config._attn_implementation == "sdpa"
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "eager"
    real = batch.mask.bool()
    assert not torch.equal(fused[real], plainly[real])  # another kernel, or nothing was switched
    assert torch.allclose(fused[real], plainly[real], atol=1e-5)


def test_fused_attention_ends_when_the_body_raises(bert_model, untouched: Untouched):
    config = bert_model.bridge.original_model.config

    def body() -> None:
        with reading(bert_model):
            raise KeyError("mine")

    with untouched(bert_model), pytest.raises(KeyError, match="mine"):
        body()
    assert config._attn_implementation == "eager"


def test_reading_leaves_attention_alone_where_its_patterns_are_hooked(bert_model, batch):
    seen = []
    looks = ("blocks.0.attn.hook_pattern", lambda x, hook: seen.append(x.shape))
    with bert_model.bridge.hooks(fwd_hooks=[looks]), reading(bert_model):
        hidden(bert_model.bridge, batch.ids, batch.mask)
    assert len(seen) == 1
    assert seen[0][-1] == batch.ids.shape[1]


def test_reading_of_a_model_without_fused_attention(toy):
    with reading(toy.tagger):
        hidden(toy.tagger.bridge, *torch.ones(2, 1, 3, dtype=torch.int64))
