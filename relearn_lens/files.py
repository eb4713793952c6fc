"""Files and folders that are there whole or not at all, and read with our own errors where damaged.

What is written goes to a temporary name, is synced, and then gets its own: whoever is killed in between leaves the old
one. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def path_of(value: object, what: str) -> Path:
    """A path as it was given; `what` is wanted, in the words of a message.

    Raises:
        ValueError: it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{what} is wanted, got a {type(value).__name__}")
    return Path(value)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name for a file or a folder to be written under, which then takes the place of `path` (a file, or an empty
    folder); where writing fails, what was there stays.

    Raises:
        OSError: as the file system says.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(work)
    try:
        yield work
        for file in work.rglob("*") if work.is_dir() else [work]:
            if file.is_file():
                _sync(file, os.O_RDWR)
        if path.is_dir():
            path.rmdir()
        os.replace(work, path)
        with contextlib.suppress(OSError):  # the name too; not every file system lets a folder be synced
            _sync(path.parent, os.O_RDONLY)
    finally:
        _remove(work)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left anywhere in a folder; for one that alone works in it."""
    for part in [*folder.rglob(".*.tmp")]:
        _remove(part)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """For a while, this process alone works in a folder.

    Raises:
        BlockingIOError: another one does.
    """
    from filelock import FileLock, Timeout  # imports asyncio

    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout:
            raise BlockingIOError(
                f"another process is running into {str(folder)!r}; wait for it, or choose another folder with --out"
            ) from None
        yield


LOCK = ".lock"


def check_folder(path: Path, mark: str, what: str) -> None:
    """Refuse a path that cannot be a folder, or a folder that holds something else than `what`, which the file `mark`
    tells.

    Raises:
        FileExistsError, NotADirectoryError: it is so.
    """
    if path.is_file():
        raise FileExistsError(f"{str(path)!r} is a file; choose a folder with --out")
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise NotADirectoryError(f"{str(path)!r} cannot be a folder: {str(above)!r} is a file")
    if path.is_dir() and not (path / mark).is_file() and any(p.name != LOCK for p in path.iterdir()):
        raise FileExistsError(f"{str(path)!r} holds files that are no {what}; choose another folder with --out")


def check_free(path: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        FileExistsError: it does.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{str(path)!r} is there already; choose a folder that is empty or not there yet")


def sha256_of(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of plain values, whatever the order of their names."""
    return sha256_of(json.dumps(plain(value), sort_keys=True))


def as_json(value: Any) -> bytes:
    """A table of plain values, for people to read too."""
    return (json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A table of names and values.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); run again with --fresh") from error
    if not isinstance(table, dict):
        raise ValueError(f"{str(path)!r} is damaged (it is no table of names and values); run again with --fresh")
    return table


def read_toml(path: Path, made: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> dict[str, Any]:
    """What a TOML file says, or what is `made` of it.

    Raises:
        ValueError: it is none.
    """
    try:
        return made(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise ValueError(f"{str(path)!r} is not valid TOML: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: with ENOSPC and how much was missing, if the disk is full.
    """
    with _room(path, len(content)), whole(path) as work:
        work.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors, and plain values about them, as safetensors; whole or not at all.

    Raises:
        OSError: as `write_whole`.
    """
    from safetensors.torch import save_file

    # Copies of those alone that share memory, which safetensors refuses: all of a training's are three models.
    last = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    apart = {
        name: (each if last[each.untyped_storage().data_ptr()] == name else each.clone()).detach().contiguous()
        for name, each in tensors.items()
    }
    with _room(path, sum(tensor.nbytes for tensor in apart.values())), whole(path) as work:
        save_file(apart, work, metadata={"relearn-lens": json.dumps(plain(meta))})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("relearn-lens", "{}"))
    except Exception as error:  # safetensors raises its own Rust errors
        raise ValueError(f"{str(path)!r} is damaged ({error}); run again with --fresh") from error


def plain(value: Any) -> Any:
    """Values as JSON takes them; NaN is null."""
    kind = type(value)
    if kind is str or kind is int or value is None:  # most are: to ask what they are an instance of takes as long again
        return value
    if kind.__module__ == "numpy":  # a number
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if kind is dict or isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _room(path: Path, size: int) -> Iterator[None]:
    """Say of a full disk how much was missing."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        # safetensors writes in Rust and says it in an error of its own.
        if full or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {path.name} needs {size:,} bytes, "
                f"{shutil.disk_usage(path.parent).free:,} are free. What was written so far is kept; make room and "
                "run the same command again to continue",
                str(path.parent),
            ) from error
        raise
