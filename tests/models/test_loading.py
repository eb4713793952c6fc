"""Every way in which loading a model can fail, and what comes of one that does not."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

from relearn_lens.models.loading import load_bridge, load_language_model, load_tagger
from relearn_lens.models.model import trunk
from relearn_lens.text.encoding import Encoded
from tests.fixtures import LABELS, Untouched


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


def test_norms_give_the_same_to_the_bit_where_they_are_looked_at(bert_folder, batch):
    tagger = load_tagger(bert_folder, ("O", "place"))
    with torch.no_grad():
        want, point = tagger(batch.ids, batch.mask), tagger.bridge.blocks[0].ln1.hook_normalized
        seen: list[torch.Tensor] = []
        point.add_hook(lambda value, hook: seen.append(value))
        assert torch.equal(tagger(batch.ids, batch.mask), want)
        assert len(seen) == 1
        point.add_hook(lambda value, hook: value * 2)  # what a hook changes goes on
        with pytest.warns(UserWarning, match="hook"):
            assert not torch.equal(tagger(batch.ids, batch.mask), want)
        point.remove_hooks()
        assert torch.equal(tagger(batch.ids, batch.mask), want)


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


def test_the_hub_is_asked_once_for_what_it_does_not_give(monkeypatch):
    """Its own client would try again for half a minute."""
    asked = []

    def ask(url: str, timeout: float) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    with pytest.raises(OSError, match=r"cannot load model 'grp2'.*hub did not give it \(Name or service not known\)"):
        load_tagger("grp2", LABELS)
    assert len(asked) == 1


def test_load_says_where_to_put_a_cache_of_the_hub_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)

    def fail(*_, **__):
        raise OSError("not from the hub") from OSError(errno.EROFS, "of the system", "/home/.cache/huggingface")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(OSError, match=r"'a/b' from the hub: its cache cannot be written .*of the system.*set HF_HOME"):
        load_tagger("a/b", LABELS)


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


def test_special_tokens_are_those_of_the_tokenizer_that_came(tmp_path, corpus):
    """TransformerLens would load a tokenizer that has a first token anew, so that it puts it before every text."""
    backend = Tokenizer(models.WordLevel({"<end>": 0, "<begin>": 1, "Rome": 2}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "<end>", "bos_token": "<begin>", "unk_token": "<end>"}
    config = GPT2Config(vocab_size=3, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=0)
    words = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    for tagger in (
        load_tagger(tmp_path, LABELS, device="cpu"),
        load_tagger(model, LABELS, tokenizer=words, device="cpu"),
    ):
        encoded = tagger.encode(corpus)
        assert (encoded.prefix, encoded.suffix) == ((), ())
        assert not tagger.bridge.cfg.tokenizer_prepends_bos
    assert load_language_model(tmp_path, device="cpu").encode(corpus).prefix == (1,)
    # one that puts a token first does so here too
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    tagger = load_tagger(tmp_path, LABELS, device="cpu")
    assert tagger.encode(corpus).prefix == (1,)
    assert tagger.bridge.cfg.tokenizer_prepends_bos
