"""What a neuron is, sets of neurons, and their activations as they stream by.

The only module with hook names. A family of models is a few lines of data in `FAMILIES`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.names import explained, known_name, meant
from relearn_lens.text import markup

Sever = Literal["out", "both", "gain", "writes"]
"""Which weights of a neuron are cut; `relearn_lens.remove.ablation.prune_` says what each does."""


class Slice(NamedTuple):
    """The part of a parameter that belongs to each neuron: along `axis` of `component.parameter`, `Site.size` indices
    for each neuron."""

    component: str
    """TransformerLens name of the component, such as `blocks.0.mlp.out`."""
    parameter: str
    axis: int
    nothing: float = 0.0
    """The value that has no effect: -1 for the gains of Gemma, which are kept as their difference from 1."""


@dataclass(frozen=True)
class Site:
    """Where neurons are read and cut: one hook per layer, all of one width.

    `resid` is a coordinate of the hidden state (embedding output, then each block's output; the choice of Lo et al.
    2024); `mlp_post` a hidden unit of a block's MLP; `attn_head` a whole attention head, a vector of `size` units.
    """

    name: str
    layers: tuple[str, ...]
    """Names of the layers: `embed`, `0`, `1`, ..."""
    hooks: tuple[str, ...]
    width: int
    writes: tuple[tuple[Slice, ...], ...] = field(repr=False)
    """Per layer: the weights that carry the neuron on. Zero there is the same as a neuron that is always 0. Empty
    where the model has no such weights."""
    reads: tuple[tuple[Slice, ...], ...] = field(repr=False)
    """Per layer: the weights that feed the neuron, for `prune_(sever="both")`."""
    # What a site is called, where it is read and how wide it is make it the same site; these two follow from that.
    gains: tuple[tuple[Slice, ...], ...] = field(default=(), repr=False, compare=False)
    """Per layer: the one LayerNorm gain that the released code of Lo et al. sets to zero."""
    writers: tuple[tuple[Slice, ...], ...] = field(default=(), repr=False, compare=False)
    """Per layer: the weights by which this block alone writes the coordinate of a hidden state that is a sum."""
    size: int = 1
    """Units of one neuron, next to each other: `d_head` where a neuron is a head."""

    def parts(self, sever: Sever) -> tuple[tuple[Slice, ...], ...]:
        """Per layer: the weights that `sever` cuts; empty where the model has no such weights."""
        nothing: tuple[tuple[Slice, ...], ...] = ((),) * len(self.layers)
        if sever == "both":
            # A coordinate of the hidden state has no inputs beside what makes it. Heads and hidden units have, and may
            # share their matrix with others.
            return tuple(
                () if self.name != "resid" and not reads else writes + reads
                for writes, reads in zip(self.writes, self.reads, strict=True)
            )
        return {"out": self.writes, "gain": self.gains, "writes": self.writers}[sever] or nothing

    def neuron(self, place: int) -> Neuron:
        """The neuron at a place among those of all layers."""
        return Neuron(self.layers[place // self.width], place % self.width)

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return len(self.layers) * self.width


class _Plan(NamedTuple):
    """A site of one family. `{i}` stands for the number of a block, and weights that a model does without are left out
    of its site."""

    width: str
    hook: str
    writes: tuple[Slice, ...] = ()
    reads: tuple[Slice, ...] = ()
    gains: tuple[Slice, ...] = ()
    writers: tuple[Slice, ...] = ()
    size: str | None = None
    embed_hook: str | None = None
    embed_writes: tuple[Slice, ...] = ()
    embed_gains: tuple[Slice, ...] = ()
    embed_writers: tuple[Slice, ...] = ()


def _linear(component: str, axis: int) -> tuple[Slice, ...]:
    """Of a linear layer (weight [out, in]): weight and bias by its output (axis 0), or weight by its input (axis 1)."""
    weight = Slice(f"blocks.{{i}}.{component}", "weight", axis)
    return (weight,) if axis else (weight, weight._replace(parameter="bias"))


def _conv1d(component: str, axis: int) -> tuple[Slice, ...]:
    """The same of GPT-2's Conv1D, whose weight is [in, out]."""
    weight, *bias = _linear(component, axis)
    return (weight._replace(axis=1 - axis), *bias)


