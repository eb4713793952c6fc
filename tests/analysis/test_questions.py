"""Made-up runs whose answers are known, and what each question makes of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from relearn_lens.analysis import questions
from relearn_lens.analysis.intervals import Estimate, holm
from relearn_lens.analysis.questions import Again, Back, Curve, Cuts, Grafts, Heirs, Outcome, Question, Steps
from relearn_lens.files import plain
from tests.benchmarks import power

LABELS = ("place", "person", "people")


def checked(found: Question) -> Question:
    """What holds of every answer."""
    json.dumps(plain(asdict(found)), allow_nan=False)
    assert found.says.endswith(".")
    assert not {"nan", "nan%", "inf", "none"} & set(found.says.lower().replace(",", " ").split())
    assert bool(found.decide) == (found.verdict in ("inconclusive", "undecided"))
    assert found.verdict == "undecided" or found.number is not None
    if found.verdict == "supported":
        assert found.number is not None
        assert found.number.low > found.bar
        assert found.p is not None
        assert found.p < 0.05
    if found.verdict == "not supported":
        assert found.number is not None
        assert found.number.high <= found.bar
        # Those two have two parts that must both hold: one of them may be the other way round.
        assert -found.bar <= found.number.low or found.key.split()[0] in ("specific", "where")
    return found


# --- was the cut specific


def state(seed: int, draw: int = 0, *, f1: float | None = None, **lost: float) -> dict[str, Outcome]:
    """Outcomes of a model whose labels lose these shares of 8 logits, give or take a little."""
    noise = 0.02 * np.random.default_rng([seed, draw]).normal(size=3)
    return {
        label: Outcome(8 * (1 - lost.get(label, 0.0) - float(jitter)), f1)
        for label, jitter in zip(LABELS, noise, strict=True)
    }


def cuts_of(n: int = 3, own: Any = None, other: Any = None, random: Any = None, **fields: Any) -> list[Cuts]:
    """Seeds in which the cut is a double dissociation, but for what is said of each set."""
    own, random = own or {"place": 1.2}, random or {}
    other = {"person": 1.2} if other is None else other
    base = {label: Outcome(8.0) for label in LABELS}
    return [
        Cuts(
            s, base, state(s, 1, **own), state(s, 2, **other) if other else None,
            [state(s, 10 + k, **random) for k in range(4)], **fields,
        )
        for s in range(n)
    ]  # fmt: skip


def specific(seeds: Sequence[Cuts], other: str | None = "person") -> Question:
    return checked(questions.specific(seeds, "place", other))


def test_double_dissociation_beyond_random_sets_is_specific():
    found = specific(cuts_of())
    assert found.verdict == "supported"
    assert found.number is not None
    assert found.number.value == pytest.approx(1.2, abs=0.05)
    assert found.control is not None
    assert found.control.value == pytest.approx(0, abs=0.03)
    assert found.beside["double dissociation"] == pytest.approx(1.2, abs=0.05)
    assert "took 12" in found.says


def test_cut_that_takes_the_bystanders_too_is_not_specific():
    everything = {label: 1.2 for label in LABELS}
    assert specific(cuts_of(own=everything)).verdict == "not supported"


def test_cut_of_bystanders_is_reversed():
    found = specific(cuts_of(own={"person": 1.2, "people": 1.2}, other={"place": 1.2}))
    assert found.verdict == "reversed"


def test_cut_that_random_sets_equal_is_not_specific():
    assert specific(cuts_of(own={"place": 0.5}, random={"place": 0.5})).verdict == "not supported"


def test_single_dissociation_is_not_specific():
    """The other concept's set costs the concept as much as its own does."""
    assert specific(cuts_of(other={"place": 1.2, "person": 1.2})).verdict == "not supported"


def test_specific_without_a_second_concept_is_undecided():
    found = specific(cuts_of(other={}), None)
    assert found.verdict == "undecided"
    assert found.p is None
    assert "second concept" in found.decide
    assert "single" in found.says


def test_random_sets_of_other_kinds_stand_beside_and_give_no_verdict():
    alike = [state(9, k, place=1.2) for k in range(4)]
    found = specific(cuts_of(disjoint=alike, scaled=alike))
    assert found.verdict == "supported"
    assert found.beside["disjoint random sets"] == found.beside["scaled random sets"] == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("f1", [0.0, 1.0])
def test_specific_has_no_verdict_where_all_f1_are_at_one_end(f1):
    seeds = cuts_of()
    ends = [
        replace(s, own=state(s.seed, 1, f1=f1, place=1.2), random=[state(s.seed, k, f1=f1) for k in range(4)])
        for s in seeds
    ]
    found = specific(ends)
    assert found.verdict == "undecided"
    assert "at the same end" in found.says
    apart = [replace(s, own=state(s.seed, 1, f1=1 - f1, place=1.2)) for s in ends]
    assert specific(apart).verdict == "supported"


