"""The table of attacks, and the strongest of several within a budget of utility."""

from typing import Any

import pytest
import torch

import relearn_lens as rl
from relearn_lens.relearn.attack import Attack, Passing
from relearn_lens.relearn.attacks import ATTACKS, Point, points, strongest
from relearn_lens.relearn.compression import Quantised
from relearn_lens.relearn.finetuning import FineTune


def test_attacks_describe_themselves():
    assert list(ATTACKS) == [
        "relearn", "repair_then_relearn", "retain_only", "general", "gibberish", "benign", "quantised", "pruned",
        "latent", "embedding", "soft_prompt", "direction_ablated", "in_context", "paraphrase", "other_form",
    ]  # fmt: skip
    for name, kind in ATTACKS.items():
        assert kind.name == name
        assert kind.source
        assert (kind.__doc__ or "").rstrip().endswith(".")
        assert all(field.description for field in kind.model_fields.values())
        assert kind.__call__ is not Attack.__call__
        assert not issubclass(kind, Passing) or kind.applied is not Passing.applied


def test_they_are_reached_by_their_names():
    relearn: Any = rl.relearn
    assert relearn.FineTune(lora=8) == FineTune(lora=8)
    assert all(getattr(relearn, kind.__name__) is kind for kind in ATTACKS.values())
    with pytest.raises(ValueError, match="lr"):
        relearn.FineTune(lr=0)


@pytest.mark.parametrize("kind", ATTACKS.values(), ids=list(ATTACKS))
def test_every_attack_is_called_alike(make, facts, kind):
    short: dict[str, Any] = {"steps": (1, 2)} if "schedule" in kind.model_fields else {}
    model = make()
    attack = kind(**short)
    before = {name: value.clone() for name, value in model.weights().items()}
    pauses = list(attack(model, facts, seed=0))
    assert len(pauses) == (1 if isinstance(attack, Passing) else 3 if kind.name.startswith("repair") else 2)
    moved = any(not torch.equal(value, before[name]) for name, value in model.weights().items())
    assert moved == (not isinstance(attack, Passing))
    some = facts.passages("forget_held_out", forms="statement")
    assert {p.key for p in attack.asked(some, facts)} == {p.key for p in some}
    assert attack == kind(**attack.model_dump(exclude_unset=True))


def test_points_are_scored_in_place_and_the_weights_are_put_back(make, facts):
    model = make()
    before = {name: value.clone() for name, value in model.weights().items()}
    name = "trunk.layers.0.mlp.fc_in.weight"

    def moved(model: Any) -> float:
        return float((model.weights()[name] - before[name]).norm())

    each = points(FineTune(steps=(1, 2), lr=1e-2, lora=2), model, facts, moved, lambda _: 1.0)
    assert [p.step for p in each] == [1, 2]
    assert 0 < each[0].score < each[1].score
    (rounded,) = points(Quantised(), model, facts, moved, lambda _: 1.0)
    assert rounded.score > 0
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


CURVES = {
    "a": {0: [Point(1, 0.2, 0.8), Point(2, 0.9, 0.5)], 1: [Point(1, 0.3, 0.8), Point(2, 0.25, 0.8)]},
    "b": {0: [Point(1, 0.4, 0.73), Point(2, 0.6, 0.71)], 1: [Point(1, 0.1, 0.79), Point(2, 0.9, 0.6)]},
}
REMOVED = {0: Point(0, 0.0, 0.8), 1: Point(0, 0.0, 0.8)}


def test_the_strongest_is_chosen_on_one_seed_and_reported_on_the_others():
    best = strongest(CURVES, REMOVED)
    assert best.arm == "b"
    assert best.by_seed == {0: Point(1, 0.4, 0.73), 1: Point(1, 0.1, 0.79)}  # .72 is a tenth less than .8
    assert best.reported == {1: Point(1, 0.1, 0.79)}
    assert best.passing == {"a": (1, 2), "b": (1, 2)}
    assert repr(best) == (
        "Strongest(b, chosen on seed 0; seed 1: 0.100 at step 1; within a utility loss of 10% against the removed "
        "model)"
    )
    other = strongest(CURVES, REMOVED, chosen_on=1)
    assert (other.arm, other.reported) == ("a", {0: Point(1, 0.2, 0.8)})
    assert strongest(CURVES, REMOVED, budget=0.5).by_seed[0] == Point(2, 0.9, 0.5)
    gained = {"c": {0: [Point(1, 0.1, 0.95)]}}
    assert "chosen on seed 0, the same; seed 0: 0.100" in repr(strongest(gained, {0: Point(0, 0.0, 0.8)}))


def test_that_none_passes_is_said():
    none = strongest({"a": {0: [Point(1, 0.9, 0.1), Point(2, 0.9, 0.2)]}}, {0: REMOVED[0]})
    assert (none.arm, none.by_seed) == (None, {0: None})
    assert repr(none) == (
        "Strongest(none passes: each of 2 points of 1 arms has more than a utility loss of 10% against the removed "
        "model)"
    )
    later = strongest({"a": {0: [Point(1, 0.9, 0.8)], 1: [Point(1, 0.9, 0.1)]}}, REMOVED)
    assert (later.arm, later.reported) == ("a", {1: None})
    assert "seed 1: none passes" in repr(later)


def test_searches_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"strongest: 0 arms, seeds \[0, 1\]; give at least one arm"):
        strongest({}, REMOVED)
    with pytest.raises(ValueError, match="strongest: 'a' and the removed models do not both have seed 1"):
        strongest({"a": {0: CURVES["a"][0]}}, REMOVED)
    with pytest.raises(ValueError, match=r"the removed model of seed 1 has utility 0.0, so no share of it can be lost"):
        strongest(CURVES, {**REMOVED, 1: Point(0, 0.0, 0.0)})
