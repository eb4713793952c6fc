"""Made-up runs in which each claim is true, false, the other way round or not to be known, and what is said of it."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from scipy import stats as st

from relearn_lens.analysis import claims as module
from relearn_lens.analysis.claims import Claim, claims, verdict_of
from relearn_lens.analysis.evidence import Evidence
from relearn_lens.analysis.intervals import Estimate, beside_control, holm, same_end
from relearn_lens.files import plain
from relearn_lens.measure.evaluation import SpanScores, TokenLoss
from relearn_lens.measure.topwords import TopWords
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.neurons.sites import Neurons, Site
from tests.analysis.test_story import LABEL, scores_of, trajectory

MAKE = {
    "C1": module._collapse, "C2": module._returns, "C3a": module._random_costs_more, "C3b": module._random_is_slower,
    "C4": module._late_before, "C5 unmatched": module._earlier_as_published, "C5 matched": module._earlier_matched,
    "C6": module._early_layers_first, "C7": module._primed, "C8": module._mixed, "C9a": module._similarity_by_depth,
    "C9b": module._similarity_by_training,
}  # fmt: skip
LAYERS, STAGES = 5, ("base", "pruned", "1", "2")
DEPTH = torch.linspace(0, 1, LAYERS)[:, None]
F1 = {"concept": (0.9, 0.1, 0.6, 0.88), "random": (0.9, 0.7, 0.8, 0.89)}


def words_of(site: Site, mixed: torch.Tensor) -> TopWords:
    """Every neuron stands for two old words; those that mix gave one up for a word of the concept."""
    shape = mixed.shape
    words = torch.tensor([0, 1]).repeat(*shape, 1)
    words[mixed, 1] = 2
    no = torch.zeros(shape, dtype=torch.bool)
    return TopWords(words, torch.ones(*shape, 2), ("bread", "salt", "Tarn"), no, no, site, 3, 0.1)


def arm_of(
    name: str,
    seed: int,
    f1: Sequence[float | int],
    *,
    width: int = 400,
    slope: float = 2.0,
    fraction: float = 0.3,
    earlier: float = 0.0,
    early_first: float = 0.0,
    primed: float = 0.0,
    mixed: float = 0.5,
    falls: float = 0.0,
    similar: float = 0.7,
    shift: float = 0.0,
) -> Trajectory:
    """One arm in which every claim's truth is an argument; seeds differ by a little noise.

    Scores are `slope` times as high in the last layer as in the first. `earlier`: survivors' scores go to earlier
    layers; `early_first`: early layers gain at the first stage; `primed`: those near the concept gain; `mixed`: share
    of neurons that take a word of the concept in; similarity is `similar`, less `falls` in the last layer.
    """
    both = torch.Generator().manual_seed(seed)  # what the arms of a seed share
    own = torch.Generator().manual_seed(1000 * seed + len(name))

    def rand(generator: torch.Generator = own) -> torch.Tensor:
        return torch.rand(LAYERS, width, generator=generator)

    base = (rand(both) + 0.2) * (1 + (slope - 1) * DEPTH)
    near = 2 * rand(both) - 1
    top = base >= base.flatten().quantile(1 - fraction)
    order = rand().argsort(1).argsort(1)
    mask = top if name == "concept" else order < top.sum(1, keepdim=True)
    cut = base.where(~mask, 0.0)
    heirs = rand() < 0.1  # so that the top changes hands, in all layers alike
    gain = 0.4 + 2.0 * heirs + primed * (near + 1)
    last = (cut * (1 + earlier * (1 - 2 * DEPTH)) + gain).where(~mask, 0.0) * (1 + 0.02 * rand())
    first = (cut + 0.2 * (1 + early_first * (1 - 2 * DEPTH)) * (1 + 0.02 * rand())).where(~mask, 0.0)
    jitter = 0.004 * float(torch.rand(1, generator=own)) * np.arange(len(f1))
    made = trajectory(
        dict(zip(STAGES, (max(0.0, float(v) - float(j)) for v, j in zip(f1, jitter, strict=True)), strict=True)),
        {name: score - shift for name, score in zip(STAGES, (base, cut, first, last), strict=True)},
        removed=mask,
        arm=name,
        seed=seed,
    )
    site = made.site
    now = words_of(site, rand() < mixed)
    meaning = (similar - falls * DEPTH + 0.05 * rand()).clamp(-1, 1)
    ends = {
        "base": replace(made["base"], near_concept=near, words=words_of(site, mask & False), concept_words=("Tarn",)),
        "2": replace(made["2"], words=now, meaning=meaning),
    }
    return replace(made, snapshots={**made.snapshots, **ends})


def arms_of(n: int, concept: Mapping[str, Any] | None = None, random: Mapping[str, Any] | None = None, **both: Any):
    """The concept and the random arm of `n` seeds."""
    given = {"concept": dict(concept or {}), "random": dict(random or {})}
    each: dict[str, Any] = {name: {"f1": F1[name], **both, **given[name]} for name in given}
    return {name: [arm_of(name, seed, **each[name]) for seed in range(n)] for name in given}


def with_shuffles(arms: Mapping[str, Sequence[Trajectory]], n: int = 19) -> dict[str, list[Trajectory]]:
    """The same arms with the score under shuffled labels: the same in every layer."""

    def one(arm: Trajectory) -> Trajectory:
        generator, base = torch.Generator().manual_seed(arm.seed), arm["base"]
        null = [torch.rand(base.saliency.score.shape, generator=generator) for _ in range(n)]
        shuffled = tuple(replace(base.saliency, score=score) for score in null)
        return replace(arm, snapshots={**arm.snapshots, "base": replace(base, shuffled=shuffled)})

    return {name: [one(arm) for arm in side] for name, side in arms.items()}


def sets_of(n: int, f1: float, k: int = 4) -> list[list[SpanScores]]:
    """F1 of random sets, per seed."""
    return [[scores_of(f1 + 0.002 * i + 0.001 * seed) for i in range(k)] for seed in range(n)]


def row(id: str, arms: Mapping[str, Sequence[Trajectory]], random_sets: Any = ()) -> Claim:
    """One row alone: the others take time."""
    found = MAKE[id](Evidence(arms, LABEL, random_sets, 0.95, 100))
    assert found.id == id
    checked(found)
    return found


def checked(claim: Claim) -> None:
    """What holds of every row."""
    json.dumps(plain(asdict(claim)), allow_nan=False)
    for number in (claim.concept, claim.control, claim.p, claim.p_holm, claim.p_flips):
        assert number is None or math.isfinite(number)
    assert claim.effect is None or math.isfinite(claim.effect.value)
    assert claim.why.endswith(".")
    assert not {"nan", "nan%", "inf", "none"} & set(claim.why.lower().replace(",", " ").split())
    assert claim.verdict == verdict_of(claim.effect, claim.bar) or claim.verdict == "inconclusive"
    if claim.verdict in ("supported", "reversed") and claim.p is not None:
        assert claim.p < 0.05
        assert claim.effect is not None
        assert (claim.effect.value > 0) == (claim.verdict == "supported")
    if claim.effect is None:
        assert claim.verdict == "inconclusive"
        assert claim.why.startswith("Not measured:")


# --- the rule


bounds = some.floats(-2, 2, allow_nan=False)


@given(bounds, bounds, some.floats(0, 1))
def test_verdict_is_symmetric(a, b, bar):
    low, high = min(a, b), max(a, b)
    there = verdict_of(Estimate((low + high) / 2, low, high, ""), bar)
    mirrored = verdict_of(Estimate(-(low + high) / 2, -high, -low, ""), bar)
    swapped = {"supported": "reversed", "reversed": "supported"}
    assert mirrored == swapped.get(there, there)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.11, 0.3, "supported"),
        (0.1, 0.3, "inconclusive"),  # the bar itself does not count
        (-0.3, -0.11, "reversed"),
        (-0.1, 0.1, "not supported"),
        (0.02, 0.08, "not supported"),  # above 0, and too small to count
        (-0.2, 0.05, "inconclusive"),
        (-0.2, 0.2, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
        (-math.inf, math.inf, "inconclusive"),
    ],
)
def test_verdict_by_hand(low, high, verdict):
    assert verdict_of(Estimate(0.1, low, high, ""), 0.1) == verdict
    assert verdict_of(None, 0.1) == "inconclusive"


def gap_of(ours: Any, control: Any) -> Any:
    return beside_control(np.array(ours, dtype=float).tolist(), np.array(control, dtype=float).tolist(), 0.95)


def t_test(gaps: Any) -> float:
    found: Any = st.ttest_1samp(gaps, 0.0)
    return float(found.pvalue)


def test_gap_of_one_control_per_seed_is_paired_by_seed():
    # Differences 1, 2, 3: one more would lie 4.303 sqrt(4/3) around their mean.
    half = 4.3027 * (4 / 3) ** 0.5
    gap = gap_of([1, 2, 3], [[0], [0], [0]])
    assert gap.effect.interval == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert (gap.effect.over, gap.p_flips) == ("3 seeds", 2 / 2**3)
    assert gap.p == pytest.approx(2 * st.t.sf(2 / (4 / 3) ** 0.5, 2))
    # What a seed does to both sides cancels, however much seeds differ.
    assert gap_of([101, 2, 53], [[100], [0], [50]]).effect.interval == pytest.approx((2 - half, 2 + half), abs=1e-3)


def test_gap_of_several_controls_per_seed_is_the_wider_of_two_intervals():
    # How they spread within their seeds, 1 + 1 and 1 + 1 over 4 - 2.
    gap = gap_of([10, 20], [[8, 10], [18, 20]])
    half = float(st.t.ppf(0.975, 2)) * math.sqrt((4 * 1) / 2 * (1 + 1 / 4))
    assert gap.effect.interval == pytest.approx((1 - half, 1 + half))
    # Student's t over seeds, whose differences are 1, 2, 3, where the control hardly spreads.
    gap = gap_of([1, 2, 3], [[-0.01, 0.01]] * 3)
    assert gap.effect.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert (gap.effect.over, gap.p) == ("3 seeds", pytest.approx(t_test([1, 2, 3])))
    assert gap_of([1], [[2]]).effect.interval is None


def test_control_without_spread_has_no_interval_but_that_of_the_sentences():
    """All sets at the floor say nothing of one more set's luck: an interval of width 0 is no verdict."""
    gap = beside_control([-0.9], [[-1.0] * 4], 0.95)
    assert (gap.effect.value, gap.effect.interval, gap.p) == (pytest.approx(0.1), None, None)
    assert gap.effect.over == "4 values of the control without any spread"
    assert beside_control([-0.9, -0.8, -0.7], [[-1.0] * 4] * 3, 0.95).effect.interval is None
    assert beside_control([0.8] * 3, [[0.9]] * 3, 0.95).effect.interval is None
    with_text = beside_control([-0.9], [[-1.0] * 4], 0.95, least=0.04)
    assert with_text.effect.interval == pytest.approx((0.06, 0.14))
    assert with_text.p == pytest.approx(2 * st.norm.sf(0.1 / 0.04 * 1.959964), rel=1e-4)
    # And it is the least where the control spreads less than that.
    assert beside_control([0], [[1.0, 1.0001]], 0.95, least=0.4).effect.interval == pytest.approx(
        (-1.4, -0.6), abs=1e-3
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "same"), [(0, 0, True), (0, 0.92, False), (1, 0.99, True), (0.5, 0.5, False)]
)
def test_same_end_is_where_both_sides_cannot_differ(ours, theirs, same):
    assert same_end([ours], [theirs, theirs]) is same


