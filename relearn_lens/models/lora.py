"""Retraining by low-rank adapters: what moves when only adapters move?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relearn_lens.models.model import (
    Adapted,
    Model,
    Tagger,
    bridge_of,
    n_wrappers,
    only_training,
    plain_name,
    seeded,
    wearing,
)
from relearn_lens.names import known_name

Where = Literal["attention", "mlp", "all"]
"""Which matrices of a block get adapters."""

_ATTENTION, _JOINT = {"attn", "attention", "self_attn"}, "qkv"
"""Names that bridges give to a block's attention, and to a projection to queries, keys and values together."""


@contextlib.contextmanager
def adapted(
    model: Model, *, rank: int = 8, alpha: float | int = 16, where: Where | str = "all", seed: int = 0
) -> Iterator[None]:
    """For a while, only low-rank adapters beside the matrices of the blocks train, and a tagger's head.

    A matrix W becomes W + (alpha / rank) B A, with A drawn from `seed` and B 0 at first, so the model computes what it
    did; biases, LayerNorms and embeddings stand still. Adapters are on every linear layer of `where`; a family whose
    queries, keys and values are one matrix gets them on the three parts, which the bridge trains. Use it around
    `retrain_` *and its loop*; the optimiser's state is the adapters', so to `resume` such a training later, enter the
    block on the same model again and put `adapter_weights` back. When the block ends, by an error too, the adapters are
    added to the weights and removed.

    Within the block `model.weights()` has its plain names, with the adapters added in (copies); `load_weights`, and
    with it similarity to other weights, wait until its end. What `prune_` took away before is free to grow back, within
    the rank. `held` cannot be kept for a matrix that has an adapter: its frozen entries would be held, their sum with
    the adapter would not. Neurons whose weights have no adapter (LayerNorms, the other `where`) can be held.

    Over half-precision weights the adapters are float32, so that small steps are not lost before the block ends.

    Source: Hu et al. 2021, equation 3, by peft, without dropout.

    Raises:
        ImportError: peft is not installed.
        ValueError: a rank or alpha that is not above 0, an unknown `where`, a model that has adapters already or no
            such linear layers, or a matrix whose gradient is masked (`held`).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("low-rank adapters need peft: pip install 'relearn-lens[lora]'") from error
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank and alpha must be above 0, got rank={rank}, alpha={alpha}")
    if wearing(bridge_of(model)):
        raise ValueError("this model has adapters already; leave their block first")
    layers = _layers(model, where)
    if held := [name for name, layer in layers.items() if layer.weight._backward_hooks]:
        raise ValueError(
            f"{len(held)} matrices that would get adapters have a masked gradient, such as {held[0]}: neurons are held "
            "there, and an adapter would change them all the same; leave `held`, or choose another `where`"
        )
    plain, homes = model.plain(), _homes(model, list(layers.values()))
    wrapped: list[Any] = []
    with only_training(model.head.parameters() if isinstance(model, Tagger) else (), model.parameters()):
        try:
            with seeded(seed):
                for kind in (nn.Linear, Conv1D):
                    group: Any = nn.ModuleList([layer for layer in layers.values() if isinstance(layer, kind)])
                    if len(group):
                        names, scale = [str(i) for i in range(len(group))], cast(Any, alpha)
                        how = LoraConfig(
                            r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=names,
                            fan_in_fan_out=kind is Conv1D,
                        )  # fmt: skip
                        inject_adapter_in_model(how, group)
                        wrapped += group
            for layer in wrapped:
                if layer.weight.dtype in (torch.bfloat16, torch.float16):
                    for part in (layer.lora_A, layer.lora_B):
                        part.float()
            _wear(homes, {id(layer.get_base_layer()): layer for layer in wrapped})
            with Adapted(plain, _changes(plain, wrapped)).on(model.bridge):
                yield
        finally:
            for layer in wrapped:
                layer.merge()
            _wear(homes, {id(layer): layer for layer in layers.values()})


def adapter_weights(model: Model) -> dict[str, Tensor]:
    """What trains within the block of `adapted`, by names that are the same whenever it is entered again; no copies."""
    trains = {id(p): (name, p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    return dict(trains.values())


def load_adapter_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Put what `adapter_weights` gave back, in place.

    Raises:
        ValueError: the names or shapes are of other adapters.
    """
    mine = adapter_weights(model)
    if mine.keys() != weights.keys() or any(mine[k].shape != weights[k].shape for k in mine):
        raise ValueError("these weights are of other adapters: rank, `where` and model must be the same")
    with torch.no_grad():
        for name, value in weights.items():
            mine[name].copy_(value)


def _layers(model: Model, where: Where | str) -> dict[str, Any]:
    """The linear layers of the blocks that get adapters, each once, by a name that the bridge has for it."""
    known_name("where", where, get_args(Where))
    modules: dict[int, tuple[str, nn.Module]] = {}
    joint: set[int] = set()
    for name, module in model.bridge.blocks.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if _JOINT in name.split("."):  # the bridge computes by its three parts
            joint.add(id(module))
        best = modules.get(id(module))
        if best is None or n_wrappers(name) < n_wrappers(best[0]):  # TransformerLens's own name
            modules[id(module)] = name, module
    layers = {
        f"blocks.{plain_name(name)}": module
        for at, (name, module) in modules.items()
        if at not in joint and (where == "all" or (where == "attention") == bool(_ATTENTION & set(name.split("."))))
    }
    if not layers:
        raise ValueError(
            f"the blocks of a {model.bridge.cfg.architecture} model have no plain linear layers for where={where!r}, "
            "so there is nothing to put adapters on; retrain the weights themselves"
        )
    return layers


def _homes(model: Model, layers: list[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """Every place where a layer hangs in the model: a bridge reaches one by several ways."""
    mine = {id(layer) for layer in layers}
    roots: list[nn.Module] = [model, model.bridge, model.bridge.original_model]
    parents = {id(module): module for root in roots for module in root.modules()}
    return [
        (parent, name, id(child))
        for parent in parents.values()
        for name, child in parent._modules.items()
        if id(child) in mine
    ]


def _wear(homes: list[tuple[nn.Module, str, int]], by_layer: dict[int, nn.Module]) -> None:
    """Put into every place what stands for its layer; one that has nothing stays."""
    for parent, name, layer in homes:
        if layer in by_layer:
            parent._modules[name] = by_layer[layer]


def _changes(plain: dict[str, Tensor], wrapped: list[Any]) -> dict[str, Any]:
    """What the adapters add to each plain weight, by its name."""
    names = {id(value): name for name, value in plain.items()}
    return {
        names[id(layer.get_base_layer().weight)]: lambda layer=layer: layer.get_delta_weight("default").detach()
        for layer in wrapped
    }
