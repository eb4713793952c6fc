"""One folder for a room without a network: every wheel, models and texts, the notebooks, and how to begin.

1. The wheel of this checkout, and with it what `pip download` gives under `constraints.txt`; what comes as source is
   built into a wheel here.
2. pip is asked, without any index, what it would install from these wheels alone: so the pack is complete, and what
   it does not need is taken out.
3. Models and texts are laid out as in a cache, so `RELEARN_LENS_CACHE` may point to them.
4. Everything is written beside the folder and takes its name at the end. After an interruption the same command takes
   the wheels that pip had saved.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer
from rich.progress import Progress, TaskID

from relearn_lens import sources

EXTRA = "workshop"
SOURCES = ("minilm", "bsb-names")
WHEELS_SIZE = 450_000_000
"""Bytes that the wheels take, about (Linux, with the CPU build of torch)."""
MARK, SUMS, START = "pack.json", "SHA256SUMS", "START.md"
_INSTALL = f'pip install --no-index --find-links wheels -c constraints.txt "relearn-lens[{EXTRA}]"'
_NOT_PACKED = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.pyc")
_LACKING = re.compile(r"(?:No matching distribution found for|\(constraint\)) ([\w.-]+==[\w.+!-]*\w)")
"""How pip names a package that it did not find; with a pin, it calls that a conflict."""


@dataclass(frozen=True)
class Pack:
    """What was packed."""

    folder: Path
    wheels: int
    files: int
    size: int
    """Bytes of all files."""


def estimate(names: Sequence[str] = SOURCES) -> int:
    """Bytes that a pack with these sources takes, about.

    Raises:
        ValueError: no source has that name.
    """
    for name in names:
        sources.hashes(name)
    return WHEELS_SIZE + sum(member.size for name in names for member in sources.SOURCES[name].members)


def pack(
    folder: Path,
    *,
    names: Sequence[str] = SOURCES,
    platforms: Sequence[str] = (),
    python: str | None = None,
    checkout: Path | None = None,
    progress: sources.Progress | None = None,
) -> Pack:
    """Make a pack, or make one again.

    `names` are sources. `platforms` are pip's names (`win_amd64`, `macosx_12_0_arm64`; several that one machine takes)
    and `python` a version such as `"3.12"`; by default those of this machine. For another platform pip takes wheels
    only, and asks conditions such as `sys_platform == "win32"` of *this* machine: try such a pack before the day.
    `checkout` is the folder with `pyproject.toml`, `constraints.txt` and `notebooks/`; by default that of this file.

    Raises:
        ValueError: an unknown source, a folder that holds something else or files that somebody changed, a Python
            version that is none, or a package that is no checkout; all before anything is written. A copy that is not
            what was fetched.
        ConnectionError: pip could not get or build a package, or what it got is not enough to install from.
        OSError: too little room on the disk, or a folder that cannot be written.
    """
    report = progress or (lambda what, done, total: None)
    folder, root, need = folder.absolute(), _checkout(checkout), estimate(names)
    if python is not None and not re.fullmatch(r"3\.\d+", python):
        raise ValueError(f"python must be a version such as 3.12, got {python!r}")
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < need:
        raise OSError(
            f"a pack needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder.parent}; free some, or "
            "pack to another disk"
        )

    work = folder.parent / f".{folder.name}.part"  # a fixed name: what a killed process left is found
    wheels = work / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for rest in work.iterdir():
        if rest != wheels:
            _remove(rest)
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        if not (wheels / wheel.name).exists():
            shutil.copy2(wheel, wheels / wheel.name)
    target = [part for name in platforms for part in ("--platform", name)]
    target += ["--python-version", python] if python else []
    shutil.copy2(root / "constraints.txt", work / "constraints.txt")
    version = _gather(root, work, target, report)

    for name in names:
        there, put = sources.fetch(name, progress=progress), work / "cache" / "sources" / sources.place_of(name).name
        put.mkdir(parents=True)
        for member, pinned in sources.hashes(name).items():
            shutil.copyfile(there / member, put / member)
            if _sha256(put / member) != pinned:
                raise ValueError(
                    f"the copy of {member} of source {name!r} in {put} is not what was fetched; pack again"
                )
    shutil.copytree(root / "notebooks", work / "notebooks", ignore=_NOT_PACKED)
    shutil.copy2(root / "LICENSE", work / "LICENSE")
    made = {
        "made_by": "notebooks/workshop/pack.py",
        "version": version,
        "python": python or f"{sys.version_info.major}.{sys.version_info.minor}",
        "platforms": list(platforms) or [f"{platform.system()} {platform.machine()}"],
        "sources": list(names),
    }
    (work / MARK).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (work / START).write_text(_start(made), encoding="utf-8", newline="\n")
    files = [path for path in sorted(work.rglob("*")) if path.is_file()]
    lines = []
    for done, path in enumerate(files):
        report("hash every file", done, len(files))
        lines.append(f"{_sha256(path)}  {path.relative_to(work).as_posix()}\n")
    (work / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")

    old = folder.parent / f".{folder.name}.old"
    _remove(old)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    _remove(old)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Pack(folder, len(list((folder / "wheels").iterdir())), len(files) + 1, size)


def _check_target(folder: Path) -> None:
    """Refuse a folder that would lose something if a pack took its place."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MARK).is_file():
        raise ValueError(
            f"{folder} holds something that is no pack (there is no {MARK}), so it is left as it is; name a new folder"
        )
    sums = (folder / SUMS).read_text(encoding="utf-8") if (folder / SUMS).is_file() else ""
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in sums.splitlines())}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    # What people work on is in notebooks/; wheels and cache are made again, whatever became of them.
    own = [name for name in sorted(found) if name != SUMS and name not in listed]
    own += [name for name in sorted(found) if name.startswith("notebooks/") and name in listed
            and _sha256(found[name]) != listed[name]]  # fmt: skip
    if own:
        raise ValueError(
            f"{folder} is a pack in which somebody worked: {len(own)} file(s) are new or changed, such as {own[0]}; "
            "move them away, or name a new folder"
        )


