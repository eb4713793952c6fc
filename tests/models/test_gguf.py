"""A small GGUF file, written here with gguf, becomes a folder that Hugging Face loads with the same weights."""

import errno
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relearn_lens.models.gguf import RECORD, dequantised
from relearn_lens.models.loading import load_language_model

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġa", "cd"]
D, HEADS, MLP, LAYERS = 32, 4, 64, 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    """A Llama of two layers; its matrices in Q8_0, 32 numbers to a scale."""
    path = tmp_path / "given" / "small.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    kv = D // HEADS * 2
    shapes = {"token_embd": (len(TOKENS), D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,), f"blk.{i}.attn_q": (D, D),
            f"blk.{i}.attn_k": (kv, D), f"blk.{i}.attn_v": (kv, D), f"blk.{i}.attn_output": (D, D),
            f"blk.{i}.ffn_gate": (MLP, D), f"blk.{i}.ffn_up": (MLP, D), f"blk.{i}.ffn_down": (D, MLP),
        }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_a_plain_folder(file, cache):
    folder = dequantised(file)
    assert folder.parent == cache / "dequantised"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["blk.1.ffn_up.weight"]
    want = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(plain.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy(), want)
    assert "quantization_config" not in plain.config.to_dict()
    assert AutoTokenizer.from_pretrained(folder)("ab cd")["input_ids"]
    assert not [path for path in (cache / "dequantised").iterdir() if path.name == f".{folder.name}"]


def test_it_is_made_once_and_mended_when_damaged(file):
    folder = dequantised(file)
    before = (folder / RECORD).stat().st_mtime_ns
    assert dequantised(file) == folder
    assert (folder / RECORD).stat().st_mtime_ns == before
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + b"damaged!")
    assert dequantised(file) == folder
    assert weights.read_bytes() == content
    (folder / "tokenizer.json").unlink()
    dequantised(file)
    assert (folder / "tokenizer.json").exists()


def test_a_folder_with_nothing_but_a_gguf_loads(file):
    model = load_language_model(file.parent, device="cpu")
    ids = torch.tensor([[1, 3, 4]])
    plain = AutoModelForCausalLM.from_pretrained(dequantised(file)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), plain(ids).logits)


def test_a_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"broken.gguf' cannot be read as a GGUF model"):
        dequantised(path)


def test_a_file_itself_can_be_given(file):
    assert load_language_model(file, device="cpu").vocabulary >= len(TOKENS)


def test_a_cache_that_cannot_be_written_says_what_moves_it(file, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(OSError, match=r"small.gguf' is written once as plain weights below .*set RELEARN_LENS_CACHE"):
        dequantised(file)


def test_a_disk_that_is_full_leaves_nothing_behind(file, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("relearn_lens.models.gguf._convert", full)
    with pytest.raises(OSError, match=r"cannot be done \(No space left on device\); make room there"):
        dequantised(file)
    assert [path.name for path in (cache / "dequantised").iterdir()] in ([".lock"], [])


def test_without_gguf_it_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="which the package gguf reads: pip install"):
        dequantised(file)
