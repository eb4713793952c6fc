"""The order of the files is the order of the experiment, and each kind of knowledge has one home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import relearn_lens

PACKAGE = Path(relearn_lens.__file__).parent
ORDER = """
    sources corpus readers encoding models toy concept neurons streams probes saliency attribution ablation evaluation
    retraining topwords vectors meaning similarity tracking intervals recovery priming migration analysis claims
    settings experiment findings tables archive store plots report __main__
""".split()  # noqa: SIM905
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
EVERY = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from running(other)
        else:
            yield from running(child)


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module == "relearn_lens" else {module}
    return found


def docstrings(tree: ast.AST) -> set[int]:
    """Every string that stands alone as a statement."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def test_order_lists_every_module_of_the_package():
    assert sorted(path.stem for path in MODULES) == sorted(ORDER)
    assert {path.parent for path in MODULES} == {PACKAGE}


@EVERY
def test_module_imports_only_from_modules_above_it(path):
    above = set(ORDER[: ORDER.index(path.stem)])
    mine = {name.split(".")[1] for name in imported(path) if name.startswith("relearn_lens.")}
    assert mine <= above, f"{path.stem} imports {sorted(mine - above)}"


@EVERY
def test_plotly_is_imported_by_plots_alone(path):
    uses = any(name.split(".")[0] == "plotly" for name in imported(path))
    assert uses == (path.stem == "plots")


@EVERY
def test_hook_names_stand_in_neurons_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spoken = docstrings(tree)
    names = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and "hook_" in n.value and id(n) not in spoken
    ]
    assert bool(names) == (path.stem == "neurons"), names


@EVERY
def test_only_the_command_line_prints(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prints = any(isinstance(n, ast.Call) and ast.unparse(n.func) == "print" for n in ast.walk(tree))
    assert prints == (path.stem == "__main__")


@pytest.mark.parametrize("module", ["analysis", "plots", "report"])
def test_what_reads_results_never_touches_a_model(module):
    direct = {name.split(".")[1] for name in imported(PACKAGE / f"{module}.py") if name.startswith("relearn_lens.")}
    assert not direct & {"models", "ablation", "retraining", "encoding"}


def test_ablation_knows_nothing_of_saliency():
    assert "relearn_lens.saliency" not in imported(PACKAGE / "ablation.py")


@pytest.mark.parametrize(
    "code", ["import relearn_lens; dir(relearn_lens)", "import relearn_lens.__main__, relearn_lens.settings"]
)
def test_import_waits_for_nothing_heavy(code):
    heavy = ("torch", "transformers", "transformer_lens", "plotly", "pandas", "datasets", "scipy")
    code += f"; import sys; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_public_names_exist_and_are_documented():
    for name in relearn_lens.__all__:
        assert getattr(relearn_lens, name).__doc__, name
    assert set(relearn_lens.__all__) <= set(dir(relearn_lens))
    with pytest.raises(AttributeError, match="module 'relearn_lens' has no attribute 'magic'"):
        _ = relearn_lens.magic
