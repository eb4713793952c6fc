"""Plain Hugging Face models as oracle; every way in which loading can fail; what stays as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PretrainedConfig,
    T5Config,
    ViTConfig,
)

from relearn_lens import toy as toy_module
from relearn_lens.encoding import Encoded, encode
from relearn_lens.models import Tagger, hidden, load_bridge, load_tagger, reading, tags_of, trunk
from tests.conftest import CONTEXT, D_MODEL, LABELS, Untouched


@pytest.fixture
def batch(encoded: Encoded):
    """All sentences, padded."""
    (batch,) = encoded.batches()
    assert (batch.mask == 0).any()
    return batch


@pytest.fixture
def folder(tmp_path: Path, bert_folder: Path):
    """Make a model folder with a given config and given weight files, and the tokenizer unless told otherwise."""

    def make(config: PretrainedConfig | str | None, *weights: str, words: bool = True) -> Path:
        where = tmp_path / "model"
        where.mkdir()
        if isinstance(config, PretrainedConfig):
            config.save_pretrained(where)
        elif config is not None:
            (where / "config.json").write_text(config)
        for name in ("tokenizer.json", "tokenizer_config.json") if words else ():
            shutil.copy(bert_folder / name, where / name)
        for name in weights:
            (where / name).write_bytes(b"")
        return where

    return make


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


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


# --- loading


def test_load_bridge_reads_the_same_weights_each_time(bert_folder, untouched: Untouched):
    with untouched():
        one, two = load_bridge(bert_folder), load_bridge(str(bert_folder))
    first, second = one.original_model.state_dict(), two.original_model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_load_bridge_is_in_eval_mode(bert_folder):
    bridge = load_bridge(bert_folder)
    assert not any(m.training for m in bridge.modules())


def test_load_bridge_draws_what_the_checkpoint_lacks_from_its_seed(tmp_path, bert_folder, untouched: Untouched):
    BertModel.from_pretrained(bert_folder).save_pretrained(tmp_path)  # a folder without a language-model head
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_folder / name, tmp_path / name)

    def drawn(bridge: Any) -> Tensor:
        return next(bridge.original_model.cls.predictions.transform.dense.parameters())

    with untouched():
        heads = [drawn(load_bridge(tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_load_tagger_takes_a_bridge_as_it_is(bert_model):
    tagger = load_tagger(bert_model.bridge, ("O", "x"))
    assert tagger.bridge is bert_model.bridge
    assert tagger.trunk is trunk(bert_model.bridge)


def test_load_tagger_is_in_one_mode_throughout(bert_folder):
    tagger = load_tagger(bert_folder, LABELS)
    assert {m.training for part in (tagger, tagger.bridge) for m in part.modules()} == {False}


def test_load_tagger_takes_a_dtype(bert_folder, batch):
    tagger = load_tagger(bert_folder, LABELS, dtype=torch.bfloat16)
    assert {p.dtype for p in tagger.parameters()} == {torch.bfloat16}
    assert tagger(batch.ids, batch.mask).dtype == torch.bfloat16


def test_load_refuses_a_folder_without_config(folder):
    with pytest.raises(ValueError, match=r"model' holds no Hugging Face model: there is no config.json"):
        load_bridge(folder(None, "model.safetensors"))


def test_load_refuses_a_folder_with_only_pickled_weights(folder):
    with pytest.raises(
        ValueError, match=r"holds only pickled weights \(pytorch_model.bin\), .*\.save_pretrained\(folder\)"
    ):
        load_bridge(folder("{}", "pytorch_model.bin"))


def test_load_refuses_a_folder_without_weights(folder):
    with pytest.raises(ValueError, match=r"model' holds no \*.safetensors file"):
        load_bridge(folder("{}"))


def test_load_refuses_a_folder_without_tokenizer(folder, bert_folder):
    where = folder((bert_folder / "config.json").read_text(), words=False)
    shutil.copy(bert_folder / "model.safetensors", where)
    with pytest.raises(ValueError, match="tokenizer"):
        load_bridge(where)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "~nobody/nowhere", "a/b/c"])
def test_load_refuses_a_path_that_does_not_exist(path):
    with pytest.raises(ValueError, match=f"no model folder at '{path}'"):
        load_bridge(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_load_says_what_to_do_about_a_name_that_nothing_gives(name):
    with pytest.raises(OSError, match=rf"cannot load model '{name}': it is no source \(minilm, .* pass the folder"):
        load_tagger(name, LABELS)


@pytest.mark.parametrize(("config", "kind"), [(ViTConfig(), "vit"), (T5Config(), "t5")])
@pytest.mark.parametrize("words", [True, False])
def test_load_refuses_models_that_are_no_masked_or_causal_language_models(folder, config, kind, words):
    where = folder(config, "model.safetensors", words=words)
    with pytest.raises(ValueError, match=f"is a '{kind}' model; only masked and causal language models work"):
        load_bridge(where)


def test_load_says_that_a_config_is_broken_without_sending_to_the_hub(folder):
    with pytest.raises((OSError, ValueError)) as caught:
        load_bridge(folder("{broken", "model.safetensors"))
    assert "config" in str(caught.value)
    assert "no local folder" not in str(caught.value)


def test_load_says_that_weights_are_broken(folder, bert_folder):
    where = folder((bert_folder / "config.json").read_text(), "model.safetensors")
    with pytest.raises((OSError, ValueError), match=r"the \*\.safetensors weights in .*model' are damaged"):
        load_bridge(where)


def test_load_reads_a_model_type_that_transformers_lacks_as_an_error(folder):
    with pytest.raises(ValueError, match="model type `fortune-teller`"):
        load_bridge(folder(json.dumps({"model_type": "fortune-teller"}), "model.safetensors"))


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
