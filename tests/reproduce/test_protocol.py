"""Claims, verdicts and the way from seeds to them."""

import ast
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import relearn_lens
from relearn_lens.__main__ import app
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.files import as_json, read_json
from relearn_lens.models import taught
from relearn_lens.reproduce import protocol, tables
from relearn_lens.reproduce.claims import CLAIMS, Claim, verdict_of
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.reproduce.readings import READINGS
from relearn_lens.runs.removals import Subject
from relearn_lens.text.facts import people

BEYOND, WITHIN = Claim("a", "more", "share", 0.1), Claim("b", "alike", "share", 0.1, rule="within")
PAGES = sorted(set(Path(relearn_lens.__file__).parent.glob("reproduce/*.py")))
BOUGHT = {"relearn_lens", "__future__", "collections", "dataclasses", "functools", "math", "numpy", "itertools"}
"""What a paper's page may import: the library, and what counts."""


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        (BEYOND, 0.2, 0.3, "reproduced"),
        (BEYOND, 0.05, 0.3, "inconclusive"),
        (BEYOND, -0.2, 0.05, "not reproduced at this scale"),
        (BEYOND, -0.3, -0.2, "reversed"),
        (BEYOND, math.nan, math.nan, "inconclusive"),
        (Claim("c", "positive", "share", 0.0), -0.3, -0.2, "reversed"),
        (WITHIN, -0.05, 0.05, "reproduced"),
        (WITHIN, 0.2, 0.3, "not reproduced at this scale"),
        (WITHIN, 0.05, 0.3, "inconclusive"),
    ],
)
def test_verdict_is_of_the_whole_interval(claim, low, high, verdict):
    assert verdict_of(claim, Estimate((low + high) / 2, low, high, "3 seeds", n=3)) == verdict


def test_fewer_than_three_seeds_say_nothing():
    assert verdict_of(BEYOND, Estimate(0.5, 0.4, 0.6, "2 seeds", n=2)) == "inconclusive"


def test_every_paper_has_claims_that_differ():
    for name, claims in CLAIMS.items():
        assert claims, name
        assert all(claim.key == key and claim.says and claim.unit and claim.bar >= 0 for key, claim in claims.items())
    assert set(protocol.PAPERS) == set(CLAIMS)


def test_readings_are_of_claims():
    assert {(name.partition(" on ")[0], key) for name, read in READINGS.items() for key in read} <= {
        (name, key) for name, claims in CLAIMS.items() for key in claims
    }


