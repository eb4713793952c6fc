"""Removers against ways back, on numbers made by hand: shares, twin, choice of rate and checkpoint, refusals, tau."""

import math
from typing import Any

import numpy as np
import pytest

from relearn_lens.analysis import matrix
from relearn_lens.analysis.matrix import NEVER, Cell, Course, Drawn, Results

KEYS, EACH = 40, 10


def sums(share, keys=KEYS):
    """`share` of the passages of every key answered right."""
    return np.stack([np.full(keys, share * EACH), np.full(keys, float(EACH))], 1)


def course(steps, held, kept):
    return Course(tuple(steps), np.stack([sums(x) for x in held]), np.stack([sums(x) for x in kept]))


def cell(row, seed, left, attacks, base=1.0, removed=None):
    removed = left if removed is None else removed
    return Cell(row, seed, sums(base), sums(removed), sums(left), 1.0, 1.0, 1.0, 1.0, attacks)


def results(rows, twin=None, seeds=(1, 2, 3), columns=("relearn",), **how):
    """The same in every seed; `rows` are {row: (left, {column: {rate: course}})}."""
    cells = {
        (row, seed): cell(row, seed, left, attacks) for row, (left, attacks) in rows.items() for seed in (0, *seeds)
    }
    if twin:
        cells |= {(NEVER, seed): cell(NEVER, seed, twin[0], twin[1]) for seed in (0, *seeds)}
    return Results(cells, tuple(rows), columns, seeds, 0, draws=200, twin=twin is not None, **how)


STEPS = (0, 1, 2)
TWIN = (
    0.1,
    {"relearn": {"a": course(STEPS, (0.1, 0.1, 0.2), (1, 1, 1)), "b": course(STEPS, (0.1, 0.1, 0.1), (1, 1, 1))}},
)


def test_recovery_is_what_came_back_of_what_was_removed_less_the_twins_gain():
    row = (
        0.2,
        {"relearn": {"a": course(STEPS, (0.2, 0.4, 0.6), (1, 1, 1)), "b": course(STEPS, (0.2, 0.2, 0.2), (1, 1, 1))}},
    )
    entry: Any = matrix.entry(results({"x": row}, TWIN), "x", "relearn")
    assert (entry.rate, entry.steps) == ("a", (2, 2, 2))
    assert entry.recovery.value == pytest.approx((0.6 - 0.2) / 0.8 - (0.2 - 0.1) / 0.8)
    assert entry.twin.value == pytest.approx(0.1 / 0.8)
    assert entry.left.value == pytest.approx(0.6)
    alone: Any = matrix.entry(results({"x": row}), "x", "relearn")
    assert alone.twin is None
    assert alone.recovery.value == pytest.approx(0.5)


def test_a_twin_that_loses_is_not_counted_for_the_attack():
    row = (0.2, {"relearn": {"a": course(STEPS, (0.2, 0.4, 0.6), (1, 1, 1))}})
    twin = (0.1, {"relearn": {"a": course(STEPS, (0.1, 0.0, 0.0), (1, 1, 1))}})
    entry: Any = matrix.entry(results({"x": row}, twin), "x", "relearn")
    assert entry.twin.value == pytest.approx(-0.1 / 0.8)
    assert entry.recovery.value == pytest.approx(0.5)


def test_what_broke_the_model_does_not_count():
    row = (0.2, {"relearn": {"a": course(STEPS, (0.2, 0.4, 0.9), (1, 0.95, 0.85))}})
    entry: Any = matrix.entry(results({"x": row}), "x", "relearn")
    assert entry.steps == (1, 1, 1)
    assert entry.recovery.value == pytest.approx(0.25)
    # Utility is relative to the removed model, not to 1.
    row = (0.2, {"relearn": {"a": course(STEPS, (0.2, 0.4, 0.9), (0.5, 0.5, 0.46))}})
    assert matrix.entry(results({"x": row}), "x", "relearn").steps == (2, 2, 2)


def test_none_passes_is_said():
    row = (
        0.2,
        {
            "relearn": {
                "a": course(STEPS, (0.2, 0.9, 0.9), (1, 0.5, 0.5)),
                "b": course(STEPS, (0.2, 0.9, 0.9), (1, 0.5, 0.5)),
            }
        },
    )
    found = results({"x": row})
    entry: Any = matrix.entry(found, "x", "relearn")
    assert entry.recovery is None
    assert entry.why == "no checkpoint is usable at any rate"
    assert matrix.column_of(found, "x") is None


def test_the_rate_is_chosen_on_its_own_seed_and_reported_on_the_others():
    def attacks(good, bad):
        return {
            "relearn": {"a": course(STEPS, (0.2, 0.2, good), (1, 1, 1)), "b": course(STEPS, (0.2, 0.2, bad), (1, 1, 1))}
        }

    found = results({"x": (0.2, attacks(0.9, 0.3))})
    flipped = {**found.cells, ("x", 0): cell("x", 0, 0.2, attacks(0.3, 0.9))}
    entry: Any = matrix.entry(
        Results(flipped, ("x",), ("relearn",), (1, 2, 3), 0, draws=200, twin=False), "x", "relearn"
    )
    assert entry.rate == "b"
    assert entry.left.value == pytest.approx(0.3)


