"""What a language model knows of facts, by every metric: once, and at every pause of a training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

from relearn_lens.measure.asking import Asked, Metric, OfAnswers, Reference, asked_of
from relearn_lens.measure.evaluation import OVERALL, Label, Scores
from relearn_lens.measure.metrics import USUAL, checked, measured, metric_of
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.names import ByName, explained
from relearn_lens.text import markup
from relearn_lens.text.facts import FORGET, Facts

BASE, REMOVED = "base", "removed"
"""Names of the stages before and right after something is taken out; later stages are named by their training."""
T = TypeVar("T")
HELD_OUT = FORGET[1]
"""Where recovery is read: what the remover saw and the attacker did not."""


@dataclass(frozen=True, eq=False, repr=False)
class FactsSnapshot:
    """Everything measured of facts at one pause."""

    metrics: Mapping[str, Scores]
    """By name of the metric; a value is looked up by place: a role, or a role and `", reworded"`."""
    at: Checkpoint | None = None
    """Where in training; None before any."""

    @property
    def scores(self) -> Scores:
        """The first metric."""
        return next(iter(self.metrics.values()))

    def by(self, metric: str) -> Scores:
        """The scores of a metric.

        Raises:
            ValueError: it was not measured.
        """
        if metric not in self.metrics:
            raise ValueError(f"{metric!r} was not measured at this stage; measured: {', '.join(self.metrics)}")
        return self.metrics[metric]

    @property
    def places(self) -> tuple[str, ...]:
        """All places of all metrics."""
        return tuple(dict.fromkeys(label for scores in self.metrics.values() for label in scores.labels))

    def to_dataframe(self) -> pd.DataFrame:
        """A row for every metric and place: what people read, its interval, chance, unit, passages, and over what."""
        rows = [
            {
                "metric": name, "place": place, "shown": scores.shown(place),
                **dict(zip(("low", "high"), scores.interval(place), strict=True)),
                "chance": scores.chance(place), "unit": scores.unit,
                "over": f"{len(scores.sums(place))} {scores.over}", "support": scores.support()[place],
            }
            for name, scores in self.metrics.items()
            for place in scores.labels
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """A line for every place, a column for every metric."""
        return _aligned([["", *self.metrics], *self._rows()])

    def _repr_html_(self) -> str:
        return markup.box("by place", markup.table(["", *self.metrics], self._rows()))

    def _rows(self) -> list[list[str]]:
        return [[place, *(_with_interval(s, place) for s in self.metrics.values())] for place in self.places]


@dataclass(frozen=True, eq=False, repr=False)
class Ends:
    """The weights from which an arm was trained and those that it came to, with what reads them; in memory alone."""

    model: Model
    """As it is by now."""
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    evaluate: Callable[[Any], Mapping[str, Any]]
    """The outcomes of a model, by name, the primary one first."""
    label: Label
    """What they are read for."""


@dataclass(frozen=True, eq=False, repr=False)
class FactsTrajectory:
    """One arm on facts: snapshots by stage (`"base"`, `"removed"`, then the pauses of training), in order."""

    snapshots: Mapping[str, FactsSnapshot]
    asked: Asked
    arm: str = ""
    seed: int = 0
    removed: str = ""
    """What was taken out between base and the next stage, and how."""
    ends: Ends | None = None
    """Where weights were kept."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        return tuple(self.snapshots)

    @property
    def facts(self) -> Facts:
        """What was asked about."""
        return self.asked.facts

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that some stage has, the first one first."""
        return tuple(dict.fromkeys(name for snapshot in self.snapshots.values() for name in snapshot.metrics))

    @property
    def label(self) -> str:
        """Where recovery is read."""
        return HELD_OUT

    def __getitem__(self, stage: str | int) -> FactsSnapshot:
        return ByName(self.snapshots)[str(stage)]

    def by(self, metric: str) -> FactsTrajectory:
        """The same with one metric alone, which so is its `scores`: what `analysis.recovery` reads.

        Raises:
            ValueError: it was not measured.
        """
        return replace(
            self, snapshots={k: replace(s, metrics={metric: s.by(metric)}) for k, s in self.snapshots.items()}
        )

    def course(self, metric: str, place: str = HELD_OUT) -> dict[str, float]:
        """What people read of one metric at one place, by stage."""
        return {stage: snapshot.by(metric).shown(place) for stage, snapshot in self.snapshots.items()}

    def to_dataframe(self) -> pd.DataFrame:
        """`FactsSnapshot.to_dataframe` of every stage, with arm, seed, stage, epoch, step and tokens seen."""
        each: list[pd.DataFrame] = []
        for stage, snapshot in self.snapshots.items():
            at = snapshot.at
            when = {
                "arm": self.arm, "seed": self.seed, "stage": stage, "epoch": at.epoch if at else 0.0,
                "step": at.step if at else 0, "tokens_seen": at.tokens_seen if at else 0,
            }  # fmt: skip
            table = snapshot.to_dataframe().assign(**when)
            each.append(table.reindex(columns=[*when, *table.columns.drop([*when])]))
        return pd.concat(each, ignore_index=True)

    def table(self, place: str = HELD_OUT, *, beside: Mapping[str, FactsTrajectory] | None = None) -> str:
        """Every metric at one place by stage, with intervals, as text; other arms' columns beside it by their name."""
        arms = {self.arm or "arm": self, **(beside or {})}
        header = ["stage"]
        columns: list[list[str]] = []
        for metric in self.metrics:
            for name, arm in arms.items():
                here = {stage: s.metrics.get(metric) for stage, s in arm.snapshots.items()}
                if not any(s is not None and (place in s.labels or s.over != "keys") for s in here.values()):
                    continue
                header.append(metric if len(arms) == 1 else f"{metric} ({name})")
                first = next(s for s in here.values() if s is not None)
                columns.append([_with_interval(s, place) if (s := here.get(stage)) else "" for stage in self.stages])
                columns[-1].append(_short(first.chance(place if place in first.labels else OVERALL)))
        rows = [[stage, *cells] for stage, *cells in zip([*self.stages, "chance"], *columns, strict=True)]
        return f"{place} of {self.facts.name}\n" + _aligned([header, *rows])

    def __repr__(self) -> str:
        """The first metric at every place, then every metric where recovery is read."""
        first = next(iter(self.snapshots.values())).scores
        chance = ["chance", *(_short(first.chance(place)) for place in first.labels)]
        rows = [["stage", *first.labels], *self._rows(first.labels), chance]
        removed = f"; {self.removed}" if self.removed else ""
        what = f"{first.metric} ({first.unit}), intervals over {first.over}"
        head = f"{self.arm or 'arm'}, seed {self.seed}{removed}: {what}"
        more = f"\n\n{self.table()}" if len(self.metrics) > 1 and HELD_OUT in first.labels else ""
        return f"{head}\n{_aligned(rows)}{more}"

    def _repr_html_(self) -> str:
        first = next(iter(self.snapshots.values())).scores
        table = markup.table(["stage", *first.labels], self._rows(first.labels))
        return markup.box(f"{self.arm or 'arm'}: {first.metric}, {first.unit}", table)

    def _rows(self, places: Sequence[str]) -> list[list[str]]:
        return [[stage, *(_with_interval(s.scores, place) for place in places)] for stage, s in self.snapshots.items()]


