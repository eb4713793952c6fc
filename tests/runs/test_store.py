"""The run folder: what is in it, that it is read back as it was, and that no accident of a disk loses it."""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from relearn_lens import files
from relearn_lens.files import write_whole
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.runs import experiment as experiment_module
from relearn_lens.runs import folder as folder_module
from relearn_lens.runs import store
from relearn_lens.runs.events import ArmDone, Base, Event, GraftedAt, Measured, Paused, Prepared, SeedDone, Weighed
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.folder import RunFolder
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import ARMS, Experiment
from relearn_lens.runs.store import load_run
from tests.interruptions import difference
from tests.made import same, tiny

RESULTS, AFTERWARDS = ("base", "sized", "cuts", "damage"), ("grafted", "again")


class Stop(Exception):
    """What interrupts a run in a test."""


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A finished run folder of a test's own."""
    shutil.copytree(made[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def replayed(made, monkeypatch) -> list[str]:
    """`perform` without a model: the events of the finished run, but what the folder has kept is taken from it.

    Gives what was "computed".
    """
    done: list[str] = []

    def replay(experiment: Experiment, *, kept: Any = None) -> Iterator[Event]:
        there: Any = None
        for event in made[2]:
            match event:
                case Base():
                    if not (kept and kept.base(event.seed)):
                        done.append("base")
                case Measured(stage="base", arm=arm):
                    there = kept.arm(arm, 0) if kept else None
                case ArmDone(trajectory=path):
                    event = ArmDone(there, None) if there else (done.append(path.arm) or event)
                    there = None
                case Prepared() | Measured() | Paused() | Weighed() | GraftedAt() | SeedDone():
                    pass
                case _:
                    again = kept.result(type(event), event.seed) if kept else None
                    event = again or (done.append(type(event).__name__.lower()) or event)
            if not (there and isinstance(event, Measured | Paused | Weighed)):
                yield event

    monkeypatch.setattr(store, "perform", replay)
    told = files.read_json(made[1] / "summary.json")
    monkeypatch.setattr(folder_module, "summary", lambda _: told)  # of equal events
    return done


def plain(summary: Path) -> dict[str, Any]:
    """A summary but for what differs from run to run."""
    return {k: v for k, v in json.loads(summary.read_text()).items() if k not in ("seconds", "peak_rss_mb")}


# --- what is in it


def test_folder_holds_every_file(made):
    names = {path.relative_to(made[1]).as_posix() for path in made[1].rglob("*") if path.is_file()}
    tensors = {f"tensors/{name}-0.safetensors" for name in (*RESULTS, *ARMS, *AFTERWARDS)}
    tables = {"settings.toml", "manifest.json", "summary.json", "metrics.parquet", "layers.parquet"}
    assert names - {".lock"} == tables | tensors


def test_folder_holds_nothing_that_runs_code(made):
    suffixes = {path.suffix or path.name for path in made[1].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".toml", ".parquet", ".safetensors", ".html", ".lock"}
    for path in made[1].rglob("*"):
        assert not path.is_file() or path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path


def test_summary_is_json_with_the_documented_keys(made):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (made[1] / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=refuse)
    assert {
        "settings", "site", "layers", "n_neurons", "arms", "pruned_share_by_layer", "saliency_by_layer", "seconds",
        "peak_rss_mb",
    } <= summary.keys()  # fmt: skip
    assert summary["site"] == "mlp_post"
    assert summary["layers"] == ["0", "1", "2", "3"]
    assert summary["n_neurons"] == 256
    for arm in ARMS:
        (one,) = summary["arms"][arm]
        stages = ["base", "pruned"] if arm == "other" else ["base", "pruned", "6", "10"]
        assert list(one["f1"]) == stages
        assert all(set(by_label) == {"person", "place", "overall"} for by_label in one["f1"].values())
        for selection in ("all", "matched"):
            by_stage = summary["saliency_by_layer"][arm][selection]
            assert list(by_stage) == stages
            assert all(len(values) == 4 for values in by_stage.values())
        assert len(summary["pruned_share_by_layer"][arm]) == 4
    assert summary["pruned_share_by_layer"]["concept"] == pytest.approx([0, 4 / 64, 0, 0])
    assert summary["arms"]["concept"][0]["f1"]["base"]["place"] == made[0].arms["concept"][0]["base"].f1["place"]
    assert {"prepare", *(f"{name}-0" for name in (*RESULTS, *ARMS, *AFTERWARDS))} == summary["seconds"].keys()
    assert summary["peak_rss_mb"] > 50
    assert Experiment.model_validate(summary["settings"]) == tiny()


def test_manifest_names_versions_seeds_settings_and_inputs(made):
    manifest = json.loads((made[1] / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["settings"]["seeds"] == [0]
    assert {"sentences:train", "sentences:validation", "sentences:probe"} <= set(manifest["inputs"])
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in manifest["inputs"].values())


def test_tables_are_those_of_the_run(made):
    run, path, _ = made
    pd.testing.assert_frame_equal(pd.read_parquet(path / "metrics.parquet"), run.to_dataframe())
    layers = pd.read_parquet(path / "layers.parquet")
    stages = 4 * 4 + 2  # of five arms, one of them not trained on
    assert len(layers) == stages * 2 * 4  # stages, selections, layers
    summary = json.loads((path / "summary.json").read_text())
    here = layers[(layers.arm == "concept") & (layers.selection == "matched") & (layers.stage == "10")]
    assert here.layer.tolist() == summary["layers"]
    assert here.rank_saliency.tolist() == pytest.approx(summary["saliency_by_layer"]["concept"]["matched"]["10"])


def test_load_run_gives_back_what_run_returned(made):
    run, path, _ = made
    loaded = load_run(path)
    assert loaded.experiment == run.experiment
    assert loaded.folder == run.folder == str(path)
    assert loaded.arms.keys() == run.arms.keys()
    for name, (arm,) in run.arms.items():
        assert same(loaded.arms[name][0], arm)
    for kind in ("sized", "cuts", "damage", "grafted", "again"):
        (one,), (other,) = getattr(run, kind), getattr(loaded, kind)
        assert same(one, other), kind
    assert loaded.blocked == run.blocked == []
    pd.testing.assert_frame_equal(loaded.to_dataframe(), run.to_dataframe())
    assert loaded.to_xarray().identical(run.to_xarray())
    for key, value in run.manifest.items():
        assert loaded.manifest[key] == value


def test_load_run_gives_back_nan(made, tmp_path):
    run, _, _ = made
    arm = run.arms["concept"][0]
    arm = Trajectory(dict(arm.snapshots), arm.removed, arm.arm, arm.seed, arm.concept)
    scores = arm["pruned"].scores
    holey = type(scores)(
        {**scores.f1, "person": math.nan}, scores.precision, scores.recall, scores.counts, scores.labels
    )
    arm.snapshots["pruned"] = type(arm["pruned"])(arm["pruned"].saliency, holey, arm["pruned"].stats)  # pyright: ignore[reportIndexIssue]
    there = RunFolder(tmp_path, {})
    there.keep_arm(ArmDone(arm, None))
    found = there.arm("concept", 0)
    assert found is not None
    assert math.isnan(found["pruned"].f1["person"])
    assert same(found, arm)


def test_run_without_a_folder_writes_nothing(replayed, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = store.run(tiny())
    assert run.folder is None
    assert run.arms.keys() == made[0].arms.keys()
    assert list(tmp_path.iterdir()) == []


def test_weights_are_kept_when_asked(replayed, made, tmp_path, monkeypatch):
    weights = {"head.weight": torch.ones(2)}
    last = [ArmDone(e.trajectory, weights) if isinstance(e, ArmDone) else e for e in made[2]]
    monkeypatch.setattr(store, "perform", lambda *_, **__: iter(last))
    store.run(tiny(keep="last"), tmp_path / "run")
    names = {path.stem for path in (tmp_path / "run" / "weights").iterdir()}
    assert names == {"base-0", *(f"{name}-0" for name in ARMS)}  # and not what grafts were made from
    assert torch.equal(
        files.read_tensors(tmp_path / "run/weights/random-0.safetensors")[0]["head.weight"], torch.ones(2)
    )


def test_settings_file_of_a_run_repeats_it(made):
    assert settings_of(made[1] / "settings.toml") == made[0].experiment


# --- the same command again


def test_finished_run_is_read_and_not_run_again(folder, made, monkeypatch):
    monkeypatch.setattr(store, "perform", lambda *_, **__: pytest.fail("it ran again"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    again = store.run(tiny(), folder)
    assert same(again.arms["concept"][0], made[0].arms["concept"][0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """A word for every training that really happens."""
    calls: list[str] = []

    def counted(name: str, whole: Any) -> Any:
        def train(*args, **settings):
            calls.append(name)
            return whole(*args, **settings)

        return train

    for name in ("train_", "retrain_"):
        monkeypatch.setattr(experiment_module, name, counted(name, getattr(experiment_module, name)))
    return calls


def test_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, made, trained):
    def stop(event):
        if isinstance(event, Measured) and event.stage == "6":
            raise Stop

    with pytest.raises(Stop):
        store.run(tiny(), tmp_path / "run", on_event=stop)
    assert trained == ["train_", "retrain_"]
    with pytest.raises(ValueError, match=r"is not finished; `relearn-lens run .*settings\.toml --out .*` continues it"):
        load_run(tmp_path / "run")
    trained.clear()
    settings = settings_of(tmp_path / "run" / "settings.toml")  # as the message says
    run = store.run(settings, tmp_path / "run")
    # Three arms, the twin that never had it, and the second cut; the other label's arm is cut alone.
    assert trained == ["retrain_"] * 3 + ["train_", "retrain_", "retrain_"]
    assert plain(tmp_path / "run" / "summary.json") == plain(made[1] / "summary.json")
    for name, (arm,) in made[0].arms.items():
        assert same(run.arms[name][0], arm)
    assert not (tmp_path / "run" / "weights").exists()


def test_interrupted_run_adds_up_its_seconds(tmp_path, replayed):
    def stop(event):
        if isinstance(event, Base):
            time.sleep(0.05)
            raise Stop

    with pytest.raises(Stop):
        store.run(tiny(), tmp_path / "run", on_event=stop)
    before = json.loads((tmp_path / "run/manifest.json").read_text())["seconds"]
    after = store.run(tiny(), tmp_path / "run").manifest["seconds"]
    assert after["prepare"] >= before["prepare"]
    assert after["base-0"] >= before["base-0"]


def test_run_with_a_setting_of_none_is_loaded_as_it_was(tmp_path, replayed):
    made = tiny(["data.concept_share=none"])
    store.run(made, tmp_path / "run")
    assert load_run(tmp_path / "run").experiment == made


# --- a folder that is taken


def test_other_settings_are_refused_by_what_differs(folder):
    changed = r"prune\.fraction 0\.015625 there, 0\.5 here; seeds \[0\] there, \[1\] here"
    with pytest.raises(FileExistsError, match=rf"other settings \({changed}\).*--out.*--fresh"):
        store.run(tiny(prune__fraction=0.5, seeds=(1,)), folder)
    assert load_run(folder).experiment == tiny()


def test_fresh_removes_the_run_and_runs_again(folder, replayed):
    (folder / "report.html").write_text("old")
    store.run(tiny(), folder, fresh=True)
    assert replayed == ["base", "sized", "cuts", ARMS[0], "damage", *ARMS[1:], *AFTERWARDS]
    assert not (folder / "report.html").exists()
    store.run(tiny(keep="last"), folder, fresh=True)
    assert load_run(folder).experiment.keep == "last"


@pytest.mark.parametrize("fresh", [True, False])
def test_folder_that_is_no_run_is_refused(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds files that are no run; choose another folder with --out"):
        store.run(tiny(), tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("fresh", [True, False])
def test_file_instead_of_a_folder_is_refused(tmp_path, fresh):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match=r"file' is a file; choose a folder with --out"):
        store.run(tiny(), tmp_path / "file", fresh=fresh)


def test_empty_folder_is_taken(tmp_path, replayed):
    (tmp_path / "run").mkdir()
    assert store.run(tiny(), tmp_path / "run").arms


def test_folder_that_is_being_run_into_is_refused(tmp_path, replayed):
    def stop(event):
        raise Stop

    with pytest.raises(Stop):
        store.run(tiny(), tmp_path / "run", on_event=stop)
    busy = pytest.raises(BlockingIOError, match=r"another process is running into '.*run'")
    with FileLock(tmp_path / "run" / ".lock"), busy:
        store.run(tiny(), tmp_path / "run")
    assert store.run(tiny(), tmp_path / "run").arms  # once it is free


def test_fresh_does_not_touch_a_folder_that_is_being_run_into(folder, replayed):
    with FileLock(folder / ".lock"), pytest.raises(BlockingIOError, match="another process"):
        store.run(tiny(), folder, fresh=True)
    assert (folder / "summary.json").exists()


def test_lock_is_free_after_an_error(tmp_path, replayed):
    with pytest.raises(Stop):
        store.run(tiny(), tmp_path / "run", on_event=lambda _: (_ for _ in ()).throw(Stop))
    with FileLock(tmp_path / "run" / ".lock", timeout=0):
        pass


def test_changed_inputs_are_refused_by_name(tmp_path, replayed, made, monkeypatch):
    with pytest.raises(Stop):
        store.run(tiny(), tmp_path / "run", on_event=lambda _: (_ for _ in ()).throw(Stop))
    ready = made[2][0]
    assert isinstance(ready, Prepared)
    changed = Prepared(**{**vars(ready), "inputs": {**ready.inputs, "sentences:probe": "0" * 64, "corpus:new": "1"}})
    monkeypatch.setattr(store, "perform", lambda *_, **__: iter([changed]))
    with pytest.raises(ValueError, match=r"inputs of '.*run' have changed .*\(corpus:new, sentences:probe\).*--fresh"):
        store.run(tiny(), tmp_path / "run")


def test_a_run_that_was_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="river"):
        store.run(tiny(other="river"), tmp_path / "runs" / "refused")
    assert not (tmp_path / "runs" / "refused").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="river"):
        store.run(tiny(other="river"), tmp_path / "own")
    assert (tmp_path / "own").is_dir()


# --- what cannot be read


def test_load_run_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*absent' is no run folder: there is no manifest\.json"):
        load_run(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["concept-0", "damage-0"])
@pytest.mark.parametrize("content", [b"", b"not tensors", "half"])
def test_damaged_tensors_are_named(folder, name, content):
    path = folder / "tensors" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors' is damaged .*run again with --fresh"):
        load_run(folder)


@pytest.mark.parametrize("name", ["random-0", "cuts-0", "damage-0", "grafted-0"])
def test_missing_tensors_are_named(folder, name):
    (folder / "tensors" / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing; run it again with --fresh"):
        load_run(folder)


def test_damaged_tensors_are_made_again_as_the_message_says(folder, replayed):
    (folder / "tensors" / "concept-0.safetensors").unlink()
    store.run(tiny(), folder)
    assert replayed == ["base", "concept"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_damaged_manifest_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged .*--fresh"):
        load_run(folder)
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged .*--fresh"):
        store.run(tiny(), folder)


def test_damaged_manifest_can_be_removed_with_fresh_as_the_message_says(folder, replayed):
    (folder / "manifest.json").write_bytes(b"{")
    store.run(tiny(), folder, fresh=True)
    assert load_run(folder).arms


def test_a_run_loads_without_its_settings_file(folder):
    (folder / "settings.toml").unlink()
    assert load_run(folder).experiment == tiny()


# --- disks and power


def test_write_whole_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    assert path.read_bytes() == b"old"

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="input/output error"):
                write_whole(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_write_whole_leaves_no_partial_file_when_it_is_stopped(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_write_whole_says_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = r"the disk is full: file needs 5,000 bytes, [\d,]+ are free.*same command"
    with pytest.raises(OSError, match=said) as caught:
        write_whole(tmp_path / "file", b"x" * 5000)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fails_at(monkeypatch):
    """Let the n-th write fail at its very end; gives the number of writes so far."""
    count = {"now": 0, "at": -1}
    whole = os.replace

    def replace(*names):
        count["now"] += 1
        if count["now"] == count["at"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(*names)

    monkeypatch.setattr(os, "replace", replace)
    return count


def test_run_goes_on_after_a_full_disk_wherever_it_was(tmp_path, replayed, fails_at):
    """Every eleventh write fails once; the same command then leaves the same files."""
    store.run(tiny(), tmp_path / "whole")
    writes = fails_at["now"]
    assert writes > 40
    for n in range(3, writes + 1, 11):
        fails_at |= {"now": 0, "at": n}
        with pytest.raises(OSError, match="the disk is full"):
            store.run(tiny(), tmp_path / str(n))
        fails_at["at"] = -1
        store.run(tiny(), tmp_path / str(n))
        assert difference(tmp_path / "whole", tmp_path / str(n)) == ""
        assert not [path for path in (tmp_path / str(n)).rglob("*.tmp")]


@pytest.mark.parametrize("n", [2])
def test_run_goes_on_after_a_full_disk_at_its_very_beginning(tmp_path, replayed, fails_at, n):
    fails_at["at"] = n
    with pytest.raises(OSError, match="the disk is full"):
        store.run(tiny(), tmp_path / "run")
    assert store.run(tiny(), tmp_path / "run").arms


def test_run_goes_on_after_a_full_disk_at_its_first_write(tmp_path, replayed, fails_at):
    fails_at["at"] = 1
    with pytest.raises(OSError, match="the disk is full"):
        store.run(tiny(), tmp_path / "run")
    assert store.run(tiny(), tmp_path / "run").arms


def test_real_events_are_those_that_are_replayed(made, replayed):
    """The stand-in gives what `perform` gives, so that the tests above speak of real runs."""
    kinds = [type(event) for event in store.perform(tiny())]
    assert kinds == [type(event) for event in made[2]]
    assert perform is not store.perform
    assert np.isfinite(made[0].arms["concept"][0]["10"].f1["place"])


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Run:
    """A finished run of a few arms and steps; only read."""
    how = tiny(
        arms=("concept", "random", "never"), measure__what=[], retrain__steps=(8,), grafts__bands=1,
        grafts__within="none",
    )  # fmt: skip
    return store.run(how, tmp_path_factory.mktemp("short") / "run")


@pytest.mark.parametrize("name", ["grafted-0", "again-0"])
def test_what_follows_the_arms_is_made_anew_from_arms_that_are_trained_again(short, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(short.folder, folder)
    (folder / "tensors" / f"{name}.safetensors").unlink()
    run = store.run(short.experiment, folder)
    before = [short.grafted, short.again, *short.arms.values()]
    for mine, first in zip([run.grafted, run.again, *run.arms.values()], before, strict=True):
        assert same(first[0], mine[0])
    assert json.loads((folder / "manifest.json").read_text())["complete"]


def test_where_nothing_is_cut_no_size_is_found(tmp_path):
    experiment = tiny(arms=("unpruned",), measure__what=[], prune__fraction="auto")
    events: list[Event] = []
    run = store.run(experiment, tmp_path / "run", on_event=events.append)
    assert [type(each).__name__ for each in events if not isinstance(each, Measured | Paused)] == [
        "Prepared", "Base", "ArmDone", "SeedDone",
    ]  # fmt: skip
    again = load_run(tmp_path / "run")
    assert (again.sized, again.cuts, again.damage) == (run.sized, run.cuts, run.damage) == ([], [], [])
    assert same(run.arms["unpruned"][0], again.arms["unpruned"][0])