def test_a_share_of_nothing_removed_is_refused():
    row = (1.0, {"relearn": {"a": course(STEPS, (1, 1, 1), (1, 1, 1))}})
    entry: Any = matrix.entry(results({"x": row}, TWIN), "x", "relearn")
    assert entry.recovery is None
    assert entry.why == "nothing is removed beyond noise"
    assert matrix.verdict(entry) == "undecided"


@pytest.mark.parametrize(
    ("back", "says"), [(0.9, "back"), (0.5, "partly back"), (0.22, "partly back"), (0.2, "not back by these attacks")]
)
def test_verdicts_never_say_that_something_is_erased(back, says):
    row = (0.2, {"relearn": {"a": course(STEPS, (0.2, 0.2, back), (1, 1, 1))}})
    assert matrix.verdict(matrix.entry(results({"x": row}), "x", "relearn")) == says


def test_the_strongest_attack_is_chosen_among_columns():
    row = (0.2, {"weak": {"": course((0, 1), (0.2, 0.3), (1, 1))}, "strong": {"": course((0, 1), (0.2, 0.8), (1, 1))}})
    assert matrix.column_of(results({"x": row}, columns=("weak", "strong")), "x") == "strong"


def test_pairs_are_paired_and_holm_corrected():
    rows = {
        name: (0.2, {"relearn": {"a": course(STEPS, (0.2, 0.2, back), (1, 1, 1))}})
        for name, back in (("x", 0.9), ("y", 0.3), ("z", 0.3))
    }
    each = {(p.one, p.other): p for p in matrix.pairs(results(rows))}
    assert each["x", "y"].difference.value == pytest.approx(0.75)
    assert each["x", "y"].p_holm == pytest.approx(3 * 2 / 201)
    assert each["y", "z"].p_holm == 1


def test_ranks_that_turn_round_have_a_tau_of_minus_one():
    cells = {}
    for seed in (0, 1, 2):
        for row, before, after in (("x", 0.1, 0.9), ("y", 0.2, 0.5), ("z", 0.3, 0.2)):
            cells[row, seed] = cell(row, seed, after, {}, removed=before)
    found: Any = matrix.ranking(Results(cells, ("x", "y", "z"), (), (1, 2), 0, draws=200, twin=False))
    assert found.tau.value == pytest.approx(-1)
    assert found.tau.interval == pytest.approx((-1, -1))
    assert found.before == pytest.approx({"x": 0.1, "y": 0.2, "z": 0.3})
    two = Results({k: c for k, c in cells.items() if k[0] != "z"}, ("x", "y"), (), (1, 2), 0, draws=200, twin=False)
    assert matrix.ranking(two) is None


def test_intervals_cover_a_known_mean_over_keys_and_seeds():
    """Of 200 sets of three seeds with spread between seeds and between keys, 95 % intervals hold the truth in 85 to 99
    of 100: three seeds are few, and Student's t would be three times as wide."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        each = []
        for seed in range(3):
            p = np.clip(0.5 + 0.05 * rng.normal(), 0, 1)
            right = rng.binomial(EACH, np.clip(p + 0.1 * rng.normal(size=KEYS), 0, 1))
            each.append(matrix.drawn(np.stack([right, np.full(KEYS, EACH)], 1).astype(float), seed, 400))
        found = matrix.over_keys_and_seeds(each, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert 170 <= hits <= 198


def test_one_seed_has_the_interval_of_its_keys():
    one = matrix.drawn(np.stack([np.arange(KEYS) % (EACH + 1), np.full(KEYS, EACH)], 1).astype(float), 0, 1000)
    found = matrix.over_keys_and_seeds([one])
    low, high = np.quantile(one.draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found.over == "keys within 1 seed"
    with pytest.raises(ValueError, match="at least one seed"):
        matrix.over_keys_and_seeds([])


def test_a_course_has_sums_for_every_checkpoint():
    with pytest.raises(ValueError, match="3 steps and 2 checkpoints"):
        course((0, 1, 2), (0.1, 0.1), (1, 1))


def test_attacks_that_are_one_have_one_component():
    rng = np.random.default_rng(0)
    cells = {}
    for seed in (0, 1, 2):
        for row in ("x", "y", "z"):
            x = float(rng.uniform(0.2, 0.9))
            attacks = {
                name: {"": course((0, 1), (0.1, x * k), (1, 1))} for name, k in (("a", 1), ("b", 0.5), ("c", 0.8))
            }
            cells[row, seed] = cell(row, seed, 0.1, attacks)
    found: Any = matrix.components(Results(cells, ("x", "y", "z"), ("a", "b", "c"), (1, 2), 0, draws=100, twin=False))
    assert found.explained[0] == pytest.approx(1, abs=1e-9)
    assert found.attacks == ("a", "b", "c")
    assert len(found.models) == 9
    two = Results(cells, ("x", "y", "z"), ("a", "b"), (1, 2), 0, draws=100, twin=False)
    assert matrix.components(two) is None


def test_a_p_value_is_never_nothing():
    sure = matrix.over_keys_and_seeds([Drawn(1.0, np.ones(99)), Drawn(1.0, np.ones(99))])
    assert sure.p == pytest.approx(0.02)
    assert math.isclose(sure.low, 1.0)
