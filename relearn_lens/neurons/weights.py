"""Sets of weights: the entries that carry some neurons, or that make up a part of a model.

What is cut, held, trained alone or grafted is said by a `WeightMask`, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, jaxtyped
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models.model import Model, bridge_of, wearing
from relearn_lens.names import explained, known_name, meant
from relearn_lens.neurons.sites import Members, Neurons, Sever, Site, parameter, site_of
from relearn_lens.neurons.streaming import ROUNDING

Parts = Mapping[str, tuple[str, ...]]
"""Named parts of a model, from its input to its output: the plain names of the weights of each."""
EMBEDDING, NORM, HEAD, REST = "embedding", "final norm", "head", "rest"
_VOCABULARY = ("unembed", "mlm_head")
_ATTENTION = ("attn", "ln1")
"""How the TransformerLens names of the components of a block's first half begin; all others are its MLP's."""


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class WeightMask(Mapping[str, Tensor]):
    """A set of entries of a model's weights: by plain name (as `Model.weights` has them) a mask in the weight's shape.

    Every weight of the model is there. Tied weights are one entry, and weights that share memory (GPT-2's queries,
    keys, values and their joint matrix) say the same of it. `|`, `&`, `-` and `~` are those of a set. On the CPU; a
    mask that says the same along an axis takes no memory for it.
    """

    masks: Mapping[str, Bool[Tensor, "*entry"]]
    joint: frozenset[str] = frozenset()
    """Weights all of whose entries are those of others, by which they are trained and counted."""
    nothing: Mapping[str, float] = field(default_factory=dict)
    """What an entry is set to when it is cut, by weight, where that is not 0."""

    @classmethod
    def none(cls, model: Model) -> WeightMask:
        """No entry of this model; `~WeightMask.none(model)` is all of them."""
        return _of_marks(model, {})

    @classmethod
    @explained
    def of(cls, model: Model, neurons: Neurons, *, sever: Sever = "out") -> WeightMask:
        """The entries that carry neurons; `sever` says which, as `prune_` does.

        Raises:
            ValueError: the neurons are of another model, or it has no such weights for one of them.
        """
        bridge_of(model)  # says what is none
        names = {id(weight): name for name, weight in model.plain().items()}
        marks: dict[str, Tensor] = {}
        nothing: dict[str, float] = {}
        for weight, mask, value, _ in _slices(model, neurons, sever):
            name = names[id(weight)]
            marks[name] = _each(torch.logical_or, marks[name], mask) if name in marks else mask
            if value:
                nothing[name] = value
        return _of_marks(model, marks, nothing)

    @classmethod
    @explained
    def of_parts(cls, model: Model, names: str | Iterable[str], *, among: Parts | None = None) -> WeightMask:
        """All entries of some parts of a model, named as `parts` names them or as `among` does; halves of blocks too.

        Raises:
            ValueError: no such part.
        """
        known = among or {**parts(model, within=range(len(model.bridge.blocks))), **parts(model)}
        marks: dict[str, Tensor] = {}
        for name in [names] if isinstance(names, str) else names:
            if name not in known:
                raise ValueError(f"this model has no part {name!r}; it has {', '.join(known)}{meant(name, known)}")
            marks |= dict.fromkeys(known[name], torch.tensor(True))
        return _of_marks(model, marks)

    @classmethod
    @explained
    def of_entries(cls, model: Model, masks: Mapping[str, Bool[Tensor, ...]]) -> WeightMask:
        """The entries that masks of some weights name; of weights that share memory one is enough.

        Raises:
            ValueError: no such weight, or a mask of another shape.
        """
        plain = model.plain()
        for name, mask in masks.items():
            if name not in plain or mask.shape != plain[name].shape:
                has = f"shape {tuple(plain[name].shape)}" if name in plain else "no such weight"
                raise ValueError(f"a mask of shape {tuple(mask.shape)} for {name!r}: this model has {has}")
        return _of_marks(model, masks)

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def _with(self, op: Callable[..., Tensor], *others: WeightMask) -> WeightMask:
        for other in others:
            if (why := differs(self, other)) is not None:
                raise ValueError(f"masks of the weights of two models cannot be combined: {why}")
        masks = {name: _each(op, self[name], *(other[name] for other in others)) for name in self}
        nothing = {name: value for one in (self, *others) for name, value in one.nothing.items()}
        return WeightMask(masks, self.joint, nothing)

    def __or__(self, other: WeightMask) -> WeightMask:
        return self._with(torch.logical_or, other)

    def __and__(self, other: WeightMask) -> WeightMask:
        return self._with(torch.logical_and, other)

    def __sub__(self, other: WeightMask) -> WeightMask:
        return self._with(lambda mine, theirs: mine & ~theirs, other)

    def __invert__(self) -> WeightMask:
        return self._with(torch.logical_not)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask) or differs(self, other) is not None:
            return False
        return all(bool(_each(torch.eq, self[name], other[name]).all()) for name in self)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def n_entries(self) -> int:
        """Entries of the set."""
        return sum(_n_set(self[name]) for name in self if name not in self.joint)

    @property
    def share(self) -> float:
        """Share of all entries of the model that are in the set, 0 to 1."""
        return self.n_entries / sum(self[name].numel() for name in self if name not in self.joint)

    def weights(self) -> list[str]:
        """Plain names of the weights that have an entry in the set."""
        return list(self._held)

    @cached_property
    def _held(self) -> tuple[str, ...]:
        return tuple(name for name, mask in self.masks.items() if bool(_compact(mask).any()))

    def on(self, device: torch.device) -> WeightMask:
        """The same set on a device."""
        masks = {name: _compact(mask).to(device).expand(mask.shape) for name, mask in self.masks.items()}
        return WeightMask(masks, self.joint, self.nothing)

    def check(self, model: Model) -> None:
        """Refuse a mask of another model.

        Raises:
            ValueError: a name or a shape differs.
        """
        if (why := differs(self, model.plain())) is not None:
            raise ValueError(f"this mask is of the weights of another model: {why}")

    def __repr__(self) -> str:
        return (
            f"WeightMask({self.n_entries:,} entries in {len(self.weights())} of {len(self)} weights, {self.share:.2%})"
        )


Where = Neurons | WeightMask | Members
"""A set of neurons or of weights, or neurons by `(layer, index)` or by name."""


def set_of(model: Model | TransformerBridge, where: Where, site: str | Site = "resid") -> Neurons | WeightMask:
    """A set as it is; of neurons by `(layer, index)` or by name, the set of those of a site.

    Raises:
        ValueError: an unknown site, a neuron that it does not have, or something that is no set.
    """
    if isinstance(where, Neurons | WeightMask):
        return where
    if hasattr(where, "top"):
        raise ValueError(
            f"a set of neurons is wanted, got a {type(where).__name__}, which has a number for each; take the highest: "
            ".top(fraction=0.05)"
        )
    return Neurons.of(site_of(bridge_of(model), site), where)


def entries(
    model: Model | TransformerBridge, where: Neurons | WeightMask, sever: Sever | str = "out"
) -> list[tuple[Tensor, Bool[Tensor, "*entry"], float]]:
    """The weights themselves that hold neurons (`sever` says which of theirs) or a mask's entries, where in each they
    are, and the value that has no effect there.

    Raises:
        ValueError: neurons or a mask of another model, no neuron, no such weights, or a low-rank adapter beside them.
    """
    if isinstance(where, Neurons) and not len(where):
        raise ValueError(f"{where} is an empty set, so there is nothing to take or to hold; name a neuron at least")
    if isinstance(where, WeightMask):
        if not isinstance(model, Model):
            raise ValueError(
                "a WeightMask names the weights of a Tagger or LanguageModel, got a bare bridge: pass that"
            )
        where.check(model)
        plain = model.plain()
        slices = [
            (plain[name], where[name], where.nothing.get(name, 0.0), name)
            for name in where.weights()
            if name not in where.joint
        ]
    else:
        slices = _slices(model, where, sever)
    bridge = bridge_of(model)
    for weight, _, _, name in slices:
        if wearing(bridge, weight):
            raise ValueError(
                f"{name} has a low-rank adapter now, beside which its own weights cannot be set or held; prune before "
                "the block of `adapted`, or use `with ablated(...)`"
            )
    return [
        (weight, _compact(mask).to(weight.device).expand_as(weight), nothing) for weight, mask, nothing, _ in slices
    ]


def same_site(model: Model | TransformerBridge, neurons: Neurons) -> Site:
    """The neurons' site, if it is one of this model; as the model has it.

    Raises:
        ValueError: the neurons are of another model.
    """
    mine, theirs = site_of(bridge_of(model), neurons.site.name), neurons.site
    if mine != theirs:
        raise ValueError(
            f"these neurons are of another model: their site {theirs.name!r} has {len(theirs.layers)} layers of "
            f"{theirs.width} ({theirs.hooks[0]}, ...), this model's {len(mine.layers)} of {mine.width} "
            f"({mine.hooks[0]}, ...)"
        )
    return mine


def check_prunable(model: Model | TransformerBridge, neurons: Site | Neurons, sever: Sever | str = "out") -> None:
    """Refuse neurons whose weights this model does not have: a set, or all layers of a site.

    Raises:
        ValueError: a layer has no weights for `sever`, or `sever` is not known.
    """
    known_name("sever", sever, get_args(Sever))
    site = neurons.site if isinstance(neurons, Neurons) else neurons
    wanted = neurons.mask.any(1).tolist() if isinstance(neurons, Neurons) else [True] * len(site.layers)
    sever = cast(Sever, sever)
    bridge = bridge_of(model)
    site = site_of(bridge, site.name)
    lacking = [
        layer for layer, parts, of in zip(site.layers, site.parts(sever), wanted, strict=True) if of and not parts
    ]
    if not lacking:
        return
    others = {
        other: [layer for layer, parts in zip(site.layers, site.parts(other), strict=True) if parts]
        for other in get_args(Sever)
        if other != sever
    }
    has = "; ".join(f"sever={other!r} (layers {', '.join(layers)})" for other, layers in others.items() if layers)
    why = {
        "resid": "is a sum over blocks" if sever in ("out", "both") else "has none of that kind",
        "attn_head": "shares input weights between heads" if sever == "both" else "has none of that kind",
    }
    raise ValueError(
        f"site {site.name!r} of a {bridge.cfg.architecture} model has no weights to prune with sever={sever!r} "
        f"(layer {lacking[0]!r} {why.get(site.name, 'has none of that kind')}): use `with ablated(...)`, or "
        + (f"{has}, or " if has else "")
        + f"site {'mlp_post' if site.name != 'mlp_post' else 'resid'!r}"
    )


def severed(model: Model | TransformerBridge, neurons: Neurons, *, sever: Sever = "out") -> Neurons:
    """Which of these neurons are still cut: all of the weights that `sever` names are where they have no effect.

    A neuron that is cut off from what reads it may stay as salient as it was; it carries nothing until training has
    moved those weights again. A neuron without such weights is not severed, and neither is one whose weights have a
    low-rank adapter.
    """
    bridge, site = bridge_of(model), same_site(model, neurons)
    still = neurons.mask.clone()
    for row, of_layer in zip(still, site.parts(sever), strict=True):
        if not of_layer:
            row[:] = False
        for part in of_layer if row.any() else ():
            weight = parameter(bridge, part)
            others = [axis for axis in range(weight.ndim) if axis != part.axis]
            # What is below the rounding of the weights beside it changes nothing.
            moved = (weight.detach() - part.nothing).abs() > ROUNDING * weight.detach().abs().max()
            moved = moved.sum(others) if others else moved
            row &= ~moved.bool().cpu().view(site.width, site.size).any(1) & (not wearing(bridge, weight))
    return Neurons(still, site)


@explained
def parts(model: Model, *, bands: int | None = None, within: Iterable[int] = ()) -> dict[str, tuple[str, ...]]:
    """The parts of a model, from its input to its output, with the plain names of their weights.

    `embedding` (all before the first block), `block 0`, ..., `final norm`, `head`; tied weights once, as a part named
    by both (`embedding and head`). Each parameter is in one part; buffers, which no training moves, are in none.
    `bands`: so many groups of neighbouring blocks, as even as they can be (`blocks 0 to 4`). `within`: blocks that are
    given by halves, `block 5 attention` and `block 5 mlp`, each with the LayerNorm that it has (before or after).

    Raises:
        ValueError: a block that the model does not have, or bands and halves at once, or no such number of bands.
    """
    bridge, blocks = model.bridge, len(model.bridge.blocks)
    within = list(within)
    if unknown := [i for i in within if not 0 <= i < blocks]:
        raise ValueError(f"this model has no block {unknown[0]}; it has blocks 0 to {blocks - 1}")
    if bands is not None and (within or not 1 <= bands <= blocks):
        raise ValueError(
            f"bands must be 1 to {blocks}, the number of blocks, and goes without `within`; got bands={bands}, "
            f"within={within}"
        )
    band_of = _bands(blocks, bands)
    homes: dict[int, list[str]] = {}

    def settle(modules: Iterable[nn.Module], name: str, *, left_over: bool = False) -> None:
        """Give the weights of some modules to a part; only those that have none yet if they are `left_over`."""
        for weight in {id(w) for module in modules for w in (*module.parameters(), *module.buffers())}:
            if not (left_over and weight in homes):
                homes.setdefault(weight, []).append(name)

    order = [EMBEDDING]
    others = {name: child for name, child in bridge.named_children() if name != "blocks"}
    last, unused = ([others.pop(name) for name in names if name in others] for names in (("ln_final",), _VOCABULARY))
    settle(others.values(), EMBEDDING)
    for i, block in enumerate(bridge.blocks):
        if i in within:
            halves = [f"{band_of[i]} attention", f"{band_of[i]} mlp"]
            settle([child for name, child in block.named_children() if name.startswith(_ATTENTION)], halves[0])
            settle([block], halves[1], left_over=True)  # a BERT has no module that is its MLP alone
        else:
            halves = [band_of[i]]
            settle([block], band_of[i])
        order += halves
    settle(last, NORM)
    settle([model.head], HEAD)
    # A tagger has a head of its own: that its body came with a vocabulary head, maybe a tied one, changes nothing.
    settle(unused, HEAD, left_over=True)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, weight in model.plain().items():
        if isinstance(weight, nn.Parameter):
            groups.setdefault(tuple(homes.get(id(weight), [REST])), []).append(name)
    places = [*dict.fromkeys(order), NORM, HEAD, REST]
    named = sorted(groups.items(), key=lambda item: [places.index(name) for name in item[0]])
    return {" and ".join(at): tuple(names) for at, names in named}


def apart(model: Model, part: str, *, bands: int | None = None) -> dict[str, tuple[str, ...]]:
    """The next finer parts of one that `parts` names: the blocks of a group, attention and MLP of a block; none of any
    other part."""
    blocks = [i for i, name in enumerate(_bands(len(model.bridge.blocks), bands)) if name == part]
    if not blocks:
        return {}
    if len(blocks) > 1:
        return {name: of for name, of in parts(model).items() if name in {f"block {i}" for i in blocks}}
    return {name: of for name, of in parts(model, within=blocks).items() if name.startswith(f"block {blocks[0]} ")}


def differs(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """What tells two models' weights apart, in words; None where nothing does."""
    if names := sorted(set(mine) ^ set(theirs)):
        return f"{len(names)} names differ, such as {names[:3]}"
    for name, mask in mine.items():
        if mask.shape != theirs[name].shape:
            return f"{name} has shape {tuple(mask.shape)} in one and {tuple(theirs[name].shape)} in the other"
    return None


