"""Two checkpoints of one model, and what tells them apart."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from relearn_lens.find.circuits import path_patching
from relearn_lens.find.localising import statements
from relearn_lens.find.patching import contrasted
from relearn_lens.measure.crosspatch import cross_patch, head_roles
from relearn_lens.models import toy
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import LanguageModel
from relearn_lens.text.facts import Facts, Passage
from tests.families import lent_language_model
from tests.fixtures import VOCAB
from tests.made import MOVED, looked_up


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return looked_up()[0]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return looked_up()[1]


def weights(model: LanguageModel, **without: slice) -> Mapping[str, Tensor]:
    """The model's weights; without what a head of block 2 writes, or without what the MLP of block 1 writes."""
    copied = {name: value.clone() for name, value in model.weights().items()}
    if "head" in without:
        copied["trunk.layers.2.attn.o.weight"][:, without["head"]] = 0
    if "mlp" in without:
        copied["trunk.layers.1.mlp.fc_out.weight"][:, without["mlp"]] = 0
    return copied


def test_the_component_in_which_two_checkpoints_differ_is_named(model, facts, untouched):
    whole, no_mlp = weights(model), weights(model, mlp=slice(None))
    with untouched(model):
        patched = cross_patch(model, no_mlp, whole, statements(facts))
    assert patched.source > 5 > patched.into
    assert patched.mlps.tolist() == pytest.approx([0, 1, 0], abs=0.02)
    assert patched.resid.tolist() == pytest.approx([0, 1, 1], abs=0.02)
    # What the head gathers is downstream of the difference, so it carries it too; no other head does.
    assert float(patched.heads[2, 1]) == pytest.approx(1, abs=0.02)
    assert patched.heads.abs().sum() == pytest.approx(1, abs=0.05)
    assert patched.concentration(1) > 0.95
    assert patched.concentration(6) == 1
    assert patched.unit == "logits"
    assert "most head 1 of block 2 at 1.00" in repr(patched)


def test_what_reads_differently_is_not_in_what_is_read(model, facts):
    """Only the output matrix differs: what the head gathers is the same, what is made of it is not."""
    whole, no_head = weights(model), weights(model, head=slice(32, 64))
    patched = cross_patch(model, no_head, whole, statements(facts))
    assert patched.heads.abs().max() < 0.02
    assert patched.resid.tolist() == pytest.approx([0, 0, 1], abs=0.02)


def test_checkpoints_that_do_the_same_have_no_shares(model, facts):
    patched = cross_patch(model, weights(model), model.weights(), statements(facts))
    assert "not beyond two standard errors" in str(patched.refused)
    assert patched.heads.isnan().all()
    assert "no shares" in repr(patched)


def test_an_error_leaves_the_model_as_it_was(model, facts, untouched):
    def metric(logits: Tensor, target: Tensor, rival: Tensor | None) -> Tensor:
        raise RuntimeError("stop")

    with untouched(model), pytest.raises(RuntimeError, match="stop"):
        cross_patch(model, weights(model, mlp=slice(None)), weights(model), statements(facts), metric=metric)


def test_roles_of_heads_over_training_are_direct_effects_at_each_checkpoint(model, facts, untouched):
    stages = {"whole": model.weights(), "damaged": weights(model, head=slice(32, 64)), "mended": weights(model)}
    passages, corrupt = contrasted(statements(facts), ())
    with untouched(model):
        roles = head_roles(model, stages, passages, corrupt)
    paths = path_patching(model, passages, corrupt)
    assert torch.equal(roles.of("whole"), paths.direct)
    assert torch.equal(roles.of("mended"), roles.of("whole"))
    assert float(paths.direct[2, 1]) == pytest.approx(paths.clean - paths.corrupt, rel=0.01)
    assert roles.of("damaged").abs().max() < 0.1
    assert set(roles.top("whole", 1)) == {MOVED}
    assert roles.rank_correlation("whole", "mended") == pytest.approx(1)
    table = roles.to_dataframe()
    assert list(table.columns) == ["stage", "block", "head", "effect", "unit"]
    assert len(table) == 3 * 6
    assert set(table["unit"]) == {"logits"}
    (row,) = (r for r in table.to_dict("records") if (r["stage"], r["block"], r["head"]) == ("whole", "2", 1))
    assert row["effect"] == pytest.approx(float(paths.direct[2, 1]))
    assert "whole 10" in repr(roles)


def test_what_is_no_checkpoint_of_the_model_is_refused(model, facts):
    passages = statements(facts)
    other = toy.language_model().weights()
    with pytest.raises(ValueError, match="the weights 'source' are of another model"):
        cross_patch(model, model.weights(), other, passages)
    with pytest.raises(ValueError, match="the weights 'late' are of another model"):
        head_roles(model, {"late": other}, passages, passages)
    with pytest.raises(ValueError, match="there are no stages to read heads at"):
        head_roles(model, {}, passages, passages)
    own, _ = looked_up()
    with adapted(own, rank=2), pytest.raises(ValueError, match="this model has low-rank adapters now; patch when"):
        cross_patch(own, weights(model), weights(model), passages)


def test_a_number_of_heads_or_a_stage_that_is_not_there_is_refused(model, facts):
    passages, corrupt = contrasted(statements(facts), ())
    roles = head_roles(model, {"whole": model.weights()}, passages, corrupt)
    with pytest.raises(ValueError, match="no stage 'late'; known: whole"):
        roles.of("late")
    with pytest.raises(ValueError, match="k must be 1 to 6, the number of heads, got 7"):
        roles.top("whole", 7)
    patched = cross_patch(model, weights(model, mlp=slice(None)), weights(model), passages)
    with pytest.raises(ValueError, match="k must be 1 to 6, the number of heads, got 0"):
        patched.concentration(0)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen3", "gemma2"])
def test_families_of_decoders_are_patched_alike(kind, untouched):
    """Weights of block 1 differ, so nothing before it does, and all that follows is in the state after it."""
    model = lent_language_model(kind)
    places = ("rome", "york", "town", "road")
    passages = [
        Passage(f"the old {key} was in", places[i % 4], key, choices=(places[i % 4], places[(i + 1) % 4]))
        for i, key in enumerate(["paul", "new", "cold", "par", "saw", "left", "to", "and"])
    ]
    clean, corrupt = contrasted(passages, ())

    path_patching(model, clean, corrupt)  # a bridge hooks up its norms at the first pass
    other = {name: value.clone() for name, value in model.weights().items()}
    changed = [name for name in other if ".1." in name and other[name].is_floating_point()]
    for name in changed:
        other[name] += 0.5 * torch.randn(other[name].shape, generator=torch.Generator().manual_seed(0))
    with untouched(model):
        paths = path_patching(model, clean, corrupt)
        # The logit of a word whose difference between the two is not noise.
        by_word = (
            cross_patch(model, model.weights(), other, passages, metric=lambda logits, *_, word=word: logits[:, word])
            for word in range(5, len(VOCAB))
        )
        patched = next(each for each in by_word if each.refused is None)
    assert patched.resid.tolist() == pytest.approx([0, 1, 1], abs=1e-3)
    assert patched.heads[0].abs().max() < 1e-3
    assert patched.heads[1].abs().max() > 1e-3
    assert paths.n_passages == len(passages)
    assert paths.direct.isfinite().all()
    assert paths.direct.abs().min() > 0
