"""Adapters for model families that TransformerLens lacks: DistilBERT.

They are declared under the entry point `transformer_lens.architectures`. TransformerLens 4.3 reads those entry points
only after it has looked the architecture up in its own list, so on its own it refuses the model before it finds the
adapter.
`load_bridge` and `load_tagger` call `register()`; to boot such a model by TransformerLens itself, call it once.
"""

from __future__ import annotations


def register() -> None:
    """Let `TransformerBridge.boot_transformers` find every adapter that an installed package or this one declares.

    Adapters that TransformerLens has itself are left as they are. A second call changes nothing.
    """
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    from relearn_lens.models.families.distilbert import DistilBertArchitectureAdapter

    # First what is installed: a name that is already there is warned of as an attempt to override it.
    ArchitectureAdapterFactory.discover_entry_points()
    known = ArchitectureAdapterFactory._adapters
    known.setdefault("DistilBertForMaskedLM", DistilBertArchitectureAdapter)  # run without being installed
    for name, adapter in known.items():
        SUPPORTED_ARCHITECTURES.setdefault(name, adapter)
