"""Every remover beside every other on models whose truth is known, at the same retained ability.

Each cell (a remover and a seed, the base, the twin that never knew) is one file of the table's folder, whole or not
there, and is computed again only where its settings have changed.

1. The taught model of a seed is removed from by a remover's recipe, all of it timed.
2. The removal is gone back from until retain-near accuracy is tau of the base's (`remove.calibrate`).
3. Forget accuracy in trained and in other wording, and what was to stay, are asked there.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from relearn_lens.analysis.intervals import over_seeds
from relearn_lens.files import as_json, digest_of, read_json, write_whole
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.facts import GENERAL, NEAR, OTHER_WORDING, TRAINED_WORDING, know
from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import meant
from relearn_lens.remove.calibration import calibrate, mixed_
from relearn_lens.remove.recipes import RECIPES, recipe, values_of
from relearn_lens.remove.removers import REMOVERS, WRAPPERS
from relearn_lens.runs import removals
from relearn_lens.runs.store import versions

BASE, NEVER = "base", "never"
TAU, POINTS = 0.95, 64
GONE = 0.5
"""Forget accuracy below which, in both wordings, a remover works."""
KIND = "toy"
ROWS = (TRAINED_WORDING, OTHER_WORDING, NEAR, GENERAL)


@dataclass(frozen=True)
class Cell:
    """One row of one seed."""

    name: str
    """A remover, or one with a wrapper, as recipes name it; `base` or `never`."""
    seed: int
    values: dict[str, Any]
    """What its file holds."""
    cached: bool

    def accuracy(self, row: str) -> float:
        """After calibration."""
        return float(self.values["rows"][row]["accuracy"]["value"])

    @property
    def seconds(self) -> float | None:
        """That finding and removing took."""
        return self.values.get("seconds")


def names(only: Sequence[str] = ()) -> list[str]:
    """What is compared: all removers that have a recipe, or some.

    Raises:
        ValueError: one has no recipe.
    """
    known = list(RECIPES[KIND])
    if unknown := [name for name in only if name not in known]:
        raise ValueError(
            f"no recipe for {unknown[0]!r}; recipes for the {KIND}: {', '.join(known)}{meant(unknown[0], known)}"
        )
    return [name for name in known if not only or name in only]


def cells(folder: str | Path, seeds: Sequence[int], only: Sequence[str] = (), *, kept: bool = False) -> Iterator[Cell]:
    """Every cell of the table, from the folder or computed, seed by seed; the base and its twin first. With `kept`,
    those alone that the folder has.

    Raises:
        ValueError: no seed, one twice, or a remover without a recipe; before any work.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be some numbers from 0, each once; got {list(seeds)}")
    return _cells(Path(folder), seeds, names(only), kept)


def _cells(folder: Path, seeds: Sequence[int], chosen: Sequence[str], kept: bool) -> Iterator[Cell]:
    for seed in seeds:
        subject = functools.cache(partial(removals.subject, removals.TAUGHT, "people", seed=seed))
        base = None
        for name in (BASE, NEVER, *chosen):
            path, settings = folder / f"{name}-{seed}.json", _settings(name, seed)
            cell = _kept(path, name, seed, settings)
            if cell is None and not kept:
                cell = _made(path, name, seed, settings, subject(), base)
            base = cell if name == BASE else base
            if cell is not None:
                yield cell


def _settings(name: str, seed: int) -> dict[str, Any]:
    fields = {} if name in (BASE, NEVER) else removals.fields_of(recipe(KIND, name))
    return {"tau": TAU, "points": POINTS, "seed": seed, "versions": versions(), **fields}


def _kept(path: Path, name: str, seed: int, settings: dict[str, Any]) -> Cell | None:
    with contextlib.suppress(OSError, ValueError):  # no file, or a damaged one
        values = read_json(path)
        if values.get("digest") == digest_of(settings):
            return Cell(name, seed, values, True)
    return None


def _made(
    path: Path, name: str, seed: int, settings: dict[str, Any], subject: removals.Subject, base: Cell | None
) -> Cell:
    values = _of_twin(subject, name) if base is None or name == NEVER else _of_remover(subject, name, base)
    content = as_json({"name": name, "digest": digest_of(settings), "settings": settings, **values})
    write_whole(path, content)
    return Cell(name, seed, json.loads(content), False)


def _asked(model: LanguageModel, subject: removals.Subject) -> dict[str, Any]:
    return {row: removals.summary(answered) for row, answered in know(model, subject.facts).items()}


def _of_twin(subject: removals.Subject, name: str) -> dict[str, Any]:
    assert subject.never is not None
    return {"rows": _asked(subject.model if name == BASE else subject.never, subject)}


def _of_remover(subject: removals.Subject, name: str, whole: Cell) -> dict[str, Any]:
    """Removed, as it is and calibrated; the subject's model is put back. One that teaches a fresh model is asked as it
    is: between that and the base there is no way on which both are kept."""
    model, removal, seed = subject.model, recipe(KIND, name), whole.seed
    if fresh := getattr(removal.remover, "fresh", False):
        model = taught.untaught(subject.facts, recipe=taught.Recipe(seed=seed))
    base = model.copied()

    def near(model: LanguageModel) -> float:
        return know(model, subject.facts, NEAR)[NEAR].accuracy.value(OVERALL)

    try:
        begin = time.perf_counter()
        where = removals.located(model, subject.facts, removal, seed=seed)
        for pause in removal(model, subject.facts, where, seed=seed):
            steps = pause.step
        seconds = time.perf_counter() - begin
        removed = _asked(model, subject)
        rows, share = removed, None
        if not fresh:
            ends = whole.accuracy(NEAR), float(removed[NEAR]["accuracy"]["value"])
            share = calibrate(model, base, near, tau=TAU, points=POINTS, ends=ends).share
            mixed_(model, base, share)
            rows = removed if share == 1 else _asked(model, subject)
    finally:
        model.load_weights(base)
    return {
        "seconds": seconds, "steps": steps, "share": share, "removed": removed, "rows": rows,
        "where": None if where is None else repr(where),
    }  # fmt: skip


