"""Speed of top words: `python -m tests.benchmarks.meaning`. Not a test, as in `__main__`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from relearn_lens.measure.topwords import top_words
from relearn_lens.models.model import hidden, reading
from relearn_lens.neurons.sites import site_of
from relearn_lens.neurons.streaming import ClassStats, class_stats, stream
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import Batch, encode
from tests.benchmarks.__main__ import _interleaved, _model_and_text


class _Loop:
    """The straightforward way: a dictionary of running sums, word by word."""

    def __init__(self, words: list[str], stats: ClassStats):
        self.words, self.mean, self.std = words, stats.total.mean[0].float(), stats.total.variance[0].sqrt().float()
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.count: dict[tuple[str, int], int] = {}
        self.here: list[str]

    def begin(self, batch: Batch) -> None:
        self.here = [self.words[i] for i in batch.words.tolist()]

    def add(self, layer: int, words: Tensor) -> None:
        for word, row in zip(self.here, words, strict=True):
            key, z = (word, layer), ((row - self.mean[layer]) / self.std[layer]).abs()
            self.sums[key] = self.sums[key] + z if key in self.sums else z
            self.count[key] = self.count.get(key, 0) + 1

    def together(self) -> None: ...

    def top(self, neurons: int) -> list[list[tuple[str, float]]]:
        """The five highest of every neuron."""
        layers: dict[int, list[tuple[str, np.ndarray]]] = {}
        for (word, layer), total in self.sums.items():
            layers.setdefault(layer, []).append((word, (total / self.count[word, layer]).numpy()))
        found = []
        for rows in layers.values():
            table = np.stack([row for _, row in rows])
            for k in range(neurons):
                ranked = sorted(zip((word for word, _ in rows), table[:, k].tolist(), strict=True), key=lambda x: -x[1])
                found.append([(word, value / ranked[0][1]) for word, value in ranked[:5] if value > 0.1 * ranked[0][1]])
        return found


def top_words_benchmark(site: str = "resid", sentences: int = 150) -> None:
    """Top words, with and without class statistics at hand, against a Python loop and a bare forward pass."""
    tagger, text = _model_and_text(sentences)
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    place = site_of(tagger.bridge, site)
    stats = class_stats(tagger, encoded, Concept("place").classes(text), site=place)
    words = [word.text for sentence in text for word in sentence]

    def bare() -> None:
        with reading(tagger):
            for batch in encoded.batches():
                hidden(tagger.bridge, batch.ids, batch.mask)

    def loop() -> list[list[tuple[str, float]]]:
        sums = _Loop(words, stats)
        stream(tagger, encoded, [sums], site=place)
        return sums.top(place.width)

    def given() -> None:
        top_words(tagger, encoded, site=place, stats=stats)

    ours, theirs = top_words(tagger, encoded, site=place, stats=stats), loop()
    every = [(layer, k) for layer in place.layers for k in range(place.width)]
    same = np.mean([ours.of(n) == tuple(w for w, _ in row) for n, row in zip(every, theirs, strict=True)])
    plain, one, two, slow = _interleaved(bare, given, lambda: top_words(tagger, encoded, site=place), loop)
    print(
        f"top words, {site}, {len(words):,} words of {ours.n_types:,} types, {place.n_neurons:,} neurons, "
        f"{torch.get_num_threads()} threads:\n"
        f"  bare forward pass {plain:.2f} s\n"
        f"  top_words(stats=) {one:.2f} s, {one / plain:.3f} x a bare forward pass\n"
        f"  top_words() {two:.2f} s, {two / plain:.3f} x (its two passes are 2 x)\n"
        f"  Python loop with stats {slow:.2f} s, {slow / plain:.3f} x; beyond the forward pass ours takes "
        f"{one - plain:.2f} s and the loop {slow - plain:.2f} s\n"
        f"  the same words in the same order for {same:.1%} of the neurons"
    )


if __name__ == "__main__":
    top_words_benchmark()
    top_words_benchmark("mlp_post")
