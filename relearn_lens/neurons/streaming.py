"""Activations of words as they stream by, and what is gathered from them in one pass over a text.

A hook on every layer averages the sub-words of each word and hands the words to every collector; a collector adds them
up, or keeps a fixed number of them, so memory does not depend on the length of the text. One pass serves any number of
collectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype as typechecker
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens import names, progress
from relearn_lens.methods import MAX_TOKENS, SAMPLE_WORDS
from relearn_lens.models import processes
from relearn_lens.models.model import Model, bridge_of, hidden, reading, trunk, widest
from relearn_lens.neurons.sites import Site, site_of, streaming
from relearn_lens.text.concept import Classes
from relearn_lens.text.corpus import Strings
from relearn_lens.text.encoding import Batch, Encoded

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Averaging the sub-words of a constant in float32 leaves differences below this share of its size."""


@runtime_checkable
class Collector(Protocol):
    """Gathers something from the words of a text as they stream by."""

    def begin(self, batch: Batch) -> None:
        """The batch, on the model's device, whose activations come next."""

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """One layer's activations of the batch's words, float32; not to be changed in place."""

    def together(self) -> None:
        """The text has gone by, each part of it in one of several processes: take in what the others gathered."""


@runtime_checkable
class Reader(Protocol):
    """Takes the last hidden states of a text as they come by: what a head says is made from them."""

    def read(self, batch: Batch, states: Float[Tensor, "sentence token d_model"]) -> None:
        """The states of a batch, in the dtype of the model's weights."""

    def together(self) -> None:
        """As `Collector.together`."""


@names.explained
def stream(
    model: Model | TransformerBridge,
    encoded: Encoded,
    collectors: Sequence[Collector],
    *,
    readers: Sequence[Reader] = (),
    site: str | Site = "resid",
    max_tokens: int = MAX_TOKENS,
) -> None:
    """One pass over a text: every layer of the site, sub-words averaged into words, to every collector, and the last
    hidden states to every reader.

    Special tokens and padding are left out of words, and so are words that the model's context cut off. The model is
    read only. Progress is in tokens. Where several processes share the run, each reads its part of the batches, and
    what was gathered is put together at the end.
    """
    bridge = bridge_of(model)
    device = next(trunk(bridge).parameters()).device
    here: list[Batch] = []

    def visit(layer: int, activations: Tensor) -> None:
        words = word_means(activations, here[-1])
        for collector in collectors:
            collector.add(layer, words)

    hooked = streaming(bridge, site_of(bridge, site), visit) if collectors else contextlib.nullcontext()
    with reading(model), hooked:
        cuts = encoded.cuts(max_tokens=max_tokens)
        shared = processes.is_shared(len(cuts))
        for pieces in processes.share(cuts):
            batch = encoded.batch(pieces)
            here[:] = [batch.to(device)]
            for collector in collectors:
                collector.begin(here[-1])
            states = hidden(bridge, here[-1].ids, here[-1].mask)
            for reader in readers:
                reader.read(here[-1], states)
            progress.advance(batch.n_tokens * (processes.size() if shared else 1))
        if shared:
            for each in (*collectors, *readers):
                each.together()


