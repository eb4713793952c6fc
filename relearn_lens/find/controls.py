"""What every localiser is held against: as much of the model, chosen without looking; and all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from relearn_lens.find.localising import Localiser, Text, some_blocks
from relearn_lens.find.saliency import Saliency
from relearn_lens.find.scored import SiteName
from relearn_lens.models.model import Model
from relearn_lens.neurons.sites import SITES, Neurons, random_neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Facts

_BLOCK = re.compile(r"\.(\d+)\.")
"""Where the name of a weight says its block."""


class RandomNeurons(Localiser):
    """Neurons drawn by the seed: the `top` of it takes as many of every layer."""

    name: ClassVar[str] = "random"
    formula: ClassVar[str] = "as many neurons of every layer, drawn uniformly"
    source: ClassVar[str] = "control"
    gives: ClassVar[str] = "neurons"

    site: SiteName = Field(default="mlp_post", description=f"what a neuron is: {', '.join(SITES)}")

    def __call__(
        self, model: Model, text: Text | None = None, *, concept: Concept | None = None, seed: int = 0
    ) -> Saliency:
        """As of `Localiser`; the text is not read."""
        site = site_of(model.bridge, self.site)
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(len(site.layers), site.width, generator=generator).argsort(1).argsort(1)
        # Layers take turns in an order of their own, so that what does not divide evenly falls where it may.
        turn = torch.randperm(len(site.layers), generator=generator)[:, None] / len(site.layers)
        score = 1 - (place + turn) / site.width
        about = concept.name if concept else text.name if isinstance(text, Facts) else "nothing"
        return Saliency(score.float(), self.name, "share of the layer drawn later", about, site)


class RandomMLPs(Localiser):
    """The MLPs of some blocks, drawn by the seed."""

    name: ClassVar[str] = "random_mlps"
    formula: ClassVar[str] = "MLPs of blocks drawn uniformly"
    source: ClassVar[str] = "control"

    blocks: int | None = Field(default=None, ge=1, le=10_000, description="how many; none: a third of all, rounded up")

    def __call__(
        self, model: Model, text: Text | None = None, *, concept: Concept | None = None, seed: int = 0
    ) -> WeightMask:
        """As of `Localiser`; the text is not read.

        Raises:
            ValueError: more blocks than the model has.
        """
        k = some_blocks(model, self.blocks)
        drawn = np.random.default_rng(seed).permutation(int(model.bridge.cfg.n_layers))[:k]
        return WeightMask.of_parts(model, [f"block {i} mlp" for i in sorted(drawn.tolist())])


class AllMLPs(Localiser):
    """The MLPs of all blocks."""

    name: ClassVar[str] = "all_mlps"
    formula: ClassVar[str] = "MLPs of all blocks"
    source: ClassVar[str] = "control"

    def __call__(
        self, model: Model, text: Text | None = None, *, concept: Concept | None = None, seed: int = 0
    ) -> WeightMask:
        """As of `Localiser`; the text is not read."""
        return WeightMask.of_parts(model, [f"block {i} mlp" for i in range(int(model.bridge.cfg.n_layers))])


class Everything(Localiser):
    """All weights."""

    name: ClassVar[str] = "everything"
    formula: ClassVar[str] = "all weights"
    source: ClassVar[str] = "control"

    def __call__(
        self, model: Model, text: Text | None = None, *, concept: Concept | None = None, seed: int = 0
    ) -> WeightMask:
        """As of `Localiser`; the text is not read."""
        return ~WeightMask.none(model)


def equal_control(model: Model, where: Neurons | WeightMask, *, seed: int = 0) -> Neurons | WeightMask:
    """A control of equal size for what a localiser gave, chosen by the seed alone.

    Neurons: as many of every layer, none of them the same where there is room (`random_neurons`). Weights that are
    whole matrices: those of as many other blocks, of the same kinds and shapes; blocks of the mask again only where
    there are not enough others. Entries of a matrix: as many others of that matrix, in no order; a mask that was made
    from neurons is better compared with that of the neurons' own control.

    Raises:
        ValueError: a mask of another model or of nothing, or whole weights beside which there are none as large.
    """
    if isinstance(where, Neurons):
        return random_neurons(like=where, seed=seed, apart=where)
    where.check(model)
    if not where.n_entries:
        raise ValueError("there is nothing in this mask, so it has no control of equal size")
    own = {name: where[name] for name in where.weights() if name not in where.joint}
    whole = all(bool(mask.all()) for mask in own.values())
    masks = _of_other_blocks(model, own, seed) if whole else _of_other_entries(own, seed)
    return replace(WeightMask.of_entries(model, masks), nothing=where.nothing)


def _of_other_blocks(model: Model, own: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same weights of other blocks."""
    plain = model.plain()
    all_blocks = {int(match[1]) for name in plain if (match := _BLOCK.search(name))}
    named = {name: match for name in own if (match := _BLOCK.search(name))}
    mine = sorted({int(match[1]) for match in named.values()})
    if len(named) < len(own) or len(mine) == len(all_blocks):
        lone = next((name for name in own if name not in named), next(iter(own)))
        raise ValueError(
            f"this mask holds all of {lone}, and there is no other block to take as much from; compare it with "
            "'everything', or with random neurons"
        )
    rng = np.random.default_rng(seed)
    others = rng.permutation([i for i in sorted(all_blocks) if i not in mine]).tolist()
    instead = dict(zip(mine, [*others, *rng.permutation(mine).tolist()], strict=False))
    masks = {}
    for name, match in named.items():
        other = f"{name[: match.start(1)]}{instead[int(match[1])]}{name[match.end(1) :]}"
        if other not in plain or plain[other].shape != own[name].shape:
            raise ValueError(f"{name} is in the mask, and the model has no {other} of that shape to take in its place")
        masks[other] = own[name]
    return masks


def _of_other_entries(own: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As many entries of each weight, none of them the same where there is room."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, mask in own.items():
        order = torch.rand(mask.numel(), generator=generator) + mask.flatten()
        masks[name] = (order.argsort().argsort() < int(mask.sum())).view(mask.shape)
    return masks
