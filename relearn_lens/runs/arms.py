"""The arms of an experiment: what is cut in each, what it starts from, and what it is the control of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relearn_lens.remove.pruning import Prune
from relearn_lens.runs.settings import Experiment


@dataclass(frozen=True)
class Arm:
    """One way through the experiment: a model, what is taken out of it, and what training brings back."""

    name: str
    where: str | None
    """The set of neurons that is pruned, by its name among a seed's cuts; in an arm of one's own the localiser that
    finds what is pruned or may move, or None for what is usual."""
    remove: str | None = Prune.name
    """The remover, with a wrapper as in `"npo+sam"`; None: nothing is removed."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the remover, its wrapper and its training."""
    control_of: str | None = None
    """The arm beside which it says what is special about that one."""
    knows: bool = True
    """Whether the model that it starts from was fine-tuned on the concept."""
    retrain: bool = True
    """Whether it is trained on; a control of the cut alone is measured after it, and that is all."""

    @property
    def own(self) -> bool:
        """Whether it is an arm of one's own."""
        return self.name not in ARMS


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("concept", "concept"),
        Arm("other", "other", retrain=False),
        Arm("random", "random", control_of="concept"),
        Arm("unpruned", None, None, control_of="concept"),
        Arm("never", "concept", control_of="concept", knows=False),
    )
}
"""The arms by name, in the order in which they run: what grafts compare with is known when they are asked for."""
COMPARED = tuple(arm.name for arm in ARMS.values() if arm.knows and "concept" in (arm.name, arm.control_of))
"""The arms whose neurons and weights are compared with each other: all begin with the same model."""


def arms_of(experiment: Experiment, *, other: str | None) -> list[Arm]:
    """The arms of some settings in their order, and those of one's own; without another label to cut, that arm is left
    out."""
    usual = [arm for name, arm in ARMS.items() if name in experiment.arms and (name != "other" or other is not None)]
    return usual + [Arm(name, how.where, how.remove, how.set) for name, how in experiment.arm.items()]
