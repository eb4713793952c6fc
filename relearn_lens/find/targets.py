"""Targets: what is asked of a model's output about a concept, one number per word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relearn_lens.models.model import LanguageModel, Model, Tagger
from relearn_lens.names import known_name
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import OUTSIDE, Corpus


@dataclass(frozen=True)
class Target:
    """What the output says for a concept, one number per word.

    For a language model there are two "tags": the word's own first token, which is the concept, and all other tokens
    together (their logsumexp).
    """

    name: str
    unit: str
    says: str
    of: Callable[[Float[Tensor, "word tag"], Bool[Tensor, " tag"]], Float[Tensor, " word"]]


def _concept(logits: Float[Tensor, "word tag"], is_concept: Bool[Tensor, " tag"]) -> Float[Tensor, " word"]:
    return logits[:, is_concept].logsumexp(1)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("logit", "logit", "logsumexp of the concept's tag logits", _concept),
        Target(
            "logprob",
            "nat",
            "log-probability of the concept's tags; saturates where the tagger is sure",
            lambda logits, is_concept: _concept(logits, is_concept) - logits.logsumexp(1),
        ),
        Target(
            "margin",
            "logit",
            "the concept's logit minus the highest logit of another tag: above 0 the tagger says the concept; for a "
            "language model the log-odds of the word's token",
            lambda logits, is_concept: _concept(logits, is_concept) - logits[:, ~is_concept].amax(1),
        ),
    )
}
"""Target name to the target."""


def target_of(target: str | Target | Callable, model: Model | None = None) -> Target:
    """A target by name; a `Target` or a function is taken as it is, `"auto"` is by the kind of model.

    Raises:
        ValueError: the target is not known.
    """
    if isinstance(target, Target):
        return target
    if callable(target):
        return Target(getattr(target, "__name__", "target"), "", (target.__doc__ or "").strip(), target)
    if target == "auto":
        return TARGETS["logprob" if isinstance(model, LanguageModel) else "margin"]
    return TARGETS[known_name("target", target, ["auto", *TARGETS])]


def concept_in(
    tagger: Model, corpus: Corpus, concept: Concept, target: str | Target | Callable
) -> tuple[Bool[Tensor, " tag"], Bool[np.ndarray, " word"]]:
    """Which of the model's tags are the concept's, and which words of the corpus carry it.

    Raises:
        ValueError: a tagger that has no tags for the concept.
    """
    if not isinstance(tagger, Tagger):
        classes = concept.classes(corpus)
        return torch.tensor([True, False]), classes.carries[classes.of_word]
    if concept.words and isinstance(target, str):
        raise ValueError(
            f"concept {concept.name!r} is given by words, which have no tags, so a tagger says nothing of it: "
            "attribution needs a concept by labels, or a target function"
        )
    classes = concept.classes(corpus)
    if unknown := [label for label in concept.labels if label not in tagger.label_names]:
        raise ValueError(
            f"the tagger has no tags for label {unknown[0]!r} of concept {concept.name!r}; it was made for "
            f"{', '.join(tagger.label_names)}"
        )
    # B-x and I-x carry label x, "O" itself.
    is_concept = torch.tensor([(tag if tag == OUTSIDE else tag[2:]) in concept.labels for tag in tagger.tags])
    return is_concept, classes.carries[classes.of_word]


def check_target(target: Target, is_concept: Bool[Tensor, " tag"]) -> None:
    """Try a target on logits of three words.

    Raises:
        ValueError: it does not give one number per word that has a gradient.
    """
    logits = torch.zeros(3, len(is_concept), requires_grad=True)
    with torch.enable_grad():
        value = target.of(logits, is_concept)
    if not isinstance(value, Tensor) or value.shape != (3,) or not value.requires_grad:
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"target {target.name!r} must turn logits of shape (word, tag) into one number per word that has a "
            f"gradient; for 3 words it gave {shape}"
        )
