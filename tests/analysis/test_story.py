"""Made-up runs, and the stories that may and may not be told of them."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.analysis import story
from relearn_lens.analysis.intervals import beside_control
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.evaluation import SpanScores
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site
from relearn_lens.neurons.streaming import ClassStats
from relearn_lens.text.concept import Concept

LABELS = ("person", "place")
LABEL = ("place",)


@cache
def site_of(layers: int, width: int) -> Site:
    """A site without a model."""
    names = ("embed", *map(str, range(layers - 1)))
    return Site("resid", names, names, width, writes=((),) * layers, reads=((),) * layers)


@cache
def scores_of(place: float, *, person: float = 0.9, n: int = 20, noise: int | None = None) -> SpanScores:
    """Scores of `n` sentences. Each has the same F1, so draws do not spread; with `noise` (a seed) each is a coin."""
    each = np.full((n, 2, 3), 1000)
    each[:, :, 0] = [round(1000 * person), round(1000 * place)]
    if noise is not None:
        each = np.ones((n, 2, 3), dtype=np.int64)
        each[:, :, 0] = np.random.default_rng(noise).random((n, 2)) < [person, place]
    made = SpanScores({}, {}, {}, each, LABELS)
    f1 = {name: made.value(name) for name in (*LABELS, "overall")}
    return SpanScores(f1, dict(f1), dict(f1), each, LABELS)


@cache
def stats_of(layers: int, width: int) -> ClassStats:
    """Class statistics that are zeros."""
    zeros = torch.zeros(3, layers, width, dtype=torch.float64)
    return ClassStats(torch.tensor([5, 3, 2]), zeros, zeros, ("O", *LABELS), site_of(layers, width))


def snapshot_of(score: torch.Tensor, scores: SpanScores, at: Checkpoint | None = None) -> Snapshot:
    """A snapshot without a model."""
    saliency = Saliency(score.float(), "probeless", "activation", "place", site_of(*score.shape))
    return Snapshot(saliency, scores, stats_of(*score.shape), at)


def trajectory(
    f1: Mapping[str, float | SpanScores],
    score: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    removed: torch.Tensor | None = None,
    arm: str = "concept",
    seed: int = 0,
    concept: Concept | None = None,
) -> Trajectory:
    """One arm: F1 of `place` by stage, and one score for all stages or one for each."""
    snapshots = {}
    for k, (stage, value) in enumerate(f1.items()):
        here = score[stage] if isinstance(score, Mapping) else score
        at = Checkpoint(float(stage), 10 * k, 100 * k, 1 / (k + 1)) if stage[0].isdigit() else None
        scores = value if isinstance(value, SpanScores) else scores_of(value)
        snapshots[stage] = snapshot_of(here, scores, at)
    site = next(iter(snapshots.values())).saliency.site
    neurons = None if removed is None else Neurons(removed, site)
    return Trajectory(snapshots, neurons, arm, seed, concept or Concept("place"))


FLAT = torch.ones(2, 3)


def curve(base: float, pruned: float, *later: float, **settings) -> Trajectory:
    """An arm with these F1s and scores that say nothing."""
    names = ["base", "pruned", *(str(k + 1) for k in range(len(later)))]
    return trajectory(dict(zip(names, (base, pruned, *later), strict=True)), FLAT, **settings)


# --- the story


def moving(arm: str, f1: Sequence[Any], moved: float, *, seed: int = 0) -> Trajectory:
    """An arm of 2 layers whose centre of mass moves by so much of the depth (from 0.5), with F1s base, pruned, 1."""
    base, later = torch.full((2, 3), 0.5), torch.tensor([[0.5 - moved] * 3, [0.5 + moved] * 3])
    mask = None if arm == "unpruned" else torch.tensor([[True, False, False], [True, True, False]])
    stages = {"base": base, "pruned": base, "1": later}
    return trajectory(dict(zip(stages, f1, strict=True)), stages, removed=mask, arm=arm, seed=seed)


F1 = {"concept": (0.9, 0.1, 0.8), "random": (0.9, 0.7, 0.88), "unpruned": (0.9, 0.9, 0.9)}
"""Of every arm: base, pruned, after an epoch."""


def arms_of(*moved: float, n: int = 1, spread: float = 0.0, f1: Mapping[str, Sequence[Any]] | None = None):
    """The concept, random and unpruned arm, moved so far, give or take `spread` from seed to seed."""
    curves = F1 | dict(f1 or {})
    jitter = np.random.default_rng(0).normal(0, 1, (3, n)) * spread
    return {
        name: [moving(name, curves[name], far + float(jitter[i, k]), seed=k) for k in range(n)]
        for i, (name, far) in enumerate(zip(F1, moved, strict=True))
    }


def sentences(story: str) -> list[str]:
    """A full stop that ends a sentence is followed by a capital letter or by nothing."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", story)


