"""The removers and wrappers that are known by name, told once, and one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from relearn_lens import methods
from relearn_lens.methods import Training
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint, Objective, train_
from relearn_lens.names import unknown
from relearn_lens.neurons.sites import Neurons
from relearn_lens.remove.losses import NPO, GradDiff, GradientAscent
from relearn_lens.remove.pruning import Prune
from relearn_lens.remove.removal import Remover, Removing, Texts
from relearn_lens.remove.representations import RMU
from relearn_lens.remove.wrappers import SAM

REMOVERS: dict[str, type[Remover] | type[Prune]] = {
    kind.name: kind for kind in (Prune, GradientAscent, GradDiff, NPO, RMU)
}
"""Removers by name. Each has `name`, `formula`, `source` and, with unit and origin, `model_fields`."""
WRAPPERS: dict[str, type[SAM]] = {kind.name: kind for kind in (SAM,)}
"""What can stand around a remover's step, by name; described as the removers are."""


def remove_(
    model: Model,
    texts: Texts | None,
    remover: str | Remover | Prune | Objective,
    where: Mapping[str, Bool[Tensor, ...]] | Neurons | None = None,
    *,
    seed: int = 0,
    how: Training | None = None,
    **keywords: Any,
) -> Iterator[Checkpoint]:
    """Take something out of a model: by a remover's name, by a remover, or by a function of one's own.

    A function has the signature of an objective (`models.training.Objective`) and is given to the training loop as it
    is: `(model, batches by role, reference) -> {part: (sum, count)}`. Its texts have what roles it likes; the first one
    gives the steps. It trains as `Removing` says unless `how`, or single fields, say something else.

    Raises:
        ValueError: an unknown name, and as the remover or `train_` says; at the call.
    """
    if isinstance(remover, str):
        if remover not in REMOVERS:
            raise ValueError(unknown("remover", remover, REMOVERS))
        remover = REMOVERS[remover]()
    if isinstance(remover, Prune):
        if how is not None or keywords:
            raise ValueError(f"prune trains nothing, so it takes no {next(iter(keywords), 'how')!r}")
        return remover(model, texts, where, seed=seed)  # pyright: ignore[reportArgumentType]
    if isinstance(where, Neurons):
        raise ValueError(
            "where: neurons are pruned, and a training is given weights: a mapping of their plain names to masks"
        )
    if isinstance(remover, Remover):
        return remover(model, texts or {}, where, seed=seed, how=how, **keywords)
    training = {name: keywords.pop(name) for name in list(keywords) if name in Removing.model_fields}
    how = methods.of(Removing, how, training)
    return train_(model, texts or {}, how, objective=remover, only=where, seed=seed, what="removing", **keywords)