def _bands(blocks: int, bands: int | None) -> list[str]:
    """The name of every block's part."""
    if bands is None:
        return [f"block {i}" for i in range(blocks)]
    groups = [group.tolist() for group in np.array_split(np.arange(blocks), bands)]
    names = [f"blocks {group[0]} to {group[-1]}" if len(group) > 1 else f"block {group[0]}" for group in groups]
    return [name for name, group in zip(names, groups, strict=True) for _ in group]


def output_matrices(model: Model, blocks: Iterable[int]) -> tuple[str, ...]:
    """Plain names of the output matrices of some blocks' MLPs, with their biases."""
    writes = site_of(model.bridge, "mlp_post").writes
    wanted = {id(parameter(model.bridge, part)) for block in blocks for part in writes[block]}
    return tuple(name for name, weight in model.plain().items() if id(weight) in wanted)


def _slices(
    model: Model | TransformerBridge, neurons: Neurons, sever: Sever | str
) -> list[tuple[Tensor, Tensor, float, str]]:
    """The weights themselves that hold the neurons, where in each, the value without effect, and whose they are."""
    bridge, site = bridge_of(model), same_site(model, neurons)
    check_prunable(model, neurons, sever)
    slices = []
    for of_layer, mask in zip(
        site.parts(cast(Sever, sever)), neurons.mask.repeat_interleave(site.size, 1), strict=True
    ):
        if not mask.any():
            continue
        for part in of_layer:
            weight = parameter(bridge, part)
            shape = [1] * weight.ndim
            shape[part.axis] = len(mask)
            slices.append((weight, mask.view(shape).expand_as(weight), part.nothing, part.component))
    return slices


