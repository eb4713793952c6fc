"""Hidden states where answers are predicted: read from one model, and put into another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from relearn_lens.models.model import LanguageModel, hidden, reading
from relearn_lens.neurons.sites import Site, component_site, streaming
from relearn_lens.text.encoding import Batch


def blocks_of(model: LanguageModel) -> Site:
    """Where the states of blocks are: the outputs of all, from the input to the output, without the embedding."""
    return component_site(model.bridge, "resid")


def states_of(
    model: LanguageModel, batch: Batch
) -> tuple[dict[str, Float[Tensor, "subword d_model"]], Float[Tensor, "subword d_model"]]:
    """The output of every block, by name, and the last hidden state (after the final norm), at the positions that
    predict the answers' tokens of a batch."""
    by_block: dict[str, Tensor] = {}
    site = blocks_of(model)

    def keep(layer: int, activations: Tensor) -> None:
        by_block[site.layers[layer]] = activations.flatten(0, 1)[batch.subword - 1]

    with reading(model), streaming(model.bridge, site, keep):
        last = last_of(model, batch)
    return by_block, last


def last_of(model: LanguageModel, batch: Batch) -> Float[Tensor, "subword d_model"]:
    """The last hidden states that predict the answers' tokens of a batch."""
    return hidden(model.bridge, batch.ids, batch.mask).flatten(0, 1)[batch.subword - 1]


def put_in(
    model: LanguageModel, batch: Batch, states: Mapping[str, Float[Tensor, "subword d_model"]]
) -> AbstractContextManager[None]:
    """For a while, the outputs of the named blocks are these at the positions that predict the answers' tokens."""
    site = blocks_of(model)

    def replaced(layer: int, activations: Tensor) -> Tensor | None:
        state = states.get(site.layers[layer])
        if state is None:
            return None
        flat = activations.flatten(0, 1).clone()
        flat[batch.subword - 1] = state.to(flat)
        return flat.view_as(activations)

    return streaming(model.bridge, site, replaced)


def check_alike(model: LanguageModel, other: LanguageModel, name: str) -> None:
    """Refuse a reference whose states do not fit.

    Raises:
        ValueError: other layers, another width, or another vocabulary.
    """
    mine, theirs = ((len(blocks_of(each).layers), blocks_of(each).width, each.vocabulary) for each in (model, other))
    if mine != theirs:
        raise ValueError(
            f"the model {name!r} has {theirs[0]} blocks of width {theirs[1]} and {theirs[2]:,} tokens, this one has "
            f"{mine[0]} of {mine[1]} and {mine[2]:,}; states are put from one into the other, so give models of one "
            "architecture and one tokenizer"
        )


def nats_of(model: LanguageModel, batch: Batch, last: Float[Tensor, "subword d_model"]) -> Float[Tensor, " subword"]:
    """Nats of the answers' tokens by the last hidden states that predict them, float32."""
    logits = model.logits(last).float()
    return torch.nn.functional.cross_entropy(logits, batch.ids.flatten()[batch.subword], reduction="none")
