"""What a neuron stands for, read from its top words.

How similar its meaning is to what it was, or to a concept, by the vectors of its words (`concept_similarity`,
`similarity_to`); how much old and new meaning mix in it (`polysemy`); and how many classes it tells apart, from class
statistics (`separated`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.find.saliency import dprime_of_each
from relearn_lens.measure.topwords import TopWords, is_dead
from relearn_lens.measure.vectors import WordVectors, look_up
from relearn_lens.names import explained, known_name
from relearn_lens.neurons.sites import Neuron, Neurons
from relearn_lens.neurons.streaming import ClassStats
from relearn_lens.text.concept import Concept, concept_of
from relearn_lens.text.corpus import Corpus, printable

Nulls = Literal["drop", "zero_then_drop"]


@explained
def concept_similarity(
    before: TopWords, now: TopWords, vectors: WordVectors, *, nulls: Nulls = "drop"
) -> Float[Tensor, "layer neuron"]:
    """How near each neuron's meaning is to what it was: the cosine, -1 to 1, of the mean vectors of its top words.

    Words without a vector are left out of a mean. NaN where either side is null or has no word with a vector, by the
    same rule at every stage (`nulls="drop"`). `nulls="zero_then_drop"` is what the published code does: a neuron that
    was null before counts as 0, one that is null later is dropped (NaN). At the base stage itself, where `now` is
    `before`, there is no later.

    Raises:
        ValueError: an unknown `nulls`, top words of different sites, or vectors of another shape than word by d.
    Source: Lo et al. 2024.
    """
    known_name("nulls", nulls, get_args(Nulls))
    _same_site(before, now)
    words = tuple(dict.fromkeys(before.vocab + now.vocab))
    table = look_up(vectors, words).double()
    sides = [(_renumbered(top, words), top.null) for top in (before, now)]
    # Layer by layer: the vectors of all neurons at once may not fit.
    rows = zip(*(_sums(table, ids, null) for ids, null in sides), strict=True)
    cosines = torch.stack([_cosine(old, new) for old, new in rows]).float()
    if nulls == "zero_then_drop":
        cosines[before.null if now is before else before.null & ~now.null] = 0.0
    return cosines


def similarity_to(words: Collection[str], now: TopWords, vectors: WordVectors) -> Float[Tensor, "layer neuron"]:
    """How near each neuron's meaning is to a concept: the cosine, -1 to 1, of the mean vector of its top words and that
    of the concept's words.

    Words without a vector are left out of a mean; NaN where the neuron is null or has no word with a vector.

    Raises:
        ValueError: no word of the concept has a vector, or vectors of another shape than word by d.
    Source: ours, to ask whether a neuron was primed for a concept before it took it over.
    """
    wanted = [words] if isinstance(words, str) else sorted(words)
    theirs = look_up(vectors, wanted).double()
    theirs = theirs[~theirs.isnan().any(1)]
    if not len(theirs):
        raise ValueError(f"none of the concept's {len(wanted)} word(s) has a vector: {wanted[:5]}")
    mine = _sums(look_up(vectors, now.vocab).double(), now.words, now.null)
    return torch.stack([_cosine(sums, theirs.mean(0).expand_as(sums)) for sums in mine]).float()


def _sums(
    table: Float[Tensor, "word d"], ids: Int[Tensor, "layer neuron rank"], null: Bool[Tensor, "layer neuron"]
) -> Iterator[Float[Tensor, "neuron d"]]:
    """Layer by layer, the sum of the vectors of each neuron's top words (the mean up to a length, which no cosine
    sees); NaN for a null neuron and where no word has a vector."""
    known = ~table.isnan().any(1)
    # A last row, reached as -1, for "no word".
    table = torch.cat([table.where(known[:, None], 0.0), table.new_zeros(1, table.shape[1])])
    known = torch.cat([known, known.new_zeros(1)])
    for mine, nothing in zip(ids, null, strict=True):
        sums = F.embedding_bag(torch.where(mine < 0, len(table) - 1, mine), table, mode="sum")
        yield sums.masked_fill((nothing | ~known[mine].any(1))[:, None], torch.nan)


def _cosine(a: Float[Tensor, "neuron d"], b: Float[Tensor, "neuron d"]) -> Float[Tensor, " neuron"]:
    """NaN where either is NaN, or zero and so without a direction."""
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1)


def _renumbered(top: TopWords, words: Sequence[str]) -> Int[Tensor, "layer neuron rank"]:
    """Top words as indices into another list of words; -1 stays -1."""
    index = {word: i for i, word in enumerate(words)}
    return torch.tensor([index[word] for word in top.vocab] + [-1])[top.words]


def _same_site(before: TopWords, now: TopWords) -> None:
    if before.site != now.site:
        raise ValueError(
            f"top words of different sites cannot be compared: {before.site.name!r} with {before.site.n_neurons:,} "
            f"neurons and {now.site.name!r} with {now.site.n_neurons:,}"
        )


@dataclass(frozen=True)
class Meaning:
    """What one neuron meant before and means now, printed as `L4N217: Isaac, Gear → Straits, Town, Hague`."""

    neuron: Neuron
    before: tuple[str, ...]
    now: tuple[str, ...]
    kept: float
    gained: float

    def __str__(self) -> str:
        before, now = (", ".join(map(printable, words)) for words in (self.before, self.now))
        return f"{self.neuron}: {before} → {now}"


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Polysemy:
    """How much of its old meaning each neuron kept and how much of the concept it gained; NaN where it is null."""

    kept: Float[Tensor, "layer neuron"]
    """Share of the old top words that are still top words, 0 to 1."""
    gained: Float[Tensor, "layer neuron"]
    """`concept_share` now minus before, -1 to 1."""
    concept_share: Float[Tensor, "layer neuron"]
    """Share of the top words now that carry the concept, 0 to 1."""
    before: TopWords
    now: TopWords

    @property
    def mixed(self) -> Neurons:
        """The neurons that kept some of their old meaning and gained some of the concept."""
        return Neurons((self.kept > 0) & (self.gained > 0), self.now.site)

    def rows(self, k: int | None = None) -> list[Meaning]:
        """The neurons that are not null (at most `k`), those that gained most first, of these those that kept most."""
        at = (~self.kept.isnan()).nonzero()
        kept, gained = (values[tuple(at.T)] for values in (self.kept, self.gained))
        order = np.lexsort((-kept.numpy(), -gained.numpy()))[:k]
        return [
            Meaning(
                Neuron(self.now.site.layers[layer], index),
                self.before._of(layer, index),
                self.now._of(layer, index),
                float(self.kept[layer, index]),
                float(self.gained[layer, index]),
            )
            for layer, index in at[torch.from_numpy(order)].tolist()
        ]

    def table(self, k: int | None = 10) -> str:
        """A line for each of the first `k` rows: the neuron, its words before and its words now."""
        return "\n".join(map(str, self.rows(k)))

    def __repr__(self) -> str:
        n = int((~self.kept.isnan()).sum())
        return f"Polysemy({self.now.site.name}: {len(self.mixed):,} of {n:,} neurons mix old meaning and the concept)"


@explained
def polysemy(before: TopWords, now: TopWords, words: Collection[str], *, neurons: Neurons | None = None) -> Polysemy:
    """Old and new meaning of each neuron, by its top words before and now.

    `words` are those that carry the concept (`concept_words`), spelt as in the corpus. NaN where a neuron is null on
    either side, and outside of `neurons`.

    Raises:
        ValueError: top words or neurons of different sites.
    Source: ours; Lo et al. 2024 show examples of such neurons.
    """
    _same_site(before, now)
    if neurons is not None and neurons.site != now.site:
        raise ValueError(f"neurons are of {neurons.site.name!r}, the top words of {now.site.name!r}, or of two models")
    wanted = {words} if isinstance(words, str) else set(words)
    every = tuple(dict.fromkeys(before.vocab + now.vocab))
    old, new = (_renumbered(top, every) for top in (before, now))
    carries = torch.tensor([word in wanted for word in every] + [False])
    nothing = before.null | now.null
    if neurons is not None:
        nothing = nothing | ~neurons.mask

    def share(hits: Bool[Tensor, "layer neuron rank"], of: Int[Tensor, "layer neuron rank"]) -> Tensor:
        return (hits.sum(-1) / (of >= 0).sum(-1)).masked_fill(nothing, torch.nan)

    still = ((old[..., :, None] == new[..., None, :]) & (old >= 0)[..., None]).any(-1)
    now_share = share(carries[new], new)
    return Polysemy(share(still, old), now_share - share(carries[old], old), now_share, before, now)


@explained
def concept_words(corpus: Corpus, concept: Concept | str) -> frozenset[str]:
    """The word types that carry the concept in at least half of their occurrences in the corpus.

    Raises:
        ValueError: as `Concept.classes`.
    """
    classes = concept_of(concept).classes(corpus)
    carries = classes.carries[classes.of_word]
    seen = np.bincount(corpus.word, minlength=len(corpus.vocab))
    hits = np.bincount(corpus.word, weights=carries, minlength=len(corpus.vocab))
    return frozenset(corpus.vocab[i] for i in np.flatnonzero((2 * hits >= seen) & (seen > 0)))


def separated(
    stats: ClassStats, shuffled: Sequence[ClassStats], *, level: float = 0.05, min_words: int = 10
) -> Int[Tensor, "layer neuron"]:
    """How many classes each neuron tells apart from all other words.

    A class counts where its |d'| (`saliency.signed_dprime`) is above what chance gives *any* neuron: under shuffled
    labels the highest |d'| of all neurons is above the threshold in at most a share `level` of the cases, for each
    class. A class is not counted where it, or the rest, has fewer than `min_words` words; a dead neuron separates none.
    Shuffling treats word types as independent of each other.

    Raises:
        ValueError: statistics of other classes, site or words; or too few shuffles for the level (19 for 0.05).
    Source: ours; Westfall and Young 1993, maximum statistic.
    """
    needed = int(np.ceil(1 / level - 1e-9)) - 1 if 0 < level < 1 else 0
    if not needed:
        raise ValueError(f"level must be above 0 and below 1, got {level}")
    if len(shuffled) < needed:
        raise ValueError(
            f"a level of {level} needs at least {needed} shuffles, got {len(shuffled)}; see label_shuffles()"
        )
    total = int(stats.count.sum())
    for other in shuffled:
        if (other.class_names, other.site, int(other.count.sum())) != (stats.class_names, stats.site, total):
            raise ValueError("shuffled statistics are of other classes, another site or other words than stats")
    enough = (stats.count >= min_words) & (total - stats.count >= min_words)
    dead = is_dead(stats)
    highest = torch.stack([dprime_of_each(other).abs().masked_fill(dead, 0.0).flatten(1).amax(1) for other in shuffled])
    # The rank that makes it exact: of n + 1 equally likely orders, a share `level` at most lies above it.
    rank = int(np.ceil((1 - level) * (len(shuffled) + 1) - 1e-9))
    threshold = highest.sort(0).values[rank - 1]
    separates = (dprime_of_each(stats).abs() > threshold[:, None, None]) & ~dead & enough[:, None, None]
    return separates.sum(0)
