"""Rankings whose heirs are known, and predictors that foretell nothing, something, or only depth."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from relearn_lens.analysis import priming
from relearn_lens.find.saliency import Saliency
from relearn_lens.neurons.sites import Neurons
from tests.analysis.test_story import scores_of, site_of, snapshot_of

BEFORE = [[9.0, 1.0, 3.0], [8.0, 2.0, 7.0]]
AFTER = [[1.0, 9.0, 3.0], [8.0, 7.0, 2.0]]


def saliency_of(score: torch.Tensor | list) -> Saliency:
    return snapshot_of(torch.as_tensor(score), scores_of(1)).saliency


def neurons(*members: tuple[str, int], shape: tuple[int, int] = (2, 3)) -> Neurons:
    return Neurons.of(site_of(*shape), members)


# --- who took over


def test_heirs_and_turnover_by_hand():
    before, after = saliency_of(BEFORE), saliency_of(AFTER)
    # Top 3 before: 9, 8, 7; after: 9, 8, 7 again, but only the 8 is the same neuron.
    found = priming.heirs(before, after, 3)
    assert found == neurons(("embed", 1), ("0", 1))
    assert priming.turnover(before, after, 3) == pytest.approx((2 / 3, 1 / 2))
    # Without the best two of before: 7, 3 | 2, 1 before, and 9, 7 | 3, 2 after.
    among = ~neurons(("embed", 0), ("0", 0))
    assert priming.heirs(before, after, 2, among) == neurons(("embed", 1), ("0", 1))
    assert priming.turnover(before, after, 2, among) == pytest.approx((1, 1 / 2))


def test_turnover_of_the_same_ranking_is_none():
    before = saliency_of(BEFORE)
    assert priming.turnover(before, before, 2) == pytest.approx((0, 2 / 3))
    assert len(priming.heirs(before, before, 2)) == 0


def test_turnover_by_chance_is_what_shuffling_gives():
    rng = np.random.default_rng(0)
    found = [
        priming.turnover(
            saliency_of(torch.from_numpy(rng.random((4, 25)))), saliency_of(torch.from_numpy(rng.random((4, 25)))), 30
        )
        for _ in range(50)
    ]
    assert np.mean([f.left for f in found]) == pytest.approx(found[0].by_chance, abs=0.05)


def test_top_of_takes_the_earlier_of_a_tie_and_nobody_else():
    tied = saliency_of([[0.0, 0.0], [0.0, 0.0]])
    assert tied.top(2) == neurons(("embed", 0), ("embed", 1), shape=(2, 2))
    late = neurons(("0", 0), ("0", 1), shape=(2, 2))
    assert tied.top(1, among=late) == neurons(("0", 0), shape=(2, 2))


@pytest.mark.parametrize("k", [0, 5])
def test_top_refuses_more_than_there_are(k):
    among = neurons(("embed", 0), ("embed", 1), ("0", 0), ("0", 1))
    with pytest.raises(ValueError, match=rf"k must be 1 to 4 \(the neurons that are compared\), got {k}"):
        priming.turnover(saliency_of(BEFORE), saliency_of(AFTER), k, among)


# --- were they primed


def related(
    share: float | int, *, slope: float | int = 0.0, shape=(6, 60), seed: int = 0
) -> tuple[torch.Tensor, Saliency]:
    """A predictor and a later score whose logarithms are normal with this correlation within every layer; both grow
    with depth by `slope`."""
    rng = np.random.default_rng(seed)
    x, y = rng.multivariate_normal([0, 0], [[1, share], [share, 1]], size=shape).transpose(2, 0, 1)
    depth = slope * np.arange(shape[0])[:, None]
    return torch.from_numpy(np.exp(x + depth)).float(), saliency_of(torch.from_numpy(np.exp(y + depth)))


def test_priming_within_layers_by_hand():
    # Each layer's ranks: 1 2 3 against 1 3 2 (correlation 1/2), and 1 2 against 2 1 (-1), pruned neurons aside.
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 99.0]])
    after = saliency_of([[100.0, 300.0, 200.0], [2.0, 1.0, 0.0]])
    among = ~neurons(("0", 2))
    found = priming.priming(x, after, among, draws=50)
    # Ranks centred and in shares of the layer: -1/3, 0, 1/3 and -1/4, 1/4.
    assert found.correlation.value == pytest.approx((1 / 9 + 0 + 0 - 2 / 16) / (2 / 9 + 2 / 16))
    assert found.neurons == 5


def test_priming_with_ties_is_spearmans_of_every_layer():
    rng = np.random.default_rng(0)
    x, y = rng.integers(4, size=(2, 3, 50)).astype(float)
    found = priming.priming(torch.from_numpy(x).float(), saliency_of(torch.from_numpy(y)), draws=50)
    ranks = [np.concatenate([stats.rankdata(row) - 25.5 for row in side]) for side in (x, y)]
    assert found.correlation.value == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_depth_alone_is_no_priming():
    x, after = related(0.0, slope=1.0)
    assert stats.spearmanr(x.flatten(), after.score.flatten())[0] > 0.5  # pyright: ignore[reportOperatorIssue]
    found = priming.priming(x, after, draws=200)
    assert not found.correlation.excludes(0)
    assert found.correlation.p is not None
    assert found.correlation.p > 0.05


def test_priming_finds_a_relation_within_layers():
    x, after = related(0.6, slope=-0.5)
    found = priming.priming(x, after)
    truth = 6 / math.pi * math.asin(0.3)
    assert found.correlation.low < truth < found.correlation.high
    assert found.correlation.low > 0.3
    assert found.correlation.p == 1 / 1001


def test_priming_covers_and_its_p_is_uniform_under_the_null():
    p, inside = [], 0
    for k in range(200):
        x, after = related(0.0, slope=0.5, shape=(3, 25), seed=k)
        found = priming.priming(x, after, draws=199, seed=k)
        p.append(found.correlation.p)
        inside += not found.correlation.excludes(0)
    assert stats.kstest(p, "uniform")[1] > 0.01
    assert abs(np.mean(np.array(p) <= 0.1) - 0.1) < 3 * math.sqrt(0.09 / 200)
    assert abs(inside / 200 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 200)


def test_partial_correlation_by_hand_of_one_layer():
    rng = np.random.default_rng(0)
    z = rng.normal(size=200)
    x, y = z + rng.normal(size=200), z + rng.normal(size=200)
    a, b, c = (torch.from_numpy(v)[None].float() for v in (x, y, z))
    found = priming.priming(a, saliency_of(b), given=saliency_of(c), draws=200).correlation
    r, s, t = (float(np.corrcoef(stats.rankdata(p), stats.rankdata(q))[0, 1]) for p, q in ((x, y), (x, z), (y, z)))
    assert found.value == pytest.approx((r - s * t) / math.sqrt((1 - s**2) * (1 - t**2)))
    assert r > 0.4
    assert not found.excludes(0)
    assert found.p is not None
    assert found.p > 0.05


def test_partial_correlation_leaves_what_the_given_one_does_not_explain():
    rng = np.random.default_rng(1)
    z, x = rng.normal(size=(2, 4, 100))
    y = z + x + rng.normal(size=(4, 100))
    found = priming.priming(
        torch.from_numpy(x).float(), saliency_of(torch.from_numpy(y)), given=saliency_of(torch.from_numpy(z)), draws=200
    ).correlation
    assert found.low > 0.4
    assert found.p == 1 / 201


def test_priming_does_not_depend_on_order_or_scale():
    x, after = related(0.4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = priming.priming(x, after, draws=50)
    other = priming.priming(5 * x[:, order], saliency_of(3 * after.score[:, order]), draws=50)
    assert other.correlation.value == pytest.approx(found.correlation.value)


def test_priming_leaves_out_neurons_without_a_predictor():
    x, after = related(0.5, shape=(2, 20))
    x[0, :5] = torch.nan
    found = priming.priming(saliency_of(x), after, draws=50)
    assert found.neurons == 35
    among = Neurons(~x.isnan(), after.site)
    same = priming.priming(x.nan_to_num(), after, among, draws=50)
    assert same.correlation == found.correlation


def test_priming_by_a_predictor_that_says_nothing_is_undefined():
    x, after = related(0.5, shape=(2, 20))
    found = priming.priming(torch.ones_like(x), after, draws=50)
    assert math.isnan(found.correlation.value)
    assert found.correlation.interval is None


def test_priming_refuses_what_it_cannot_compare():
    x, after = related(0.5, shape=(2, 20))
    with pytest.raises(ValueError, match=r"a number for each neuron, \(2, 20\), got \(2, 19\)"):
        priming.priming(x[:, :19], after)
    with pytest.raises(ValueError, match="at least 3 neurons that have a predictor and a score, found 2"):
        priming.priming(x, after, Neurons.of(after.site, [("embed", 0), ("0", 0)]))
