"""A sweep's finished cells as one table: every arm and stage of every setting, beside its controls.

1. Cells that differ in arms and seeds alone are one experiment, spread: their arms and seeds are put together.
2. A row for each setting, arm and stage: the concept's score with its interval, over seeds where there are several; the
   random and the unpruned arm's beside it, and the paired difference from the random arm, over the seeds of both.
3. Where an arm has no control in any cell of its setting, the row says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from relearn_lens.analysis import story
from relearn_lens.measure.evaluation import Scores
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.runs.results import Run

SPREAD = ("arms", "seeds")
"""The settings that make no other experiment: which part of it a cell is."""

OWN_BASE = "never"
"""The arm whose base model is fine-tuned for it alone."""

NO_CONTROL = "no random arm: no control"


@dataclass
class Pool:
    """The cells of one setting, put together."""

    values: dict[str, Any]
    """What was swept, without arms and seeds."""
    cells: list[str] = field(default_factory=list)
    arms: dict[str, dict[int, Trajectory]] = field(default_factory=dict)
    """Arm to seed to trajectory."""
    run: Run | None = None
    """The first cell's: settings that all share."""
    notes: list[str] = field(default_factory=list)

    def add(self, cell: str, run: Run) -> None:
        """One more cell. What an earlier cell has too is left out: it is the same training."""
        self.cells.append(cell)
        self.run = self.run or run
        for name, arms in run.arms.items():
            for arm in arms:
                self.arms.setdefault(name, {}).setdefault(arm.seed, arm)
                if name == OWN_BASE:
                    continue
                shared = (each for other, each in self.arms.items() if other != OWN_BASE)
                first = next(each[arm.seed] for each in shared if arm.seed in each)
                here, there = (each[BASE].scores.shown(run.label) for each in (arm, first))
                if here != there:
                    self.notes.append(
                        f"{cell}: the base model of seed {arm.seed} is not quite the one of the setting's other cells "
                        f"({here:.4f}, {there:.4f}); were they trained on other machines, or with other threads?"
                    )

    def rows(self) -> list[dict[str, Any]]:
        """One for each arm and stage."""
        return [
            {**self.values, **self._row(name, arms, stage)}
            for name, arms in self.arms.items()
            for stage in next(iter(arms.values())).stages
        ]

    def _row(self, name: str, arms: Mapping[int, Trajectory], stage: str) -> dict[str, Any]:
        assert self.run
        label, how = self.run.label, self.run.interval
        mine = {seed: arm[stage].scores for seed, arm in sorted(arms.items())}
        one = next(iter(mine.values()))
        score = story.estimate(np.asarray, label, list(mine.values()), **how)
        low, high = sorted((one.displayed(score.low), one.displayed(score.high)))
        row: dict[str, Any] = {
            "concept": story.name_of(next(iter(arms.values()))), "arm": name, "stage": stage, "seeds": len(mine),
            "metric": one.metric, "unit": one.unit, "score": one.displayed(score.value),
            "low": low, "high": high, "over": score.over, "random": None, "unpruned": None,
            **dict.fromkeys(("difference", "difference_low", "difference_high", "difference_over")), "control": "",
        }  # fmt: skip
        for control in ("random", "unpruned"):
            if name != control and control in self.arms:
                row[control] = float(np.mean([arm[stage].scores.shown(label) for arm in self.arms[control].values()]))
        if name in ("random", "unpruned") or stage == BASE:  # the base is the same model in every arm
            return row
        random = {seed: arm[stage].scores for seed, arm in self.arms.get("random", {}).items() if seed in mine}
        if not random:
            return {**row, "control": NO_CONTROL}
        seeds = sorted(random)
        gap = story.estimate(np.subtract, label, [mine[s] for s in seeds], [random[s] for s in seeds], **how)
        sign = one.displayed(1.0) - one.displayed(0.0)  # a loss falls where the value rises
        low, high = sorted((sign * gap.low, sign * gap.high))
        return row | {
            "difference": sign * gap.value, "difference_low": low, "difference_high": high,
            "difference_over": gap.over, "control": f"random, {len(seeds)} seed{'s' * (len(seeds) > 1)} of both",
        }  # fmt: skip

    def together(self) -> Run | None:
        """The setting as one run, of the seeds that all its arms have; None if there are none."""
        assert self.run
        seeds = sorted(set.intersection(*(set(arms) for arms in self.arms.values())))
        if not seeds:
            return None
        settings = self.run.experiment.model_copy(update={"arms": tuple(self.arms), "seeds": tuple(seeds)})
        return Run(settings, {name: [arms[seed] for seed in seeds] for name, arms in self.arms.items()})


