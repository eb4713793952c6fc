"""A run's questions: was the cut specific, does the concept come back, how fast, where, in which neurons, why those.

Numbers in, verdicts out; what is measured is measured elsewhere. The outcome is the *margin*: the mean margin of the
concept's words in logits, or their log-probability in nats for a language model. It has no floor to hide under; F1, a
threshold, says whether a side sits at an end of its scale. How a verdict is made, the same for every question:

1. Seeds are paired. A share has a denominator that is beyond noise, or the question is *undecided*.
2. Student's t, which is 4.3 for three seeds: sign flips of three seeds cannot give less than .25. Where a null of
   control draws is the comparison, the rule is that of `intervals.beside_control`.
3. *supported*: the whole interval is beyond the bar. *reversed*: beyond minus the bar. *not supported*: the whole
   interval is within the bar (where two parts must both hold: that of one of them is, or is reversed). *inconclusive*:
   it reaches across. *undecided*: not measured, refused, or both sides at one end; `decide` says what would decide it.
4. `p` is of no more than the bar. All questions of a run are one family (`family`, Holm); a verdict that does not
   survive that says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats as st
from scipy.integrate import trapezoid

from relearn_lens.analysis.claims import verdict_of
from relearn_lens.analysis.intervals import (
    FEWEST_SEEDS,
    Estimate,
    Numbers,
    beside_control,
    holm,
    over_seeds,
    same_end,
)

Answer = Literal["supported", "not supported", "reversed", "inconclusive", "undecided"]


class Rule(NamedTuple):
    """A number that verdicts rest on, fixed before any run."""

    value: float
    why: str


RULES: dict[str, Rule] = {
    "level": Rule(0.95, "the level of every interval, and of the family of questions; the field's habit"),
    "seeds": Rule(float(FEWEST_SEEDS), "with two seeds Student's t is 12.7, and with one there is no spread"),
    "draws": Rule(4, "four draws per seed give the null nine degrees of freedom; one would rest on two"),
    "specific": Rule(
        0.25,
        "a quarter of the base margin more than from bystanders, beyond what random sets do; less, F1 hardly shows",
    ),
    "dissociates": Rule(
        0.25, "each set must cost its own concept so much more than the other set does; the same quarter"
    ),
    "returns": Rule(0.5, "more of what was lost is back than is missing; the steps to 90 % stand beside it"),
    "sooner": Rule(0.05, "mean lead over the twin in base margins: an arm that is 10 % ahead for half of the way"),
    "enough": Rule(0.5, "a part alone brings back more than it leaves out"),
    "needed": Rule(0.5, "without the part more is lost than is left"),
    "same": Rule(0.5, "cutting the old neurons again takes more of the return than it leaves"),
    "primed": Rule(0.05, "a rank correlation of .05 explains a four-hundredth of who takes over; less is nothing"),
    "mixed": Rule(0.05, "one heir of twenty more than in the control arm"),
}
"""Bars and levels. Shares are of the base margin, or of the damage where the question is about return."""


@dataclass(frozen=True)
class Question:
    """A question about a run, and its answer."""

    key: str
    asks: str
    verdict: Answer
    says: str
    """One sentence: the numbers behind the verdict, the control among them."""
    number: Estimate | None
    """What was measured, less its control where there is one; positive in the direction of the question."""
    control: Estimate | None
    """The same measurement in the control."""
    bar: float
    """The smallest number that counts."""
    decide: str
    """What would decide it; empty where it is decided."""
    p: float | None = None
    """Of no more than the bar, two-sided; not corrected."""
    p_holm: float | None = None
    """Corrected for the family of questions."""
    beside: Mapping[str, float | str] = field(default_factory=dict)
    """Further numbers that are shown and give no verdict."""

    @property
    def falls_to_holm(self) -> bool:
        """Whether the verdict holds by itself, and not among the questions of its family."""
        return self.verdict in ("supported", "reversed") and (self.p_holm or 0.0) > 1 - RULES["level"].value + 1e-12


def family(questions: Sequence[Question]) -> list[Question]:
    """The questions with p-values corrected together (Holm); a verdict that does not survive that says so."""
    tested = [i for i, each in enumerate(questions) if each.p is not None]
    corrected = list(questions)
    for i, p in zip(tested, holm([questions[i].p or 0.0 for i in tested]), strict=True):
        one = replace(corrected[i], p_holm=p)
        if one.falls_to_holm:
            but = f"; it does not survive Holm's correction for {len(tested)} questions (p = {p:.2g})."
            one = replace(one, says=one.says.removesuffix(".") + but, decide=_MORE_SEEDS)
        corrected[i] = one
    return corrected


_MORE_SEEDS = "more training seeds"
_MORE_DRAWS = f"more training seeds, or control draws ({RULES['draws'].value:.0f} per seed and more)"


@dataclass(frozen=True)
class Outcome:
    """How well a model does on the words of one label."""

    margin: float
    """Logits, or nats for a language model; mean over the label's words."""
    f1: float | None = None
    """Strict span F1, 0 to 1; None for a language model."""


