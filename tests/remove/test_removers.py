"""What all removers keep to: masks, roles, a reference, resuming; names and descriptions; pruning; one's own."""

from itertools import islice
from typing import Any

import pytest
import torch

from relearn_lens.methods import Training
from relearn_lens.models import toy
from relearn_lens.models.training import cross_entropy
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.remove.ablation import prune_
from relearn_lens.remove.losses import NPO, GradDiff, GradientAscent
from relearn_lens.remove.pruning import Prune
from relearn_lens.remove.removal import Remover, Removing
from relearn_lens.remove.removers import REMOVERS, WRAPPERS, remove_
from relearn_lens.remove.representations import RMU
from relearn_lens.remove.routing import SGTM, GradientRoute
from relearn_lens.remove.wrappers import SAM

TRAINED = [
    *(kind() for kind in REMOVERS.values() if issubclass(kind, Remover) and kind not in (GradientRoute, SGTM)),
    *(kind(retain="kl") for kind in (GradDiff, NPO)),
]


PREFERRED = toy.corpus(sentences=6, seed=2)


@pytest.fixture(scope="module")
def texts():
    return {
        "forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1), "preferred": PREFERRED,
        "tuning": toy.corpus(sentences=6, seed=3),
    }  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("step", [None, SAM(rho=0.1)])
@pytest.mark.parametrize("remover", TRAINED, ids=repr)
def test_masked_entries_move_and_all_others_stay_to_the_bit(texts, remover, step):
    model = toy.language_model()
    before, name = weights(model), "trunk.layers.0.mlp.fc_out.weight"
    mask = torch.arange(before[name].numel()).view_as(before[name]) % 3 == 0
    wrapped = {} if step is None else {"step": step}
    for _ in remover(model, texts, {name: mask}, steps=(1, 2), batch_size=4, lr=1e-2, weight_decay=1.0, **wrapped):
        pass
    for other, value in weights(model).items():
        if other == name:
            assert torch.equal(value[~mask], before[name][~mask])
            assert not (value[mask] == before[name][mask]).any()
        else:
            assert torch.equal(value, before[other]), other


@pytest.mark.parametrize("remover", TRAINED, ids=repr)
def test_a_removal_leaves_nothing_but_weights(texts, remover, untouched):
    model = toy.language_model()
    with untouched(model, weights=False):
        for _ in remover(model, texts, steps=(1, 2), batch_size=4):
            pass


@pytest.mark.parametrize("remover", [GradDiff(retain="kl"), NPO(), RMU()], ids=repr)
def test_resuming_ends_in_the_same_weights_to_the_bit(texts, remover):
    how: dict[str, Any] = {"steps": (2, 4), "batch_size": 4, "lr": 1e-3, "seed": 7}
    whole = toy.language_model()
    pauses = list(remover(whole, texts, **how))
    model = toy.language_model()
    training = remover(model, texts, **how)
    (pause,) = islice(training, 1)
    state = {name: value.clone() for name, value in training.state().items()}
    with pytest.raises(ValueError, match="compares with the model as it was before the first step"):
        remover(model, texts, **how, resume=(pause, state))
    assert list(remover(model, texts, **how, resume=(pause, state), reference=training.reference)) == pauses[1:]
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize("remover", [GradientAscent(), GradDiff(), NPO()], ids=repr)
def test_what_is_forgotten_gets_less_likely(texts, remover):
    model = toy.language_model()
    text = model.encode(texts["forget"])

    def nats() -> float:
        with torch.no_grad():
            return float(torch.cat([model.losses(batch) for batch in text.batches()]).mean())

    before = nats()
    list(remover(model, {**texts, "retain": toy.corpus(sentences=6, seed=9)}, steps=(20,), lr=3e-3, batch_size=6))
    assert nats() > before + 0.1


def test_how_it_trains(texts):
    training = NPO()(toy.language_model(), texts)
    assert training.how == Removing() == Removing(epochs=10, lr=1e-5, batch_size=32)
    assert RMU()(toy.language_model(), texts).how == Removing(lr=5e-5)
    assert RMU()(toy.language_model(), texts, steps=(3,)).how == Removing(lr=5e-5, steps=(3,))
    assert NPO()(toy.language_model(), texts, how=Training(lr=3e-3), warmup=2).how == Training(lr=3e-3, warmup=2)
    with pytest.raises(ValueError, match=r"^lr = 0: Input should be greater than 0"):
        NPO()(toy.language_model(), texts, lr=0)
    with pytest.raises(ValueError, match="Removing has no field 'beta'; it has epochs"):
        NPO()(toy.language_model(), texts, beta=0.1)