def told(arms, **interval) -> list[str]:
    found = sentences(story.what_happened(arms, LABEL, **interval))
    assert len(found) == 2, found
    assert all(sentence.endswith(".") for sentence in found)
    assert "nan" not in " ".join(found)
    return found


CLAIM = re.compile("beyond noise")
"""What the story says of a move that it stands for; everything else is a reservation."""


def test_story_without_a_concept_arm_says_so():
    arms = arms_of(0, 0, 0)
    del arms["concept"]
    assert re.search("no concept arm", story.what_happened(arms, LABEL))


def test_story_without_a_random_arm_says_what_cannot_be_said():
    arms = arms_of(0.1, 0, 0)
    del arms["random"]
    how_much, where = told(arms)
    assert re.search("no random arm.*cannot be said", how_much)
    assert "random" not in where
    del arms["unpruned"]
    assert re.search("without a control arm this is not evidence", told(arms)[1])


def test_story_tells_the_numbers():
    how_much, _ = told(arms_of(0.1, 0, 0))
    assert "0.90 to 0.10" in how_much
    assert re.search(
        r"brought it to 0\.80: 88 % \[8[78], 8[78]\] of the loss came back, half of it by epoch 1", how_much
    )
    assert "0.70" in how_much
    assert "0.88" in how_much


def test_story_says_that_little_came_back():
    how_much, _ = told(arms_of(0.1, 0, 0, f1={"concept": (0.9, 0.1, 0.2)}))
    assert "less than half of it at any stage" in how_much


def test_story_has_no_half_of_what_a_random_arm_never_lost():
    """Just below its base after the cut and at it later is no half that came back by a stage."""
    curves = [(0.9, 0.899, 0.9), (0.9, 0.901, 0.9), (0.9, 0.898, 0.9)]
    arms = arms_of(0.1, 0, 0, n=3)
    arms["random"] = [moving("random", f1, 0.0, seed=k) for k, f1 in enumerate(curves)]
    how_much, _ = told(arms)
    assert how_much.count("half of it") == 1  # the concept arm's
    assert "took it to 0.90, and retraining to 0.90, so" in how_much


def test_story_of_damage_within_noise_speaks_of_no_recovery():
    coin = [scores_of(0.8, noise=k) for k in (3, 4)]
    arms = arms_of(0.1, 0, 0, f1={"concept": (coin[0], coin[1], coin[0])})
    how_much, _ = told(arms)
    assert "within noise" in how_much
    assert "came back" not in how_much


def test_story_of_a_random_arm_that_does_as_badly_sees_no_difference():
    how_much, _ = told(arms_of(0.1, 0, 0, f1={"random": (0.9, 0.1, 0.8)}))
    assert re.search("not differ from it right after pruning.* and at the end", how_much)
    assert not re.search("below it|above it", how_much)
    assert not re.search("below|above|lower|higher", how_much)