def _gain(component: str, nothing: float = 0.0) -> tuple[Slice, ...]:
    return (Slice(component, "weight", 0, nothing),)


_EMBED_NORM = (Slice("embed_ln", "weight", 0), Slice("embed_ln", "bias", 0))


def _post_norm() -> dict[str, _Plan]:
    """BERT and its like normalise after adding, so gain and bias of the output LayerNorm are what a coordinate of the
    hidden state is made of."""
    return {
        "resid": _Plan(
            width="d_model",
            hook="blocks.{i}.hook_out",
            writes=(Slice("blocks.{i}.ln2", "weight", 0), Slice("blocks.{i}.ln2", "bias", 0)),
            gains=_gain("blocks.{i}.ln2"),
            embed_hook="embed_ln.hook_out",
            embed_writes=_EMBED_NORM,
            embed_gains=_gain("embed_ln"),
        ),
        "mlp_post": _mlp(),
        "attn_head": _heads(),
    }


def _pre_norm(
    *,
    linear: Callable[[str, int], tuple[Slice, ...]] = _linear,
    split: bool = True,
    gated: bool = False,
    nothing: float = 0.0,
    writers: tuple[Slice, ...] = (),
    embedding: tuple[Slice, ...] = (Slice("embed", "weight", 1), Slice("pos_embed", "weight", 1)),
) -> dict[str, _Plan]:
    """Pre-norm: a coordinate of the residual stream is the sum of all earlier blocks, so no weights of one block hold
    it. It can be ablated by hook, and one block can be kept from reading or from writing it.

    `split`: queries, keys and values have a matrix each. `nothing`: the stored gain that has no effect. `writers`: the
    last weights before a block's parts are added to the stream, where those are not the output matrices. `embedding`:
    the last before the stream begins.
    """
    return {
        "resid": _Plan(
            width="d_model",
            hook="blocks.{i}.hook_out",
            embed_hook="blocks.0.hook_in",
            gains=_gain("blocks.{i}.ln2", nothing),
            writers=writers or linear("attn.o", 0) + linear("mlp.out", 0),
            embed_writers=embedding,
        ),
        "mlp_post": _mlp(linear, gated),
        "attn_head": _heads(linear, split),
    }


def _mlp(linear: Callable[[str, int], tuple[Slice, ...]] = _linear, gated: bool = False) -> _Plan:
    # Gated: a hidden unit is the product of its gate, after the activation function, and its up projection.
    reads = (linear("mlp.gate", 0) if gated else ()) + linear("mlp.in", 0)
    return _Plan(width="d_mlp", hook="blocks.{i}.mlp.out.hook_in", writes=linear("mlp.out", 1), reads=reads)


def _heads(linear: Callable[[str, int], tuple[Slice, ...]] = _linear, split: bool = True) -> _Plan:
    reads = linear("attn.q", 0) + linear("attn.k", 0) + linear("attn.v", 0) if split else ()
    writes = linear("attn.o", 1)
    return _Plan(width="n_heads", size="d_head", hook="blocks.{i}.attn.o.hook_in", writes=writes, reads=reads)


