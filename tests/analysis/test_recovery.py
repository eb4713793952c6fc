"""Made-up curves whose speeds are worked out by hand, and damage that there is no recovering from."""

import math

import numpy as np
import pytest

from relearn_lens.analysis import recovery
from relearn_lens.measure.tracking import Trajectory
from tests.analysis.test_story import FLAT, LABEL, curve, scores_of, trajectory


def test_recovery_by_hand():
    found = recovery.recovery([curve(0.8, 0.2, 0.5, 0.9)], LABEL, "1")
    assert found.share is not None
    assert found.share.value == found.share.low == found.share.high == pytest.approx(0.5)
    assert found.damage.value == pytest.approx(0.6)
    above = recovery.recovery([curve(0.8, 0.2, 0.5, 0.9)], LABEL, "2").share
    assert above is not None
    assert above.value == pytest.approx(7 / 6)


def test_recovery_is_the_mean_of_the_seeds():
    arms = [curve(0.8, 0.2, 0.5, seed=0), curve(0.9, 0.4, 0.5, seed=1), curve(0.8, 0.3, 0.8, seed=2)]
    found = recovery.recovery(arms, LABEL, "1")
    assert found.share is not None
    assert found.share.value == pytest.approx((0.5 + 0.2 + 1) / 3)
    assert found.share.over == found.damage.over == "3 seeds"


@pytest.mark.parametrize("pruned", [0.8, 0.85])
def test_recovery_is_refused_without_damage(pruned):
    assert recovery.recovery([curve(0.8, pruned, 0.8)], LABEL, "1").share is None


def test_recovery_is_refused_within_noise():
    rng = np.random.default_rng(0)
    made = [scores_of(0.7, n=40, noise=int(rng.integers(1000))) for _ in range(8)]
    base = max(made, key=lambda s: s.value(LABEL))
    pruned = min(made, key=lambda s: abs(s.value(LABEL) - base.value(LABEL) + 0.05))
    assert base.value(LABEL) > pruned.value(LABEL)
    arm = trajectory({"base": base, "pruned": pruned, "1": base}, FLAT)
    found = recovery.recovery([arm], LABEL, "1")
    assert not found.damage.excludes(0)
    assert found.share is None
    seeds = [curve(0.8, 0.7, 0.8), curve(0.8, 0.9, 0.8), curve(0.8, 0.75, 0.8)]
    assert recovery.recovery(seeds, LABEL, "1").share is None


def test_first_stage_at_by_hand():
    arm = curve(0.8, 0.2, 0.45, 0.55, 0.78)
    assert recovery.first_stage_at([arm], LABEL) == "2"
    assert recovery.first_stage_at([arm], LABEL, 0.4) == "1"
    assert recovery.first_stage_at([arm], LABEL, 0.99) is None
    assert recovery.first_stage_at([arm, curve(0.8, 0.2, 0.75, 0.8, 0.8)], LABEL) == "1"
    assert recovery.first_stage_at([curve(0.5, 0.5, 0.6)], LABEL) is None


def test_recovery_is_of_what_the_unpruned_arm_has_by_then():
    """Training on without pruning goes from 0.5 to 0.8, so a return to 0.5 is half of the way from 0.2 and not all."""
    arms = [curve(0.5, 0.2, 0.5, seed=k) for k in (0, 1)]
    unpruned = [curve(0.5, 0.5, 0.8, arm="unpruned", seed=k) for k in (1, 0)]  # paired by seed, whatever the order
    assert value(recovery.recovery(arms, LABEL, "1").share) == pytest.approx(1)
    assert value(recovery.recovery(arms, LABEL, "1", unpruned=unpruned).share) == pytest.approx(0.5)
    assert recovery.mean_share(arms[0], LABEL, unpruned[1]) == pytest.approx(0.5)
    area = recovery.speeds(arms, LABEL, unpruned=unpruned).area
    assert value(area) == pytest.approx(0.25)  # from 0 to a half in an epoch
    assert recovery.first_stage_at(arms, LABEL, 0.6) == "1"
    assert recovery.first_stage_at(arms, LABEL, 0.6, unpruned=unpruned) is None
    with pytest.raises(ValueError, match="at the same seeds and stages, found no seed 1; unpruned seeds: 0"):
        recovery.recovery(arms, LABEL, "1", unpruned=unpruned[1:])
    with pytest.raises(ValueError, match="found no stage '2' of seed 0"):
        recovery.speeds([curve(0.5, 0.2, 0.4, 0.5)], LABEL, unpruned=unpruned)


