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
from relearn_lens.names import explained, known_name
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.arithmetic import TaskVector
from relearn_lens.remove.distillation import UNDIAL, Undo, WhoIs
from relearn_lens.remove.editing import Mend
from relearn_lens.remove.edits import DINM
from relearn_lens.remove.layering import Layered
from relearn_lens.remove.losses import ILU, NPO, GradDiff, GradientAscent, SimNPO
from relearn_lens.remove.masks import SelectivePrune, SetDifferencePrune
from relearn_lens.remove.preference import DPO, IDK, AltPO
from relearn_lens.remove.pruning import Prune, Pruner
from relearn_lens.remove.removal import ROLES, Remover, Removing, Texts, texts_of
from relearn_lens.remove.representations import RMU, CircuitBreaker, RepNoise
from relearn_lens.remove.routing import SGTM, GradientRoute
from relearn_lens.remove.weighting import CEU, PDU, WGA, SatImp
from relearn_lens.remove.wrappers import LAT, SAM, Averaged, Curvature, GradientPenalty, Smoothed, TARLight
from relearn_lens.text.facts import Facts

Wrapper = SAM | LAT | Smoothed | GradientPenalty | Curvature | Averaged | TARLight
"""What can stand around a remover's step."""
REMOVERS: dict[str, type[Remover] | type[Pruner]] = {
    kind.name: kind
    for kind in (
        *(Prune, SelectivePrune, SetDifferencePrune),
        *(GradientAscent, GradDiff, NPO, ILU, SimNPO, IDK, DPO, AltPO, WGA, SatImp, CEU, PDU, UNDIAL),
        *(RMU, CircuitBreaker, RepNoise, WhoIs, TaskVector, Undo, DINM, Mend, Layered, GradientRoute, SGTM),
    )
}
"""Removers by name. Each has `name`, `formula`, `source` and, with unit and origin, `model_fields`."""
WRAPPERS: dict[str, type[Wrapper]] = {
    kind.name: kind for kind in (SAM, LAT, Smoothed, GradientPenalty, Curvature, Averaged, TARLight)
}
"""What can stand around a remover's step, by name; described as the removers are."""


def remover_of(name: str) -> type[Remover] | type[Pruner]:
    """The remover of a name.

    Raises:
        ValueError: an unknown name.
    """
    return REMOVERS[known_name("remover", name, REMOVERS)]


@explained
def remove_(
    model: Model,
    texts: Texts | None,
    remover: str | Remover | Pruner | Objective,
    where: Mapping[str, Bool[Tensor, ...]] | Neurons | None = None,
    *,
    seed: int = 0,
    how: Training | None = None,
    **keywords: Any,
) -> Iterator[Checkpoint]:
    """Take something out of a model: by a remover's name, by a remover, or by a function of one's own.

    A function has the signature of an objective (`models.training.Objective`) and is given to the training loop as it
    is: `(model, batches by role, reference) -> {part: (sum, count)}`. Its texts have what roles it likes; the first one
    gives the steps. It trains as `Removing` says unless `how`, or single fields, say something else. Of a remover that
    is named, its own fields are keywords too.

    Raises:
        ValueError: an unknown name, and as the remover or `train_` says; at the call.
    """
    if isinstance(remover, str):
        kind = remover_of(remover)
        own = {name: keywords.pop(name) for name in list(keywords) if name in kind.model_fields}
        remover = methods.of(kind, None, own)
    if isinstance(remover, Pruner):
        if how is not None or keywords:
            raise ValueError(f"{remover.name} trains nothing, so it takes no {next(iter(keywords), 'how')!r}")
        return remover(model, texts, where, seed=seed)  # pyright: ignore[reportCallIssue]
    if isinstance(where, Neurons):
        raise ValueError(
            "where: neurons are pruned, and a training is given weights: a mapping of their plain names to masks"
        )
    if isinstance(remover, Remover):
        return remover(model, texts or {}, where, seed=seed, how=how, **keywords)
    training = {name: keywords.pop(name) for name in list(keywords) if name in Removing.model_fields}
    how = methods.of(Removing, how, training)
    if isinstance(where, WeightMask):
        where.check(model)
    if isinstance(texts, Facts):
        texts = texts_of(model, texts, ROLES, getattr(remover, "__name__", type(remover).__name__))
    return train_(model, texts or {}, how, objective=remover, only=where, seed=seed, what="removing", **keywords)