FAMILIES: dict[str, dict[str, _Plan]] = {
    "BertForMaskedLM": _post_norm(),
    "DistilBertForMaskedLM": _post_norm(),
    "RobertaForMaskedLM": _post_norm(),
    "XLMRobertaForMaskedLM": _post_norm(),
    "CamembertForMaskedLM": _post_norm(),
    "ElectraForMaskedLM": _post_norm(),
    "DebertaV2ForMaskedLM": _post_norm(),
    # Gate and up projection are one matrix too, so a hidden unit's inputs cannot be cut as rows of their own.
    "ModernBertForMaskedLM": _pre_norm(split=False, embedding=_EMBED_NORM),
    "TransformerLensNative": _pre_norm(gated=True),
    "GPT2LMHeadModel": _pre_norm(linear=_conv1d, split=False),
    "GPTNeoXForCausalLM": _pre_norm(split=False),
    "LlamaForCausalLM": _pre_norm(gated=True),
    "MistralForCausalLM": _pre_norm(gated=True),
    "Qwen2ForCausalLM": _pre_norm(gated=True),
    "Qwen3ForCausalLM": _pre_norm(gated=True),
    "GemmaForCausalLM": _pre_norm(gated=True, nothing=-1.0),
    # What a part of the block gives is normalised once more before it is added.
    **dict.fromkeys(
        ("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        _pre_norm(
            gated=True,
            nothing=-1.0,
            writers=_gain("blocks.{i}.ln1_post", -1.0) + _gain("blocks.{i}.ln2_post", -1.0),
        ),
    ),
}

SITES: dict[str, str] = {
    "resid": "coordinate of the hidden state: embedding output, then each block's output",
    "mlp_post": "hidden unit of a block's MLP, after its activation function",
    "attn_head": "attention head of a block: what it gathered (hook_z), a vector that is read as its length",
}


@explained
def site_of(bridge: TransformerBridge, site: str | Site = "resid") -> Site:
    """A site of a model, by name; a `Site` is given back as it is.

    Raises:
        ValueError: the name or the model family is not known.
    """
    if isinstance(site, Site):
        return site
    plan = _family(bridge)[known_name("site", site, SITES)]
    size = int(getattr(bridge.cfg, plan.size)) if plan.size else 1
    width = int(getattr(bridge.cfg, plan.width))
    blocks = range(int(bridge.cfg.n_layers))
    head = [plan.embed_hook] if plan.embed_hook else []

    def layers(embed: tuple[Slice, ...], block: tuple[Slice, ...]) -> tuple[tuple[Slice, ...], ...]:
        """The parts that the model has, of every layer."""
        named = [embed] * len(head) + [
            tuple(part._replace(component=part.component.format(i=i)) for part in block) for i in blocks
        ]
        return tuple(tuple(part for part in parts if _weight(bridge, part) is not None) for parts in named)

    def own(parts: tuple[Slice, ...]) -> tuple[Slice, ...]:
        """The parts, or none where several neurons share them, as grouped heads share keys and values."""
        shapes = ((_weight(bridge, part), part.axis) for part in parts)
        return parts if all(w is not None and w.shape[axis] == width * size for w, axis in shapes) else ()

    return Site(
        name=site,
        layers=tuple(["embed"] * len(head) + [str(i) for i in blocks]),
        hooks=tuple(head + [plan.hook.format(i=i) for i in blocks]),
        width=width,
        writes=layers(plan.embed_writes, plan.writes),
        reads=tuple(own(parts) for parts in layers((), plan.reads)),
        gains=layers(plan.embed_gains, plan.gains),
        writers=layers(plan.embed_writers, plan.writers),
        size=size,
    )


def _family(bridge: TransformerBridge) -> dict[str, _Plan]:
    """The plans of the sites of a model's family."""
    family = str(bridge.cfg.architecture)
    if family not in FAMILIES:
        raise ValueError(
            f"models of the family {family!r} have no sites yet; known: {', '.join(FAMILIES)}. To add one, put its "
            f"hooks and weights into relearn_lens.neurons.sites.FAMILIES[{family!r}] (of a family that is built like "
            "a known one: that one's)"
        )
    return FAMILIES[family]


