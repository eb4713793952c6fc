"""The words that drive a neuron: the word types on which its activation is farthest from its mean.

Two passes over a text: the first for every neuron's mean, the second adds up |activation - mean| per word type, in a
table of word types by neurons that is cut into as many passes as its memory limit asks for. What top words say about a
neuron stands in `meaning.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.methods import MAX_TOKENS, MEMORY, megabytes
from relearn_lens.models import processes
from relearn_lens.models.model import Model, bridge_of, encoded_for
from relearn_lens.names import explained
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import ClassStats, class_stats, stream
from relearn_lens.text.concept import Classes
from relearn_lens.text.corpus import Corpus, Strings
from relearn_lens.text.encoding import Batch, Encoded

NOISE = 1e-6
"""Spread, relative to a neuron's scale, at which it is float noise: a constant averaged over sub-words in float32
spreads by 1e-7."""


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class TopWords:
    """The words that drive each neuron of a site most."""

    words: Int[Tensor, "layer neuron rank"]
    """Index into `vocab`, highest first; -1 where there is no further word."""
    value: Float[Tensor, "layer neuron rank"]
    """Mean |z| of the word over the highest mean |z| of the neuron, 0 to 1 (no unit); 0 where there is no word."""
    vocab: Strings
    """The word types that are a top word of some neuron."""
    dead: Bool[Tensor, "layer neuron"]
    """The neuron has the same activation on every word, up to float noise. It has no top words."""
    null: Bool[Tensor, "layer neuron"]
    """The neuron means nothing: it is dead, or no top word has a letter (punctuation and numbers alone)."""
    site: Site
    n_types: int
    """Word types that were seen."""
    kept: float
    """Words with a value above this were kept."""

    def of(self, neuron: tuple[str, int]) -> tuple[str, ...]:
        """The top words of one `(layer, index)` neuron, highest first, also if it is null.

        Raises:
            ValueError: a layer or an index that the site does not have.
        """
        Neurons.of(self.site, [neuron])
        return self._of(self.site.layers.index(str(neuron[0])), neuron[1])

    def _of(self, layer: int, index: int) -> tuple[str, ...]:
        return tuple(self.vocab[w] for w in self.words[layer, index].tolist() if w >= 0)

    def __repr__(self) -> str:
        return (
            f"TopWords({self.site.name}: {len(self.vocab):,} of {self.n_types:,} word types drive "
            f"{self.site.n_neurons:,} neurons; {int(self.null.sum()):,} null, of them {int(self.dead.sum()):,} dead)"
        )


class WordSums:
    """Collects the sum of |activation - mean| over the occurrences of each word type, for some neurons of a site."""

    def __init__(self, of_word: Int[np.ndarray, " word"], mean: Float[Tensor, "layer neuron"], spans: dict[int, slice]):
        self.of_word = torch.from_numpy(of_word)
        self.n_types = int(of_word.max()) + 1
        self.mean, self.spans = mean, spans
        self.table: dict[int, Tensor] = {}
        """One table of types by neurons for each layer of `spans`: rows of one block are added to fastest."""
        self.types: Tensor
        self.order: Tensor
        self.first: Tensor

    def begin(self, batch: Batch) -> None:
        """Sort the batch's words by type."""
        of_word = self.of_word[batch.words.cpu()]
        types, counts = torch.unique_consecutive(of_word.sort(stable=True).values, return_counts=True)
        tables = (types, of_word.argsort(stable=True), counts.cumsum(0) - counts)
        self.types, self.order, self.first = (t.to(batch.words.device) for t in tables)

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Add one layer's words to the rows of their types."""
        if layer not in self.spans:
            return
        span = self.spans[layer]
        if layer not in self.table:
            self.table[layer] = torch.zeros(self.n_types, span.stop - span.start, device=words.device)
        far = (words[:, span] - self.mean[layer, span].to(words)).abs_()
        # Each type once: index_add_ is then the same from run to run on a GPU too.
        sums = F.embedding_bag(self.order, far, self.first, mode="sum")
        self.table[layer].index_add_(0, self.types, sums)

    def together(self) -> None:
        """Sum the tables over the processes."""
        processes.sum_(*self.table.values())