# --- was the cut specific?


@dataclass(frozen=True)
class Cuts:
    """One seed's model, whole and with sets of neurons cut; each state is outcomes by label."""

    seed: int
    base: Mapping[str, Outcome]
    own: Mapping[str, Outcome]
    """The concept's neurons cut."""
    other: Mapping[str, Outcome] | None
    """The other concept's neurons cut, as many and disjoint; None where there is no other concept."""
    random: Sequence[Mapping[str, Outcome]]
    """Random sets with as many neurons per layer: exchangeable with the concept's if that is nothing special."""
    disjoint: Sequence[Mapping[str, Outcome]] = ()
    """The same, of neurons that are not the concept's."""
    scaled: Sequence[Mapping[str, Outcome]] = ()
    """Random sets whose activations are as large: a cut of large neurons costs more, whatever they carry."""


def specific(seeds: Sequence[Cuts], concept: str, other: str | None) -> Question:
    """Whether the cut took the concept and left the bystanders, beyond what random sets do, and the other way round.

    Per seed the share of its base margin that the concept loses, less the mean share that the bystanders (all other
    labels) lose; own set against layer-matched random sets. Supported only with the double dissociation: each of the
    two sets costs its own concept more than the other set does.

    Raises:
        ValueError: a seed without random sets, or a state without a label of the base.
    """
    key, asks, bar = "specific", f"Was the cut specific to {concept!r}?", RULES["specific"].value
    for each in seeds:
        states = [each.own, *each.random, *each.disjoint, *each.scaled, *([each.other] if each.other else [])]
        if not each.random or any(set(each.base) - set(state) for state in states) or concept not in each.base:
            raise ValueError(
                f"specific needs random sets and every label of the base in every state, found {len(each.random)} "
                f"random sets and labels {', '.join(each.base)} in seed {each.seed}; measure them for {concept!r}"
            )
    if few := _few(key, asks, bar, len(seeds)):
        return few
    if min(one.margin for each in seeds for one in each.base.values()) <= 0:
        return _undecided(key, asks, bar, "a base model has no margin on a label", "longer fine-tuning, or more text")

    def selective(each: Cuts, state: Mapping[str, Outcome]) -> float:
        rest = [_lost(each.base, state, label) for label in each.base if label != concept]
        return _lost(each.base, state, concept) - float(np.mean(rest or [0.0]))

    f1 = [[state[concept].f1 for state in (each.own, *each.random)] for each in seeds]
    if all(value is not None for row in f1 for value in row) and same_end(
        [row[0] or 0.0 for row in f1], [v or 0.0 for row in f1 for v in row[1:]]
    ):
        return _undecided(
            key, asks, bar, "after the cut the concept's F1 is at the same end as after random cuts",
            "a smaller cut, or a larger one where nothing was lost",
        )  # fmt: skip
    ours = [selective(each, each.own) for each in seeds]
    theirs = [[selective(each, state) for state in each.random] for each in seeds]
    test = _against(ours, theirs, bar)
    beside: dict[str, float | str] = {"concept lost": float(np.mean([_lost(s.base, s.own, concept) for s in seeds]))}
    others = {
        name: [selective(each, state) for each in seeds for state in getattr(each, name)]
        for name in ("disjoint", "scaled")
    }
    beside |= {f"{name} random sets": float(np.mean(sets)) for name, sets in others.items() if sets}
    says = (
        f"The cut took {beside['concept lost']:.0%} of the margin of {concept!r}, {np.mean(ours):+.0%} against "
        f"bystanders; random sets {np.mean(np.concatenate(theirs)):+.0%}"
    )
    if other is None or any(each.other is None for each in seeds):
        answer = _answer(key, asks, says, test, bar, _MORE_DRAWS, beside)
        if answer.verdict != "supported":
            return answer
        why = f"{says}; without a second concept's set the dissociation is single."
        return replace(answer, verdict="undecided", says=why, p=None, decide="a second concept with 30 spans or more")

    def apart(each: Cuts) -> float:
        theirs = each.other or {}
        return min(
            _lost(each.base, each.own, concept) - _lost(each.base, theirs, concept),
            _lost(each.base, theirs, other) - _lost(each.base, each.own, other),
        )

    double = _over([apart(each) for each in seeds], RULES["dissociates"].value)
    beside["double dissociation"] = double.effect.value
    says += f"; each of the two sets costs its own concept {double.effect.value:+.0%} more than the other set does"
    return _answer(key, asks, says, _both(test, double), bar, _MORE_DRAWS, beside)


