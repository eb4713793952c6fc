"""Made-up runs in which the concept goes where we put it, or nowhere, and numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from relearn_lens.analysis import migration
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.neurons.sites import Neurons
from tests.analysis.test_story import scores_of, site_of, snapshot_of, trajectory

SCORE = torch.tensor([[3.0, 1.0], [2.0, 0.0], [1.5, 1.2]])
#               rank    0    4      1    5      2    3      of 6: saliency is 1 - rank / 5
LATE = torch.tensor([[False, True], [True, False], [True, True]])


def neurons(mask: torch.Tensor) -> Neurons:
    return Neurons(mask, site_of(*mask.shape))


def test_rank_saliency_by_layer_by_hand():
    saliency = snapshot_of(SCORE, scores_of(1)).saliency
    assert migration.rank_saliency_by_layer(saliency) == pytest.approx([0.6, 0.4, 0.5])
    # Survivors score 3, 0: ranks 0 and 1 of 2; the last layer has none.
    found = migration.rank_saliency_by_layer(saliency, neurons(~LATE))
    assert found == pytest.approx([1, 0, math.nan], nan_ok=True)


def test_score_by_layer_by_hand():
    saliency = snapshot_of(SCORE, scores_of(1)).saliency
    assert migration.score_by_layer(saliency) == pytest.approx([2, 1, 1.35])
    assert migration.score_by_layer(saliency, neurons(~LATE)) == pytest.approx([3, 0, math.nan], nan_ok=True)


@pytest.fixture
def still() -> Trajectory:
    """Nothing moves: survivors keep their scores. The top half, mostly late, is pruned and 0 ever after."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(5, 40, generator=generator) * torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0])[:, None] + 0.1
    pruned = torch.zeros(200, dtype=torch.bool)
    pruned[score.flatten().argsort(descending=True)[:100]] = True
    pruned = pruned.view_as(score)
    assert pruned[4].sum() > 2 * pruned[0].sum()
    after = score.where(~pruned, 0.0)
    stages = {"base": score, "pruned": after, "1": after, "2": after}
    return trajectory(dict.fromkeys(stages, 0.9), stages, removed=pruned)


def test_saliency_of_all_shows_a_move_where_nothing_moves(still):
    found = migration.saliency_by_layer(still, "all")
    assert found["2"][4] < found["base"][4] - 0.2
    assert found["2"][0] > found["base"][0] + 0.2
    assert migration.shift(still, "2", "all").moved < -0.1


def test_saliency_of_matched_shows_none_where_nothing_moves(still):
    found = migration.saliency_by_layer(still)
    assert list(found) == ["base", "pruned", "1", "2"]
    assert found["base"] == found["pruned"] == found["1"] == found["2"]
    assert migration.shift(still, "2").moved == 0


def test_saliency_of_matched_shows_a_move_among_survivors(still):
    moved = still["2"].saliency.score.clone()
    moved[4] *= 3
    there = trajectory(
        dict.fromkeys(("base", "2"), 0.9),
        {"base": still["base"].saliency.score, "2": moved},
        removed=~still.survivors().mask,
    )
    found = migration.saliency_by_layer(there)
    assert found["2"][4] > found["base"][4]
    assert migration.shift(there, "2").moved > 0


def test_rank_saliency_of_layers_does_not_depend_on_the_order_of_neurons(still):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = trajectory(
        dict.fromkeys(still.stages, 0.9),
        {stage: s.saliency.score[:, order] for stage, s in still.snapshots.items()},
        removed=~still.survivors().mask[:, order],
    )
    for which in ("all", "matched"):
        for stage, values in migration.saliency_by_layer(other, which).items():
            assert values == pytest.approx(migration.saliency_by_layer(still, which)[stage], abs=1e-5)


def test_shift_by_hand():
    # All: mass 1, 2, 1 over depths 0, 1/2, 1 is centred at 1/2; later 0, 1, 3 at (1/2 + 3) / 4.
    base = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 1.0]])
    later = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    pruned = torch.tensor([[False, False], [False, True], [False, True]])
    arm = trajectory({"base": 1, "1": 1}, {"base": base, "1": later}, removed=pruned)
    found = migration.shift(arm, "1", "all")
    assert (found.base, found.later, found.moved) == pytest.approx((0.5, 0.875, 0.375))
    # Matched: mass 1, 1, 0 is centred at 1/4; later 0, 1, 0 at 1/2.
    found = migration.shift(arm, "1")
    assert (found.base, found.later, found.moved) == pytest.approx((0.25, 0.5, 0.25))


