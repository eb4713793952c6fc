"""The arms of an experiment: what is cut in each, what it starts from, and what it is the control of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relearn_lens.runs.settings import ArmRemoval, Experiment


@dataclass(frozen=True)
class Arm:
    """One way through the experiment: a model, what is taken out of it, and what training brings back."""

    name: str
    cut: str | None
    """The set of neurons that is pruned, by its name among a seed's cuts; None: nothing is."""
    knows: bool = True
    """Whether the model that it starts from was fine-tuned on the concept."""
    says: str = ""
    """What it is, in a few words."""
    removal: ArmRemoval | None = None
    """How the concept is removed, where it is not by cutting a set of neurons."""


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("concept", "concept", says="the concept's neurons are cut"),
        Arm("other", "other", says="another label's neurons are cut, as many"),
        Arm("random", "random", says="neurons drawn at random are cut, as many in every layer"),
        Arm("unpruned", None, says="nothing is cut"),
        Arm("never", "concept", knows=False, says="cut like the concept's arm, but it never had the label"),
    )
}
"""The arms by name, in the order in which they run: what grafts compare with is known when they are asked for."""


def cut_anything(arms: Sequence[Arm]) -> bool:
    """Whether there is anything to cut in some arms, and so a size to be found."""
    return any(arm.cut is not None for arm in arms)


def arms_of(experiment: Experiment, *, other: str | None) -> list[Arm]:
    """The arms of some settings in their order, and those of one's own; without another label to cut, that arm is left
    out."""
    usual = [arm for name, arm in ARMS.items() if name in experiment.arms and (name != "other" or other is not None)]
    own = [
        Arm(name, None, says=f"the concept is removed by {how.remove}", removal=how)
        for name, how in experiment.arm.items()
    ]
    return usual + own