@explained
def top_words(
    model: Model | TransformerBridge,
    text: Corpus | Encoded,
    *,
    site: str | Site = "resid",
    stats: ClassStats | None = None,
    k: int = 5,
    keep: float | int = 0.1,
    max_memory: float | int = MEMORY,
    max_tokens: int = MAX_TOKENS,
) -> TopWords:
    """The words that drive each neuron most: up to `k` word types whose value is above `keep`.

    z = |activation - mean| / std over the words of the text, averaged over the occurrences of each word type and
    divided by the neuron's highest such average (which cancels the std). Ties go to the type that the corpus has first.
    Words that the model's context cut off are left out.

    `stats` are class statistics of the same model, text and site, of whatever classes; they save a pass. The table of
    word types by neurons takes 4 bytes a cell and never more than `max_memory` MB: what does not fit is done in
    further passes over the text. Memory depends on the text's word types, not on its length.

    Raises:
        ValueError: `k` or `keep` out of range, a `max_memory` that cannot hold one neuron, an unknown site, or `stats`
            of another site or text.
    Source: Lo et al. 2024; NeuroX's corpus-based top words (Dalvi et al. 2019). Ours names the neurons
    that are null: dead, or without a letter in any top word.
    """
    if k < 1 or not 0 <= keep < 1:
        raise ValueError(f"top words need k of at least 1 and keep from 0 to below 1, got k={k}, keep={keep}")
    bridge = bridge_of(model)
    place = site_of(bridge, site)
    encoded = encoded_for(model, text)
    corpus, seen = encoded.corpus, encoded.read_words
    if stats is not None and (stats.site != place or int(stats.count.sum()) != len(seen)):
        raise ValueError(
            f"stats are of {int(stats.count.sum()):,} words at site {stats.site.name!r}, and top words are asked of "
            f"the {len(seen):,} words of {corpus.name!r} at site {place.name!r}; pass those of the same model, text "
            "and site, or leave stats= out"
        )
    types, of_seen = np.unique(corpus.word[seen], return_inverse=True)
    of_word = np.zeros(corpus.n_words, dtype=np.int64)
    of_word[seen] = of_seen
    fits = megabytes(max_memory) // (4 * len(types))
    if not fits:
        raise ValueError(
            f"max_memory={max_memory:g} MB cannot hold the {len(types):,} word types of {corpus.name!r} for one "
            f"neuron; give at least {4 * len(types) / 2**20:.2g}"
        )
    size = -(-place.n_neurons // -(-place.n_neurons // fits))  # the passes share the neurons evenly

    if stats is None:
        one = Classes(("all words",), np.zeros(corpus.n_words, dtype=np.int64), np.array([True]))
        stats = class_stats(model, encoded, one, site=place, max_tokens=max_tokens)
    total = stats.total
    dead = is_dead(stats)
    count = torch.from_numpy(np.bincount(of_seen))
    words = torch.full((len(place.layers), place.width, k), -1)
    value = torch.zeros(words.shape)
    for start in range(0, place.n_neurons, size):
        sums = WordSums(of_word, total.mean[0], dict(_spans(place, start, min(start + size, place.n_neurons))))
        stream(model, encoded, [sums], site=place, max_tokens=max_tokens)
        for layer, span in sums.spans.items():
            highest, which = _highest(sums.table.pop(layer), count, k)
            good = (highest > keep) & ~dead[layer, span, None]
            words[layer, span, : which.shape[1]] = torch.where(good, which, -1)
            value[layer, span, : which.shape[1]] = torch.where(good, highest, 0.0)

    used, renumbered = words.unique(return_inverse=True)
    if int(used[0]) < 0:
        used, renumbered = used[1:], renumbered - 1
    vocab = tuple(corpus.vocab[i] for i in types[used.numpy()])
    has_letter = torch.tensor([any(map(str.isalpha, word)) for word in vocab] + [False])
    null = ~has_letter[renumbered].any(-1)  # -1, no word, is the last: no letter
    return TopWords(renumbered, value, vocab, dead, null, place, len(types), float(keep))


def is_dead(stats: ClassStats) -> Bool[Tensor, "layer neuron"]:
    """The neurons with the same activation on every word, up to float noise.

    Their standard deviation is at most 1e-6 of their own mean or of their layer's root mean square. A pruned
    coordinate is dead; an MLP neuron that was only cut off from what follows it is not, as it goes on responding.
    """
    mean, variance = stats.total.mean[0], stats.total.variance[0]
    layer = (mean.square() + variance).mean(1, keepdim=True).sqrt()
    return variance.sqrt() <= NOISE * torch.maximum(mean.abs(), layer)


def _spans(site: Site, start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """The neurons `start` to `stop`, numbered through all layers, as a slice of each layer that has some."""
    for layer in range(start // site.width, -(-stop // site.width)):
        here = layer * site.width
        yield layer, slice(max(start - here, 0), min(stop - here, site.width))


def _highest(
    table: Float[Tensor, "type neuron"], count: Int[Tensor, " type"], k: int
) -> tuple[Float[Tensor, "neuron rank"], Int[Tensor, "neuron rank"]]:
    """The highest averages of each neuron over its highest one, and their types; of equal ones the earlier type."""
    n_types, width = table.shape
    last = torch.arange(n_types - 1, -1, -1)
    chosen = []
    step = max(1, 2**21 // n_types)  # a few neurons at a time, as their keys are twice as large as the table
    for i in range(0, width, step):
        mean = table[:, i : i + step].cpu().T / count
        mean /= mean.amax(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        # Floats that are not negative sort as their bits do; with the type below them no two keys are equal.
        keys = (mean.contiguous().view(torch.int32).long() << 32) | last
        which = n_types - 1 - (keys.topk(min(k, n_types), 1).values & 0xFFFFFFFF)
        chosen.append((mean.gather(1, which), which))
    highest, which = zip(*chosen, strict=True)
    return torch.cat(highest), torch.cat(which)
