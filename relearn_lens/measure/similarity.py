"""Activation similarity before and after: which neuron of the new model does what a neuron of the old one did.

1. Both models read the same batch; sub-words are averaged into words, and each neuron gets a number per word.
2. The products of every neuron before with every neuron after are summed over the words, and within a layer those of
   its neurons with each other. Nothing is kept per word, so memory does not depend on the length of the text.
3. Where all pairs do not fit in memory, the neurons before are taken in parts, and the text is read once for each.
4. From the sums: correlation of each neuron with itself, its best match anywhere and what chance gives for that, the
   flow from layer to layer, and linear CKA.

Source of CKA: Kornblith, Norouzi, Lee, Hinton 2019 ("Similarity of neural network representations revisited"). The
best match of one neuron among all of another network is the maximum matching of Li et al. 2015; ours goes over layers.

Similar activations do not tell whether something is still known: of the measures of unlearning compared in the paper of
the unlearning depth score (2026), CKA was among the least robust (.013, where depth had .900). For facts, measure
`"depth"` or `"inside"`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from beartype import beartype as typechecker
from einops import rearrange
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens import names, progress
from relearn_lens.methods import MAX_TOKENS, MEMORY, megabytes
from relearn_lens.models.model import Model, bridge_of, encoded_for, hidden, lent, reading, widest
from relearn_lens.neurons.sites import Neurons, Site, site_of, streaming
from relearn_lens.neurons.streaming import word_means
from relearn_lens.text.concept import Concept, concept_of
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded

Which = Literal["all", "concept"]

PROBES = 64
"""Neurons whose words are paired at random to learn what chance gives."""
CONSTANT, DEAD = 1e-5, 1e-12
"""A neuron is constant if its standard deviation is at most these shares of its mean and of the largest standard
deviation of all neurons (trained models have some with a gain of 1e-30). Rounding in a forward pass moves a neuron by
up to about 1e-6 of its mean (measured, by other batches and on other processors), so that below ten times as much it is
in good part rounding that would correlate."""


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class ActivationSimilarity:
    """How alike the neurons of two models are over the same words; correlations are Pearson's, -1 to 1.

    Rows are neurons or layers before. A neuron that is constant over the words correlates with nothing: it is NaN in
    `same` if constant on either side, in `best` if constant before.
    """

    same: Float[Tensor, "layer neuron"]
    """Each neuron before with itself after."""
    best: Float[Tensor, "layer neuron"]
    """Each neuron before with the neuron after, of any layer, whose correlation is largest in size; with its sign."""
    best_layer: Int[Tensor, "layer neuron"]
    """Position of that neuron's layer in `site.layers`; -1 where `best` is NaN."""
    best_neuron: Int[Tensor, "layer neuron"]
    """Its index within the layer; -1 where `best` is NaN."""
    flow: Float[Tensor, "before after"]
    """Share of a layer's neurons (constant ones left out) whose best match is in each layer after; rows sum to 1."""
    cka: Float[Tensor, "before after"]
    """Linear centred kernel alignment of a layer before and a layer after, 0 to 1. It is the biased estimator: with
    fewer words than neurons in a layer it is near 1 whatever the models. It says little of what is still known."""
    chance: float
    """Mean over some neurons before of the best |correlation| they reach with their words paired at random."""
    chance_high: float
    """95th percentile of the same."""
    which: Which
    """Over which words."""
    n_words: int
    site: Site

    def above_chance(self, neurons: Neurons | None = None) -> float:
        """Share of neurons (constant ones left out) whose best match is above `chance_high`: 0.05 is chance."""
        if neurons is not None and neurons.site != self.site:
            raise ValueError(
                f"these neurons are of site {neurons.site.name!r} of a model with {neurons.site.n_neurons:,} of them, "
                f"the similarity of {self.site.name!r} with {self.site.n_neurons:,}; give neurons of its own site"
            )
        mask = ~self.best.isnan() if neurons is None else ~self.best.isnan() & neurons.mask
        return float((self.best[mask].abs() > self.chance_high).float().mean())

    def __repr__(self) -> str:
        return (
            f"ActivationSimilarity({self.which}, {self.site.name}, {self.n_words:,} words; median correlation "
            f"{self.same.nanmedian():.2f} with itself, {self.best.abs().nanmedian():.2f} with the best match, "
            f"{self.chance:.2f} by chance)"
        )


