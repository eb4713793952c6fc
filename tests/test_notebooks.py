"""The numbered notebooks: committed clean, and every cell of every one runs as a reader would run it; and so do the
workshop's solutions.

They run on the toy, in a kernel of their own that has the imports already: to start Python and torch ten times would
take longer than all notebooks together.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.spare import PLAIN

FOLDER = Path(__file__).parents[1] / "notebooks"
WORKSHOP = FOLDER / "workshop"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SETUP = 'pip install -c constraints.txt -e ".[demo,notebook]"'
PLOTLY = "application/vnd.plotly.v1+json"
MEGABYTE = 2**20
PATIENCE = {"timeout": 600, "startup_timeout": 600, "iopub_timeout": 600, "raise_on_iopub_timeout": True}
"""nbclient gives a kernel a minute to start, and leaves out without a word what is put out more than four seconds after
its cell is done: too little where others want the cores too."""
QUICK = "QUICK = False"
"""In the settings of notebooks whose models take minutes to train once."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def test_notebooks_are_numbered_without_a_gap():
    assert [path.stem.split("_")[0] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(9)]


@EVERY
def test_notebook_is_committed_without_outputs(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert cell.outputs == [], f"cell {cell.id!r} has been run; clear its output"
        assert cell.execution_count is None, f"cell {cell.id!r} has been run; clear its output"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z][a-z-]*", name) for name in ids), ids  # names, which a diff can be read by
    assert path.read_text(encoding="utf-8").endswith("}\n")


@EVERY
def test_notebook_opens_with_goal_minutes_hardware_and_setup(path: Path):
    notebook = read(path)
    top = notebook.cells[0]
    assert top.cell_type == "markdown"
    assert top.source.startswith(f"# {path.stem[:2]} ")
    assert "**Goal.**" in top.source
    for row in ("Minutes", "Hardware", "Know before", "Set-up"):
        assert re.search(rf"^\| {row} \| .+ \|$", top.source, re.M), f"no row {row!r}"
    assert SETUP in top.source
    assert re.search(r"^\| Minutes \| (about|under) \d", top.source, re.M)


@EVERY
def test_notebook_has_its_settings_first_and_one_first_picture(path: Path):
    notebook = read(path)
    assert tagged(notebook, "parameters") == code_cells(notebook)[:1]
    assert len(tagged(notebook, "first-picture")) == 1


@EVERY
def test_notebook_asks_what_one_notices_and_folds_the_answer(path: Path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    asked = text.count("**What do you notice?**")
    assert asked >= 1
    assert text.count("<details><summary>") == text.count("</details>")


@EVERY
def test_notebook_links_to_notebooks_that_are_there(path: Path):
    for cell in read(path).cells:
        for link in re.findall(r"\]\(([^)]+\.ipynb)\)", cell.source):
            assert (FOLDER / link).is_file(), f"cell {cell.id!r} links to {link}"


def test_first_notebook_has_six_cells_of_code():
    assert len(code_cells(read(NOTEBOOKS[0]))) == 6


Runner = Callable[..., Any]


@pytest.fixture(scope="module")
def run_in_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runner, Path]]:
    """Runs a notebook in an empty folder, or in `folder`, after whatever the kernel ran before is forgotten."""
    where, scratch = tmp_path_factory.mktemp("kernel"), tmp_path_factory.mktemp("scratch")
    manager = KernelManager(kernel_name="python3")
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv[:1] = PLAIN.python
    manager.start_kernel(cwd=str(where), env=os.environ | {"TMPDIR": str(scratch)})

    def run(notebook: Any, folder: Path = where) -> Any:
        reset = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}", id="reset")
        notebook.cells.insert(0, reset)
        NotebookClient(notebook, km=manager, **PATIENCE).execute()
        notebook.cells.remove(reset)
        return notebook

    try:
        yield run, where
    finally:
        manager.shutdown_kernel(now=True)


def figures(notebook: Any) -> Iterator[tuple[str, str]]:
    """Cell and JSON of every plotly figure that came out."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                yield cell.id, json.dumps(output.data[PLOTLY])


@EVERY
def test_notebook_runs(path: Path, run_in_kernel: tuple[Runner, Path]):
    run, where = run_in_kernel
    beside = sorted(FOLDER.iterdir())
    notebook = read(path)
    (settings,) = tagged(notebook, "parameters")
    settings.source = settings.source.replace(QUICK, QUICK.replace("False", "True"))
    done = run(notebook)
    outputs = [output for cell in code_cells(done) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    warned = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not warned, f"a reader would see: {warned[0][:500]}"
    drawn = list(figures(done))
    assert tagged(done, "first-picture")[0].id in [cell for cell, _ in drawn]
    for cell, figure in drawn:
        assert len(figure) < MEGABYTE, f"the figure of cell {cell!r} is {len(figure):,} bytes"
    assert not list(where.iterdir()), "something was written beside the notebook"
    assert sorted(FOLDER.iterdir()) == beside


def test_the_workshops_solutions_run_and_every_check_passes(run_in_kernel: tuple[Runner, Path]):
    run, _ = run_in_kernel
    there = sorted(WORKSHOP.iterdir())
    book = run(read(WORKSHOP / "solutions.ipynb"), WORKSHOP)
    checks = [cell for cell in code_cells(book) if cell.id.endswith("-check")]
    outputs = [(cell.id, out) for cell in code_cells(book) for out in cell.outputs]
    assert not [out for _, out in outputs if out.output_type == "error"]
    said = "".join(out.text for _, out in outputs if out.output_type == "stream" and out.name == "stdout")
    assert said.count("✔") == 2 * len(checks)  # each by itself, and all at the end
    assert "✘" not in said
    drawn = {cell for cell, out in outputs if PLOTLY in out.get("data", {})}
    assert drawn == {"first-picture", "conductance-compare", "comeback", "trap", "arms-run"}
    assert all(len(json.dumps(out)) < 1e6 for _, out in outputs)
    assert [p for p in sorted(WORKSHOP.iterdir()) if p.name != "__pycache__"] == [
        p for p in there if p.name != "__pycache__"
    ]
    # What the folded answers say.
    ablated = r"planted: F1 place 0.00, person 1.00; probeless 8.04 \(mean\)\n +decoys: F1 place 1.00, .* 1.97 \(mean\)"
    assert re.search(ablated, said)
    assert "double dissociation 1.00 of F1" in said
    *_, two, _ = map(float, re.findall(r"each layer alone brings back: \[(.*?)\]", said)[0].split(", "))
    assert two > 0.2  # the decoys' layer
    held, left = map(float, re.findall(r"held, at the end: F1 (\S+), (\S+) without the decoys", said)[0])
    assert held > 0.9 > left
    assert "planted: 1.00 of F1 lost, p = 0.05 of 19 random sets" in said
    assert "this is a description, not a finding" in said
    (alone_t, beyond_t), (_, beyond_v) = (
        map(float, each) for each in re.findall(r"[TV]: (\S+) back without a twin, (\S+) beyond it", said)
    )
    assert alone_t > 0.9
    assert beyond_t < 0.3 < beyond_v