def word_means(activations: Float[Tensor, "sentence token neuron"], batch: Batch) -> Float[Tensor, "word neuron"]:
    """Activations averaged over the sub-words of each word of a batch, float32."""
    flat = rearrange(activations, "s t n -> (s t) n").float()
    # embedding_bag is a fused gather and mean, which is what averaging sub-words is.
    return F.embedding_bag(batch.read, flat, batch.offset, mode="mean")


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class ClassStats:
    """Count, mean and summed squared deviation of every neuron over the words of every class.

    Activations are in the model's own units.
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

    def pooled(self, which: Bool[Tensor, " class"]) -> Float[Tensor, "layer neuron"]:
        """Mean over the words of several classes together."""
        weight = (self.count * which).double()
        return einsum(weight / weight.sum(), self.mean, "c, c l n -> l n")

    @cached_property
    def total(self) -> ClassStats:
        """The statistics of all words together, as one class."""
        return self.merged(torch.ones_like(self.count, dtype=torch.bool), "all words")

    @cached_property
    def resolution(self) -> Float[Tensor, "layer neuron"]:
        """The standard deviation below which statistics hold rounding only, of words or of squares, in float32."""
        seen = rearrange(self.count > 0, "c -> c 1 1")
        return (ROUNDING * (self.mean * seen).abs().amax(0)).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)

    @cached_property
    def constant(self) -> Bool[Tensor, "layer neuron"]:
        """Which neurons vary over all words no more than `resolution`."""
        return self.total.variance[0].sqrt() <= self.resolution

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
        self.sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """By layer: the shift, and sums of what is left of words and of its squares."""
        self.member: Tensor

    def begin(self, batch: Batch) -> None:
        """The class of each word of the batch, under every labelling."""
        words = batch.words.cpu()
        rows = [F.one_hot(of_word[words], len(self.names)).T for of_word in self.of_word]
        self.count += torch.stack([row.sum(1) for row in rows])
        self.member = torch.cat(rows).float().to(batch.words.device)

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Add one layer's words to the sums of their classes."""
        if layer not in self.sums:
            zero = torch.zeros(len(self.member), self.site.width, dtype=widest(words.device), device=words.device)
            self.sums[layer] = processes.agreed(words.mean(0)), zero, zero.clone()
        shift, first, second = self.sums[layer]
        words = words - shift
        first += self.member @ words
        second += self.member @ words.square()

    def together(self) -> None:
        """Sum counts and sums over the processes; all took their sums after the first one's shift."""
        processes.sum_(self.count)
        processes.sum_many_(each for _, *sums in self.sums.values() for each in sums)

    def all(self) -> list[ClassStats]:
        """The statistics under the labels themselves, then under each relabelling; on the CPU in float64."""
        by_layer = zip(*(self.sums[layer] for layer in range(len(self.site.layers))), strict=True)
        shift, first, second = (torch.stack(each, dim=-2).cpu().double() for each in by_layer)
        for name, sums in zip(self.site.layers, second.unbind(1), strict=True):
            if not sums.isfinite().all():
                raise _not_finite(self.site, name)
        stats = []
        shape = (len(self.of_word), len(self.names), *first.shape[1:])
        for n, one, two in zip(self.count, first.view(shape), second.view(shape), strict=True):
            count = rearrange(n, "c -> c 1 1")
            mean = one / count.clamp(min=1)
            m2 = (two - count * mean.square()).clamp(min=0)
            stats.append(ClassStats(n, torch.where(count > 0, mean + shift, 0.0), m2, self.names, self.site))
        return stats


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class Histograms:
    """How often each neuron takes which values, for the concept's words and for all others.

    Bins are even in u = z / (1 + |z|) with z = (activation - centre) / scale, -1 < u < 1: fine around the centre, wider
    further out (by (1 + |z|)^2), and the outermost open, so that no value is out of range wherever the centre lies.
    """

    counts: Int[Tensor, "2 layer neuron bin"]
    """Words in each bin; row 0 is the concept, row 1 the rest. int32."""
    centre: Float[Tensor, "layer neuron"]
    """In activation units; it lies in the middle of the middle bin."""
    scale: Float[Tensor, "layer neuron"]
    site: Site

    @property
    def auroc(self) -> Float[Tensor, "layer neuron"]:
        """Chance that a concept word has the higher activation than another word, ties counting half. float64.

        Words in one bin count as ties, so it is off by at most `auroc_error`.
        """
        concept, rest = self._shares()
        return (concept * (rest.cumsum(-1) - rest / 2)).sum(-1)

    @property
    def auroc_error(self) -> Float[Tensor, "layer neuron"]:
        """By how much `auroc` can differ from that of the words themselves, whatever their distribution.

        Half the chance that a concept word and another share a bin: with 127 bins about 0.006 for a normal neuron whose
        first batch was like the rest, 0.02 if its scale was ten times too large, 0.17 if ten times too small.
        """
        concept, rest = self._shares()
        return (concept * rest).sum(-1) / 2

    def _shares(self) -> Float[Tensor, "2 layer neuron bin"]:
        counts = self.counts.double()
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)


