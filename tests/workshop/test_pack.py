"""A pack for a room without a network, made from a small checkout and an index that is a folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from relearn_lens import sources
from relearn_lens.sources import SOURCES, Member
from tests.workshop.test_workshop import module

packing = module("pack")
pack = packing.pack

# A build backend without requirements, so that a wheel is built without an index. It reads name, version, requirements
# and tag from beside itself.
BACKEND = """
import json, zipfile
from pathlib import Path
HERE = Path(__file__).parent
def build_wheel(directory, config_settings=None, metadata_directory=None):
    about = json.loads((HERE / "about.json").read_text())
    stem = about["name"].replace("-", "_") + "-" + about["version"]
    info = stem + ".dist-info"
    with zipfile.ZipFile(Path(directory) / f"{stem}-{about['tag']}.whl", "w") as wheel:
        extra = "".join(f"Requires-Dist: {r}; extra == 'workshop'\\n" for r in about["requires"])
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {about['name']}\\n"
                       f"Version: {about['version']}\\nProvides-Extra: workshop\\n{extra}")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {about['tag']}\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{stem}-{about['tag']}.whl"
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["{where}"]
[project]
name = "{name}"
version = "{version}"
"""
PURE = "py3-none-any"


def about(name: str, version: str, requires: list[str] | None = None, tag: str = PURE) -> str:
    return json.dumps({"name": name, "version": version, "requires": requires or [], "tag": tag})


def wheel(index: Path, name: str, version: str = "1.0", tag: str = PURE) -> Path:
    """A wheel that holds nothing."""
    path = index / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def archive(index: Path, name: str, *, tag: str = PURE) -> Path:
    """A package that comes as source alone."""
    stem = f"{name.replace('-', '_')}-1.0"
    files = {
        "pyproject.toml": PROJECT.format(where=".", name=name, version="1.0"),
        "backend.py": BACKEND,
        "about.json": about(name, "1.0", tag=tag),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    }
    with tarfile.open(index / f"{stem}.tar.gz", "w:gz") as file:
        for path, text in files.items():
            info = tarfile.TarInfo(f"{stem}/{path}")
            info.size = len(text.encode())
            file.addfile(info, io.BytesIO(text.encode()))
    return index / f"{stem}.tar.gz"


def room_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A checkout that needs `tiny-wheel` and `tiny-source`, an index that has them, and a source in the cache."""
    index, checkout, cache = tmp_path / "index", tmp_path / "checkout", tmp_path / "cache"
    index.mkdir()
    wheel(index, "tiny-wheel")
    wheel(index, "tiny-wheel", "2.0")
    archive(index, "tiny-source")
    for path, text in {
        "pyproject.toml": PROJECT.format(where="relearn_lens", name="relearn-lens", version="0.7"),
        "constraints.txt": "# pins\ntiny-wheel==1.0\ntiny-source==1.0\n",
        "LICENSE": "free\n",
        "README.md": "read\n",
        "notebooks/00_a.ipynb": "{}\n",
        "notebooks/workshop/exercises.ipynb": "{}\n",
        "notebooks/.ipynb_checkpoints/00_a.ipynb": "{}\n",
        "notebooks/workshop/__pycache__/checks.pyc": "",
        "relearn_lens/__init__.py": "",
        "relearn_lens/backend.py": BACKEND,
        "relearn_lens/about.json": about("relearn-lens", "0.7", ["tiny-wheel", "tiny-source"]),
    }.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text, encoding="utf-8")
    data = b"Rome Paul Egypt\n"
    source = replace(
        SOURCES["minilm"], name="fake", package="fake", version="1.0", size=1,
        members=(Member("fake/words.txt", hashlib.sha256(data).hexdigest(), len(data)),),
    )  # fmt: skip
    monkeypatch.setitem(SOURCES, "fake", source)
    for name, value in {
        "RELEARN_LENS_CACHE": str(cache), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(packing, "WHEELS_SIZE", 1000)
    (sources.place_of("fake")).mkdir(parents=True)
    (sources.place_of("fake") / "words.txt").write_bytes(data)
    return SimpleNamespace(
        index=index, checkout=checkout, folder=tmp_path / "out" / "room", work=tmp_path / "out" / ".room.part"
    )


class Forked:
    """In the place of a process that runs pip: a fork of this one, which has imported pip already."""

    def __init__(self, command: list[str], **_: object) -> None:
        from pip._internal.cli.main import main

        assert command[:3] == [sys.executable, "-m", "pip"]
        out, into = os.pipe()
        self.child, self.stdout = os.fork(), os.fdopen(out, errors="replace")
        if not self.child:
            code = 2
            try:
                os.dup2(into, 1)
                os.dup2(into, 2)
                sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
                code = main(command[3:])
            finally:
                os._exit(code)
        os.close(into)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A room of a test's own; pip is run by forks, where that of `ready` is started as users have it."""
    monkeypatch.setattr(packing, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))
    return room_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A room with its pack and what was said on the way, shared: for tests that only read it."""
    said: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        room = room_in(tmp_path_factory.mktemp("ready"), monkeypatch)
        found = made(room, progress=lambda *now: said.append(now))
    return SimpleNamespace(**vars(room), found=found, said=said)


def made(room: SimpleNamespace, **how) -> packing.Pack:
    return pack(room.folder, checkout=room.checkout, **{"names": ["fake"], **how})


def wheels(room: SimpleNamespace) -> list[str]:
    return sorted(path.name for path in (room.folder / "wheels").iterdir())


OWN = f"relearn_lens-0.7-{PURE}.whl"
BOTH = [OWN, f"tiny_source-1.0-{PURE}.whl", f"tiny_wheel-1.0-{PURE}.whl"]


def test_pack_holds_all_that_a_room_needs_and_nothing_else(ready, room, monkeypatch):
    room, found, said = ready, ready.found, ready.said
    files = {p.relative_to(room.folder).as_posix(): p for p in room.folder.rglob("*") if p.is_file()}
    assert sorted(files) == sorted([
        "LICENSE", "SHA256SUMS", "START.md", "cache/sources/fake-1.0/words.txt", "constraints.txt",
        "notebooks/00_a.ipynb", "notebooks/workshop/exercises.ipynb", "pack.json", *(f"wheels/{name}" for name in BOTH),
    ])  # fmt: skip
    assert (found.folder, found.wheels, found.files) == (room.folder, 3, len(files))
    assert found.size == sum(path.stat().st_size for path in files.values())
    assert [p.name for p in room.folder.parent.iterdir()] == ["room"]  # nothing is left beside it

    lines = files.pop("SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    about = json.loads(files["pack.json"].read_text())
    assert (about["version"], about["sources"], about["made_by"]) == ("0.7", ["fake"], "notebooks/workshop/pack.py")
    assert about["python"] == ".".join(map(str, sys.version_info[:2]))

    monkeypatch.setenv("RELEARN_LENS_CACHE", str(room.folder / "cache"))
    assert sources.is_cached("fake")
    assert sources.fetch("fake") == room.folder / "cache" / "sources" / "fake-1.0"
    assert {"build the wheel of relearn-lens", "get the wheels", "hash every file"} <= {what for what, *_ in said}
    assert all(0 <= done <= total for _, done, total in said)


def test_the_commands_of_its_page_install_it_without_an_index(ready, tmp_path):
    room = ready
    page = (room.folder / "START.md").read_text(encoding="utf-8")
    (line,) = set(re.findall(r"^pip install .*$", page, flags=re.MULTILINE))
    assert line == 'pip install --no-index --find-links wheels -c constraints.txt "relearn-lens[workshop]"'
    for said in ('RELEARN_LENS_CACHE="$PWD/cache"', '$env:RELEARN_LENS_CACHE = "$PWD\\cache"', "relearn-lens doctor",
                 "jupyter lab notebooks/workshop/exercises.ipynb", "sha256sum --check"):  # fmt: skip
        assert said in page
    words = [word.strip('"') for word in line.split()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    target = ["--target", str(tmp_path / "site"), "-q", "--disable-pip-version-check", "--no-warn-conflicts"]
    subprocess.run([sys.executable, "-m", *words, *target], cwd=room.folder, env=environment, check=True)
    there = {path.name for path in (tmp_path / "site").iterdir()}
    assert {"relearn_lens-0.7.dist-info", "tiny_source-1.0.dist-info", "tiny_wheel-1.0.dist-info"} <= there
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=room.folder, check=True)


def test_a_pack_is_made_again_and_goes_on_after_a_failure(ready, room):
    shutil.copytree(ready.folder, room.folder)
    text = (room.checkout / "constraints.txt").read_text()
    (room.checkout / "constraints.txt").write_text(text.replace("tiny-wheel==1.0", "tiny-wheel==2.0"))
    (room.index / f"tiny_wheel-2.0-{PURE}.whl").rename(room.index / "elsewhere")
    says = (
        r"could not get the wheels; pip says: .*\(constraint\) tiny-wheel==2.0. What was got so far is kept; the same"
    )
    with pytest.raises(ConnectionError, match=says):
        made(room)
    assert wheels(room) == BOTH  # the old pack is as it was
    assert OWN in {p.name for p in (room.work / "wheels").iterdir()}
    (room.index / "elsewhere").rename(room.index / f"tiny_wheel-2.0-{PURE}.whl")
    made(room)
    assert wheels(room) == [*BOTH[:2], f"tiny_wheel-2.0-{PURE}.whl"]  # what nothing needs any more is gone
    assert "tiny-wheel==2.0" in (room.folder / "constraints.txt").read_text()
    assert [p.name for p in room.folder.parent.iterdir()] == ["room"]


def test_a_pack_in_which_somebody_worked_is_left_alone(ready, room):
    shutil.copytree(ready.folder, room.folder)
    (room.folder / "notebooks" / "00_a.ipynb").write_text("{1}\n")
    with pytest.raises(
        ValueError, match=r"in which somebody worked: 1 file\(s\) .* such as notebooks/00_a.ipynb; move"
    ):
        made(room)
    (room.folder / "answers.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"2 file\(s\) are new or changed, such as answers.txt"):
        made(room)
    assert (room.folder / "answers.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["a folder", "a file"])
def test_something_else_is_left_alone(room, what):
    room.folder.parent.mkdir()
    if what == "a file":
        room.folder.write_text("mine")
    else:
        room.folder.mkdir()
        (room.folder / "mine").touch()
    with pytest.raises(
        ValueError, match=r"room holds something that is no pack \(there is no pack.json\).*a new folder"
    ):
        made(room)
    assert not room.work.exists()


@pytest.mark.parametrize(
    "lacking", ["pyproject.toml", "constraints.txt", "LICENSE", "notebooks/workshop/exercises.ipynb"]
)
def test_pack_needs_a_checkout(room, lacking):
    (room.checkout / lacking).unlink()
    says = rf"made from a checkout of the project, and .*checkout has no {lacking}; install from one \(`pip install -c"
    with pytest.raises(ValueError, match=says):
        made(room)
    assert not room.folder.parent.exists()


def test_other_mistakes_are_said_before_anything_is_written(room, monkeypatch):
    with pytest.raises(ValueError, match="no source is called 'minilmm'; the sources are"):
        made(room, names=["minilmm"])
    with pytest.raises(ValueError, match=r"python must be a version such as 3.12, got '312'"):
        made(room, python="312")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900))
    with pytest.raises(OSError, match=r"a pack needs about 0.0 GB, 0.0 GB are free in .*out; free some, or pack to"):
        made(room)
    assert not room.work.exists()


def test_a_pack_that_would_not_install_is_refused(room, monkeypatch):
    run = packing._pip
    monkeypatch.setattr(packing, "_pip", lambda a, *rest: None if a[0] == "download" else run(a, *rest))
    with pytest.raises(ConnectionError, match=r"could not install from the wheels alone; pip says: .*tiny-wheel"):
        made(room)
    assert not room.folder.exists()


def test_without_pip_the_reason_is_python_s_own(room, monkeypatch):
    monkeypatch.setattr(packing, "subprocess", subprocess)
    monkeypatch.setattr(sys, "executable", shutil.which("false") or "false")
    with pytest.raises(ConnectionError, match="could not build the wheel of relearn-lens; pip says: nothing"):
        made(room)


def test_a_changed_member_is_not_packed(room, monkeypatch):
    monkeypatch.setattr(packing, "_gather", lambda *_: "0.7")
    monkeypatch.setattr(sources, "fetch", lambda *_, **__: sources.place_of("fake"))
    (sources.place_of("fake") / "words.txt").write_bytes(b"other\n")
    with pytest.raises(ValueError, match=r"the copy of words.txt of source 'fake' in .* is not what was fetched"):
        made(room)


# --- another platform


def test_wheels_of_another_platform_with_pure_ones_built_here(room):
    for path in room.index.glob("tiny_wheel-*"):
        path.unlink()
    wheel(room.index, "tiny-wheel", tag="cp312-cp312-win_amd64")
    made(room, platforms=["win_amd64"], python="3.12")
    assert wheels(room) == [*BOTH[:2], "tiny_wheel-1.0-cp312-cp312-win_amd64.whl"]
    about = json.loads((room.folder / "pack.json").read_text())
    assert (about["platforms"], about["python"]) == (["win_amd64"], "3.12")
    page = (room.folder / "START.md").read_text()
    assert "For Python 3.12 on win_amd64." in page
    assert "py -3.12 -m venv" in page


def test_a_wheel_that_another_platform_lacks_is_named(room):
    for path in room.index.glob("tiny_wheel-*"):
        path.unlink()
    wheel(room.index, "tiny-wheel", tag="cp312-cp312-win_amd64")
    with pytest.raises(
        ConnectionError, match=r"pip says: .*tiny-wheel.*another platform or Python pip takes wheels alone"
    ):
        made(room, platforms=["macosx_12_0_arm64"], python="3.12")


def test_a_source_that_compiles_is_not_built_for_another_platform(room):
    here = "cp{0}{1}-cp{0}{1}-linux_x86_64".format(*sys.version_info[:2])
    archive(room.index, "tiny-source", tag=here)
    with pytest.raises(ConnectionError, match=r"pip says: .*tiny-source.*Pack on a machine like those of the room"):
        made(room, platforms=["win_amd64"], python="3.12")
    assert [p.name for p in (room.work / "wheels").iterdir()] == [OWN]


# --- the command


def test_command_says_how_large_and_what_is_next(room, monkeypatch):
    def gather(root: Path, work: Path, *_) -> str:
        wheel(work / "wheels", "a")
        return "0.7"

    monkeypatch.setattr(packing, "_gather", gather)
    monkeypatch.setattr(packing, "_checkout", lambda _: room.checkout)
    done = CliRunner().invoke(packing.app, [str(room.folder), "--source", "fake"])
    assert done.exit_code == 0, done.output
    said = re.sub(r"\s+", " ", done.stdout)
    assert f"about 0.0 GB > {room.folder}" in said
    assert "0 MB, 9 files, 1 wheels; pip can install from these alone" in said
    assert f"next: {room.folder / 'START.md'}" in said


def test_command_has_the_workshops_sources_by_default(room, monkeypatch):
    asked: list[dict] = []
    monkeypatch.setattr(packing, "pack", lambda folder, **how: asked.append(how) or packing.Pack(folder, 1, 2, 3))
    CliRunner().invoke(packing.app, ["x"])
    CliRunner().invoke(packing.app, ["x", "--platform", "a", "--platform", "b", "--python", "3.13"])
    assert [(how["names"], list(how["platforms"]), how["python"]) for how in asked] == [
        (("minilm", "bsb-names"), [], None),
        (("minilm", "bsb-names"), ["a", "b"], "3.13"),
    ]


def test_this_checkout_can_be_packed():
    root = packing._checkout(None)
    assert (root / "notebooks" / "workshop" / "TEACHER.md").is_file()
    assert packing.estimate() > 500e6