def _checkout(given: Path | None) -> Path:
    """The folder of the project."""
    root = (Path(__file__).parents[2] if given is None else given).absolute()
    for need in ("pyproject.toml", "constraints.txt", "LICENSE", "notebooks/workshop/exercises.ipynb"):
        if not (root / need).is_file():
            raise ValueError(
                f"a pack is made from a checkout of the project, and {root} has no {need}; install from one "
                '(`pip install -c constraints.txt -e ".[demo]"` in it) and run its notebooks/workshop/pack.py'
            )
    return root


def _gather(root: Path, work: Path, target: list[str], report: sources.Progress) -> str:
    """Fill the folder of wheels with all that an installation takes, and nothing else; the version of the project."""
    wheels, constraints = work / "wheels", str(work / "constraints.txt")
    for stale in wheels.glob("relearn_lens-*"):
        stale.unlink()
    # Built from a copy: setuptools leaves folders behind, and would pack modules that it finds in old ones.
    source = work / "source"
    shutil.copytree(root / "relearn_lens", source / "relearn_lens", ignore=_NOT_PACKED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(root / name, source / name)
    report("build the wheel of relearn-lens", 0, 1)
    _pip(["wheel", "--no-deps", "-w", str(wheels), str(source)], "build the wheel of relearn-lens")
    _remove(source)
    own = next(wheels.glob("relearn_lens-*.whl"))

    pins = sum(bool(re.match(r"\w", line)) for line in (work / "constraints.txt").read_text("utf-8").splitlines())
    only = [*target, "--only-binary=:all:", "--find-links", str(wheels)] if target else []
    command = ["download", "-d", str(wheels), "-c", constraints, *only, f"{own}[{EXTRA}]"]
    tried: set[str] = set()
    while True:
        try:
            _pip(command, "get the wheels", lambda done: report("get the wheels", min(done, pins), pins))
            break
        except ConnectionError as error:
            # Some packages come as source alone. Where that holds no compiled code, a wheel made here is good anywhere.
            found = sorted(set(_LACKING.findall(str(error))) - tried)
            if not target:
                raise
            if not any([_pure(name, wheels, constraints) for name in found]):
                raise ConnectionError(
                    f"{error}. For another platform or Python pip takes wheels alone: what is named here has none "
                    "there, or only one with another platform's name (Linux has several: --platform "
                    "manylinux_2_28_x86_64 --platform manylinux2014_x86_64), or is asked for by this machine alone. "
                    "Pack on a machine like those of the room, if there is one"
                ) from None
            tried.update(found)
    for archive in sorted(p for p in wheels.iterdir() if p.suffix != ".whl"):
        _pip(["wheel", "--no-deps", "-w", str(wheels), str(archive)], f"build {archive.name}")
        archive.unlink()

    report("look whether nothing is missing", 0, 1)
    needed = work / "needed.json"
    _pip(
        ["--isolated", "install", "--dry-run", "--ignore-installed", "--no-index", "--find-links", str(wheels), "-c",
         constraints, *([*target, "--only-binary=:all:", "--target", str(work / "nowhere")] if target else []),
         "--report", str(needed), f"{own}[{EXTRA}]"],
        "install from the wheels alone",
    )  # fmt: skip
    told = json.loads(needed.read_text(encoding="utf-8"))["install"]
    used = {unquote(item["download_info"]["url"]).rsplit("/", 1)[-1] for item in told}
    for wheel in wheels.iterdir():
        if wheel.name not in used:
            wheel.unlink()
    needed.unlink()
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def _pure(name: str, wheels: Path, constraints: str) -> bool:
    """Build a package here; whether its wheel is one for every platform, and so was kept."""
    there = set(wheels.iterdir())
    try:
        _pip(["wheel", "--no-deps", "-c", constraints, "-w", str(wheels), name], f"build {name}")
    except ConnectionError:
        return False
    made = set(wheels.iterdir()) - there
    for wheel in made:
        if not wheel.name.endswith("-none-any.whl"):
            wheel.unlink()
    return any(wheel.exists() for wheel in made)


def _pip(arguments: list[str], what: str, tick: Callable[[int], object] | None = None) -> None:
    """Run pip; its last errors are the reason where it fails. `tick` is called with the packages it has looked at."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            if tick:
                tick(sum(said.startswith(("Collecting ", "Processing ")) for said in lines))
    if process.returncode:
        raise ConnectionError(
            f"could not {what}; pip says: {_reason(lines)}. What was got so far is kept; the same command goes on from "
            "there"
        )


def _reason(lines: list[str]) -> str:
    """pip's last errors; of a conflict what caused it, which it prints before."""
    cause = "The conflict is caused by:"
    if cause in lines:
        after = lines[len(lines) - lines[::-1].index(cause) :]
        told = after[: after.index("")] if "" in after else after
    else:
        told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    return "; ".join(told[-4:]).rstrip(".") or "nothing"


def _start(made: dict) -> str:
    """The page that says how to begin."""
    where = f"Python {made['python']} on {', '.join(made['platforms'])}"
    return f"""# relearn-lens {made["version"]} without a network

For {where}. Copy this folder to the machine's own disk, open a terminal in it, and enter these lines. Nothing is asked
of any network.

Linux, macOS:

```
python{made["python"]} -m venv .venv && . .venv/bin/activate
{_INSTALL}
export RELEARN_LENS_CACHE="$PWD/cache" HF_HUB_OFFLINE=1
relearn-lens doctor
jupyter lab notebooks/workshop/exercises.ipynb
```

Windows (PowerShell):

```
py -{made["python"]} -m venv .venv; .venv\\Scripts\\Activate.ps1
{_INSTALL}
$env:RELEARN_LENS_CACHE = "$PWD\\cache"; $env:HF_HUB_OFFLINE = "1"
relearn-lens doctor
jupyter lab notebooks/workshop/exercises.ipynb
```

`relearn-lens doctor` should say "in cache" of {", ".join(made["sources"]) or "no source"}. In a new terminal, activate
`.venv` and set `RELEARN_LENS_CACHE` again before you go on. VS Code opens the notebook too: choose the interpreter in
`.venv` as its kernel, and start VS Code from the terminal in which `RELEARN_LENS_CACHE` is set.

Whether the copy is whole: `sha256sum --check --quiet {SUMS}` (macOS: `shasum -a 256 -c {SUMS}`).

| what | where |
|---|---|
| the workshop: exercises, solutions, the teacher's page | `notebooks/workshop/` |
| the other notebooks | `notebooks/` |
| models and texts | `cache/` |
| every package | `wheels/` |
"""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or a pack to make again.")],
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model or text to pack (`relearn-lens sources`); can be given again."),
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="pip's name of another platform, such as win_amd64; can be given again."),
    ] = None,
    python: Annotated[str | None, typer.Option(metavar="3.N", help="Another version of Python.")] = None,
) -> None:
    """Make one folder for a room without a network: wheels, models and texts, notebooks, START.md.

    By default with the sources minilm and bsb-names, for this platform and this Python. Needs a package index now.
    """
    names = source or SOURCES
    with Progress(transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        try:
            print(f"about {estimate(names) / 1e9:.1f} GB > {folder}")
            made = pack(folder, names=names, platforms=platform or (), python=python, progress=progress)
        except (ValueError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
    print(f"{made.size / 1e6:,.0f} MB, {made.files:,} files, {made.wheels} wheels; pip can install from these alone")
    print(f"next: {made.folder / START}")


if __name__ == "__main__":
    app()