def _lost(base: Mapping[str, Outcome], state: Mapping[str, Outcome], label: str) -> float:
    """Share of its base margin that a label loses."""
    return 1 - state[label].margin / base[label].margin


# --- does it come back, and how fast?


@dataclass(frozen=True)
class Curve:
    """One arm of one seed through retraining."""

    steps: Sequence[int]
    """Of training, increasing; the first is 0, right after the cut."""
    margin: Sequence[float]
    f1: Sequence[float] = ()

    def __post_init__(self) -> None:
        if len(self.steps) < 2 or len(self.steps) != len(self.margin) or self.steps[0] or min(np.diff(self.steps)) <= 0:
            raise ValueError(
                f"a curve needs increasing steps from 0 on with a margin at each, got {len(self.steps)} steps "
                f"{list(self.steps)[:4]} and {len(self.margin)} margins"
            )


@dataclass(frozen=True)
class Back:
    """One seed's return."""

    seed: int
    base: Outcome
    concept: Curve
    never: Curve | None = None
    """The twin that never had the concept, cut and trained alike."""
    unpruned: Curve | None = None
    """Training alone: what there is to be had."""


@dataclass(frozen=True)
class Steps:
    """Steps until a share of the base margin was there, linear between measurements."""

    share: float
    steps: float
    """The last step that was measured where it was not reached."""
    reached: bool

    def __str__(self) -> str:
        return f"{self.steps:.0f}" if self.reached else f"> {self.steps:.0f}"


def steps_to(curve: Curve, base_margin: float, share: float) -> Steps:
    """When a curve first has so much of a base margin; a level that is not reached is censored, "> N"."""
    target, margin = share * base_margin, np.asarray(curve.margin, dtype=float)
    above = margin >= target - 1e-9
    if not above.any():
        return Steps(share, float(curve.steps[-1]), False)
    k = int(above.argmax())
    if k == 0:
        return Steps(share, 0.0, True)
    part = (target - margin[k - 1]) / (margin[k] - margin[k - 1])
    return Steps(share, float(curve.steps[k - 1] + part * (curve.steps[k] - curve.steps[k - 1])), True)


