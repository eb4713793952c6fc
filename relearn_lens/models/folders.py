"""What lies in a model's folder, looked at before anything is loaded from it: each thing that cannot be used is named,
with what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = {
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.bpe.model",
}  # fmt: skip

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".tflite": "TensorFlow Lite", ".npz": "MLX"}

_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_folder(folder: Path) -> None:
    """Say what is wrong with a model folder before anything is loaded from it.

    Raises:
        ValueError: it holds an adapter, quantised or pickled weights, those of another library, or no model.
    """
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise ValueError(_adapter(folder))
    if "config.json" not in names:
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        more = f"; pass one of the folders in it that do: {_some(inside)}" if inside else ""
        raise ValueError(f"{str(folder)!r} holds no Hugging Face model: there is no config.json{more}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(folder / 'config.json')!r} is damaged: {error}") from error
    if weights := [name for name in names if name.endswith(".safetensors")]:
        for name in weights:
            _check_weights(folder / name)
        return
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise ValueError(
            f"{str(folder)!r} holds only pickled weights ({pickled[0]}), which can run code when loaded; save it again "
            "with model.save_pretrained(folder), which writes safetensors"
        )
    for name in names:
        if kind := _FOREIGN.get(Path(name).suffix):
            raise ValueError(
                f"{str(folder)!r} holds no *.safetensors file, but a {kind} model ({name}); save the PyTorch model "
                "that it was made from with model.save_pretrained(folder)"
            )
    raise ValueError(f"{str(folder)!r} holds no *.safetensors file")


def _adapter(folder: Path) -> str:
    """What to do with a folder of an adapter."""
    try:
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, base = adapter.get("peft_type"), adapter.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = base = None
    what = f"{str(folder)!r} holds an adapter ({kind or 'of peft'}, for {base or 'some model'!r}), not a model"
    if any(folder.glob("model*.safetensors")):
        return f"{what} alone; if its weights are merged already, remove adapter_config.json, else load and merge it"
    return (
        f"{what}; load that model with peft (PeftModel.from_pretrained(model, folder)), merge the adapter into it "
        "(merge_and_unload()), save it with save_pretrained, and the tokenizer beside it, and pass that folder"
    )


def _check_weights(file: Path) -> None:
    """Say that a file of weights is a pointer to one, or that its numbers are no plain floats. One that is damaged is
    left to whoever reads it whole."""
    with file.open("rb") as open_file:
        start = open_file.read(8)
        if start == b"version ":
            raise ValueError(f"{str(file)!r} is a Git LFS pointer to the weights, not the weights; run git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < file.stat().st_size:
            return
        try:
            tensors = json.loads(open_file.read(length))
            kinds = {name: entry["dtype"] for name, entry in tensors.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
    # Masks and positions that old checkpoints keep are no weights.
    packed = {name: kind for name, kind in kinds.items() if kind not in _FLOATS and name.endswith("weight")}
    if packed:
        name, kind = next(iter(packed.items()))
        raise ValueError(_quantised(str(file), f"{name} is {kind}"))


def check_plain(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration of quantised weights.

    Raises:
        ValueError: it has some.
    """
    quantisation = config.get("quantization_config") or config.get("quantization")
    if quantisation:
        named = quantisation if isinstance(quantisation, Mapping) else {}
        kind = named.get("quant_method") or named.get("format") or "its quantization_config"
        bits = named.get("bits") or next((n for n in (4, 8) if named.get(f"load_in_{n}bit")), None)
        raise ValueError(_quantised(repr(where), f"{kind}{f', {bits} bits' if bits else ''}"))


def _quantised(where: str, how: str) -> str:
    return (
        f"{where} holds quantised weights ({how}), which can be neither cut nor trained as they are; use the model "
        "that it was made from, or save it in float first (model.dequantize(), then save_pretrained)"
    )


def check_tokenizer(where: str) -> None:
    """Say that a folder holds no tokenizer; what a hub holds, only loading tells.

    Raises:
        ValueError: none is there.
    """
    folder = Path(where)
    if folder.is_dir() and not {path.name for path in folder.iterdir()} & _TOKENIZER_FILES:
        raise ValueError(
            f"{where!r} holds no tokenizer (none of {', '.join(sorted(_TOKENIZER_FILES))}); save it there with "
            "tokenizer.save_pretrained(folder)"
        )


def check_whole(model: Any, missing: Iterable[str], tokenizer: Any, where: str) -> None:
    """Refuse a model whose body was not all in the checkpoint, and a tokenizer of more tokens than it has vectors.

    Raises:
        ValueError: either.
    """
    body = f"{model.base_model_prefix}."
    # Poolers come after the last hidden state, which is all that is read here.
    if lacking := sorted(name for name in missing if name.startswith(body) and "pooler" not in name):
        raise ValueError(
            f"{where!r} lacks {len(lacking)} of the weights of a {type(model).__name__} ({_some(lacking)}), and they "
            "would be random; its names are those of another model or of a wrapped one (LoRA, DataParallel, "
            "torch.compile): save the plain model with save_pretrained"
        )
    rows = model.get_input_embeddings().num_embeddings
    highest = max(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder), default=0)
    if highest >= rows:
        raise ValueError(
            f"the tokenizer in {where!r} gives ids up to {highest:,}, and the model has vectors for {rows:,} tokens: "
            "it is of another model; save the right one there with tokenizer.save_pretrained(folder)"
        )


def _some(names: list[str]) -> str:
    """The first of some names, and that there are more."""
    return ", ".join([*names[:4], "..."] if len(names) > 4 else names)