def token_site(bridge: TransformerBridge) -> Site:
    """The token embedding, for `streaming`: one layer, the vectors of the tokens before anything is added to them.

    Raises:
        ValueError: the model family is not known.
    """
    _family(bridge)  # says which are known
    weight = parameter(bridge, Slice("embed", "weight", 1))  # narrower than the hidden states in a small ELECTRA
    return Site("tokens", ("tokens",), ("embed.hook_out",), weight.shape[1], ((),), ((),))


Component = Literal["attn", "mlp", "resid"]
"""What a block is made of: what its attention gives, what its MLP gives, and the hidden state after both."""


def component_site(bridge: TransformerBridge, component: Component) -> Site:
    """What a component of every block gives, for `streaming`: a layer for each block, `d_model` coordinates.

    Raises:
        ValueError: there is no such component.
    """
    hooks: dict[str, str] = {"attn": "attn.hook_out", "mlp": "mlp.hook_out", "resid": "hook_out"}
    if component not in hooks:
        raise ValueError(
            f"no component of a block is called {component!r}; known: {', '.join(hooks)}{meant(component, hooks)}"
        )
    blocks = range(int(bridge.cfg.n_layers))
    names = tuple(f"blocks.{i}.{hooks[component]}" for i in blocks)
    nothing: tuple[tuple[Slice, ...], ...] = ((),) * len(names)
    return Site(component, tuple(map(str, blocks)), names, int(bridge.cfg.d_model), nothing, nothing)


def token_vectors(bridge: TransformerBridge, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """What the token embedding gives for some token ids, as `token_site` sees it."""
    return _component(bridge, "embed")(ids[None])[0]


def parameter(bridge: TransformerBridge, part: Slice) -> nn.Parameter:
    """The parameter that a slice is of (the one that is trained, not a copy)."""
    weight = _weight(bridge, part)
    assert weight is not None, f"{part} is not in the model"
    return weight


def _weight(bridge: TransformerBridge, part: Slice) -> nn.Parameter | None:
    """The parameter that a slice is of; None for one that the model does without."""
    try:
        component = _component(bridge, part.component).original_component
    except AttributeError:
        return None
    return getattr(component, part.parameter, None)


def _component(bridge: TransformerBridge, path: str) -> Any:
    """A component of a bridge by its TransformerLens name."""
    module: Any = bridge
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


class Neuron(NamedTuple):
    """One neuron, printed as `L3N217` (`LembedN217` for the embedding output)."""

    layer: str
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}N{self.index}"

    __repr__ = __str__

    @classmethod
    def named(cls, name: str) -> Neuron:
        """The neuron that is printed so.

        Raises:
            ValueError: it is not of that form.
        """
        parsed = re.fullmatch(r"L(.+)N(\d+)", name)
        if not parsed:
            raise ValueError(f"{name!r} is no name of a neuron; write L<layer>N<index>, such as L1N0")
        return cls(parsed[1], int(parsed[2]))


Members = Iterable[tuple[str | int, int] | str] | tuple[str | int, int] | str
"""Neurons as `(layer, index)`, layers by name or number, or as they are printed; or one alone."""


def _each(members: Any) -> Iterator[tuple[str | int, int]]:
    is_one = isinstance(members, str) or (isinstance(members, tuple) and [type(m) for m in members[1:]] == [int])
    for member in [members] if is_one or not isinstance(members, Iterable) else members:
        neuron = Neuron.named(member) if isinstance(member, str) else member
        try:
            layer, index = neuron
        except (TypeError, ValueError):
            raise ValueError(f"{member!r} is no neuron; give (layer, index), or its name, such as 'L1N0'") from None
        yield layer, index


