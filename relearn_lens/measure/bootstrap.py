"""Draws with replacement, and the ends of an interval from them: what scores and estimates share.

Source: Efron 1987, "Better Bootstrap Confidence Intervals".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri


@lru_cache(maxsize=2)
def weights(n: int, draws: int, seed: int) -> np.ndarray:
    """How often each of `n` is drawn, `[draw, n]`: one matrix product then resamples any sum. Read only."""
    drawn = counted(np.random.default_rng(seed).integers(n, size=(draws, n)), n)
    drawn.flags.writeable = False
    return drawn


def counted(index: np.ndarray, n: int) -> np.ndarray:
    """How often each of `n` is in each row of `index`."""
    flat = index + n * np.arange(len(index))[:, None]
    return np.bincount(flat.ravel(), minlength=len(index) * n).reshape(len(index), n).astype(float)


def ends(
    value: float, drawn: np.ndarray, jackknife: Callable[[], list[np.ndarray]] | None, level: float
) -> tuple[float, float, str | None]:
    """The BCa interval of bootstrap draws of a value, or where that is not defined the percentile one and a word on it.

    The jackknife is one array per group that was drawn by itself. NaN where nothing was drawn that has a value.
    """
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    corrected = None if jackknife is None or math.isnan(value) else _bca(value, drawn, jackknife, tails)
    if corrected is not None:
        return *corrected, None
    known = drawn[~np.isnan(drawn)]
    how = "percentile"
    if len(known) < len(drawn):
        how += f"; {len(drawn) - len(known)} of {len(drawn)} draws undefined"
    if math.isnan(value) or not len(known):
        return math.nan, math.nan, how
    # Between infinite draws nothing can be interpolated.
    low, high = np.quantile(known, tails, method="linear" if np.isfinite(known).all() else "inverted_cdf")
    return float(low), float(high), how


def _bca(
    value: float, drawn: np.ndarray, jackknife: Callable[[], list[np.ndarray]], tails: np.ndarray
) -> tuple[float, float] | None:
    """Efron's bias-corrected and accelerated interval; None where it is not defined."""
    bias = ndtri(((drawn < value).mean() + (drawn <= value).mean()) / 2)
    if not np.isfinite(drawn).all() or not np.isfinite(bias) or np.ptp(drawn) == 0:
        return None
    square = cube = 0.0
    for left in jackknife():
        influence = (len(left) - 1) / len(left) * (left.mean() - left)
        square += float((influence**2).sum())
        cube += float((influence**3).sum())
    if not square > 0:  # NaN too
        return None
    acceleration = cube / (6 * square**1.5)
    z = bias + ndtri(tails)
    if not (acceleration * z < 1).all():
        return None
    low, high = np.quantile(drawn, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)
