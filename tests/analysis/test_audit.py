"""What an audit may say: the rule, bar by bar, and what it never says."""

import inspect
from dataclasses import replace

import pytest

from relearn_lens.analysis import audit as module
from relearn_lens.analysis.audit import KINDS, Evidence, decide

GONE = Evidence(
    answers=0.05, chance=0.04, retained=0.98, inside=0.06, inside_chance=0.05, back=0.02, original_answers=1.0,
    original_inside=1.0, twin_answers=0.05, twin_inside=0.05, twin_back=0.0, moved=1.4, alike=0.02,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "never knew"),
        ({"answers": 0.9}, "still answers"),
        ({"without_prompt": 0.95}, "behind the prompt"),
        ({"without_prompt": 0.95, "answers": 0.9}, "still answers"),
        ({"zeroed": 0.05}, "cut"),
        ({"alike": 0.8}, "led astray"),
        ({"moved": 0.05}, "trained away"),
        ({"inside": 0.4}, "trained away"),
        ({"back": 0.3}, "trained away"),
        ({"back": 0.3, "twin_back": 0.28}, "never knew"),
        ({"inside": 0.4, "twin_inside": 0.38}, "never knew"),
    ],
)
def test_each_kind_by_what_was_measured(change, kind):
    assert decide(replace(GONE, **change)).kind == kind


def test_never_knew_is_said_beside_a_twin_alone():
    alone = replace(GONE, twin_answers=None, twin_inside=None, twin_back=None)
    assert decide(alone).kind == "undecided"
    assert any(line.startswith("--never: ") for line in decide(alone).missing)
    # Without a twin what relearning brings may be taught: it decides nothing.
    assert decide(replace(alone, back=0.9)).kind == "undecided"
    # Without an original, a model that is read no better than the twin still never knew.
    assert decide(replace(GONE, moved=None, original_answers=None)).kind == "never knew"
    assert any(line.startswith("--original: ") for line in decide(replace(GONE, original_answers=None)).missing)


def test_nothing_is_ever_called_erased():
    said = [decide(replace(GONE, **change)) for change in ({}, {"moved": None}, {"inside": None}, {"zeroed": 0.1})]
    assert not any("erased" in f"{verdict.kind} {verdict.why} {verdict.missing}" for verdict in said)
    assert "erased" not in "".join(KINDS)
    assert "never knew" in KINDS
    assert "erased" in inspect.getdoc(module)


def test_what_is_reached_is_the_most_that_anything_gets_less_what_the_twin_gains():
    assert GONE.reached == pytest.approx(0.07)
    assert replace(GONE, back=0.5, twin_back=0.2).reached == pytest.approx(0.35)
    assert replace(GONE, quantised=0.6).reached == pytest.approx(0.6)
    assert replace(GONE, without_prompt=0.9).reached == pytest.approx(0.9)
    assert replace(GONE, twin_back=None, back=0.5, twin_answers=None).reached == pytest.approx(0.55)
