"""The units of a run: what one process computes by itself, once what it needs is there."""

from __future__ import annotations

from dataclasses import dataclass

from relearn_lens.runs.arms import COMPARED, arms_of, cut_anything
from relearn_lens.runs.settings import Experiment

BASE, CUTTING, GRAFTED, AGAIN, OWN, BLOCKED = "base", "cutting", "grafted", "again", "own-", "blocked-"
"""Names of units; those of arms are the arms', and the last two begin one for each arm, or held part."""


@dataclass(frozen=True)
class Unit:
    """One unit of one seed."""

    name: str
    seed: int
    needs: tuple[str, ...] = ()
    """Units of the same seed whose results it takes up, in the order in which they come."""
    results: tuple[str, ...] = ()
    """What it leaves, by the beginnings of its files' names."""


def units_of(experiment: Experiment, seed: int, *, other: str | None) -> list[Unit]:
    """A seed's units in the order of their results; `other` as of `arms_of`."""
    arms = arms_of(experiment, other=other)
    names = [arm.name for arm in arms]
    units = [Unit(BASE, seed, (), (BASE,))]
    before: tuple[str, ...] = (BASE,)
    if cut_anything(arms):
        units.append(Unit(CUTTING, seed, before, ("sized", "cuts", "damage")))
        before = (BASE, CUTTING)
    grafts = "concept" in names and not experiment.grafts.skip and not experiment.retrain.lora_rank
    for arm in arms:
        # Where the concept is first back its controls keep their weights, to be grafted too.
        after = ("concept",) if grafts and arm.name in COMPARED and arm.name != "concept" else ()
        units.append(Unit(arm.name, seed, (*before, *after), (arm.name,)))
    if grafts:
        compared = tuple(name for name in names if name in COMPARED)
        units += [Unit(OWN + name, seed, (*before, "concept", name), (OWN + name,)) for name in experiment.arm]
        units.append(Unit(GRAFTED, seed, (*before, *compared), (GRAFTED,)))
        units.append(Unit(AGAIN, seed, (*before, "concept"), (AGAIN,)))
        after = (*before, *compared, GRAFTED)
        units += [Unit(BLOCKED + held, seed, after, (BLOCKED + held,)) for held in experiment.block.held]
    return units