def test_story_of_a_concept_arm_that_is_lower_says_by_how_much():
    how_much, _ = told(arms_of(0.1, 0, 0))
    assert re.search(r"0\.60 below.*right after pruning", how_much)
    assert re.search(r"0\.08 below.*at the end", how_much)


def test_story_of_a_concept_arm_that_is_higher_says_so():
    how_much, _ = told(arms_of(0.1, 0, 0, f1={"random": (0.9, 0.05, 0.3)}))
    assert re.search(r"0\.05 above.*right after pruning.*0\.50 above.*at the end", how_much)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("way", [0.1, -0.1])
def test_story_claims_no_move_where_the_controls_move_alike(n, way):
    _, where = told(arms_of(way, way, way, n=n, spread=0.01))
    assert "a control moved the same way" in where
    assert not CLAIM.search(where)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_story_claims_no_move_where_one_control_moves_alike(n):
    _, where = told(arms_of(0.1, 0.1, 0.0, n=n, spread=0.01))
    assert not CLAIM.search(where)


@pytest.mark.parametrize("n", [3, 5])
def test_story_claims_no_move_within_the_noise_of_seeds(n):
    _, where = told(arms_of(0.02, 0, 0, n=n, spread=0.1))
    assert re.search("within noise|not specific", where)
    assert not CLAIM.search(where)


def test_story_tells_a_move_by_the_rule_of_the_claims():
    """Student's t over these seeds leaves 0 out; where one more seed's difference would lie does not."""
    arms = arms_of(0, 0, 0, n=3)
    arms["concept"] = [moving("concept", F1["concept"], moved, seed=k) for k, moved in enumerate((0.07, 0.1, 0.13))]
    gap = np.array([0.07, 0.1, 0.13])
    assert gap.mean() > 4.303 * gap.std(ddof=1) / 3**0.5
    assert "within noise over 3 seeds" in told(arms)[1]
    arms["concept"] = [moving("concept", F1["concept"], moved, seed=k) for k, moved in enumerate((0.09, 0.1, 0.11))]
    assert CLAIM.search(told(arms)[1])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_story_claims_of_luck_that_seeds_share_are_as_rare_as_the_level(n, monkeypatch):
    """The concept's neurons are the same in every seed, as is what they do by luck; each random set has its own."""
    monkeypatch.setattr(SpanScores, "value", cache(SpanScores.value))  # six scores, asked for thousands of times
    alarms, rng = 0, np.random.default_rng(n)
    for _ in range(60):
        moves = 0.05 * (rng.normal() + 0.3 * rng.normal(size=n)), 0.05 * rng.normal(size=n)
        arms = {
            name: [moving(name, F1[name], float(np.clip(moved, -0.4, 0.4)), seed=k) for k, moved in enumerate(side)]
            for name, side in zip(("concept", "random"), moves, strict=True)
        }
        alarms += bool(CLAIM.search(told(arms)[1]))
    assert alarms <= 9  # of 60 at .05, but for one case in a thousand


@pytest.mark.parametrize("n", [1, 2])
def test_story_calls_a_move_of_few_seeds_a_description(n):
    _, where = told(arms_of(0.2, 0, 0, n=n))
    assert "description, not a finding" in where
    assert not CLAIM.search(where)


@pytest.mark.parametrize(("way", "layers"), [(0.2, "later"), (-0.2, "earlier")])
def test_story_tells_a_move_that_the_controls_do_not_make(way, layers):
    _, where = told(arms_of(way, 0, 0, n=4, spread=0.01))
    assert re.search(rf"0\.[12]\d\d of the model's depth towards {layers} layers", where)
    assert CLAIM.search(where)
    assert "+0.0" in where or "-0.0" in where  # what the controls did stands beside it


def test_story_of_a_score_with_a_sign_says_nothing_of_where():
    arms = arms_of(0.7, 0, 0)  # what moves is more than there was
    assert (arms["concept"][0]["1"].saliency.score < 0).any()
    assert "Where it went cannot be said of the score 'probeless': some of its values are below 0" in told(arms)[1]