@pytest.mark.parametrize("concept", [0.0, 0.9])
def test_no_verdict_where_both_sides_are_at_the_same_end(concept):
    """All at 0 after the cut, or nothing lost on either side: there could be no difference."""
    arms = {"concept": arms_of(3, {"f1": (0.9, concept, 0.9, 0.9)})["concept"]}
    found = row("C3a", arms, random_sets=sets_of(3, concept))
    assert found.verdict == "inconclusive"
    assert "both take" in found.why
    assert row("C3a", arms, random_sets=sets_of(3, 0.9 - concept)).verdict in ("supported", "reversed")


@pytest.mark.parametrize("shared", [0.0, 3.0])
@pytest.mark.parametrize("k", [1, 5])
def test_gap_keeps_its_level_where_seeds_share_their_luck(shared, k):
    """A random set of neurons, the same in every seed, is one more value of the control, not three agreeing ones."""
    rng, n, alarms, naive = np.random.default_rng(0), 100, 0, 0
    for _ in range(n):
        ours = shared * rng.normal() + rng.normal(size=3)
        control = shared * rng.normal(size=(3, k)) + rng.normal(size=(3, 1) if k > 1 else (3, k))
        alarms += gap_of(ours, control).effect.excludes(0)
        naive += t_test(ours - control.mean(1)) < 0.05
    assert alarms <= st.binom.isf(0.001, n, 0.05)
    if shared == 3:
        assert naive > 2 * 0.05 * n  # what the t test over seeds alone would have claimed


