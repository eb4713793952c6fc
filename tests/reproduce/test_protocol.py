"""Claims, verdicts and the way from seeds to them."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

import relearn_lens
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.reproduce import protocol
from relearn_lens.reproduce.claims import CLAIMS, Claim, verdict_of
from relearn_lens.reproduce.protocol import Lab, Paper, Reading

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
    assert set(protocol.PAPERS) <= set(CLAIMS)


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
    paper = Paper("claims", "made", "ours", "numbers", "all", measure)
    monkeypatch.setattr(protocol, "paper_of", lambda name: paper)
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
    assert "reproduced" in protocol.table([again])


def test_bad_calls_are_refused_before_any_work(made):
    measured, folder = made
    with pytest.raises(ValueError, match="has no scale 'real'; it has toy"):
        protocol.reproduce("claims", scale="real", out=folder)
    with pytest.raises(ValueError, match="give at least one, and each once"):
        protocol.reproduce("claims", seeds=(1, 1), out=folder)
    assert measured == []


def test_unknown_paper_lists_the_known():
    with pytest.raises(ValueError, match=r"no reproduction is called 'x'; known: .*all"):
        protocol.paper_of("x")
