"""Many runs from one file: settings crossed, each cell an ordinary run folder, gathered in one table.

A sweep file is a file of settings with a table of axes, each a dotted setting and the values it takes:

    preset = "names-quick"
    [sweep]
    "prune.fraction" = [0.1, 0.3, 0.5]
    seeds = [[0], [1], [2]]
    arms = [["concept"], ["random"], ["unpruned"]]
    [[sweep.cells]]                  # settings that go together: one more axis, crossed with the others
    model = "minilm"
    site = "mlp_post"

1. Every cell's settings are checked before anything runs.
2. Each cell runs in a process of its own (`engines`). One that fails is said and stops no other; the same sweep again
   leaves what is complete, goes on with what was interrupted and tries again what failed.
3. What is complete is gathered (`sweep_tables`); cells that differ in arms and seeds alone are read together.

The folder of a sweep:

    sweep.toml       the file, as it was given
    settings/*.toml  each cell's settings
    logs/*.log       what each cell printed
    shared/          while it lasts, fine-tuned models that several cells begin from
    CELL/            a run folder for each
    summary.json     every cell's end, and the table: every setting, arm and stage beside its controls
    cells.parquet    the concept's score of every cell, arm, seed and stage, beside the controls'
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relearn_lens import files
from relearn_lens.bench import engines
from relearn_lens.names import explained, meant
from relearn_lens.runs import needs
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import Experiment, are_of
from relearn_lens.runs.verify import MANIFEST

if TYPE_CHECKING:
    from relearn_lens.bench.sweep_tables import Pool

ASKED, SUMMARY, CELLS, SETTINGS, LOGS, SHARED = (
    "sweep.toml", "summary.json", "cells.parquet", "settings", "logs", "shared",
)  # fmt: skip
ENGINES = {
    "local": "processes of this machine",
    "ray": "tasks of a Ray cluster, or of a Ray that is started here (extra ray)",
}
MOST_CELLS = 10_000
_MOST_LINES = 30
_LONGEST = 120

Tell = Callable[[str, str, engines.Done | None], object]
"""Called with a cell's name, what it is now (`"complete"`, `"started"`, `"done"`, `"failed"`), and its end."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of its folder: what was swept, `prune.fraction=0.3,seeds=0`."""
    given: Mapping[str, Any]
    """The swept settings, by dotted key."""
    experiment: Experiment

    def value(self, key: str) -> Any:
        """The cell's value of a setting that was swept, in this cell or in another."""
        if key in self.given:
            return self.given[key]
        value: Any = self.experiment.model_dump(mode="json")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for, checked."""

    path: Path
    text: str
    keys: tuple[str, ...]
    """Every setting that is swept, by dotted key."""
    cells: tuple[Cell, ...]

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r}: {len(self.cells)} cells over {', '.join(self.keys)})"


@dataclass(frozen=True)
class Swept:
    """A sweep's results so far."""

    folder: Path
    summary: dict[str, Any]
    """What summary.json holds."""
    failed: Mapping[str, str]
    """Cell to its error, in one line."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each setting, arm and stage, over the seeds of all cells."""
        return self.summary["table"]

    def to_dataframe(self) -> Any:
        """`rows` as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)


# --- what is asked


@explained
def read(path: str | Path) -> Sweep:
    """The cells that a sweep file asks for, every one's settings checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no TOML, no axes, an axis that is no list of values, settings that are wrong in any cell (all of
            them at once, one line each), or two cells that are the same run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sweep file at {str(path)!r}")
    values = files.read_toml(path)
    swept = values.pop("sweep", None)
    if not isinstance(swept, dict) or not swept:
        raise ValueError(
            f'{str(path)!r} has no table [sweep] of settings and their values, such as "prune.fraction" = [0.1, 0.3]; '
            "`relearn-lens run` takes a file without one"
        )
    axes = _axes(swept)
    total = math.prod(map(len, axes))
    if total > MOST_CELLS:
        raise ValueError(f"{str(path)!r} asks for {total:,} cells; at most {MOST_CELLS:,}, so split it")
    cells, problems = [], {}
    for combination in itertools.product(*axes):
        given = {key: value for _, part in combination for key, value in part.items()}
        name = _name(combination)
        try:
            cells.append(Cell(name, given, _experiment(values, given)))
        except ValueError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    if problems:
        raise ValueError(_told(problems, total))
    _check_distinct(cells)
    keys = tuple(dict.fromkeys(key for cell in cells for key in cell.given))
    return Sweep(path, path.read_text(encoding="utf-8"), keys, tuple(cells))