def _of_marks(model: Model, marks: Mapping[str, Tensor], nothing: Mapping[str, float] | None = None) -> WeightMask:
    """A mask of every weight of a model from those of some; weights that share memory say the same of it."""
    plain, no = model.plain(), torch.tensor(False)
    masks = {name: marks.get(name, no).expand(weight.shape) for name, weight in plain.items()}
    groups: dict[int, list[str]] = {}
    for name, weight in plain.items():
        groups.setdefault(weight.untyped_storage().data_ptr(), []).append(name)
    joint = set()
    for names in groups.values():
        if len(names) == 1:
            continue
        weights = {name: plain[name] for name in sorted(names, key=lambda name: plain[name].numel())}
        size = max(int(w.untyped_storage().nbytes()) // w.element_size() for w in weights.values())
        covered, marked = torch.zeros(2, size, dtype=torch.bool)

        def laid_out(memory: Tensor, weight: Tensor) -> Tensor:
            return memory.as_strided(weight.shape, weight.stride(), memory.storage_offset() + weight.storage_offset())

        for name, weight in weights.items():
            if bool(laid_out(covered, weight).all()):
                joint.add(name)
            laid_out(covered, weight).fill_(True)
            if name in marks:
                laid_out(marked, weight).logical_or_(masks[name])
        if not marks.keys().isdisjoint(names):
            masks |= {name: laid_out(marked, weight).clone() for name, weight in weights.items()}
    return WeightMask(masks, frozenset(joint), nothing or {})


def _compact(mask: Tensor) -> Tensor:
    """A mask without the copies that `expand` only pretends to make: length 1 along each such axis."""
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]


def _each(op: Callable[..., Tensor], *masks: Tensor) -> Tensor:
    """An elementwise function of masks of one shape, computed without their copies."""
    return op(*map(_compact, masks)).expand(masks[0].shape)


def _n_set(mask: Tensor) -> int:
    compact = _compact(mask)
    return int(compact.sum()) * (mask.numel() // compact.numel()) if mask.numel() else 0
