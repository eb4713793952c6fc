"""Which neurons carry a concept: streaming class statistics, and the scores that follow from them.

One pass over the probe corpus. A hook on every layer averages the sub-words of each word and adds the words to the
sums of their class; nothing is kept per word, so memory is O(classes x layers x neurons) whatever the corpus length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from beartype import beartype as typechecker
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.concept import Classes, Concept
from relearn_lens.corpus import Strings
from relearn_lens.encoding import Batch, Encoded
from relearn_lens.models import Tagger, hidden, reading, trunk
from relearn_lens.neurons import Neurons, Site, site_of, streaming

Contrast = Literal["classes", "rest"]


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


def class_stats(
    model: Tagger | TransformerBridge,
    encoded: Encoded,
    classes: Classes,
    *,
    site: str | Site = "resid",
    max_tokens: int = 4096,
    tick: Callable[[int], object] | None = None,
) -> ClassStats:
    """Class statistics of every neuron of a site in one pass; sub-words are averaged into words.

    Special tokens and padding are left out, and so are words that the model's context cut off. `tick` is called with
    the number of tokens of each batch.
    """
    bridge = model.bridge if isinstance(model, Tagger) else model
    place = site_of(bridge, site)
    device = next(trunk(bridge).parameters()).device
    sums = _Sums(place, len(classes.names))
    of_word = torch.from_numpy(classes.of_word)
    with reading(model), streaming(bridge, place, sums.add):
        for batch in encoded.batches(max_tokens=max_tokens):
            tokens = batch.n_tokens
            batch = sums.next(batch, of_word[batch.words], device)
            hidden(bridge, batch.ids, batch.mask)
            if tick:
                tick(tokens)
    return sums.stats(classes.names)


class _Sums:
    """Running sums of the words' activations and their squares, per class, layer and neuron.

    Both are taken after a shift by the first batch's mean: without it the squares of a neuron with a large mean would
    swallow its variance.
    """

    def __init__(self, site: Site, n_classes: int):
        self.site = site
        self.n_classes = n_classes
        self.count = torch.zeros(n_classes, dtype=torch.int64)
        self.first: list[Tensor | None] = [None] * len(site.layers)
        self.second: list[Tensor | None] = [None] * len(site.layers)
        self.shift: list[Tensor | None] = [None] * len(site.layers)
        self.batch: Batch

    def next(self, batch: Batch, of_word: Int[Tensor, " word"], device: torch.device) -> Batch:
        """Announce the batch whose activations come next and the class of each of its words; gives it on the device."""
        self.count += torch.bincount(of_word, minlength=self.n_classes)
        self.member = F.one_hot(of_word, self.n_classes).T.float().to(device)
        self.batch = batch.to(device)
        return self.batch

    def add(self, layer: int, activations: Float[Tensor, "sentence token neuron"]) -> None:
        """Add one layer's activations: two small matrix products for all classes together."""
        words = word_means(activations, self.batch)
        if self.shift[layer] is None:
            self.shift[layer] = words.mean(0)
            zero = torch.zeros(self.n_classes, self.site.width, dtype=_wide(words.device), device=words.device)
            self.first[layer], self.second[layer] = zero, zero.clone()
        first, second, shift = self.first[layer], self.second[layer], self.shift[layer]
        assert first is not None
        assert second is not None
        assert shift is not None
        words = words - shift
        first += self.member @ words
        second += self.member @ words.square()

    def stats(self, names: tuple[str, ...]) -> ClassStats:
        """The sums as means and squared deviations, on the CPU in float64."""
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
        count = rearrange(self.count, "c -> c 1 1")
        mean = first / count.clamp(min=1)
        return ClassStats(
            self.count,
            torch.where(count > 0, mean + shift, 0.0),
            (second - count * mean.square()).clamp(min=0),
            names,
            self.site,
        )


def word_means(activations: Float[Tensor, "sentence token neuron"], batch: Batch) -> Float[Tensor, "word neuron"]:
    """Activations averaged over the sub-words of each word of a batch, float32."""
    flat = rearrange(activations, "s t n -> (s t) n").float()
    # embedding_bag is a fused gather and mean, which is what averaging sub-words is.
    return F.embedding_bag(batch.subword, flat, batch.offset, mode="mean")


