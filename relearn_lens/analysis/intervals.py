"""How sure a number is: intervals over sentences, neurons and training seeds, and p-values against a null.

1. One training run: its sentences (or neurons) are drawn again with replacement, with the same draws for every column,
   so that a difference is paired; the interval is BCa (bias-corrected and accelerated).
2. Several training runs: Student's t over the seeds, sign flips for the p-value of a paired difference.
3. A control arm: where the value lies among the null values.
4. Several comparisons: Holm for p-values, Bonferroni for the level of intervals.

Every estimate says over what its interval is taken. Source: Efron 1987, "Better Bootstrap Confidence Intervals";
Phipson & Smyth 2010 for p-values that are never 0; Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as st
from torch import Tensor

from relearn_lens.measure import bootstrap
from relearn_lens.measure.evaluation import Label, Scores

Numbers = Sequence[float | int] | np.ndarray
FEWEST_SEEDS = 3
"""Fewest training seeds that say anything of what training did: below, a difference between arms has no interval."""
ONE_SEED = "one training seed: no interval over training"
SENTENCES = "the sentences"
"""What a gap's interval is over where the text tells it least finely."""
AT_AN_END = 0.02
"""How near to an end of a scale from 0 to 1 counts as there: one span of fifty."""
FLIPS = 9999
"""Most sign flips that are tried."""
JACKKNIFED = 1000
"""Most neurons for which BCa is taken: its jackknife recomputes the statistic once per neuron. With more, skewness
hardly matters, and the percentile interval is taken."""


@dataclass(frozen=True)
class Estimate:
    """A number with an interval, and over what the interval is taken."""

    value: float
    low: float
    """NaN, as `high`, where there is no interval."""
    high: float
    over: str
    p: float | None = None
    """Two-sided, not corrected for other comparisons; None where nothing was tested."""
    n: int | None = None
    """Seeds, sentences or neurons that the interval is over."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends, or None where there is no interval."""
        return None if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)

    def excludes(self, number: float | int) -> bool:
        """Whether the interval leaves a number out; no interval leaves out nothing."""
        return self.interval is not None and not self.low <= number <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.interval else "")


