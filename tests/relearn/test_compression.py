"""Quantised and pruned weights against plain loops, and put back to the bit."""

from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.lora import adapted
from relearn_lens.relearn.compression import Pruned, Quantised, input_norms, pruned, quantised
from relearn_lens.text.facts.encoded import encode_facts
from tests.families import lent_language_model

MATRIX = "trunk.layers.1.mlp.fc_in.weight"


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def matrices(model: Any) -> list[str]:
    return [name for name, value in model.weights().items() if value.ndim == 2 and "layers" in name]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [0, 1])
def test_rounding_against_a_plain_loop(bits, outputs):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    most = {4: 7, 8: 127}[bits]
    whole = quantised(weight, outputs, bits)
    rows = zip(weight.movedim(outputs, 0), whole.movedim(outputs, 0), strict=True)
    for row, now in rows:
        scale = float(row.abs().max()) / most
        for w, q in zip(row.tolist(), now.tolist(), strict=True):
            assert q == pytest.approx(round(w / scale) * scale if scale else 0.0, abs=1e-6)
            assert abs(q - w) <= scale / 2 + 1e-6
        assert len(now.unique()) <= 2 * most + 1
    assert torch.equal(quantised(whole, outputs, bits), whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_twice_changes_nothing(bits):
    for seed in range(20):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 10)
        once = quantised(weight, 0, bits)
        assert torch.equal(quantised(once, 0, bits), once)


@pytest.mark.parametrize("attack", [Quantised(bits=4), Quantised(bits=8), Pruned(), Pruned(by="wanda", share=0.5)])
def test_it_is_there_for_a_while_and_undone_to_the_bit(model, facts, attack, untouched):
    before = weights(model)
    with untouched(model):
        for pause in attack(model, facts):
            inside = weights(model)
            assert (pause.step, pause.tokens_seen) == (0, 0)
            assert not any(torch.equal(inside[name], before[name]) for name in matrices(model))
            assert all(torch.equal(inside[n], v) for n, v in before.items() if n not in matrices(model))
        with attack.applied(model, facts):
            assert all(torch.equal(value, inside[name]) for name, value in model.weights().items())
        with pytest.raises(RuntimeError, match="on the way"), attack.applied(model, facts):
            raise RuntimeError("on the way")
        training = attack(model, facts)
        next(training)
        training.close()


def test_the_smallest_weights_of_each_channel_go():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, 1.0, -4.0, 5.0]])
    assert pruned(weight, 0, 0.5).tolist() == [[3, 0, 2, 0], [0, 0, -4, 5]]
    assert pruned(weight.T, 1, 0.5).T.tolist() == [[3, 0, 2, 0], [0, 0, -4, 5]]
    norms = torch.tensor([0.1, 10.0, 1.0, 1.0])
    assert pruned(weight, 0, 0.5, norms).tolist() == [[0, -1, 2, 0], [0, 1, 0, 5]]


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_the_share_of_every_channel(model, facts, share):
    with Pruned(share=share).applied(model, facts):
        for name in matrices(model):
            gone = (model.weights()[name] == 0).sum(1)
            assert set(gone.tolist()) == {round(share * model.weights()[name].shape[1])}


def test_norms_of_inputs_against_passages_read_alone(model, facts):
    text = encode_facts(facts, "retain_general", tokenizer=model.tokenizer)
    squares = torch.zeros(24, dtype=torch.float64)
    for i in range(text.n_pieces):
        batch = text.batch(np.array([i]))
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(batch.ids)
        squares += cache["blocks.1.mlp.out.hook_in"][0].double().square().sum(0)
    norms = input_norms(model, text)
    plain = model.plain()
    torch.testing.assert_close(norms[id(plain["trunk.layers.1.mlp.fc_out.weight"])], squares.sqrt().float())
    with Pruned(by="wanda", share=0.5).applied(model, facts):
        cut = model.weights()["trunk.layers.1.mlp.fc_out.weight"] == 0
    size = plain["trunk.layers.1.mlp.fc_out.weight"].detach().abs() * squares.sqrt().float()
    for row, gone in zip(size, cut, strict=True):
        assert row[gone].max() <= row[~gone].min()


@pytest.mark.parametrize("attack", [Quantised(), Pruned(share=0.5), Pruned(share=0.5, by="wanda")])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_output_channels_of_each_family(kind, attack):
    """Of GPT-2 the weights are [in, out], and queries, keys and values one matrix."""
    model: Any = lent_language_model(kind)
    corpus = toy.corpus(sentences=5)
    before = weights(model)
    with attack.applied(model, {"retain_near": corpus}):
        inside = weights(model)
    name = {"gpt2": "trunk.h.0.mlp.c_proj.weight", "llama": "trunk.layers.0.mlp.down_proj.weight"}[kind]
    axis = 0 if kind == "llama" else 1
    channels = inside[name].movedim(axis, 0)
    if isinstance(attack, Quantised):
        assert torch.equal(inside[name], quantised(before[name], axis, 4))
        assert max(len(row.unique()) for row in channels) <= 15
    else:
        assert {int((row == 0).sum()) for row in channels} == {round(0.5 * channels.shape[1])}
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


def test_a_model_with_adapters_is_refused(model, facts):
    with adapted(model), pytest.raises(ValueError, match="quantised: this model has low-rank adapters now"):
        Quantised().applied(model, facts)
    with pytest.raises(ValueError, match="share"):
        Pruned(share=1)
    with pytest.raises(ValueError, match="bits"):
        Quantised(bits=3)  # type: ignore[arg-type]
