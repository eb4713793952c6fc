"""Tagging heads: their classes, and those that a Hugging Face model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relearn_lens.text.corpus import OUTSIDE


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """BIO tags of some labels, in the order in which `Batch.tag` numbers them."""
    return (OUTSIDE, *(f"{prefix}-{name}" for name in labels[1:] for prefix in "BI"))


def classifier_of(plain: Any, n: int) -> nn.Linear:
    """The one linear layer of a token-classification model outside of its body.

    Raises:
        ValueError: there is none of that size, or more than one.
    """
    body = {id(module) for module in plain.base_model.modules()}
    found = [m for m in plain.modules() if isinstance(m, nn.Linear) and id(m) not in body]
    if len(found) != 1 or found[0].out_features != n:
        said = ", ".join(f"{m.in_features} to {m.out_features}" for m in found) or "none"
        raise ValueError(
            f"the head of a {type(plain).__name__} is not one linear layer with {n} outputs (linear layers outside of "
            f"the body: {said}), so it cannot be the head of a Tagger"
        )
    return found[0]


def trained_head(plain: Any, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a token-classification model's head, rows in the order of `tags_of(labels)`.

    Raises:
        ValueError: its labels are not the BIO tags of these labels, or its head is not one linear layer.
    """
    theirs = {str(name): int(i) for i, name in plain.config.id2label.items()}
    wanted = tags_of(labels)
    if set(theirs) != set(wanted):
        kinds = sorted({name.partition("-")[2] or name for name in theirs} - {OUTSIDE})
        raise ValueError(
            f"the head of this model was trained for {', '.join(theirs)}, and the labels {', '.join(labels)} need "
            f"{', '.join(wanted)}; use a text with the labels {', '.join(kinds)} in a BIO scheme, or a model without "
            "a head"
        )
    classifier = classifier_of(plain, len(wanted))
    rows = torch.tensor([theirs[tag] for tag in wanted])
    weight = classifier.weight.detach()[rows].clone()
    bias = weight.new_zeros(len(wanted)) if classifier.bias is None else classifier.bias.detach()[rows].clone()
    return weight, bias
