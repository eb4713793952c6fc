"""The units of a run: what one process computes by itself, once what it needs is there."""

from __future__ import annotations

from dataclasses import dataclass

from relearn_lens.measure.tracking import BASE as BASE_STAGE
from relearn_lens.runs.arms import COMPARED, arms_of
from relearn_lens.runs.settings import Experiment

BASE, CUTS, DAMAGE, TWIN, GRAFTED, AGAIN = "base", "cuts", "damage", "never-fine", "grafted", "again"
OWN, BLOCKED = "own-", "blocked-"
"""Names of units; those of arms are the arms', and the last two begin one for each arm, or held part."""
FIRST, END = "first", "end"
"""Where grafts are made: at the stage at which the concept is first back, and at the end."""


@dataclass(frozen=True)
class Unit:
    """One unit of one seed."""

    name: str
    seed: int
    needs: tuple[str, ...] = ()
    """Units of the same seed whose results it takes up, in the order in which they come."""
    results: tuple[str, ...] = ()
    """What it leaves, by the beginnings of its files' names."""
    part_of: tuple[str, str] | None = None
    """The arm or result that it is the beginning of, and its name there: what it leaves lasts until that is done."""


def units_of(experiment: Experiment, seed: int, *, other: str | None) -> list[Unit]:
    """A seed's units in the order of their results; `other` as of `arms_of`.

    Whoever can compute several takes the first. So what much waits for comes early, and the parts are of a size that
    keeps two processes busy until all of the seed is there.
    """
    arms = arms_of(experiment, other=other)
    names = [arm.name for arm in arms]
    units = [Unit(BASE, seed, (), (BASE,))]
    before: tuple[str, ...] = (BASE,)
    if any(arm.remove is not None and not arm.own for arm in arms):  # there is a size of the cut to be found
        units.append(Unit(CUTS, seed, before, ("sized", "cuts")))
        before = (BASE, CUTS)
    grafts = "concept" in names and not experiment.grafts.skip and not experiment.retrain.lora_rank
    for arm in arms:
        if not arm.knows:
            units.append(Unit(TWIN, seed, part_of=(arm.name, BASE_STAGE)))
        units.append(Unit(arm.name, seed, before if arm.knows else (*before, TWIN), (arm.name,)))
        if arm is arms[0] and CUTS in before:
            units.append(Unit(DAMAGE, seed, before, ("damage",)))
    if grafts:
        compared = tuple(name for name in names if name in COMPARED)
        units += [Unit(OWN + name, seed, (*before, "concept", name), (OWN + name,)) for name in experiment.arm]
        halves = {f"{GRAFTED}-{at}": at for at in (FIRST, END)}
        units += [Unit(name, seed, (*before, *compared), part_of=(GRAFTED, at)) for name, at in halves.items()]
        units.append(Unit(GRAFTED, seed, (*before, *compared, *halves), (GRAFTED,)))
        units.append(Unit(AGAIN, seed, (*before, "concept"), (AGAIN,)))
        after = (*before, *compared, GRAFTED)
        units += [Unit(BLOCKED + held, seed, after, (BLOCKED + held,)) for held in experiment.block.held]
    return units