def test_p_values_are_corrected_by_holm():
    found = claims(with_shuffles(arms_of(3)), LABEL, random_sets=sets_of(3, 0.7))
    assert tuple(each.id for each in found) == tuple(MAKE)
    tested = [each for each in found if each.p is not None]
    assert {each.id for each in tested} == {"C3a", "C3b", "C4", "C5 matched", "C6", "C7", "C8", "C9a", "C9b"}
    assert [each.p_holm for each in tested] == pytest.approx(holm([each.p or 0.0 for each in tested]))
    assert all((each.p_holm or 0) >= (each.p or 0) for each in tested)
    assert all(each.p_holm is None for each in found if each.p is None)


# --- every claim, in both directions

SWAP = {"supported": "reversed", "reversed": "supported", "not supported": "not supported"}
VERSUS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what is so in the concept arm where the claim is true, and what is so in the random arm
    "C3b": ({"f1": (0.9, 0.1, 0.8, 0.88)}, {"f1": (0.9, 0.1, 0.5, 0.6)}),
    "C5 matched": ({"earlier": 0.8}, {}),
    "C6": ({"early_first": 0.9}, {}),
    "C7": ({"primed": 1.5}, {}),
    "C8": ({"mixed": 1.0}, {"mixed": 0.1}),
}