def test_a_role_without_a_text_is_refused(texts):
    forget = {"forget": texts["forget"]}
    with pytest.raises(
        ValueError, match=r"grad_diff lowers -gamma CE_f .* no text for 'retain'; texts are there for forg"
    ):
        GradDiff()(toy.language_model(), forget)
    with pytest.raises(ValueError, match=r"no text for 'forget'; texts are there for nothing"):
        NPO()(toy.language_model(), {})
    list(NPO(alpha=0)(toy.language_model(), forget, steps=(1,)))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(NPO, "beta", 0), (NPO, "alpha", -1), (GradDiff, "gamma", 0), (RMU, "coefficient", 0), (GradDiff, "retain", "l2")],
)
def test_fields_out_of_range_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


def test_there_is_no_released_form_of_a_cross_entropy():
    with pytest.raises(ValueError, match="faithful = True and retain = 'ce': only the KL was released otherwise"):
        GradDiff(faithful=True)


# --- names


def test_removers_describe_themselves():
    assert {"prune", "gradient_ascent", "grad_diff", "npo", "rmu"} <= set(REMOVERS)
    assert next(iter(WRAPPERS)) == "sam"
    for name, kind in {**REMOVERS, **WRAPPERS}.items():
        assert kind.name == name
        assert kind.formula
        assert kind.source
        assert (kind.__doc__ or "").endswith((".", ".\n    "))
        assert all(field.description for field in kind.model_fields.values())
        kind()  # every field has a default


def test_a_remover_by_name_or_as_it_is(texts):
    ends = []
    for remover in ("grad_diff", GradDiff()):
        model = toy.language_model()
        assert len(list(remove_(model, texts, remover, steps=(1, 2), lr=1e-3))) == 2
        ends.append(weights(model))
    assert same(*ends)


def test_an_unknown_name_lists_the_known(texts):
    with pytest.raises(
        ValueError, match=r"unknown remover 'npoo'; did you mean 'npo'. Known: prune, selective_prune, "
    ):
        remove_(toy.language_model(), texts, "npoo")


def test_a_remover_of_ones_own_is_a_function(texts):
    def mine(model, batches, reference):
        nats = model.losses(batches["forget"])
        return {"forget": (-nats.sum(), len(nats))}

    ends = []
    for remover in (mine, "gradient_ascent"):
        model = toy.language_model()
        forget = {"forget": texts["forget"]}
        list(remove_(model, forget, remover, steps=(3,), lr=1e-3, step=SAM(rho=0.01), seed=2))
        ends.append(weights(model))
    assert same(*ends)
    with pytest.raises(ValueError, match="objective 'mine' does not say over how many"):
        remove_(toy.language_model(), texts, mine, accumulate=2)
    list(remove_(toy.language_model(), texts, cross_entropy, steps=(1,), accumulate=2))


# --- pruning


def neurons(model: Any) -> Neurons:
    site = site_of(model.bridge, "mlp_post")
    return Neurons.of(site, [("1", 3), ("2", 5)])


@pytest.mark.parametrize("sever", ["out", "both"])
def test_prune_is_a_remover(sever):
    model, other = toy.language_model(), toy.language_model()
    before = weights(model)
    pruning = Prune(sever=sever)(model, None, neurons(model))
    assert same(before, weights(model))  # nothing happens until it is asked
    (pause,) = pruning
    assert (pause.step, pause.epoch, pause.tokens_seen, pause.stage) == (0, 0, 0, "0")
    assert pause.loss != pause.loss  # there is none
    prune_(other, neurons(other), sever=sever)
    assert same(weights(model), weights(other))
    list(remove_(toy.language_model(), None, "prune", neurons(model)))


def test_prune_says_what_it_lacks(texts):
    model = toy.language_model()
    with pytest.raises(ValueError, match="prune: no neurons to prune; give a set of them as where="):
        Prune()(model)
    hidden = Neurons.of(site_of(model.bridge, "resid"), [("1", 3)])
    with pytest.raises(ValueError, match="no weights to prune with sever='out'"):
        Prune()(model, where=hidden)
    with pytest.raises(ValueError, match="prune trains nothing, so it takes no 'lr'"):
        remove_(model, None, "prune", neurons(model), lr=1e-3)
    with pytest.raises(ValueError, match="where: neurons are pruned, and a training is given weights"):
        remove_(model, texts, "npo", neurons(model))
