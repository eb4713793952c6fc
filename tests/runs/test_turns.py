"""Several processes at one run: the same bits whoever computes what, and nobody waits for one that is gone."""

import contextlib
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock

from relearn_lens.runs import store, turns
from relearn_lens.runs.events import ArmDone, Prepared
from relearn_lens.runs.experiment import units_of_run
from relearn_lens.runs.folder import RunFolder
from relearn_lens.runs.preparation import prepare
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.turns import Turns, processes_for
from relearn_lens.runs.units import Unit, units_of
from tests.forks import Forked
from tests.interruptions import Stopped, difference, small_run
from tests.made import tiny
from tests.spare import ours


@pytest.fixture(scope="module")
def how() -> Experiment:
    return small_run("seeds=[0, 1]")


@pytest.fixture(scope="module")
def in_one_go(how, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "alone"
    store.run(how, path)
    return path


@pytest.fixture(scope="module")
def ready(how) -> Prepared:
    return prepare(how)


def opened(path: Path, how: Experiment, ready: Prepared) -> Turns:
    """A folder as the first process leaves it for the others."""
    folder = RunFolder.open(path, how)
    folder.note(other=ready.other.name if ready.other else None, inputs=dict(ready.inputs))
    return Turns(path, folder, ready, units_of_run(ready))


def of(there: Turns, name: str, seed: int) -> Unit:
    return next(unit for unit in there.units if (unit.name, unit.seed) == (name, seed))


def test_a_unit_begins_from_kept_results_alone(how, in_one_go, ready, tmp_path):
    there = opened(tmp_path / "run", how, ready)
    # From behind: a seed's units in the order of what they need, controls before the concept, the last seed first.
    there.units = sorted(there.units, key=lambda unit: (-unit.seed, len(unit.needs), unit.name == "concept"))
    while there.help():
        pass
    assert there.are_done
    assert there.seconds().keys() == {f"{unit.name}-{unit.seed}" for unit in there.units}
    computed: list[str] = []
    store.run(how, tmp_path / "run", on_event=lambda event: computed.append(type(event).__name__))
    assert "Paused" not in computed, "everything was there"
    assert difference(in_one_go, tmp_path / "run") == ""


def test_who_waits_for_a_unit_computes_another(how, ready, tmp_path):
    there = opened(tmp_path / "run", how, ready)
    base, *_ = there.units
    held = FileLock(there.path / "base-0.lock", thread_local=False)  # another thread lets go of it
    held.acquire()
    threading.Timer(0.5, lambda: held.release(force=True)).start()
    computed: list[str] = []

    def compute(unit):
        computed.append(unit.name)
        # Whoever waited had time for what needs no base; another seed's would keep this seed's answer back.
        assert there.kept.holds(of(there, "never-fine", 0))
        assert not there.kept.holds(of(there, "base", 1))
        yield from ()

    list(there.take(base, compute))
    assert computed == ["base"]


def test_a_unit_without_what_it_needs_is_nobodys(how, ready, tmp_path):
    there = opened(tmp_path / "run", how, ready)
    with FileLock(there.path / "base-0.lock"), FileLock(there.path / "base-1.lock"):
        assert [there.help() for _ in range(3)] == [True, True, False]
    assert [unit for unit in there.units if there.kept.holds(unit)] == [
        of(there, "never-fine", seed) for seed in (0, 1)
    ]


def test_a_seed_goes_before_the_next_from_its_base_on(how, ready, tmp_path):
    there = opened(tmp_path / "run", how, ready)
    with FileLock(there.path / "base-0.lock"):
        while not there.kept.holds(of(there, "base", 1)):
            assert there.help()  # what there is meanwhile
    assert there.help()
    assert there.kept.holds(of(there, "base", 0))
    with FileLock(there.path / "cuts-0.lock"):
        assert not there.help()
    assert there.help()
    with contextlib.ExitStack() as held:
        for unit in there.units:
            if unit.seed == 0:
                held.enter_context(FileLock(there.path / f"{unit.name}-0.lock"))
        assert not there.help(), "grafts of the first seed will have what they need"


def test_controls_keep_every_stage_until_it_is_known_which_is_grafted(tmp_path):
    how = tiny(arms=("concept", "random", "unpruned"), retrain__steps=(8, 9, 10), measure__what=())
    there = opened(tmp_path / "run", how, prepare(how))
    there.units = [of(there, name, 0) for name in ("base", "cuts", "random", "concept", "unpruned")]
    while there.help():
        pass
    kept = {arm: sorted(there.kept.stages_weighed(arm, 0)) for arm in how.arms}
    assert kept == {"concept": ["10", "8"], "random": ["10", "8", "9"], "unpruned": ["10", "8"]}


def test_two_processes_give_the_bits_of_one_and_one_that_is_killed_is_not_missed(how, in_one_go, tmp_path, monkeypatch):
    two, killed, fresh = how.model_copy(update={"workers": 2}), [], subprocess.Popen

    def started(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "relearn_lens"]
        return fresh([*ours().python, "-c", "from relearn_lens.__main__ import main; main()", *command[3:]], **settings)

    monkeypatch.setattr(turns.subprocess, "Popen", started)

    def kill(event):
        if isinstance(event, ArmDone) and not killed:
            until = time.monotonic() + 60
            worker = next(each for each in psutil.Process().children() if "run-beside" in each.cmdline())
            log = tmp_path / "run" / turns.TURNS / "base-1.json"
            while not log.exists() and time.monotonic() < until:  # it has begun
                time.sleep(0.05)
            worker.kill()
            killed.append(log.exists())

    before = torch.get_num_threads()
    store.run(two, tmp_path / "run", on_event=kill)
    assert killed == [True]
    assert torch.get_num_threads() == before
    assert not (tmp_path / "run" / turns.TURNS).exists()
    files = {path.name: path.read_bytes() for path in (in_one_go / "tensors").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run" / "tensors").iterdir()}


def test_two_processes_that_are_stopped_go_on_and_end_in_the_same_bits(how, in_one_go, tmp_path, monkeypatch):
    monkeypatch.setattr(turns.subprocess, "Popen", Forked)
    two = how.model_copy(update={"workers": 2})

    def stop(event):
        if isinstance(event, ArmDone):  # the other process is at a unit of its own
            raise Stopped

    with pytest.raises(Stopped):
        store.run(two, tmp_path / "run", on_event=stop)
    store.run(two, tmp_path / "run")
    files = {path.name: path.read_bytes() for path in (in_one_go / "tensors").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run" / "tensors").iterdir()}


@pytest.mark.parametrize(
    ("workers", "parameters", "threads", "free", "expected"),
    [
        (None, 1, 2, 10**6, 1),  # a small model
        (None, 10, 2, 10**6, 2),
        (None, 10, 16, 10**6, turns.MOST),
        (None, 10, 16, 1, 1),  # no memory for another
        (None, 10, 1, 10**6, 1),
        (3, 1, 1, 1, 3),  # as they are set
    ],
)
def test_as_many_processes_as_cores_and_memory_allow(ready, monkeypatch, workers, parameters, threads, free, expected):
    monkeypatch.setattr(turns, "memory_mb", lambda: free)
    monkeypatch.setattr(turns.torch, "get_num_threads", lambda: threads)
    n = sum(value.numel() for value in ready.model.weights().values())
    monkeypatch.setattr(turns, "SMALL", n * 5 // parameters)
    experiment = ready.experiment.model_copy(update={"workers": workers, "threads": None})
    assert processes_for(Prepared(**{**vars(ready), "experiment": experiment})) == expected


def test_results_of_units_are_those_of_the_folder():
    how = tiny()
    names = [name for unit in units_of(how, 0, other="person") for name in unit.results]
    arms = ["concept", "other", "random", "unpruned", "never"]
    assert names == ["base", "sized", "cuts", arms[0], "damage", *arms[1:], "grafted", "again"]
    assert [unit.name for unit in units_of(tiny(arms=["unpruned"]), 0, other=None)] == ["base", "unpruned"]


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers"):
        tiny(workers=0)