def test_shift_does_not_depend_on_the_scale_of_the_scores():
    base = torch.tensor([[1.0], [2.0], [3.0]])
    arm = trajectory({"base": 1, "1": 1}, {"base": base, "1": 7 * base})
    assert migration.shift(arm, "1", "all").moved == pytest.approx(0)


def test_shift_as_published_takes_all_at_base_and_survivors_later(still):
    found = migration.shift(still, "2", "published")
    assert found.base == migration.shift(still, "2", "all").base
    assert found.later == migration.shift(still, "2").later
    assert found.moved < -0.1
    ranks = migration.saliency_by_layer(still, "published")
    assert ranks["base"] == migration.saliency_by_layer(still, "all")["base"]


def test_published_selection_keeps_the_ranks_among_all_neurons(still):
    """As the release did: survivors are not ranked anew among themselves, so they all lie in the upper half here."""
    found = migration.saliency_by_layer(still, "published")["2"]
    ranks = still["2"].saliency.by_rank()
    expected = [float(row[keep].mean()) for row, keep in zip(ranks, still.survivors().mask, strict=True)]
    assert found == pytest.approx(expected)
    assert min(found) > 0.5 > min(migration.saliency_by_layer(still, "matched")["2"])


# --- distributions over layers


def saliency_of(score: torch.Tensor | list) -> Saliency:
    return snapshot_of(torch.as_tensor(score), scores_of(1)).saliency


def test_layer_share_and_centre_by_hand():
    saliency = saliency_of(SCORE)  # sums 4, 2, 2.7
    assert migration.layer_share(saliency) == pytest.approx([4 / 8.7, 2 / 8.7, 2.7 / 8.7])
    assert migration.centre(saliency) == pytest.approx((1 + 2.7) / 8.7)
    assert migration.layer_share(saliency, neurons(~LATE)) == pytest.approx([1, 0, 0])
    assert migration.centre(saliency, neurons(~LATE)) == 0


def test_layer_share_of_nothing_is_nan():
    assert migration.layer_share(saliency_of(0 * SCORE)) == pytest.approx([math.nan] * 3, nan_ok=True)
    assert math.isnan(migration.centre(saliency_of(SCORE), neurons(LATE & ~LATE)))


@pytest.mark.parametrize("bad", [-0.5, math.inf, math.nan])
def test_layer_share_refuses_what_is_no_mass(bad):
    score = SCORE.clone()
    score[1, 1] = bad
    with pytest.raises(ValueError, match=f"at least 0, found {bad:.3g} in 'probeless'; take its absolute value"):
        migration.layer_share(saliency_of(score))
    # Outside the neurons that are asked for it does not matter.
    assert migration.is_mass(saliency_of(score), neurons(LATE))
    assert sum(migration.layer_share(saliency_of(score), neurons(LATE))) == pytest.approx(1)


# --- a whole run


STAGES: tuple[str, ...] = ("base", "pruned", "1", "2")


def run_of(
    later: torch.Tensor, base: torch.Tensor, mask: torch.Tensor, *, arm: str = "concept", seed: int = 0
) -> Trajectory:
    """An arm whose scores are `base`, then without the pruned neurons, then `later`."""
    cut = base.where(~mask, 0.0)
    scores: dict[str, torch.Tensor] = dict(zip(STAGES, (base, cut, (cut + later) / 2, later), strict=True))
    return trajectory(dict.fromkeys(STAGES, 0.9), scores, removed=mask, arm=arm, seed=seed)


def arms_of(n: int, *, moved: float | int = 0.0, noise: float = 0.02) -> dict[str, list[Trajectory]]:
    """Five layers; in the concept arm so large a share of what survives in layer 1 (`"0"` by name) goes to layer 3."""
    arms: dict[str, list[Trajectory]] = {"concept": [], "random": []}
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)

        def rand(generator=generator) -> torch.Tensor:
            return torch.rand(5, 40, generator=generator)

        depth = torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0])[:, None]
        base = rand() * depth + 0.1
        top = base >= base.flatten().median()
        other = rand().argsort(1).argsort(1) < top.sum(1, keepdim=True)
        gone = base.clone()
        gone[1] *= 1 - moved
        shared = ~top & ~other
        gone[3] += moved * (base[1] * shared[1]).sum() / shared[3].sum()
        for name, mask, later in (("concept", top, gone), ("random", other, base)):
            later = later.where(~mask, 0.0) * (1 + noise * rand())
            arms[name].append(run_of(later, base, mask, arm=name, seed=seed))
    return arms


