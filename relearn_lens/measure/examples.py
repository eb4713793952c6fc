"""What a few neurons do at every word of a few sentences: to be read, where everything else is a sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, jaxtyped
from torch import Tensor

from relearn_lens.measure.guesses import to_read
from relearn_lens.models.model import Model, encoded_for
from relearn_lens.neurons.sites import Neuron, Neurons
from relearn_lens.neurons.streaming import stream
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, Strings
from relearn_lens.text.encoding import Batch


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Activations of some neurons at the words of some sentences, in the model's own units."""

    neurons: Strings
    """Their names, such as `L3N217`."""
    sentences: tuple[Strings, ...]
    """The words of each sentence."""
    activations: Float[Tensor, "word neuron"]
    """Of all sentences below each other, sub-words averaged; NaN where a word is not read."""

    def of(self, neuron: Neuron | str) -> list[tuple[Strings, list[float]]]:
        """Words and activations of every sentence; empty for a neuron that is not there."""
        if str(neuron) not in self.neurons:
            return []
        values = self.activations[:, self.neurons.index(str(neuron))]
        split = values.split([len(words) for words in self.sentences])
        return [(words, part.tolist()) for words, part in zip(self.sentences, split, strict=True)]


def examples(model: Model, text: Corpus, concept: Concept, neurons: Neurons, *, sentences: int = 5) -> Examples | None:
    """What neurons do at the words of a few sentences that hold the concept; None where the text has no short one."""
    chosen = to_read(text, concept, sentences)
    if not chosen.n_sentences:
        return None
    read = _Words(neurons, chosen.n_words)
    stream(model, encoded_for(model, chosen), [read], site=neurons.site)
    words = tuple(tuple(word.text for word in sentence) for sentence in chosen)
    return Examples(tuple(map(str, neurons)), words, read.values)


class _Words:
    """Keeps the activations of some neurons at every word of a text."""

    def __init__(self, neurons: Neurons, n_words: int):
        self.columns: dict[int, tuple[list[int], list[int]]] = {}
        for column, (layer, index) in enumerate(np.argwhere(neurons.mask.numpy()).tolist()):
            places, indices = self.columns.setdefault(layer, ([], []))
            places.append(column)
            indices.append(index)
        self.values = torch.full((n_words, len(neurons)), torch.nan)
        self.words = torch.empty(0, dtype=torch.int64)

    def begin(self, batch: Batch) -> None:
        """The words that come next."""
        self.words = batch.words.cpu()

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Keep one layer's."""
        if layer in self.columns:
            places, indices = self.columns[layer]
            self.values[self.words[:, None], torch.tensor(places)] = words[:, indices].cpu()

    def together(self) -> None:
        """A few sentences are one batch, which every process reads for itself."""