@explained
def measure_facts(
    model: LanguageModel,
    facts: Facts | Asked,
    *,
    metrics: Sequence[str | Metric] = USUAL,
    reference: Reference | None = None,
    at: Checkpoint | None = None,
) -> FactsSnapshot:
    """What a model knows of facts: every metric, in every place that it can be taken in.

    Places are the roles of the facts but `never`, in taught wordings and in others; `asking.ask` says how many passages
    of each, and what it gives can be passed in the place of the facts. The model is read only.

    Raises:
        ValueError: an unknown metric, one whose reference is missing, or as `ask` and the metrics.
    """
    made = checked(metrics, reference, model)
    return FactsSnapshot(measured(model, asked_of(facts), made, reference), at)


@explained
def track_facts(
    model: LanguageModel,
    facts: Facts | Asked,
    checkpoints: Iterable[Checkpoint],
    *,
    metrics: Sequence[str | Metric] = USUAL,
    reference: Reference | None = None,
    before: FactsSnapshot | None = None,
    removed: str = "",
    arm: str = "",
    seed: int = 0,
    keep_weights: bool = False,
    on_measured: Callable[[str, FactsSnapshot], object] | None = None,
) -> FactsTrajectory:
    """Every metric now, and at every checkpoint of a training loop.

    `before` is the snapshot from before anything was removed (stage `"base"`); what the model is now is the stage
    `"removed"`. With `keep_weights` the trajectory holds copies of the weights of that stage and of the
    last one, for `grafts`.

    Raises:
        ValueError: as `measure_facts`; or two checkpoints of one stage.
    """
    made = checked(metrics, reference, model)
    questions = asked_of(facts)
    snapshots: dict[str, FactsSnapshot] = {} if before is None else {BASE: before}
    needs_removed = reference is not None and reference.removed is None and any(m.name == "returned" for m in made)
    start = model.copied() if keep_weights or needs_removed else {}
    if reference is not None and needs_removed:
        reference = replace(reference, removed=start)
    followed(
        snapshots, REMOVED, checkpoints, lambda at: FactsSnapshot(measured(model, questions, made, reference), at),
        _same_losses, on_measured, ("stage", "a name"),
    )  # fmt: skip
    ends = None
    if keep_weights:
        where = questions.where([place == HELD_OUT for place in questions.places])
        primary = [m for m in made if isinstance(m, OfAnswers)] or [metric_of("loss")]
        primary.sort(key=lambda m: m.name != "loss")  # what has no threshold comes first
        ends = Ends(model, start, model.copied(), lambda m: measured(m, where, primary), HELD_OUT)
    return FactsTrajectory(snapshots, questions, arm, seed, removed, ends)


