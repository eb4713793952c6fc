"""Tagging heads: their classes, and those that a Hugging Face model was trained with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
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
    layers = [m for m in plain.modules() if isinstance(m, nn.Linear) and id(m) not in body]
    if len(layers) != 1 or layers[0].out_features != n:
        sizes = ", ".join(f"{m.in_features} to {m.out_features}" for m in layers) or "none"
        raise ValueError(
            f"the head of a {type(plain).__name__} is not one linear layer with {n} outputs (linear layers outside of "
            f"the body: {sizes}), so it cannot be the head of a Tagger"
        )
    return layers[0]


@dataclass(frozen=True)
class TrainedHead:
    """What of a head that was trained elsewhere serves other labels."""

    rows: tuple[int, ...]
    """Which of `tags_of(labels)` it has."""
    weight: Float[Tensor, "row d_model"]
    bias: Float[Tensor, " row"]
    note: str
    """What is drawn fresh and what is left out, in words; empty if its classes are those tags."""

    def put_on(self, head: nn.Linear) -> None:
        """Set the rows that there are."""
        rows = torch.tensor(self.rows, device=head.weight.device)
        with torch.no_grad():
            head.weight[rows] = self.weight.to(head.weight)
            head.bias[rows] = self.bias.to(head.bias)


def trained_head(plain: Any, labels: Sequence[str]) -> TrainedHead:
    """The rows of a token-classification model's head that are named as `tags_of(labels)` are.

    A class without a prefix (`LOC` of an IO scheme) is `I-LOC`. Tags that the head does not have are left to the fresh
    head, such as `B-LOC` then: their rows are near 0, and seldom chosen beside trained ones.

    Raises:
        ValueError: it has no class O, none of the labels, or one of them in another scheme than BIO, IOB1 or IO; or its
            head is not one linear layer.
    """
    names = [str(name) for _, name in sorted((int(i), name) for i, name in plain.config.id2label.items())]
    wanted, known = tags_of(labels), set(labels[1:])
    of_row = {name: i for i, name in enumerate(names)}
    of_row = {f"I-{name}": of_row[name] for name in known if name in of_row} | of_row
    rows = tuple(i for i, tag in enumerate(wanted) if tag in of_row)
    has = f"the head of this model was trained for {_some(names)}, and the labels {_some(labels)} need {_some(wanted)}"
    way_on = "draw a fresh head with head='fresh' and train it"
    if all(_UNNAMED.fullmatch(name) for name in names):
        raise ValueError(
            f"{has}: its {len(names)} classes have no names; write them into id2label of its config.json, in the order "
            f"of its training data, or {way_on}"
        )
    if OUTSIDE not in of_row or not known & {wanted[i][2:] for i in rows}:
        raise ValueError(
            f"{has}: {'none of these labels is there' if OUTSIDE in of_row else 'there is no O'}; name the labels of "
            f"the text as the model does, or {way_on}"
        )
    left = [name for name in names if of_row[name] not in {of_row[wanted[i]] for i in rows}]
    if others := [name for name in left if name[1:2] in "-_" and name[2:] in known]:
        raise ValueError(f"{has}: {_some(others)} are of another scheme than BIO; {way_on}")
    try:
        classifier = classifier_of(plain, len(names))
    except ValueError as error:
        raise ValueError(f"{error}; {way_on}") from None
    taken = torch.tensor([of_row[wanted[i]] for i in rows])
    weight = classifier.weight.detach()[taken].clone()
    bias = weight.new_zeros(len(rows)) if classifier.bias is None else classifier.bias.detach()[taken].clone()
    fresh = [tag for tag in wanted if tag not in of_row]
    parts = ([f"{_some(fresh)} drawn fresh"] if fresh else []) + ([f"{_some(left)} left out"] if left else [])
    return TrainedHead(rows, weight, bias, " and ".join(parts))


_UNNAMED = re.compile(r"(LABEL_)?\d+")
"""What transformers calls the classes of a head that nobody gave names to."""


def _some(names: Sequence[str]) -> str:
    """Names in a row, the middle left out of many."""
    return ", ".join(names if len(names) <= 12 else [*names[:8], "...", *names[-2:]])