Choice = tuple[str | None, dict[str, Any]]
"""One value of an axis: the name it was given, if any, and the settings it stands for."""


def _axes(swept: Mapping[str, Any]) -> list[list[Choice]]:
    """Each axis as its choices; the explicit cells are one axis, the first."""
    tables = swept.get("cells", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) and table for table in tables):
        raise ValueError("sweep.cells: tables of settings, each under a line [[sweep.cells]]")
    axes: list[list[Choice]] = []
    if tables:
        axes.append([(_given_name(table), _flat({k: v for k, v in table.items() if k != "name"})) for table in tables])
    for key, values in _flat({k: v for k, v in swept.items() if k != "cells"}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"sweep.{key} = {values!r}: a list of the values that the setting takes, one at least")
        axes.append([(None, _flat({key: value})) for value in values])
    seen: dict[str, int] = {}
    for n, axis in enumerate(axes):
        for key in {key for _, choice in axis for key in choice}:
            if seen.setdefault(key, n) != n:
                raise ValueError(f"{key} is swept twice: by two axes, or by an axis and a table of sweep.cells")
    return axes


def _given_name(table: Mapping[str, Any]) -> str | None:
    name = table.get("name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.+=-]{0,60}", name, re.ASCII)):
        raise ValueError(f"sweep.cells: name = {name!r}: letters, digits and . _ + = - (it names a folder)")
    if name in (SETTINGS, LOGS, SHARED):
        raise ValueError(f"sweep.cells: name = {name!r} is what the sweep's own folder is called")
    return name


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables of settings as dotted keys; a list alone under `measure` is what it measures."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _experiment(values: Mapping[str, Any], given: Mapping[str, Any]) -> Experiment:
    """The settings of the file with a cell's over them, by the ways of `relearn-lens run FILE --set`."""
    import tomli_w

    # Only a file of settings can say "none" and a preset; all else goes over what the file says.
    own = {key: value for key, value in given.items() if value == "none" or key == "preset"}
    merged: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for key, value in own.items():
        *groups, last = key.split(".")
        table = merged
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "cell.toml"
        file.write_text(tomli_w.dumps(merged), encoding="utf-8")
        return settings_of(file, {key: value for key, value in given.items() if key not in own})


def _name(choices: Sequence[Choice]) -> str:
    """The name of a cell, from its own values alone: more values or cells beside it do not change it."""
    whole = ",".join(
        name or ",".join(f"{key}={_slug(value)}" for key, value in given.items()) for name, given in choices
    )
    return whole if len(whole) <= _LONGEST else f"{whole[: _LONGEST - 9]}-{files.sha256_of(whole)[:6]}"


def _slug(value: Any) -> str:
    """A value as part of a folder's name; where it cannot be one, its safe part and a hash."""
    if isinstance(value, list):
        return "+".join(map(_slug, value)) or "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[-40:]
    return safe if safe == text else f"{safe.strip('-.')}-{files.sha256_of(text)[:6]}"


def _told(problems: Mapping[str, Sequence[str]], total: int) -> str:
    """Every error once, with the cells it is in."""

    def where(names: Sequence[str]) -> str:
        if len(names) == total:
            return "every cell"
        return f"cell {names[0]}" if len(names) == 1 else f"{len(names)} cells, such as {names[0]}"

    lines = [f"{where(names)}: {line}" for line, names in problems.items()]
    more = len(lines) - _MOST_LINES
    return "\n".join(lines[:_MOST_LINES] + ([f"and {more} more"] if more > 0 else []))


