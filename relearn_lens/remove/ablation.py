"""Take neurons away, in three ways that answer three questions.

`ablated` for a while, by hooks: what does the model owe to them? `prune_` in the weights, free to grow back: does the
concept return? `held` at their value through training: can it return *elsewhere*?
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models.model import Model, bridge_of
from relearn_lens.names import explained
from relearn_lens.neurons.sites import Members, Neurons, Sever, Site, streaming
from relearn_lens.neurons.weights import Where, entries, same_site, set_of


@contextlib.contextmanager
def ablated(
    model: Model | TransformerBridge,
    neurons: Neurons | Members,
    *,
    value: float | Float[Tensor, "layer neuron"] = 0.0,
    site: str | Site = "resid",
) -> Iterator[None]:
    """For a while, hold the neurons' activations at a value, on every token.

    `value` is in activation units: 0, or one value for each neuron (its mean over a corpus, say). A head is a vector,
    and each of its units is held at the value. The weights are not touched, and the hooks are gone when the block ends.
    Neurons are a set, or `(layer, index)` or names (`L1N7`) of a `site`.

    Raises:
        ValueError: a tensor of values of another shape; weights in the place of neurons.
    """
    chosen = set_of(model, neurons, site)
    if not isinstance(chosen, Neurons):
        raise ValueError("ablated() holds activations, so it takes neurons; a WeightMask is for prune_ and held")
    same_site(model, chosen)
    values = torch.as_tensor(value, dtype=torch.float32)
    if values.ndim and values.shape != chosen.mask.shape:
        raise ValueError(f"value must be a number or of shape {tuple(chosen.mask.shape)}, got {tuple(values.shape)}")
    device = next(bridge_of(model).original_model.parameters()).device
    size = chosen.site.size
    masks = chosen.mask.to(device).repeat_interleave(size, 1)
    values = values.expand(chosen.mask.shape).to(device).repeat_interleave(size, 1)

    def replace(layer: int, activations: Tensor) -> Tensor:
        return torch.where(masks[layer], values[layer].to(activations.dtype), activations)

    with streaming(bridge_of(model), chosen.site, replace, units=True):
        yield


@explained
def prune_(
    model: Model | TransformerBridge, neurons: Where, *, sever: Sever = "out", site: str | Site = "resid"
) -> None:
    """Set the weights of the neurons to what has no effect, once. Training is free to grow them back.

    A `WeightMask` says itself which weights; `sever` says it for neurons: a set, or `(layer, index)` or names (`L1N7`)
    of a `site`.

    `sever="out"`: the weights that carry a neuron on. The model then computes what it computes with the neurons ablated
    to 0. `mlp_post`: the neuron's row of the MLP's output matrix; `attn_head`: the head's rows of the attention's
    output matrix; `resid` of a model that normalises after adding (BERT): gain and bias of the LayerNorm that writes
    the coordinate. A model that normalises before (GPT-2, Llama) has no such weights for `resid`.

    `sever="both"`: its input weights too (of a head: queries, keys and values, where it has its own). Then it is dead:
    no gradient reaches it. `resid` has no input weights: as `"out"`.

    `sever="gain"`: what the released code of Lo et al. does, `resid` only. After-norm: the gain of the output
    LayerNorm, while its bias stays, so the coordinate is not 0 but a constant. Pre-norm: the gain of the LayerNorm
    before that block's MLP (`ln_2`), which hides the coordinate from that one MLP: attention and all other blocks still
    read it, so this is *not* what ablating the neurons computes. There is none for the embedding's output.

    `sever="writes"`: `resid` of a pre-norm model. The block itself no longer writes the coordinate (rows of the output
    matrices of attention and MLP); what earlier blocks wrote stays. Of the embedding's output: the coordinate of the
    token and position embeddings, which a tied vocabulary head reads too.

    Source: Lo et al. 2024, section 3; "both" and "writes" are ours.

    Raises:
        ValueError: the model family has no such weights for one of the neurons, or they have a low-rank adapter now, or
            `sever` is not known.
    """
    with torch.no_grad():
        for weight, mask, nothing in entries(model, set_of(model, neurons, site), sever):
            weight.masked_fill_(mask, nothing)


@contextlib.contextmanager
def held(
    model: Model | TransformerBridge, neurons: Where, *, sever: Sever = "out", site: str | Site = "resid"
) -> Iterator[None]:
    """For a while, keep the neurons' weights at exactly the value they have now, whatever trains the model.

    Their gradient is masked, and after every step of any torch optimiser their value is put back (weight decay and
    momentum move a weight without a gradient too). To ask whether a concept can come back elsewhere:
    `prune_(tagger, chosen)`, then retrain inside `with held(tagger, chosen)`. `sever` and `site` are those of `prune_`.
    A `WeightMask` holds any entries: `held(tagger, WeightMask.of_parts(tagger, "block 5"))` blocks a return there.

    Raises:
        ValueError: the model family has no such weights for one of the neurons, or they have a low-rank adapter now, or
            `sever` is not known.
    """
    chosen = set_of(model, neurons, site)
    kept = [(weight, mask, weight.detach().clone()) for weight, mask, _ in entries(model, chosen, sever)]

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for weight, mask, value in kept:
                weight.copy_(torch.where(mask, value, weight))

    handles: list[Any] = [
        weight.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0.0))
        for weight, mask, _ in kept
        if weight.requires_grad
    ]
    handles.append(register_optimizer_step_post_hook(put_back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