def _wide(device: torch.device) -> torch.dtype:
    """The widest float a device has for sums."""
    return torch.float32 if device.type == "mps" else torch.float64


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Saliency:
    """How much each neuron carries a concept, by one score; higher is more."""

    score: Float[Tensor, "layer neuron"]
    """float32 on the CPU."""
    kind: str
    unit: str
    concept: str
    site: Site

    def top(self, k: int | None = None, *, fraction: float | None = None) -> Neurons:
        """The `k` highest neurons, or a fraction of all, over all layers together; ties go to the earlier neuron.

        Raises:
            ValueError: neither or both are given, or out of range.
        """
        n = self.score.numel()
        if (k is None) == (fraction is None):
            raise ValueError("give k= or fraction=, one of them")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
        k = round(fraction * n) if fraction is not None else k
        if k is None or not 0 < k <= n:
            raise ValueError(f"k must be 1 to {n} (the neurons of {self.site.name}), got {k}")
        order = self.score.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[:k]] = True
        return Neurons(mask.view_as(self.score), self.site)

    def rank(self, among: Neurons | None = None) -> Float[Tensor, "layer neuron"]:
        """Rank of each neuron, 0 the most salient; ties share their mean rank.

        With `among`, ranks count only those neurons, and the others are NaN.
        """
        mask = torch.ones_like(self.score, dtype=torch.bool) if among is None else among.mask
        rank = torch.full_like(self.score, torch.nan)
        rank[mask] = torch.from_numpy(rankdata(-self.score[mask].double().numpy()) - 1).float()
        return rank

    def by_rank(self, among: Neurons | None = None, *, bucket: int = 1) -> Float[Tensor, "layer neuron"]:
        """Rank saliency, 1 the most salient neuron and 0 the least; no unit.

        s = |(floor(i / b) + 1 - N / b) / (1 - N / b)| for rank i of N neurons. As it is a rank, its mean over all
        neurons is fixed: one layer can only gain what another loses. Source: Lo et al. 2024, section 3, where b is
        100; ours is 1 by default, and neurons that tie share their mean rank.
        """
        rank = self.rank(among)
        buckets = (~rank.isnan()).sum() / bucket
        if buckets <= 1:
            return torch.where(rank.isnan(), torch.nan, 1.0)
        return (((rank / bucket).floor() + 1 - buckets) / (1 - buckets)).abs()

    def __repr__(self) -> str:
        best = next(iter(self.top(1)))
        highest = f"highest {best} at {self.score.max():.3g} {self.unit}"
        return f"Saliency({self.concept}, {self.kind}, {self.site.name}; {highest})"


@dataclass(frozen=True)
class Score:
    """A way to turn class statistics into one number per neuron."""

    name: str
    unit: str
    says: str
    of: Callable[[ClassStats, Bool[Tensor, " class"], Contrast], Float[Tensor, "layer neuron"]]


def probeless(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "classes"
) -> Float[Tensor, "layer neuron"]:
    """Probeless: r(z) = sum over classes z' != z of |mean(z) - mean(z')|, in activation units.

    No variance normalisation. The classes that carry the concept are pooled into one. `contrast="classes"` is the sum
    over every other class that has words; `"rest"` pools those too, which is the two-class form
    |mean(concept) - mean(all others)|. Source: Antverg & Belinkov 2022, equation 2.
    """
    seen = stats.count > 0
    concept = stats.pooled(carries & seen)
    if contrast == "rest":
        return (concept - stats.pooled(~carries & seen)).abs()
    return (concept - stats.mean[~carries & seen]).abs().sum(0)


SCORES: dict[str, Score] = {
    "probeless": Score(
        "probeless",
        "activation",
        "summed distance of the concept's mean from each other class's mean",
        probeless,
    ),
}


def saliency(
    stats: ClassStats,
    concept: Concept,
    carries: Bool[Tensor, " class"],
    *,
    score: str | Score | Callable = "probeless",
    contrast: Contrast = "classes",
) -> Saliency:
    """Score every neuron for a concept from class statistics.

    `score` is a name, a `Score`, or a function `(stats, carries, contrast) -> Float["layer neuron"]`.

    Raises:
        ValueError: the score or the contrast is not known.
    """
    how = score_of(score, contrast)
    for side, which in (("no word that carries", carries), ("no word that does not carry", ~carries)):
        if not int(stats.count[which].sum()):
            raise ValueError(
                f"{side} concept {concept.name!r} was measured (words that the context cut off are not); use a larger "
                "probe corpus, or long='split'"
            )
    return Saliency(how.of(stats, carries, contrast).float().cpu(), how.name, how.unit, concept.name, stats.site)


def score_of(score: str | Score | Callable, contrast: str = "classes") -> Score:
    """A score by name; a `Score` or a function is taken as it is.

    Raises:
        ValueError: the score or the contrast is not known.
    """
    if contrast not in get_args(Contrast):
        raise ValueError(f"unknown contrast {contrast!r}; known: {', '.join(get_args(Contrast))}")
    if isinstance(score, Score):
        return score
    if callable(score):
        name = getattr(score, "__name__", "score")
        return Score(name, "", (score.__doc__ or "").strip(), score)
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
    return SCORES[score]
