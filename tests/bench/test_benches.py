"""A bench: what it asks for, that every stage is computed once, that a killed one goes on, and what it says."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from relearn_lens.__main__ import app
from relearn_lens.analysis.matrix import NEVER
from relearn_lens.bench import bench_page, benches, cells
from relearn_lens.bench.cells import Work, read_cell
from relearn_lens.bench.plan import PRESETS, bench_of
from relearn_lens.models import taught
from relearn_lens.runs import removals
from relearn_lens.runs.stages import Stages
from tests.made import SMALL, small_people, small_taught

SETS = [
    "seeds=[1]", "chooses=0", "keys=8", "wordings=1", "draws=200", "points=4",
    'metrics=["inside", "depth", "returned"]',
    'rows={gd={remover="grad_diff", fields={steps=[4], lr=1e-3}}, '
    'ga={remover="gradient_ascent", fields={steps=[2], lr=3e-4}}, '
    'cut={remover="prune", rounds=2, repair=2, held=true, fields={where="random", fraction=0.2}}}',
    'columns={relearn={attack="relearn", rates=[1e-4, 1e-3], fields={steps=[1, 4]}}, quantised={attack="quantised"}}',
]  # fmt: skip


@pytest.fixture(scope="module")
def small(taught_cache):
    """Small facts and a small model in the place of those of the name `taught`: each seed's is a little another."""
    pair = small_taught(taught_cache)

    def like(model, seed):
        made = taught.untaught(pair.facts, recipe=SMALL)
        made.load_weights(shaken(model.weights(), seed))
        return made

    twin = functools.cache(lambda seed: like(pair.never, seed))  # which is only read
    with pytest.MonkeyPatch.context() as patch:

        def subject(model, facts, *, retain=None, seed=0):
            return removals.Subject("taught", like(pair.model, seed), pair.facts, True, twin(seed))

        patch.setattr(cells.removals, "subject", subject)
        patch.setattr(benches.engines, "local", in_process)
        yield


def shaken(weights, seed):
    """Weight matrices moved by a hundredth of their spread."""
    rng = torch.Generator().manual_seed(seed)
    matrices = {name for name, value in weights.items() if value.ndim == 2}
    return {
        name: value + 0.01 * value.std() * torch.randn(value.shape, generator=rng) if name in matrices else value
        for name, value in weights.items()
    }


def in_process(jobs, *, workers, started=None):
    """Jobs one after another, here."""
    for job in jobs:
        error = None
        try:
            benches.perform(job.settings, job.folder, say=lambda _: None)
        except ValueError as failed:
            error = str(failed)
        yield benches.engines.Done(job.name, error, 0.0)


@pytest.fixture(scope="module")
def benched(small, tmp_path_factory) -> benches.Benched:
    return benches.run(bench_of("facts-toy", SETS), tmp_path_factory.mktemp("bench") / "b", processes=1)


def test_a_bench_gives_every_row_column_and_the_twin(benched):
    assert benched.failed == {}
    results = benched.results
    assert results is not None
    assert results.rows == ("gd", "ga", "cut")
    assert results.columns == ("relearn", "quantised")
    assert {row for row, _ in results.cells} == {"gd", "ga", "cut", NEVER}
    for cell in results.cells.values():
        assert list(cell.courses["relearn"]) == ["0.0001", "0.001"]
        for course in (*cell.courses["relearn"].values(), *cell.courses["quantised"].values()):
            assert np.array_equal(course.held_out[0], cell.calibrated)
        assert cell.kept_calibrated >= 0.95 * cell.kept - 1e-9
        assert 0 <= cell.moved <= 1
    twin = results.cells[NEVER, 1]
    assert np.array_equal(twin.calibrated, twin.removed)


def test_metrics_are_tracked_along_the_attack_by_layer(benched):
    """What the metrics must be where nothing is trained yet, and of the twin; by layer at every checkpoint."""
    assert set(benched.metrics) == {"relearn 0.0001", "relearn 0.001"}
    metrics = json.loads((benched.folder / benches.SUMMARY).read_text())["metrics"]
    assert set(metrics) == {"gd", "ga", "cut", NEVER}
    for course in metrics.values():
        assert set(course) == {"inside", "depth", "returned"}
        for name, layers in (("inside", 2), ("depth", 2), ("returned", 5)):
            assert course[name]["steps"] == [0, 1, 4]
            assert [len(each) for each in course[name]["layers"].values()] == [3] * layers
            for value, low, high in course[name]["whole"]:
                assert low - 1e-9 <= value <= high + 1e-9
        assert course["returned"]["whole"][0][0] == 0
    assert metrics[NEVER]["depth"]["whole"][0][0] == pytest.approx(1)
    assert metrics["gd"]["depth"]["whole"][0][0] < 1
    page = (benched.folder / benches.PAGE).read_text()
    for title in ("Depth by layer", "Inside along the attack", "Returned by layer"):
        assert title in page