def test_specific_of_a_base_without_a_margin_is_undecided():
    seeds = [replace(s, base={**s.base, "people": Outcome(-0.1)}) for s in cuts_of()]
    assert "no margin on a label" in specific(seeds).says


def test_specific_needs_random_sets_and_every_label():
    with pytest.raises(ValueError, match="found 0 random sets and labels place, person, people in seed 0"):
        questions.specific([replace(s, random=[]) for s in cuts_of()], "place", None)
    with pytest.raises(ValueError, match="every label of the base in every state"):
        questions.specific([replace(s, own={"place": Outcome(1.0)}) for s in cuts_of()], "place", None)


# --- does it come back, and how fast


STEPS = (0, 1, 2, 4, 8, 16)


def back(seed: int, end: float = 7.5, twin: float | None = 2.0, *, spread: float = 0.1) -> Back:
    """From -2 of 8 logits to `end` by equal parts at each doubling, and so the twin."""
    noise = spread * np.random.default_rng(seed).normal(size=2)

    def curve(last: float) -> Curve:
        return Curve(STEPS, np.linspace(-2, last, len(STEPS)).tolist())

    never = None if twin is None else curve(twin + float(noise[1]))
    return Back(seed, Outcome(8.0), curve(end + float(noise[0])), never)


def test_returns_by_hand():
    found = checked(questions.returns([back(s) for s in range(3)]))
    assert found.verdict == "supported"
    assert found.number is not None
    assert found.number.value == pytest.approx(0.95, abs=0.02)
    assert "is back after 16 steps" in found.says


@pytest.mark.parametrize(("end", "verdict"), [(0.0, "not supported"), (-12.0, "reversed"), (3.0, "inconclusive")])
def test_return_of_little_is_none(end, verdict):
    assert checked(questions.returns([back(s, end) for s in range(3)])).verdict == verdict


def test_return_is_of_what_training_alone_gives():
    seeds = [back(s, 3.5) for s in range(3)]
    assert questions.returns(seeds).verdict == "supported"
    more = [replace(s, unpruned=Curve((0, 16), (8.0, 20.0))) for s in seeds]
    found = checked(questions.returns(more))
    assert found.number is not None
    assert found.number.value == pytest.approx(0.25, abs=0.02)
    assert found.verdict == "not supported"


def test_return_without_damage_is_undecided():
    flat = [Back(s, Outcome(8.0), Curve((0, 4), (8.0 + 0.1 * (-1) ** s, 8.0))) for s in range(3)]
    for ask in (questions.returns, questions.sooner):
        found = checked(ask([replace(each, never=each.concept) for each in flat]))
        assert found.verdict == "undecided"
        assert "within noise" in found.says


def test_relearning_that_is_ahead_of_the_twin_is_sooner():
    found = checked(questions.sooner([back(s) for s in range(3)]))
    assert found.verdict == "supported"
    assert found.number is not None
    # Lines over nearly equal doublings: half of the 5.5 logits between their ends, of 8.
    assert found.number.value == pytest.approx(0.34, abs=0.04)
    assert found.beside["savings at 90%"] == ", ".join([str(found.beside["savings at 90%"]).split(", ")[0]] * 3)
    assert "> 16" in str(found.beside["steps to 90%"])
    assert ">=" in str(found.beside["savings at 90%"])
    assert checked(
        questions.sooner([replace(s, concept=s.never, never=s.concept) for s in map(back, range(3))])
    ).verdict == ("reversed")


def test_learning_as_fast_as_the_twin_is_no_savings():
    assert checked(questions.sooner([back(s, 5.0, 5.0) for s in range(3)])).verdict == "not supported"


def test_sooner_needs_a_twin_and_common_steps():
    assert "never arm" in checked(questions.sooner([back(s, twin=None) for s in range(3)])).decide
    apart = [replace(back(s), never=Curve((0, 3, 5), (-2.0, 0.0, 1.0))) for s in range(3)]
    assert "share no step after the cut" in checked(questions.sooner(apart)).says


def test_sooner_has_no_verdict_where_both_arms_are_there_at_once():
    there = Curve((0, 1, 16), (7.9, 7.95, 8.0))
    seeds = [Back(s, Outcome(8.0 + 0.01 * s), there, there) for s in range(3)]
    found = checked(questions.sooner(seeds))
    assert found.verdict == "undecided"
    assert "from the first steps on" in found.says


