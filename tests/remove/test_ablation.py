"""Hooks and weights must say the same; what holds still holds exactly; nothing else is touched."""

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks

from relearn_lens.models.model import Tagger, hidden, reading
from relearn_lens.neurons.sites import Neurons, parameter, site_of, streaming
from relearn_lens.remove.ablation import ablated, held, prune_
from relearn_lens.text.encoding import encode
from tests.fixtures import Untouched, unchecked


def random_set(tagger: Tagger, where: str, share: float = 0.3, seed: int = 0, layers: str = "") -> Neurons:
    """A random share of a site's neurons, in some layers or all."""
    site = site_of(tagger.bridge, where)
    mask = torch.rand(len(site.layers), site.width, generator=torch.Generator().manual_seed(seed)) < share
    if layers:
        mask &= torch.tensor([layer in layers.split() for layer in site.layers])[:, None]
    assert mask.any()
    return Neurons(mask, site)


@pytest.fixture
def batch(encoded):
    (batch,) = encoded.batches()
    return batch


@pytest.fixture
def toy_batch(toy):
    return next(encode(toy.corpus, toy.tagger.tokenizer).batches(max_tokens=300))


def logits(tagger: Tagger, batch) -> Tensor:
    """Logits of the real tokens."""
    with reading(tagger):
        return tagger(batch.ids, batch.mask)[batch.mask.bool()]


def activations(tagger: Tagger, where: str, batch) -> list[Tensor]:
    """What the hooks of every layer see."""
    seen: list[Tensor] = []
    site = site_of(tagger.bridge, where)
    with reading(tagger), streaming(tagger.bridge, site, lambda layer, x: seen.append(x.clone())):
        hidden(tagger.bridge, batch.ids, batch.mask)
    return seen


def snapshot(tagger: Tagger) -> dict[str, Tensor]:
    """Copies of all weights, under Hugging Face's names."""
    return {
        name.replace("_original_component.", ""): weight.detach().clone() for name, weight in tagger.named_parameters()
    }


def steps(tagger: Tagger, batch, optimizer: torch.optim.Optimizer, n: int) -> None:
    """So many steps of training on the tags of one batch."""
    for _ in range(n):
        scores = tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword]
        torch.nn.functional.cross_entropy(scores, batch.tag).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- ablated: hooks, for a while


@pytest.mark.parametrize("layers", ["", "embed", "2"])
def test_ablated_equals_pruned_for_the_hidden_state_of_bert(bert, batch, layers, untouched: Untouched):
    chosen = random_set(bert, "resid", layers=layers)
    before = logits(bert, batch)
    with untouched(bert), ablated(bert, chosen, value=0.0):
        by_hook = logits(bert, batch)
    with untouched(bert, weights=False):
        prune_(bert, chosen)
    torch.testing.assert_close(logits(bert, batch), by_hook, atol=1e-5, rtol=0)
    assert (by_hook - before).abs().max() > 1e-3


@pytest.mark.parametrize("sever", ["out", "both"])
def test_ablated_equals_pruned_for_the_hidden_units_of_bert(bert, batch, sever):
    chosen = random_set(bert, "mlp_post")
    before = logits(bert, batch)
    with ablated(bert.bridge, chosen):
        by_hook = logits(bert, batch)
    prune_(bert.bridge, chosen, sever=sever)
    torch.testing.assert_close(logits(bert, batch), by_hook, atol=1e-5, rtol=0)
    assert (by_hook - before).abs().max() > 1e-3


@pytest.mark.parametrize("sever", ["out", "both"])
def test_ablated_equals_pruned_for_the_hidden_units_of_the_toy(toy, toy_batch, sever, untouched: Untouched):
    chosen = random_set(toy.tagger, "mlp_post")
    before = logits(toy.tagger, toy_batch)
    with untouched(toy.tagger), ablated(toy.tagger, chosen):
        by_hook = logits(toy.tagger, toy_batch)
    prune_(toy.tagger, chosen, sever=sever)
    torch.testing.assert_close(logits(toy.tagger, toy_batch), by_hook, atol=1e-5, rtol=0)
    assert (by_hook - before).abs().max() > 1e-3


def test_ablated_of_every_neuron_of_the_last_layer_leaves_the_heads_bias(toy, toy_batch):
    """Pre-norm: the last hidden state is the output LayerNorm's bias, 0, where the residual stream is 0."""
    chosen = random_set(toy.tagger, "resid", share=2.0, layers="3")
    with ablated(toy.tagger, chosen):
        got = logits(toy.tagger, toy_batch)
    torch.testing.assert_close(got, toy.tagger.head.bias.expand_as(got), atol=1e-6, rtol=0)


