"""One paper over its seeds: readings kept as they come, intervals over seeds, a verdict for every claim.

A paper is a module of this package that measures its claims of one seed at a time, with a `Lab` that has the facts and
the models; each seed is one file of the folder, whole or absent, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from relearn_lens import progress
from relearn_lens.analysis.intervals import Estimate, over_seeds, over_seeds_and_neurons
from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.reproduce.claims import CLAIMS, Claim, Verdict, verdict_of
from relearn_lens.runs.files import as_json, read_json, write_whole
from relearn_lens.text.facts import Facts

Scale = Literal["toy", "real"]
SEEDS = (0, 1, 2)
"""What is chosen is chosen on the first; all are reported."""


@dataclass(frozen=True)
class Reading:
    """What one seed says of one claim."""

    key: str
    """Of the claim."""
    effect: Estimate | float
    """In the claim's unit, positive in its direction; with an interval where there is one within the seed."""
    control: float | None = None
    """The same of the control, which the effect is already beyond; shown beside it."""
    note: str = ""


@dataclass(frozen=True)
class Lab:
    """What a paper measures with: the facts, the model that was taught them, and its twin."""

    scale: Scale
    seed: int
    folder: Path
    """Where stages that several papers share may be kept."""

    @cached_property
    def taught(self) -> taught.Taught:
        """Trained once for each seed, by whoever needs it first."""
        return taught.load(recipe=taught.Recipe(seed=self.seed))

    @property
    def facts(self) -> Facts:
        """Invented people, in roles."""
        return self.taught.facts

    def model(self) -> LanguageModel:
        """A fresh copy of the model that was taught everything."""
        return taught.load(recipe=taught.Recipe(seed=self.seed)).model

    def never(self) -> LanguageModel:
        """A fresh copy of its twin."""
        return taught.load(recipe=taught.Recipe(seed=self.seed)).never


@dataclass(frozen=True)
class Paper:
    """One file of this package."""

    name: str
    title: str
    source: str
    """Authors, year, arXiv number."""
    protocol: str
    """What is done here."""
    smaller: str
    """What is smaller than in the paper, and what that cannot say."""
    measure: Callable[[Lab], Iterator[Reading]]
    scales: tuple[Scale, ...] = ("toy",)


@dataclass(frozen=True)
class Row:
    """One claim over all seeds."""

    claim: Claim
    effect: Estimate | None
    """None where no seed could measure it; `notes` say why."""
    control: float | None
    verdict: Verdict
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A paper's claims, measured."""

    paper: Paper
    scale: Scale
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    seconds: float
    """Summed over seeds; what was read from the folder counts as it took then."""
    folder: Path = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "paper": self.paper.name, "source": self.paper.source, "scale": self.scale, "seeds": self.seeds,
            "seconds": self.seconds, "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip


PAPERS: tuple[str, ...] = ()
"""Names, each a module of this package with a `PAPER`."""


def paper_of(name: str) -> Paper:
    """A paper by its name.

    Raises:
        ValueError: no paper has this name.
    """
    if name not in PAPERS:
        raise ValueError(f"no reproduction is called {name!r}; known: {', '.join(PAPERS)}, all")
    return importlib.import_module(f"{__package__}.{name}").PAPER


def reproduce(
    name: str, *, scale: Scale = "toy", seeds: Sequence[int] = SEEDS, out: str | Path = "runs/reproduce"
) -> Reproduction:
    """Measure a paper's claims over some seeds, and say of each whether it holds here.

    Raises:
        ValueError: no such paper, a scale that it does not have, or no seed.
    """
    paper = paper_of(name)
    if scale not in paper.scales:
        raise ValueError(f"{name} has no scale {scale!r}; it has {', '.join(paper.scales)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds = {list(seeds)}: give at least one, and each once")
    folder = Path(out)
    readings: dict[int, list[Reading]] = {}
    seconds = 0.0
    with progress.task(f"reproducing {name}", len(seeds)):
        for seed in seeds:
            readings[seed], took = _of_seed(paper, Lab(scale, seed, folder))
            seconds += took
            progress.advance()
    rows = tuple(_row(claim, readings) for claim in CLAIMS[name].values())
    result = Reproduction(paper, scale, tuple(seeds), rows, seconds, folder)
    write_whole(folder / name / f"{scale}.json", as_json(result.to_dict()))
    return result


def _of_seed(paper: Paper, lab: Lab) -> tuple[list[Reading], float]:
    """A seed's readings, measured or from the folder; a file that another version of the page wrote does not count."""
    path = lab.folder / paper.name / f"{lab.scale}-{lab.seed}.json"
    digest = _digest(paper)
    if path.exists() and (kept := read_json(path)).get("digest") == digest:
        return [_reading(each) for each in kept["readings"]], float(kept["seconds"])
    begin = time.perf_counter()
    readings = list(paper.measure(lab))
    seconds = time.perf_counter() - begin
    if unknown := {each.key for each in readings} - set(CLAIMS[paper.name]):
        raise ValueError(f"{paper.name} measures {sorted(unknown)}, which claims.py does not have")
    kept = {"digest": digest, "seconds": seconds, "readings": [asdict(each) for each in readings]}
    write_whole(path, as_json(kept))
    return readings, seconds


def _digest(paper: Paper) -> str:
    """Of the page that measures."""
    file = Path(str(importlib.import_module(f"{__package__}.{paper.name}").__file__))
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _reading(kept: dict[str, Any]) -> Reading:
    effect = kept["effect"]
    if isinstance(effect, dict):  # JSON has no NaN
        ends = {end: math.nan if effect[end] is None else effect[end] for end in ("value", "low", "high")}
        effect = Estimate(**{**effect, **ends})
    return Reading(**{**kept, "effect": math.nan if effect is None else effect})


def _row(claim: Claim, readings: dict[int, list[Reading]]) -> Row:
    """One claim over the seeds that measured it: the wider of the intervals over seeds and within them."""
    each = [reading for of_seed in readings.values() for reading in of_seed if reading.key == claim.key]
    notes = tuple(dict.fromkeys(reading.note for reading in each if reading.note))
    values = [r.effect.value if isinstance(r.effect, Estimate) else float(r.effect) for r in each]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return Row(claim, None, None, "inconclusive", notes or ("not measured",))
    within = [each[i].effect for i in finite]
    if all(isinstance(effect, Estimate) and effect.interval for effect in within):
        effect = over_seeds_and_neurons(within)  # pyright: ignore[reportArgumentType]
    else:
        effect = over_seeds([values[i] for i in finite])
    if len(finite) < len(readings):
        notes += (f"measured in {len(finite)} of {len(readings)} seeds",)
    controls = [each[i].control for i in finite]
    control = None if None in controls else sum(map(float, controls)) / len(controls)  # pyright: ignore[reportArgumentType]
    return Row(claim, effect, control, verdict_of(claim, effect), notes)


def table(results: Sequence[Reproduction]) -> str:
    """All claims as a Markdown table: claim, measured, verdict, command."""
    lines = ["| paper | claim | measured | published | verdict |", "|---|---|---|---|---|"]
    for result in results:
        for row in result.rows:
            measured = "" if row.effect is None else f"{row.effect} {row.claim.unit}"
            lines.append(
                f"| {result.paper.name} | {row.claim.says} | {measured} | {row.claim.published} | {row.verdict} |"
            )
    return "\n".join(lines) + "\n"


def write_table(results: Sequence[Reproduction], path: Path) -> Path:
    """Write `table` to a file."""
    write_whole(path, table(results).encode())
    return path
