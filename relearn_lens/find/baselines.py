"""Baselines: the embedding that stands in place of each word where a path begins."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relearn_lens.methods import Baseline
from relearn_lens.models.model import Model, reading
from relearn_lens.neurons.sites import token_vectors


def baseline_of(model: Model, baseline: Baseline) -> tuple[str, Float[Tensor, " d_model"]]:
    """The name and the vector, float32, of a baseline.

    Raises:
        ValueError: the model's tokenizer has no such token, or its embedding is all zeros.
    """
    tokenizer, bridge = model.tokenizer, model.bridge
    rows = int(bridge.cfg.d_vocab)
    tokens: dict[str, int] = {}
    for name, kind in (("mask", "mask"), ("pad", "pad"), ("end", "sep"), ("end", "eos")):
        text, token = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
        # A bridge gives every tokenizer an end token, which for one that does not know it is the unknown token.
        if token is not None and token < rows and tokenizer.convert_ids_to_tokens(token) == text:
            tokens.setdefault(name, token)

    def vectors(ids: Any) -> Tensor:
        return token_vectors(bridge, torch.as_tensor(ids, device=model.device)).float()

    with reading(model):
        if baseline == "mean":
            return baseline, torch.stack([vectors(ids).sum(0) for ids in torch.arange(rows).split(8192)]).sum(0) / rows
        if baseline == "zero":
            return baseline, torch.zeros_like(vectors([0])[0])
        for name in tokens if baseline == "auto" else {baseline} & set(tokens):
            vector = vectors([tokens[name]])[0]
            if vector.any():
                return name, vector
            if baseline != "auto":
                raise ValueError(
                    f"the embedding of the {baseline} token is all zeros, which no text is near to; use another "
                    "baseline, or ask for baseline='zero' by name"
                )
    raise ValueError(
        f"baseline {baseline!r} was asked for, but the tokenizer of {tokenizer.name_or_path!r} has no such token with "
        f"an embedding; it has {', '.join(tokens) or 'none of mask, pad, end'}: use one of these, or baseline='mean'"
    )