class BinCounts:
    """Collects `Histograms`: one count per layer and batch over (neuron, bin), and one over the concept's words.

    The bins of a neuron are fixed by at most 256 words of the first batch (their median, and their mean distance from
    it). The first batch holds the longest sentences, and may not be like the others: see `Histograms.auroc_error`.
    Memory is O(layers x neurons x bins).

    Raises:
        ValueError: the number of bins is not odd (the centre needs a bin).
    """

    def __init__(self, site: Site, classes: Classes, *, bins: int = 127):
        if bins < 3 or bins % 2 == 0:
            raise ValueError(f"bins must be an odd number of at least 3, got {bins}")
        self.site, self.bins = site, bins
        self.is_concept = torch.from_numpy(np.asarray(classes.carries)[np.asarray(classes.of_word)])
        size = (len(site.layers), site.width * bins)
        self.all = torch.zeros(size, dtype=torch.int32)
        self.concept = torch.zeros(size, dtype=torch.int32)
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: centre and scale of the bins."""
        self.not_finite = [False] * len(site.layers)
        self.rows: Tensor
        self.first_bin = torch.arange(site.width, dtype=torch.int32) * bins
        self.place = torch.empty(0, dtype=torch.int32)

    def begin(self, batch: Batch) -> None:
        """Which words of the batch are the concept's."""
        device = batch.words.device
        self.rows = self.is_concept[batch.words.cpu()].nonzero()[:, 0].to(device)
        self.first_bin, self.all, self.concept = (t.to(device) for t in (self.first_bin, self.all, self.concept))

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Count one layer's words."""
        if layer not in self.scales:
            centre, scale = _centre_and_scale(words)
            self.scales[layer] = processes.agreed(centre), processes.agreed(scale)
        centre, scale = self.scales[layer]
        if len(self.place) < len(words):
            self.place = torch.empty(words.shape, dtype=torch.int32, device=words.device)
        place, half = self.place[: len(words)], (self.bins - 1) / 2
        # A few words at a time, so that what is in between stays in the processor's cache: several times faster.
        step = max(1, 2**17 // self.site.width) if words.device.type == "cpu" else max(1, len(words))
        for part, into in zip(words.split(step), place.split(step), strict=True):
            distance = part - centre
            # u half = distance / ((scale + |distance|) / half), in as few sweeps over the numbers as there are
            u = distance.div_(torch.add(scale / half, distance.abs(), alpha=1 / half))
            if not u.sum().isfinite():
                self.not_finite[layer] = True
                return
            into.copy_(u.add_(half + 0.5)).add_(
                self.first_bin
            )  # the conversion cuts off the fraction, so 0.5 more rounds
        size = self.all.shape[1]
        self.all[layer] += torch.bincount(place.flatten(), minlength=size)
        self.concept[layer] += torch.bincount(place[self.rows].flatten(), minlength=size)

    def together(self) -> None:
        """Sum the counts over the processes; all count in the first one's bins."""
        bad = torch.tensor(self.not_finite, dtype=torch.int32)
        processes.sum_(self.all, self.concept, bad)
        self.not_finite = bad.bool().tolist()

    def histograms(self) -> Histograms:
        """The histograms, on the CPU.

        Raises:
            ValueError: activations that are not finite.
        """
        for name, bad in zip(self.site.layers, self.not_finite, strict=True):
            if bad:
                raise _not_finite(self.site, name)
        counts = torch.stack([self.concept, self.all - self.concept]).cpu()
        by_layer = zip(*(self.scales[layer] for layer in range(len(self.site.layers))), strict=True)
        centre, scale = (torch.stack(each).cpu() for each in by_layer)
        return Histograms(counts.view(2, *centre.shape, self.bins), centre, scale, self.site)


def _centre_and_scale(words: Float[Tensor, "word neuron"]) -> tuple[Tensor, Tensor]:
    """Median of each neuron and mean distance from it, over at most 256 words that are spread over the batch."""
    # On the CPU: elsewhere a median is not deterministic.
    some = words[:: -(-len(words) // 256)].cpu()
    centre = some.median(0).values
    distance = (some - centre).abs().mean(0)
    # A neuron that stood still here may move later, and a batch may be a few words: the layer's other neurons say what
    # a usual scale is, their spread if none of them moved.
    usual = distance.median()
    for other in (distance.mean(), (some - some.mean()).abs().mean(), torch.ones_like(usual)):
        usual = torch.where(usual > 0, usual, other)
    still = distance <= (ROUNDING * centre.abs()).clamp(min=1e-36)  # less would be lost in scale / half
    unsure = still | (len(some) < 16)
    scale = torch.where(unsure, torch.maximum(distance, usual), distance)
    return centre.to(words.device), scale.to(words.device)


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class WordSample:
    """Activations of a sample of words, for scores that need the words themselves.

    Half of the sample is the concept (every concept word, where there are fewer), so shares of classes are not those of
    the text.
    """

    activations: Float[Tensor, "word layer neuron"]
    words: Int[Tensor, " word"]
    """Index of each word in the corpus, ascending."""
    types: Int[Tensor, " word"]
    """Word type of each word, as in `Corpus.word`."""
    of_word: Int[Tensor, " word"]
    """Class of each word, an index into `class_names`."""
    group: Int[Tensor, " word"]
    """Sentence of each word: words of one sentence belong on one side of a split."""
    class_names: Strings
    site: Site
    seed: int
    """Of the draw, and of the splits and shuffles of whatever is fitted to it."""


class WordDraw:
    """Collects a `WordSample`: `n` words drawn from the whole text without replacement before the pass.

    Half are drawn from the concept's words and half from the others; where one side has too few, all of it is taken and
    the other side fills up. Words that the context cut off are never drawn. The draw depends on the text, `n` and
    `seed`, not on the model or the batches. Memory is n x layers x neurons values in float32, on the CPU.

    Raises:
        ValueError: n is below 2.
    """

    def __init__(self, site: Site, encoded: Encoded, classes: Classes, n: int = SAMPLE_WORDS, seed: int = 0):
        if n < 2:
            raise ValueError(f"a sample needs at least 2 words, one on each side, got n={n}")
        self.site, self.names, self.seed = site, classes.names, seed
        readable = encoded.read_words
        of_word = np.asarray(classes.of_word, dtype=np.int64)
        is_concept = np.asarray(classes.carries)[of_word[readable]]
        concept, rest = readable[is_concept], readable[~is_concept]
        n_concept = min(len(concept), max(n // 2, n - len(rest)))
        rng = np.random.default_rng(seed)
        parts = [
            rng.choice(side, size, replace=False)
            for side, size in ((concept, n_concept), (rest, min(len(rest), n - n_concept)))
        ]
        self.words = np.sort(np.concatenate(parts))
        self.types = encoded.corpus.word[self.words].astype(np.int64)
        self.of_word = of_word[self.words]
        self.group = np.searchsorted(encoded.corpus.start, self.words, side="right").astype(np.int64) - 1
        self.slot_of = np.full(encoded.corpus.n_words, -1, dtype=np.int64)
        self.slot_of[self.words] = np.arange(len(self.words))
        self.drawn = torch.zeros(len(self.words), len(site.layers), site.width)
        self.rows: Tensor
        self.slots: Tensor

    def begin(self, batch: Batch) -> None:
        """Which words of the batch were drawn."""
        slots = torch.from_numpy(self.slot_of[batch.words.cpu().numpy()])
        rows = (slots >= 0).nonzero()[:, 0]
        self.slots, self.rows = slots[rows], rows.to(batch.words.device)

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Keep one layer's drawn words."""
        if len(self.slots):
            self.drawn[self.slots, layer] = words[self.rows].cpu()

    def together(self) -> None:
        """Take the words that other processes read; here they are still 0."""
        processes.sum_(self.drawn)

    def sample(self) -> WordSample:
        """The drawn words.

        Raises:
            ValueError: activations that are not finite.
        """
        for name, words in zip(self.site.layers, self.drawn.unbind(1), strict=True):
            if not words.isfinite().all():
                raise _not_finite(self.site, name)
        words, types, of_word, group = map(torch.from_numpy, (self.words, self.types, self.of_word, self.group))
        return WordSample(self.drawn, words, types, of_word, group, self.names, self.site, self.seed)


@names.explained
def class_stats(
    model: Model | TransformerBridge,
    encoded: Encoded,
    classes: Classes,
    *,
    site: str | Site = "resid",
    max_tokens: int = MAX_TOKENS,
) -> ClassStats:
    """Class statistics of every neuron of a site in one pass (`stream` with `ClassSums` alone)."""
    place = site_of(bridge_of(model), site)
    sums = ClassSums(place, classes)
    stream(model, encoded, [sums], site=place, max_tokens=max_tokens)
    return sums.all()[0]


def _not_finite(site: Site, layer: str) -> ValueError:
    return ValueError(
        f"activations of {site.name} in layer {layer!r} are not finite (NaN or infinite), so there is nothing to "
        "measure; look at the model's weights and at the learning rate"
    )
