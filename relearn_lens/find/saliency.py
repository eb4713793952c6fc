"""Which neurons carry a concept: one number per neuron, its ranking, and the scores that give it.

A score is computed from what a pass over a text gathers: class statistics, histograms, or a sample of words. One pass
gathers all of them (`gather`), for any number of scores (`score_many`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.find.probes import Quality, elastic_net, k_sparse
from relearn_lens.methods import MAX_TOKENS, MEMORY, SAMPLE_WORDS, megabytes
from relearn_lens.models.model import Model, bridge_of
from relearn_lens.names import explained, known_name
from relearn_lens.neurons.sites import Neurons, Site, ordered, site_of
from relearn_lens.neurons.streaming import (
    ROUNDING,
    BinCounts,
    ClassStats,
    ClassSums,
    Collector,
    Histograms,
    Reader,
    WordDraw,
    WordSample,
    stream,
)
from relearn_lens.text import markup
from relearn_lens.text.concept import Classes, Concept
from relearn_lens.text.encoding import Encoded

Contrast = Literal["classes", "rest"]
Needs = Literal["stats", "histograms", "sample", "words"]
"""What a score is computed from: `ClassStats`, `Histograms`, a `WordSample`, or every word of a small text.

"words" is a `WordSample` of all words where the text is small enough to be kept, and `Histograms` where it is not.
"""


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
    quality: Quality | None = None
    """Of the probe on held-out words, for scores that are fitted."""
    bucket: int = 1
    """Neurons per step of `by_rank`."""

    @explained
    def top(self, k: int | None = None, *, fraction: float | None = None, among: Neurons | None = None) -> Neurons:
        """The `k` highest neurons, or a fraction of all, over all layers together; ties go to the earlier neuron.

        With `among`, only those neurons are there to be taken, as after others were pruned: where a neuron is cut off
        from what reads it alone, its own activations stay as salient as they were.

        Raises:
            ValueError: neither or both are given, or out of range.
        """
        n = self.score.numel() if among is None else len(among)
        if (k is None) == (fraction is None):
            raise ValueError("give k= or fraction=, one of them")
        if isinstance(k, float):
            raise ValueError(f"k is a number of neurons, got {k}; a share of them is top(fraction={k:g})")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
        k = round(fraction * n) if fraction is not None else k
        if k is None or not 0 < k <= n:
            which = f"of {self.site.name}" if among is None else "that are compared"
            raise ValueError(f"k must be 1 to {n} (the neurons {which}), got {k}")
        return Neurons.highest(self.score, self.site, k, among)

    def rank(self, among: Neurons | None = None) -> Float[Tensor, "layer neuron"]:
        """Rank of each neuron, 0 the most salient; ties share their mean rank.

        With `among`, ranks count only those neurons, and the others are NaN.
        """
        mask = torch.ones_like(self.score, dtype=torch.bool) if among is None else among.mask
        rank = torch.full_like(self.score, torch.nan)
        rank[mask] = torch.from_numpy(rankdata(-self.score[mask].double().numpy()) - 1).float()
        return rank

    def by_rank(self, among: Neurons | None = None, *, bucket: int | None = None) -> Float[Tensor, "layer neuron"]:
        """Rank saliency, 1 the most salient neuron and 0 the least; no unit.

        s = |(floor(i / b) + 1 - N / b) / (1 - N / b)| for rank i of N neurons; b is `bucket`, by default the
        saliency's own. As it is a rank, its mean over all neurons is fixed: one layer can only gain what another
        loses. Source: Lo et al. 2024, section 3, where b is 100; ours is 1 by default, and neurons that tie share
        their mean rank.
        """
        rank, bucket = self.rank(among), bucket or self.bucket
        buckets = (~rank.isnan()).sum() / bucket
        if buckets <= 1:
            return torch.where(rank.isnan(), torch.nan, 1.0)
        return (((rank / bucket).floor() + 1 - buckets) / (1 - buckets)).abs()

    def __repr__(self) -> str:
        best = next(iter(self.top(1)))
        highest = f"highest {best} at {self.score.max():.3g} {self.unit}"
        return f"Saliency({self.concept}, {self.kind}, {self.site.name}; {highest})"

    def _repr_html_(self) -> str:
        """The highest neurons, and the mean rank of each layer."""
        scores = self.score.flatten()
        rows = [[self.site.neuron(i), f"{scores[i]:.4g}"] for i in ordered(scores)[:8].tolist()]
        means = dict(zip(self.site.layers, self.by_rank().nanmean(1).tolist(), strict=True))
        return markup.box(
            repr(self),
            markup.bars(["layer", "mean rank saliency (0.5 is chance)"], means),
            markup.table(["highest neurons", self.unit], rows),
        )


@dataclass(frozen=True)
class Score:
    """A way to turn what a pass gathered into one number per neuron."""

    name: str
    unit: str
    says: str
    of: Callable[..., Tensor | tuple[Tensor, Quality]]
    """`(what it needs, carries["class"], contrast) -> Float["layer neuron"]`; a fitted score returns it with its
    `Quality`."""
    needs: Needs = "stats"


def probeless(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
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


def difference(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """mean(concept) - mean(all other words), in activation units, signed.

    So `top` finds neurons that rise with the concept; those that fall with it are at the other end. `contrast` is not
    used, here and below: a signed difference is from all other words together.
    """
    return stats.pooled(carries) - stats.pooled(~carries)


def signed_dprime(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """d' = (mean(concept) - mean(rest)) / pooled standard deviation; in standard deviations, 0 for a constant neuron.

    Pooled: the root of the summed squared deviations of both sides, each from its own mean, over their words less 2.
    """
    concept, rest = stats.merged(carries, "concept"), stats.merged(~carries, "rest")
    n = int(stats.count.sum())
    sd = ((concept.m2 + rest.m2)[0] / max(n - 2, 1)).sqrt()
    # A side without any spread would make it infinite: the spread is at least what float32 resolves.
    distance = (concept.mean - rest.mean)[0] / torch.maximum(sd, stats.resolution)
    return torch.where(stats.constant, 0.0, distance)


def dprime_of_each(stats: ClassStats) -> Float[Tensor, "class layer neuron"]:
    """`signed_dprime` of each class against all other words; 0 where it has no words or all of them."""
    total = int(stats.count.sum())
    nothing = torch.zeros_like(stats.mean[0])
    return torch.stack(
        [
            signed_dprime(stats, torch.arange(len(stats.count)) == k) if 0 < n < total else nothing
            for k, n in enumerate(stats.count.tolist())
        ]
    )


def dprime(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """|d'|, so that neurons that fall with the concept rank with those that rise; see `signed_dprime`."""
    return signed_dprime(stats, carries, contrast).abs()


