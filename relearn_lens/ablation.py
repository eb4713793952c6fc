"""Take neurons away, in three ways that answer three questions.

`ablated` for a while, by hooks: what does the model owe to them? `prune_` in the weights, free to grow back: does the
concept return? `held` at their value through training: can it return *elsewhere*?
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models import Tagger
from relearn_lens.neurons import Neurons, Site, Slice, parameter, site_of, streaming

Sever = Literal["out", "both"]


@contextlib.contextmanager
def ablated(
    model: Tagger | TransformerBridge, neurons: Neurons, *, value: float | Float[Tensor, "layer neuron"] = 0.0
) -> Iterator[None]:
    """For a while, hold the neurons' activations at a value, on every token.

    `value` is in activation units: 0, or one value for each neuron (its mean over a corpus, say). The weights are not
    touched, and the hooks are gone when the block ends.

    Raises:
        ValueError: a tensor of values of another shape.
    """
    _same_site(model, neurons)
    values = torch.as_tensor(value, dtype=torch.float32)
    if values.ndim and values.shape != neurons.mask.shape:
        raise ValueError(f"value must be a number or of shape {tuple(neurons.mask.shape)}, got {tuple(values.shape)}")
    device = next(_bridge(model).original_model.parameters()).device
    masks = neurons.mask.to(device)
    values = values.expand(neurons.mask.shape).to(device)

    def replace(layer: int, activations: Tensor) -> Tensor:
        return torch.where(masks[layer], values[layer].to(activations.dtype), activations)

    with streaming(_bridge(model), neurons.site, replace):
        yield


def prune_(model: Tagger | TransformerBridge, neurons: Neurons, *, sever: Sever = "out") -> None:
    """Set the weights of the neurons to zero, once. Training is free to grow them back.

    The model then computes what it computes with the neurons ablated to 0. `mlp_post`: the neuron's row of the MLP's
    output matrix, and with `sever="both"` its input weights and bias too (then it is dead: no gradient reaches it).
    `resid` of a model that normalises after adding (BERT): gain and bias of the LayerNorm that writes the coordinate.
    Source: Lo et al. 2024, section 3; they keep the bias.

    Raises:
        ValueError: the site has no weights in this model family, or `sever` is not known.
    """
    if sever not in ("out", "both"):
        raise ValueError(f"unknown sever {sever!r}; known: out, both")
    with torch.no_grad():
        for weight, mask, axis in _slices(model, neurons, sever):
            weight.masked_fill_(_along(mask, axis, weight), 0.0)


@contextlib.contextmanager
def held(model: Tagger | TransformerBridge, neurons: Neurons, *, sever: Sever = "out") -> Iterator[None]:
    """For a while, keep the neurons' weights at exactly the value they have now, whatever trains the model.

    Their gradient is masked, and after every step of any torch optimiser their value is put back (weight decay and
    momentum move a weight without a gradient too). To ask whether a concept can come back elsewhere:
    `prune_(tagger, chosen)`, then retrain inside `with held(tagger, chosen)`.

    Raises:
        ValueError: the site has no weights in this model family, or `sever` is not known.
    """
    if sever not in ("out", "both"):
        raise ValueError(f"unknown sever {sever!r}; known: out, both")
    kept = [
        (weight, _along(mask, axis, weight), weight.detach().clone())
        for weight, mask, axis in _slices(model, neurons, sever)
    ]

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


def _bridge(model: Tagger | TransformerBridge) -> TransformerBridge:
    return model.bridge if isinstance(model, Tagger) else model


def _same_site(model: Tagger | TransformerBridge, neurons: Neurons) -> Site:
    """The neurons' site, if it is one of this model."""
    mine, theirs = site_of(_bridge(model), neurons.site.name), neurons.site
    if mine != theirs:
        raise ValueError(
            f"these neurons are of another model: their site {theirs.name!r} has {len(theirs.layers)} layers of "
            f"{theirs.width} ({theirs.hooks[0]}, ...), this model's {len(mine.layers)} of {mine.width} "
            f"({mine.hooks[0]}, ...)"
        )
    return theirs


def _along(mask: Tensor, axis: int, weight: Tensor) -> Tensor:
    """A neuron mask in the shape in which it broadcasts over a weight."""
    shape = [1] * weight.ndim
    shape[axis] = len(mask)
    return mask.to(weight.device).view(shape).expand_as(weight)


def check_prunable(model: Tagger | TransformerBridge, site: Site) -> None:
    """Refuse a site that has no weights to prune in this model.

    Raises:
        ValueError: a layer of the site has no such weights.
    """
    for layer, parts in zip(site.layers, site.writes, strict=True):
        if not parts:
            raise ValueError(
                f"site {site.name!r} of a {_bridge(model).cfg.architecture} model has no weights to prune (layer "
                f"{layer!r} is a sum over blocks): use `with ablated(...)`, or site 'mlp_post'"
            )


def _slices(
    model: Tagger | TransformerBridge, neurons: Neurons, sever: Sever
) -> list[tuple[torch.nn.Parameter, Tensor, int]]:
    """The parameters that hold the neurons, with the mask of each and its neuron axis."""
    bridge, site = _bridge(model), _same_site(model, neurons)
    check_prunable(model, site)
    found = []
    for layer, mask in enumerate(neurons.mask):
        if not mask.any():
            continue
        parts: list[Slice] = list(site.writes[layer])
        if sever == "both":
            parts += site.reads[layer]
        for part in parts:
            weight = parameter(bridge, part)
            if weight is not None:
                found.append((weight, mask, part.axis))
    return found
