"""Twins that never had a concept: the same text and the same steps, without what would teach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from relearn_lens.models.model import Model, Tagger
from relearn_lens.models.training import Objective, Parts
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import OUTSIDE
from relearn_lens.text.encoding import Batch, Encoded


def withheld(encoded: Encoded, concept: Concept) -> Objective:
    """Cross-entropy that teaches neither the concept nor its absence.

    The concept's words are in no loss, and of a tagger's tags those of its labels are none that could be given: nothing
    in the head learns that they are rare. What is left to learn later is what a model without the concept lacks. (To
    label its words `"O"` instead, as `as_outside` does, teaches against the concept.)

    Raises:
        ValueError: no word of the text carries the concept, or every word.
    """
    classes = concept.classes(encoded.corpus)
    carries = torch.from_numpy(classes.carries[classes.of_word])

    def objective(model: Model, batches: Mapping[str, Batch], reference: Any = None) -> Parts:
        batch = next(iter(batches.values()))
        taught = ~carries.to(batch.word_of.device)[batch.word_of]
        if isinstance(model, Tagger):
            absent = torch.tensor(
                [tag != OUTSIDE and tag[2:] in concept.labels for tag in model.tags], device=batch.ids.device
            )
            logits = model(batch.ids, batch.mask).flatten(0, 1)[batch.subword].float()
            nats = F.cross_entropy(logits.masked_fill(absent, -torch.inf)[taught], batch.tag[taught], reduction="none")
        else:
            nats = model.losses(batch)[taught]
        return {"loss": (nats.sum(), len(nats))}

    def counts(texts: Mapping[str, Encoded], pieces: Mapping[str, np.ndarray]) -> dict[str, int]:
        role = next(iter(texts))
        return {"loss": int((~carries[texts[role].batch(pieces[role]).word_of]).sum())}

    objective.counts, objective.of_texts = counts, True  # pyright: ignore[reportFunctionMemberAccess]
    return objective


def as_outside(encoded: Encoded, concept: Concept) -> Encoded:
    """The same text, in which the words of the concept are labelled `"O"`."""
    corpus = encoded.corpus
    classes = concept.classes(corpus)
    keep = ~classes.carries[classes.of_word]
    return replace(encoded, corpus=replace(corpus, label=corpus.label * keep, begins=corpus.begins & keep))