def saved(concept: Steps, never: Steps) -> tuple[float, str] | None:
    """How many times sooner than the twin, and whether that is exact ("="), at least (">=") or at most ("<=") so.

    None where neither gets there, or the concept arm is there at once.
    """
    if not (concept.reached or never.reached) or concept.steps <= 0:
        return None
    bound = "=" if concept.reached and never.reached else (">=" if concept.reached else "<=")
    return never.steps / concept.steps, bound


def returns(seeds: Sequence[Back]) -> Question:
    """Whether the concept comes back: the share of the lost margin that is there at the last step.

    Of what training alone gives at that step (the unpruned arm) where that was measured, else of the base.
    """
    key, asks, bar = "returns", "Does the concept come back?", RULES["returns"].value
    if few := _few(key, asks, bar, len(seeds)):
        return few
    start, end = ([each.concept.margin[k] for each in seeds] for k in (0, -1))
    had = [each.unpruned.margin[-1] if each.unpruned else each.base.margin for each in seeds]
    if refused := _within_noise(key, asks, bar, np.subtract([s.base.margin for s in seeds], start), "the damage"):
        return refused
    if refused := _within_noise(key, asks, bar, np.subtract(had, start), "what there is to come back"):
        return refused
    test = _over((np.subtract(end, start) / np.subtract(had, start)).tolist(), bar)
    beside = {
        f"steps to {share:.0%}": ", ".join(str(steps_to(one.concept, one.base.margin, share)) for one in seeds)
        for share in (0.5, 0.9)
    }
    says = (
        f"{test.effect.value:.0%} of the lost margin is back after {seeds[0].concept.steps[-1]} steps; half of the "
        f"base margin after {beside['steps to 50%']} and 90 % after {beside['steps to 90%']} steps"
    )
    return _answer(key, asks, says, test, bar, "more training seeds, or longer retraining", beside)


def sooner(seeds: Sequence[Back]) -> Question:
    """Whether the concept comes back sooner than the never twin learns it: relearning, or learning.

    Per seed the mean of the margin over the steps that both curves have, on the scale of doublings on which they are
    measured (in steps, the plateau would drown the return), concept less never, in base margins.
    """
    key, bar = "sooner", RULES["sooner"].value
    asks = "Does it come back sooner than a twin that never had it learns it?"
    if any(each.never is None for each in seeds):
        return _undecided(key, asks, bar, "there is no never twin", "the never arm")
    if few := _few(key, asks, bar, len(seeds)):
        return few
    damage = [each.base.margin - each.concept.margin[0] for each in seeds]
    if refused := _within_noise(key, asks, bar, damage, "the damage"):
        return refused
    ours, theirs, common = [], [], 0
    for each in seeds:
        assert each.never is not None
        steps = sorted(set(each.concept.steps) & set(each.never.steps))
        common = steps[-1]
        if len(steps) < 2:
            return _undecided(key, asks, bar, "the two arms share no step after the cut", "the same steps in both arms")
        areas = [_mean_margin(curve, steps) / each.base.margin for curve in (each.concept, each.never)]
        ours.append(areas[0])
        theirs.append(areas[1])
    if same_end(ours, theirs, low=-math.inf):
        return _undecided(
            key, asks, bar, "both arms have all of the base margin from the first steps on",
            "measurements at earlier steps, or a lower learning rate",
        )  # fmt: skip
    test = _over(np.subtract(ours, theirs).tolist(), bar)
    beside: dict[str, float | str] = {}
    for share in (0.5, 0.9):
        pairs = [
            (steps_to(s.concept, s.base.margin, share), steps_to(s.never or s.concept, s.base.margin, share))
            for s in seeds
        ]
        beside[f"steps to {share:.0%}"] = ", ".join(f"{a} against {b}" for a, b in pairs)
        beside[f"savings at {share:.0%}"] = ", ".join(
            "none" if ratio is None else f"{ratio[1]} {ratio[0]:.1f} x" for ratio in itertools.starmap(saved, pairs)
        )
    says = (
        f"Over the {common} steps that both have, the margin is {np.mean(ours):.0%} of base in the concept arm and "
        f"{np.mean(theirs):.0%} in the never twin (steps to 90 %: {beside['steps to 90%']})"
    )
    answer = _answer(key, asks, says, test, bar, "more training seeds, or more steps between 0 and 90 %", beside)
    return replace(answer, control=over_seeds(theirs, level=RULES["level"].value))