def test_area_is_over_the_steps_that_both_have():
    seeds = [replace(back(s), never=Curve((0, 1, 2, 4), (-2.0, -1.9, -1.8, -1.7 + 0.01 * s))) for s in range(3)]
    assert "Over the 4 steps that both have" in checked(questions.sooner(seeds)).says


def test_steps_to_a_share_by_hand():
    curve = Curve((0, 2, 4), (0.0, 4.0, 6.0))
    assert questions.steps_to(curve, 8.0, 0.5) == Steps(0.5, 2.0, True)
    assert questions.steps_to(curve, 8.0, 0.25) == Steps(0.25, 1.0, True)
    assert str(questions.steps_to(curve, 8.0, 0.9)) == "> 4"
    assert questions.steps_to(curve, -8.0, 0.5) == Steps(0.5, 0.0, True)


def test_savings_of_a_censored_twin_are_a_lower_bound():
    here, never, there = Steps(0.9, 8.0, True), Steps(0.9, 64.0, False), Steps(0.9, 16.0, True)
    assert questions.saved(here, there) == (2.0, "=")
    assert questions.saved(here, never) == (8.0, ">=")
    assert questions.saved(never, there) == (0.25, "<=")
    assert questions.saved(never, never) is None
    assert questions.saved(Steps(0.5, 0.0, True), there) is None


@pytest.mark.parametrize(
    ("steps", "margin"), [((1, 2), (0.0, 1.0)), ((0,), (0.0,)), ((0, 2, 2), (0.0,) * 3), ((0, 1), (0.0,))]
)
def test_curve_needs_increasing_steps_from_the_cut_on(steps, margin):
    with pytest.raises(ValueError, match="increasing steps from 0 on with a margin at each"):
        Curve(steps, margin)


# --- where


PARTS = ("embed", "4", "5", "head")


def grafts(seed: int, enough: float, needed: float, *, control: float = 0.0) -> Grafts:
    """From -2 to 8 logits; part 5 alone brings back so much, and so much is lost without it."""
    rng = np.random.default_rng(seed)

    def table(five: float, others: float) -> dict[str, float]:
        return {p: -2 + 10 * ((five if p == "5" else others) + 0.02 * float(rng.normal())) for p in PARTS}

    kinds = {kind: table(control, 0.0) for kind in ("random", "unpruned")}
    return Grafts(seed, -2.0, 8.0, table(enough, 0.0), table(1 - needed, 1.0), kinds)


@pytest.mark.parametrize(
    ("enough", "needed", "verdict", "says"),
    [
        (0.9, 0.9, "supported", "it sits in 5"),
        (0.9, 0.1, "not supported", "5 is enough, and not needed"),
        (0.1, 0.9, "not supported", "no part is enough, and 5 is needed"),
        (0.1, 0.1, "not supported", "5 alone brings back"),
        (0.5, 0.9, "inconclusive", "5 alone brings back"),
    ],
)
def test_return_sits_only_where_a_part_is_enough_and_needed(enough, needed, verdict, says):
    found = checked(questions.where([grafts(s, enough, needed) for s in range(3)], "at the end"))
    assert (found.verdict, found.key) == (verdict, "where at the end")
    assert says in found.says
    assert ("it sits in" in found.says) == (verdict == "supported")
    assert found.beside["5 needed"] == pytest.approx(needed, abs=0.05)


def test_graft_that_any_change_equals_is_no_place():
    """A control graft of that part does as much: the part is enough for anything."""
    assert questions.where([grafts(s, 0.9, 0.9, control=0.9) for s in range(3)]).verdict == "not supported"


def test_where_is_refused_where_what_came_back_is_within_noise():
    seeds = [replace(grafts(s, 0.9, 0.9), retrained=-2 + 0.1 * (-1) ** s) for s in range(3)]
    found = checked(questions.where(seeds))
    assert found.verdict == "undecided"
    assert "what came back" in found.says


def test_where_needs_the_same_parts_everywhere_and_a_control():
    one = grafts(0, 0.9, 0.9)
    with pytest.raises(ValueError, match="found parts embed, 4, 5, head and controls none in seed 0"):
        questions.where([replace(one, controls={})])
    with pytest.raises(ValueError, match="the same parts in every table"):
        questions.where([replace(one, reverted={"5": 1.0})])


# --- the same neurons


def again(seed: int, taken: float, random: float = 0.0, **fields: Any) -> Again:
    noise = 0.1 * np.random.default_rng(seed).normal(size=5)
    margins = (8 - 10 * random + noise[1:]).tolist()
    return Again(seed, -2.0, 8.0, 8 - 10 * taken + float(noise[0]), margins, **fields)