def test_half_of_a_loss_within_noise_is_never_back():
    """An arm that lost nothing would be said to have half of it back at its first stage."""
    arms = [curve(0.9, 0.895, 0.9, seed=0), curve(0.9, 0.905, 0.9, seed=1), curve(0.9, 0.898, 0.9, seed=2)]
    assert np.mean([arm["pruned"].scores.value(LABEL) for arm in arms]) < 0.9
    assert recovery.first_stage_at(arms, LABEL) is None


def test_retraining_stages_leave_out_base_and_pruned():
    assert recovery.retraining_stages(curve(1, 0, 0.5, 1)) == ("1", "2")


# --- how fast


def value(estimate) -> float:
    assert estimate is not None
    return estimate.value


def test_speeds_by_hand():
    # Targets of a base of 0.8: 0.4, 0.72, 0.76, 0.792. Stages: 0.2 at 0, 0.5 at 1, 0.75 at 2, 0.79 at 3; 200, 300, 400
    # tokens at the last three.
    found = recovery.speeds([curve(0.8, 0.2, 0.5, 0.75, 0.79)], LABEL)
    expected = {0.5: 2 / 3, 0.9: 1 + 0.22 / 0.25, 0.95: 2 + 0.01 / 0.04}
    for share, epochs in expected.items():
        assert value(found.reached[share].epochs) == pytest.approx(epochs)
        assert found.reached[share].seeds == 1
    assert value(found.reached[0.5].tokens) == pytest.approx(2 / 3 * 200)
    assert value(found.reached[0.9].tokens) == pytest.approx(200 + 0.88 * 100)
    never = found.reached[0.99]
    assert (never.epochs, never.tokens, never.seeds) == (None, None, 0)
    # Made good: 0, 0.5, 0.55 / 0.6, 0.59 / 0.6.
    assert value(found.area) == pytest.approx((0.25 + (0.5 + 0.55 / 0.6) / 2 + (0.55 + 0.59) / 1.2) / 3)
    assert found.damage.value == pytest.approx(0.6)


def test_speeds_of_an_arm_that_lost_little_start_at_once():
    found = recovery.speeds([curve(0.8, 0.5, 0.8)], LABEL, shares=(0.5, 1.0))
    assert value(found.reached[0.5].epochs) == 0
    assert value(found.reached[1.0].epochs) == 1


def test_speeds_count_the_first_time_only():
    found = recovery.speeds([curve(0.8, 0.0, 0.8, 0.1, 0.8)], LABEL, shares=(0.5,))
    assert value(found.reached[0.5].epochs) == pytest.approx(0.5)


def test_speeds_over_seeds():
    arms = [curve(0.8, 0.0, 0.4, 0.8, seed=0), curve(0.8, 0.0, 0.2, 0.8, seed=1)]
    found = recovery.speeds(arms, LABEL, shares=(0.5, 1.0))
    half = found.reached[0.5].epochs
    assert half is not None
    assert half.value == pytest.approx((1 + 4 / 3) / 2)
    assert half.over == "2 seeds"
    assert value(found.area) == pytest.approx((0.5 + (0.125 + 0.625) / 2) / 2)
    slow = recovery.speeds([*arms, curve(0.8, 0.0, 0.1, 0.2, seed=2)], LABEL, shares=(0.5,)).reached[0.5]
    assert (slow.epochs, slow.seeds) == (None, 2)


def test_speeds_of_one_seed_have_an_interval_over_sentences():
    base, low, high = (scores_of(v, n=60, noise=3) for v in (0.9, 0.2, 0.85))
    arm = trajectory({"base": base, "pruned": low, "1": high}, FLAT)
    found = recovery.speeds([arm], LABEL, shares=(0.5, 0.97), draws=300)
    half = found.reached[0.5].epochs
    assert half is not None
    assert half.low < half.value < half.high < 1
    assert half.over == "60 sentences"
    most = found.reached[0.97].epochs
    assert most is not None
    assert most.high == math.inf  # with other sentences it might not have got there


def test_area_is_refused_within_noise():
    found = recovery.speeds([curve(0.8, 0.8, 0.8)], LABEL)
    assert found.area is None
    assert found.damage.value == 0