@pytest.mark.parametrize("name", protocol.PAPERS)
def test_page_is_a_page_and_made_of_the_library_alone(name):
    path = next(page for page in PAGES if page.stem == name)
    text = path.read_text(encoding="utf-8")
    theirs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            theirs |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            theirs.add((node.module or "").split(".")[0])
    assert theirs <= BOUGHT
    assert len(text.splitlines()) <= 160
    paper = protocol.paper_of(name)
    assert paper.name == name
    assert paper.smaller
    assert paper.protocol
    assert paper.source


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A paper whose readings are numbers, and how often it was measured."""
    measured = []

    def measure(lab: Lab) -> Iterator[Reading]:
        measured.append(lab.seed)
        yield Reading("a", Estimate(0.5, 0.4, 0.6, "9 keys", n=9), 0.01)
        yield Reading("b", math.nan, note="no keys")

    monkeypatch.setitem(CLAIMS, "claims", {"a": BEYOND, "b": WITHIN})
    paper = Paper("claims", "made", "ours", "numbers", "all", measure, toy_only="numbers have no model")
    monkeypatch.setattr(protocol, "paper_of", lambda name: paper)
    monkeypatch.setattr(protocol, "PAPERS", ("claims",))
    return measured, tmp_path


def test_seeds_are_measured_once_and_kept(made):
    measured, folder = made
    first = protocol.reproduce("claims", out=folder)
    assert [row.verdict for row in first.rows] == ["reproduced", "inconclusive"]
    assert first.rows[0].control == pytest.approx(0.01)
    assert first.rows[1].notes == ("no keys",)
    again = protocol.reproduce("claims", seeds=(0, 1, 2, 3), out=folder)
    assert measured == [0, 1, 2, 3]
    assert again.rows[0].effect is not None
    assert again.rows[0].effect.low == pytest.approx(0.4)
    assert "| `relearn-lens reproduce claims` | **reproduced**: more<br>inconclusive: " in tables.short_table([again])


def test_seeds_outlive_another_version_of_python(made, monkeypatch):
    """Which dumps a tree in other words."""
    measured, folder = made
    protocol.reproduce("claims", out=folder)
    plain = ast.dump
    monkeypatch.setattr(ast, "dump", lambda *args, **how: plain(*args, **how) + "type_params=[]")
    protocol.reproduce("claims", out=folder)
    assert measured == [0, 1, 2]


def test_record_is_of_the_seeds_that_the_folder_has(made, monkeypatch):
    _, folder = made
    result = protocol.reproduce("claims", out=folder)
    results, missing = protocol.gathered(folder)
    assert (results, missing) == ([result], [])
    (folder / "claims" / "toy-1.json").write_text('{"digest": "another"}')
    results, missing = protocol.gathered(folder)
    assert results[0].seeds == (0, 2)
    assert results[0].rows[0].verdict == "inconclusive"
    text = tables.record(results, missing)
    assert "1 papers, 2 claims: 2 inconclusive; 0.0 minutes of one core in all." in text
    kept = read_json(path := folder / "claims" / "toy-2.json")
    path.write_bytes(as_json({key: value for key, value in {**kept, "seconds": 90.0}.items() if key != "cpu_seconds"}))
    unsaid = tables.record(protocol.gathered(folder)[0])
    assert "at most 1.5 minutes of one core in all." in unsaid
    assert "seeds 0, 2, 90 s." in unsaid
    assert "Not here: claims, seed 1: of another version of the page." in text
    assert "| claims | more | 0.500 [0.400, 0.600] share | beyond 0.1 | 0.010 |  | inconclusive |" in text
    assert "- b: no keys" in text
    assert "Read so" not in text
    monkeypatch.setitem(READINGS, "claims", {"a": "two seeds"})
    assert "Read so:\n\n- a (inconclusive): two seeds.\n" in tables.record(results)
    both = tables.record(results, (), [replace(results[0], scale="real", model="smollm2")])
    assert "With `--scale real`, on smollm2:\n\n| paper |" in both
    assert "\n## claims on smollm2\n" in both
    assert both.count("Read so") == 1
    assert protocol.gathered(folder / "none") == ([], ["claims: no seed"])


def test_command_prints_the_table_of_a_folder_and_writes_the_record(made, tmp_path):
    _, folder = made
    protocol.reproduce("claims", out=folder)
    path = tmp_path / "RESULTS.md"
    result = CliRunner().invoke(app, ["reproduce", "--table", str(folder), "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert result.stdout == tables.short_table(protocol.gathered(folder)[0])
    assert path.read_text() == tables.record(*protocol.gathered(folder))
    path.write_text(f"# Ours\n\n{tables.BEGIN}\nold\n{tables.END}\nmore\n")
    CliRunner().invoke(app, ["reproduce", "--table", str(folder), "--out", str(path)])
    assert path.read_text() == f"# Ours\n\n{tables.BEGIN}\n{result.stdout}{tables.END}\nmore\n"


def test_a_file_that_holds_something_else_is_kept(made, tmp_path):
    _, folder = made
    path = tmp_path / "notes.md"
    for text in ("my notes\n", f"my notes\n{tables.BEGIN}\nno end\n"):
        path.write_text(text)
        result = CliRunner().invoke(app, ["reproduce", "--table", str(folder), "--out", str(path)])
        assert isinstance(result.exception, ValueError)
        assert "the file holds something else than a record" in str(result.exception)
        assert path.read_text() == text


def test_the_table_of_the_readme_is_of_the_record():
    """Both are made by the command, and of the same seeds."""
    root = Path(protocol.__file__).parents[2]
    verdicts = re.findall(
        r"^\| (\w+) \| ([^|]*) \|.* \| ([\w ]+) \|$",
        (root / "relearn_lens/reproduce/RESULTS.md").read_text(encoding="utf-8").partition("With `--scale real`")[0],
        flags=re.M,
    )
    told = (root / "README.md").read_text(encoding="utf-8").partition(tables.BEGIN)[2].partition(tables.END)[0]
    short = [
        (command, says, verdict)
        for command, claims in re.findall(r"^\| `relearn-lens reproduce (\w+)` \| (.*) \|$", told, flags=re.M)
        for verdict, _, says in (each.replace("*", "").partition(": ") for each in claims.split("<br>"))
    ]
    assert short == verdicts[1:]
    assert len(short) == sum(map(len, CLAIMS.values()))


def test_all_names_the_papers_that_a_scale_does_not_have(made, tmp_path):
    result = CliRunner().invoke(app, ["reproduce", "all", "--scale", "real", "--json", "--out", str(tmp_path)])
    assert result.stdout == "[]\n"
    assert "claims has no scale 'real': numbers have no model" in result.stderr
    assert made[0] == []


def test_no_width_is_said(made, monkeypatch):
    _, folder = made
    paper = Paper("claims", "made", "ours", "numbers", "all", lambda lab: iter([Reading("a", 0.5)]))
    monkeypatch.setattr(protocol, "paper_of", lambda name: paper)
    (row, _) = protocol.reproduce("claims", out=folder).rows
    assert row.notes == ("every seed gives this number, so its interval has no width",)


def test_processes_fill_the_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="processes = 0: it takes at least one"):
        next(protocol.spread(["lo2024"], processes=0, out=tmp_path))
    paper = protocol.paper_of("lo2024")
    monkeypatch.setattr(protocol, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(2))
    quick = replace(paper, measure=lambda lab: iter([Reading("returns", 0.9 + lab.seed)]))
    monkeypatch.setattr(protocol, "paper_of", lambda name: quick)
    lines = sorted(protocol.spread(["lo2024"], processes=2, seeds=(0, 1), out=tmp_path))
    assert lines == ["lo2024, seed 0: 0 s", "lo2024, seed 1: 0 s"]
    assert list(protocol.spread(["lo2024"], processes=2, seeds=(0, 1), out=tmp_path)) == []


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A lab whose model was taught nothing."""
    facts = people(0, n=12, forget=4, never=2, animals=3, n_answers=8)
    model = taught.untaught(facts, recipe=taught.Recipe(n_layers=3, d_model=16, n_heads=2, d_mlp=8))
    subject = Subject("taught", model, facts, native=True)
    monkeypatch.setattr(protocol.removals, "subject", lambda *_, **__: subject)
    return Lab("toy", 0, tmp_path)


