"""A run that fails at a write and is taken up again ends in the same bits. `-m tests.benchmarks kills` has more."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from relearn_lens.progress import Progress
from relearn_lens.runs import store
from relearn_lens.runs.events import ArmDone, Event
from tests.interruptions import Stopped, difference, small_run, stopped_after_each


class Writes:
    """Takes down finished writes, and lets those of one name fail."""

    def __init__(self) -> None:
        self.fails_at, self.names, self.whole = "", [], os.replace

    def __call__(self, source, target) -> None:
        self.names.append(Path(target).relative_to(Path(target).parents[1]).as_posix())
        if self.names[-1] == self.fails_at:
            raise OSError(errno.EIO, "the power is gone")
        self.whole(source, target)


@pytest.fixture
def writes(monkeypatch) -> Writes:
    counted = Writes()
    monkeypatch.setattr(os, "replace", counted)
    return counted


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[str], int]:
    """A run without an accident, the files that it wrote in their order, and how many steps it retrained for."""
    path, counted, steps = tmp_path_factory.mktemp("runs") / "whole", Writes(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        store.run(small_run(), path, progress=counting(steps))
    return path, counted.names, len(steps)


def counting(steps: list[int]) -> Progress:
    """Takes down every step of retraining of the concept's arm."""
    return lambda what, done, total: steps.append(done) if what == "retraining (concept)" else None


def test_a_run_goes_on_after_any_event_and_ends_in_the_same_bits(tmp_path, whole):
    stops = stopped_after_each(small_run(), tmp_path / "run")
    assert stops == [
        "Prepared", "Paused base", "Base", "Sized", "Cuts", "Measured", "Paused concept", "Weighed", "ArmDone",
        "Damage", "Paused unpruned", "Paused never-fine", "Paused never", "GraftedAt", "Grafted", "Again", "Blocked",
        "SeedDone",
    ]  # fmt: skip
    assert difference(whole[0], tmp_path / "run") == ""
    assert not {path.name for path in whole[0].iterdir()} & {"state", "stages", "weights"}


# The weights that grafts are made from; the twin's measurement, its weights being there; and the second half of the
# grafts. The state of another arm after its first pause; and the second stage of the last arm.
@pytest.mark.parametrize(
    "names",
    [
        ("weights/concept@8-0.safetensors", "stages/never-0@base.safetensors", "stages/grafted-0@end.safetensors"),
        ("state/unpruned-0.safetensors", "stages/never-0@8.safetensors"),
    ],
)
def test_a_run_goes_on_after_writes_that_failed_and_ends_in_the_same_bits(tmp_path, writes, whole, names):
    for name in names:
        assert name in whole[1]
        writes.fails_at = name
        with pytest.raises(OSError, match="the power is gone"):
            store.run(small_run(), tmp_path / "run")
    writes.fails_at = ""
    store.run(small_run(), tmp_path / "run")
    assert difference(whole[0], tmp_path / "run") == ""


def test_what_is_already_trained_is_not_trained_again(tmp_path, writes, whole):
    steps: list[int] = []
    writes.fails_at = "stages/concept-0@8.safetensors"
    with pytest.raises(OSError, match="the power is gone"):
        store.run(small_run(), tmp_path / "half", progress=counting(steps))
    assert len(steps) == whole[2]
    writes.fails_at = ""
    steps.clear()

    def stop(event: Event) -> None:
        if isinstance(event, ArmDone):
            raise Stopped

    with pytest.raises(Stopped):
        store.run(small_run(), tmp_path / "half", progress=counting(steps), on_event=stop)
    assert steps == [2, 3, 4, 5, 6, 7, 8]  # the first two were kept


def test_every_weight_is_kept_when_asked(tmp_path):
    store.run(small_run("keep=all", 'arms=["concept"]', "grafts.skip=true"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "weights").iterdir()}
    stages = ("base", "base@0.5", "concept", "concept@2", "concept@8")
    assert names == {f"{stage}-0.safetensors" for stage in stages}


def test_a_run_that_cannot_fit_the_disk_is_refused(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000, "total": free.f_blocks}))
    with pytest.raises(
        OSError, match=r"needs about \d+ MB of disk with keep='all', 0 MB are free.*keep=none.*workers=1"
    ):
        store.run(small_run("keep=all"), tmp_path / "run")
