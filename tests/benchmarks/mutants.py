"""Faults put into the package one at a time: which do the tests see?

`python -m tests.benchmarks mutants --seed 0 -n 100 [--only analysis/] [--reached FILE] [--out FILE]`

A fault is one comparison (`<` for `<=`), operator (`+` for `-`, `and` for `or`) or constant (a number more, `False` for
`True`) of a function, in a copy of the checkout. What is in the message of an error or in a text is left alone. Each is
met by the tests of its module, then by all of the folder that mirrors its package, and is caught where one fails, or
takes more than three times the processor time that they take without it. `--reached` is a file of coverage.py
(`pytest --cov=relearn_lens --cov-branch --cov-context=test`, of pytest-cov): each fault is then met by the tests of its
module that come to its line, and by 25 others that do. Some faults change nothing that could be seen: a survivor is a
question, not a gap. Results are kept a line each, and the same command goes on where it stopped.
Do the tests of today see what those of an older checkout saw? `--beside OLD` draws among the faults that can be put
into both, and `--checkout OLD --beside .` puts the same ones into the older one.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = "relearn_lens"
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
HEAVY = ("torch", "transformers", "transformer_lens.model_bridge", "scipy.stats", "sklearn.linear_model", "pandas")
"""What every child would import anew."""
SLOW = ("test_readme", "test_notebooks", "test_processes", "test_workshop", "test_lab")
"""Tests that take half a minute each."""
FAR, WHOLE = 25, 900
"""How many tests of other modules a fault meets at most with `--reached`, and seconds of processor time that they do
not take together."""


@dataclass(frozen=True)
class Mutant:
    """One fault: the how manyth node of a module's tree, and what it reads before and after."""

    module: str
    """Path below the package."""
    node: int
    since: int
    line: int
    """Line, and that at which its statement begins."""
    was: str
    now: str
    within: str = ""
    """Functions and classes around it, and the how manyth such fault it is in them."""

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.was}  >  {self.now}"


def _nodes(
    tree: ast.AST, inside: bool = False, within: str = "", since: int = 0
) -> Iterator[tuple[ast.AST, bool, str, int]]:
    """All nodes in one order, whether a fault may be put there (in a function, not in an annotation or a text), the
    names of what it is in, and the line at which its statement begins."""
    since = tree.lineno if isinstance(tree, ast.stmt) else since
    yield tree, inside, within, since
    function = isinstance(tree, ast.FunctionDef | ast.Lambda)
    within = f"{within}{getattr(tree, 'name', '')}." if isinstance(tree, ast.FunctionDef | ast.ClassDef) else within
    for name, value in ast.iter_fields(tree):
        allowed = (inside or function) and name not in ("annotation", "returns", "decorator_list")
        allowed &= not isinstance(tree, ast.Raise | ast.JoinedStr | ast.Assert)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child, allowed, within, since)


def _changed(node: Any) -> Any:
    """The node with its fault, or None where there is none to put."""
    other = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[kind]) if type(kind) in SWAPPED:
            other.ops = [SWAPPED[type(kind)]()]
        case ast.BinOp(op=kind) | ast.BoolOp(op=kind) if type(kind) in SWAPPED:
            other.op = SWAPPED[type(kind)]()
        case ast.UnaryOp(op=ast.Not()):
            return node.operand
        case ast.Constant(value=bool()):
            other.value = not node.value
        case ast.Constant(value=int() | float()):
            number: Any = node.value
            other.value = number + 1 if isinstance(number, int) else number * 1.5 + 0.1
        case _:
            return None
    return other


def mutants(root: Path, only: str = "") -> dict[tuple[str, ...], Mutant]:
    """Every fault that could be put into a checkout's modules whose path begins so, by what names it in any other."""
    made, often = {}, Counter[tuple[str, ...]]()
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root / PACKAGE).as_posix()
        if not name.startswith(only) or not _tests(root, name):
            continue
        for i, (node, allowed, within, since) in enumerate(_nodes(ast.parse(path.read_text(encoding="utf-8")))):
            if allowed and (other := _changed(node)) is not None:
                was, now = ast.unparse(node), ast.unparse(other)
                often[alike := (name, within, was, now)] += 1
                mutant = Mutant(name, i, since, node.lineno, was, now, f"{within}{often[alike]}")  # pyright: ignore[reportAttributeAccessIssue]
                made[_name(asdict(mutant))] = mutant
    return made


def _name(mutant: dict[str, Any]) -> tuple[str, ...]:
    """What a fault is called in any checkout."""
    return tuple(mutant[part] for part in ("module", "within", "was", "now"))


def _tests(root: Path, module: str) -> list[str]:
    """The tests of a module, and then of its package."""
    *folders, name = module.removesuffix(".py").split("/")
    own = "/".join(("tests", *folders, f"test_{name}.py"))
    folder = "/".join(("tests", *folders))
    return [each for each in dict.fromkeys((own, folder)) if each != "tests" and (root / each).exists()]


