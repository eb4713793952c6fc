"""Intervals against scipy's, and against what they promise: coverage, and p-values that are uniform under the null."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from relearn_lens.analysis import intervals
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.measure import bootstrap
from relearn_lens.measure.evaluation import SpanScores
from tests.analysis.test_story import LABEL, scores_of


def spans(n: int, share: float | int, seed: int = 0) -> SpanScores:
    """Scores of `n` sentences that have 0 to some spans each, of which so many are found, and some made up."""
    rng = np.random.default_rng(seed)
    true = rng.poisson(1.5, (n, 2))
    right = rng.binomial(true, share)
    return SpanScores({}, {}, {}, np.stack([right, right + rng.poisson(0.3, (n, 2)), true], -1), ("person", "place"))


def scipys(of, data, drawn: np.ndarray, level: float | int = 0.95) -> tuple[float, float]:
    """scipy's BCa interval from these very draws; `data` is one sample, or a tuple of groups drawn by themselves."""
    found = stats.bootstrap(
        data,
        of,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn),
        confidence_level=level,
        method="BCa",
        vectorized=True,
        axis=-1,
    )
    return found.confidence_interval.low, found.confidence_interval.high


def within(hits: int, n: int, share: float | int) -> bool:
    """Whether so many hits of n are what chance gives at this share, three standard deviations around it."""
    return abs(hits - share * n) <= 3 * math.sqrt(share * (1 - share) * n)


# --- the number itself


def test_excludes_counts_the_ends_in():
    estimate = Estimate(0.5, 0.25, 0.75, "")
    assert [estimate.excludes(x) for x in (0.2, 0.25, 0.5, 0.75, 0.8)] == [True, False, False, False, True]
    assert str(estimate) == "0.500 [0.250, 0.750]"
    assert estimate.interval == (0.25, 0.75)


def test_no_interval_excludes_nothing():
    estimate = Estimate(0.5, math.nan, math.nan, "")
    assert not estimate.excludes(0)
    assert estimate.interval is None
    assert str(estimate) == "0.500"


# --- sentences