def _mean_margin(curve: Curve, steps: Sequence[int]) -> float:
    at = dict(zip(curve.steps, curve.margin, strict=True))
    when = np.log2(1 + np.asarray(steps, dtype=float))
    return float(trapezoid([at[step] for step in steps], when) / (when[-1] - when[0]))


# --- where?


@dataclass(frozen=True)
class Grafts:
    """Margins of one seed's grafts at one checkpoint, by part of the model."""

    seed: int
    cut: float
    retrained: float
    alone: Mapping[str, float]
    """The cut model with that part of the retrained one."""
    reverted: Mapping[str, float]
    """The retrained model with that part as it was after the cut."""
    controls: Mapping[str, Mapping[str, float]]
    """By kind (such as the random and the unpruned arm's change added to the cut model): graft alone, by part."""

    def share(self, margin: float) -> float:
        """Of what came back."""
        return (margin - self.cut) / (self.retrained - self.cut)


def where(seeds: Sequence[Grafts], at: str = "") -> Question:
    """Whether the return sits in one part of the model: enough alone, and needed. `at` names the checkpoint.

    enough = (graft - cut) / (retrained - cut), needed = (retrained - revert) / (retrained - cut). The part named is the
    one that is enough most, mean over seeds; to pay for having chosen it, its control is the highest control graft of
    any part, in each kind and seed.

    Raises:
        ValueError: seeds of different parts, or without control grafts.
    """
    key = f"where {at}".strip()
    asks, bar = f"Does the return sit in one part{', ' + at if at else ''}?", RULES["enough"].value
    parts = list(seeds[0].alone) if seeds else []
    for each in seeds:
        tables = [each.alone, each.reverted, *each.controls.values()]
        if not each.controls or not parts or any(set(table) != set(parts) for table in tables):
            raise ValueError(
                f"where needs the same parts in every table and at least one kind of control graft, found parts "
                f"{', '.join(parts) or 'none'} and controls {', '.join(each.controls) or 'none'} in seed {each.seed}"
            )
    if few := _few(key, asks, bar, len(seeds)):
        return few
    if refused := _within_noise(key, asks, bar, [s.retrained - s.cut for s in seeds], "what came back"):
        return refused
    enough = {part: [s.share(s.alone[part]) for s in seeds] for part in parts}
    needed = {part: [1 - s.share(s.reverted[part]) for s in seeds] for part in parts}
    part = max(parts, key=lambda name: float(np.mean(enough[name])))
    control = [[s.share(max(table.values())) for table in s.controls.values()] for s in seeds]
    alone, without = _against(enough[part], control, bar), _over(needed[part], RULES["needed"].value)
    says = (
        f"{part} alone brings back {np.mean(enough[part]):.0%} (control grafts at most {np.mean(control):.0%}), and "
        f"without it {np.mean(needed[part]):.0%} is lost"
    )
    says += {
        ("supported", "supported"): f": it sits in {part}",
        ("supported", "not supported"): f": {part} is enough, and not needed",
        ("not supported", "supported"): f": no part is enough, and {part} is needed",
    }.get((alone.verdict, verdict_of(without.effect, bar)), "")
    beside = {
        f"{name} {kind}": float(np.mean(t[name]))
        for name in parts
        for kind, t in (("enough", enough), ("needed", needed))
    }
    decide = "more training seeds, or a finer cut into parts"
    return _answer(key, asks, says, _both(alone, without), bar, decide, beside)


# --- in the same neurons, or others?


