"""A bench: removers by ways back by seeds over one set of facts, spread over processes or a cluster, and what it says.

1. A job is some rows of one seed. All stages are kept by their recipe, so a job that is killed goes on from its last
   complete stage, and another bench into the same folder computes only what is new.
2. One job that fails is said and stops no other.
3. What is complete is gathered: verdicts, the matrix, ranks before and after calibration, pairs.

The folder of a bench:

    bench.toml       what was asked
    tasks/*.json     each job's part of it
    logs/*.log       what each job printed
    stages/          weights and answers, by recipe
    cells/*.json     which stages each row and seed is made of
    summary.json     verdicts, matrix, ranking, pairs
    report.html      the page
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from relearn_lens.analysis.matrix import NEVER, Results
from relearn_lens.bench import engines
from relearn_lens.bench.plan import Bench
from relearn_lens.bench.sweeps import check_engine, performed
from relearn_lens.files import alone, as_json, check_folder, digest_of, read_json, write_whole
from relearn_lens.names import explained
from relearn_lens.runs import needs

ASKED, SUMMARY, PAGE, TASKS, LOGS, STAGES, CELLS = (
    "bench.toml", "summary.json", "report.html", "tasks", "logs", "stages", "cells",
)  # fmt: skip
VERB = "bench-job"
"""The command that runs a job."""
ROWS_A_JOB = 3
"""Of one seed: they share the loading of the model."""

Tell = Callable[[str, str, engines.Done | None], object]
"""As of a sweep: a job's name, what it is now, and its end."""


@dataclass(frozen=True)
class Benched:
    """What a bench found."""

    folder: Path
    bench: Bench
    results: Results | None
    """None where no row is complete in every seed."""
    parts: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
    """By attack and rate, then by row: what each part of the model brings back."""
    metrics: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
    """By attack and rate, then by row: what metrics read at every checkpoint, whole and by layer."""
    failed: Mapping[str, str]
    """Job or cell to its error, in one line."""
    seconds: float


def has_twin(bench: Bench) -> bool:
    """Whether there is a model that never knew: of the taught one, or where a pretrained one is taught here."""
    return bench.model == "taught" or bench.teach is not None