def test_ablated_holds_each_neuron_at_its_value_on_every_token(bert_model, batch):
    chosen = random_set(bert_model, "resid", share=0.5)
    values = torch.randn(chosen.mask.shape, generator=torch.Generator().manual_seed(1))
    free = activations(bert_model, "resid", batch)
    with ablated(bert_model, chosen, value=values):
        got = activations(bert_model, "resid", batch)
    for layer, x in enumerate(got):
        mask = chosen.mask[layer]
        assert (x[..., mask] == values[layer, mask]).all()
        assert not torch.equal(x[..., ~mask], free[layer][..., ~mask]) or layer == 0
    with ablated(bert_model, chosen, value=0.5):
        assert (activations(bert_model, "resid", batch)[2][..., chosen.mask[2]] == 0.5).all()


def test_ablated_at_the_values_there_are_changes_nothing(bert_model, batch):
    """One token: its own activations are the value of every neuron."""
    ids = torch.tensor([[5]])
    one = type("One", (), {"ids": ids, "mask": torch.ones_like(ids)})
    values = torch.stack([x[0, 0] for x in activations(bert_model, "mlp_post", one)])
    before = logits(bert_model, one)
    with ablated(bert_model, random_set(bert_model, "mlp_post"), value=values):
        torch.testing.assert_close(logits(bert_model, one), before, atol=1e-6, rtol=0)


def test_ablated_refuses_values_of_another_shape(bert_model, untouched: Untouched):
    chosen = random_set(bert_model, "resid")
    with (
        untouched(bert_model),
        pytest.raises(ValueError, match=r"value must be a number or of shape \(4, 32\), got \(32, 4\)"),
        ablated(bert_model, chosen, value=torch.zeros(32, 4)),
    ):
        pass


def test_ablated_refuses_a_set_of_another_model(bert_model, toy_model, untouched: Untouched):
    for where in ("resid", "mlp_post"):
        chosen = random_set(toy_model.tagger, where)
        with untouched(bert_model), pytest.raises(ValueError, match=where), ablated(bert_model, chosen):
            pass


def test_ablated_nests_as_the_union(bert_model, batch, untouched: Untouched):
    one, two = (random_set(bert_model, "resid", seed=seed) for seed in (0, 1))
    with untouched(bert_model), ablated(bert_model, one):
        alone = logits(bert_model, batch)
        with ablated(bert_model, two):
            both = logits(bert_model, batch)
        assert torch.equal(logits(bert_model, batch), alone)
    with ablated(bert_model, one | two):
        assert torch.equal(logits(bert_model, batch), both)


def test_ablated_inside_another_wins(bert_model, batch):
    chosen = random_set(bert_model, "resid")
    with ablated(bert_model, chosen, value=1.0):
        with ablated(bert_model, chosen, value=2.0):
            assert (activations(bert_model, "resid", batch)[1][..., chosen.mask[1]] == 2).all()
        assert (activations(bert_model, "resid", batch)[1][..., chosen.mask[1]] == 1).all()


def test_ablated_leaves_nothing_after_an_error(bert_model, batch, untouched: Untouched):
    before = logits(bert_model, batch)

    def body() -> None:
        with ablated(bert_model, random_set(bert_model, "resid")):
            logits(bert_model, batch)
            raise KeyError("mine")

    with untouched(bert_model), pytest.raises(KeyError, match="mine"):
        body()
    assert torch.equal(logits(bert_model, batch), before)


def test_ablated_nothing_changes_nothing(bert_model, batch, untouched: Untouched):
    site = site_of(bert_model.bridge)
    before = logits(bert_model, batch)
    with untouched(bert_model), ablated(bert_model, Neurons.of(site, []), value=7.0):
        assert torch.equal(logits(bert_model, batch), before)


def test_ablated_lets_gradients_through_the_others_alone(bert, batch):
    chosen = random_set(bert, "mlp_post", layers="2")
    with ablated(bert, chosen):
        bert(batch.ids, batch.mask).square().sum().backward()
    gradient = bert.trunk.encoder.layer[2].intermediate.dense.bias.grad
    assert (gradient[chosen.mask[2]] == 0).all()
    assert (gradient[~chosen.mask[2]] != 0).any()


# --- prune_: in the weights, once


