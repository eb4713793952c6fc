"""A finished experiment as an object: what a run folder loads into, and what everything that reads results takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from relearn_lens.measure.evaluation import Label
from relearn_lens.measure.tracking import BASE, Trajectory
from relearn_lens.names import ByName
from relearn_lens.runs.events import Again, ArmDone, Blocked, Cuts, Damage, Event, Grafted, Own, Sized
from relearn_lens.runs.numbers import Numbers
from relearn_lens.runs.settings import Experiment
from relearn_lens.text import markup


@dataclass
class Run:
    """A finished experiment: what a run folder loads into."""

    experiment: Experiment
    arms: dict[str, list[Trajectory]] = field(default_factory=dict)
    """Arm name to one trajectory per seed, in the order of the settings."""
    sized: list[Sized] = field(default_factory=list)
    """How large each seed's cut is, and the doses that say so."""
    cuts: list[Cuts] = field(default_factory=list)
    """The neurons that each seed cuts."""
    damage: list[Damage] = field(default_factory=list)
    """What cutting alone does, per seed."""
    grafted: list[Grafted] = field(default_factory=list)
    """Which parts brought the concept back, per seed."""
    own: list[Own] = field(default_factory=list)
    """The same of the arms of one's own."""
    again: list[Again] = field(default_factory=list)
    """The concept's arm cut again, per seed."""
    blocked: list[Blocked] = field(default_factory=list)
    """The concept's arm retrained with something held."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Versions, seeds, hashes of inputs, notes, seconds, memory."""
    folder: str | None = None

    def __post_init__(self) -> None:
        self.arms = ByName(self.arms)

    @cached_property
    def numbers(self) -> Numbers:
        """What it says; each is computed once."""
        return Numbers(self)

    def take(self, event: Event) -> None:
        """Put what an event brings to the rest; events that pass by change nothing."""
        self.__dict__.pop("numbers", None)
        match event:
            case ArmDone(trajectory=path):
                self.arms.setdefault(path.arm, []).append(path)
            case Sized() | Cuts() | Damage() | Own() | Grafted() | Again() | Blocked():
                getattr(self, type(event).__name__.lower()).append(event)

    @property
    def label(self) -> Label:
        """What the concept's F1 is looked up by."""
        return self.experiment.labels

    @property
    def interval(self) -> dict[str, Any]:
        """Coverage and bootstrap draws of every interval, as `analysis.estimate` takes them."""
        return {"level": self.experiment.measure.level, "draws": self.experiment.measure.draws}

    def to_dataframe(self) -> Any:
        """All arms' `Trajectory.to_dataframe` below each other."""
        import pandas as pd

        return pd.concat([t.to_dataframe() for arm in self.arms.values() for t in arm], ignore_index=True)

    def to_xarray(self) -> Any:
        """All arms' `Trajectory.to_xarray` along the axes `arm` and `seed`; NaN at stages that an arm does not have."""
        import xarray as xr

        arms = [
            xr.concat([t.to_xarray().drop_attrs() for t in arm], dim="seed")
            .assign_coords(seed=[t.seed for t in arm])
            .reindex(stage=self._stages())
            for arm in self.arms.values()
        ]
        return xr.concat(arms, dim="arm").assign_coords(arm=list(self.arms))

    def _stages(self) -> list[str]:
        """All stages that any arm has."""
        return list(dict.fromkeys(stage for arms in self.arms.values() for stage in arms[0].stages))

    def _repr_html_(self) -> str:
        """The concept's score by arm and stage, means over seeds."""
        stages, rows = self._stages(), []
        for name, arms in self.arms.items():
            shown = {s: sum(arm[s].scores.shown(self.label) for arm in arms) / len(arms) for s in arms[0].stages}
            rows.append([name, len(arms), *(f"{shown[s]:.3f}" if s in shown else "" for s in stages)])
        metric = next((arm[BASE].scores.metric for arms in self.arms.values() for arm in arms), "F1")
        how = self.experiment
        title = f"{how.model}, {how.corpus}, {how.site}: {metric} of {'+'.join(how.labels)}"
        return markup.box(title, markup.table(["arm", "seeds", *stages], rows))

    def __repr__(self) -> str:
        arms = "\n  ".join(repr(t) for arm in self.arms.values() for t in arm)
        return f"Run({self.experiment.model}, {self.experiment.corpus}, {self.experiment.site})\n  {arms}"