@pytest.mark.parametrize("id", VERSUS)
def test_claim_about_training_in_both_directions(id):
    true, other = VERSUS[id]
    found = row(id, arms_of(4, true, other))
    assert found.verdict == "supported"
    assert "beyond the control by more than the bar (by Student's t over 4 seeds)." in found.why
    assert found.effect is not None
    assert found.effect.value == pytest.approx((found.concept or 0) - (found.control or 0))
    back = row(id, arms_of(4, other, true))
    assert back.verdict == "reversed"
    assert "the other way" in back.why


@pytest.mark.parametrize("id", VERSUS)
def test_claim_that_holds_of_the_control_too_is_not_made(id):
    """The effect is in both arms: the number is there, and the verdict does not stand for it."""
    true, _ = VERSUS[id]
    found = row(id, arms_of(4, true, true, width=1000))
    assert found.verdict not in ("supported", "reversed")
    assert found.effect is not None
    assert abs(found.effect.value) < found.bar
    assert ("the control shows the same" in found.why) == (found.verdict == "not supported")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("id", VERSUS)
def test_claim_of_few_seeds_has_no_verdict(id, n):
    found = row(id, arms_of(n, *VERSUS[id]))
    assert (found.verdict, found.p) == ("inconclusive", None)
    assert found.effect is not None
    assert found.effect.interval is None
    assert found.effect.value > found.bar  # the number is told all the same
    assert f"{n} training seed" in found.why
    assert "seeds=[0,1,2]" in found.why


def test_claim_is_not_made_of_noise_between_seeds():
    arms = arms_of(4, {"falls": 0.3})
    arms["concept"] = [arm_of("concept", k, F1["concept"], falls=0.5 * (-1) ** k) for k in range(4)]
    found = row("C9a", arms)
    assert found.verdict == "inconclusive"
    assert "the interval reaches across the bar" in found.why


@pytest.mark.parametrize(
    ("id", "fall", "none"), [("C9a", {"falls": 0.5}, {"falls": 0.0}), ("C9b", {"similar": 0.4}, {"similar": 0.995})]
)
def test_fall_of_similarity_is_tested_within_the_arm_with_the_control_beside(id, fall, none):
    """The claim is a fall with depth or with training; that a random arm falls too does not make it none."""
    found = row(id, arms_of(3, fall, fall))
    assert (found.verdict, found.control_is[:10]) == ("supported", "random arm")
    assert found.control == pytest.approx(found.concept, abs=0.1)
    assert "in the random arm at least half as much, so it is not about the concept" in found.why
    alone = row(id, arms_of(3, fall, none))
    assert alone.verdict == "supported"
    assert "at least half as much" not in alone.why
    assert row(id, arms_of(3, none, fall, width=1000)).verdict == "not supported"
    few = row(id, arms_of(2, fall, none))
    assert (few.verdict, few.p) == ("inconclusive", None)
    assert "2 training seeds cannot tell" in few.why


def test_rise_of_similarity_with_depth_reverses_its_fall():
    found = row("C9a", arms_of(3, {"falls": -0.5, "similar": 0.3}))
    assert found.verdict == "reversed"
    assert "the other way" in found.why


def test_fall_with_training_starts_right_after_pruning_where_that_was_measured():
    arms = arms_of(3, {"similar": 0.4})
    whole = row("C9b", arms)
    cut = [
        replace(arm, snapshots={**arm.snapshots, "pruned": replace(arm["pruned"], meaning=arm["2"].meaning)})
        for arm in arms["concept"]
    ]
    found = row("C9b", {**arms, "concept": cut})
    assert whole.verdict == "supported"
    assert (found.concept, found.verdict) == (0, "inconclusive")


def unpruned_of(arms: Mapping[str, Sequence[Trajectory]], f1: Sequence[float] = (0.9,) * 4, **changes: Any) -> list:
    """The unpruned arm of the same seeds, with these F1s."""
    made = [arm_of("unpruned", arm.seed, f1, fraction=0.0, **changes) for arm in arms["concept"]]
    return [replace(arm, removed=None) for arm in made]


