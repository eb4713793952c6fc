"""Whether files are what they were: sha256 of a run folder's files and of its inputs, and numbers that are finite.

A finished run's manifest holds the hash of every file beside it (`outputs`), of every input (`inputs`), and of itself
(`seal`). `verify` computes all of them again and says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from relearn_lens import sources
from relearn_lens.files import LOCK, plain, sha256_of

MANIFEST, SEAL = "manifest.json", "seal"
ROLES = ("model", "corpus", "probe_corpus")
"""The settings that name an input."""
UNSEALED = {MANIFEST, LOCK, "report.html", "film.gif", "film.html"}
"""Files of a run folder without a hash: the manifest has its seal, page and film are made again at will."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifest says."""

    name: str
    """A file of the run folder, or an input as the manifest names it (`model:config.json`)."""
    kind: Literal["changed", "missing", "extra", "damaged", "unknown"]
    says: str
    """What was expected, what was found, what to do."""

    @property
    def is_wrong(self) -> bool:
        """Whether the run is not what it was; else there was only nothing to compare."""
        return self.kind != "unknown"


def hashes_of(folder: str | Path) -> dict[str, str]:
    """sha256 of every file of a run folder by its path there, but for those of `UNSEALED` and hidden ones."""
    return {name: sources.hash_files(path)[path.name] for name, path in sorted(_files(Path(folder)))}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says, its own seal left out."""
    sealed = {key: value for key, value in plain(dict(manifest)).items() if key != SEAL}
    return sha256_of(json.dumps(sealed, sort_keys=True, ensure_ascii=False))


def check_same_inputs(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to put runs side by side, given by name, that had different files under one name.

    Runs on different models or texts may be compared; a model or a text that changed between them would look like a
    result.

    Raises:
        ValueError: an input of the same name has another hash, with what changed.
    """
    seen: dict[tuple[str, str, str], tuple[str, str]] = {}
    changed = []
    for run, manifest in manifests.items():
        settings = manifest.get("settings") or {}
        for key, digest in (manifest.get("inputs") or {}).items():
            role = key.partition(":")[0]
            if role not in ROLES:
                continue
            first, before = seen.setdefault((role, str(settings.get(role)), key), (run, digest))
            if before != digest:
                changed.append(f"{key} is not the same file in {first} and in {run}")
    if changed:
        raise ValueError(
            f"these runs cannot be compared, as their inputs changed in between: {'; '.join(changed)}. Run both on the "
            "same files, or give what changed a name of its own"
        )


def verify(folder: str | Path) -> list[Finding]:
    """What differs between a run folder and its manifest; empty where all is as it was.

    Its own files are hashed again, and the inputs as far as they are on this machine. Weights and tensors that hold NaN
    or infinite numbers are named.

    Raises:
        FileNotFoundError: there is no run folder.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{str(path)!r} is no run folder: there is no {MANIFEST}; give the folder of a run")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        return [Finding(MANIFEST, "damaged", f"{MANIFEST} cannot be read ({error}); run again with --fresh")]
    if not isinstance(manifest, dict):
        return [Finding(MANIFEST, "damaged", f"{MANIFEST} is no table of names and values; run again with --fresh")]
    return [*_own(path, manifest), *_inputs(manifest)]


def report_of(folder: str | Path, findings: list[Finding], checked: int) -> list[str]:
    """Lines that say what `verify` found; `checked` is the number of files with a hash."""
    wrong = sum(finding.is_wrong for finding in findings)
    says = f"{wrong} thing(s) are not as they were" if wrong else "all of them are as they were"
    return [*(f"{f.kind}: {f.says}" for f in findings), f"{folder}: {checked} file(s) with a hash; {says}"]


def checked(folder: str | Path) -> int:
    """How many files and inputs the manifest of a run folder has a hash of."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        return len(manifest.get("outputs") or ()) + len(manifest.get("inputs") or ())
    except (ValueError, OSError, AttributeError, RecursionError, TypeError):
        return 0


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() not in UNSEALED and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _own(path: Path, manifest: dict[str, Any]) -> Iterator[Finding]:
    """The folder's own files."""
    outputs = manifest.get("outputs")
    if not isinstance(outputs, dict):
        why = "the run is not finished" if not manifest.get("complete") else "its version wrote none"
        yield Finding(MANIFEST, "unknown", f"{MANIFEST} holds no hashes of the run's files ({why}): nothing to compare")
        return
    if manifest.get(SEAL) != seal_of(manifest):
        yield Finding(MANIFEST, "changed", f"{MANIFEST} was changed after the run was finished; run again with --fresh")
    there = dict(_files(path))
    for name, digest in sorted(outputs.items()):
        if name not in there:
            yield Finding(name, "missing", f"{name} is missing; put it back, or run again with --fresh")
            continue
        sha256 = _hash(there[name])
        if sha256 != digest:
            why = "cannot be read" if sha256 is None else f"has sha256 {sha256[:12]}..., it had {str(digest)[:12]}..."
            yield Finding(name, "changed", f"{name} {why}; put the right file back, or run again with --fresh")
        if name.startswith("weights/") and sha256 is not None and (odd := _first_not_finite(there[name])):
            yield Finding(name, "damaged", f"{name}: {odd} holds NaN or infinite numbers")
    for name in sorted(set(there) - set(outputs)):
        yield Finding(name, "extra", f"{name} was not written by the run; move it away if it is not yours")


def _inputs(manifest: dict[str, Any]) -> Iterator[Finding]:
    """The run's inputs, as far as they are on this machine."""
    settings, inputs = manifest.get("settings"), manifest.get("inputs")
    if not isinstance(settings, dict) or not isinstance(inputs, dict):
        yield Finding(MANIFEST, "unknown", f"{MANIFEST} names no inputs: nothing to compare")
        return
    for role in ROLES:
        name, mine = settings.get(role), {k: v for k, v in inputs.items() if k.startswith(f"{role}:")}
        if not isinstance(name, str) or not mine:
            continue
        place = sources.place_of(name) if name in sources.SOURCES else path_of(role, name)
        if place is None or not place.exists():
            says = f"{role} {name!r} is not on this machine, so it was not compared"
            yield Finding(f"{role}:{name}", "unknown", says)
            continue
        prefix = f"{role}:{name}/" if name in sources.SOURCES else f"{role}:"
        hashes = {f"{prefix}{file}": digest for file, digest in sources.hash_files(place).items()}
        for key in sorted(mine):
            if key not in hashes:
                yield Finding(key, "missing", f"input {key} is no longer in {str(place)!r}")
            elif hashes[key] != mine[key]:
                yield Finding(key, "changed", f"input {key} in {str(place)!r} is not what the run began with")


def path_of(role: str, name: str) -> Path | None:
    """Where an input lies, if its name is a path."""
    text = name if role == "model" else name.partition(":")[2]
    return Path(text).expanduser() if text else None


def _hash(path: Path) -> str | None:
    try:
        return sources.hash_files(path)[path.name]
    except OSError:
        return None


def _first_not_finite(path: Path) -> str | None:
    """The first tensor of a file with NaN or infinite numbers; nothing of a file that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            return next((k for k, v in tensors if v.is_floating_point() and not bool(v.isfinite().all())), None)
    except Exception:  # safetensors raises its own Rust errors
        return None