def table(every: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: means over seeds, for the two that decide with an interval (Student's t over seeds; of one seed
    BCa over keys)."""
    by_name: dict[str, list[Cell]] = {}
    for cell in every:
        by_name.setdefault(cell.name, []).append(cell)
    header = ["", "works", "forget", "reworded", "near", "general", "share", "s"]
    rows = []
    for name, group in by_name.items():
        means = {row: sum(cell.accuracy(row) for cell in group) / len(group) for row in ROWS}
        compared = name not in (BASE, NEVER)
        rows.append(
            [
                name,
                f"{sum(map(works, group))}/{len(group)}" if compared else "",
                *(_with_interval(group, row) for row in (TRAINED_WORDING, OTHER_WORDING)),
                *(f"{means[row]:.2f}" for row in (NEAR, GENERAL)),
                _share(group) if compared else "",
                f"{sum(cell.seconds or 0 for cell in group) / len(group):.0f}" if compared else "",
            ]
        )
    return header, rows


def works(cell: Cell) -> bool:
    """Whether forget accuracy is below `GONE` in both wordings where what is near is kept."""
    kept = cell.values.get("share", 0) is not None or cell.accuracy(NEAR) >= TAU
    return kept and all(cell.accuracy(row) < GONE for row in (TRAINED_WORDING, OTHER_WORDING))


def _share(group: Sequence[Cell]) -> str:
    shares = [cell.values["share"] for cell in group]
    return "fresh" if None in shares else f"{sum(shares) / len(shares):.2f}"


def _with_interval(group: Sequence[Cell], row: str) -> str:
    if len(group) == 1:
        value, (low, high) = group[0].accuracy(row), group[0].values["rows"][row]["accuracy"]["interval"]
    else:
        estimate = over_seeds([cell.accuracy(row) for cell in group])
        value, low, high = estimate.value, max(0.0, estimate.low), min(1.0, estimate.high)
    if low == high:
        return f"{value:.2f}"
    return f"{value:.2f} " + "-".join(f"{end:.2f}".removeprefix("0") for end in (low, high))


def page(every: Sequence[Cell]) -> str:
    """The table as a page, with what each remover moves, its lines, and the recipe."""
    header, rows = table(every)
    seeds = sorted({cell.seed for cell in every})
    first: dict[str, Cell] = {}
    for cell in every:
        first.setdefault(cell.name, cell)
    out = [
        "# Every remover at the same retained ability",
        "",
        f"Made by `relearn-lens removers --table DIR --seeds {','.join(map(str, seeds))} --page FILE`: toys taught",
        f"`people`, calibrated so that retain-near accuracy is at least {TAU} of the base's. Recipes were chosen on",
        f"seed 0. works: seeds with forget accuracy below {GONE} in both wordings, of those that were run. Intervals",
        "are over seeds, of one seed over keys. share: of the way to the removed model; fresh: taught so from the",
        "first step, and asked at its own ability. s: seconds of finding and removing on one thread, others beside",
        "it. lines: of code of the method's own class and what it alone uses; docstrings, blanks, comments are none.",
        "X@PLACE: X on what that localiser finds; rmu moves the output matrices of three blocks by itself.",
        "",
        "| " + " | ".join([*header, "lines"]) + " |",
        "|" + "---|" * (len(header) + 1),
    ]
    for row in rows:
        base, _, wrapper = row[0].partition("@")[0].partition("+")
        kind = WRAPPERS.get(wrapper) or REMOVERS.get(base)
        out.append("| " + " | ".join([*row, str(n_lines(kind)) if kind else ""]) + " |")
    weak = [name for name, cell in first.items() if name not in (BASE, NEVER) and not works(cell)]
    if weak:
        out += ["", f"Not below {GONE} in both wordings on seed {seeds[0]}: {', '.join(weak)}."]
    out += ["", "## Recipes", "", "| | fields that are not as published |", "|---|---|"]
    out += [
        f"| {name} | {', '.join(f'{key} {value}' for key, value in values_of(KIND, name).items()) or 'none'} |"
        for name in first
        if name not in (BASE, NEVER)
    ]
    return "\n".join(out) + "\n"


def n_lines(kind: type) -> int:
    """Lines of code of a class and of what of its module is private and used by it; docstrings, blank lines and
    comments are none."""
    source = inspect.getsource(inspect.getmodule(kind) or kind)
    tree, lines = ast.parse(source), source.splitlines()
    known = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    wanted, counted = [kind.__name__], set()
    while wanted:
        if (name := wanted.pop()) in counted:
            continue
        counted.add(name)
        names = {node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)}
        wanted += [name for name in names if name.startswith("_") and name in known]
    total = 0
    for name in counted:
        node = known[name]
        code = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for each in ast.walk(node):
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                code -= set(range(each.lineno, (each.end_lineno or each.lineno) + 1))
        total += sum(bool(lines[i - 1].strip()) and not lines[i - 1].lstrip().startswith("#") for i in code)
    return total