def _same_losses(one: FactsSnapshot, other: FactsSnapshot) -> bool:
    """Whether the losses are the very same: shares that are all or nothing may well agree."""
    here, there = one.metrics.get("loss"), other.metrics.get("loss")
    return here is not None and there is not None and np.array_equal(here.sums(OVERALL), there.sums(OVERALL))


def followed(
    snapshots: dict[str, T],
    first: str,
    checkpoints: Iterable[Checkpoint],
    take: Callable[[Checkpoint | None], T],
    same: Callable[[T, T], bool],
    on_measured: Callable[[str, T], object] | None,
    by: tuple[str, str],
) -> None:
    """Take a snapshot now, as the stage `first`, and at every checkpoint; warn if two of them measure the same.

    Raises:
        ValueError: two checkpoints of one stage, which is told `by` what names stages.
    """
    for at in chain([None], checkpoints):
        stage = first if at is None else at.stage
        if stage in snapshots:
            raise ValueError(f"two checkpoints are of {by[0]} {stage}; each stage needs {by[1]} of its own")
        snapshots[stage] = take(at)
        if on_measured:
            on_measured(stage, snapshots[stage])
        for name, other in snapshots.items():
            if at is not None and name != stage and same(snapshots[stage], other):
                warnings.warn(
                    f"stages {name!r} and {stage!r} measure the same to the bit, so these checkpoints hold the same "
                    "weights; look whether they were loaded, or saved, as meant",
                    stacklevel=4,  # who called `track`
                )


def _with_interval(scores: Scores, place: str) -> str:
    if place not in scores.labels:
        if scores.over == "keys":
            return ""
        place = OVERALL  # a number of the model, whatever it is asked
    low, high = scores.interval(place)
    return f"{_short(scores.shown(place))} [{_short(low)}, {_short(high)}]"


def _short(value: float) -> str:
    """Two decimals, whole hundreds without."""
    return "n/a" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join(map(line, rows))
