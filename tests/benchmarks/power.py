"""False alarms and power of every claim's and question's rule, simulated: `python -m tests.benchmarks power`.

Each row states the spread that is assumed of its measurement, in the measurement's own unit: over seeds (what a seed
does to both sides), of luck (what a set of neurons does, the concept's the same in every seed, each control's its own)
and of training. The truth is the bar, where a rule is most easily wrong, so that *supported* should be told at most as
often as the level says; then it is the smallest effect that would be interesting. Three seeds, 1, 2 and 4 controls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats as st

from relearn_lens.analysis import questions
from relearn_lens.analysis.claims import verdict_of
from relearn_lens.analysis.intervals import Estimate, beside_control, over_seeds, over_seeds_and_neurons
from relearn_lens.analysis.questions import Again, Back, Curve, Cuts, Grafts, Heirs, Outcome

SEEDS, CONTROLS, LEVEL = 3, (1, 2, 4), 0.95
Rng = np.random.Generator
Rule = Callable[[Rng, float, int], str]
"""`(generator, true effect, controls per seed) -> verdict`."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations, in a measurement's unit."""

    seed: float
    luck: float
    training: float

    def draw(self, rng: Rng, effect: float, k: int) -> tuple[list[float], list[list[float]]]:
        """The concept's value per seed, and those of its controls."""
        seed = self.seed * rng.normal(size=SEEDS)
        ours = effect + seed + self.luck * rng.normal() + self.training * rng.normal(size=SEEDS)
        own = np.hypot(self.luck, self.training) * rng.normal(size=(SEEDS, k))
        return ours.tolist(), (seed[:, None] + own).tolist()


@dataclass(frozen=True)
class Row:
    """One rule, and what is assumed of its measurement."""

    name: str
    unit: str
    spread: Spread
    bar: float
    effect: float
    """The smallest interesting one."""
    rule: Rule
    controls: tuple[int, ...] = CONTROLS


# --- claims


def versus(rng: Rng, effect: float, k: int, spread: Spread, bar: float) -> str:
    """A claim beside control values."""
    return verdict_of(beside_control(*spread.draw(rng, effect, k), LEVEL).effect, bar)


def alone(rng: Rng, effect: float, _: int, spread: Spread, bar: float) -> str:
    """A claim without a control in its effect."""
    values = effect + np.hypot(spread.seed, spread.training) * rng.normal(size=SEEDS)
    return verdict_of(over_seeds(values, level=LEVEL), bar)


def within(rng: Rng, effect: float, _: int, spread: Spread, bar: float) -> str:
    """A claim about the arm itself: what neurons do by luck is shared by the seeds, and their interval knows it."""
    centre = effect + spread.luck * rng.normal()
    half = 1.96 * spread.luck
    values = centre + np.hypot(spread.seed, spread.training) * rng.normal(size=SEEDS)
    each = [Estimate(float(v), float(v) - half, float(v) + half, "neurons") for v in values]
    return verdict_of(over_seeds_and_neurons(each, level=LEVEL), bar)


def claim(name: str, unit: str, spread: Spread, bar: float, effect: float, of=versus, **changes) -> Row:
    return Row(name, unit, spread, bar, effect, partial(of, spread=spread, bar=bar), **changes)


# --- questions


def specific(rng: Rng, effect: float, k: int, spread: Spread) -> str:
    """Margins of 8 logits; cuts cost what the spread says, and the concept's own set `effect` more."""

    def cut(loss: float) -> Outcome:
        return Outcome(8 * (1 - loss))

    ours, theirs = spread.draw(rng, effect, k)
    base = {"place": Outcome(8.0), "person": Outcome(8.0)}
    seeds = [
        Cuts(
            s, base, {"place": cut(ours[s]), "person": cut(0.0)}, {"place": cut(0.02), "person": cut(0.9)},
            [{"place": cut(loss), "person": cut(0.0)} for loss in theirs[s]],
        )
        for s in range(SEEDS)
    ]  # fmt: skip
    return questions.specific(seeds, "place", "person").verdict


STEPS = (0, 1, 2, 4, 8, 16, 32)


def returns(rng: Rng, effect: float, _: int, spread: Spread) -> str:
    """From -2 of 8 logits to so large a share of what was lost."""
    ends = effect + np.hypot(spread.seed, spread.training) * rng.normal(size=SEEDS)
    curves = [Curve(STEPS, [-2 + 10 * end * k / 6 for k in range(7)]) for end in ends]
    return questions.returns([Back(s, Outcome(8.0), curve) for s, curve in enumerate(curves)]).verdict


def sooner(rng: Rng, effect: float, _: int, spread: Spread) -> str:
    """Two curves of one shape, apart by so many base margins on average."""
    seeds = []
    for s in range(SEEDS):
        shared = spread.seed * rng.normal()
        lead = np.array([effect, 0.0]) + shared + spread.training * rng.normal(size=2)
        mine, twin = ([-2 + 8 * (k / 6 * 0.7 + up) for k in range(7)] for up in lead)
        seeds.append(Back(s, Outcome(8.0), Curve(STEPS, mine), Curve(STEPS, twin)))
    return questions.sooner(seeds).verdict