def test_speeds_refuse_what_is_no_run_of_training():
    with pytest.raises(ValueError, match="speeds needs at least one trajectory, got none"):
        recovery.speeds([], LABEL)
    no_base = trajectory({"pruned": 0.1, "1": 0.8}, FLAT)
    with pytest.raises(ValueError, match="needs the stages base, pruned, and training after them, found pruned, 1"):
        recovery.speeds([no_base], LABEL)
    with pytest.raises(ValueError, match="found base, pruned"):
        recovery.speeds([trajectory({"base": 0.9, "pruned": 0.1}, FLAT)], LABEL)
    with pytest.raises(ValueError, match="when stage 'later' was: its snapshot has no checkpoint"):
        recovery.speeds([trajectory({"base": 0.9, "pruned": 0.1, "later": 0.5}, FLAT)], LABEL)


# --- savings


def learning(*f1: float, seed: int = 0) -> Trajectory:
    """A model that starts from nothing: its first stage is before training."""
    names = ["pruned", *(str(k + 1) for k in range(len(f1) - 1))]
    return trajectory(dict(zip(names, f1, strict=True)), FLAT, seed=seed)


def test_savings_by_hand():
    # To 0.4 it takes 2/3 of an epoch to relearn and 2 to learn; to 0.72 it takes 1.88, learning never gets there.
    found = recovery.savings([curve(0.8, 0.2, 0.5, 0.75)], [learning(0.0, 0.1, 0.4)], LABEL)
    assert value(found.saved[0.5]) == pytest.approx(1 - (2 / 3) / 2)
    assert [found.saved[s] for s in (0.9, 0.95, 0.99)] == [None] * 3
    relearning, anew = (0.35 + 0.625) / 2, (0.05 + 0.25) / 2
    assert found.area.value == pytest.approx(relearning - anew)


def test_savings_are_negative_where_relearning_is_slower():
    found = recovery.savings([curve(0.8, 0.0, 0.2, 0.4)], [learning(0.0, 0.4, 0.8)], LABEL, shares=(0.5,))
    assert value(found.saved[0.5]) == pytest.approx(-1)
    assert found.area.value == pytest.approx(-0.2)


def test_savings_of_a_fresh_model_that_is_there_at_once_are_none():
    found = recovery.savings([curve(0.8, 0.0, 0.8)], [learning(0.5, 0.8)], LABEL, shares=(0.5,))
    assert found.saved[0.5] is None


def test_savings_compare_areas_over_the_epochs_that_both_have():
    # One epoch and a half of the longer curve: 0, 0.4, 0.6.
    long = curve(0.8, 0.0, 0.4, 0.8)
    short = trajectory({"pruned": 0.0, "1.5": 0.3}, FLAT)
    found = recovery.savings([long], [short], LABEL)
    assert found.area.value == pytest.approx((0.2 + 0.5 / 2) / 1.5 - 0.15)


def test_savings_over_seeds_pair_them():
    relearn = [curve(0.8, 0.0, 0.4, 0.8, seed=0), curve(0.8, 0.0, 0.8, 0.8, seed=1)]
    fresh = [learning(0.0, 0.2, 0.4, seed=0), learning(0.0, 0.4, 0.8, seed=1)]
    found = recovery.savings(relearn, fresh, LABEL, shares=(0.5,))
    assert value(found.saved[0.5]) == pytest.approx((1 - 1 / 2 + 1 - 0.5 / 1) / 2)
    assert str(found.saved[0.5]) == "0.500 [0.500, 0.500]"
    assert found.area.over == "2 seeds"
    with pytest.raises(ValueError, match="savings pairs seeds, got 2 relearning and 1 fresh runs"):
        recovery.savings(relearn, fresh[:1], LABEL)


def test_savings_need_a_base_and_training():
    with pytest.raises(ValueError, match="savings needs the stages base, and training after them, found pruned, 1"):
        recovery.savings([learning(0.1, 0.2)], [learning(0.1, 0.2)], LABEL)
    with pytest.raises(ValueError, match="savings needs the stages and training after them, found pruned"):
        recovery.savings([curve(0.8, 0.1, 0.2)], [learning(0.1)], LABEL)


def test_savings_of_a_label_without_spans_are_refused():
    none = scores_of(0.5)
    none = type(none)({}, {}, {}, 0 * none.counts, none.labels)
    empty = trajectory({"base": none, "pruned": none, "1": none}, FLAT)
    with pytest.raises(ValueError, match="has no score at some stage"):
        recovery.savings([empty], [empty], LABEL)
