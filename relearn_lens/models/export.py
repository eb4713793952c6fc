"""What was trained here, as a plain Hugging Face folder that `from_pretrained` loads without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relearn_lens.files import check_free, path_of, whole
from relearn_lens.models.gguf import silent
from relearn_lens.models.heads import classifier_of
from relearn_lens.models.model import Model, Tagger, plain_name, reading, wearing
from relearn_lens.names import explained


@explained
def export(model: Model, folder: str | Path) -> Path:
    """Write a model as a plain Hugging Face folder: configuration, safetensors and tokenizer.

    A tagger becomes an `AutoModelForTokenClassification` with the tags in `id2label`, a language model an
    `AutoModelForCausalLM`. Its logits are compared with this model's before the folder gets its name.

    Raises:
        FileExistsError: the folder is there and holds something.
        ValueError: a native model, a family that Hugging Face has no such class for, or a model that has low-rank
            adapters now.
    """
    if wearing(model.bridge):
        raise ValueError("this model has low-rank adapters now; export it when the block of `adapted` has ended")
    path = path_of(folder, "the path of a new folder")
    check_free(path)
    plain = _plain(model)
    _compare(model, plain)
    with whole(path) as work:
        work.mkdir()
        with silent():
            plain.save_pretrained(work)
        model.tokenizer.save_pretrained(work)
    return path


def _plain(model: Model) -> Any:
    """A fresh Hugging Face model with this one's weights."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForTokenClassification,
    )

    family, inner = model.bridge.cfg.architecture, model.bridge.original_model
    config: Any = getattr(inner, "config", None)
    if not hasattr(config, "to_dict"):
        raise ValueError(
            f"a {family} model has no Hugging Face form; keep its weights with safetensors "
            "(save_file(model.weights(), path)), and put them back with model.load_weights(load_file(path))"
        )
    classes = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING if isinstance(model, Tagger) else MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = AutoModelForTokenClassification if isinstance(model, Tagger) else AutoModelForCausalLM
    if type(config) not in classes:
        raise ValueError(f"Hugging Face has no {auto.__name__} for a {family} model; keep model.weights() instead")
    settings = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "id2label", "label2id")}
    if isinstance(model, Tagger):
        names = dict(enumerate(model.tags))
        settings |= {"id2label": names, "label2id": {tag: i for i, tag in names.items()}, "num_labels": len(names)}
    with torch.random.fork_rng(devices=[]), silent():
        plain = auto.from_config(AutoConfig.for_model(**settings), attn_implementation="eager")
    plain = plain.eval().to(dtype=next(model.trunk.parameters()).dtype)
    with torch.no_grad():
        _fill(plain.base_model, _names(model.trunk))
        if isinstance(model, Tagger):
            classifier = classifier_of(plain, len(model.tags))
            classifier.weight.copy_(model.head.weight)
            if classifier.bias is not None:
                classifier.bias.copy_(model.head.bias)
            elif model.head.bias is not None and bool(model.head.bias.any()):
                raise ValueError(
                    f"the head of Hugging Face's {type(plain).__name__} has no bias, and this tagger's has"
                )
        else:
            _fill(plain.get_output_embeddings(), _names(model.head))
    return plain


def _names(module: nn.Module) -> dict[str, Tensor]:
    """Every name that a bridge has for a tensor, without the wrappers."""
    return {plain_name(name): value for name, value in module.state_dict(keep_vars=True).items()}


def _fill(plain: nn.Module, mine: dict[str, Tensor]) -> None:
    """Copy weights into a Hugging Face module by its own names. Biases that the bridge puts in where Hugging Face has
    none are zero and never looked up."""
    for name, weight in plain.state_dict(keep_vars=True).items():
        if name not in mine:
            raise ValueError(f"this model has no weight for {name} of Hugging Face's {type(plain).__name__}")
        weight.copy_(mine[name])
    for name, weight in plain.state_dict(keep_vars=True).items():
        parts = [mine.get(name.replace(joint, part)) for joint in _JOINT for part in "qkv" if joint in name]
        if parts and all(part is not None for part in parts):
            _join(weight, [part for part in parts if part is not None], plain, name)


_JOINT = ("c_attn", "query_key_value")
"""Names of projections to queries, keys and values together, of which a bridge trains the three parts."""


def _join(weight: Tensor, parts: Sequence[Tensor], plain: nn.Module, name: str) -> None:
    """Put queries, keys and values together as their family keeps them."""
    if "c_attn" in name:  # Conv1D: [in, out]; the bridge's parts are linear, [out, in]
        whole = torch.cat([part.T if part.ndim == 2 else part for part in parts], -1)
    else:  # by head, and in each head queries, keys, values
        config: Any = plain.config
        heads = [part.unflatten(0, (config.num_attention_heads, -1)) for part in parts]
        whole = torch.stack(heads, 1).flatten(0, 2)
    weight.copy_(whole)


def _compare(model: Model, plain: Any) -> None:
    """Refuse to write a model that says something else than this one."""
    n = min(8, model.context)
    ids = torch.arange(n)[None] % int(model.bridge.cfg.d_vocab)
    mask = torch.ones_like(ids)
    with reading(model):
        here = model(ids.to(model.device), mask.to(model.device)).float().cpu()
        there = plain(input_ids=ids, attention_mask=mask).logits.float()
    if not torch.allclose(here, there, rtol=1e-3, atol=1e-4 * max(1.0, float(here.abs().max()))):
        raise ValueError(
            f"the {type(plain).__name__} that would be written gives other logits (they differ by up to "
            f"{float((here - there).abs().max()):.2g}), so nothing was written; keep model.weights() instead, and "
            f"report the family {model.bridge.cfg.architecture}"
        )