@explained
@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Neurons:
    """A set of neurons of one site; `|`, `&`, `-`, `in`, `len` and iteration are those of a set."""

    mask: Bool[Tensor, "layer neuron"]
    site: Site

    def __post_init__(self) -> None:
        if tuple(self.mask.shape) != (len(self.site.layers), self.site.width):
            raise ValueError(
                f"a set of neurons of {self.site.name} needs a mask of {len(self.site.layers)} layers by "
                f"{self.site.width} neurons, got {tuple(self.mask.shape)}"
            )

    @classmethod
    @explained
    def of(cls, site: Site, members: Members) -> Neurons:
        """The set of the given neurons.

        Raises:
            ValueError: a layer or an index that the site does not have, or what names no neuron.
        """
        if isinstance(members, Tensor):
            raise ValueError(
                f"a mask is made a set by Neurons(mask, site), of a bool tensor; got one of {members.dtype}"
            )
        mask = torch.zeros(len(site.layers), site.width, dtype=torch.bool)
        for layer, index in _each(members):
            if str(layer) not in site.layers or not 0 <= index < site.width:
                raise ValueError(
                    f"{site.name} has no neuron {index} in layer {layer!r}; layers {', '.join(site.layers)}, neurons "
                    f"0 to {site.width - 1}"
                )
            mask[site.layers.index(str(layer)), index] = True
        return cls(mask, site)

    @classmethod
    def highest(
        cls, scores: Float[Tensor, "layer neuron"], site: Site, k: int, among: Neurons | None = None
    ) -> Neurons:
        """The `k` neurons of the highest numbers, of all or among some; ties go to the earlier neuron."""
        order, mask = ordered(scores.flatten()), torch.zeros(scores.numel(), dtype=torch.bool)
        mask[(order if among is None else order[among.mask.flatten()[order]])[:k]] = True
        return cls(mask.view(len(site.layers), site.width), site)

    def _other(self, other: Neurons) -> Tensor:
        if not isinstance(other, Neurons) or other.site != self.site:
            there = other.site.name if isinstance(other, Neurons) else f"a {type(other).__name__}"
            raise ValueError(f"neurons of {self.site.name} and of {there} cannot be combined")
        return other.mask

    def __or__(self, other: Neurons) -> Neurons:
        return Neurons(self.mask | self._other(other), self.site)

    def __and__(self, other: Neurons) -> Neurons:
        return Neurons(self.mask & self._other(other), self.site)

    def __sub__(self, other: Neurons) -> Neurons:
        return Neurons(self.mask & ~self._other(other), self.site)

    def __invert__(self) -> Neurons:
        return Neurons(~self.mask, self.site)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Neurons) and self.site == other.site and bool((self.mask == other.mask).all())

    def __hash__(self) -> int:
        return hash((self.site, self.mask.numpy().tobytes()))

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __contains__(self, neuron: tuple[str, int]) -> bool:
        layer, index = neuron
        known = str(layer) in self.site.layers and 0 <= index < self.site.width
        return known and bool(self.mask[self.site.layers.index(str(layer)), index])

    def __iter__(self) -> Iterator[Neuron]:
        for layer, index in self.mask.nonzero().tolist():
            yield Neuron(self.site.layers[layer], index)

    def per_layer(self) -> dict[str, int]:
        """Number of neurons of the set in each layer."""
        return dict(zip(self.site.layers, self.mask.sum(1).tolist(), strict=True))

    def share_by_layer(self) -> list[float]:
        """Share of each layer's neurons that are in the set, 0 to 1."""
        return self.mask.float().mean(1).tolist()

    def __repr__(self) -> str:
        some = {layer: n for layer, n in self.per_layer().items() if n}
        if 0 < len(self) <= 6:
            which = ", ".join(map(str, self))
        elif some:
            which = "by layer " + ", ".join(f"{layer}: {n:,}" for layer, n in some.items())
        else:
            which = "none"
        return f"Neurons({self.site.name}, {len(self):,} of {self.site.n_neurons:,}; {which})"

    def _repr_html_(self) -> str:
        """How many there are in each layer."""
        counts = {layer: float(n) for layer, n in self.per_layer().items()}
        return markup.box(repr(self), markup.bars(["layer", "neurons"], counts, most=max(*counts.values(), 1.0)))