def test_prune_zeroes_the_gain_and_bias_of_bert_and_nothing_else(bert, untouched: Untouched):
    chosen, before = random_set(bert, "resid"), snapshot(bert)
    with untouched(bert, weights=False):
        prune_(bert, chosen)
    norms = ["trunk.embeddings.LayerNorm"] + [f"trunk.encoder.layer.{i}.output.LayerNorm" for i in range(3)]
    for name, mask in zip(norms, chosen.mask, strict=True):
        for part in ("weight", "bias"):
            before[f"{name}.{part}"][mask] = 0
    now = snapshot(bert)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("sever", ["out", "both"])
def test_prune_zeroes_the_output_rows_of_hidden_units_and_nothing_else(bert, sever):
    chosen, before = random_set(bert, "mlp_post"), snapshot(bert)
    prune_(bert, chosen, sever=sever)
    for i, mask in enumerate(chosen.mask):
        layer = f"trunk.encoder.layer.{i}"
        before[f"{layer}.output.dense.weight"][:, mask] = 0
        if sever == "both":
            before[f"{layer}.intermediate.dense.weight"][mask] = 0
            before[f"{layer}.intermediate.dense.bias"][mask] = 0
    now = snapshot(bert)
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_prune_zeroes_the_toys_output_rows_and_nothing_else(toy):
    chosen = Neurons.of(site_of(toy.tagger.bridge, "mlp_post"), toy.planted)
    before = snapshot(toy.tagger)
    prune_(toy.tagger, chosen, sever="both")
    before["trunk.layers.1.mlp.fc_out.weight"][:, [7, 19, 32, 58]] = 0
    before["trunk.layers.1.mlp.fc_in.weight"][[7, 19, 32, 58]] = 0
    before["trunk.layers.1.mlp.fc_in.bias"][[7, 19, 32, 58]] = 0
    now = snapshot(toy.tagger)
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_prune_refuses_the_hidden_state_of_a_pre_norm_model(toy, untouched: Untouched):
    chosen = random_set(toy.tagger, "resid", layers="1 2")
    said = (
        r"site 'resid' of a TransformerLensNative model has no weights to prune with sever='out' "
        r"\(layer '1' is a sum over blocks\): use `with ablated\(...\)`, or sever='gain' .*site 'mlp_post'"
    )
    with untouched(toy.tagger):
        with pytest.raises(ValueError, match=said):
            prune_(toy.tagger, chosen)
        with pytest.raises(ValueError, match=said), held(toy.tagger, chosen):
            pass


def test_prune_refuses_an_unknown_sever(bert, untouched: Untouched):
    chosen = random_set(bert, "mlp_post")
    with untouched(bert):
        with pytest.raises(ValueError, match="unknown sever 'in'; known: out, both, gain, writes"):
            unchecked(prune_)(bert, chosen, sever="in")
        with (
            pytest.raises(ValueError, match="unknown sever 'in'; known: out, both, gain, writes"),
            unchecked(held)(bert, chosen, sever="in"),
        ):
            pass


def test_prune_refuses_a_set_of_another_model(bert, toy_model, untouched: Untouched):
    with untouched(bert), pytest.raises(ValueError, match="mlp_post"):
        prune_(bert, random_set(toy_model.tagger, "mlp_post"))


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_pruned_neurons_are_free_to_grow_back(bert, batch, where):
    chosen = random_set(bert, where, layers="1")
    prune_(bert, chosen)
    steps(bert, batch, torch.optim.AdamW(bert.parameters(), lr=1e-2), 3)
    layer = bert.trunk.encoder.layer[1].output
    grown = layer.LayerNorm.weight if where == "resid" else layer.dense.weight.T
    mask = chosen.mask[chosen.site.layers.index("1")]
    assert (grown[mask].flatten() != 0).float().mean() > 0.99


def test_neurons_severed_on_both_sides_stay_dead(bert, batch):
    """No gradient reaches them: zero in, zero out, and GELU of zero is zero."""
    chosen = random_set(bert, "mlp_post", layers="1")
    prune_(bert, chosen, sever="both")
    steps(bert, batch, torch.optim.AdamW(bert.parameters(), lr=1e-2), 3)
    layer = bert.trunk.encoder.layer[1]
    assert (layer.output.dense.weight[:, chosen.mask[1]] == 0).all()
    assert (layer.intermediate.dense.weight[chosen.mask[1]] == 0).all()