@dataclass(frozen=True)
class Plan:
    """How the pairs of neurons are gone through: so many at a time."""

    passes: int
    """Times that both models read the text."""
    neurons_per_pass: int
    """Neurons before whose products with all neurons after are summed in one pass."""
    words_per_batch: int
    """No batch has more."""
    n_bytes: int
    """Most memory of the sums and of one batch's words, on the models' device."""


def compared_words(encoded: Encoded, concept: Concept | str | None) -> dict[Which, np.ndarray]:
    """Which words of a text are compared: `"all"` and, with a concept, those of `"concept"`.

    Raises:
        ValueError: fewer than 3 of either.
    """
    chosen: dict[Which, np.ndarray] = {"all": np.ones(encoded.corpus.n_words, dtype=bool)}
    if concept is not None:
        classes = concept_of(concept).classes(encoded.corpus)
        chosen["concept"] = classes.carries[classes.of_word]
    for which, words in chosen.items():
        if (n := int(words[encoded.read_words].sum())) < 3:
            raise ValueError(
                f"a correlation needs at least 3 words, and {encoded.corpus.name!r} has {n} ({which} words; those that "
                "the context cut off are not measured); use a larger text"
            )
    return chosen


@names.explained
def activation_similarity(
    before: Model | TransformerBridge | Mapping[str, Tensor],
    after: Model | TransformerBridge,
    text: Corpus | Encoded,
    *,
    concept: Concept | str | None = None,
    site: str | Site = "resid",
    max_memory: float | int = MEMORY,
    max_tokens: int = MAX_TOKENS,
    on_plan: Callable[[Plan], object] | None = None,
) -> dict[str, ActivationSimilarity]:
    """Which neuron after does what each neuron did before: `"all"` words and, with a concept, those of `"concept"`.

    `before` is another model of the same shape, or weights that `after.weights()` gave (keep clones): they are put into
    `after` for each batch and its own put back. Results are float32 on the CPU.

    Memory: with L layers of N neurons, at most W words a batch, r neurons before a pass, and G = 2 with a concept (its
    words have sums of their own), else 1: `4 G (N ((L + 2) r + 64 L) + W (r + 4 N + 384))` bytes beside the models,
    never more than `max_memory` MB. r is as many as fit; ceil(L N / r) passes are made. `on_plan` gets the `Plan`
    before the first forward pass. Progress is in tokens, of each model and each pass.

    Accuracy: words are centred by their batch, whose mean then counts by its distance from that of all words before, so
    that neither a large mean nor a first batch unlike the rest swallows the variance (Chan, Golub, LeVeque 1979).
    Products add up in float32, means and squares of single neurons in float64. On MiniLM every correlation is within
    1e-6 of float64's (on CUDA with torch's default of no TF32 in matrix products).

    Chance: the best of many correlations is large by itself when words are few. For 64 neurons before, each word gets
    the activation of a random other word (of the batch before; in the first batch, of its own), and the best match is
    found as for the others. Heavy tails and likeness among the neurons after are so those of the data, which
    the closed form for independent normal neurons would miss. Words count as exchangeable.

    Raises:
        ValueError: models of other shapes, vocabularies or devices; weights of another model; fewer than 3 words; not
            even one neuron fits `max_memory`; activations that are not finite.
    """
    place, first = _checked(before, after, site)
    context = min(int(bridge_of(model).cfg.n_ctx) for model in (first, after))
    encoded = encoded_for(after, text, context=context)
    chosen = compared_words(encoded, concept)
    plan = _plan(place, encoded, len(chosen), megabytes(max_memory), max_tokens)
    device = next(bridge_of(after).original_model.parameters()).device
    parts: dict[Which, list[_Part]] = {which: [] for which in chosen}
    if on_plan:
        on_plan(plan)
    with reading(first), reading(after), _wardrobe(before, after) as wear:
        for start in range(0, place.n_neurons, plan.neurons_per_pass):
            moments = {which: _Moments(place, start, plan, device) for which in chosen}
            for batch in encoded.batches(max_tokens=max_tokens):
                here = batch.to(device)
                index = [torch.from_numpy(np.flatnonzero(x[batch.words.numpy()])).to(device) for x in chosen.values()]
                picked = [(m, at) for m, at in zip(moments.values(), index, strict=True) if len(at)]
                for side, model in (("before", first), ("after", after)):
                    wear(side)
                    _read(model, place, here, [(getattr(m, side), at) for m, at in picked])
                    progress.advance(batch.n_tokens)
            for which in chosen:
                parts[which].append(moments.pop(which).finish())
    return {which: _result(which, sums, place) for which, sums in parts.items()}


