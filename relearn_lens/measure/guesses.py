"""What a model says of a few held-out sentences, to be read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from relearn_lens.measure.evaluation import predict
from relearn_lens.models.model import LanguageModel, Model, Tagger, encoded_for, reading
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import OUTSIDE, Corpus, Strings


@dataclass(frozen=True)
class Guesses:
    """What a model says of some sentences, word by word: to be read, not to be scored."""

    words: tuple[Strings, ...]
    """By sentence."""
    true: tuple[Strings, ...]
    """The class of each word: its label, or the concept's name where it is a list of words; `"O"` for the others."""
    said: tuple[tuple[Strings, ...], ...]
    """Of each word, a tagger's label alone; of a word that carries the concept, the tokens that a language model finds
    most likely at its beginning, the likeliest first (none of other words)."""


def guesses(model: Model, text: Corpus, concept: Concept, *, k: int = 3) -> Guesses:
    """What a model says of each word of a few sentences (of a language model, at the concept's words, `k` tokens)."""
    encoded, classes = encoded_for(model, text), concept.classes(text)
    guessed: list[Strings] = [()] * text.n_words
    if isinstance(model, Tagger):
        guessed = [(tag[2:] or OUTSIDE,) for tag in (model.tags[i] for i in predict(model, encoded))]
    elif isinstance(model, LanguageModel):
        with reading(model):
            for batch in encoded.batches(device=model.device):
                at = batch.subword[batch.first]
                logits = model(batch.ids, batch.mask).flatten(0, 1)[at - 1]
                best = logits.topk(k).indices.cpu().tolist()
                for word, tokens in zip(batch.words.tolist(), best, strict=True):
                    if classes.carries[classes.of_word[word]]:
                        guessed[word] = tuple(model.tokenizer.decode([token]).strip() for token in tokens)
    spans = [slice(a, b) for a, b in itertools.pairwise(text.start.tolist())]
    return Guesses(
        tuple(tuple(text.vocab[w] for w in text.word[span]) for span in spans),
        tuple(tuple(classes.names[c] for c in classes.of_word[span]) for span in spans),
        tuple(tuple(guessed[span]) for span in spans),
    )


def to_read(text: Corpus, concept: Concept, n: int = 6, *, longest: int = 24) -> Corpus:
    """The first `n` sentences of a text that hold the concept and are not longer than so many words, those with another
    label beside it first, none twice: chosen by the text alone."""
    classes = concept.classes(text)
    carries, other = classes.carries[classes.of_word], (text.label > 0) & ~classes.carries[classes.of_word]

    def per_sentence(which: np.ndarray) -> np.ndarray:
        return np.add.reduceat(which.astype(int), text.start[:-1]) if text.n_sentences else np.zeros(0, int)

    fits = (per_sentence(carries) > 0) & (np.diff(text.start) <= longest)
    seen: set[bytes] = set()
    for i in np.flatnonzero(fits):  # the same words again say nothing new
        words = text.word[text.start[i] : text.start[i + 1]].tobytes()
        fits[i] = words not in seen
        seen.add(words)
    order = np.lexsort((np.arange(text.n_sentences), per_sentence(other) == 0, ~fits))
    return text.take(np.sort(order[: min(n, int(fits.sum()))]))
