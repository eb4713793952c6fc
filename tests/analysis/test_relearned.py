"""Recovery of facts beyond what an attack teaches a twin, of scores whose shares are known."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from relearn_lens.analysis.relearned import relearned, saved
from relearn_lens.measure.answers import AnswerAccuracy
from relearn_lens.measure.asking import Asked
from relearn_lens.measure.course import FactsSnapshot, FactsTrajectory
from relearn_lens.models.training import Checkpoint
from relearn_lens.text import facts as made

FACTS = made.people(0, n=8, forget=4, never=0, animals=2, n_answers=8)
V, NEAR = "forget_held_out", "retain_near"


@dataclass
class Level:
    """Share of keys that answer right, at each place."""

    held_out: float
    near: float = 1.0


def scores(level, n=100, chance=0.05) -> AnswerAccuracy:
    right = np.zeros((2 * n, 2))
    right[: round(level.held_out * n), 0] = 1
    right[n : n + round(level.near * n), 1] = 1
    passages = np.zeros((2 * n, 2), dtype=np.int64)
    passages[:n, 0] = passages[n:, 1] = 1
    return AnswerAccuracy(right, chance * passages, passages, tuple(map(str, range(2 * n))), (V, NEAR))


def path(*held_out: float, base: float | None = None, seed: int = 0) -> FactsTrajectory:
    stages = {} if base is None else {"base": FactsSnapshot({"accuracy": scores(Level(base))})}
    for i, value in enumerate(held_out):
        at = None if i == 0 else Checkpoint(float(i), i, 0, 0.0)
        stages["removed" if i == 0 else str(i)] = FactsSnapshot({"accuracy": scores(Level(value))}, at)
    return FactsTrajectory(stages, Asked(FACTS, (), ()), seed=seed)


def test_what_the_twin_learns_is_taken_off_on_the_same_scale():
    attacked, twin = path(0.2, 0.5, 0.7, base=0.9), path(0.1, 0.1, 0.24)
    found = relearned([attacked], "accuracy", "2", never=[twin])
    assert found.damage.value == pytest.approx(0.7)
    assert found.brought is not None
    assert found.taught is not None
    assert found.recovered is not None
    assert found.brought.value == pytest.approx(0.5 / 0.7)
    assert found.taught.value == pytest.approx(0.14 / 0.7)
    assert found.recovered.value == pytest.approx((0.5 - 0.14) / 0.7)
    assert found.recovered.low < found.recovered.value < found.recovered.high
    assert "keys" in found.recovered.over
    assert "recovered" in str(found)


def test_a_twin_that_gains_as_much_leaves_nothing_recovered():
    found = relearned([path(0.1, 0.5, base=0.9)], "accuracy", "1", never=[path(0.1, 0.5)])
    assert found.recovered is not None
    assert found.recovered.value == 0
    assert not found.recovered.excludes(0)


def test_a_twin_that_the_attack_harms_lends_nothing():
    found = relearned([path(0.1, 0.5, base=0.9)], "accuracy", "1", never=[path(0.2, 0.0)])
    assert found.taught is not None
    assert found.brought is not None
    assert found.recovered is not None
    assert found.taught.value < 0
    assert found.recovered.value == found.brought.value == pytest.approx(0.5)


def test_without_a_twin_nothing_is_called_recovered():
    found = relearned([path(0.1, 0.5, base=0.9)], "accuracy", "1")
    assert found.brought is not None
    assert found.recovered is None
    assert "without a twin none of it is called recovered" in str(found)


def test_a_share_of_noise_is_refused():
    found = relearned([path(0.89, 0.9, base=0.9)], "accuracy", "1", never=[path(0.1, 0.1)])
    assert found.brought is found.recovered is None
    assert "within noise, so nothing can be recovered" in str(found)


def test_over_seeds_it_is_the_mean_over_seeds():
    attacked = [path(0.1, 0.5 + 0.02 * seed, base=0.9, seed=seed) for seed in range(3)]
    twins = [path(0.1, 0.2, seed=seed) for seed in range(3)]
    found = relearned(attacked, "accuracy", "1", never=twins)
    assert found.recovered is not None
    assert found.recovered.value == pytest.approx(np.mean([(0.4 + 0.02 * s - 0.1) / 0.8 for s in range(3)]))
    assert found.recovered.over == "3 seeds"


def test_savings_are_steps_of_the_twin_by_ours():
    ours, twin = path(0.0, 0.5, 1.0, base=1.0), path(0.0, 0.25, 0.5, 0.75, 1.0)
    ratio = saved([ours], [twin], "accuracy")[0.5]
    assert ratio is not None
    assert ratio.value == pytest.approx(2)
    assert saved([ours], [path(0.0, 0.1)], "accuracy")[0.5] is None


def test_what_does_not_fit_is_refused():
    attacked = path(0.1, 0.5, base=0.9)
    with pytest.raises(ValueError, match=r"a twin's path of the same seed beside each; got seeds \[0\] and \[1\]"):
        relearned([attacked], "accuracy", "1", never=[path(0.1, 0.5, seed=1)])
    with pytest.raises(ValueError, match=r"recovery needs the stages base, removed and 7, .* found no '7'"):
        relearned([attacked], "accuracy", "7")
    assert math.isclose(relearned([attacked], "accuracy", "1").damage.value, 0.8)
