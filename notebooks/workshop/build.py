"""Make exercises.ipynb and solutions.ipynb, and the timetable in TEACHER.md, from master.py.

    python notebooks/workshop/build.py            writes them
    python notebooks/workshop/build.py --check    exits 1 if one of them is not what master.py makes

The same source gives the same bytes: no outputs, no dates, and every cell's id is the one that master.py gives it.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MASTER, TEACHER = HERE / "master.py", HERE / "TEACHER.md"
KEYS = {
    "markdown": {"id", "minutes", "title"},
    "code": {"id", "tags"},
    "exercise": {"id", "title", "level", "minutes"},
    "solution": {"id"},
    "check": {"id"},
    "hint": {"id"},
    "notice": {"id"},
}
START, END = "<!-- timetable: made by build.py from master.py -->", "<!-- end of the timetable -->"


@dataclass(frozen=True)
class Cell:
    """One marked cell of the master."""

    kind: str
    given: dict[str, str]
    text: str
    line: int

    @property
    def id(self) -> str:
        """What the cell is called."""
        return self.given["id"]

    @property
    def minutes(self) -> int:
        """How long it takes; 0 where it is part of something else."""
        return int(self.given.get("minutes", 0))

    @property
    def prose(self) -> str:
        """The text without the comment signs."""
        lines = self.text.splitlines()
        if bad := [line for line in lines if line and not re.match(r"#( |$)", line)]:
            raise ValueError(
                f"{MASTER.name} line {self.line}: a {self.kind} cell holds comment lines, found {bad[0]!r}"
            )
        return "\n".join(line[2:] for line in lines)


@dataclass
class Exercise:
    """What belongs to one exercise."""

    task: Cell
    solution: Cell | None = None
    check: Cell | None = None
    hints: list[Cell] = field(default_factory=list)


def read(source: str) -> list[Cell]:
    """The cells of a master.

    Raises:
        ValueError: a marker that is not understood, or an exercise that lacks a part.
    """
    _, *parts = re.split(r"^# %% (.*)\n", source, flags=re.MULTILINE)
    cells, line = [], source[: source.index("# %% ")].count("\n") + 1
    for marker, text in zip(parts[::2], parts[1::2], strict=True):
        found = re.fullmatch(r"\[(\w+)\] (.+)", marker)
        kind = found[1] if found else ""
        if not found or kind not in KEYS:
            raise ValueError(f"{MASTER.name} line {line}: unknown cell {marker!r}; kinds: {', '.join(KEYS)}")
        given = {part.partition("=")[0]: part.partition("=")[2] for part in shlex.split(found[2])}
        if "id" not in given or not set(given) <= KEYS[kind]:
            raise ValueError(f"{MASTER.name} line {line}: a {kind} cell takes {', '.join(sorted(KEYS[kind]))}")
        cells.append(Cell(kind, given, text.strip("\n"), line))
        line += text.count("\n") + 1
    return cells


def stub(code: str) -> str:
    """A solution with its functions' bodies taken out: signature and docstring stay."""
    lines, kept = code.splitlines(), []
    at = 0
    for node in ast.parse(code).body:
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
            raise ValueError(f"a solution holds functions with docstrings, found {ast.unparse(node)[:60]!r}")
        kept += [*lines[at : node.body[0].end_lineno], "    raise NotImplementedError"]
        at = node.end_lineno or at
    return "\n".join(kept)


def notebook(cells: list[Cell], *, solved: bool) -> dict[str, Any]:
    """One of the two notebooks."""
    made: list[dict[str, Any]] = []

    def add(kind: str, name: str, text: str, tags: str = "") -> None:
        metadata = {"tags": tags.split(",")} if tags else {}
        cell = {"cell_type": kind, "id": name, "metadata": metadata, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))

    for item in _grouped(cells):
        if isinstance(item, Exercise):
            task, solution, check = item.task, item.solution, item.check
            assert solution
            assert check
            level = int(task.given["level"])
            head = f"### Exercise {task.given['title']}\n{'●' * level}{'○' * (5 - level)} · {task.minutes} minutes\n\n"
            add("markdown", f"{task.id}-task", head + task.prose)
            add("code", f"{task.id}-code", solution.text if solved else stub(solution.text))
            add("code", f"{task.id}-check", check.text)
            folds = [_folded(f"Hint {i}", hint.prose) for i, hint in enumerate(item.hints, 1)]
            if not solved:
                folds.append(_folded("Solution", f"```python\n{solution.text}\n```"))
            if folds:
                add("markdown", f"{task.id}-help", "\n\n".join(folds))
        elif item.kind == "notice":
            question, _, answer = item.prose.partition("\n---\n")
            add("markdown", item.id, f"{question}\n\n{_folded('Answer', answer)}")
        elif item.kind == "markdown":
            add("markdown", item.id, item.prose)
        else:
            add("code", item.id, item.text, item.given.get("tags", ""))
    ids = [cell["id"] for cell in made]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"two cells are called {', '.join(sorted(twice))}")
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _grouped(cells: list[Cell]) -> list[Cell | Exercise]:
    """The cells, with those of an exercise together."""
    found: list[Cell | Exercise] = []
    for cell in cells:
        last = found[-1] if found else None
        if cell.kind == "exercise":
            found.append(Exercise(cell))
        elif cell.kind in ("solution", "check", "hint"):
            if not isinstance(last, Exercise):
                raise ValueError(f"{MASTER.name} line {cell.line}: a {cell.kind} that follows no exercise")
            if cell.kind == "hint":
                last.hints.append(cell)
            else:
                setattr(last, cell.kind, cell)
        else:
            found.append(cell)
    for item in found:
        if isinstance(item, Exercise) and not (item.solution and item.check):
            raise ValueError(
                f"{MASTER.name} line {item.task.line}: exercise {item.task.id!r} lacks a solution or a check"
            )
    return found


def _folded(title: str, text: str) -> str:
    """Text that a click folds out."""
    return f"<details>\n<summary>{title}</summary>\n\n{text.strip()}\n\n</details>"


def timetable(cells: list[Cell]) -> str:
    """The teacher's table: what comes when, how long, how hard. The clock starts at 0:00."""
    rows = ["| from | minutes | what | difficulty |", "|---|---|---|---|"]
    at = 0
    for cell in cells:
        if cell.minutes:
            level = int(cell.given.get("level", 0))
            shown = "●" * level + "○" * (5 - level) if level else ""
            rows.append(f"| {at // 60}:{at % 60:02} | {cell.minutes} | {cell.given['title']} | {shown} |")
            at += cell.minutes
    return "\n".join([*rows, f"| {at // 60}:{at % 60:02} | **{at}** | end | |"])


def made() -> dict[Path, str]:
    """Every file that follows from the master, as it should be."""
    cells = read(MASTER.read_text(encoding="utf-8"))
    files = {}
    for name, solved in (("exercises", False), ("solutions", True)):
        text = json.dumps(notebook(cells, solved=solved), indent=1, ensure_ascii=False)
        files[HERE / f"{name}.ipynb"] = text + "\n"
    page = TEACHER.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{TEACHER.name} must hold the lines {START!r} and {END!r}")
    files[TEACHER] = f"{before}{START}\n{timetable(cells)}\n{END}{after}"
    return files


def main(arguments: list[str]) -> int:
    """Write or check; the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = [p for p, text in made().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if arguments:
        for path in stale:
            print(f"{path.name} is not what {MASTER.name} makes: run `python notebooks/workshop/build.py`")
        return int(bool(stale))
    for path, text in made().items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path.name}: {'written' if path in stale else 'as it was'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
