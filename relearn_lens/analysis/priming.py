"""Which neurons took the concept over, and were they primed for it: is saliency later foretold by what was before.

Turnover and heirs compare the top of two rankings. For priming

1. ranks are taken within each layer, so that a predictor and a score that both grow with depth do not look related;
2. Spearman's correlation of the two over the neurons, or what is left of it given a third (saliency before: without
   that, a neuron that merely stays what it was looks primed); AUROC of telling heirs from the others of their layer;
3. interval by drawing neurons anew within their layer; p-value by shuffling the predictor within its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from relearn_lens.analysis.intervals import Estimate, over_neurons
from relearn_lens.find.saliency import Saliency
from relearn_lens.names import explained
from relearn_lens.neurons.sites import Neurons


class Turnover(NamedTuple):
    """How far the top of a ranking changed hands."""

    left: float
    """Share of the top k that are not in it any more."""
    by_chance: float
    """`left`, as expected of two rankings that have nothing to do with each other."""


@explained
def turnover(before: Saliency, after: Saliency, k: int, among: Neurons | None = None) -> Turnover:
    """How many of the `k` highest neurons (among the given ones) are no longer so.

    Raises:
        ValueError: k out of range.
    """
    old, new = before.top(k, among=among), after.top(k, among=among)
    return Turnover(1 - len(old & new) / k, 1 - k / count_of(before, among))


@explained
def heirs(before: Saliency, after: Saliency, k: int, among: Neurons | None = None) -> Neurons:
    """The neurons that entered the top `k` among the given ones (such as survivors): not in it before, in it after.

    Raises:
        ValueError: k out of range.
    """
    return after.top(k, among=among) - before.top(k, among=among)


def count_of(saliency: Saliency, among: Neurons | None) -> int:
    """How many neurons are compared."""
    return saliency.score.numel() if among is None else len(among)


@dataclass(frozen=True)
class Priming:
    """How well something measured before foretells which neurons carry the concept after retraining."""

    correlation: Estimate
    """Spearman's correlation with saliency after, -1 to 1; 0 if unrelated."""
    auroc: Estimate | None
    """Chance that an heir had more of the predictor than another neuron (of its layer), 0 to 1; 0.5 if unrelated. None
    without heirs, or without others."""
    heirs: int
    neurons: int
    """Neurons compared: those given whose predictor and score are numbers."""
    within_layer: bool


