"""Quantised models: a GGUF file becomes a plain Hugging Face folder in float32, once.

The result is kept in the cache under the hash of the file it was made from, and verified at every call.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relearn_lens import files, sources

RECORD = "dequantised.json"
"""File in a folder made here: which file it was made from, and the sha256 of every other file."""


def dequantised(file: Path) -> Path:
    """The folder with the model and the tokenizer of a GGUF file: float32 safetensors, as `load_bridge` reads.

    Raises:
        ValueError: the file is damaged, or of a kind of model that transformers does not read from GGUF.
        ImportError: the package gguf is missing.
        OSError: the disk is full, or the cache cannot be written.
    """
    digest = sources.hash_files(file)[file.name]
    folder = sources.cache_dir() / "dequantised" / digest[:16]
    if _is_whole(folder, digest):
        return folder
    try:
        return _made(file, folder, digest)
    except OSError as error:
        if error.errno is None:  # not of the disk
            raise
        raise OSError(
            error.errno,
            f"{str(file)!r} is written once as plain weights below {folder.parent}, and that cannot be done "
            f"({error.strerror}); make room there or make it writable, or set RELEARN_LENS_CACHE to another folder",
        ) from error


def _made(file: Path, folder: Path, digest: str) -> Path:
    """The folder, written by one process while others wait."""
    from filelock import FileLock  # imports asyncio

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if _is_whole(folder, digest):  # another process made it while we waited
            return folder
        files.remove_unfinished(folder.parent)
        with files.whole(folder) as work:
            work.mkdir()
            _convert(file, work)
            record = {"gguf": digest, "sha256": sources.hash_files(work)}
            (work / RECORD).write_bytes(files.as_json(record))
            shutil.rmtree(folder, ignore_errors=True)
    return folder


def _is_whole(folder: Path, digest: str) -> bool:
    """Whether every file is there and as it was written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = {name: sha256 for name, sha256 in sources.hash_files(folder).items() if name != RECORD}
        return record.get("gguf") == digest and record.get("sha256") == hashes
    return False


def _convert(file: Path, folder: Path) -> None:
    """Read a GGUF file and write what it says as safetensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401  (transformers reads with it)
    except ImportError as error:
        raise ImportError(
            f"{str(file)!r} is a GGUF file, which the package gguf reads: pip install -c constraints.txt gguf"
        ) from error
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with silent():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as a GGUF model: {error}") from error
    # A model that was read from GGUF refuses to be saved: its weights go into a fresh one.
    config = AutoConfig.for_model(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config._name_or_path = ""
    with silent(), torch.random.fork_rng(devices=[]):
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers logs below an error, and without its bars."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """As `quiet`, and without warnings or anything else on stderr."""
    # The bar of dequantising listens to no setting.
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