def _check_distinct(cells: Sequence[Cell]) -> None:
    seen: dict[str, str] = {}
    names: set[str] = set()
    doubles = []
    for cell in cells:
        first = seen.setdefault(cell.experiment.model_dump_json(), cell.name)
        if first != cell.name or cell.name in names:
            doubles.append(f"cell {cell.name} is the same run as cell {first}; leave one out")
        names.add(cell.name)
    if doubles:
        raise ValueError("\n".join(doubles[:_MOST_LINES]))


# --- running it


def check_engine(on: str) -> None:
    """Refuse an engine that there is not."""
    if on not in ENGINES:
        raise ValueError(f"on = {on!r}: no such engine; known: {', '.join(ENGINES)}{meant(on, ENGINES)}")


def folder_of(sweep: Sweep) -> Path:
    """Where a sweep goes by default: `runs/` and the file's name; a sweep folder's own sweep.toml goes on there."""
    here = sweep.path.parent
    if sweep.path.name == ASKED and (here / SETTINGS).is_dir():
        return here
    return Path("runs") / sweep.path.stem


@explained
def run(
    sweep: Sweep,
    out: str | Path | None = None,
    *,
    on: str = "local",
    workers: int | None = None,
    fresh: bool = False,
    tell: Tell | None = None,
) -> Swept:
    """Run a sweep's cells, each in a process of its own, and gather what is complete.

    `on` is one of `ENGINES`. `workers` is how many run at once here, by default what cores, memory and GPUs allow; a
    cell without the setting `threads` gets its share of the cores (other shares can change the last bits of a sum, so
    set it where bits must be the same). `fresh` removes the cells' runs first. A cell that fails is in `failed`, and
    the table lacks it.

    Raises:
        ValueError: an unknown engine, workers where none can be chosen, cells that hold runs with other settings.
        FileExistsError: the folder holds something that is no sweep.
        BlockingIOError: another process sweeps into the folder.
        ImportError, OSError: as `engines.on_ray`.
    """
    check_engine(on)
    if workers is not None and (workers < 1 or on != "local"):
        raise ValueError(f"workers = {workers}: one at least, and with on = 'local' alone (Ray counts CPUs itself)")
    if on == "ray":
        engines.need_ray()
    folder = Path(out or folder_of(sweep)).absolute()
    files.check_folder(folder, ASKED, "sweep")
    with files.alone(folder):
        if fresh:
            for cell in sweep.cells:
                _remove(folder / cell.name)
        _check_cells(folder, sweep)
        todo = [cell for cell in sweep.cells if not _manifest(folder / cell.name).get("complete")]
        if tell:
            for cell in sweep.cells:
                if cell not in todo:
                    tell(cell.name, "complete", None)
        return _gathered(sweep, folder, _perform(sweep, todo, folder, on, workers, tell) if todo else {})


def _perform(
    sweep: Sweep, todo: Sequence[Cell], folder: Path, on: str, workers: int | None, tell: Tell | None
) -> dict[str, str]:
    """Run cells; gives the errors of those that failed."""
    files.write_whole(folder / ASKED, sweep.text.encode())
    (folder / LOGS).mkdir(exist_ok=True)
    jobs = []
    for cell in todo:
        settings = folder / SETTINGS / f"{cell.name}.toml"
        files.write_whole(settings, cell.experiment.to_toml().encode())
        need = needs.estimate(cell.experiment)
        jobs.append(engines.Job(
            cell.name, settings, folder / cell.name, folder / LOGS / f"{cell.name}.log", cell.experiment.device,
            cell.experiment.threads, need.memory_mb if need else None, folder / SHARED,
        ))  # fmt: skip
    failed = performed(jobs, folder, on, workers, tell)
    if not failed:
        shutil.rmtree(folder / SHARED, ignore_errors=True)
    return failed