def test_speed_of_return_is_not_told_of_an_arm_that_lost_nothing():
    """A random arm that lost nothing is at its base all the time: that is no faster return."""
    arms = arms_of(4)
    arms["random"] = [
        replace(
            arm,
            snapshots={
                k: replace(s, scores=scores_of(0.9 + 0.002 * (-1) ** arm.seed)) for k, s in arm.snapshots.items()
            },
        )
        for arm in arms["random"]
    ]
    untouched = [
        replace(a, snapshots={**a.snapshots, "base": replace(a["base"], scores=scores_of(0.9))}) for a in arms["random"]
    ]
    found = row("C3b", {**arms, "random": untouched})
    assert (found.verdict, found.effect) == ("inconclusive", None)
    assert re.search(r"the random arm's damage \(.*\) is within noise", found.why)
    swapped = {"concept": untouched, "random": [replace(arm, arm="random") for arm in arms["concept"]]}
    assert "the concept arm's damage" in row("C3b", swapped).why


def test_speed_of_return_is_of_what_was_lost_and_not_of_how_much_was_lost():
    """Both arms make good the same shares of a large and of a small damage, so neither is faster."""
    arms = arms_of(8, {"f1": (0.9, 0.1, 0.5, 0.82)}, {"f1": (0.9, 0.7, 0.8, 0.88)})
    found = row("C3b", arms)
    assert found.effect is not None
    assert abs(found.effect.value) < 0.03
    assert found.verdict not in ("supported", "reversed")


@pytest.mark.parametrize("f1", [(0.9, 0.1, 0.1, 0.1), (0.9, 0.1, 0.905, 0.905)])
def test_speed_of_return_has_no_verdict_where_both_arms_are_at_an_end(f1):
    found = row("C3b", arms_of(4, {"f1": f1}, {"f1": (f1[0], 0.3, *(0.3 if v == 0.1 else v for v in f1[2:]))}))
    assert found.verdict == "inconclusive"
    assert "so their speeds could not differ" in found.why


def test_return_is_measured_against_what_training_alone_gives():
    """The unpruned arm gains as much as the pruned one: training, not return."""
    arms = arms_of(3, {"f1": (0.5, 0.4, 0.5, 0.6)}, {"f1": (0.5, 0.3, 0.5, 0.6)})
    alone = row("C2", arms)
    assert alone.verdict == "supported"
    assert alone.concept == pytest.approx(2, abs=0.2)
    found = row("C2", {**arms, "unpruned": unpruned_of(arms, (0.5, 0.5, 0.7, 0.9))})
    assert found.concept == pytest.approx(0.4, abs=0.03)
    assert found.verdict == "not supported"
    assert "which is not counted as back" in found.why
    assert "unpruned arm" in found.measures


def test_neurons_that_stay_what_they_are_are_not_primed():
    """Closeness goes with saliency before, and saliency after with saliency before: that alone is persistence."""
    arms = arms_of(4, width=1000)

    def lasting(arm: Trajectory) -> Trajectory:
        base = arm["base"]
        noise = torch.rand(base.saliency.score.shape, generator=torch.Generator().manual_seed(arm.seed + len(arm.arm)))
        last = replace(base.saliency, score=base.saliency.score + 0.3 * noise)
        ends = {
            "base": replace(base, near_concept=base.saliency.score + 0.5 * noise.flip(1)),
            "2": replace(arm["2"], saliency=last),
        }
        return replace(arm, snapshots={**arm.snapshots, **ends})

    arms = {name: [lasting(arm) for arm in side] for name, side in arms.items()}
    found = row("C7", arms)
    assert found.concept is not None
    assert abs(found.concept) < 0.05
    assert found.verdict not in ("supported", "reversed")


def test_priming_is_beside_the_unpruned_arm_where_there_is_one():
    arms = arms_of(4, {"primed": 1.5})
    same = {**arms, "unpruned": unpruned_of(arms, primed=1.5)}
    found = row("C7", same)
    assert found.control_is.startswith("unpruned arm")
    assert found.verdict not in ("supported", "reversed")
    assert "in the random arm" in found.why
    assert row("C7", {**arms, "unpruned": unpruned_of(arms)}).verdict == "supported"


def test_verdict_that_holm_takes_away_says_so():
    arms = arms_of(3, {}, {"f1": (0.9, 0.7, 0.785, 0.875)})
    found = {each.id: each for each in claims(arms, LABEL)}
    lost = [each for each in found.values() if each.verdict in ("supported", "reversed") and (each.p_holm or 0) > 0.05]
    assert lost
    for each in lost:
        assert re.search(r"it does not survive Holm's correction for \d claims \(p = 0\.\d+\)\.$", each.why)
    for each in found.values():
        assert ("does not survive" in each.why) == (each in lost)


