"""What a model's folder may hold besides a plain float model: each is named, with what to do, before it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from relearn_lens.models import families
from relearn_lens.models.loading import load_bridge, load_tagger
from tests.fixtures import LABELS, VOCAB


@pytest.fixture
def folder(tmp_path, bert_folder) -> Path:
    """A whole model, to be changed."""
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


def refused(folder: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_tagger(folder, LABELS, device="cpu")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter(folder, with_config):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/base"}))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if not with_config:
        (folder / "config.json").unlink()
    refused(
        folder, r"holds an adapter \(LORA, for 'me/base'\), not a model; load that model with peft .*merge_and_unload"
    )


def test_an_adapter_beside_a_model(folder):
    (folder / "adapter_config.json").write_text("{broken")
    refused(folder, r"an adapter \(of peft, for 'some model'\), not a model alone; if its weights are merged already")


@pytest.mark.parametrize(
    ("key", "how", "said"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, r"quantised weights \(gptq, 4 bits\)"),
        ("quantization_config", {"load_in_8bit": True}, r"quantised weights \(its quantization_config, 8 bits\)"),
        ("quantization", {"group_size": 64, "bits": 4}, r"quantised weights .*4 bits.*model.dequantize"),
    ],
)
def test_quantised_by_its_configuration(folder, key, how, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: how}))
    refused(folder, said)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_by_its_weights(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, rf"holds quantised weights \({name} is (I8|F8_E4M3)\), which can be neither cut nor trained")


def test_positions_of_an_old_checkpoint_are_no_quantised_weights(folder):
    weights = load_file(folder / "model.safetensors")
    more = {"bert.embeddings.position_ids": torch.arange(8)[None]}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    load_bridge(folder, device="cpu")


def test_a_pointer_to_weights(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, r"model.safetensors' is a Git LFS pointer to the weights, not the weights; run git lfs pull")


@pytest.mark.parametrize(
    ("file", "kind"), [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("model.onnx", "ONNX")]
)
def test_a_model_of_another_library(folder, file, kind):
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, rf"no \*.safetensors file, but a {kind} model \({file}\); save the PyTorch model")


def test_a_folder_of_checkpoints(tmp_path, bert_folder):
    for step in (500, 1000):
        shutil.copytree(bert_folder, tmp_path / f"checkpoint-{step}")
    refused(tmp_path, r"no config.json; pass one of the folders in it that do: checkpoint-1000, checkpoint-500")


def test_a_file_in_the_place_of_a_folder(folder):
    refused(folder / "model.safetensors", "model.safetensors' is a file; pass the folder that holds it")


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_weights_of_a_wrapped_model_do_not_become_random(folder, prefix):
    weights = {f"{prefix}{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lacks \d+ of the weights of a BertForMaskedLM \(bert\..*\), and they would be random")


def test_a_tokenizer_of_another_model(folder):
    words = VOCAB | {f"word{i}": len(VOCAB) + i for i in range(10)}
    transformers.BertTokenizer(vocab=words).save_pretrained(folder)
    refused(folder, rf"gives ids up to {len(words) - 1}, and the model has vectors for {len(VOCAB)} tokens")


@pytest.mark.parametrize("damage", [{"hidden_size": -1}, {"num_attention_heads": 5}, {"id2label": 3}, {"dtype": "x"}])
def test_a_configuration_of_wrong_values(folder, damage):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | damage))
    refused(folder, "cannot load model|cannot load the model|config")


DebertaV2Config: Any = transformers.DebertaV2Config  # takes more than it declares


def unsupported(config: Any, folder: Path) -> None:
    config.save_pretrained(folder)
    transformers.BertTokenizer(vocab=VOCAB).save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


def test_a_family_without_an_adapter(tmp_path):
    unsupported(transformers.AlbertConfig(), tmp_path)
    refused(
        tmp_path, r"is a 'albert' model \(AlbertForMaskedLM\), which TransformerLens cannot hook; .*types bert, dist"
    )


def test_a_loaded_model_of_a_family_without_an_adapter():
    small = transformers.AlbertConfig(
        vocab_size=9, embedding_size=4, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    with torch.random.fork_rng(devices=[]):
        plain = transformers.AlbertForMaskedLM(small)
    with pytest.raises(ValueError, match=r"is a 'albert' model .*; use one of the types bert"):
        load_tagger(plain, LABELS, tokenizer=transformers.BertTokenizer(vocab=VOCAB))


def test_a_deberta_with_a_convolution(tmp_path):
    unsupported(DebertaV2Config(conv_kernel_size=3), tmp_path)
    refused(tmp_path, "is a 'deberta-v2' model with a convolution beside its first block")


def test_registering_twice_changes_nothing():
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    families.register()
    before = dict(SUPPORTED_ARCHITECTURES)
    families.register()
    assert before == SUPPORTED_ARCHITECTURES
    assert set(families.ADAPTERS) <= set(before)
