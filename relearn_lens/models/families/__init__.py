"""Families of models: those that work here, and adapters for the ones that TransformerLens lacks.

The adapters are declared under the entry point `transformer_lens.architectures`. TransformerLens 4.3 reads those entry
points only after it has looked the architecture up in its own list, so on its own it refuses the model before it finds
the adapter.
`load_bridge` and `load_tagger` call `register()`; to boot such a model by TransformerLens itself, call it once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROBERTA = "transformer_lens.model_bridge.supported_architectures.roberta:RobertaArchitectureAdapter"
_HERE = "relearn_lens.models.families"

ADAPTERS: dict[str, str] = {
    "DistilBertForMaskedLM": f"{_HERE}.distilbert:DistilBertArchitectureAdapter",
    "XLMRobertaForMaskedLM": _ROBERTA,
    "CamembertForMaskedLM": _ROBERTA,
    "ElectraForMaskedLM": f"{_HERE}.encoders:ElectraArchitectureAdapter",
    "DebertaV2ForMaskedLM": f"{_HERE}.encoders:DebertaV2ArchitectureAdapter",
    "ModernBertForMaskedLM": f"{_HERE}.encoders:ModernBertArchitectureAdapter",
}
"""Adapters that TransformerLens does not have, by Hugging Face's class: `module:name`."""

TYPES: tuple[str, ...] = (
    "bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "modernbert",
    "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip
"""The families that every part of this package works for, as config.json names them (`model_type`)."""


def register() -> None:
    """Let `TransformerBridge.boot_transformers` find every adapter that an installed package or this one declares.

    Adapters that TransformerLens has itself are left as they are. A second call changes nothing.
    """
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    # First what is installed: a name that is already there is warned of as an attempt to override it.
    ArchitectureAdapterFactory.discover_entry_points()
    known = ArchitectureAdapterFactory._adapters
    for name, place in ADAPTERS.items():  # run without being installed
        module, _, adapter = place.partition(":")
        known.setdefault(name, getattr(import_module(module), adapter))
    for name, adapter in known.items():
        SUPPORTED_ARCHITECTURES.setdefault(name, adapter)


def set_up(cfg: Any, positions: str) -> None:
    """Say of an encoder with LayerNorms and a plain MLP what TransformerLens asks of every model."""
    cfg.normalization_type, cfg.positional_embedding_type, cfg.attention_dir = "LN", positions, "bidirectional"
    cfg.final_rms = cfg.gated_mlp = cfg.attn_only = False


def check(architecture: str, config: Any, where: str) -> None:
    """Refuse a model that no adapter is known for.

    Raises:
        ValueError: it is of none of the families of TransformerLens or of this package, or a kind of one that is built
            otherwise.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    register()
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{where!r} is a {config.model_type!r} model ({architecture}), which TransformerLens cannot hook; "
            f"use one of the types {', '.join(TYPES)}"
        )
    if getattr(config, "conv_kernel_size", 0) and config.model_type == "deberta-v2":
        raise ValueError(
            f"{where!r} is a {config.model_type!r} model with a convolution beside its first block, so that block's "
            "output is not the hidden state that the next one reads; use one without, such as any DeBERTa v3"
        )