def nats_of(value: float, n: int = 20) -> TokenLoss:
    """A language model's loss on the concept's tokens, the same in every sentence."""
    nats = np.full((n, 3), value) * 5
    return TokenLoss(nats, np.full((n, 3), 5), ("place", "others"), 50_000)


@pytest.mark.parametrize(("pruned", "verdict"), [(3.9, "supported"), (3.3, "not supported")])
def test_collapse_of_a_language_model_is_half_of_the_probability_gone(pruned, verdict):
    """A share of the gain over a uniform guess, 7.8 nats here, would call the loss of most of the probability small."""
    arms = arms_of(3)
    scores = dict(zip(STAGES, map(nats_of, (3.0, pruned, 3.1, 3.0)), strict=True))
    arms["concept"] = [
        replace(arm, snapshots={k: replace(s, scores=scores[k]) for k, s in arm.snapshots.items()})
        for arm in arms["concept"]
    ]
    arms["random"] = []
    found = row("C1", arms)
    assert (found.verdict, found.bar) == (verdict, math.log(2))
    assert found.concept == pytest.approx(pruned - 3.0)
    assert "nats per token" in found.why


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("f1", "verdict"),
    [
        ((0.9, 0.05), "supported"),
        ((0.9, 0.9), "not supported"),
        ((0.9, 0.6), "not supported"),
        ((0.3, 0.9), "reversed"),
    ],
)
def test_collapse(n, f1, verdict):
    found = row("C1", arms_of(n, {"f1": (*f1, 0.9, 0.9)}))
    assert found.verdict == verdict
    assert found.effect is not None
    assert found.effect.value == pytest.approx(1 - f1[1] / f1[0], abs=0.02)
    assert ("20 sentences" if n == 1 else "3 seeds") in found.effect.over


def test_collapse_of_any_neurons_is_said_to_be_so():
    arms = arms_of(3, {"f1": (0.9, 0.1, 0.6, 0.8)}, {"f1": (0.9, 0.1, 0.6, 0.8)})
    found = row("C1", arms)
    assert found.verdict == "supported"
    assert "not specific to the concept's neurons" in found.why
    assert found.control == pytest.approx(0.89, abs=0.01)
    assert "not specific" not in row("C1", arms_of(3)).why
    better = {"f1": (0.8, 0.9, 0.9, 0.9)}  # there is no collapse that could be specific
    assert "not specific" not in row("C1", arms_of(3, better, better)).why
    alone = row("C1", {"concept": arms["concept"]})
    assert "no random set to compare with" in alone.why


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("f1", "verdict"),
    [
        ((0.9, 0.1, 0.6, 0.89), "supported"),
        ((0.9, 0.1, 0.3, 0.5), "not supported"),
        ((0.9, 0.8, 0.4, 0.6), "reversed"),  # training made it worse by twice the damage
    ],
)
def test_return(n, f1, verdict):
    arms = arms_of(n, {"f1": f1}, {"f1": (0.9, 0.5, 0.9, 0.9)})
    found = row("C2", arms)
    assert found.verdict == verdict
    assert "in the random arm" in found.why
    assert found.control == pytest.approx(1, abs=0.05)
    unpruned = [replace(arm, removed=None, arm="unpruned") for arm in arms["random"]]
    assert "training on without pruning changed F1" in row("C2", {**arms, "unpruned": unpruned}).why


def test_return_without_damage_is_refused():
    same = [arm_of("concept", k, [f1] * 4) for k, f1 in enumerate((0.8, 0.85, 0.9))]
    found = row("C2", {"concept": [replace(arm, snapshots=dict.fromkeys(STAGES, arm["base"])) for arm in same]})
    assert (found.verdict, found.effect) == ("inconclusive", None)
    assert "within noise" in found.why
    coins = [[scores_of(0.8, noise=10 * seed + k) for k in range(4)] for seed in range(1)]
    arms = {"concept": [trajectory(dict(zip(STAGES, each, strict=True)), torch.ones(2, 3)) for each in coins]}
    assert "within noise" in row("C2", arms).why


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("concept", "sets", "verdict"), [(0.85, 0.3, "supported"), (0.1, 0.8, "reversed"), (0.7, 0.7, "not supported")]
)
def test_random_sets_cost_more(n, concept, sets, verdict):
    arms = {"concept": arms_of(n, {"f1": (0.9, concept, 0.9, 0.9)})["concept"]}
    found = row("C3a", arms, random_sets=sets_of(n, sets))
    assert found.verdict == verdict
    assert found.effect is not None
    assert found.effect.value == pytest.approx((concept - sets) / 0.9, abs=0.02)
    assert found.effect.value == pytest.approx((found.control or 0) - (found.concept or 0))