def signed_point_biserial(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """Correlation of the neuron with 1 for concept words and 0 for all others; -1 to 1, 0 for a constant neuron."""
    share = stats.count[carries].sum() / stats.count.sum()
    sd = stats.total.variance[0].sqrt()
    r = difference(stats, carries) * (share * (1 - share)).sqrt() / torch.where(sd > 0, sd, 1.0)
    return torch.where(stats.constant, 0.0, r.clamp(-1, 1))


def point_biserial(
    stats: ClassStats, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """|r|, so that neurons that fall with the concept rank with those that rise; see `signed_point_biserial`."""
    return signed_point_biserial(stats, carries, contrast).abs()


def auroc(
    words: WordSample | Histograms, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """AUROC of the neuron as a detector of concept words, in whichever direction detects; 0.5 to 1.

    Exact (as `auroc_exact`) where all words of the text were kept, and else from histograms of all words:
    `Histograms.auroc_error` bounds the error, `Histograms.auroc` has the direction. The histograms know which words are
    the concept's, so `carries` is not used with them. The unit of the `Saliency` says which it is.
    """
    if isinstance(words, WordSample):
        return auroc_exact(words, carries)
    return torch.maximum(words.auroc, 1 - words.auroc)


def auroc_exact(
    sample: WordSample, carries: Bool[Tensor, " class"], contrast: Contrast = "rest"
) -> Float[Tensor, "layer neuron"]:
    """AUROC of the neuron as a detector of concept words, in whichever direction detects; 0.5 to 1, ties count half.

    Exact on the sample's words; its error is that of having sampled. A constant neuron has 0.5.
    """
    is_concept = carries[sample.of_word].numpy()
    few, many = sorted((is_concept, ~is_concept), key=np.count_nonzero)
    rows = []
    for activations in sample.activations.float().unbind(1):
        words = activations.numpy()
        # The smaller side's words find their places among the sorted words of the other.
        small, large = (torch.from_numpy(np.sort(np.ascontiguousarray(words[side].T))) for side in (few, many))
        places = [torch.searchsorted(large, small, right=right).sum(1) for right in (False, True)]
        a = (places[0] + places[1]).double() / (2 * small.shape[1] * large.shape[1])
        constant = torch.from_numpy(np.ptp(words, axis=0) <= ROUNDING * np.abs(words).max(axis=0))
        rows.append(torch.where(constant, 0.5, torch.maximum(a, 1 - a)))
    return torch.stack(rows)


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score(
            "probeless",
            "activation",
            "summed distance of the concept's mean from each other class's mean",
            probeless,
        ),
        Score(
            "difference",
            "activation",
            "the concept's mean less that of all other words, signed: neurons that rise with the concept come first",
            difference,
        ),
        Score(
            "dprime",
            "standard deviations",
            "distance of the concept's mean from that of all other words, over the pooled standard deviation",
            dprime,
        ),
        Score(
            "point_biserial",
            "|correlation|",
            "size of the correlation with 1 for the concept's words and 0 for all others",
            point_biserial,
        ),
        Score(
            "auroc",
            "AUROC 0.5 to 1",
            "how well the neuron alone, in either direction, tells the concept's words; of all words",
            auroc,
            "words",
        ),
        Score(
            "auroc_exact",
            "AUROC 0.5 to 1",
            "how well the neuron alone, in either direction, tells the concept's words; exact, on a sample of words",
            auroc_exact,
            "sample",
        ),
        Score(
            "elastic_net",
            "|logit| per standard deviation",
            "size of the weight in a logistic regression on all neurons with an elastic net; fitted to a sample",
            elastic_net,
            "sample",
        ),
        Score(
            "k_sparse",
            "1 / place",
            "place in the order in which probes of 1, 2, 4, ... neurons take neurons in; fitted to a sample",
            k_sparse,
            "sample",
        ),
    )
}


@dataclass(frozen=True, eq=False)
class Gathered:
    """What one pass gathered; None for what was not asked for."""

    stats: ClassStats | None = None
    histograms: Histograms | None = None
    sample: WordSample | None = None
    words: WordSample | None = None
    """Every word; None of a text that is too large, which `histograms` then stand for."""
    shuffled: tuple[ClassStats, ...] = ()
    """Class statistics under each relabelling."""


def gather(
    model: Model | TransformerBridge,
    encoded: Encoded,
    classes: Classes,
    needs: Collection[Needs] = ("stats",),
    *,
    site: str | Site = "resid",
    relabelled: Sequence[Int[np.ndarray, " word"]] = (),
    sample_words: int = SAMPLE_WORDS,
    max_memory: float | int = MEMORY,
    seed: int = 0,
    readers: Sequence[Reader] = (),
    max_tokens: int = MAX_TOKENS,
) -> Gathered:
    """What scores need, in one pass over a text; `sample_words` words and `seed` are the sample's (`WordDraw`).

    Where "words" are needed, all of them are kept if they take at most `max_memory` MB (words x layers x neurons x 4
    bytes), and histograms are made of them if not.

    `relabelled` are further ways to cut the words into classes (label shuffles), for class statistics alone; `readers`
    take the last hidden states of the same pass.

    Raises:
        ValueError: an unknown need or site; activations that are not finite.
    """
    if unknown := sorted(set(needs) - set(get_args(Needs))):
        raise ValueError(f"unknown need {unknown[0]!r} of a score; known: {', '.join(get_args(Needs))}")
    place = site_of(bridge_of(model), site)
    sums = ClassSums(place, classes, relabelled) if "stats" in needs or relabelled else None
    n_words = len(encoded.read_words)
    keep = "words" in needs and 1 < n_words <= megabytes(max_memory) // (4 * place.n_neurons)
    bins = BinCounts(place, classes) if "histograms" in needs or ("words" in needs and not keep) else None
    draw = WordDraw(place, encoded, classes, sample_words, seed) if "sample" in needs else None
    every = WordDraw(place, encoded, classes, n_words, seed) if keep else None
    collectors: list[Collector] = [c for c in (sums, bins, draw, every) if c is not None]
    stream(model, encoded, collectors, readers=readers, site=place, max_tokens=max_tokens)
    stats, *shuffled = sums.all() if sums else [None]
    return Gathered(
        stats, bins and bins.histograms(), draw and draw.sample(), every and every.sample(),
        tuple(s for s in shuffled if s),
    )  # fmt: skip


def saliency(
    gathered: ClassStats | Histograms | WordSample | Gathered,
    concept: Concept,
    carries: Bool[Tensor, " class"],
    *,
    score: str | Score | Callable = "probeless",
    contrast: Contrast = "rest",
) -> Saliency:
    """Score every neuron for a concept from what a pass over a text gathered.

    `score` is a name, a `Score`, or a function `(stats, carries, contrast) -> Float["layer neuron"]`.

    Raises:
        ValueError: the score or the contrast is not known, or the score needs something else than was gathered.
    """
    how = score_of(score, contrast)
    given = vars(gathered) if isinstance(gathered, Gathered) else {_need(gathered): gathered}
    thing = given.get(how.needs) or (given.get("histograms") if how.needs == "words" else None)
    if thing is None:
        there = [repr(need) for need in get_args(Needs) if given.get(need) is not None]
        raise ValueError(
            f"score {how.name!r} needs {how.needs!r}, and {', '.join(there) or 'nothing'} was gathered; use "
            f"score_many(..., [{how.name!r}]), or gather(..., [{how.needs!r}])"
        )
    n_concept, n_rest = _words(thing, carries)
    for side, n in (("no word that carries", n_concept), ("no word that does not carry", n_rest)):
        if not n:
            raise ValueError(
                f"{side} concept {concept.name!r} was measured (words that the context cut off are not); use a larger "
                "probe corpus, or long='split'"
            )
    scored = how.of(thing, carries, contrast)
    values, quality = scored if isinstance(scored, tuple) else (scored, None)
    exact = {WordSample: ", exact", Histograms: ", from histograms"}.get(type(thing), "")
    unit = how.unit + exact if how.needs == "words" else how.unit
    return Saliency(values.float().cpu(), how.name, unit, concept.name, thing.site, quality)


def _need(thing: ClassStats | Histograms | WordSample) -> Needs:
    return "stats" if isinstance(thing, ClassStats) else "histograms" if isinstance(thing, Histograms) else "sample"


def _words(thing: ClassStats | Histograms | WordSample, carries: Bool[Tensor, " class"]) -> tuple[int, int]:
    """How many words of the concept, and others, were measured."""
    if isinstance(thing, Histograms):
        concept, rest = thing.counts[:, 0, 0].sum(-1).tolist()
        return concept, rest
    count = thing.count if isinstance(thing, ClassStats) else thing.of_word.bincount(minlength=len(carries))
    return int(count[carries].sum()), int(count[~carries].sum())


@explained
def score_many(
    model: Model | TransformerBridge,
    encoded: Encoded,
    concept: Concept,
    classes: Classes,
    scores: Sequence[str | Score | Callable],
    *,
    site: str | Site = "resid",
    contrast: Contrast = "rest",
    sample_words: int = SAMPLE_WORDS,
    max_memory: float | int = MEMORY,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Saliency]:
    """Several scores of every neuron for a concept, by name, from one pass over a text.

    `classes` is `concept.classes(encoded.corpus)`; `sample_words` and `seed` are for scores that need a sample of words
    (`WordDraw`), and `max_memory` for those of all words (`gather`). The model is read only.

    Raises:
        ValueError: a score, the contrast or the site is not known; no score, or two of one name.
    """
    how = [score_of(score, contrast) for score in scores]
    names = [score.name for score in how]
    if not how or len(set(names)) < len(names):
        raise ValueError(f"scores must be at least one, each with a name of its own, got {names}")
    gathered = gather(
        model, encoded, classes, {score.needs for score in how}, site=site, sample_words=sample_words,
        max_memory=max_memory, seed=seed, max_tokens=max_tokens,
    )  # fmt: skip
    carries = torch.from_numpy(classes.carries)
    return {s.name: saliency(gathered, concept, carries, score=s, contrast=contrast) for s in how}


def score_of(score: str | Score | Callable, contrast: str = "rest") -> Score:
    """A score by name; a `Score` or a function is taken as it is.

    Raises:
        ValueError: the score or the contrast is not known.
    """
    known_name("contrast", contrast, get_args(Contrast))
    if isinstance(score, Score):
        return score
    if callable(score):
        name = getattr(score, "__name__", "score")
        return Score(name, "", (score.__doc__ or "").strip(), score)
    return SCORES[known_name("score", score, SCORES)]