def performed(
    jobs: Sequence[engines.Job], folder: Path, on: str, workers: int | None, tell: Tell | None
) -> dict[str, str]:
    """Run jobs by an engine, telling of each as it starts and ends; gives the errors of those that failed."""
    failed: dict[str, str] = {}
    if on == "ray":
        ends = engines.on_ray(jobs, shared=folder)
    else:
        started = (lambda name: tell(name, "started", None)) if tell else None
        ends = engines.local(jobs, workers=workers or engines.workers_for(jobs), started=started)
    with stoppable(), contextlib.closing(ends) as ends:
        for done in ends:
            if done.error is not None:
                failed[done.name] = done.error
            if tell:
                tell(done.name, "failed" if done.error is not None else "done", done)
    return failed


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """To be told to end (by a scheduler, say) is to be interrupted: the cells' processes are stopped then too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove(cell: Path) -> None:
    """Remove a cell's run, if it is one and nobody is running into it."""
    if (cell / MANIFEST).is_file():
        with files.alone(cell):
            shutil.rmtree(cell)


def _manifest(cell: Path) -> dict[str, Any]:
    """A cell's manifest; empty where it has none, or one that cannot be read (its own run will say so)."""
    with contextlib.suppress(OSError, ValueError):
        return files.read_json(cell / MANIFEST)
    return {}


def _check_cells(folder: Path, sweep: Sweep) -> None:
    """Refuse to go on where cells hold runs with other settings, all of them at once."""
    there = [(cell, _manifest(folder / cell.name)) for cell in sweep.cells]
    other = [c.name for c, one in there if one.get("inputs") and not are_of(one.get("settings"), c.experiment)]
    if other:
        raise ValueError(
            f"{str(folder)!r} holds {len(other)} run(s) with other settings than the file says now, such as "
            f"{other[0]}; choose another folder with --out, or --fresh to remove these runs"
        )


# --- what came of it


def _gathered(sweep: Sweep, folder: Path, failed: Mapping[str, str]) -> Swept:
    """The tables of what is complete, on disk and as an object."""
    from relearn_lens.bench import sweep_tables as tables
    from relearn_lens.runs.store import load_run

    keys = [key for key in sweep.keys if key not in tables.SPREAD]
    ended, pools, rows, seconds = dict(failed), {}, [], {}
    for cell in sweep.cells:
        if cell.name in ended:
            continue
        try:
            result = load_run(folder / cell.name)
        except (ValueError, OSError) as error:
            ended[cell.name] = str(error)
            continue
        values = {key: cell.value(key) for key in sweep.keys}
        rows += tables.cell_rows(cell.name, values, result)
        seconds[cell.name] = round(sum(result.manifest.get("seconds", {}).values()), 1)
        key = tables.pool_key(result.experiment.model_dump(mode="json"), result.manifest.get("inputs"))
        pools.setdefault(key, tables.Pool({key: values[key] for key in keys})).add(cell.name, result)
    summary = files.plain(
        {
            "swept": list(sweep.keys),
            "cells": {
                cell.name: {
                    "swept": {key: cell.value(key) for key in sweep.keys},
                    "ended": "failed" if cell.name in ended else "complete",
                    "error": ended.get(cell.name),
                    "log": f"{LOGS}/{cell.name}.log",
                }
                for cell in sweep.cells
            },
            "table": [row for pool in pools.values() for row in pool.rows()],
            "settings": [_said(pool) for pool in pools.values()],
            "notes": [note for pool in pools.values() for note in pool.notes],
            "seconds": seconds,
        }
    )
    if rows:
        files.write_whole(folder / CELLS, tables.beside(rows, keys).to_parquet(index=False))
    files.write_whole(folder / SUMMARY, files.as_json(summary))
    return Swept(folder, summary, ended)


def _said(pool: Pool) -> dict[str, Any]:
    """A setting in words, and which cells it is made from."""
    run = pool.together()
    story = (
        run.numbers.what_happened
        if run
        else "No seed is there in every arm of this setting, so its arms cannot be compared."
    )
    return {**pool.values, "cells": pool.cells, "arms": list(pool.arms), "what_happened": story}