@pytest.mark.parametrize(
    ("taken", "random", "verdict"),
    [(1.0, 0.0, "supported"), (0.05, 0.0, "not supported"), (0.9, 0.9, "not supported"), (0.5, 0.0, "inconclusive")],
)
def test_same_neurons_are_those_whose_second_cut_takes_the_return(taken, random, verdict):
    found = checked(questions.same([again(s, taken, random, old=0.4, old_by_chance=0.05) for s in range(3)]))
    assert found.verdict == verdict
    assert "40% of the neurons found now are old ones (5% by chance)" in found.says
    assert (": the same neurons" in found.says) == (verdict == "supported")


def test_same_needs_random_sets_and_a_return():
    found = checked(questions.same([replace(again(s, 1.0), random=[]) for s in range(3)]))
    assert "random sets cut at the end" in found.decide
    found = checked(questions.same([replace(again(s, 1.0), retrained=-2.0) for s in range(3)]))
    assert "within noise" in found.says


# --- heirs


@pytest.mark.parametrize("ask", [questions.primed, questions.mixed])
def test_heirs_are_primed_or_mixed_only_beyond_every_control_arm(ask):
    def heirs(concept: float, random: float | None, unpruned: float | None) -> Question:
        def at(value: float | None, wobble: float) -> float | None:
            return None if value is None else value + wobble

        seeds = [
            Heirs(s, concept + w, at(random, -w / 2), at(unpruned, w / 3)) for s, w in enumerate((0.0, 0.01, -0.01))
        ]
        return checked(ask(seeds))

    assert heirs(0.5, 0.1, 0.1).verdict == "supported"
    assert heirs(0.1, 0.5, 0.5).verdict == "reversed"
    assert heirs(0.5, 0.1, None).verdict == "supported"
    assert heirs(0.1, 0.09, 0.1).verdict == "not supported"
    assert heirs(0.5, 0.0, 0.5).verdict == "inconclusive"  # the unpruned arm shows the same
    assert "no control arm" in heirs(0.5, None, None).says
    assert "not defined" in heirs(float("nan"), 0.1, 0.1).says


# --- the family


EVERY: dict[str, Any] = {
    "specific": lambda n: questions.specific(cuts_of(n), "place", "person"),
    "returns": lambda n: questions.returns([back(s) for s in range(n)]),
    "sooner": lambda n: questions.sooner([back(s) for s in range(n)]),
    "where": lambda n: questions.where([grafts(s, 0.9, 0.9) for s in range(n)]),
    "same": lambda n: questions.same([again(s, 1.0) for s in range(n)]),
    "primed": lambda n: questions.primed([Heirs(s, 0.5 + 0.01 * s, 0.1, 0.11) for s in range(n)]),
    "mixed": lambda n: questions.mixed([Heirs(s, 0.5 + 0.01 * s, 0.1, 0.11) for s in range(n)]),
}


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("n", [1, 2])
def test_question_of_few_seeds_is_undecided(key, n):
    found = checked(EVERY[key](n))
    assert (found.key, found.verdict, found.decide) == (key, "undecided", "three seeds")
    assert f"{n} training seed" in found.says
    assert checked(EVERY[key](3)).verdict == "supported"


def asked(p: float | None, verdict: Any = "supported") -> Question:
    return Question("q", "?", verdict, "Seen.", Estimate(1.0, 0.5, 1.5, "3 seeds"), None, 0.1, "", p)


def test_verdict_that_does_not_survive_the_family_says_so():
    found = questions.family(
        [asked(0.001), asked(0.03), asked(0.04), asked(0.9, "inconclusive"), asked(None, "undecided")]
    )
    assert [each.p_holm for each in found] == [*holm([0.001, 0.03, 0.04, 0.9]), None]
    assert found[0].says == "Seen."
    for each in found[1:3]:
        assert each.says == "Seen; it does not survive Holm's correction for 4 questions (p = 0.09)."
        assert each.decide == "more training seeds"
    assert found[3].says == found[4].says == "Seen."


def test_p_is_of_no_more_than_the_bar():
    """Far from 0 and at the bar is no evidence of more than the bar."""
    at_bar = questions.returns([back(s, 3.0) for s in range(3)])
    assert at_bar.number is not None
    assert at_bar.number.excludes(0)
    assert at_bar.p is not None
    assert at_bar.p > 0.05


def test_every_rule_says_why_it_is_what_it_is():
    for name, rule in questions.RULES.items():
        assert len(rule.why) > 20, name
        assert rule.value > 0


@pytest.mark.parametrize("row", [row for row in power.ROWS if row.name.endswith("?")], ids=lambda row: row.name)
def test_question_told_of_an_effect_at_its_bar_is_as_rare_as_the_level(row):
    """A small version of the benchmark, which has the power too."""
    found = power.rates(row, row.controls[-1], 40)
    assert not found.too_many
    assert found.hits > found.alarms
