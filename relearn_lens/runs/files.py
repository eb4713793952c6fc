"""Files that are written whole or not at all, and read with our own errors where damaged: JSON and safetensors.

A file goes to a temporary name, is synced, and then gets its own: whoever is killed in between leaves the old one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from relearn_lens.runs.settings import Experiment


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors, and plain values about them, as safetensors; whole or not at all.

    Raises:
        OSError: as `write_whole`.
    """
    # A copy each: safetensors refuses tensors that share memory, and arms share their base.
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"relearn-lens": json.dumps(plain(meta))}
    size = sum(tensor.nbytes for tensor in whole.values())
    _whole(path, size, lambda temporary: save_file(whole, temporary, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("relearn-lens", "{}"))
    except Exception as error:  # safetensors raises its own Rust errors
        raise ValueError(f"{str(path)!r} is damaged ({error}); run again with --fresh") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: with ENOSPC and how much was missing, if the disk is full.
    """
    _whole(path, len(content), lambda temporary: temporary.write_bytes(content))


def _whole(path: Path, size: int, write: Callable[[Path], object]) -> None:
    """Let a file be written to a temporary name, and give it its own once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the name too; not every file system lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
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


def plain_settings(experiment: Experiment) -> dict[str, Any]:
    """Settings as JSON takes them."""
    return experiment.model_dump(mode="json")


def plain(value: Any) -> Any:
    """Values as JSON takes them; NaN is null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.floating | np.integer | np.bool_):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
