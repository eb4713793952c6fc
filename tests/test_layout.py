"""The order of the packages is the order of the experiment, and each kind of knowledge has one home."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import relearn_lens

PACKAGE = Path(relearn_lens.__file__).parent
ORDER = (
    "names", "methods", "files", "progress", "sources", "text", "models", "neurons", "find", "remove", "relearn",
    "measure", "analysis", "runs", "show", "bench", "reproduce", "cli",
    "__main__",
)  # fmt: skip
APART = ({"find", "remove"}, {"find", "relearn"}, {"remove", "relearn"})
"""What finds, removes and finds again is an experiment: these never import each other."""
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
PUBLIC = dir(relearn_lens)


def of_every_module(check: Callable[[Path], None]) -> Callable[[], None]:
    """A test that checks all modules, and says of each what is wrong: a thousand tests would take seconds to report."""

    def test() -> None:
        wrong = {}
        for path in MODULES:
            try:
                check(path)
            except AssertionError as error:
                wrong[module_of(path)] = str(error)
        assert not wrong

    test.__doc__ = check.__doc__
    return test


def module_of(path: Path) -> str:
    """The name of a module within the package; a package's `__init__.py` is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    """What a file says, to be read only."""
    return ast.parse(path.read_text(encoding="utf-8"))


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from running(other)
        else:
            yield from running(child)


@cache
def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in running(tree_of(path)):
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


def named(path: Path) -> set[str]:
    """The package's own modules that a file names in a string which is nothing else: what an import by string does."""
    tree = tree_of(path)
    spoken = docstrings(tree)
    texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in spoken)
    return {text for text in texts if isinstance(text, str) and re.fullmatch(r"relearn_lens(\.\w+)+", text)}


def test_packages_are_those_of_the_order():
    here = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert here - {"__init__"} == set(ORDER)


@of_every_module
def test_module_imports_only_from_its_package_and_those_above(path):
    package = module_of(path).split(".")[0]
    above = set(ORDER[: ORDER.index(package) + 1])
    for pair in APART:
        if package in pair:
            above -= pair - {package}
    theirs = {name.split(".")[1] for name in imported(path) | named(path) if name.startswith("relearn_lens.")}
    assert theirs <= above, f"{module_of(path)} imports {sorted(theirs - above)}"


def test_modules_import_each_other_in_no_circle():
    names = {module_of(path) for path in MODULES}
    TopologicalSorter(
        {module_of(path): {name.removeprefix("relearn_lens.") for name in imported(path)} & names for path in MODULES}
    ).prepare()  # raises CycleError


@of_every_module
def test_private_names_stay_in_their_file(path):
    crossing = [
        alias.name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relearn_lens")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert crossing == []


@of_every_module
def test_plotly_is_imported_by_plots_alone(path):
    uses = any(name.split(".")[0] == "plotly" for name in imported(path))
    assert not uses or module_of(path).startswith("show.plots")


@of_every_module
def test_hook_names_stand_in_sites_alone(path):
    tree = tree_of(path)
    spoken = docstrings(tree)
    names = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and "hook_" in n.value and id(n) not in spoken
    ]
    assert bool(names) == (module_of(path) == "neurons.sites"), names


@of_every_module
def test_only_the_command_line_prints(path):
    tree = tree_of(path)
    prints = any(isinstance(n, ast.Call) and ast.unparse(n.func) == "print" for n in ast.walk(tree))
    assert not prints or module_of(path).split(".")[0] in ("cli", "__main__")


@of_every_module
def test_what_reads_results_never_trains_or_cuts_a_model(path):
    if not module_of(path).startswith(("analysis.", "show.")):
        return
    theirs = {tuple(name.split(".")[1:3]) for name in imported(path) if name.startswith("relearn_lens.")}
    assert not theirs & {("remove", "ablation"), ("models", "training"), ("models", "loading")}


# --- no code from data

UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load",
    "pd.read_pickle", "pandas.read_pickle", "read_pickle", "torch.hub.load", "yaml.load", "shutil.unpack_archive",
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str | None, str], ast.Call]]:
    """Every call: what is called, its keywords as they are written, and its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node


def code_from_data(tree: ast.AST, module: str = "") -> list[str]:
    """What in a module could run code that a file, an archive or a hub holds."""
    found = []
    for name, keywords, node in calls(tree):
        says = f"line {node.lineno}: {ast.unparse(node)[:80]}"
        if name in RUNS_CODE or name.endswith((".extractall", ".extract")) or "allow_pickle" in keywords:
            found.append(says)
        if keywords.get("shell", "False") != "False" or keywords.get("trust_remote_code", "False") != "False":
            found.append(says)
        if name.split(".")[0] == "subprocess" and not (node.args and isinstance(node.args[0], ast.Name | ast.List)):
            found.append(says)  # a list of words, never a line for a shell
        owner = name.removesuffix(".from_pretrained")
        reads_weights = owner != name and owner not in ("AutoConfig", "AutoTokenizer")
        # transformers reads a GGUF file by itself, which holds tensors and plain values alone.
        if reads_weights and keywords.get("use_safetensors") != "True" and module != "models.gguf":
            found.append(says)
    return found


@of_every_module
def test_module_never_runs_code_that_data_holds(path):
    assert not {name.split(".")[0] for name in imported(path)} & UNPICKLERS
    assert code_from_data(tree_of(path), module_of(path)) == []


@of_every_module
def test_every_read_of_safetensors_is_guarded(path):
    tree = tree_of(path)
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    reads = {"safe_open", "load_file", "load_safetensors"}
    assert [node.lineno for name, _, node in calls(tree) if name in reads and id(node) not in guarded] == []


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)", "torch.load(path)", "np.load(path)", "numpy.fromfile(path, allow_pickle=True)", "os.system(text)",
        "zipfile.ZipFile(path).extractall()", "subprocess.run(text, shell=True)", "subprocess.run(f'pip {text}')",
        "AutoModel.from_pretrained(name)", "AutoConfig.from_pretrained(name, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_rule_sees_code_from_data(code):
    assert code_from_data(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["import relearn_lens; dir(relearn_lens)", "import relearn_lens.__main__, relearn_lens.runs.settings"]
)
def test_import_waits_for_nothing_heavy(code):
    heavy = ("torch", "transformers", "transformer_lens", "plotly", "pandas", "datasets", "scipy")
    code += f"; import sys; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_public_names_exist_and_are_documented():
    for name in PUBLIC:
        assert getattr(relearn_lens, name).__doc__, name
    assert set(PUBLIC) <= set(dir(relearn_lens))
    with pytest.raises(AttributeError, match="relearn_lens has no attribute 'magic'"):
        _ = relearn_lens.magic  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_pinned_installs_on_the_first_python_that_is_promised():
    """3.11.0, not the 3.11 of this machine: pip says of one that does not only that versions conflict."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (PACKAGE.parent / "constraints.txt").read_text("utf-8"), flags=re.M)
    assert len(pins) > 100
    needs = {}
    for name, version in pins:
        try:
            pinned = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        if pinned.version == version:
            needs[f"{name} {version}"] = pinned.metadata["Requires-Python"] or ""
    assert len(needs) > 100
    assert {name: python for name, python in needs.items() if not SpecifierSet(python).contains("3.11.0")} == {}