def test_a_metric_that_these_facts_do_not_have_is_said(benched, small, monkeypatch, untouched):
    work = Work(benched.bench, 1, Stages(benched.folder / benches.STAGES))
    monkeypatch.setattr(type(work.facts), "answers", lambda _: {})
    with untouched(work.model):
        (row,) = work._read(["inside"], work.base, 0)
    assert "closed sets" in row["why"]
    assert bench_page.tracked([row]) == {"inside": {"why": row["why"]}}


def test_the_summary_and_the_page_are_written(benched):
    summary = json.loads((benched.folder / benches.SUMMARY).read_text())
    assert set(summary["rows"]) == {"gd", "ga", "cut", NEVER}
    assert summary["rows"][NEVER]["attacks"]["relearn"]["recovery"] is None
    page = (benched.folder / benches.PAGE).read_text()
    assert "What this does not say" in page


def test_what_is_printed_fits(benched):
    lines = bench_page.lines(benched)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\berased\b", "\n".join(lines))
    assert [line.partition(":")[0] for line in lines[1:4]] == ["gd", "ga", "cut"]


@pytest.fixture
def undrawn(monkeypatch):
    """Pages are not drawn again: it takes a second, and the first one was looked at."""
    monkeypatch.setattr(bench_page, "render", lambda _: "a page")


def test_nothing_is_computed_twice(benched, small, undrawn, monkeypatch, untouched):
    """The same again, more seeds of it, or another attack on the same models: removers are not run again."""
    removed = []
    plainly = cells.Recipe.__call__
    monkeypatch.setattr(
        cells.Recipe, "__call__", lambda self, *a, **k: removed.append(self.remover.name) or plainly(self, *a, **k)
    )
    again = benches.run(benched.bench, benched.folder)
    assert removed == []
    assert json.dumps(bench_page.summary(again)["rows"]) == json.dumps(bench_page.summary(benched)["rows"])
    more = bench_of("facts-toy", [*SETS, 'columns.pruned={attack="pruned"}'])
    wider = benches.run(more, benched.folder)
    assert removed == []
    assert wider.results is not None
    assert wider.results.columns == ("relearn", "quantised", "pruned")
    quick = ['columns={quantised={attack="quantised"}}', "metrics=[]", "grafts=false"]  # what the others have, in short
    benches.run(bench_of("facts-toy", [*SETS, *quick, "rows.gd.fields.lr=5e-4"]), benched.folder)
    assert removed == ["grad_diff", "grad_diff"]  # both seeds


def without(benched: benches.Benched, out: Path, cell: str) -> Path:
    """A copy of the folder without some cells (`*[dt]@1`: gd, cut of seed 1) and the stages that they are made of."""
    shutil.copytree(benched.folder, out)
    for path in (out / benches.CELLS).glob(f"{cell}.json"):
        index = json.loads(path.read_text())
        courses = [name for each in index["courses"].values() for name in each.values()]
        for name in (index["removed"], index["calibrated"], *courses):
            shutil.rmtree(out / benches.STAGES / name, ignore_errors=True)  # rows may share a stage
        path.unlink()
    return out


def test_a_bench_that_is_stopped_goes_on_and_gives_the_same(benched, small, undrawn, tmp_path, monkeypatch):
    folder, plainly, calls = without(benched, tmp_path / "b", "*[dt]@1"), Work._attacked, []

    def stops(self, *args, **keywords):
        calls.append(self.seed)
        if calls.count(1) == 5:  # in the second of two rows
            raise KeyboardInterrupt
        return plainly(self, *args, **keywords)

    monkeypatch.setattr(Work, "_attacked", stops)
    with pytest.raises(KeyboardInterrupt):
        benches.run(benched.bench, folder)
    again = benches.run(benched.bench, folder)
    assert bench_page.summary(again)["rows"] == bench_page.summary(benched)["rows"]


def test_one_row_that_fails_stops_no_other(benched, small, undrawn, tmp_path, monkeypatch):
    folder, plainly = without(benched, tmp_path / "b", "[gc][au]*@1"), Work.cell
    monkeypatch.setattr(
        Work,
        "cell",
        lambda self, name: plainly(self, name) if name != "ga" else (_ for _ in ()).throw(ValueError("broke")),
    )
    partly = benches.run(benched.bench, folder)
    assert partly.results is not None
    assert partly.results.rows == ("gd", "cut")
    assert any("ga: broke" in why for why in partly.failed.values())


def test_a_cell_leaves_nothing_behind(benched, small, untouched):
    """Weights are the attack's start again: what is asked afterwards is what was asked before."""
    work = Work(benched.bench, 1, Stages(benched.folder / benches.STAGES))
    base = work.base
    index = work.cell("gd")
    work.model.load_weights(base)
    cell = read_cell(index, work.stages).cell
    assert np.array_equal(work._sums(work._held_out), cell.base)