def _reaching(reached: Path, mutant: Mutant) -> list[str]:
    """The tests that come to a fault's line, those of its module first; of what a fixture did, the first test alone."""
    from coverage import CoverageData  # pyright: ignore[reportMissingImports]

    data = CoverageData(str(reached))
    data.read()
    (name,) = [each for each in data.measured_files() if each.endswith(f"/{PACKAGE}/{mutant.module}")] or [""]
    by_line = data.contexts_by_lineno(name)
    contexts = {each for line in range(mutant.since, mutant.line + 1) for each in by_line.get(line, [])}
    tests = {test for test in (each.rpartition("|")[0] for each in contexts) if test}
    own = f"test_{Path(mutant.module).stem}.py"
    near, far = ({test for test in tests if (own in test) == is_own} for is_own in (True, False))

    def place(test: str) -> tuple[bool, bytes]:  # alike in any checkout, what takes long last
        return Path(test.split("::")[0]).stem in SLOW, hashlib.sha256(test.encode()).digest()

    drawn = sorted(far, key=place)[:FAR]
    return [*sorted(near), *sorted(drawn)]


def _source(root: Path, mutant: Mutant) -> str:
    """The module with its fault."""
    tree = ast.parse((root / PACKAGE / mutant.module).read_text(encoding="utf-8"))
    fault = list(_nodes(tree))[mutant.node][0]
    changed = _changed(fault)

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return changed if node is fault else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Put().visit(tree)))


def _child(checkout: str, tests: list[str], log: str, limit: int) -> None:
    """pytest, in a fork that has the heavy imports and nothing of the package."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
    if limit:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    os.chdir(checkout)
    sys.path[:] = [checkout, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.dont_write_bytecode = True  # what was compiled of one fault is not taken for the next
    import pytest

    how = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line", "-o", "addopts=-q"]
    here = [test for test in tests if test.split("::")[0] == tests[0].split("::")[0]]
    # What is nearest comes first, whatever the tests' own order is.
    code = pytest.main([*how, *here]) or (pytest.main([*how, *tests]) if len(here) < len(tests) else 0)
    sys.stdout.flush()
    os._exit(int(code))


def _run(checkout: Path, tests: list[str], limit: int = 0) -> tuple[int, float, str]:
    """Exit code, seconds of processor time, and the line that says what failed."""
    log, before = checkout / "mutant.log", resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(str(checkout), tests, str(log), limit))
    process.start()
    process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.exitcode or 0, round(seconds, 1), failed[0].split(" - ")[0] if failed else ""


def _copy(root: Path, place: Path) -> Path:
    """All that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
    return place


def main() -> None:
    """Draw faults, try each, and say which were caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=100, help="how many faults")
    parser.add_argument("--only", default="", help="modules whose path below the package begins so, such as analysis/")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose package and tests, by default this one's")
    parser.add_argument("--beside", type=Path, help="draw only among the faults that this checkout can have as well")
    parser.add_argument("--reached", type=Path, help="which test comes to which line, as coverage.py wrote it down")
    parser.add_argument("--out", type=Path, help="where results are kept; by default below build/")
    asked = parser.parse_args()
    root = asked.checkout.resolve()
    every = mutants(root, asked.only)
    among = every.keys() & mutants(asked.beside, asked.only).keys() if asked.beside else every.keys()
    order = {name: hashlib.sha256(repr((asked.seed, name)).encode()).digest() for name in among}
    drawn = [every[name] for name in sorted(among, key=order.__getitem__)[: asked.n]]
    out = asked.out or ROOT / "build" / f"mutants-{asked.seed}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = {json.dumps(line["mutant"], sort_keys=True): line for line in lines if "mutant" in line}
    usual = {"": WHOLE / 3} | {line["tests"]: line["seconds"] for line in lines if "mutant" not in line}
    print(f"{len(drawn)} of {len(among):,} faults in {asked.only or PACKAGE}; {len(kept)} of some draw are in {out}")
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as place, out.open("a") as file:
        checkout, results = _copy(root, Path(place)), []

        def keep(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for mutant in drawn:
            if (line := kept.get(json.dumps(asdict(mutant), sort_keys=True))) is None:
                tests = _reaching(asked.reached, mutant) if asked.reached else _tests(root, mutant.module)
                folder = "" if asked.reached else tests[-1]
                if folder not in usual:
                    code, usual[folder], why = _run(checkout, [folder])
                    if code:
                        raise SystemExit(f"without any fault {folder} ends with {code}: {why}")
                    keep({"tests": folder, "seconds": usual[folder]})
                path = checkout / PACKAGE / mutant.module
                whole = path.read_bytes()
                path.write_text(_source(root, mutant), encoding="utf-8")
                limit = int(3 * usual[folder] + 30)
                code, seconds, why = _run(checkout, tests, limit) if tests else (0, 0.0, "no test comes there")
                path.write_bytes(whole)
                line = {"mutant": asdict(mutant), "caught": code != 0, "by": why or f"exit {code}", "seconds": seconds}
                keep(line)
                time.sleep(0.01)  # so that Ctrl-C ends this and not a child alone
            results.append((mutant, line))
            print(f"{'caught  ' if line['caught'] else 'SURVIVED'} {mutant}  [{line['by']}]", flush=True)
    alive = [mutant for mutant, line in results if not line["caught"]]
    print(f"{len(results) - len(alive)} of {len(results)} caught; survived:", *alive, sep="\n  ")


if __name__ == "__main__":
    main()