def test_opposite_ends_in_every_sentence_are_a_difference():
    """Nothing spreads, over sets or over sentences; but of 20 sentences that all agree three at most could differ."""
    arms = {"concept": arms_of(1, {"f1": (1.0, 0.0, 1.0, 1.0)})["concept"]}
    found = row("C3a", arms, random_sets=[[scores_of(1.0, n=20)] * 4])
    assert found.verdict == "reversed"
    assert found.effect is not None
    assert found.effect.interval == pytest.approx((-1 - 3 / 20, -1 + 3 / 20))
    assert found.effect.over == "the sentences"


def test_random_sets_that_differ_among_themselves_settle_nothing():
    arms = {"concept": arms_of(3, {"f1": (0.9, 0.5, 0.9, 0.9)})["concept"]}
    spread = [[scores_of(f1) for f1 in (0.0, 0.9, 0.9, 0.9)] for _ in range(3)]
    assert row("C3a", arms, random_sets=spread).verdict == "inconclusive"


def test_random_set_of_one_seed_has_no_interval():
    found = row("C3a", arms_of(1))
    assert (found.verdict, found.p) == ("inconclusive", None)
    assert "has no interval" in found.why
    found = row("C3a", {"concept": arms_of(1)["concept"]})
    assert "prune.control_draws" in found.why


@pytest.mark.parametrize("id", ["C1", "C3a"])
def test_random_sets_are_never_counted_with_the_random_arms_of_another_kind(id):
    arms = arms_of(3)
    sets = [[scores_of(f1) for f1 in (0.7, 0.72, 0.74, 0.76)] for _ in range(3)]
    found = row(id, arms, random_sets=sets)
    assert found.control_is == "random sets of the same size per layer"
    assert found == row(id, {name: paths for name, paths in arms.items() if name != "random"}, random_sets=sets)
    alone = row(id, arms)
    assert alone.control_is == "the random arm's set"
    assert alone.control != pytest.approx(found.control)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("slope", "verdict"), [(3.0, "supported"), (1 / 3, "reversed"), (1.0, "not supported")])
def test_depth_before_pruning_against_shuffled_labels(n, slope, verdict):
    arms = with_shuffles(arms_of(n, slope=slope, width=1000))
    found = row("C4", arms)
    assert found.verdict == verdict
    assert found.control == pytest.approx(0.5, abs=0.02)
    assert found.control_is == "label shuffles"


def test_depth_that_chance_gives_in_every_seed_is_no_finding():
    """The seeds agree on a depth, as they do where they share text and weights; a shuffle is as far from the middle."""
    arms = arms_of(4, slope=1.6, width=6)
    for side in arms.values():
        side[:] = [replace(arm, snapshots={**arm.snapshots, "base": side[0]["base"]}) for arm in side]
    arms = with_shuffles(arms)
    found = row("C4", arms)
    assert found.effect is not None
    assert found.effect.value > 0.05
    assert (found.effect.over, found.verdict) == ("76 values of the control", "inconclusive")


# --- the trap


@pytest.mark.parametrize(("slope", "as_published"), [(3.0, "supported"), (1 / 3, "reversed")])
def test_move_as_published_is_there_where_nothing_moves(slope, as_published):
    """Nothing moves: survivors keep their scores. Pruning takes late neurons, so that the published comparison of all
    base neurons with the survivors sees a move to earlier layers; the matched one does not."""
    arms = arms_of(4, slope=slope, fraction=0.5)
    for side in arms.values():
        for i, arm in enumerate(side):
            still = {s: replace(arm[s], saliency=arm["pruned"].saliency) for s in ("1", "2")}
            side[i] = replace(arm, snapshots={**arm.snapshots, **still})
    published, matched = row("C5 unmatched", arms), row("C5 matched", arms)
    assert published.verdict == as_published
    assert "pruning late layers alone looks like this" in published.why
    assert matched.verdict not in ("supported", "reversed")
    assert matched.effect is not None
    assert abs(matched.effect.value) < matched.bar
    assert "no control" in published.measures


def test_move_as_published_says_what_training_alone_does():
    arms = arms_of(3)
    moved = [replace(arm, removed=None) for arm in arms_of(3, {"f1": F1["concept"], "earlier": 0.9})["concept"]]
    found = row("C5 unmatched", {**arms, "unpruned": moved})
    assert "training on without pruning moved it 0." in found.why
    assert found.control is not None
    assert "not in the effect" in found.control_is
    assert row("C5 unmatched", arms).control is None