def pool_key(run_settings: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str:
    """What cells must have in common to be one experiment: every setting but arms and seeds, and the same inputs."""
    kept = {name: value for name, value in run_settings.items() if name not in SPREAD}
    return json.dumps([kept, inputs], sort_keys=True)


def cell_rows(cell: str, values: Mapping[str, Any], run: Run) -> list[dict[str, Any]]:
    """One for each arm, seed and stage of a cell; intervals over sentences, so within one training."""
    swept = {key: value for key, value in values.items() if key not in SPREAD}

    def row(arm: str, seed: int, stage: str, scores: Scores) -> dict[str, Any]:
        low, high = sorted(scores.interval(run.label, level=run.interval["level"], n=run.interval["draws"]))
        return {
            "cell": cell, **swept, "arm": arm, "seed": seed, "stage": stage, "metric": scores.metric,
            "score": scores.shown(run.label), "low": low, "high": high,
        }  # fmt: skip

    return [
        row(name, arm.seed, stage, snapshot.scores)
        for name, arms in run.arms.items()
        for arm in arms
        for stage, snapshot in arm.snapshots.items()
    ]


def beside(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> pd.DataFrame:
    """Rows of cells with the random and the unpruned arm's score of the same setting, seed and stage beside each."""
    frame: Any = pd.DataFrame([{**row, **{key: cell_text(row[key]) for key in keys}} for row in rows])
    if not len(frame):
        return frame
    on = [*keys, "seed", "stage"]
    for control in ("random", "unpruned"):
        theirs = frame[frame.arm == control].drop_duplicates(on)[[*on, "score"]]
        frame = frame.merge(theirs.rename(columns={"score": control}), on=on, how="left")
    return frame


def cell_text(value: Any) -> str:
    """A swept value as a table shows it."""
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "+".join(map(cell_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def printed(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that is printed: base once, right after pruning, and the last stage of each arm."""
    last = {_setting(row, keys) + row["arm"]: row["stage"] for row in rows}
    metrics = sorted({row["metric"] for row in rows})
    shown, based = [], set()
    for row in rows:
        setting = _setting(row, keys)
        own = row["arm"] == OWN_BASE
        first_base = row["stage"] == BASE and (own or setting not in based)
        if first_base and not own:
            based.add(setting)
        if not (first_base or row["stage"] in (PRUNED, last[setting + row["arm"]])):
            continue
        alone = row["arm"] in ("random", "unpruned") or row["stage"] == BASE
        shown.append(
            [
                *(cell_text(row[key]) for key in keys),
                row["concept"],
                "all arms" if row["stage"] == BASE and not own else row["arm"],
                row["stage"],
                str(row["seeds"]),
                _shown(row["score"], row["low"], row["high"]),
                "" if alone else "none" if row["random"] is None else f"{row['random']:.3f}",
                "" if alone else row["control"]
                if row["difference"] is None
                else _shown(row["difference"], row["difference_low"], row["difference_high"]),
                "" if alone else "none" if row["unpruned"] is None else f"{row['unpruned']:.3f}",
            ]
        )  # fmt: skip
    header = [*keys, "concept", "arm", "stage", "seeds", " or ".join(metrics), "random", "minus random", "unpruned"]
    return header, shown


def _setting(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return json.dumps([row[key] for key in keys])


def _shown(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None or not (np.isfinite(low) and np.isfinite(high)):
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def intervals(rows: Sequence[Mapping[str, Any]], settings: int) -> str:
    """What the intervals of a table are over, and what they are not corrected for."""
    over = sorted({row[key] for row in rows for key in ("over", "difference_over") if row[key]})
    text = f"Intervals over {' or '.join(over)}; each holds by itself"
    return f"{text}, and nothing is corrected for {settings} settings side by side." if settings > 1 else f"{text}."
