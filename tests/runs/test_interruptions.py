"""A run that fails at a write and is taken up again ends in the same bits. `-m tests.benchmarks kills` has more."""

import errno
import os
from pathlib import Path

import pytest

from relearn_lens.runs import store
from tests.interruptions import difference, small_run


class Writes:
    """Counts finished writes, and lets one fail."""

    def __init__(self) -> None:
        self.n, self.fails_at, self.names, self.whole = 0, -1, [], os.replace

    def __call__(self, source, target) -> None:
        self.n += 1
        self.names.append(Path(target).relative_to(Path(target).parents[1]).as_posix())
        if self.n == self.fails_at:
            raise OSError(errno.EIO, "the power is gone")
        self.whole(source, target)


@pytest.fixture
def writes(monkeypatch) -> Writes:
    counted = Writes()
    monkeypatch.setattr(os, "replace", counted)
    return counted


def test_a_run_goes_on_from_its_last_pause_and_ends_in_the_same_bits(tmp_path, writes):
    store.run(small_run(), tmp_path / "whole")
    total, names = writes.n, list(writes.names)
    assert sum(name.startswith("state/") for name in names) >= 1 + 3 * 2 + 1  # base, two pauses of each arm, never-fine
    # The state of the random arm after its first pause; its second stage; the fine-tuning of the last arm.
    wanted = ["state/random-0.safetensors", "stages/random-0@1.safetensors", "state/never-fine-0.safetensors"]
    for name in wanted:
        at = names.index(name) + 1
        writes.n, writes.fails_at = 0, at
        with pytest.raises(OSError, match="the power is gone"):
            store.run(small_run(), tmp_path / str(at))
        writes.fails_at = -1
        store.run(small_run(), tmp_path / str(at))
        assert difference(tmp_path / "whole", tmp_path / str(at)) == ""
    assert total > 25
    left = {path.name for path in (tmp_path / "whole").iterdir()}
    assert not left & {"state", "stages", "weights"}


def test_what_is_already_trained_is_not_trained_again(tmp_path, writes, monkeypatch):
    steps: list[int] = []
    progress = lambda what, done, total: steps.append(done) if "retraining" in what else None  # noqa: E731
    store.run(small_run('arms=["concept"]'), tmp_path / "whole", progress=progress)
    whole = len(steps)
    names = list(writes.names)
    writes.n, writes.fails_at = 0, names.index("stages/concept-0@1.safetensors") + 1
    with pytest.raises(OSError, match="the power is gone"):
        store.run(small_run('arms=["concept"]'), tmp_path / "half")
    writes.fails_at = -1
    steps.clear()
    store.run(small_run('arms=["concept"]'), tmp_path / "half", progress=progress)
    assert len(steps) == whole // 2
    assert difference(tmp_path / "whole", tmp_path / "half") == ""


def test_every_weight_is_kept_when_asked(tmp_path):
    store.run(small_run("keep=all", 'arms=["concept"]'), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "weights").iterdir()}
    assert names == {
        "base-0.safetensors", "base@0.5-0.safetensors", "concept-0.safetensors", "concept@0.5-0.safetensors",
        "concept@1-0.safetensors",
    }  # fmt: skip


def test_a_run_that_cannot_fit_the_disk_is_refused(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000, "total": free.f_blocks}))
    with pytest.raises(OSError, match=r"needs about \d+ MB of disk with keep='all', 0 MB are free.*keep=none"):
        store.run(small_run("keep=all"), tmp_path / "run")