@dataclass(frozen=True)
class Again:
    """One seed's second cut, at the end of retraining."""

    seed: int
    cut: float
    """Margin right after the first cut."""
    retrained: float
    again: float
    """Margin with the first cut's own neurons cut again."""
    random: Sequence[float]
    """Margins with random sets cut, as many per layer."""
    old: float | None = None
    """Share of the first cut's neurons among those that the same rule finds now."""
    old_by_chance: float | None = None


def same(seeds: Sequence[Again]) -> Question:
    """Whether the concept came back in the neurons that were cut: what cutting them again takes of the return."""
    key, asks, bar = "same", "Did it come back in the same neurons?", RULES["same"].value
    if few := _few(key, asks, bar, len(seeds)):
        return few
    if any(not each.random for each in seeds):
        return _undecided(key, asks, bar, "there are no random sets to cut at the end", "random sets cut at the end")
    if refused := _within_noise(key, asks, bar, [s.retrained - s.cut for s in seeds], "what came back"):
        return refused

    def taken(each: Again, margin: float) -> float:
        return (each.retrained - margin) / (each.retrained - each.cut)

    ours = [taken(each, each.again) for each in seeds]
    theirs = [[taken(each, margin) for margin in each.random] for each in seeds]
    test = _against(ours, theirs, bar)
    says = (
        f"Cutting the old neurons again takes {np.mean(ours):.0%} of what came back, random sets "
        f"{np.mean(np.concatenate(theirs)):.0%}"
    )
    beside: dict[str, float | str] = {}
    old = [(each.old, each.old_by_chance) for each in seeds if each.old is not None]
    if old:
        beside["old neurons found again"] = float(np.mean([share for share, _ in old]))
        says += f"; {beside['old neurons found again']:.0%} of the neurons found now are old ones"
        chance = [share for _, share in old if share is not None]
        if chance:
            beside["by chance"] = float(np.mean(chance))
            says += f" ({beside['by chance']:.0%} by chance)"
    says += {"supported": ": the same neurons", "not supported": ": others"}.get(test.verdict, "")
    return _answer(key, asks, says, test, bar, _MORE_DRAWS, beside)


# --- were the heirs primed, and do they mix meanings?


@dataclass(frozen=True)
class Heirs:
    """One number per arm of one seed, over the neurons that survive in all of them."""

    seed: int
    concept: float
    random: float | None = None
    unpruned: float | None = None


def primed(seeds: Sequence[Heirs]) -> Question:
    """Whether the neurons that gained saliency were near the concept before.

    The numbers are partial rank correlations within layers of nearness before and saliency after, given saliency before
    (`evidence.predicted`): what remains is not persistence. The control arms that there are stand beside it, pooled.
    """
    return _beyond_arms(
        "primed", "Were the neurons that took over near the concept before?", "The partial rank correlation is", seeds
    )


def mixed(seeds: Sequence[Heirs]) -> Question:
    """Whether heirs mix meanings: the share that keeps an old top word and gained one of the concept's
    (`evidence.mixed`). The control arms that there are stand beside it, pooled."""
    return _beyond_arms("mixed", "Do the heirs mix old and new meanings?", "The share of heirs that mix is", seeds)


def _beyond_arms(key: str, asks: str, what: str, seeds: Sequence[Heirs]) -> Question:
    bar = RULES[key].value
    if few := _few(key, asks, bar, len(seeds)):
        return few
    ours = [each.concept for each in seeds]
    arms = {name: [getattr(each, name) for each in seeds] for name in ("random", "unpruned")}
    arms = {name: values for name, values in arms.items() if all(value is not None for value in values)}
    if not arms:
        return _undecided(key, asks, bar, "there is no control arm", "a random or an unpruned arm")
    if not np.isfinite([*ours, *(v for values in arms.values() for v in values)]).all():
        return _undecided(key, asks, bar, "it is not defined in some arm", "a larger probe corpus, or a smaller cut")
    # Pooled by seed, what the arms differ by widens the interval: far enough out is beyond each of them.
    test = _against(ours, list(zip(*arms.values(), strict=True)), bar)
    beside = ", ".join(f"{np.mean(values):.3f} in the {name} arm" for name, values in arms.items())
    says = f"{what} {np.mean(ours):.3f} in the concept arm, {beside}"
    return _answer(key, asks, says, test, bar, _MORE_SEEDS, {name: float(np.mean(v)) for name, v in arms.items()})


