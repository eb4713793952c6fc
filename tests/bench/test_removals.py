"""The table of removers: every cell once, whole or not there, each remover at the same retained ability."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relearn_lens.__main__ import app
from relearn_lens.bench import removals
from relearn_lens.measure.facts import GENERAL, NEAR, OTHER_WORDING, TRAINED_WORDING
from relearn_lens.models.taught import Taught
from relearn_lens.remove.losses import GradDiff, GradientAscent
from relearn_lens.remove.masks import SelectivePrune
from relearn_lens.remove.preference import AltPO
from relearn_lens.remove.recipes import RECIPES
from relearn_lens.runs.removals import Subject
from tests.made import small_taught


@pytest.fixture(scope="module")
def pair(taught_cache: Path) -> Taught:
    return small_taught(taught_cache)


def patched(patch: pytest.MonkeyPatch, pair: Taught) -> list[int]:
    """The seeds of which a model was asked for; recipes are short, and one is broken on purpose."""
    asked: list[int] = []

    def subject(model: str, facts: str, *, seed: int) -> Subject:
        asked.append(seed)
        assert (model, facts) == ("taught", "people")
        return Subject(model, pair.model, pair.facts, True, pair.never)

    patch.setattr(removals.removals, "subject", subject)
    patch.setitem(RECIPES[removals.KIND], "grad_diff", {"lr": 2e-3, "alpha": 2, "steps": (60,)})
    patch.setitem(RECIPES[removals.KIND], "gradient_ascent", {"lr": 1e-2, "steps": (8,)})
    return asked


@pytest.fixture
def subjects(pair: Taught, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return patched(monkeypatch, pair)


@pytest.fixture(scope="module")
def made(pair: Taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cells of two removers and seed 0; only read."""
    path = tmp_path_factory.mktemp("cells") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, pair)
        assert not any(cell.cached for cell in removals.cells(path, [0], ["grad_diff", "gradient_ascent"]))
    return path


def of(cells: Any) -> dict[str, removals.Cell]:
    return {f"{cell.name}-{cell.seed}": cell for cell in cells}


def test_each_is_asked_where_it_keeps_what_is_near(subjects, made: Path):
    cells = of(removals.cells(made, [0], ["grad_diff", "gradient_ascent"]))
    assert set(cells) == {"base-0", "never-0", "gradient_ascent-0", "grad_diff-0"}
    base, never, ascent, diff = (cells[f"{name}-0"] for name in ("base", "never", "gradient_ascent", "grad_diff"))
    assert base.accuracy(TRAINED_WORDING) == 1 == base.accuracy(NEAR)
    assert never.accuracy(TRAINED_WORDING) < 0.3 < 0.9 < never.accuracy(NEAR)
    for cell in (ascent, diff):
        assert cell.accuracy(NEAR) >= 0.95 * base.accuracy(NEAR)
        assert 0 <= cell.values["share"] <= 1
        assert cell.seconds is not None
        assert cell.seconds > 0
        # What is asked there is between the base and the removed model.
        assert cell.values["removed"][TRAINED_WORDING]["accuracy"]["value"] <= cell.accuracy(TRAINED_WORDING) <= 1
    assert ascent.values["share"] < 1  # it breaks what is near too
    assert diff.accuracy(TRAINED_WORDING) < ascent.accuracy(TRAINED_WORDING)
    assert {NEAR, GENERAL, OTHER_WORDING} <= set(diff.values["rows"])


def test_a_cell_is_made_once_and_again_where_its_settings_changed(
    subjects, pair, tmp_path: Path, monkeypatch, untouched
):
    monkeypatch.setitem(RECIPES[removals.KIND], "grad_diff", {"lr": 2e-3, "alpha": 2, "steps": (8,)})
    with untouched(pair.model, pair.never):
        first = of(removals.cells(tmp_path, [0], ["grad_diff"]))
    assert subjects == [0]
    assert not any(cell.cached for cell in first.values())
    again = of(removals.cells(tmp_path, [0], ["grad_diff"]))
    assert subjects == [0]  # no model is made for what is there
    assert all(cell.cached for cell in again.values())
    assert of(removals.cells(tmp_path, [0, 1], kept=True)).keys() == first.keys()
    assert subjects == [0]
    assert [cell.values for cell in again.values()] == [cell.values for cell in first.values()]
    path = tmp_path / "grad_diff-0.json"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / ".never-0.json.1.tmp").write_text("half")
    mended = of(removals.cells(tmp_path, [0], ["grad_diff"]))
    assert [cell.cached for cell in mended.values()] == [True, True, False]
    assert mended["grad_diff-0"].values["rows"] == first["grad_diff-0"].values["rows"]
    monkeypatch.setitem(RECIPES[removals.KIND], "grad_diff", {"lr": 1e-3, "steps": (2,)})
    changed = of(removals.cells(tmp_path, [0], ["grad_diff"]))
    assert [cell.cached for cell in changed.values()] == [True, True, False]
    assert changed["grad_diff-0"].values["steps"] == 2