def test_remover_works_where_it_is_told(lab):
    def moved(**fields) -> set[str]:
        after = lab.removed("dinm", calibrated=False, steps=(1,), lr=1e-2, **fields).weights
        return {name for name, value in after.items() if not torch.equal(value, lab.base.weights[name])}

    first, usual = moved(where=None, layer=0), moved(layer=0)
    assert len(first) == len(usual) == 1
    assert "0" in next(iter(first)).split(".")
    assert usual == moved()  # the recipe says where, whatever the remover's own field says
    assert first != usual or moved(where=None, layer=1) != usual
    assert moved(where="everything") > first


def test_pretrained_model_has_no_twin(lab):
    with pytest.raises(ValueError, match="taught has no twin that never knew; only the taught toy has one"):
        _ = lab.never


def test_cosine_of_changes():
    x = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0])]
    assert protocol.cosine(x, [-3 * each for each in x]) == pytest.approx(-1)
    assert protocol.cosine(x, [torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.zeros(1)]) == 0
    assert math.isnan(protocol.cosine(x, [torch.zeros(2, 2), torch.zeros(1)]))


@pytest.mark.parametrize(("recipe", "times"), [("rmu", 1), ("npo", 2)])
def test_seed_counts_only_with_the_recipes_that_its_page_names(recipe, times, monkeypatch, tmp_path):
    measured = []

    def measure(lab: Lab) -> Iterator[Reading]:
        measured.append(lab.seed)
        yield Reading("base", 0.0)

    page = replace(protocol.paper_of("uds2026"), measure=measure)
    monkeypatch.setattr(protocol, "paper_of", lambda name: page)
    protocol.reproduce("uds2026", seeds=(0,), out=tmp_path)
    monkeypatch.setattr(protocol, "RECIPES", {"toy": {**protocol.RECIPES["toy"], recipe: {"lr": 1.0}}})
    protocol.reproduce("uds2026", seeds=(0,), out=tmp_path)
    assert len(measured) == times


def test_bad_calls_are_refused_before_any_work(made):
    measured, folder = made
    with pytest.raises(ValueError, match="has no scale 'real': numbers have no model"):
        protocol.reproduce("claims", scale="real", out=folder)
    with pytest.raises(ValueError, match="give at least one, and each once"):
        protocol.reproduce("claims", seeds=(1, 1), out=folder)
    assert measured == []


def test_unknown_paper_lists_the_known():
    with pytest.raises(ValueError, match=r"no reproduction is called 'x'; known: .*all"):
        protocol.paper_of("x")