# --- the rule


class _Test(NamedTuple):
    effect: Estimate
    control: Estimate | None
    verdict: Answer
    p: float | None


def _against(ours: Sequence[float], control: Sequence[Sequence[float]], bar: float) -> _Test:
    """Ours beside control values, by seed."""
    level = RULES["level"].value
    means = over_seeds([float(np.mean(values)) for values in control], level=level)
    return _tested(lambda shift: beside_control(np.subtract(ours, shift).tolist(), control, level).effect, means, bar)


def _over(values: Sequence[float], bar: float) -> _Test:
    """The mean of a number per seed, by Student's t."""
    level = RULES["level"].value

    def effect(shift: float) -> Estimate:
        mean = over_seeds(np.subtract(values, shift), level=level)
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        if mean.interval is None or error <= 1e-9 * max(1.0, float(np.abs(values).max())):
            return Estimate(mean.value, math.nan, math.nan, f"{len(values)} seeds without any spread", n=mean.n)
        return replace(mean, p=2 * float(st.t.sf(abs(mean.value) / error, len(values) - 1)))

    return _tested(effect, None, bar)


def _tested(effect: Callable[[float], Estimate], control: Estimate | None, bar: float) -> _Test:
    """Verdict and p-value, the latter of an effect no further out than the bar on the side on which it is."""
    gap = effect(0.0)
    p = effect(math.copysign(bar, gap.value)).p if abs(gap.value) > bar else 1.0
    return _Test(gap, control, verdict_of(gap, bar), None if gap.interval is None else p)


def _both(first: _Test, second: _Test) -> _Test:
    """Of two tests that must both hold (intersection-union, so neither is corrected for the other): the number is that
    of the one that decides, the first's where both hold."""
    known = [each.p for each in (first, second)]
    p = None if None in known else max(one or 0.0 for one in known)
    if first.verdict == second.verdict:
        return first._replace(p=p)
    refuting = [each for each in (first, second) if each.verdict in ("not supported", "reversed")]
    if refuting:
        return refuting[0]._replace(verdict="not supported", p=p)
    return next(each for each in (first, second) if each.verdict == "inconclusive")._replace(p=p)


def _answer(
    key: str, asks: str, says: str, test: _Test, bar: float, decide: str, beside: Mapping[str, float | str]
) -> Question:
    """The question with its verdict."""
    effect, verdict = test.effect, test.verdict
    if effect.interval is None:
        verdict, reach = "undecided", f" ({effect.over}: no interval)"
    else:
        reach = f" ({effect}, Student's t, {effect.over})"
    return Question(
        key, asks, verdict, f"{says}{reach}.", effect, test.control, bar,
        decide if verdict in ("inconclusive", "undecided") else "", test.p, None, beside,
    )  # fmt: skip


def _undecided(key: str, asks: str, bar: float, why: str, decide: str) -> Question:
    return Question(key, asks, "undecided", f"Undecided: {why}.", None, None, bar, decide)


def _few(key: str, asks: str, bar: float, n: int) -> Question | None:
    """Undecided for want of seeds, or None."""
    if n >= RULES["seeds"].value:
        return None
    return _undecided(
        key, asks, bar, f"{n} training seed{'s' * (n != 1)} cannot tell it from training noise", "three seeds"
    )


def _within_noise(key: str, asks: str, bar: float, values: Numbers, what: str) -> Question | None:
    """Undecided where a denominator is not above 0 beyond noise, or None."""
    each = np.asarray(values, dtype=float)
    mean = over_seeds(each, level=RULES["level"].value)
    if (each > 0).all() and mean.low > 0:
        return None
    return _undecided(key, asks, bar, f"{what} ({mean}) is within noise", "a larger cut, or more seeds")