@pytest.mark.parametrize("share", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_over_sentences_is_scipys_bca(share, level):
    scores = spans(80, share)
    counts = scores.counts[:, 1]

    def f1(index, axis=-1):
        right, predicted, true = np.moveaxis(counts[np.asarray(index, dtype=int)].sum(-2), -1, 0)
        return 2 * right / (predicted + true)

    index = np.random.default_rng(3).integers(80, size=(700, 80))  # the draws of seed 3
    found = intervals.over_sentences(np.asarray, LABEL, scores, level=level, draws=700, seed=3)
    assert (found.low, found.high) == pytest.approx(scipys(f1, (np.arange(80),), f1(index), level))
    assert found.value == scores.value(LABEL)
    assert (found.over, found.n, found.p) == ("80 sentences", 80, None)


def test_over_sentences_of_a_difference_is_paired():
    one, other = spans(60, 0.8, 1), spans(60, 0.8, 1)
    same = intervals.over_sentences(np.subtract, LABEL, one, other)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert same.over == "60 sentences (percentile)"  # nothing varies, so there is no BCa
    # The same errors and one more in every tenth sentence.
    counts = one.counts.copy()
    counts[::10, 1, 1] += 1
    worse = SpanScores({}, {}, {}, counts, one.labels)
    gap = intervals.over_sentences(np.subtract, LABEL, one, worse)
    alone = intervals.over_sentences(np.asarray, LABEL, one)
    assert gap.excludes(0)
    assert gap.high - gap.low < (alone.high - alone.low) / 2


def test_over_sentences_refuses_other_sentences():
    with pytest.raises(ValueError, match=r"same sentences, got \[20, 30\] sentences"):
        intervals.over_sentences(np.subtract, LABEL, scores_of(1), scores_of(1, n=30))


def test_over_sentences_without_bca_is_percentile_and_says_so():
    constant = intervals.over_sentences(np.asarray, LABEL, scores_of(0.6))
    assert (constant.value, constant.low, constant.high) == pytest.approx((0.6, 0.6, 0.6))
    assert constant.over == "20 sentences (percentile)"
    # One sentence of ten has all the spans: draws without it have no F1.
    counts = np.zeros((10, 2, 3), dtype=np.int64)
    counts[0] = [1, 2, 2]
    rare = intervals.over_sentences(np.asarray, LABEL, SpanScores({}, {}, {}, counts, ("person", "place")))
    assert (rare.low, rare.high) == (0.5, 0.5)
    lost = int(rare.over.split("; ")[1].split()[0])
    assert within(lost, 1000, 0.9**10)
    none = intervals.over_sentences(np.asarray, LABEL, SpanScores({}, {}, {}, 0 * counts, ("person", "place")))
    assert math.isnan(none.value)
    assert none.interval is None
    assert "1000 of 1000 draws undefined" in none.over


def test_over_sentences_with_infinite_draws_has_an_infinite_end():
    scores = spans(30, 0.5)
    middle = scores.value(LABEL)
    found = intervals.over_sentences(lambda f: np.where(f < middle - 0.1, np.inf, 1.0), LABEL, scores)
    assert (found.value, found.low, found.high) == (1, 1, math.inf)


def test_over_sentences_moves_no_global_generator():
    state, torch_state = repr(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    first = intervals.over_sentences(np.asarray, LABEL, spans(40, 0.7), seed=5)
    bootstrap.weights.cache_clear()
    assert intervals.over_sentences(np.asarray, LABEL, spans(40, 0.7), seed=5) == first
    assert intervals.over_sentences(np.asarray, LABEL, spans(40, 0.7), seed=6) != first
    intervals.over_neurons(lambda x: x.mean(-1), np.arange(9.0))
    intervals.paired([1, 2, 3], [0, 0, 0])
    assert repr(np.random.get_state()) == state  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_over_sentences_takes_milliseconds():
    columns = [spans(300, 0.8, k) for k in range(3)]
    intervals.over_sentences(np.subtract, LABEL, *columns[:2])
    start = time.perf_counter()
    for _ in range(20):
        intervals.over_sentences(lambda b, p, s: (s - p) / (b - p + 2), LABEL, *columns)
    assert (time.perf_counter() - start) / 20 < 0.03


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_bca_of_f1_covers_as_promised(share):
    # 1.5 true spans, of which so many are found, and 0.3 made up per sentence.
    truth = 2 * 1.5 * share / (1.5 + 1.5 * share + 0.3)
    found = [intervals.over_sentences(np.asarray, LABEL, spans(120, share, k)) for k in range(400)]
    assert within(sum(not f.excludes(truth) for f in found), 400, 0.95)


# --- neurons


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (stats.rankdata(v, axis=-1) for v in (x, y))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def test_over_neurons_within_layers_is_scipys_bca_of_several_samples():
    rng = np.random.default_rng(0)
    sizes = (12, 20, 7)
    mass = rng.exponential(size=sum(sizes))
    layer = np.repeat([0, 1, 2], sizes)

    def centre(mass, layer):
        return (mass * layer / 2).sum(-1) / mass.sum(-1)

    rng = np.random.default_rng(4)
    starts = (0, 12, 32)
    index = np.concatenate([s + rng.integers(n, size=(600, n)) for s, n in zip(starts, sizes, strict=True)], axis=1)

    def of(*groups, axis=-1):
        masses = np.concatenate(groups, axis=-1)
        return centre(masses, np.repeat([0, 1, 2], [g.shape[-1] for g in groups]))

    expected = scipys(of, tuple(np.split(mass, [12, 32])), centre(mass[index], layer[index]))
    shuffled = np.random.default_rng(1).permutation(39)
    for order in (np.arange(39), shuffled[np.argsort(layer[shuffled], kind="stable")]):
        found = intervals.over_neurons(centre, mass[order], layer[order], groups=layer[order], draws=600, seed=4)
        assert found.value == pytest.approx(centre(mass, layer))
        if (order == np.arange(39)).all():
            assert (found.low, found.high) == pytest.approx(expected)
    assert found.over == "39 neurons"

    weighted = intervals.over_neurons(
        lambda w, mass, layer: (w * mass) @ layer / 2 / (w @ mass),
        torch.from_numpy(mass),
        layer,
        groups=torch.from_numpy(layer),
        weighted=True,
        draws=600,
        seed=4,
    )
    assert (weighted.low, weighted.high) == pytest.approx(expected)


def test_over_neurons_of_one_sample_is_scipys_bca():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    index = np.random.default_rng(0).integers(50, size=(1000, 50))
    found = intervals.over_neurons(spearman, x, y)
    expected = scipys(
        lambda i, axis=-1: spearman(x[i.astype(int)], y[i.astype(int)]), (np.arange(50),), spearman(x[index], y[index])
    )
    assert found.value == pytest.approx(stats.spearmanr(x, y)[0])
    assert (found.low, found.high) == pytest.approx(expected)


def test_over_neurons_of_auroc():
    rng = np.random.default_rng(0)
    heir = np.arange(60) < 20
    x = rng.normal(size=60) + heir

    def auroc(x, heir):
        return np.array([roc_auc_score(h, v) for v, h in zip(x, heir, strict=True)])

    found = intervals.over_neurons(auroc, x, heir, groups=heir, draws=200)
    assert found.value == pytest.approx(roc_auc_score(heir, x))
    assert 0 < found.low < found.value < found.high < 1


def test_over_neurons_keeps_the_size_of_every_group():
    layer = np.repeat([0, 1, 2], [3, 5, 1])
    found = intervals.over_neurons(lambda g: (g == 1).mean(-1), layer, groups=layer)
    assert (found.value, found.low, found.high) == pytest.approx((5 / 9, 5 / 9, 5 / 9))
    loose = intervals.over_neurons(lambda g: (g == 1).mean(-1), layer)
    assert loose.low < 5 / 9 < loose.high


def test_over_neurons_of_many_is_percentile_and_says_so():
    x = np.random.default_rng(0).normal(size=intervals.JACKKNIFED + 1)
    found = intervals.over_neurons(lambda x: x.mean(-1), x, draws=300)
    index = np.concatenate([np.random.default_rng(0).integers(len(x), size=(300, len(x)))])
    assert (found.low, found.high) == pytest.approx(np.quantile(x[index].mean(1), [0.025, 0.975]))
    assert found.over == f"{len(x)} neurons (percentile)"


def test_over_neurons_refuses_columns_that_do_not_fit():
    for columns in ((np.zeros(3), np.zeros(4)), (np.zeros((2, 2)),), (np.zeros(0),), ()):
        with pytest.raises(ValueError, match="one number per neuron, got shapes"):
            intervals.over_neurons(lambda *c: c[0].sum(-1), *columns)
    with pytest.raises(ValueError, match=r"got shapes \[\(3,\), \(2,\)\]"):
        intervals.over_neurons(lambda x: x.sum(-1), np.zeros(3), groups=np.zeros(2))


def test_bca_of_a_rank_correlation_covers_as_promised():
    truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a normal pair with Pearson's 0.6
    hits = 0
    for k in range(200):
        x, y = np.random.default_rng(k).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=80).T
        hits += not intervals.over_neurons(spearman, x, y, draws=300).excludes(truth)
    assert within(hits, 200, 0.95)


# --- seeds


def test_over_seeds_is_students_t():
    found = intervals.over_seeds([0.5, 0.7, 0.9])
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=0.2 / math.sqrt(3))
    assert (found.value, found.low, found.high) == pytest.approx((0.7, low, high))
    assert (found.over, found.n) == ("3 seeds", 3)
    two = intervals.over_seeds(np.array([0.5, 0.7]), level=0.9)
    assert two.high - two.value == pytest.approx(6.3138 * 0.1, rel=1e-4)  # t(0.95, 1) times sd / sqrt(2)