def test_facts_smollm2_says_what_it_takes_and_a_cell_of_it_runs(tmp_path, monkeypatch):
    """A tiny Llama of a folder in the place of SmolLM2: taught, its twin too, removed from and attacked every way."""
    plan = CliRunner().invoke(app, ["bench", "facts-smollm2", "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "8 jobs, 24 cells, 192 attacks" in plan.output
    memory, disk = (int(n.replace(",", "")) for n in re.findall(r"about ([\d,]+) MB", plan.output))
    assert 4 * 4 * 134.5 < memory < 20_000
    assert disk == -(-4 * 7 * 4 * 134_515_008 // 2**20)

    made = small_people()
    tokenizer = taught.tokenizer(made)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(removals, "people", lambda seed: made)
    monkeypatch.setattr(benches.engines, "local", in_process)
    steps = [f"columns.{name}.fields.steps=[2]" for name in ("relearn", "relearn-lora", "retain-only")]
    small = [f'model="{tmp_path / "tiny"}"', "seeds=[1]", "chooses=0", "keys=8", "draws=100", "points=2", *steps]
    rows = ['rows={npo={remover="npo", fields={lr=1e-3, steps=[4]}}}', "teach={epochs=2, lr=1e-2}"]
    done = benches.run(bench_of("facts-smollm2", [*small, *rows]), tmp_path / "b", processes=1)
    assert done.failed == {}
    assert done.results is not None
    assert done.results.columns == ("relearn", "relearn-lora", "retain-only", "quantised", "pruned")
    cell, twin = done.results.cells["npo", 1], done.results.cells[NEVER, 1]
    assert list(cell.courses["relearn-lora"]) == ["0.0001", "0.001"]
    assert not np.array_equal(cell.base, twin.calibrated)  # the twin was not taught what the base was
    assert len(bench_page.lines(done)) <= 25


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_benches_whose_names_are_known(name, tmp_path):
    bench = bench_of(name)
    cells.check(bench)
    (tmp_path / "again.toml").write_text(bench.to_toml())
    assert bench_of(tmp_path / "again.toml") == bench


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["rows.x.remover=nope"], r"rows\.x: unknown remover 'nope'; known: "),
        (["columns.x.attack=nope"], r"columns\.x: unknown attack 'nope'; known: "),
        (['columns.x={attack="quantised", rates=[1e-4]}'], r"quantised trains nothing, so it has no learning rates"),
        (["rows.npo.fields.nope=1"], r"rows\.npo: npo has no field 'nope'; it has "),
        (['metrics=["nope"]'], "metrics: unknown metric 'nope'; known: accuracy"),
        (['model="smollm2"', 'metrics=["depth"]'], "metrics: depth compares with a twin that never knew, .* has none"),
        (["teach.lr=1e-4"], r"teach: the model 'taught' is taught these facts anyway"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_is_computed(sets, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        benches.run(bench_of("facts-toy", sets), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["nope=1"], "unknown setting 'nope'; known here: model, facts"),
        (["rows.npo.nope=1"], r"unknown setting 'rows\.npo\.nope'; known here: remover"),
        (["seeds=[1,1]"], r"seeds = \[1, 1\], chooses = 0: each seed once"),
        (["seeds=[0,1]"], "what is chosen on one is reported on others"),
        (['rows.never={remover="npo"}'], "name 'never': .* which is the twin"),
        (["tau=2"], "tau = 2: "),
        (["rows"], "write key=value"),
    ],
)
def test_settings_that_cannot_be_are_said_in_a_line(sets, says):
    with pytest.raises(ValueError, match=says):
        bench_of("facts-toy", sets)


def test_files_and_presets_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="unknown bench 'nope'; known: facts-toy"):
        bench_of("nope")
    with pytest.raises(FileNotFoundError, match="no bench at"):
        bench_of(tmp_path / "nope.toml")
    (tmp_path / "own.toml").write_text('preset = "facts-toy"\nseeds = [3]\n[rows.x]\nremover = "npo"\n')
    assert list(bench_of(tmp_path / "own.toml").rows) == ["x"]
    (tmp_path / "own.toml").write_text('preset = "nope"\n')
    with pytest.raises(ValueError, match="unknown preset 'nope'; known: facts-toy"):
        bench_of(tmp_path / "own.toml")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds files that are no bench"):
        benches.run(bench_of("facts-toy"), tmp_path / "b")


def test_the_command_prints_the_matrix(benched, small, undrawn):
    sets = [part for each in SETS for part in ("--set", each)]
    result = CliRunner().invoke(app, ["bench", "facts-toy", "--out", str(benched.folder), *sets])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) <= 25
    assert "gd: " in result.output
    told = CliRunner().invoke(app, ["bench", "facts-toy", "--out", str(benched.folder), "--json", *sets])
    assert set(json.loads(told.stdout)["rows"]) == {"gd", "ga", "cut", NEVER}
