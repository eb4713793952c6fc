"""How much of what was removed an attack brings back, beyond what it teaches a twin that never knew it.

All scores are of the same keys, drawn together, so that every difference is paired. A share whose denominator is within
noise is refused, and nothing is called recovered without a twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relearn_lens.analysis.intervals import Estimate, over_seeds, over_sentences
from relearn_lens.analysis.recovery import retraining_stages, savings, start_of
from relearn_lens.measure import bootstrap
from relearn_lens.measure.course import HELD_OUT, FactsTrajectory
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import BASE
from relearn_lens.names import explained


@dataclass(frozen=True)
class Relearned:
    """What an attack brought back at a stage, as shares of what removing took: 0 none, 1 all of it."""

    stage: str
    damage: Estimate
    """Base minus removed."""
    brought: Estimate | None
    """(attacked - removed) / (base - removed); None where the damage is within noise."""
    taught: Estimate | None
    """(twin attacked - twin) / (base - removed): what the same attack gets out of the twin. None without a twin."""
    recovered: Estimate | None
    """`brought` less `taught`, of which less than nothing is nothing: a twin that the attack harms lends nothing. None
    without a twin, or where the damage is within noise."""

    def __str__(self) -> str:
        if self.brought is None:
            return f"at {self.stage}: what removing took, {self.damage}, is within noise, so nothing can be recovered"
        if self.recovered is None:
            return f"at {self.stage}: {self.brought} came back; without a twin none of it is called recovered"
        return f"at {self.stage}: {self.recovered} recovered ({self.brought} came back, the twin got {self.taught})"


@explained
def relearned(
    paths: Sequence[FactsTrajectory],
    metric: str,
    stage: str,
    *,
    never: Sequence[FactsTrajectory] | None = None,
    place: Label = HELD_OUT,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Relearned:
    """Recovery at a stage of an attack, of one path per training seed and the twin's path beside each.

    Of one seed intervals are over keys, of several Student's t over seeds. Refused (None) where the interval of the
    damage does not exclude 0.

    Raises:
        ValueError: no path, twins of other seeds or stages, or a metric that was not measured.
    """
    if not paths or (never is not None and [p.seed for p in never] != [p.seed for p in paths]):
        raise ValueError(
            "recovery needs paths, and a twin's path of the same seed beside each; got seeds "
            f"{[p.seed for p in paths]} and {[p.seed for p in never or ()]}"
        )
    rows: list[list[Scores]] = []
    for i, path in enumerate(paths):
        stages = [(path, BASE), (path, start_of(path)), (path, stage)]
        stages += [] if never is None else [(never[i], start_of(never[i])), (never[i], stage)]
        if missing := [name for arm, name in stages if name not in arm.stages]:
            raise ValueError(
                f"recovery needs the stages {BASE}, removed and {stage}, also of the twin but for {BASE}; found no "
                f"{missing[0]!r}: track with before=, and both with the same steps"
            )
        rows.append([arm[name].by(metric) for arm, name in stages])

    def over(of, columns: Sequence[int]) -> Estimate:
        if len(rows) == 1:
            scores = [rows[0][c] for c in columns]
            return over_sentences(of, place, *scores, level=level, draws=draws, seed=seed)
        return over_seeds([float(of(*(row[c].value(place) for c in columns))) for row in rows], level=level)

    damage = over(np.subtract, (0, 1))
    if not damage.low > 0:
        return Relearned(stage, damage, None, None, None)
    brought = over(lambda b, r, a: _share(a - r, b - r), (0, 1, 2))
    if never is None:
        return Relearned(stage, damage, brought, None, None)
    taught = over(lambda b, r, n, m: _share(m - n, b - r), (0, 1, 3, 4))
    net = over(lambda b, r, a, n, m: _share(a - r - np.maximum(m - n, 0), b - r), (0, 1, 2, 3, 4))
    return Relearned(stage, damage, brought, taught, net)


def most_relearned(
    paths: Sequence[FactsTrajectory],
    metric: str,
    *,
    never: Sequence[FactsTrajectory] | None = None,
    place: Label = HELD_OUT,
    **interval,
) -> Relearned:
    """`relearned` at the stage where it is most: the number of an attack. Choosing the stage favours the attack, its
    interval does not count that in.

    Raises:
        ValueError: as `relearned`; or no stage of training.
    """
    stages = retraining_stages(paths[0]) if paths else ()
    if not stages:
        raise ValueError("the number of an attack is its most over its checkpoints, and these paths have none")
    each = [relearned(paths, metric, stage, never=never, place=place, **interval) for stage in stages]

    def size(one: Relearned) -> float:
        share = one.recovered or one.brought
        return -math.inf if share is None else share.value

    return max(each, key=size)


def saved(
    paths: Sequence[FactsTrajectory],
    never: Sequence[FactsTrajectory],
    metric: str,
    *,
    place: Label = HELD_OUT,
    shares: Sequence[float] = (0.5, 0.9),
    **interval,
) -> dict[float, Estimate | None]:
    """Steps that the twin needs for each share of the base's score, by those that the removed model needs, on the same
    data: above 1, relearning is faster than learning. None where either never gets there, or either is there at once.

    Source: Ebbinghaus 1885; `analysis.recovery.savings`, in whose 1 - ours / theirs this is 1 / (1 - s).

    Raises:
        ValueError: as `savings`.
    """
    saving = savings([p.by(metric) for p in paths], [n.by(metric) for n in never], place, shares=shares, **interval)

    def ratio(one: Estimate | None) -> Estimate | None:
        if one is None or not one.value < 1:
            return None
        low, high = (1 / (1 - end) if end < 1 else math.inf for end in (one.low, one.high))
        return Estimate(1 / (1 - one.value), low, high, one.over, n=one.n)

    return {share: ratio(one) for share, one in saving.saved.items()}


def removal_score(
    forget: tuple[Scores, Scores],
    retain: tuple[Scores, Scores],
    *,
    places: tuple[Label, Label] = (HELD_OUT, "retain_near"),
    chance: float | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """[(W0 - W) - (U0 - U)] / (W0 - W_chance): 1 is best, 0 untouched. W is the score on what is forgotten, U on what
    is retained, each (before, after). Keys of the two places are drawn apart. None where what could be removed, W0 less
    chance, is within noise.

    Source: Che et al. 2025, unlearning score.

    Raises:
        ValueError: before and after of other keys.
    """
    drawn, values = [], []
    for pair, place, apart in zip((forget, retain), places, (0, 1), strict=True):
        sums = [scores.sums(place) for scores in pair]
        if len(sums[0]) != len(sums[1]):
            raise ValueError(
                f"before and after must be of the same keys at {place}, got {len(sums[0])} and {len(sums[1])}"
            )
        weights = bootstrap.weights(len(sums[0]), draws, seed + apart)
        values.append([scores.value(place) for scores in pair])
        drawn.append([scores.of_sums(weights @ each) for scores, each in zip(pair, sums, strict=True)])
    guess = chance
    if guess is None:
        # What a guess shows, on the scale of values: both are affine in each other.
        at, one = forget[0].displayed(0.0), forget[0].displayed(1.0)
        guess = (forget[0].chance(places[0]) - at) / (one - at)

    def score(w0, w, u0, u):
        return _share((w0 - w) - (u0 - u), w0 - guess)

    spread = np.quantile(drawn[0][0], [(1 - level) / 2, (1 + level) / 2])
    if not spread[0] > guess:
        return None
    value = float(score(*values[0], *values[1]))
    low, high, how = bootstrap.ends(value, np.asarray(score(*drawn[0], *drawn[1])), None, level)
    return Estimate(value, low, high, f"keys of both places ({how})", n=len(forget[0].sums(places[0])))


def _share(part, whole):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, np.divide(part, whole), np.nan)
