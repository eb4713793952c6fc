"""Planted returns are named and nothing else is; a graft is what loading the mixed weights gives; all is put back."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.measure.evaluation import evaluate
from relearn_lens.measure.grafting import CUT, grafts, share_old
from relearn_lens.models import toy as toy_module
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import Model, reading
from relearn_lens.neurons.sites import Neurons, random_neurons, site_of
from relearn_lens.neurons.weights import WeightMask, parts
from relearn_lens.remove.ablation import prune_
from tests.families import IDS, MASK, lent_tagger
from tests.fixtures import Untouched
from tests.returns import (
    Return,
    blocks_that,
    copied,
    cut_toy,
    drawn_blocks,
    each_enough,
    needed_together,
    retrained_in,
)


@pytest.fixture(scope="module")
def late() -> Return:
    """Came back in block 3, the only one that may train."""
    return retrained_in(3, seed=0)


# --- planted returns


@pytest.mark.parametrize(("block", "seed"), [(0, 1), (2, 3)])
def test_the_only_block_that_trained_is_enough_and_needed(block, seed, untouched: Untouched):
    made = retrained_in(block, seed)
    moved = [name for name, value in made.retrained.items() if not torch.equal(value, made.cut_weights[name])]
    assert moved
    assert set(moved) <= set(parts(made.tagger)[f"block {block}"])
    with untouched(made.tagger):
        found = made.grafted()
    assert (found.value(found.cut, "F1"), found.value(found.retrained, "F1")) == (0, 1)
    assert found.value(found.retrained) - found.value(found.cut) > 5  # logits
    for part in found.parts:
        # The others are equal to the bit, so their shares are exactly none.
        share = 1.0 if part == f"block {block}" else 0.0
        assert (found.enough(part).value, found.needed(part).value) == (share, share), part
        assert (found.enough(part, "F1").value, found.needed(part, "F1").value) == (share, share), part
    assert repr(found).startswith("Grafts(margin -3 cut, ")
    assert f"; block {block} enough 1.00 needed 1.00, " in repr(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_blocks_that_are_each_enough_are_not_needed(seed, untouched: Untouched):
    blocks = drawn_blocks(seed)
    made = each_enough(blocks, seed)
    with untouched(made.tagger):
        found = made.grafted()
    assert blocks_that(found, "enough", at_least=0.9) == blocks_that(found, "enough", at_least=0.1) == set(blocks)
    assert blocks_that(found, "needed", at_least=0.1) == set()
    assert {part for part in found.parts if found.enough(part, "F1").value == 1} == {f"block {i}" for i in blocks}
    assert all(found.needed(part, "F1").value == 0 for part in found.parts)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_blocks_that_are_needed_together_are_none_enough_and_the_curve_jumps_at_the_second(seed):
    blocks = drawn_blocks(seed)
    found = needed_together(blocks, seed).grafted(cumulative=True)
    assert blocks_that(found, "needed", at_least=0.9) == blocks_that(found, "needed", at_least=0.1) == set(blocks)
    assert all(found.enough(part).value < 0.1 for part in found.parts)
    ends = found.value(found.cut), found.value(found.retrained)
    up, down = list(found.up.items()), list(found.down.items())[::-1]
    for curve, second in ((up, max(blocks)), (down, min(blocks))):
        values = [found.value(of) for _, of in curve]
        jump = [part for part, _ in curve].index(f"block {second}")
        assert all(abs(value - ends[0]) < 0.5 for value in values[:jump])
        assert all(abs(value - ends[1]) < 0.5 for value in values[jump:])


def test_half_of_a_block_and_bands_are_named():
    made = each_enough((0, 2), 5)
    found = made.grafted(parts=parts(made.tagger, within=[2]))
    assert found.enough("block 2 mlp").value > 0.9
    assert (found.enough("block 2 attention").value, found.needed("block 2 attention").value) == (0, 0)
    banded = made.grafted(parts=parts(made.tagger, bands=2))
    assert min(banded.enough(f"blocks {b}").value for b in ("0 to 1", "2 to 3")) > 0.9


def test_what_was_regrown_in_place_is_the_cuts_own(untouched: Untouched):
    made, *_ = cut_toy(0)
    regrown = Return(made.tagger, made.text, made.cut, made.cut_weights, copied(toy_module.tagger()))
    with untouched(made.tagger):
        found = regrown.grafted()
    assert found.parts[-1] == CUT
    assert [part for part in found.parts if found.enough(part).value] == [CUT]
    assert (found.enough(CUT).value, found.needed(CUT).value) == (1, 1)
    without = grafts(made.tagger, made.cut_weights, regrown.retrained, made.outcomes)
    assert (without.enough("block 1").value, CUT in without.parts) == (1, False)


# --- controls


def test_a_control_adds_a_change_and_leaves_the_cut_alone(late, untouched: Untouched):
    whole = copied(toy_module.tagger())
    change = {name: late.retrained[name] - late.cut_weights[name] for name in whole}
    regrown = {name: torch.where(late.cut[name], 3 * value, value) for name, value in whole.items()}
    controls = {
        "same change": (whole, {name: value + change[name] for name, value in whole.items()}),
        "unchanged": (whole, whole),
        "in the cut": (whole, regrown),
        "to the whole": (late.cut_weights, whole),
    }
    with untouched(late.tagger):
        found = late.grafted(controls=controls)
    assert found.control("same change", "block 3").value == pytest.approx(1, abs=1e-4)
    assert found.control("same change", "block 2").value == 0
    for name in ("unchanged", "in the cut", "to the whole"):  # each would undo the cut by what it says of its entries
        assert all(found.control(name, part).value == 0 for part in found.controls[name])
        assert found.value(found.whole[name]) == found.value(found.cut)
    assert found.value(found.whole["same change"]) == pytest.approx(found.value(found.retrained), abs=1e-3)
    assert CUT not in found.controls["same change"]
    assert found.most_of_controls() == pytest.approx(1, abs=1e-4)
    assert repr(found).endswith("; controls at most 1.00)")
    table = found.to_dataframe().set_index(["part", "outcome"])
    assert table.loc[("block 3", "margin"), "control_same change"] == pytest.approx(1, abs=1e-4)
    assert table.loc[("block 3", "F1"), ["enough", "needed", "alone", "reverted"]].tolist() == [1, 1, 1, 0]
    assert np.isnan(table.loc[(CUT, "F1"), "control_unchanged"])
    assert math.isnan(late.grafted().most_of_controls())


# --- the mechanism


@pytest.mark.parametrize("kind", ["bert", "gpt2", "native"])
def test_a_graft_is_what_the_mixed_weights_give(kind, untouched: Untouched):
    model: Any = lent_tagger(kind)
    generator = torch.Generator().manual_seed(0)
    cut = WeightMask.of(model, random_neurons(like=_third(model), seed=0))
    before = copied(model)
    prune_(model, cut)
    start = copied(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    end = copied(model)
    model.load_weights(before)

    def logits(of: Model) -> dict[str, float]:
        with reading(of):
            return {"logits": float((of(IDS, MASK)[MASK.bool()] * torch.linspace(0, 1, 5)).sum())}

    def mixed(mask: WeightMask, into: dict[str, torch.Tensor], of: dict[str, torch.Tensor]) -> float:
        model.load_weights({name: torch.where(mask[name], of[name], into[name]) for name in into})
        value = logits(model)["logits"]
        model.load_weights(before)
        return value

    with untouched(model):
        found = grafts(
            model, start, end, logits, cut=cut, cumulative=True, base_weights=model.weights(),
            controls={"half": (end, {name: (start[name] + end[name]) / 2 for name in end})},
        )  # fmt: skip
    for part in ("embedding", "block 1", "head", CUT):
        mask = cut if part == CUT else WeightMask.of_parts(model, part) - cut
        assert found.value(found.alone[part]) == mixed(mask, start, end)
        assert found.value(found.reverted[part]) == mixed(mask, end, start)
        if part != CUT:
            change = {name: start[name] + ((start[name] + end[name]) / 2 - end[name]) for name in end}
            assert found.value(found.controls["half"][part]) == pytest.approx(mixed(mask, start, change), abs=1e-4)
            assert found.value(found.alone[part]) != found.value(found.cut)
    assert found.base is not None
    assert found.value(found.base) == logits(model)["logits"]
    names = [part for part in found.parts if part != CUT]
    assert found.value(found.up[names[-1]]) == found.value(found.down[names[0]]) == found.value(found.retrained)
    assert found.value(found.up["block 0"]) == mixed(WeightMask.of_parts(model, names[:2]), start, end)
    assert found.value(found.down["head"]) == mixed(WeightMask.of_parts(model, "head"), start, end)


def _third(model: Any) -> Neurons:
    site = site_of(model.bridge, "mlp_post")
    return Neurons(torch.arange(site.width).expand(len(site.layers), -1) % 3 == 0, site)


def test_weights_that_are_the_models_own_do_not_move_under_it(late):
    late.tagger.load_weights(late.retrained)
    found = grafts(late.tagger, late.cut_weights, late.tagger.weights(), late.outcomes, cut=late.cut)
    assert found.to_dataframe().equals(late.grafted().to_dataframe())


def test_the_models_weights_are_back_after_an_error(late, untouched: Untouched):
    evaluations = {"margin": 0.0}

    def until(_: Model) -> dict[str, float]:
        evaluations["margin"] += 1
        if evaluations["margin"] == 6:
            raise KeyError("ends")
        return dict(evaluations)

    late.tagger.load_weights({name: value + 0.125 for name, value in late.retrained.items()})
    with untouched(late.tagger), pytest.raises(KeyError, match="ends"):
        grafts(late.tagger, late.cut_weights, late.retrained, until, cut=late.cut)


# --- noise


def test_no_shares_where_nothing_came_back(late):
    found = grafts(late.tagger, late.cut_weights, late.cut_weights, late.outcomes)
    share = found.enough("block 3")
    assert math.isnan(share.value)
    assert share.refused == "margin is -3 after the cut and -3 after retraining: nothing came back beyond noise (0)"
    assert repr(found) == f"Grafts(margin -3 cut, -3 retrained; no shares: {share.refused})"
    noisy = late.grafted(noise=1_000.0)
    assert "beyond noise (1e+03)" in str(noisy.needed("block 3").refused)
    assert noisy.enough("block 3", "F1").value == 1  # noise is of the primary outcome, in its unit


def test_scores_give_intervals_and_refuse_within_noise(late):
    def spans(model: Any):
        return evaluate(model, late.text)

    found = grafts(late.tagger, late.cut_weights, late.retrained, spans, cut=late.cut, label="place")
    share = found.enough("block 3")
    assert found.outcomes == ("F1",)
    assert (share.value, share.low, share.high) == (1, 1, 1)
    other = {name: late.cut_weights[name].lerp(late.retrained[name], 0.55) for name in late.retrained}
    between = grafts(late.tagger, late.cut_weights, other, spans, label="person")
    assert "F1 is 1 after the cut and 1 after retraining: nothing came back" in str(between.enough("head").refused)


def test_a_return_whose_interval_reaches_nothing_is_refused(late):
    """One sentence of many is right again: in many draws of the sentences it is not there."""
    whole = evaluate(late.tagger, late.text)
    states = iter([0, *[0] * 7, 1, *[1] * 7])

    def counted(_: Model):
        counts = whole.counts.copy()
        counts[..., :2] = 0
        if next(states):
            first = int(np.flatnonzero(whole.counts[:, whole.labels.index("place"), 2])[0])
            counts[first, :, 0] = counts[first, :, 1] = counts[first, :, 2]
        return type(whole)(whole.f1, whole.precision, whole.recall, counts, whole.labels)

    found = grafts(late.tagger, late.cut_weights, late.retrained, counted, label="place")
    assert "the interval of the difference reaches noise (0)" in str(found.enough("block 3").refused)
    assert math.isnan(found.needed("block 3").value)


# --- refusals


def test_refusals_come_before_any_evaluation(late, bert_model, untouched: Untouched):
    def never(_: Model) -> dict[str, float]:
        raise AssertionError("evaluated")

    args = (late.tagger, late.cut_weights, late.retrained, never)
    short = {name: value for name, value in late.cut_weights.items() if name != "head.bias"}
    with untouched(late.tagger):
        with pytest.raises(ValueError, match=r"retrained_weights are of another model: 1 names differ, .*head.bias"):
            grafts(late.tagger, late.cut_weights, short, never)
        with pytest.raises(ValueError, match="the end of control 'random' are of another model"):
            grafts(*args, controls={"random": (late.cut_weights, short)})
        with pytest.raises(ValueError, match="this mask is of the weights of another model"):
            grafts(*args, cut=WeightMask.none(bert_model))
        with pytest.raises(ValueError, match=r"parts name weights that the model does not have, such as 'head.gain'"):
            grafts(*args, parts={"head": ("head.gain",)})
        with pytest.raises(ValueError, match=r"parts must share no weight, and 'head.bias' is in two"):
            grafts(*args, parts={"head": ("head.bias",), "bias": ("head.bias",)})
        with pytest.raises(ValueError, match="a part is named 'cut', which is the name of the cut's own entries"):
            grafts(*args, parts={"cut": ("head.bias",)}, cut=late.cut)
        with pytest.raises(ValueError, match="there are no parts to graft"):
            grafts(*args, parts={})
        with adapted(late.tagger, rank=2), pytest.raises(ValueError, match="has low-rank adapters now; graft when"):
            grafts(*args)


def test_unknown_names_list_the_known_ones(late):
    found = late.grafted()
    with pytest.raises(ValueError, match=r"no part 'block 9'; known: embedding, block 0, .*cut"):
        found.enough("block 9")
    with pytest.raises(ValueError, match="no outcome 'loss'; known: margin, F1"):
        found.needed("head", "loss")
    with pytest.raises(ValueError, match="no control 'random'; known: none"):
        found.control("random", "head")


# --- the second cut


def test_share_of_old_neurons_beside_chance():
    site = site_of(toy_module.tagger().bridge, "mlp_post")
    old = Neurons(torch.arange(64).expand(4, -1) < torch.tensor([16, 0, 32, 64])[:, None], site)
    new = Neurons(torch.arange(64).expand(4, -1) < torch.tensor([8, 8, 0, 4])[:, None], site)
    assert share_old(new, old) == 12 / 20
    nobody = Neurons.of(site, [])
    assert math.isnan(share_old(nobody, old))