def planned(bench: Bench) -> list[str]:
    """What a bench will do, and what that takes at most: jobs, memory of each, disk of all; no model is loaded.

    Raises:
        ValueError: as `run`, before anything is computed.
    """
    from relearn_lens.bench.cells import check
    from relearn_lens.runs import removals

    check(bench)
    rows, seeds = _rows(bench), bench.every_seed
    jobs, cells = len(seeds) * -(-len(rows) // ROWS_A_JOB), len(rows) * len(seeds)
    courses = sum(max(1, len(column.rates)) for column in bench.columns.values())
    out = [
        f"model: {bench.model}", f"facts: {bench.facts}",
        f"seeds: {_joined(bench.seeds)}; rates are chosen on {bench.chooses}",
        f"removers: {_joined(bench.rows)}{'; and the twin that never knew' if has_twin(bench) else ''}",
        f"ways back: {_joined(f'{name} ({_joined(c.rates)})'.replace(' ()', '') for name, c in bench.columns.items())}",
        f"metrics along the first of them: {_joined(bench.metrics) or 'none'}",
        f"{jobs} jobs, {cells} cells, {cells * courses} attacks",
    ]  # fmt: skip
    if bench.teach is not None:
        taught = f"{bench.teach.epochs:g} epochs at lr {bench.teach.lr:g}"
        out.insert(2, f"taught: {taught}; and a twin, all but what is forgotten")
    # Of the taught model nothing but its Python counts.
    shape = needs.Shape(4, 128, 4, 880_000, 400) if bench.model == removals.TAUGHT else needs.shape_of(bench.model)
    if shape is None:
        return [*out, "memory and disk: not known before the model is here"]
    longest = 32 if bench.facts in removals.MADE else 128
    # The base, the twin, what the remover left and what an attack starts from; and the models that metrics compare.
    copies = 4 + 2 * bool({"depth", "returned", "moved", "rank"} & set(bench.metrics))
    memory = sum(needs.removal_mb(shape, moving=shape.parameters, batch=32, longest=longest).values())
    memory += math.ceil(copies * shape.bytes / 2**20)
    disk = math.ceil(len(seeds) * (len(bench.rows) + 2 * (bench.teach is not None)) * shape.bytes / 2**20)
    return [*out, f"memory: about {memory:,} MB for each job at a time; disk: about {disk:,} MB"]


def _joined(names: Iterable[Any]) -> str:
    return ", ".join(f"{name:g}" if isinstance(name, float) else str(name) for name in names)


@explained
def run(
    bench: Bench,
    out: str | Path,
    *,
    on: str = "local",
    processes: int | None = None,
    fresh: bool = False,
    tell: Tell | None = None,
) -> Benched:
    """Run what is missing of a bench, and gather what is complete.

    `processes` is how many jobs run at once here, by default what cores and GPUs allow. `fresh` removes what the folder
    holds of a bench first.

    Raises:
        ValueError: removers or attacks that there are not, an unknown engine.
        FileExistsError: the folder holds something that is no bench.
        BlockingIOError: another process runs into the folder.
    """
    from relearn_lens.bench.cells import check

    check_engine(on)
    if processes is not None and (processes < 1 or on != "local"):
        raise ValueError(f"processes = {processes}: one at least, and with on = 'local' alone (Ray counts CPUs itself)")
    check(bench)
    if on == "ray":
        engines.need_ray()
    folder, begin = Path(out).absolute(), time.monotonic()
    check_folder(folder, ASKED, "bench")
    with alone(folder):
        if fresh:
            for name in (TASKS, LOGS, STAGES, CELLS):
                shutil.rmtree(folder / name, ignore_errors=True)
        write_whole(folder / ASKED, bench.to_toml().encode())
        (folder / LOGS).mkdir(exist_ok=True)
        jobs = []
        for seed in bench.every_seed:
            missing = [row for row in _rows(bench) if _index(folder, bench, row, seed) is None]
            for k in range(0, len(missing), ROWS_A_JOB):
                rows = missing[k : k + ROWS_A_JOB]
                name = f"seed {seed}: {', '.join(rows)}"
                task = folder / TASKS / f"{seed}-{'-'.join(rows)}.json"
                write_whole(task, as_json({"bench": bench.model_dump(mode="json"), "rows": rows, "seed": seed}))
                jobs.append(engines.Job(
                    name, task, folder, folder / LOGS / f"{task.stem}.log", bench.device, bench.threads, verb=VERB,
                    work=_on_ray,
                ))  # fmt: skip
        failed = performed(jobs, folder, on, processes, tell) if jobs else {}
        return gathered(bench, folder, failed, time.monotonic() - begin)


def _rows(bench: Bench) -> list[str]:
    return [*([NEVER] if has_twin(bench) else []), *bench.rows]


def _on_ray(job: engines.Job, file: TextIO) -> None:
    perform(job.settings, job.folder, say=lambda text: file.write(f"{text}\n"))


def perform(task: Path, folder: Path, *, say: Callable[[str], object] = print) -> None:
    """Run one job: some rows of one seed. A row that fails is said at the end, after the others.

    Raises:
        ValueError: rows that failed, one line each.
    """
    import torch

    from relearn_lens.bench.cells import Work
    from relearn_lens.runs.stages import Stages

    given = read_json(task)
    bench, seed = Bench.model_validate(given["bench"]), int(given["seed"])
    if bench.threads:
        torch.set_num_threads(bench.threads)
    work = Work(bench, seed, Stages(folder / STAGES))
    wrong = []
    for row in given["rows"]:
        begin = time.monotonic()
        try:
            index = work.cell(row)
        except (ValueError, FloatingPointError) as error:
            wrong.append(f"{row}: {error}")
            continue
        index |= {"key": _key(bench, row, seed), "seconds": round(time.monotonic() - begin, 1)}
        write_whole(folder / CELLS / f"{row}@{seed}.json", as_json(index))
        say(f"seed {seed}, {row}: {index['seconds']:.0f} s")
    if wrong:
        raise ValueError("\n".join(wrong))


def _key(bench: Bench, row: str, seed: int) -> str:
    """Hash of all that a cell depends on."""
    values = {
        **bench.model_dump(mode="json", exclude={"rows", "seeds", "draws"}),
        "first": bench.seeds[0],  # where parts are moved
        "row": bench.rows[row].model_dump(mode="json") if row in bench.rows else None,
    }
    return digest_of([values, seed])[:32]


def _index(folder: Path, bench: Bench, row: str, seed: int) -> dict[str, Any] | None:
    """A cell that is complete; None where it is not, or where it is another bench's."""
    try:
        index = json.loads((folder / CELLS / f"{row}@{seed}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("key") == _key(bench, row, seed) else None


def gathered(bench: Bench, folder: Path, failed: Mapping[str, str], seconds: float) -> Benched:
    """What is complete, as numbers, with summary and page written."""
    from relearn_lens.bench import bench_page
    from relearn_lens.bench.cells import read_cell
    from relearn_lens.runs.stages import Stages

    stages = Stages(folder / STAGES)
    wrong, cells, parts, metrics = dict(failed), {}, {}, {}
    for row in _rows(bench):
        for seed in bench.every_seed:
            index = _index(folder, bench, row, seed)
            if index is None:
                if not any(f"seed {seed}:" in name and row in name for name in failed):
                    wrong[f"{row}@{seed}"] = "not there"
                continue
            read = read_cell(index, stages)
            cells[row, seed] = read.cell
            for by_rate, own in ((parts, read.parts), (metrics, read.metrics)):
                for where, each in own.items():
                    by_rate.setdefault(where, {})[row] = each
    whole = tuple(row for row in bench.rows if all((row, seed) in cells for seed in bench.every_seed))
    twin = all((NEVER, seed) in cells for seed in bench.every_seed)
    results = None if not whole else Results(
        {at: cell for at, cell in cells.items() if twin or at[0] != NEVER}, whole, tuple(bench.columns), bench.seeds,
        bench.chooses, bench.bound, bench.draws, twin=twin,
    )  # fmt: skip
    benched = Benched(folder, bench, results, parts, metrics, wrong, seconds)
    write_whole(folder / SUMMARY, as_json(bench_page.summary(benched)))
    if results is not None:
        write_whole(folder / PAGE, bench_page.render(benched).encode())
    return benched
