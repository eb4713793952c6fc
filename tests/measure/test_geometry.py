"""How weights moved, against updates whose geometry is known."""

import math

import pytest
import torch

from relearn_lens.measure.asking import Reference
from relearn_lens.measure.course import track_facts
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.geometry import Moved, Rank, Returned, effective_rank
from relearn_lens.models import taught
from relearn_lens.text import facts as made

FACTS = made.people(0, n=8, forget=4, never=0, animals=2, n_answers=8)
SMALL = taught.Recipe(n_layers=2, d_model=32, n_heads=2, d_mlp=64)


@pytest.fixture
def models():
    return taught.untaught(FACTS, recipe=SMALL), taught.untaught(FACTS, recipe=SMALL)


def noise(model, seed, size=0.01):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(value.shape, generator=draw)
        for name, value in model.weights().items()
        if value.is_floating_point()
    }


def add_(model, update, times=1.0):
    with torch.no_grad():
        for name, value in model.weights().items():
            if name in update:
                value.add_(times * update[name])


def copied(model):
    return {name: value.clone() for name, value in model.weights().items()}


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 8))) == pytest.approx(1, abs=1e-3)
    assert effective_rank(3 * torch.eye(6)) == pytest.approx(6)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(torch.diag(shares)) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_who_did_not_move_moved_by_nothing(models, untouched):
    model, base = models
    with untouched(model):
        moved = Moved()(model, FACTS, reference=Reference(base))
        rank = Rank()(model, FACTS, reference=Reference(base))
    assert moved.labels == ("embedding", "block 0", "block 1", "final norm", "head")
    assert {moved.shown(part) for part in (*moved.labels, OVERALL)} == {0}
    assert {rank.shown(part) for part in rank.labels} == {0}


def test_norm_and_rank_of_a_change_that_is_known(models):
    model, base = models
    name = next(n for n, v in model.weights().items() if v.ndim == 2 and v.shape[0] != v.shape[1])
    with torch.no_grad():
        weight = model.weights()[name]
        weight.add_(torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1])))
    moved = Moved()(model, FACTS, reference=Reference(base))
    rank = Rank()(model, FACTS, reference=Reference(base))
    part = next(p for p in moved.labels if moved.shown(p) > 0)
    assert [p for p in moved.labels if moved.shown(p)] == [part]
    length = math.sqrt(sum(float(v.square().sum()) for v in base.weights().values() if v.is_floating_point()))
    assert moved.shown(OVERALL) == pytest.approx(math.sqrt(weight.numel()) / length, rel=1e-3)
    assert rank.shown(part) == rank.shown(OVERALL) == pytest.approx(1, abs=1e-2)
    assert rank.chance(part) > 10  # noise is spread over most directions


def test_a_way_back_has_cosine_1_a_random_one_about_0(models):
    model, base = models
    removal = noise(model, 0)
    add_(model, removal)
    removed = copied(model)
    reference = Reference(base, removed=removed)
    before = Returned()(model, FACTS, reference=reference)
    assert before.shown(OVERALL) == before.chance(OVERALL) == 0
    add_(model, removal, -0.3)
    back = Returned()(model, FACTS, reference=reference)
    assert back.shown(OVERALL) == pytest.approx(1, abs=1e-4)
    assert all(back.shown(part) == pytest.approx(1, abs=1e-4) for part in back.labels)
    add_(model, removal, 0.6)
    assert Returned()(model, FACTS, reference=reference).shown(OVERALL) == pytest.approx(-1, abs=1e-4)
    drawn = []
    for seed in range(20):
        model.load_weights(removed)
        add_(model, noise(model, seed + 1))
        scores = Returned()(model, FACTS, reference=reference)
        drawn.append(scores.shown(OVERALL))
    expected = scores.random(OVERALL)
    assert torch.tensor(drawn).std() == pytest.approx(expected, rel=0.5)
    assert max(map(abs, drawn)) < 4 * expected


def test_tracking_takes_the_removed_weights_at_its_first_stage(models):
    model, base = models
    removal = noise(model, 0)
    add_(model, removal)

    def back():
        from relearn_lens.models.training import Checkpoint

        add_(model, removal, -0.5)
        yield Checkpoint(1.0, 1, 0, 0.0)

    path = track_facts(model, FACTS, back(), metrics=["accuracy", "returned"], reference=Reference(base))
    assert path["removed"].metrics["returned"].shown(OVERALL) == 0
    assert path["1"].metrics["returned"].shown(OVERALL) == pytest.approx(1, abs=1e-3)
    assert "returned" in path.table()
    assert "1.00" in path.table().splitlines()[3]


def test_weights_of_another_model_are_refused(models):
    model, base = models
    other = taught.untaught(FACTS, recipe=taught.Recipe(n_layers=1, d_model=32, n_heads=2, d_mlp=64))
    with pytest.raises(ValueError, match=r"the base's weights are of another model: \d+ names differ"):
        Moved()(model, FACTS, reference=Reference(other))
    with pytest.raises(ValueError, match=r"returned compares with the weights right after removing, which were not"):
        Returned()(model, FACTS, reference=Reference(base))
    with pytest.raises(ValueError, match=r"the removed weights are of another model"):
        Returned()(model, FACTS, reference=Reference(base, removed=copied(other)))
    with pytest.raises(ValueError, match=r"no part 'block 9'; known: embedding, block 0"):
        Moved()(model, FACTS, reference=Reference(base)).shown("block 9")