def told(found: migration.Migration) -> str:
    said = str(found)
    assert said.endswith(".")
    assert "nan" not in said
    return said


def test_migration_names_where_it_went():
    found = migration.migration(arms_of(9, moved=0.9))
    assert (found.from_, found.to) == ("0", "2")  # the second and the fourth layer: the first is the embedding
    assert (found.stage, found.seeds, found.control, found.score) == ("2", 9, "random", "probeless")
    gap = found.moved.gap
    assert gap is not None
    assert gap.low > 0
    assert gap.over.startswith("9 seeds")
    assert gap.p == 2 / 2**9
    assert found.moved.control is not None
    assert abs(found.moved.control.value) < 0.01
    said = told(found)
    assert "beyond noise over 9 seeds and the spread of the control (sign-flip p = 0.0039)" in said
    assert "layer 0 lost most (-" in said
    assert "layer 2 gained most (+" in said


def test_migration_is_the_shift_on_shared_survivors():
    arms = arms_of(3, moved=0.4)
    found = migration.migration(arms, "1")
    shared = [c.survivors() & r.survivors() for c, r in zip(arms["concept"], arms["random"], strict=True)]
    ours, theirs = (
        [migration.shift(arm, "1", among=s).moved for arm, s in zip(arms[name], shared, strict=True)] for name in arms
    )
    assert found.moved.concept.value == pytest.approx(np.mean(ours))
    gap = np.subtract(ours, theirs)
    assert found.moved.gap is not None
    half = stats.t.ppf(0.975, 2) * gap.std(ddof=1) * math.sqrt(1 + 1 / 3)  # where one more seed would lie
    assert (found.moved.gap.value, found.moved.gap.high) == pytest.approx((gap.mean(), gap.mean() + half))
    first = arms["concept"][0]
    depth = np.linspace(0, 1, len(first.site.layers))
    distances = []
    for arm, among in zip(arms["concept"], shared, strict=True):
        before, after = (migration.layer_share(arm[stage].saliency, among) for stage in ("base", "1"))
        distances.append(stats.wasserstein_distance(depth, depth, before, after))
    assert found.distance.concept.value == pytest.approx(np.mean(distances))
    layer = first.site.layers[2]
    assert sum(found.share[name].concept.value for name in found.share) == pytest.approx(0, abs=1e-9)
    assert found.share[layer].gap is not None


def test_migration_where_nothing_moves_is_only_as_published():
    arms = arms_of(4, noise=0.0)
    matched = migration.migration(arms)
    assert matched.moved.concept.value == pytest.approx(0, abs=1e-6)
    assert matched.moved.gap is not None
    assert not matched.moved.gap.value > 1e-6
    assert matched.distance.concept.value == pytest.approx(0, abs=1e-6)
    kinds: tuple[tuple[migration.Selection, str], ...] = (
        ("published", "as published"),
        ("all", "pruned ones included"),
    )
    for selection, says in kinds:
        found = migration.migration(arms, selection=selection)
        assert found.moved.concept.value < -0.1  # towards earlier layers, as the paper has it
        assert says in told(found)
        assert "pruning alone makes such a move, so this comparison is not evidence" in told(found)
        assert "beyond" not in told(found)
    assert migration.migration(arms, selection="published").turnover is None


def test_migration_within_noise_says_so():
    claims = 0
    for k in range(20):
        arms = arms_of(4, noise=0.0)
        for name in arms:
            arms[name] = [
                jittered(arm, generator=torch.Generator().manual_seed(1000 * k + 10 * i + (name == "random")))
                for i, arm in enumerate(arms[name])
            ]
        found = migration.migration(arms)
        assert "within noise over 4 seeds" in told(found) or "beyond noise" in told(found)
        claims += "beyond noise" in told(found)
    assert claims <= 4


