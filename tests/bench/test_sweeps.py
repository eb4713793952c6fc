"""Sweeps: which cells a file asks for, what is refused, that no cell takes others down, and what the table says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from scipy import stats as st
from typer.testing import CliRunner

from relearn_lens.__main__ import app
from relearn_lens.bench import engines, sweep_tables, sweeps
from relearn_lens.runs import store
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import are_of
from relearn_lens.show import report
from tests.forks import Forked
from tests.interruptions import difference

SMALL = """
preset = "toy"
seeds = [0]
[data]
train_sentences = 64
validation_sentences = 40
probe_sentences = 40
[prune]
control_draws = 1
[finetune]
epochs = 0.5
lr = 1e-5
batch_size = 8
[retrain]
steps = [4, 8]
lr = 3e-3
batch_size = 8
[measure]
what = ["probeless"]
shuffles = 2
draws = 100
[grafts]
skip = true
"""
"""What makes a run of the toy take a second, but for the start of its process."""


@pytest.fixture
def file(tmp_path):
    """Write a sweep file; gives its path."""

    def write(axes: str, settings: str = SMALL) -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(settings + axes)
        return path

    return write


def names(path: Path) -> list[str]:
    return [cell.name for cell in sweeps.read(path).cells]


# --- which cells


def test_axes_are_crossed_over_the_settings_of_the_file(file):
    asked = sweeps.read(file('[sweep]\n"prune.fraction" = [0.1, 0.3]\nseeds = [[0], [1, 2]]\n'))
    assert asked.keys == ("prune.fraction", "seeds")
    assert [cell.name for cell in asked.cells] == [
        "prune.fraction=0.1,seeds=0", "prune.fraction=0.1,seeds=1+2", "prune.fraction=0.3,seeds=0",
        "prune.fraction=0.3,seeds=1+2",
    ]  # fmt: skip
    third = asked.cells[2].experiment
    assert (third.prune.fraction, third.seeds, third.model, third.retrain.lr) == (0.3, (0,), "toy", 3e-3)
    assert third == settings_of(file("").with_name("grid.toml"), {"prune.fraction": 0.3, "seeds": [0]})
    assert repr(asked).endswith("4 cells over prune.fraction, seeds)")


def test_keys_may_be_quoted_or_nested(file):
    quoted = names(file('[sweep]\n"prune.fraction" = [0.1, 0.3]'))
    assert names(file("[sweep]\nprune.fraction = [0.1, 0.3]")) == quoted
    assert names(file("[sweep.prune]\nfraction = [0.1, 0.3]")) == quoted


def test_cells_are_settings_that_go_together_and_cross_with_the_axes(file):
    asked = sweeps.read(
        file(
            '[sweep]\nseeds = [[0], [1]]\n[[sweep.cells]]\nname = "few"\nprune.fraction = 0.1\nscore = "dprime"\n'
            "[[sweep.cells]]\n'prune.fraction' = 0.5\n"
        )
    )
    assert [cell.name for cell in asked.cells] == [
        "few,seeds=0", "few,seeds=1", "prune.fraction=0.5,seeds=0", "prune.fraction=0.5,seeds=1",
    ]  # fmt: skip
    assert [cell.experiment.score for cell in asked.cells] == ["dprime"] * 2 + ["probeless"] * 2
    assert [cell.value("score") for cell in asked.cells] == ["dprime"] * 2 + ["probeless"] * 2


def test_a_table_may_be_a_value_of_an_axis(file):
    asked = sweeps.read(file('[sweep]\nprune = [{fraction = 0.1, which = "least"}, {fraction = 0.2}]'))
    assert asked.keys == ("prune.fraction", "prune.which")
    assert [(c.experiment.prune.fraction, c.experiment.prune.which) for c in asked.cells] == [
        (0.1, "least"),
        (0.2, "most"),
    ]


def test_what_only_a_file_can_say_may_be_swept(file):
    asked = sweeps.read(file('[sweep]\nretrain.lora_rank = ["none", 4]\nkeep = ["none", "last"]'))
    assert [c.experiment.retrain.lora_rank for c in asked.cells] == [None, None, 4, 4]
    assert [c.experiment.keep for c in asked.cells] == ["none", "last"] * 2
    presets = sweeps.read(file('[sweep]\npreset = ["toy", "names"]\n', "seeds = [3]\n"))
    assert [(c.experiment.model, c.experiment.seeds) for c in presets.cells] == [("toy", (3,)), ("minilm", (3,))]
    protocols = sweeps.read(file('[sweep]\nprotocol = ["corrected", "published"]'))
    assert [c.experiment.prune.control for c in protocols.cells] == ["disjoint", "first"]


def test_a_name_depends_on_the_cell_alone_and_is_a_folder_everywhere(file):
    odd = '[sweep]\ncorpus = ["toy", "conll:/some where/a.conll", "conll:/some where:a.conll"]'
    few, more = names(file(odd)), names(file(odd + '\nscore = ["dprime"]'))
    assert few[0] == "corpus=toy"
    assert len(set(few)) == 3
    assert all(re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) for name in few)
    assert few[1].startswith("corpus=conll-some-where-a.conll-")
    assert more == [f"{name},score=dprime" for name in few]
    (long,) = names(file(f"[sweep]\nmodel = ['{'m' * 300}']\nsite = ['{'s' * 99}']\nscore = ['{'x' * 99}']"))
    assert len(long) <= 120


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("", r"has no table \[sweep\] of settings and their values"),
        ("[sweep]\n", r"has no table \[sweep\]"),
        ("sweep = [1]", "not valid TOML|no table"),
        ("[sweep]\nprune.fraction = 0.3", r"sweep.prune.fraction = 0.3: a list of the values that the setting takes"),
        ("[sweep]\nprune.fraction = []", r"sweep.prune.fraction = \[\]: a list"),
        (
            "[sweep]\nprune.fractoin = [0.1, 0.2]",
            "every cell: unknown setting 'prune.fractoin'; did you mean 'prune.fraction'\\? Known: prune.fraction,",
        ),
        (
            "[sweep]\nprune.fraction = [0.1, 2.0]",
            r"cell prune.fraction=2.0: prune.fraction = 2.0: input should be less",
        ),
        ("[sweep]\nprune.fraction = [2.0, 0.1]\nseeds = [[0], [1]]", "2 cells, such as prune.fraction=2.0,seeds=0: "),
        ('[sweep]\npreset = ["toy", "magic"]', "cell preset=magic: unknown preset 'magic'; known: names"),
        (
            "[sweep]\nprune.fraction = [0.1]\nprune = [{fraction = 0.2}]",
            "prune.fraction = .*list|swept twice|overwrite",
        ),
        (
            "[sweep]\nseeds = [[0]]\n[[sweep.cells]]\nseeds = [1]",
            "seeds is swept twice: by two axes, or by an axis and",
        ),
        ("[sweep]\nseeds = [[0], [1], [0]]", "cell seeds=0 is the same run as cell seeds=0; leave one out"),
        ("[sweep]\nprune.fraction = [0.1, 1e-1]", "cell prune.fraction=0.1 is the same run"),
        ("[[sweep.cells]]\nname = 'a/b'\nseeds = [1]", "name = 'a/b': letters, digits"),
        ("[[sweep.cells]]\nname = 'logs'\nseeds = [1]", "name = 'logs' is what the sweep's own folder"),
        ("[sweep]\ncells = [0.1]", r"tables of settings, each under a line \[\[sweep.cells\]\]"),
        (
            f"[sweep]\nseeds = {[[k] for k in range(200)]}\ndata.split_seed = {list(range(200))}",
            "asks for 40,000 cells; at most 10,000",
        ),
        ("[sweep", "is not valid TOML"),
    ],
)
def test_what_cannot_be_swept_is_refused(file, axes, message):
    with pytest.raises(ValueError, match=message):
        sweeps.read(file(axes))


def test_every_error_of_every_cell_is_said_at_once(file):
    with pytest.raises(ValueError, match="prune") as caught:
        sweeps.read(file('[sweep]\nprune.fraction = [0.1, 7.0]\nscore = ["dprime", "auroc"]\narms = [["magic"]]'))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any(line.startswith("every cell: arms.0 = 'magic'") for line in lines)
    assert any(line.startswith("2 cells, such as prune.fraction=7.0,score=dprime") for line in lines)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no sweep file at '.*nothing.toml'"):
        sweeps.read(tmp_path / "nothing.toml")


# --- processes


def jobs_of(folder: Path, **settings: str) -> list[engines.Job]:
    made = []
    for name, text in settings.items():
        (folder / f"{name}.toml").write_text(text)
        made.append(engines.Job(name, folder / f"{name}.toml", folder / name, folder / f"{name}.log", "cpu"))
    return made


def test_a_failure_is_its_last_error_in_one_line(tmp_path):
    jobs = jobs_of(tmp_path, one="seeds = []\nfoo = 1", two="model = 3")
    jobs[0].log.write_text("error: of an earlier try\n")
    said = []
    ends = {done.name: done.error for done in engines.local(jobs, workers=1, started=said.append)}
    assert said == ["one", "two"]
    assert ends["two"] == "model = 3: input should be a valid string"
    assert re.fullmatch(r"seeds = \[\]: tuple should .*; unknown setting 'foo'; known: .*", ends["one"] or "")
    assert jobs[0].log.read_text().startswith("error: of an earlier try\nerror: seeds")


def test_the_end_of_a_process_in_words(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\nTraceback\nTypeError: no\n\n")
    assert engines._why(1, log, 0) == "TypeError: no"
    assert engines._why(3, log, log.stat().st_size) == "exit code 3"
    assert engines._why(-signal.SIGKILL, log, 0) == "killed by SIGKILL (out of memory?)"
    assert engines._why(-signal.SIGSEGV, log, 0) == "killed by SIGSEGV"


@pytest.mark.parametrize(
    ("threads", "memory", "cores", "has", "workers"),
    [(None, None, 8, 9000, 6), (2, None, 8, 9000, 4), (16, None, 8, 9000, 1), (None, 2000, 8, 9000, 4),
     (None, 99_000, 8, 9000, 1), (1, 1000, 64, None, 6)],
)  # fmt: skip
def test_as_many_workers_as_cores_and_memory_allow(tmp_path, monkeypatch, threads, memory, cores, has, workers):
    monkeypatch.setattr(engines.needs, "memory_mb", lambda: None)
    path = tmp_path / "x"
    jobs = [engines.Job(str(k), path, path, path, "cpu", threads, memory) for k in range(6)]
    assert engines.workers_for(jobs, cores=cores, has_mb=has) == workers


class Recorded(subprocess.Popen):
    """Every process that is started, to be looked at afterwards."""

    all: "list[Recorded]"

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.env = how["env"]
        Recorded.all.append(self)


@pytest.fixture
def processes(monkeypatch) -> list[Recorded]:
    Recorded.all = []
    monkeypatch.setattr(engines.subprocess, "Popen", Recorded)
    return Recorded.all


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_who_stops_the_sweep_stops_its_processes(file, tmp_path, processes, how):
    asked = sweeps.read(file("[sweep]\nseeds = [[0], [1], [2]]"))

    def stop(name: str, now: str, done: Any) -> None:
        if len(processes) == 2:
            if how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(asked, tmp_path / "out", workers=2, tell=stop)
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out" / "summary.json").exists()
    with FileLock(tmp_path / "out" / ".lock", timeout=0):
        pass


def test_a_process_has_its_share_of_the_cores_unless_threads_are_set(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(engines, "_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    one, two = jobs_of(tmp_path, one="model = 3", two="model = 3")
    two = engines.Job(two.name, two.settings, two.folder, two.log, "cpu", threads=4)
    list(engines.local([one, two], workers=2))
    assert [process.env["OMP_NUM_THREADS"] for process in processes] == ["3", "5"]


def test_processes_take_turns_on_the_gpus(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(engines, "_gpus", lambda jobs: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = [
        engines.Job(j.name, j.settings, j.folder, j.log, device)
        for j, device in zip(
            jobs_of(tmp_path, a="model = 3", b="model = 3", c="model = 3", d="model = 3"),
            ("auto", "cuda", "cuda", "cuda:1"),
            strict=True,
        )
    ]
    list(engines.local(jobs, workers=4))
    assert [process.env["CUDA_VISIBLE_DEVICES"] for process in processes] == ["4", "7", "4", "4,7"]
    assert engines.workers_for(jobs, cores=8, has_mb=9000) == 2


# --- a real sweep: one cell is killed, one cannot work, one is let be

REAL = """
[[sweep.cells]]
name = "killed"
arms = ["concept"]
retrain.steps = [2, 8]
[[sweep.cells]]
arms = ["random"]
retrain.steps = [2, 8]
[[sweep.cells]]
name = "impossible"
concept = "river"
"""


def test_a_killed_and_a_failing_cell_leave_the_others_and_the_same_sweep_completes(file, tmp_path, monkeypatch):
    asked, out = sweeps.read(file(REAL)), tmp_path / "out"
    told, processes = [], []

    def kill() -> None:
        while not list(out.glob("killed/state/concept-0.safetensors")):
            time.sleep(0.005)
        processes[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    monkeypatch.setattr(engines.subprocess, "Popen", lambda *a, **k: processes.append(Forked(*a, **k)) or processes[-1])
    monkeypatch.setattr(report, "render", lambda _: "a page")  # which takes as long as the cell
    first = sweeps.run(asked, out, workers=2, tell=lambda name, now, done: told.append((name, now)))
    assert set(first.failed) == {"killed", "impossible"}
    assert first.failed["killed"] == "killed by SIGKILL (out of memory?)"
    assert re.match(r"no label 'river' for concept 'river'|.*no label 'river'", first.failed["impossible"])
    assert {("killed", "failed"), ("arms=random,retrain.steps=2+8", "done"), ("impossible", "failed")} <= set(told)
    assert first.summary["cells"]["impossible"]["log"] == "logs/impossible.log"
    assert "river" in (out / "logs" / "impossible.log").read_text()
    assert {row["arm"] for row in first.rows} == {"random"}
    kept = (out / "arms=random,retrain.steps=2+8" / "manifest.json").stat().st_mtime_ns

    # Without the cell that cannot work, beside two runs that nobody disturbed.
    mended = sweeps.read(file(REAL.split('[[sweep.cells]]\nname = "imp')[0]))
    again = sweeps.run(mended, out, workers=2)
    assert again.failed == {}
    assert (out / "arms=random,retrain.steps=2+8" / "manifest.json").stat().st_mtime_ns == kept
    for cell in mended.cells:
        store.run(cell.experiment, tmp_path / "whole" / cell.name)
        (out / cell.name / "report.html").unlink()  # the command writes it, the library does not
        assert difference(out / cell.name, tmp_path / "whole" / cell.name) == ""
    whole = gathered(mended, tmp_path / "whole")
    assert {**whole.summary, "seconds": 0} == {**again.summary, "seconds": 0}
    assert (out / "cells.parquet").read_bytes() == (tmp_path / "whole" / "cells.parquet").read_bytes()
    assert (out / "sweep.toml").read_text() == mended.text


# --- the table


def gathered(asked: sweeps.Sweep, out: Path) -> sweeps.Swept:
    """The cells run here and now, as a sweep would run them, and gathered."""
    for cell in asked.cells:
        store.run(cell.experiment, out / cell.name, shared=out / "shared")
    (out / "sweep.toml").write_text(asked.text)
    return sweeps.run(asked, out)


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> sweeps.Swept:
    """Two seeds and three arms, a cell each; only read."""
    out = tmp_path_factory.mktemp("spread")
    (out / "grid.toml").write_text(
        SMALL + '[sweep]\nseeds = [[0], [1]]\narms = [["concept"], ["random"], ["unpruned"]]'
    )
    return gathered(sweeps.read(out / "grid.toml"), out / "grid")


def row_of(swept: sweeps.Swept, **wanted: Any) -> dict[str, Any]:
    (row,) = [row for row in swept.rows if wanted.items() <= row.items()]
    return row


def test_arms_and_seeds_of_many_cells_say_what_one_run_says(spread, tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(SMALL + '[sweep]\nseeds = [[0, 1]]\narms = [["concept", "random", "unpruned"]]')
    one = gathered(sweeps.read(path), tmp_path / "one")
    assert len(one.summary["cells"]) == 1
    assert len(spread.summary["cells"]) == 6
    assert one.rows == spread.rows
    assert one.summary["notes"] == []
    (said,), (alike,) = one.summary["settings"], spread.summary["settings"]
    assert said["what_happened"] == alike["what_happened"]
    assert "2 seeds" in said["what_happened"]


def test_a_row_is_the_mean_over_seeds_beside_its_controls(spread):
    shown = {
        arm: [store.load_run(spread.folder / f"seeds={k},arms={arm}").arms[arm][0]["8"].f1["place"] for k in (0, 1)]
        for arm in ("concept", "random", "unpruned")
    }
    row = row_of(spread, arm="concept", stage="8")
    gaps = np.subtract(shown["concept"], shown["random"])
    assert (row["seeds"], row["metric"], row["concept"]) == (2, "F1", "place")
    assert row["score"] == pytest.approx(np.mean(shown["concept"]))
    assert row["random"] == pytest.approx(np.mean(shown["random"]))
    assert row["unpruned"] == pytest.approx(np.mean(shown["unpruned"]))
    assert row["difference"] == pytest.approx(gaps.mean())
    half = st.t.ppf(0.975, 1) * st.sem(gaps)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert (row["over"], row["difference_over"], row["control"]) == ("2 seeds", "2 seeds", "random, 2 seeds of both")
    # Planted: the concept is in four neurons, and the control is at another place.
    assert row_of(spread, arm="concept", stage="pruned")["score"] == 0
    assert row_of(spread, arm="random", stage="pruned")["score"] > 0.8
    assert row_of(spread, arm="random", stage="pruned")["difference"] is None


def test_cells_are_in_parquet_with_the_controls_of_the_same_seed(spread):
    cells = pd.read_parquet(spread.folder / "cells.parquet")
    assert len(cells) == 2 * 3 * 4
    assert set(cells.cell) == set(spread.summary["cells"])
    one = cells[(cells.arm == "concept") & (cells.seed == 1) & (cells.stage == "8")].iloc[0]
    control = cells[(cells.arm == "random") & (cells.seed == 1) & (cells.stage == "8")].iloc[0]
    assert one.random == control.score
    assert one.low <= one.score <= one.high
    assert len(spread.to_dataframe()) == 3 * 4


def test_an_arm_without_a_control_says_so(spread, file, tmp_path):
    out = tmp_path / "out"
    asked = sweeps.read(file('[sweep]\nseeds = [[0], [1]]\narms = [["concept"]]'))
    for cell in asked.cells:
        shutil.copytree(spread.folder / cell.name, out / cell.name)
    alone = gathered(asked, out)
    row = row_of(alone, arm="concept", stage="pruned")
    assert (row["random"], row["difference"], row["control"]) == (None, None, "no random arm: no control")
    _, rows = sweep_tables.printed(alone.rows, [])
    assert all("no random arm: no control" in cells for cells in rows if cells[2] != "base")
    assert "there is no random arm" in alone.summary["settings"][0]["what_happened"]


def test_a_difference_is_over_the_seeds_that_both_arms_have(spread, tmp_path):
    asked = sweeps.read(spread.folder / "sweep.toml")
    out = tmp_path / "out"
    for cell in asked.cells:
        shutil.copytree(spread.folder / cell.name, out / cell.name)
    (out / "seeds=1,arms=random" / "tensors" / "random-1.safetensors").write_bytes(b"damaged")
    swept = gathered_as_it_is(asked, out)
    assert set(swept.failed) == {"seeds=1,arms=random"}
    assert "is damaged" in swept.failed["seeds=1,arms=random"]
    row = row_of(swept, arm="concept", stage="8")
    assert (row["seeds"], row["over"], row["control"]) == (2, "2 seeds", "random, 1 seed of both")
    assert "sentences" in row["difference_over"]
    assert "intervals over" in swept.summary["settings"][0]["what_happened"]


def gathered_as_it_is(asked: sweeps.Sweep, out: Path) -> sweeps.Swept:
    (out / "sweep.toml").write_text(asked.text)
    return sweeps.run(asked, out)


def test_other_values_are_other_rows(spread, tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(SMALL + '[sweep]\nprune.fraction = [0.01, 0.5]\narms = [["concept", "random"]]')
    two = gathered(sweeps.read(path), tmp_path / "two")
    assert [row["prune.fraction"] for row in two.rows] == [0.01] * 8 + [0.5] * 8
    header, rows = sweep_tables.printed(two.rows, ["prune.fraction"])
    assert header == ["prune.fraction", "concept", "arm", "stage", "seeds", "F1", "random", "minus random", "unpruned"]
    assert [(r[0], r[2], r[3]) for r in rows[:5]] == [
        ("0.01", "all arms", "base"), ("0.01", "concept", "pruned"), ("0.01", "concept", "8"),
        ("0.01", "random", "pruned"), ("0.01", "random", "8"),
    ]  # fmt: skip
    assert {row[-1] for row in rows} == {"", "none"}
    assert sweep_tables.intervals(two.rows, 2).endswith("and nothing is corrected for 2 settings side by side.")


def test_another_base_is_said(spread):
    pool = sweep_tables.Pool({})
    pool.add("one", store.load_run(spread.folder / "seeds=0,arms=concept"))
    pool.add("same", store.load_run(spread.folder / "seeds=0,arms=random"))
    assert pool.notes == []
    other = settings_of(spread.folder / "seeds=0,arms=unpruned" / "settings.toml", {"finetune.lr": 0.1})
    pool.add("other", store.run(other))
    assert len(pool.notes) == 1
    assert pool.notes[0].startswith("other: the base model of seed 0 is not quite the one of the setting's other cells")


def test_a_loss_differs_in_the_number_that_is_read(tmp_path):
    path = tmp_path / "loss.toml"
    text = SMALL.replace('"toy"', '"toy-next-token"').replace("fraction", "share")
    path.write_text(text + '[sweep]\narms = [["concept"], ["random"]]')
    swept = gathered(sweeps.read(path), tmp_path / "loss")
    cut, control = (row_of(swept, arm=arm, stage="pruned") for arm in ("concept", "random"))
    assert cut["unit"] == "nats per token"
    assert cut["difference"] == pytest.approx(cut["score"] - control["score"])
    assert cut["difference_low"] <= cut["difference"] <= cut["difference_high"]
    assert cut["low"] <= cut["score"] <= cut["high"]


# --- the folder


def test_a_folder_that_is_no_sweep_is_left_alone(file, tmp_path):
    asked = sweeps.read(file("[sweep]\nseeds = [[0]]"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds files that are no sweep; choose another folder with --out"):
        sweeps.run(asked, tmp_path / "mine", fresh=True)
    with pytest.raises(FileExistsError, match="is a file; choose a folder"):
        sweeps.run(asked, tmp_path / "mine" / "thesis.txt")


def test_a_sweep_that_is_under_way_is_left_alone(file, tmp_path):
    asked = sweeps.read(file("[sweep]\nseeds = [[0]]"))
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(BlockingIOError, match="another process is running into"),
    ):
        sweeps.run(asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on": "slurm"}, "on = 'slurm': no such engine; known: local, ray"),
        ({"workers": 0}, "workers = 0: one at least"),
        ({"workers": 2, "on": "ray"}, "workers = 2: one at least, and with on = 'local' alone"),
    ],
)
def test_wrong_arguments_are_refused_before_any_folder_is_made(file, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        sweeps.run(sweeps.read(file("[sweep]\nseeds = [[0]]")), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_runs_with_other_settings_are_refused_and_fresh_removes_them(spread, file, tmp_path, monkeypatch):
    axes = '[sweep]\nseeds = [[0], [1]]\narms = [["concept"]]'
    out = tmp_path / "out"
    for name in ("seeds=0,arms=concept", "seeds=1,arms=concept"):
        shutil.copytree(spread.folder / name, out / name)
    shutil.copytree(spread.folder / "seeds=0,arms=random", out / "elsewhere")
    (out / "sweep.toml").write_text(spread.folder.joinpath("sweep.toml").read_text())
    changed = sweeps.read(file(axes, SMALL.replace("lr = 3e-3", "lr = 1e-3")))
    with pytest.raises(
        ValueError, match=r"holds 2 run\(s\) with other settings .* such as seeds=0,arms=concept.*fresh"
    ):
        sweeps.run(changed, out)
    ran = []
    monkeypatch.setattr(
        engines, "local", lambda jobs, **_: (ran.append(j) or engines.Done(j.name, "", 0) for j in jobs)
    )
    sweeps.run(changed, out, fresh=True)
    assert [job.name for job in ran] == ["seeds=0,arms=concept", "seeds=1,arms=concept"]
    assert not (out / "seeds=0,arms=concept").exists()
    assert (out / "elsewhere").exists()
    assert settings_of(ran[0].settings) == changed.cells[0].experiment


def test_a_setting_that_a_run_did_not_have_yet_is_its_default(spread):
    settings = store.load_run(spread.folder / "seeds=0,arms=concept").manifest["settings"]
    asked = settings_of(spread.folder / "seeds=0,arms=concept" / "settings.toml")
    assert are_of(settings, asked)
    assert are_of({key: value for key, value in settings.items() if key != "keep"}, asked)
    assert not are_of({**settings, "score": "dprime"}, asked)
    assert not are_of({**settings, "gone": 1}, asked)
    assert not are_of(None, asked)


def test_a_sweep_folder_goes_on_where_it_is(spread, file):
    assert sweeps.folder_of(sweeps.read(file("[sweep]\nseeds = [[0]]"))) == Path("runs/grid")
    (spread.folder / "settings").mkdir(exist_ok=True)
    assert sweeps.folder_of(sweeps.read(spread.folder / "sweep.toml")) == spread.folder


# --- the command


def test_the_command_prints_the_table_and_skips_what_is_complete(spread):
    arguments = ["sweep", str(spread.folder / "sweep.toml"), "--out", str(spread.folder)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = re.sub(r"\s+", " ", done.stdout)
    assert "6 cells over seeds, arms" in said
    assert "[6/6] seeds=1,arms=unpruned: complete" in said
    assert "concept arm stage seeds F1 random minus random unpruned" in said
    assert "place concept pruned 2 0.000 [0.000, 0.000]" in said
    assert "Intervals over 2 seeds; each holds by itself." in said
    plain = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(plain.stdout) == spread.summary
    assert "6 cells over seeds" in plain.stderr


def test_the_command_lists_the_cells_without_running(file, tmp_path):
    done = CliRunner().invoke(app, ["sweep", str(file("[sweep]\nseeds = [[0], [1]]")), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.sub(r"\s+", " ", done.stdout).strip() == "2 cells; folder runs/grid seeds=0 seeds=1"


def test_the_command_says_what_failed_and_exits_with_1(file, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "local", lambda jobs, **_: (engines.Done(j.name, "no luck", 2) for j in jobs))
    done = CliRunner().invoke(app, ["sweep", str(file("[sweep]\nseeds = [[0]]")), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    said = re.sub(r"\s+", " ", done.stdout)
    assert "[1/1] seeds=0: failed in 2 s: no luck" in said
    assert "failed; the same command tries again cell error log seeds=0 no luck logs/seeds=0.log" in said


# --- Ray; a node that dies is in `python -m tests.benchmarks ray-nodes`


def test_without_ray_the_error_says_how_it_is_installed(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--on ray needs the package ray.*pip install 'relearn-lens\[ray\]'"):
        sweeps.run(sweeps.read(file("[sweep]\nseeds = [[0]]")), tmp_path / "out", on="ray")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'relearn-lens[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield ray
    assert not ray.is_initialized()
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_a_cluster_that_does_not_answer_is_said(ray, file, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ConnectionError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1 \(Connection refused\); start it"
    ):
        sweeps.run(sweeps.read(file("[sweep]\nseeds = [[0]]")), tmp_path / "out", on="ray")


def test_cells_are_tasks_of_a_ray_that_is_started_for_them(ray, spread, file, tmp_path):
    axes = '[[sweep.cells]]\narms = ["concept"]\nseeds = [0]\n[[sweep.cells]]\nname = "impossible"\nconcept = "river"\n'
    asked = sweeps.read(file(axes))
    swept = sweeps.run(asked, tmp_path / "out", on="ray")
    assert list(swept.failed) == ["impossible"]
    assert "no label 'river'" in swept.failed["impossible"]
    assert "Traceback" in (tmp_path / "out" / "logs" / "impossible.log").read_text()
    first = asked.cells[0].name
    assert "concept 2: " in (tmp_path / "out" / "logs" / f"{first}.log").read_text()
    (tmp_path / "out" / first / "report.html").unlink()
    assert difference(tmp_path / "out" / first, spread.folder / "seeds=0,arms=concept") == ""
    assert not list((tmp_path / "out").glob(".token-*"))


def test_a_cluster_that_cannot_run_a_cell_is_refused(ray, file, tmp_path):
    small = sweeps.read(file('[sweep]\ndevice = ["cuda:1"]'))
    with pytest.raises(ValueError, match="device = 'cuda:1': Ray gives each run a GPU of its own; use cuda"):
        sweeps.run(small, tmp_path / "out", on="ray")
    large = sweeps.read(file("[sweep]\nthreads = [999]"))
    with pytest.raises(ValueError, match=r"no node of the Ray cluster can run 'threads=999', which takes 999 CPU"):
        sweeps.run(large, tmp_path / "out", on="ray")


def test_cells_are_given_one_place_for_what_they_begin_from(file, tmp_path, monkeypatch):
    jobs = []

    def taken(given, **_):
        jobs.extend(given)
        yield from ()

    monkeypatch.setattr(engines, "local", taken)
    sweeps.run(sweeps.read(file('[sweep]\n"prune.fraction" = [0.1, 0.2]\n')), tmp_path / "out")
    assert {job.shared for job in jobs} == {tmp_path / "out" / "shared"}
    assert jobs[0].arguments[-2:] == ["--shared", str(tmp_path / "out" / "shared")]
