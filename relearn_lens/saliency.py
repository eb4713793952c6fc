"""Which neurons carry a concept: one number per neuron, its ranking, and the scores that give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, jaxtyped
from scipy.stats import rankdata
from torch import Tensor

from relearn_lens.concept import Concept
from relearn_lens.neurons import Neurons, Site
from relearn_lens.streams import ClassStats

Contrast = Literal["classes", "rest"]


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