def ordered(numbers: Float[Tensor, "*row number"]) -> Int[Tensor, "*row number"]:
    """Places in each row from its highest number to its lowest; ties go to the earlier place."""
    return numbers.argsort(dim=-1, descending=True, stable=True)


@explained
def random_neurons(
    *,
    like: Neurons,
    seed: int,
    apart: Neurons | None = None,
    scale: Float[Tensor, "layer neuron"] | None = None,
) -> Neurons:
    """A control set: as many neurons in every layer as `like` has, drawn uniformly.

    They are drawn from all neurons of the layer, so where `like` takes most of a layer the two sets overlap; say
    `len(like & control)` beside a result. None of them is in `apart` where the layer has room for that. With `scale`,
    a number per neuron such as its standard deviation, as many are drawn from every tenth of the layer by that number.

    Raises:
        ValueError: `like` is no set of neurons.
    """
    if not isinstance(like, Neurons):
        raise ValueError(
            f"a set of neurons is wanted as like=, got a {type(like).__name__}: make it by Neurons.of(site, ...)"
        )
    generator = torch.Generator().manual_seed(seed)
    # Drawn in the order of a random number: 1 more for what is to be avoided, so that it comes last.
    order = torch.rand(like.mask.shape, generator=generator)
    if apart is not None:
        order = order + apart.mask
    if scale is None:
        return Neurons(order.argsort(1).argsort(1) < like.mask.sum(1, keepdim=True), like.site)
    tenth = scale.argsort(1).argsort(1) * 10 // like.site.width
    mask = torch.zeros_like(like.mask)
    for k in range(10):
        within = tenth == k
        ranks = torch.where(within, order, torch.inf).argsort(1).argsort(1)
        mask |= within & (ranks < (like.mask & within).sum(1, keepdim=True))
    return Neurons(mask, like.site)


@contextlib.contextmanager
def streaming(
    bridge: TransformerBridge,
    site: Site,
    visit: Callable[[int, Float[Tensor, "sentence token neuron"]], Tensor | None],
    *,
    units: bool = False,
) -> Iterator[None]:
    """For a while, call `visit(layer, activations)` whenever a layer of the site is computed.

    What it returns, if anything, replaces the activations. The hooks are gone when the block ends, also by an error.

    A head is a vector, and is read as its length: the L2 norm of its `hook_z` on each token, in activation units, never
    negative. That says how much the head gathered, not what: two classes for which it gathers equally long vectors in
    different directions look alike, and what the output matrix makes of it is not in it. `units=True` gives all units
    of all neurons instead, `[sentence token (neuron unit)]`; only those can be replaced.
    """

    def hook_for(layer: int) -> Callable[..., Tensor | None]:
        def see(activations: Tensor, hook: Any) -> Tensor | None:
            flat = activations.flatten(2)  # heads come as [sentence token head unit]
            if site.size > 1 and not units:
                lengths = torch.linalg.vector_norm(flat.unflatten(2, (site.width, site.size)), dim=-1)
                if visit(layer, lengths) is not None:
                    raise ValueError(
                        f"a neuron of {site.name} is a vector of {site.size} units: its length cannot replace it; use "
                        "streaming(..., units=True)"
                    )
                return None
            new = visit(layer, flat)
            return None if new is None else new.view_as(activations)

        return see

    with bridge.hooks(fwd_hooks=[(name, hook_for(i)) for i, name in enumerate(site.hooks)]):
        yield


Kept = dict[int, Tensor]
"""By layer of a site: its activations, `[sentence token neuron]`, or of all units."""


@contextlib.contextmanager
def kept(
    bridge: TransformerBridge, site: Site, *, layers: Collection[int] | None = None, units: bool = False
) -> Iterator[Kept]:
    """For a while, keep what passes by a site, or by some of its layers; of several passes the last one's."""
    activations: Kept = {}

    def keep(layer: int, x: Tensor) -> None:
        if layers is None or layer in layers:
            activations[layer] = x

    with streaming(bridge, site, keep, units=units):
        yield activations