def test_the_command_prints_the_table(subjects, made: Path, tmp_path: Path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    command = ["removers", "--table", str(tmp_path), "--seeds", "0,1", "--only", "grad_diff"]
    for done in ("done in", "kept"):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert f"grad_diff, seed 1: {done}" in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    values = json.loads((tmp_path / "grad_diff-0.json").read_text())
    works = all(values["rows"][row]["accuracy"]["value"] < 0.5 for row in (TRAINED_WORDING, OTHER_WORDING))
    assert (" 2/2 " if works else " 0/2 ") in " ".join(lines["grad_diff"].split()) + " "
    assert "/2" not in lines["never"] + lines["base"]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_what_teaches_a_fresh_model_is_asked_at_its_own_ability(subjects, pair, tmp_path: Path, monkeypatch, untouched):
    monkeypatch.setitem(RECIPES[removals.KIND], "sgtm", {"units": 8, "steps": (2,), "batch_size": 8})
    with untouched(pair.model, pair.never):
        cells = of(removals.cells(tmp_path, [0], ["sgtm"]))
    cell = cells["sgtm-0"]
    assert cell.values["share"] is None
    assert cell.values["rows"] == cell.values["removed"]
    assert cell.accuracy(NEAR) < 0.5  # two steps teach next to nothing, so it does not count as working
    assert cell.accuracy(TRAINED_WORDING) < 0.5
    assert not removals.works(cell)
    _, rows = removals.table(list(cells.values()))
    assert rows[-1][:2] == ["sgtm", "0/1"]
    assert "fresh" in rows[-1]


def test_the_page_is_the_table_with_lines_and_recipes(subjects, made: Path, tmp_path: Path):
    command = ["removers", "--table", str(made), "--seeds", "0", "--only", "grad_diff,gradient_ascent"]
    result = CliRunner().invoke(app, [*command, "--page", str(tmp_path / "page.md")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.md").read_text()
    every = list(removals.cells(made, [0], ["grad_diff", "gradient_ascent"]))
    assert text == removals.page(every)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for row in removals.table(every)[1]:
        assert text.count("| " + " | ".join(row) + " |") == 1
    assert rows["gradient_ascent"] == "| gradient_ascent | lr 0.01, steps (8,) |"
    weak = [cell.name for cell in every if cell.name not in ("base", "never") and not removals.works(cell)]
    assert weak
    assert f"Not below 0.5 in both wordings on seed 0: {', '.join(weak)}." in text
    result = CliRunner().invoke(app, ["removers", "--page", "x.md"])
    assert "--page FILE is the table as a page; give the table's folder" in str(result.exception)


def test_lines_are_those_of_code():
    assert removals.n_lines(GradientAscent) == 6
    source = inspect.getsource(AltPO)
    assert removals.n_lines(AltPO) == sum(
        line.strip().startswith(("class ", "name:", "source:", "answers:")) for line in source.splitlines()
    )
    # A helper of its module that it alone names is its own, without the docstring before its first line.
    assert removals.n_lines(GradDiff) == 16 + 7
    assert removals.n_lines(SelectivePrune) > removals.n_lines(AltPO)


def test_the_rule_needs_both_wordings():
    def cell(trained: float, other: float) -> removals.Cell:
        rows = {TRAINED_WORDING: {"accuracy": {"value": trained}}, OTHER_WORDING: {"accuracy": {"value": other}}}
        return removals.Cell("x", 0, {"rows": rows}, False)

    assert removals.works(cell(0.49, 0.49))
    assert not removals.works(cell(0.51, 0.1))
    assert not removals.works(cell(0.1, 0.5))


def test_wrong_seeds_and_names_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"seeds must be some numbers from 0, each once; got \[1, 1\]"):
        removals.cells(tmp_path, [1, 1])
    with pytest.raises(ValueError, match=r"no recipe for 'nope'; recipes for the toy: "):
        removals.cells(tmp_path, [0], ["nope"])
    result = CliRunner().invoke(app, ["removers", "--table", str(tmp_path), "--seeds", "a"])
    assert "--seeds 'a': write numbers, such as 0,1,2" in str(result.exception)
