"""Activations of words as they stream by, and what is gathered from them in one pass over a text.

A hook on every layer averages the sub-words of each word and hands the words to every collector; a collector adds them
up and keeps nothing per word, so memory does not depend on the length of the text. One pass serves any number of
collectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype as typechecker
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.concept import Classes
from relearn_lens.corpus import Strings
from relearn_lens.encoding import Batch, Encoded
from relearn_lens.models import Tagger, hidden, reading, trunk
from relearn_lens.neurons import Site, site_of, streaming


@runtime_checkable
class Collector(Protocol):
    """Gathers something from the words of a text as they stream by."""

    def begin(self, batch: Batch) -> None:
        """The batch, on the model's device, whose activations come next."""

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """One layer's activations of the batch's words, float32; not to be changed in place."""


def stream(
    model: Tagger | TransformerBridge,
    encoded: Encoded,
    collectors: Sequence[Collector],
    *,
    site: str | Site = "resid",
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> None:
    """One pass over a text: every layer of the site, sub-words averaged into words, to every collector.

    Special tokens and padding are left out, and so are words that the model's context cut off. The model is read
    only. `tick` is called with the number of tokens of each batch.
    """
    bridge = model.bridge if isinstance(model, Tagger) else model
    device = next(trunk(bridge).parameters()).device
    here: list[Batch] = []

    def visit(layer: int, activations: Tensor) -> None:
        words = word_means(activations, here[-1])
        for collector in collectors:
            collector.add(layer, words)

    with reading(model), streaming(bridge, site_of(bridge, site), visit):
        for batch in encoded.batches(max_tokens=max_tokens):
            here[:] = [batch.to(device)]
            for collector in collectors:
                collector.begin(here[-1])
            hidden(bridge, here[-1].ids, here[-1].mask)
            if tick:
                tick(batch.n_tokens)


def word_means(activations: Float[Tensor, "sentence token neuron"], batch: Batch) -> Float[Tensor, "word neuron"]:
    """Activations averaged over the sub-words of each word of a batch, float32."""
    flat = rearrange(activations, "s t n -> (s t) n").float()
    # embedding_bag is a fused gather and mean, which is what averaging sub-words is.
    return F.embedding_bag(batch.subword, flat, batch.offset, mode="mean")


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class ClassStats:
    """Count, mean and summed squared deviation of every neuron over the words of every class.

    Activations are in the model's own units. Two of them over different words merge exactly, so statistics can be
    gathered in batches or processes.
    """

    count: Int[Tensor, " class"]
    mean: Float[Tensor, "class layer neuron"]
    """float64; 0 where a class has no words."""
    m2: Float[Tensor, "class layer neuron"]
    """Sum over words of the squared deviation from `mean`, float64."""
    class_names: Strings
    site: Site

    @property
    def variance(self) -> Float[Tensor, "class layer neuron"]:
        """Population variance within each class."""
        return self.m2 / rearrange(self.count.clamp(min=1), "c -> c 1 1")

    def merge(self, other: ClassStats) -> ClassStats:
        """Statistics over the words of both. Source: Chan, Golub, LeVeque 1979, pairwise update."""
        if (self.class_names, self.site) != (other.class_names, other.site):
            raise ValueError("statistics of different classes or sites cannot be merged")
        count = self.count + other.count
        share = rearrange(other.count.double() / count.clamp(min=1), "c -> c 1 1")
        delta = other.mean - self.mean
        return ClassStats(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * share * rearrange(self.count, "c -> c 1 1"),
            self.class_names,
            self.site,
        )

    def pooled(self, which: Bool[Tensor, " class"]) -> Float[Tensor, "layer neuron"]:
        """Mean over the words of several classes together."""
        weight = (self.count * which).double()
        return einsum(weight / weight.sum(), self.mean, "c, c l n -> l n")

    @property
    def total(self) -> ClassStats:
        """The statistics of all words together, as one class."""
        return self.merged(torch.ones_like(self.count, dtype=torch.bool), "all words")

    def merged(self, which: Bool[Tensor, " class"], name: str) -> ClassStats:
        """Several classes as one."""
        count = self.count * which
        n = int(count.sum())
        mean = einsum(count.double() / max(n, 1), self.mean, "c, c l n -> l n")
        between = einsum(count.double(), (self.mean - mean).square(), "c, c l n -> l n")
        within = einsum(which.double(), self.m2, "c, c l n -> l n")
        return ClassStats(torch.tensor([n]), mean[None], (within + between)[None], (name,), self.site)


class ClassSums:
    """Collects `ClassStats`: two small matrix products per layer and batch for all classes together.

    Sums are taken after a shift by the first batch's mean: without it the squares of a neuron with a large mean would
    swallow its variance. `relabelled` are further ways to cut the same words into classes (label shuffles); their
    statistics come from the same two products.
    """

    def __init__(self, site: Site, classes: Classes, relabelled: Sequence[Int[np.ndarray, " word"]] = ()):
        self.site = site
        self.names = classes.names
        # Each labelling has rows of its own in the sums.
        self.of_word = [torch.from_numpy(np.asarray(of_word)) for of_word in (classes.of_word, *relabelled)]
        self.count = torch.zeros(len(self.of_word), len(self.names), dtype=torch.int64)
        self.first: list[Tensor | None] = [None] * len(site.layers)
        self.second: list[Tensor | None] = [None] * len(site.layers)
        self.shift: list[Tensor | None] = [None] * len(site.layers)
        self.member: Tensor

    def begin(self, batch: Batch) -> None:
        """The class of each word of the batch, under every labelling."""
        words = batch.words.cpu()
        rows = [F.one_hot(of_word[words], len(self.names)).T for of_word in self.of_word]
        self.count += torch.stack([row.sum(1) for row in rows])
        self.member = torch.cat(rows).float().to(batch.words.device)

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Add one layer's words to the sums of their classes."""
        if self.shift[layer] is None:
            self.shift[layer] = words.mean(0)
            zero = torch.zeros(len(self.member), self.site.width, dtype=_wide(words.device), device=words.device)
            self.first[layer], self.second[layer] = zero, zero.clone()
        first, second, shift = self.first[layer], self.second[layer], self.shift[layer]
        assert first is not None
        assert second is not None
        assert shift is not None
        words = words - shift
        first += self.member @ words
        second += self.member @ words.square()

    def stats(self) -> ClassStats:
        """The statistics under the labels themselves, on the CPU in float64."""
        return self.all()[0]

    def all(self) -> list[ClassStats]:
        """The statistics under the labels themselves, then under each relabelling."""
        first, second, shift = (
            torch.stack([t for t in tensors if t is not None], dim=-2).cpu().double()
            for tensors in (self.first, self.second, self.shift)
        )
        for name, sums in zip(self.site.layers, second.unbind(1), strict=True):
            if not sums.isfinite().all():
                raise ValueError(
                    f"activations of {self.site.name} in layer {name!r} are not finite (NaN or infinite), so there is "
                    "nothing to measure; look at the model's weights and at the learning rate"
                )
        found = []
        shape = (len(self.of_word), len(self.names), *first.shape[1:])
        for n, one, two in zip(self.count, first.view(shape), second.view(shape), strict=True):
            count = rearrange(n, "c -> c 1 1")
            mean = one / count.clamp(min=1)
            m2 = (two - count * mean.square()).clamp(min=0)
            found.append(ClassStats(n, torch.where(count > 0, mean + shift, 0.0), m2, self.names, self.site))
        return found


def class_stats(
    model: Tagger | TransformerBridge,
    encoded: Encoded,
    classes: Classes,
    *,
    site: str | Site = "resid",
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> ClassStats:
    """Class statistics of every neuron of a site in one pass (`stream` with `ClassSums` alone)."""
    place = site_of(model.bridge if isinstance(model, Tagger) else model, site)
    sums = ClassSums(place, classes)
    stream(model, encoded, [sums], site=place, max_tokens=max_tokens, tick=tick)
    return sums.stats()


def _wide(device: torch.device) -> torch.dtype:
    """The widest float a device has for sums."""
    return torch.float32 if device.type == "mps" else torch.float64
