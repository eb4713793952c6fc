"""What a neuron is, sets of neurons, and their activations as they stream by.

The only module with hook names. A family of models is a few lines of data in `FAMILIES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge


class Slice(NamedTuple):
    """The part of a parameter that belongs to each neuron: index `axis` of `component.parameter` by neuron."""

    component: str
    """TransformerLens name of the component, such as `blocks.0.mlp.out`."""
    parameter: str
    axis: int


@dataclass(frozen=True)
class Site:
    """Where neurons are read and cut: one hook per layer, all of one width.

    `resid` is a coordinate of the hidden state (embedding output, then each block's output; the choice of Lo et al.
    2024); `mlp_post` a hidden unit of a block's MLP.
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

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return len(self.layers) * self.width


class _Plan(NamedTuple):
    """A site of one family. `{i}` stands for the number of a block."""

    width: str
    hook: str
    writes: tuple[Slice, ...] = ()
    reads: tuple[Slice, ...] = ()
    embed_hook: str | None = None
    embed_writes: tuple[Slice, ...] = ()
    tokens: str = "embed"
    """Component that turns token ids into vectors, before positions are added and anything is normalised."""


# Of a linear layer, whose weight is [out, in]. A bias that a model does without is left out of the site.
_MLP_WRITES = (Slice("blocks.{i}.mlp.out", "weight", 1),)
_MLP_READS = (Slice("blocks.{i}.mlp.in", "weight", 0), Slice("blocks.{i}.mlp.in", "bias", 0))
_GATE_READS = (Slice("blocks.{i}.mlp.gate", "weight", 0), Slice("blocks.{i}.mlp.gate", "bias", 0))

# Pre-norm: a coordinate of the residual stream is the sum of all earlier blocks, so no weights of one block hold it,
# and `resid` can be ablated by hook but not pruned.
_PRE_NORM = _Plan(width="d_model", hook="blocks.{i}.hook_out", embed_hook="blocks.0.hook_in")


def _mlp(writes: tuple[Slice, ...] = _MLP_WRITES, reads: tuple[Slice, ...] = _MLP_READS) -> _Plan:
    return _Plan(width="d_mlp", hook="blocks.{i}.mlp.out.hook_in", writes=writes, reads=reads)


FAMILIES: dict[str, dict[str, _Plan]] = {
    # BERT normalises after adding, so gain and bias of the output LayerNorm are what a coordinate is made of.
    "BertForMaskedLM": {
        "resid": _Plan(
            width="d_model",
            hook="blocks.{i}.hook_out",
            writes=(Slice("blocks.{i}.ln2", "weight", 0), Slice("blocks.{i}.ln2", "bias", 0)),
            embed_hook="embed_ln.hook_out",
            embed_writes=(Slice("embed_ln", "weight", 0), Slice("embed_ln", "bias", 0)),
        ),
        "mlp_post": _mlp(),
    },
    "TransformerLensNative": {"resid": _PRE_NORM, "mlp_post": _mlp()},
    # GPT-2's Conv1D keeps its weight as [in, out].
    "GPT2LMHeadModel": {
        "resid": _PRE_NORM,
        "mlp_post": _mlp(
            writes=(Slice("blocks.{i}.mlp.out", "weight", 0),),
            reads=(Slice("blocks.{i}.mlp.in", "weight", 1), Slice("blocks.{i}.mlp.in", "bias", 0)),
        ),
    },
    "GPTNeoXForCausalLM": {"resid": _PRE_NORM, "mlp_post": _mlp()},
    # Gated: a hidden unit is the product of its gate, after the activation function, and its up projection.
    **{
        family: {"resid": _PRE_NORM, "mlp_post": _mlp(reads=_GATE_READS + _MLP_READS)}
        for family in (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
        )
    },
}

SITES: dict[str, str] = {
    "resid": "coordinate of the hidden state: embedding output, then each block's output",
    "mlp_post": "hidden unit of a block's MLP, after its activation function",
}