def _read(
    model: Model | TransformerBridge, site: Site, batch: Batch, visits: Sequence[tuple[Callable, Tensor]]
) -> None:
    """One forward pass, whose words are handed over layer by layer: to each visitor those that it picks."""

    def see(layer: int, activations: Tensor) -> None:
        words = word_means(activations, batch)
        for visit, index in visits:
            visit(layer, words if len(index) == len(words) else words[index])

    # The hooks of one model are gone before the other runs: they may be the same module.
    with streaming(bridge_of(model), site, see):
        hidden(bridge_of(model), batch.ids, batch.mask)


class _Sums:
    """Mean and summed squared deviation of some neurons, batch by batch."""

    def __init__(self, neurons: int, device: torch.device):
        wide = widest(device)
        self.mean, self.m2 = torch.zeros(2, neurons, device=device, dtype=wide)

    def add(self, neurons: slice, words: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Count the words of a batch after so many that were `seen`.

        What products need of it: the words less their mean, and a row that stands for the distance of this mean from
        that of the words before.
        """
        n, near = len(words), words.mean(0)
        words = words - near
        rest = words.mean(0)  # what float32 could not say of a large mean
        words -= rest
        gap = near.to(self.mean.dtype) + rest - self.mean[neurons]
        weight = seen * n / (seen + n)
        self.mean[neurons] += gap * (n / (seen + n))
        self.m2[neurons] += words.square().sum(0) + weight * gap.square()
        return words, (gap * weight**0.5).float()

    def inverse(self, n: int) -> Tensor:
        """1 / norm of the centred activations of `n` words; 0 if constant."""
        spread = (self.m2 / n).sqrt()
        varies = spread > torch.maximum(CONSTANT * self.mean.abs(), DEAD * spread.max())
        return torch.where(varies, self.m2.rsqrt(), 0.0).float()


class _Part(NamedTuple):
    """What one pass finds for its neurons before, and what it adds to the squared norms of the layers."""

    same: Tensor
    best: Tensor
    at: Tensor
    chance: Tensor
    cross: Tensor
    within: Tensor
    n_words: int


class _Moments:
    """Over some words: products of the neurons `start` to `stop` before (over all layers) with every neuron after."""

    def __init__(self, site: Site, start: int, plan: Plan, device: torch.device):
        self.site, self.layers, self.width, self.device = site, len(site.layers), site.width, device
        self.start, self.stop = start, min(start + plan.neurons_per_pass, site.n_neurons)
        self.rng = torch.Generator().manual_seed(0)
        self.probes = torch.randperm(site.n_neurons, generator=self.rng)[:PROBES].sort().values
        self.rows, extra = self.stop - start, len(self.probes)
        self.left, self.right = _Sums(site.n_neurons + extra, device), _Sums(site.n_neurons, device)
        # Words paired at random are columns of their own behind the neurons.
        self.cross = torch.zeros(self.layers, self.rows + extra, self.width, device=device)
        self.gram = torch.zeros(2, self.rows, self.width, device=device)
        self.words = torch.zeros(plan.words_per_batch, self.rows + extra, device=device)
        self.gaps = torch.zeros(self.rows + extra, device=device)
        self.pool = torch.zeros(0, extra, device=device)
        self.n = self.seen = self.n_words = 0

    def _mine(self, layer: int) -> tuple[slice, slice, slice]:
        """All neurons of a layer; those of this pass among them; and the rows that these are."""
        first = layer * self.width
        low, high = (min(max(x - first, 0), self.width) for x in (self.start, self.stop))
        skip = first - self.start
        return slice(first, first + self.width), slice(low, high), slice(skip + low, skip + high)

    def before(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """One layer's words before, kept for the batch."""
        if layer == 0:
            self.n, self.seen = len(words), self.n_words
            self.n_words += self.n
            self.probed = words.new_empty(self.n, len(self.probes))
        every, mine, rows = self._mine(layer)
        here = self.probes // self.width == layer
        self.probed[:, here.to(self.device)] = words[:, (self.probes[here] % self.width).to(self.device)]
        words, gap = self.left.add(every, words, self.seen)
        self.words[: self.n, rows], self.gaps[rows] = words[:, mine], gap[mine]
        self.gram[0, rows].addmm_(words[:, mine].T, words).addr_(gap[mine], gap)

    def after(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """One layer's words after, multiplied with those before."""
        if layer == 0:
            self._pair()
        every, mine, rows = self._mine(layer)
        words, gap = self.right.add(every, words, self.seen)
        self.cross[layer].addmm_(self.words[: self.n].T, words).addr_(self.gaps, gap)
        self.gram[1, rows].addmm_(words[:, mine].T, words).addr_(gap[mine], gap)

    def _pair(self) -> None:
        """Give the probes' columns the activations of random other words."""
        past = self.pool if len(self.pool) else self.probed
        order = torch.randperm(len(past), generator=self.rng).to(self.device)
        draw = order.repeat(-(-self.n // len(past)))[: self.n]
        # Each word is drawn about once, so that the columns keep their tails; what is not drawn now is drawn later.
        self.pool = torch.cat([past[order[self.n :]], self.probed])
        drawn, gap = self.left.add(slice(self.site.n_neurons, None), past[draw], self.seen)
        self.words[: self.n, self.rows :], self.gaps[self.rows :] = drawn, gap

    def finish(self) -> _Part:
        """From products to correlations and norms; the products are used up."""
        n = self.n_words
        for side, sums in (("before", self.left), ("after", self.right)):
            if not sums.m2.isfinite().all():
                layer = self.site.layers[int((~sums.m2.isfinite()).nonzero()[0]) // self.width]
                raise ValueError(
                    f"activations of {self.site.name} in layer {layer!r} of the model {side} are not finite (NaN or "
                    "infinite), so there is nothing to compare; look at its weights and at the learning rate"
                )
        inverse0, inverse1 = self.left.inverse(n), self.right.inverse(n)
        mine = [*range(self.start, self.stop), *range(self.site.n_neurons, len(inverse0))]
        inverse = rearrange(inverse0[mine], "r -> r 1")
        same, best = torch.zeros(self.rows), torch.zeros(len(mine), device=self.device)
        at = torch.full_like(best, -1, dtype=torch.int64)
        cross = torch.zeros(self.layers, self.layers, dtype=torch.float64)
        within = torch.zeros(2, self.layers, dtype=torch.float64)
        for layer, block in enumerate(self.cross):
            every, own, rows = self._mine(layer)
            cross[:, layer] = torch.tensor([_square(block[self._mine(k)[2]]) for k in range(self.layers)])
            within[:, layer] = torch.tensor([_square(gram[rows]) for gram in self.gram])
            block.mul_(inverse).mul_(inverse1[every])
            same[rows] = block[rows, own].diagonal().cpu()
            for value, index in (block.max(1), block.min(1)):
                better = value.abs() > best.abs()
                best, at = torch.where(better, value, best), torch.where(better, index + every.start, at)
        constant = (inverse0[self.start : self.stop] * inverse1[self.start : self.stop] == 0).cpu()
        same, best, at = same.clamp(-1, 1).masked_fill(constant, torch.nan), best.clamp(-1, 1).cpu(), at.cpu()
        best[at < 0] = torch.nan
        return _Part(same, best[: self.rows], at[: self.rows], best[self.rows :].abs(), cross, within, n)


def _square(block: Tensor) -> float:
    """Sum of squares."""
    return float(block.norm()) ** 2


def _result(which: Which, parts: Sequence[_Part], site: Site) -> ActivationSimilarity:
    same, best, at = (torch.cat(x).view(len(site.layers), -1) for x in list(zip(*parts, strict=True))[:3])
    layer, neuron = (torch.where(at < 0, -1, x) for x in (at // site.width, at % site.width))
    within = torch.stack([part.within for part in parts]).sum(0).sqrt()
    cka = (torch.stack([part.cross for part in parts]).sum(0) / within[0].outer(within[1])).clamp(max=1).float()
    chance, high = float(parts[0].chance.nanmean()), float(parts[0].chance.nanquantile(0.95))
    n = parts[0].n_words
    hits = torch.stack([(layer == k).sum(1) for k in range(len(layer))], 1)
    flow = hits / rearrange((layer >= 0).sum(1), "l -> l 1")
    return ActivationSimilarity(same, best, layer, neuron, flow, cka, chance, high, which, n, site)


def _plan(site: Site, encoded: Encoded, groups: int, max_bytes: int, max_tokens: int) -> Plan:
    layers, width = len(site.layers), site.width
    words = min(encoded.corpus.n_words, max(max_tokens, int(encoded.lengths.max())))
    fixed = 4 * groups * (width * PROBES * layers + words * (4 * width + 6 * PROBES))
    each = 4 * groups * (width * (layers + 2) + words)
    fits = min(site.n_neurons, (max_bytes - fixed) // each)
    if fits < 1:
        raise ValueError(
            f"max_memory of {max_bytes:,} bytes does not hold the products of a single neuron of {site.name} with all "
            f"others: {fixed + each:,} bytes are needed with up to {words:,} words a batch; allow more, or a smaller "
            "max_tokens"
        )
    passes = -(-site.n_neurons // fits)
    rows = -(-site.n_neurons // passes)
    return Plan(passes, rows, words, fixed + rows * each)


def _checked(
    before: Model | TransformerBridge | Mapping[str, Tensor], after: Model | TransformerBridge, site: str | Site
) -> tuple[Site, Model | TransformerBridge]:
    """The site of both models, and the module that is run as the one before."""
    name = site if isinstance(site, str) else site.name
    place = site_of(bridge_of(after), name)
    if isinstance(before, Mapping):
        if not isinstance(after, Model):
            raise ValueError(
                "weights before are put into a Tagger or LanguageModel, and the model after is a bridge; give one of "
                "these"
            )
        mine = after.weights()
        if any(key in mine and mine[key].data_ptr() == value.data_ptr() for key, value in before.items()):
            raise ValueError(
                "the weights before are the tensors of the model after, not clones, so they changed with it; keep "
                "{name: value.clone() for name, value in tagger.weights().items()}"
            )
        return place, after
    bridges, sites = (bridge_of(before), bridge_of(after)), (site_of(bridge_of(before), name), place)
    devices = [next(bridge.original_model.parameters()).device for bridge in bridges]
    if sites[0] != place or devices[0] != devices[1]:
        shapes = [
            f"{bridge.cfg.architecture}, {len(s.layers)} layers of {s.width}, on {device}"
            for bridge, s, device in zip(bridges, sites, devices, strict=True)
        ]
        raise ValueError(
            f"neurons of {name} pair up between a model and a pruned or retrained copy of it on the same device; "
            f"before is {shapes[0]}; after is {shapes[1]}"
        )
    words = [bridge.tokenizer for bridge in bridges]
    if words[0] is not words[1] and words[0].get_vocab() != words[1].get_vocab():
        raise ValueError("the two models cut words by different vocabularies; compare models that share a tokenizer")
    return place, before


@contextlib.contextmanager
def _wardrobe(before: object, after: Model | TransformerBridge) -> Iterator[Callable[[str], None]]:
    """`wear(side)` puts the weights of a side into the model, where `before` is weights; its own come back."""
    if not isinstance(before, Mapping) or not isinstance(after, Model):
        yield lambda side: None
        return
    with lent(after) as own:
        after.load_weights(before)  # refuses another model's weights before anything is run
        yield lambda side: after.load_weights(before if side == "before" else own)