def where(rng: Rng, effect: float, k: int, spread: Spread) -> str:
    """Seven parts, of which one is needed, and enough by so much; control grafts of `k` kinds do what luck does."""
    parts = ["embed", *map(str, range(6))]

    def table(values: np.ndarray) -> dict[str, float]:
        return dict(zip(parts, (-2 + 8 * values).tolist(), strict=True))

    luck, seeds = spread.luck * rng.normal(size=7), []
    for s in range(SEEDS):
        seed = spread.seed * rng.normal()
        alone = seed + luck + spread.training * rng.normal(size=7)
        controls = {str(i): seed + np.hypot(spread.luck, spread.training) * rng.normal(size=7) for i in range(k)}
        alone[5] += effect + 1.35 * spread.luck  # the highest of seven controls, which it is compared with
        lost = np.zeros(7) + 0.9 * (np.arange(7) == 5) + spread.training * rng.normal(size=7)
        seeds.append(
            Grafts(s, -2.0, 6.0, table(alone), table(1 - lost), {name: table(v) for name, v in controls.items()})
        )
    return questions.where(seeds, "late").verdict


def same(rng: Rng, effect: float, k: int, spread: Spread) -> str:
    ours, theirs = spread.draw(rng, effect, k)
    seeds = [Again(s, -2.0, 6.0, 6 - 8 * ours[s], [6 - 8 * each for each in theirs[s]]) for s in range(SEEDS)]
    return questions.same(seeds).verdict


def heirs(rng: Rng, effect: float, k: int, spread: Spread, of: Callable) -> str:
    """Beside the random arm (1), or the random and the unpruned arm (2)."""
    ours, theirs = spread.draw(rng, effect, k)
    return of([Heirs(s, ours[s], *theirs[s]) for s in range(SEEDS)]).verdict


def question(name: str, unit: str, spread: Spread, effect: float, of: Callable, **changes) -> Row:
    key = name.split(",")[0]
    return Row(f"{name} ?", unit, spread, questions.RULES[key].value, effect, partial(of, spread=spread), **changes)


RANKS, DEPTH, SHARE = Spread(0.02, 0.02, 0.02), Spread(0.01, 0.01, 0.005), Spread(0.03, 0.03, 0.02)
ONE, TWO = (1,), (1, 2)
ROWS = (
    claim("any, in sd of luck", "sd", Spread(1, 1, 0), 0, 4),
    claim("C1", "share lost", SHARE, 0.5, 0.75, alone, controls=ONE),
    claim("C2", "share back", SHARE, 0.9, 1.0, alone, controls=ONE),
    claim("C3a", "share lost", SHARE, 0.05, 0.3),
    claim("C3b", "share back", SHARE, 0.05, 0.3),
    claim("C4 (19 shuffles)", "depth", DEPTH, 0.05, 0.15, controls=(19,)),
    claim("C5 matched, story", "depth", DEPTH, 0.02, 0.1),
    claim("C6", "depth", DEPTH, 0.02, 0.1),
    claim("C7", "rank corr.", RANKS, 0.05, 0.2),
    claim("C8", "share", SHARE, 0.05, 0.3),
    claim("C9a", "rank corr.", RANKS, 0.05, 0.2, within, controls=ONE),
    claim("C9b", "similarity", DEPTH, 0.02, 0.1, within, controls=ONE),
    question("specific", "base margin", Spread(0.05, 0.05, 0.03), 0.7, specific),
    question("returns", "share back", SHARE, 0.9, returns, controls=ONE),
    question("sooner", "base margin", Spread(0.05, 0, 0.02), 0.15, sooner, controls=ONE),
    question("enough, in where", "share back", SHARE, 0.9, where),
    question("same", "share back", SHARE, 0.9, same),
    question("primed", "rank corr.", RANKS, 0.2, partial(heirs, of=questions.primed), controls=TWO),
    question("mixed", "share", SHARE, 0.3, partial(heirs, of=questions.mixed), controls=TWO),
)


@dataclass(frozen=True)
class Rates:
    """How often *supported* was told, at the bar and at the smallest interesting effect."""

    row: Row
    controls: int
    n: int
    alarms: int
    hits: int

    @property
    def too_many(self) -> bool:
        """More alarms than the level gives but in one case of a thousand."""
        return self.alarms > int(st.binom.isf(0.001, self.n, 1 - LEVEL))


def rates(row: Row, k: int, n: int, seed: int = 0) -> Rates:
    """Both rates of a row."""
    rng = np.random.default_rng(seed)
    told = [sum(row.rule(rng, effect, k) == "supported" for _ in range(n)) for effect in (row.bar, row.effect)]
    return Rates(row, k, n, *told)


def power(n: int = 400) -> None:
    """Print the table."""
    print(f"three seeds, {n} simulations each; 'false': supported where the truth is the bar (level {1 - LEVEL:.2f})")
    columns = f"{'claim or question ?':20s} {'unit':12s} {'sd: seed':>8s} {'luck':>5s} {'train':>6s} {'bar':>5s}"
    print(f"{columns} {'effect':>6s}  controls per seed: false, power")
    for row in ROWS:
        s, cells = row.spread, []
        for k in row.controls:
            found = rates(row, k, n)
            cells.append(f"{k}: {found.alarms / n:.3f}{'!' if found.too_many else ''}, {found.hits / n:.2f}")
        print(
            f"{row.name:20s} {row.unit:12s} {s.seed:8g} {s.luck:5g} {s.training:6g} {row.bar:5g} {row.effect:6g}  "
            f"{'   '.join(cells)}",
            flush=True,
        )


if __name__ == "__main__":
    power(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