def test_names_of_other_modules_are_given_here_too():
    for name in story.__all__:
        assert getattr(story, name)


def test_story_of_no_move_at_all_names_no_direction():
    _, where = told(arms_of(0, 0, 0))
    assert not re.search("towards (earlier|later)", where)


def test_story_without_survivors_has_no_nan():
    stages = {"base": FLAT, "pruned": 0 * FLAT, "1": 0 * FLAT}
    f1 = dict(zip(stages, (0.9, 0.1, 0.8), strict=True))
    arm = trajectory(f1, stages, removed=torch.ones(2, 3, dtype=torch.bool))
    told({"concept": [arm]})


def measured_anew(seed: int) -> dict[str, Trajectory]:
    """Three arms of one seed in which no neuron ever changes: every measurement is the truth and new noise.

    The concept arm prunes the upper half of the base measurement, which is mostly late.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = torch.linspace(1, 2, 6)[:, None]
    truth = torch.rand(6, 100, generator=generator) * depth

    def measurement() -> torch.Tensor:
        return truth + 0.6 * depth * torch.rand(6, 100, generator=generator)

    base = measurement()
    top = base >= base.flatten().median()
    order = torch.rand(6, 100, generator=generator).argsort(1).argsort(1)
    masks = {"concept": top, "random": order < top.sum(1, keepdim=True), "unpruned": None}
    return {
        name: trajectory(
            dict(zip(("base", "pruned", "1"), F1[name], strict=True)),
            {"base": base, "pruned": base, "1": measurement()},
            removed=mask,
            arm=name,
            seed=seed,
        )
        for name, mask in masks.items()
    }


def test_story_claims_no_move_that_choosing_survivors_makes():
    """Survivors score low at base in part by chance, most so where many were pruned, and score higher when measured
    anew. The same neurons do so in the unpruned arm, which is the control for it."""
    claims = 0
    for run in range(10):
        each = [measured_anew(100 * run + seed) for seed in range(5)]
        _, where = told({name: [arms[name] for arms in each] for name in F1})
        claims += bool(CLAIM.search(where))
    assert claims <= 2


@pytest.mark.parametrize("n", [1, 3])
def test_gap_between_arms_is_by_the_rule_of_the_claims(n):
    arms = arms_of(0, 0, 0, n=n)
    arms["concept"] = [moving("concept", (0.9, 0.1, f1), 0.0, seed=k) for k, f1 in enumerate((0.7, 0.75, 0.8)[:n])]
    gap = story.gap_at(arms["concept"], arms["random"], LABEL, "1", level=0.9)
    ours, theirs = ([arm["1"].scores for arm in arms[name]] for name in ("concept", "random"))
    if n == 1:
        assert gap == story.estimate(np.subtract, LABEL, ours, theirs, level=0.9)
    else:
        values = [[scores.value(LABEL) for scores in side] for side in (ours, theirs)]
        assert gap == beside_control(values[0], [[value] for value in values[1]], 0.9).effect


def test_story_over_seeds_uses_the_interval_of_seeds():
    # The gap to the random arm is 0.1 on average but goes from -0.5 to 0.7: three seeds do not settle it.
    curves = [(0.9, 0.2, 0.8), (0.9, 0.1, 0.803), (0.9, 0.3, 0.797)]
    random = [(0.9, 0.7, 0.9), (0.9, 0.2, 0.9), (0.9, 0.0, 0.9)]
    arms = {
        "concept": [moving("concept", f1, 0.1, seed=k) for k, f1 in enumerate(curves)],
        "random": [moving("random", f1, 0.0, seed=k) for k, f1 in enumerate(random)],
    }
    how_much, _ = told(arms)
    assert re.search("not differ from it right after pruning", how_much)
    assert re.search("0.10 below it at the end", how_much)