def test_over_seeds_of_one_has_no_interval():
    found = intervals.over_seeds([0.5])
    assert (found.value, found.interval, found.over) == (0.5, None, "one training seed: no interval over training")
    with pytest.raises(ValueError, match="at least one value, got none"):
        intervals.over_seeds([])


def test_over_seeds_with_an_undefined_seed_has_no_interval():
    found = intervals.over_seeds([0.5, math.nan, 0.6])
    assert math.isnan(found.value)
    assert found.interval is None
    assert found.over == "3 seeds, 1 undefined"


def test_over_seeds_covers_as_promised():
    found = [intervals.over_seeds(np.random.default_rng(k).normal(0.3, 2, 4)) for k in range(400)]
    assert within(sum(not f.excludes(0.3) for f in found), 400, 0.95)


def test_paired_by_hand():
    found = intervals.paired([3, 5, 4], [1, 2, 3])
    low, high = stats.t.interval(0.95, 2, loc=2, scale=1 / math.sqrt(3))
    assert (found.value, found.low, found.high) == pytest.approx((2, low, high))
    assert found.p == 2 / 8  # all three have one sign: that or its mirror of the 8 flips
    # Differences 3, 1, -1: of 8 flips, |sum| is at least 3 in 5, 3, 3, 1 and their mirrors but 1.
    assert intervals.paired([3, 1, 0], [0, 0, 1]).p == 6 / 8
    assert intervals.paired([1, 1], [1, 1]).p == 1