def site_of(bridge: TransformerBridge, site: str | Site = "resid") -> Site:
    """A site of a model, by name; a `Site` is given back as it is.

    Raises:
        ValueError: the name or the model family is not known.
    """
    if isinstance(site, Site):
        return site
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    plan = _family(bridge)[site]

    def numbered(slices: tuple[Slice, ...], i: int) -> tuple[Slice, ...]:
        parts = (part._replace(component=part.component.format(i=i)) for part in slices)
        return tuple(part for part in parts if _weight(bridge, part) is not None)

    blocks = range(int(bridge.cfg.n_layers))
    head = [plan.embed_hook] if plan.embed_hook else []
    return Site(
        name=site,
        layers=tuple(["embed"] * len(head) + [str(i) for i in blocks]),
        hooks=tuple(head + [plan.hook.format(i=i) for i in blocks]),
        width=int(getattr(bridge.cfg, plan.width)),
        writes=tuple([plan.embed_writes] * len(head) + [numbered(plan.writes, i) for i in blocks]),
        reads=tuple([()] * len(head) + [numbered(plan.reads, i) for i in blocks]),
    )


def _family(bridge: TransformerBridge) -> dict[str, _Plan]:
    """The plans of the sites of a model's family."""
    family = str(bridge.cfg.architecture)
    if family not in FAMILIES:
        raise ValueError(
            f"models of the family {family!r} have no sites yet; known: {', '.join(FAMILIES)}. To add one, put its "
            "hook names into relearn_lens.neurons.FAMILIES"
        )
    return FAMILIES[family]


def token_site(bridge: TransformerBridge) -> Site:
    """The token embedding, for `streaming`: one layer, the vectors of the tokens before anything is added to them.

    Raises:
        ValueError: the model family is not known.
    """
    component = _family(bridge)["resid"].tokens
    return Site("tokens", ("tokens",), (f"{component}.hook_out",), int(bridge.cfg.d_model), ((),), ((),))


def token_vectors(bridge: TransformerBridge, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """What the token embedding gives for some token ids, as `token_site` sees it."""
    return _component(bridge, _family(bridge)["resid"].tokens)(ids[None])[0]


def parameter(bridge: TransformerBridge, part: Slice) -> nn.Parameter:
    """The parameter that a slice is of (the one that is trained, not a copy)."""
    weight = _weight(bridge, part)
    assert weight is not None, f"{part} is not in the model"
    return weight


def _weight(bridge: TransformerBridge, part: Slice) -> nn.Parameter | None:
    """The parameter that a slice is of; None for a bias that the model does without."""
    return getattr(_component(bridge, part.component).original_component, part.parameter)


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
    def of(cls, site: Site, members: Iterable[tuple[str | int, int]]) -> Neurons:
        """The set of the given `(layer, index)` neurons, layers by name.

        Raises:
            ValueError: a layer or an index that the site does not have.
        """
        mask = torch.zeros(len(site.layers), site.width, dtype=torch.bool)
        for layer, index in members:
            if str(layer) not in site.layers or not 0 <= index < site.width:
                raise ValueError(
                    f"{site.name} has no neuron {index} in layer {layer!r}; layers {', '.join(site.layers)}, neurons "
                    f"0 to {site.width - 1}"
                )
            mask[site.layers.index(str(layer)), index] = True
        return cls(mask, site)

    def _other(self, other: Neurons) -> Tensor:
        if other.site != self.site:
            raise ValueError(f"neurons of {self.site.name} and of {other.site.name} cannot be combined")
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
        shares = ", ".join(f"{layer} {n}" for layer, n in self.per_layer().items())
        return f"Neurons({self.site.name}: {len(self):,} of {self.site.n_neurons:,}; {shares})"


def random_neurons(*, like: Neurons, seed: int) -> Neurons:
    """A control set: as many neurons in every layer as `like` has, drawn uniformly.

    They are drawn from all neurons of the layer, so where `like` takes most of a layer the two sets overlap; say
    `len(like & control)` beside a result.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(like.mask.shape, generator=generator).argsort(1).argsort(1)
    return Neurons(order < like.mask.sum(1, keepdim=True), like.site)


@contextlib.contextmanager
def streaming(
    bridge: TransformerBridge,
    site: Site,
    visit: Callable[[int, Float[Tensor, "sentence token neuron"]], Tensor | None],
) -> Iterator[None]:
    """For a while, call `visit(layer, activations)` whenever a layer of the site is computed.

    What it returns, if anything, replaces the activations. The hooks are gone when the block ends, also by an error.
    """

    def hook_for(layer: int) -> Callable[..., Tensor | None]:
        return lambda activations, hook: visit(layer, activations)

    with bridge.hooks(fwd_hooks=[(name, hook_for(i)) for i, name in enumerate(site.hooks)]):
        yield