def test_move_as_published_of_few_seeds_has_no_verdict():
    found = row("C5 unmatched", arms_of(1, slope=3.0, fraction=0.5))
    assert found.verdict == "inconclusive"
    assert "1 training seed" in found.why


# --- what cannot be told


def test_claims_need_a_concept_arm():
    assert claims({}, LABEL) == []
    assert claims({"random": arms_of(1)["random"]}, LABEL) == []


def test_arms_of_other_seeds_are_refused():
    arms = arms_of(3)
    with pytest.raises(ValueError, match=r"seeds \[0, 1, 2\] of concept and \[0, 1\] of random"):
        claims({**arms, "random": arms["random"][:2]}, LABEL)
    untrained = [replace(a, snapshots={"base": a["base"], "pruned": a["pruned"]}) for a in arms["concept"]]
    with pytest.raises(ValueError, match="training after them, found base, pruned"):
        claims({"concept": untrained}, LABEL)


def test_claims_without_a_random_arm_say_what_is_missing():
    found = {each.id: each for each in claims({"concept": arms_of(3)["concept"]}, LABEL)}
    for id in VERSUS:
        assert found[id].verdict == "inconclusive"
        assert "no random arm" in found[id].why
    assert found["C9a"].control is None
    assert found["C9a"].effect is not None
    assert found["C1"].verdict == "supported"


@pytest.mark.parametrize(
    ("id", "missing", "hint"),
    [
        ("C4", {}, "measure.shuffles"),
        ("C8", {"words": None}, "measure.what with top_words"),
        ("C9a", {"meaning": None}, "measure.what with top_words"),
        ("C9b", {"meaning": None}, "measure.what with top_words"),
    ],
)
def test_claim_that_was_not_measured_says_what_to_measure(id, missing, hint):
    arms = {name: [changed(arm, **missing) for arm in side] for name, side in arms_of(3).items()}
    found = row(id, arms)
    assert (found.verdict, found.effect) == ("inconclusive", None)
    assert hint in found.why


def changed(arm: Trajectory, **fields: Any) -> Trajectory:
    return replace(arm, snapshots={name: replace(s, **fields) for name, s in arm.snapshots.items()})


def test_priming_without_words_goes_by_saliency():
    arms = {name: [changed(arm, near_concept=None) for arm in side] for name, side in arms_of(3).items()}
    found = row("C7", arms)
    assert found.effect is not None
    assert "of saliency before" in found.measures


def test_one_stage_has_no_order():
    arms = {
        name: [replace(a, snapshots={s: a[s] for s in ("base", "pruned", "2")}) for a in side]
        for name, side in arms_of(3).items()
    }
    assert "one stage of retraining has no order" in row("C6", arms).why


Degraded = Callable[[Trajectory], Trajectory]


def scored(of: Callable[[torch.Tensor], torch.Tensor]) -> Degraded:
    def change(snapshot: Snapshot) -> Snapshot:
        return replace(snapshot, saliency=replace(snapshot.saliency, score=of(snapshot.saliency.score)))

    return lambda arm: replace(arm, snapshots={name: change(s) for name, s in arm.snapshots.items()})


def everything_pruned(arm: Trajectory) -> Trajectory:
    return replace(arm, removed=Neurons(torch.ones_like(arm.survivors().mask), arm.site))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "degrade",
    [
        scored(lambda s: s - 1.0),
        scored(lambda s: 0 * s),
        scored(lambda s: -s.abs() - 1),
        everything_pruned,
        lambda arm: replace(arm, removed=None),
        lambda arm: changed(arm, scores=scores_of(0.0)),
        lambda arm: changed(arm, scores=scores_of(1.0)),
        lambda arm: changed(arm, meaning=torch.full((LAYERS, 40), torch.nan), near_concept=torch.ones(LAYERS, 40)),
        lambda arm: changed(arm, near_concept=torch.full((LAYERS, 40), torch.nan)),
        lambda arm: changed(arm, concept_words=()),
    ],
    ids=["signed", "zero", "negative", "all pruned", "none pruned", "F1 0", "F1 1", "null", "no vectors", "no words"],
)
def test_no_run_however_odd_breaks_a_claim(degrade: Degraded, n):
    arms = {name: [degrade(arm) for arm in side] for name, side in with_shuffles(arms_of(n, width=40), 3).items()}
    for each in claims(arms, LABEL, draws=100, random_sets=sets_of(n, 0.5)):
        checked(each)


def test_score_with_a_sign_has_no_centre():
    arms = {name: [scored(lambda s: s - 1.0)(arm) for arm in side] for name, side in arms_of(3).items()}
    for id in ("C5 matched", "C6"):
        assert "below 0" in row(id, arms).why
    assert row("C9b", arms).effect is not None