def jittered(arm: Trajectory, generator: torch.Generator) -> Trajectory:
    """An arm measured with noise at its last stage."""
    last = arm["2"].saliency
    noisy = replace(last, score=last.score * (1 + 0.5 * torch.rand(last.score.shape, generator=generator)))
    return replace(arm, snapshots={**arm.snapshots, "2": replace(arm["2"], saliency=noisy)})


@pytest.mark.parametrize(("n", "says"), [(1, "one training seed: no interval over training"), (2, "2 training seeds")])
def test_migration_of_few_seeds_is_a_description(n, says):
    found = migration.migration(arms_of(n, moved=0.9))
    gap = found.moved.gap
    assert gap is not None
    assert (gap.interval, gap.p) == (None, None)
    assert gap.value > 0.01
    assert f"{says}" in told(found)
    assert "a description, not a finding" in told(found)
    assert "gained" not in told(found)


def test_migration_without_a_control_is_no_evidence():
    arms = {"concept": arms_of(4, moved=0.9)["concept"]}
    found = migration.migration(arms)
    assert found.control is None
    assert found.moved.gap is None
    assert found.to == "2"
    assert "without a control arm to compare with this is not evidence" in told(found)


def test_migration_does_not_depend_on_the_order_of_neurons_nor_on_scale():
    arms = arms_of(3, moved=0.5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))

    def changed(arm: Trajectory) -> Trajectory:
        site = arm.site
        snapshots = {
            stage: replace(s, saliency=replace(s.saliency, score=7 * s.saliency.score[:, order]))
            for stage, s in arm.snapshots.items()
        }
        return replace(arm, snapshots=snapshots, removed=Neurons(~arm.survivors().mask[:, order], site))

    other = {name: [changed(arm) for arm in side] for name, side in arms.items()}
    for selection in ("matched", "all", "published"):
        found, same = (migration.migration(a, selection=selection) for a in (arms, other))
        assert (found.to, found.from_) == (same.to, same.from_)
        for a, b in zip((found.moved, found.distance), (same.moved, same.distance), strict=True):
            assert a.gap is not None
            assert b.gap is not None
            assert (a.gap.value, a.gap.low, a.gap.p) == pytest.approx((b.gap.value, b.gap.low, b.gap.p))


def test_migration_counts_turnover():
    # Nothing changes in the random arm; in the concept arm the top of the survivors changes as what moved grows.
    found = migration.migration(arms_of(3, moved=0.9, noise=0.0), top=0.2)
    assert found.turnover is not None
    assert found.turnover.control is not None
    assert found.turnover.control.value == 0
    assert 0 < found.turnover.concept.value < 1


def test_migration_follows_another_score():
    def flipped(snapshot: Snapshot) -> Saliency:
        return replace(snapshot.saliency, score=snapshot.saliency.score.flip(0), kind="flipped")

    arms = arms_of(3, moved=0.9)
    plain = migration.migration(arms, selection="all")
    found = migration.migration(arms, selection="all", score=flipped)
    assert found.moved.concept.value == pytest.approx(-plain.moved.concept.value)
    assert "the flipped saliency of 'place'" in told(found)


def test_migration_refuses_what_it_cannot_compare():
    arms = arms_of(2)
    with pytest.raises(ValueError, match="needs a concept arm, found random"):
        migration.migration({"random": arms["random"]})
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] of concept and \[1, 0\] of random"):
        migration.migration({**arms, "random": arms["random"][::-1]})
    with pytest.raises(ValueError, match=r"concept has no stage '9'; it has base, pruned, 1, 2"):
        migration.migration(arms, "9")
    every = torch.ones(5, 40, dtype=torch.bool)
    none = {name: [replace(a, removed=Neurons(every, a.site)) for a in side] for name, side in arms.items()}
    with pytest.raises(ValueError, match="no neuron survived in both arms"):
        migration.migration(none)


def test_migration_of_scores_that_are_zero_speaks_of_no_move():
    arms = arms_of(3)

    def nothing(snapshot: Snapshot) -> Saliency:
        return replace(snapshot.saliency, score=0 * snapshot.saliency.score)

    found = migration.migration(arms, score=nothing)
    assert (found.to, found.from_) == (None, None)
    assert "no move to speak of" in told(found)