@explained
def priming(
    predictor: Float[Tensor, "layer neuron"] | Saliency,
    after: Saliency,
    among: Neurons | None = None,
    *,
    before: Saliency | None = None,
    given: Saliency | None = None,
    k: int | None = None,
    within_layer: bool = True,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Priming:
    """Whether a predictor from before pruning foretells saliency after retraining, over the given neurons (survivors).

    With `before` (saliency at base) the AUROC is of the heirs: those that entered the top `k` (by default a tenth of
    the neurons) against those in the top at neither time. With `within_layer` neurons are only compared with neurons
    of their own layer. With `given` (saliency at base, usually) the correlation is the partial one: of what the ranks
    of `given` leave of the ranks of both sides. Any lasting property of a neuron makes a correlation, so it is evidence
    of priming only above that of a control arm; and the interval is over neurons of one model, which are not
    independent.

    Raises:
        ValueError: fewer than three neurons to compare, or k out of range.
    """
    x = predictor.score if isinstance(predictor, Saliency) else predictor
    if x.shape != after.score.shape:
        raise ValueError(
            f"the predictor needs a number for each neuron, {tuple(after.score.shape)}, got {tuple(x.shape)}"
        )
    mask = x.isfinite() & after.score.isfinite()
    mask = mask if given is None else mask & given.score.isfinite()
    mask = mask if among is None else mask & among.mask
    n = int(mask.sum())
    if n < 3:
        raise ValueError(f"priming needs at least 3 neurons that have a predictor and a score, found {n}")
    layer = mask.nonzero()[:, 0].numpy() if within_layer else np.zeros(n, dtype=int)
    then, now = x[mask].double().numpy(), after.score[mask].double().numpy()
    third = [] if given is None else [given.score[mask].double().numpy()]
    below = [_below(values, layer) for values in (then, now, *third)]

    def ranks(weight: np.ndarray) -> list[np.ndarray]:
        """Mean 0 and the same spread in every layer, however many neurons of it are compared; less what the third one
        says of the other two."""
        size = _total(weight, layer)
        a, b, *c = ((of(weight) - size / 2) / np.maximum(size, 1) for of in below)
        for known in c:
            spread = (weight * known**2).sum(-1, keepdims=True)
            slopes = [
                np.divide((weight * side * known).sum(-1, keepdims=True), spread, out=0 * spread, where=spread > 1e-12)
                for side in (a, b)
            ]
            a, b = a - slopes[0] * known, b - slopes[1] * known
        return [a, b]

    def correlation(weight: np.ndarray, *_: np.ndarray) -> np.ndarray:
        a, b = ranks(weight)
        spread = np.sqrt((weight * a**2).sum(-1) * (weight * b**2).sum(-1))
        return np.divide((weight * a * b).sum(-1), spread, out=np.full(len(weight), np.nan), where=spread > 1e-12)

    a, b = (side[0] for side in ranks(np.ones((1, n))))
    correlated = over_neurons(correlation, then, groups=layer, weighted=True, level=level, draws=draws, seed=seed)
    correlated = replace(correlated, p=_shuffled(a, b, layer, draws, seed))
    if before is None:
        return Priming(correlated, None, 0, n, within_layer)

    chosen = Neurons(mask, after.site)
    k = max(1, round(n / 10)) if k is None else k
    new = heirs(before, after, k, chosen).mask[mask].numpy()
    rest = ~before.top(k, among=chosen).mask[mask].numpy()  # the others who could have become heirs
    auroc = _auroc(then[rest], new[rest], layer[rest], level=level, draws=draws, seed=seed)
    return Priming(correlated, auroc, int(new.sum()), n, within_layer)


def _auroc(
    x: np.ndarray, heir: np.ndarray, layer: np.ndarray, *, level: float, draws: int, seed: int
) -> Estimate | None:
    """Share of pairs of an heir and another of its layer in which the heir has more, ties half."""
    below = _below(x, layer)

    def chance(weight: np.ndarray, *_: np.ndarray) -> np.ndarray:
        other = weight * ~heir
        won = (weight * heir * below(other)).sum(-1)
        pairs = (weight * heir * _total(other, layer)).sum(-1)
        return np.divide(won, pairs, out=np.full(len(weight), np.nan), where=pairs > 0)

    one = np.ones((1, len(x)))
    if not len(x) or np.isnan(chance(one)).all():
        return None
    auroc = over_neurons(chance, x, groups=layer, weighted=True, level=level, draws=draws, seed=seed)
    centred = (below(one) - _total(one, layer) / 2)[0]
    return replace(auroc, p=_shuffled(centred, heir.astype(float), layer, draws, seed))


def _total(weight: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """For each neuron the weight of its layer, `[draw, neuron]`."""
    _, group = np.unique(layer, return_inverse=True)
    return (weight @ np.eye(group.max() + 1)[group])[:, group]


def _below(values: np.ndarray, layer: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of weights `[draw, neuron]`: for each neuron the weight of its layer below it, and half of that at it.

    With all weights 1 that is its rank in the layer, less a half. Sorts once, however many draws follow.
    """
    order = np.lexsort((values, layer))
    v, g = values[order], layer[order]
    place = np.arange(len(v))
    new_layer = np.append(True, g[1:] != g[:-1])
    new_run = new_layer | np.append(True, v[1:] != v[:-1])  # a run of equal values
    start = np.maximum.accumulate(np.where(new_layer, place, 0))
    first = np.maximum.accumulate(np.where(new_run, place, 0))
    after = np.minimum.accumulate(np.append(np.where(new_run, place, len(v))[1:], len(v))[::-1])[::-1]
    back = np.argsort(order)

    def below(weight: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(weight), len(v) + 1))
        np.cumsum(weight[:, order], axis=1, out=sums[:, 1:])
        return ((sums[:, first] + sums[:, after]) / 2 - sums[:, start])[:, back]

    return below


def _shuffled(a: np.ndarray, b: np.ndarray, layer: np.ndarray, draws: int, seed: int) -> float:
    """Two-sided p-value of sum(a * b) when `a`, of mean 0 in every layer, is shuffled within layers."""
    rng = np.random.default_rng(seed)
    order = np.argsort(layer, kind="stable")
    _, group = np.unique(layer[order], return_inverse=True)
    a, b = a[order], b[order]
    here, extreme, chunk = abs(a @ b), 0, max(1, 2**20 // len(a))
    for done in range(0, draws, chunk):
        # A group's number and a fraction: sorting shuffles each group in its place.
        shuffled = (group + rng.random((min(chunk, draws - done), len(a)))).argsort(1)
        extreme += int((np.abs(a[shuffled] @ b) >= here - 1e-9).sum())
    return (1 + extreme) / (1 + draws)