def test_paired_of_one_seed_has_neither_interval_nor_p():
    found = intervals.paired([3], [1])
    assert (found.value, found.interval, found.p) == (2, None, None)
    with pytest.raises(ValueError, match="same seeds on both sides, got 3 and 2"):
        intervals.paired([1, 2, 3], [1, 2])


def test_paired_flips_at_random_where_there_are_too_many():
    gap = np.random.default_rng(0).normal(0.3, 1, 20)
    found = intervals.paired(gap, np.zeros(20))
    assert found.p == pytest.approx(stats.ttest_1samp(gap, 0)[1], abs=0.03)
    assert found == intervals.paired(gap, np.zeros(20))


def test_sign_flips_are_uniform_under_the_null():
    p = np.array([intervals.paired(np.random.default_rng(k).standard_t(3, 8), np.zeros(8)).p for k in range(400)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert within(int((p <= 0.1).sum()), 400, 0.1)


# --- several comparisons


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04: never below the one before it.
    assert intervals.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert intervals.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert intervals.holm([0.2]) == [0.2]
    assert intervals.holm([]) == []


def test_holm_keeps_the_level_and_is_no_weaker_than_bonferroni():
    rng = np.random.default_rng(0)
    p = rng.random((400, 5))
    assert within(sum(min(intervals.holm(row)) <= 0.05 for row in p), 400, 1 - (1 - 0.01) ** 5)
    for row in p[:50]:
        assert (np.array(intervals.holm(row)) <= np.minimum(row * 5, 1) + 1e-12).all()


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match="within 0 and 1, got"):
        intervals.holm([0.5, math.nan])


def test_bonferroni_by_hand():
    assert intervals.bonferroni(0.95, 5) == pytest.approx(0.99)
    assert intervals.bonferroni(0.9, 1) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="level must be between 0 and 1 and n at least 1, got level 95 and n 2"):
        intervals.bonferroni(95, 2)


# --- F1 scores of seeds


def test_estimate_over_seeds_is_students_t():
    found = intervals.estimate(np.asarray, LABEL, [scores_of(v) for v in (0.5, 0.7, 0.9)])
    assert found == intervals.over_seeds([0.5, 0.7, 0.9])
    seeds = [scores_of(v) for v in (0.2, 0.5, 0.9)], [scores_of(v) for v in (0.1, 0.4, 0.8)]
    paired = intervals.estimate(np.subtract, LABEL, *seeds)
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1), abs=1e-9)


def test_estimate_of_one_seed_is_over_sentences():
    scores = scores_of(0.6, n=50, noise=1)
    found = intervals.estimate(np.asarray, LABEL, [scores], draws=500, level=0.9, seed=2)
    assert found == intervals.over_sentences(np.asarray, LABEL, scores, draws=500, level=0.9, seed=2)
    assert found.over == "50 sentences"
    # BCa and percentile differ, but not by much here.
    assert (found.low, found.high) == pytest.approx(scores.interval(LABEL, n=500, level=0.9, seed=2), abs=0.05)


def test_estimate_refuses_columns_of_different_seeds():
    with pytest.raises(ValueError, match=r"one score per seed, got \[1, 2\]"):
        intervals.estimate(np.subtract, LABEL, [scores_of(1)], [scores_of(1)] * 2)
    with pytest.raises(ValueError, match=r"one score per seed, got \[0\]"):
        intervals.estimate(np.asarray, LABEL, [])


@pytest.mark.parametrize("noise", [1, 2])
def test_a_score_and_an_estimate_have_one_interval(noise):
    scores = scores_of(0.8, n=60, noise=noise)
    found = intervals.over_sentences(np.asarray, "place", scores, draws=500, level=0.9)
    assert scores.interval("place", n=500, level=0.9) == pytest.approx((found.low, found.high))
    tails = np.quantile(scores.resampled("place", n=500), [0.05, 0.95])
    assert (found.low, found.high) != pytest.approx(tuple(tails), abs=1e-6)  # BCa is not the percentile one