def estimate(
    of: Callable[..., Any],
    label: Label,
    *columns: Sequence[Scores],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A function of one or more scores' values (F1, say), with its interval.

    `columns` are the arguments of `of`: for each, one score per seed of the run. With one seed the interval is over
    sentences (`over_sentences`), with more it is Student's t over seeds (`over_seeds`).

    Raises:
        ValueError: no seed, columns of different lengths, or of one seed but different sentences.
    """
    n = {len(column) for column in columns}
    if len(n) != 1 or 0 in n:
        raise ValueError(f"every column needs one score per seed, got {[len(c) for c in columns]}")
    rows = list(zip(*columns, strict=True))
    if len(rows) == 1:
        return over_sentences(of, label, *rows[0], level=level, draws=draws, seed=seed)
    return over_seeds([float(of(*(s.value(label) for s in row))) for row in rows], level=level)


def over_sentences(
    of: Callable[..., Any],
    label: Label,
    *scores: Scores,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A function of the values of one model's scores or of several, with its BCa bootstrap interval over the sentences.

    `of` takes as many numbers as there are scores, or as many arrays of them, and works element by element. Every
    score is drawn with the same sentences, so a difference is paired. Where BCa is not defined (draws or jackknife all
    alike or undefined) the interval is the percentile one, and `over` says so. It holds for this trained model: it
    does not say what another training seed would give.

    Raises:
        ValueError: scores of different numbers of sentences, which cannot be paired.
    """
    counts = [score.sums(label) for score in scores]
    sizes = {len(count) for count in counts}
    if len(sizes) != 1:
        raise ValueError(
            f"scores of one interval need the same sentences, got {[len(c) for c in counts]} sentences; evaluate all "
            "of them on the same text"
        )
    n = sizes.pop()
    table = np.concatenate(counts, axis=1)

    def of_counts(sums: np.ndarray) -> np.ndarray:
        parts = np.split(sums, np.cumsum([count.shape[1] for count in counts])[:-1], axis=1)
        values = [score.of_sums(part) for score, part in zip(scores, parts, strict=True)]
        return np.broadcast_to(np.asarray(of(*values), dtype=float), len(sums))

    value = float(of(*(score.value(label) for score in scores)))
    drawn = of_counts(bootstrap.weights(n, draws, seed) @ table)
    return _bootstrapped(value, drawn, lambda: [of_counts(table.sum(0) - table)], level, scores[0].over, n)


def over_neurons(
    statistic: Callable[..., Any],
    *columns: Tensor | np.ndarray,
    groups: Tensor | np.ndarray | None = None,
    weighted: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic over neurons with its bootstrap interval, such as a centre of mass or a rank correlation.

    `columns` are one number per neuron, shape `["neuron"]`; `statistic` takes them with any number of axes before it
    (`[..., neuron]`) and works along the last. With `weighted` it takes the weights (how often each neuron is drawn,
    `[..., neuron]`) and then the columns as they are, which is faster where it need not sort anew. With `groups` (such
    as each neuron's layer) neurons are drawn within their group, so that each keeps its size. BCa up to `JACKKNIFED`
    neurons, else percentile; also where BCa is undefined, and `over` says so. Neurons of one model are not independent,
    and the interval is not about another training seed.

    Raises:
        ValueError: no neuron, or columns of different lengths.
    """
    arrays = [np.asarray(column) for column in columns]
    labels = None if groups is None else np.asarray(groups)
    shapes = [a.shape for a in (*arrays, *([] if labels is None else [labels]))]
    if not arrays or len(set(shapes)) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"columns and groups need one number per neuron, got shapes {shapes}")
    n = len(arrays[0])
    group = np.zeros(n, dtype=int) if labels is None else np.unique(labels, return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**20 // n)

    def at(index: np.ndarray) -> np.ndarray:
        values = (
            statistic(bootstrap.counted(index, n), *arrays)
            if weighted
            else statistic(*(array[index] for array in arrays))
        )
        return np.broadcast_to(np.asarray(values, dtype=float), len(index))

    def again(rows: int) -> np.ndarray:
        parts = [start + rng.integers(size, size=(rows, size)) for start, size in zip(starts, sizes, strict=True)]
        return at(order[np.concatenate(parts, axis=1)])

    def without(rows: np.ndarray) -> np.ndarray:
        rest = np.arange(n - 1)
        return at(order[rest + (rest >= rows[:, None])])

    def jackknife() -> list[np.ndarray]:
        left = np.concatenate([without(rows) for rows in np.array_split(np.arange(n), math.ceil(n / chunk))])
        # A group of one neuron is always drawn whole: it does not vary, so it does not skew either.
        return [part for part in np.split(left, starts[1:]) if len(part) > 1]

    drawn = np.concatenate([again(min(chunk, draws - done)) for done in range(0, draws, chunk)])
    value = float(at(np.arange(n)[None])[0])
    return _bootstrapped(value, drawn, jackknife if n <= JACKKNIFED else None, level, "neurons", n)


def over_seeds(values: Numbers, *, level: float = 0.95) -> Estimate:
    """Mean of one number per training seed, with Student's t interval; of one seed there is none.

    Raises:
        ValueError: no value.
    """
    each = np.asarray(values, dtype=float)
    n = len(each)
    if not n:
        raise ValueError("an interval over seeds needs at least one value, got none")
    mean = float(each.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, ONE_SEED, n=1)
    if not np.isfinite(each).all():
        return Estimate(mean, math.nan, math.nan, f"{n} seeds, {(~np.isfinite(each)).sum()} undefined", n=n)
    half = float(st.t.ppf((1 + level) / 2, n - 1) * st.sem(each))
    return Estimate(mean, mean - half, mean + half, f"{n} seeds", n=n)


def paired(ours: Numbers, theirs: Numbers, *, level: float = 0.95) -> Estimate:
    """Mean of ours minus theirs over training seeds, with Student's t interval and the p-value of sign flips.

    Under the null each seed's difference could as well have the other sign. All flips are tried if they are at most
    `FLIPS`, else so many at random. The p-value of n seeds is at least 2 / 2**n: with fewer than six it cannot be
    below 0.05, whatever the interval says. One seed has neither.

    Raises:
        ValueError: different numbers of seeds, or none.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"a paired difference needs the same seeds on both sides, got {len(ours)} and {len(theirs)}")
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean = over_seeds(gap, level=level)
    if mean.interval is None:
        return mean
    test = st.permutation_test(
        (gap,),
        lambda d, axis: d.mean(axis),
        permutation_type="samples",
        n_resamples=FLIPS,
        rng=np.random.default_rng(0),
    )
    return replace(mean, p=float(test.pvalue))


def over_seeds_and_neurons(each: Sequence[Estimate], *, level: float = 0.95) -> Estimate:
    """Mean over seeds of a number that has an interval over neurons in each: the wider of Student's t over seeds and
    the widest of theirs, since seeds share most neurons, and so their luck. `p` is the larger of the two."""
    values = [one.value for one in each]
    mean = over_seeds(values, level=level)
    halves = [max(one.high - one.value, one.value - one.low) for one in each if one.interval]
    if mean.interval is None or len(halves) < len(each) or not max(mean.high - mean.value, *halves) > 0:
        return Estimate(mean.value, math.nan, math.nan, mean.over, n=mean.n)
    n, z = len(each), float(st.norm.ppf((1 + level) / 2))
    error = float(st.sem(values))
    p = max(2 * float(st.t.sf(abs(mean.value) / error, n - 1)) if error > 0 else 0.0,
            2 * float(st.norm.sf(abs(mean.value) / max(halves) * z)) if max(halves) > 0 else 0.0)  # fmt: skip
    half = max(mean.high - mean.value, *halves)
    over = mean.over if half > max(halves) else f"{each[0].over} of the least certain of {n} seeds"
    return Estimate(mean.value, mean.value - half, mean.value + half, over, p, n)


class Gap(NamedTuple):
    """Concept minus control."""

    effect: Estimate
    p: float | None
    p_flips: float | None


def beside_control(ours: Numbers, control: Sequence[Numbers], level: float, *, least: float | None = None) -> Gap:
    """Ours minus the control's values, both by seed: the widest of the intervals that there are, and its p-value.

    Seeds share the text, and often the neurons: what one set of neurons does by luck it does in every seed, so
    Student's t over seeds alone takes luck for an effect (`python -m tests.benchmarks false-alarms`).

    1. Several values of the control per seed: where one more of its own seed would lie, by their spread within seeds;
       and, from `FEWEST_SEEDS` on, Student's t over the seeds' differences.
    2. One per seed: where one more seed's difference would lie. What a seed does to both sides cancels; the control's
       own spread over seeds would count it.
    3. `least`, half the width of a paired interval over sentences: nothing is told more finely than the text allows.

    Values without any spread say nothing of one more: then there is an interval by `least` alone, or none. Of a single
    value the spread is not known, so there is none either.
    """
    means = [float(np.mean(values)) for values in control]
    gaps, n, seeds = np.subtract(ours, means), sum(map(len, control)), len(control)
    gap = float(gaps.mean())
    still = 1e-9 * max(1.0, float(np.abs([*ours, *means]).max()))
    spreads: list[tuple[float, float, str]] = []
    if n > seeds:
        off = np.concatenate([np.subtract(values, mean) for values, mean in zip(control, means, strict=True)])
        spread = math.sqrt(float(off @ off) / (n - seeds))
        if spread > still:
            spreads.append((spread * math.sqrt(1 + 1 / n), n - seeds, f"{n} values of the control"))
            if seeds >= FEWEST_SEEDS:
                spreads.append((float(st.sem(gaps)), seeds - 1, f"{seeds} seeds"))
    elif seeds > 1 and (spread := float(gaps.std(ddof=1))) > still:
        spreads.append((spread * math.sqrt(1 + 1 / seeds), seeds - 1, f"{seeds} seeds"))
    if least is not None and least > still and n > 1:
        spreads.append((least / float(st.norm.ppf((1 + level) / 2)), math.inf, SENTENCES))
    p_flips = paired(ours, means, level=level).p
    if not spreads:
        over = "one value of the control" if n == 1 else f"{n} values of the control without any spread"
        return Gap(Estimate(gap, math.nan, math.nan, over, n=n), None, p_flips)
    half, over = max((float(st.t.ppf((1 + level) / 2, df) * error), over) for error, df, over in spreads)
    p = max(2 * float(st.t.sf(abs(gap) / error, df)) if error > 0 else 0.0 for error, df, _ in spreads)
    return Gap(Estimate(gap, gap - half, gap + half, over, p, n), p, p_flips)


def same_end(ours: Numbers, theirs: Numbers, *, low: float = 0.0) -> bool:
    """Whether both sides are at the same end of a scale, where a difference could not be seen if there was one."""
    each = np.concatenate([np.ravel(ours), np.ravel(theirs)]).astype(float)
    return bool(len(each) and ((each <= low + AT_AN_END).all() or (each >= 1.0 - AT_AN_END).all()))


def holm(p_values: Numbers) -> list[float]:
    """P-values of several tests, adjusted so that all of them together keep the level (Holm's step-down).

    Raises:
        ValueError: a p-value that is not within 0 and 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be within 0 and 1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted.tolist()


def bonferroni(level: float | int, n: int) -> float:
    """The level of each of `n` intervals, such that together they keep `level`.

    Raises:
        ValueError: a level not between 0 and 1, or no comparison.
    """
    if not 0 < level < 1 or n < 1:
        raise ValueError(f"level must be between 0 and 1 and n at least 1, got level {level} and n {n}")
    return 1 - (1 - level) / n


def _bootstrapped(
    value: float,
    drawn: np.ndarray,
    jackknife: Callable[[], list[np.ndarray]] | None,
    level: float,
    of_what: str,
    n: int,
) -> Estimate:
    """The interval of bootstrap draws; `over` says where it is not BCa."""
    low, high, how = bootstrap.ends(value, drawn, jackknife, level)
    return Estimate(value, low, high, f"{n} {of_what}" + (f" ({how})" if how else ""), n=n)