# --- held: through training


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize(("where", "sever"), [("resid", "out"), ("mlp_post", "out"), ("mlp_post", "both")])
def test_held_neurons_stay_exactly_where_they_are(bert, batch, where, sever, pruned, untouched: Untouched):
    """Through weight decay and momentum that was there before; all other weights move."""
    chosen = random_set(bert, where, layers="0 2")
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2, weight_decay=0.1)
    bert.train()
    steps(bert, batch, optimizer, 2)
    if pruned:
        prune_(bert, chosen, sever=sever)
    before = snapshot(bert)
    bert.eval()
    with untouched(bert, weights=False), held(bert, chosen, sever=sever):
        steps(bert, batch, optimizer, 5)
    bert.zero_grad()
    now, holds = snapshot(bert), {}
    for i, mask in ((0, chosen.mask[chosen.site.layers.index("0")]), (2, chosen.mask[chosen.site.layers.index("2")])):
        layer = f"trunk.encoder.layer.{i}"
        if where == "resid":
            holds[f"{layer}.output.LayerNorm.weight"] = holds[f"{layer}.output.LayerNorm.bias"] = mask
        else:
            holds[f"{layer}.output.dense.weight"] = mask.expand_as(now[f"{layer}.output.dense.weight"])
            if sever == "both":
                holds[f"{layer}.intermediate.dense.bias"] = mask
                weight = now[f"{layer}.intermediate.dense.weight"]
                holds[f"{layer}.intermediate.dense.weight"] = mask[:, None].expand_as(weight)
    for name, mask in holds.items():
        assert torch.equal(now[name][mask], before[name][mask]), name
        assert (now[name][mask] == 0).all() == pruned, name
    for name, weight in now.items():
        others = weight != before[name]
        if name in holds:
            others = others[~holds[name]]
        assert others.float().mean() > 0.9, name


def test_held_stays_through_plain_sgd_with_momentum(toy, toy_batch):
    chosen = Neurons.of(site_of(toy.tagger.bridge, "mlp_post"), toy.planted)
    optimizer = torch.optim.SGD(toy.tagger.parameters(), lr=0.1, momentum=0.9)
    steps(toy.tagger, toy_batch, optimizer, 1)
    weight = parameter(toy.tagger.bridge, chosen.site.writes[1][0])
    before = weight.detach().clone()
    with held(toy.tagger.bridge, chosen):
        steps(toy.tagger, toy_batch, optimizer, 3)
    assert torch.equal(weight[:, chosen.mask[1]], before[:, chosen.mask[1]])
    assert not torch.equal(weight, before)


def test_held_masks_the_gradient(bert, batch):
    """So that clipping by the norm of all gradients does not count what cannot move."""
    chosen = random_set(bert, "resid", layers="1")
    norm = bert.trunk.encoder.layer[1].output.LayerNorm
    with held(bert, chosen):
        bert(batch.ids, batch.mask).square().sum().backward()
    mask = chosen.mask[2]
    assert (norm.weight.grad[mask] == 0).all()
    assert (norm.weight.grad[~mask] != 0).all()


def test_held_neurons_move_again_afterwards(bert, batch):
    chosen = random_set(bert, "mlp_post")
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    prune_(bert, chosen)
    with held(bert, chosen):
        steps(bert, batch, optimizer, 1)
    weight = bert.trunk.encoder.layer[0].output.dense.weight
    assert (weight[:, chosen.mask[0]] == 0).all()
    steps(bert, batch, optimizer, 1)
    assert (weight[:, chosen.mask[0]] != 0).all()


def test_held_leaves_no_hook_after_an_error(bert, batch, untouched: Untouched):
    chosen = random_set(bert, "resid")

    def body() -> None:
        with held(bert, chosen):
            assert len(_global_optimizer_post_hooks) == 1
            assert all(parameter(bert.bridge, part)._backward_hooks for part in chosen.site.writes[0])
            raise KeyError("mine")

    with untouched(bert), pytest.raises(KeyError, match="mine"):
        body()
    assert not _global_optimizer_post_hooks
    assert not any(parameter(bert.bridge, part)._backward_hooks for part in chosen.site.writes[0])


def test_held_takes_frozen_weights(bert, batch):
    chosen = random_set(bert, "resid")
    bert.trunk.requires_grad_(False)
    before = snapshot(bert)
    with held(bert, chosen):
        steps(bert, batch, torch.optim.AdamW(bert.parameters(), lr=1e-2), 1)
    now = snapshot(bert)
    assert [name for name in now if not torch.equal(now[name], before[name])] == ["head.weight", "head.bias"]


def test_held_of_one_model_leaves_another_alone(bert, toy, toy_batch):
    with held(bert, random_set(bert, "mlp_post")):
        before = snapshot(toy.tagger)
        steps(toy.tagger, toy_batch, torch.optim.AdamW(toy.tagger.parameters(), lr=1e-2), 1)
    now = snapshot(toy.tagger)
    assert not any(torch.equal(now[name], before[name]) for name in ("head.weight", "trunk.layers.1.mlp.fc_out.weight"))
