"""Pruning by what activations do on two texts: against a plain loop, and what is planted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.model import hidden
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.ablation import prune_
from relearn_lens.remove.masks import SelectivePrune, SetDifferencePrune, moments


@pytest.fixture(scope="module")
def texts():
    return {"forget": toy.corpus(sentences=7), "retain": toy.corpus(sentences=5, seed=1)}


def activations(model: Any, text: Any, shift: int = 0) -> torch.Tensor:
    """[sub-word, layer, neuron], each sentence read alone, from the modules themselves."""
    each = []
    for i in range(text.n_pieces):
        batch, seen = text.batch(np.array([i])), []
        handles = [
            block.mlp.fc_out.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][0]))
            for block in model.bridge.original_model.layers
        ]
        with torch.no_grad():
            hidden(model.bridge, batch.ids, batch.mask)
        for handle in handles:
            handle.remove()
        each.append(torch.stack(seen, 1)[batch.subword - shift])
    return torch.cat(each)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("before", [False, True])
def test_moments_equal_a_plain_loop(texts, before):
    model = toy.language_model()
    text = model.encode(texts["forget"])
    x, sums = activations(model, text, int(before)), moments(model, text, before=before)
    torch.testing.assert_close(sums["abs"], x.abs().mean(0))
    torch.testing.assert_close(sums["square"], x.square().mean(0))
    torch.testing.assert_close(sums["mean"], x.mean(0))
    torch.testing.assert_close(sums["freq"], (x > 0).float().mean(0))


IMPORTANCE: Any = {
    "abs": lambda x: x.abs().mean(0),
    "rms": lambda x: x.square().mean(0).sqrt(),
    "std": lambda x: x.std(0, correction=0),
    "freq": lambda x: (x > 0).float().mean(0),
}


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("among", [False, True])
def test_selective_pruning_by_hand(texts, importance, among):
    model, other = toy.language_model(), toy.language_model()
    forget, retain = (
        IMPORTANCE[importance](activations(model, model.encode(texts[role]))) for role in ("forget", "retain")
    )
    ratio, site = forget / (retain + 0.1), site_of(model.bridge, "mlp_post")
    allowed = Neurons.of(site, [(str(i), j) for i in (1, 3) for j in range(40)])
    members = [(i, j) for i in range(4) for j in range(64) if not among or (str(i), j) in allowed]
    members = sorted(members, key=lambda at: -float(ratio[at]))[:10]
    prune_(other, Neurons.of(site, [(str(i), j) for i, j in members]))
    before = weights(model)
    pruning = SelectivePrune(share=10 / 256, importance=importance, eps=0.1)(model, texts, allowed if among else None)
    assert same(before, model.weights())
    (pause,) = pruning
    assert pause.step == 0
    assert same(other.weights(), model.weights())
    assert not same(before, model.weights())


@pytest.mark.parametrize("among", [False, True])
def test_a_set_difference_by_hand(texts, among):
    model = toy.language_model()
    lengths = [activations(model, model.encode(texts[role])).square().mean(0).sqrt() for role in ("forget", "retain")]
    before = weights(model)
    where = WeightMask.of_parts(model, "block 2") if among else None
    list(SetDifferencePrune(forget=0.25, retain=0.125)(model, texts, where))
    for name, value in model.weights().items():
        expected = before[name].clone()
        if name.endswith("fc_out.weight") and (not among or ".2." in name):
            layer = int(name.split(".")[2])
            for row in expected:
                tops = [sorted(range(64), key=lambda j: -float(abs(row[j]) * x[layer, j])) for x in lengths]
                for j in set(tops[0][:16]) - set(tops[1][:8]):
                    row[j] = 0
        assert torch.equal(value, expected), name
    assert not same(before, model.weights())


def test_planted_places_are_pruned_and_persons_stay():
    """Sentences that hold a place beside those that hold none: the planted neurons of places go, and no person's."""
    made = toy.load(sentences=300)
    model, site = made.tagger, site_of(made.tagger.bridge, "mlp_post")
    text = model.encode(made.corpus)
    label = made.corpus.label[text.word_of] == toy.LABELS.index("place")
    has = [bool(label[a:b].any()) for a, b in zip(text.piece_start[:-1], text.piece_start[1:], strict=True)]

    def only(places: bool) -> Any:
        spans = [np.arange(*text.piece_start[i : i + 2]) for i in range(text.n_pieces) if has[i] == places]
        at, start = np.concatenate(spans), np.cumsum([0, *map(len, spans)])
        return replace(text, ids=text.ids[at], word_of=text.word_of[at], piece_start=start)

    sums = {"forget": moments(model, only(True)), "retain": moments(model, only(False))}
    chosen = SelectivePrune(share=0.05, eps=0.05).chosen(model, sums, None)
    assert set(made.planted) <= set(chosen)
    assert not chosen & Neurons.of(site, toy.PERSON_NEURONS)


def test_what_is_lacking_is_said(texts):
    with pytest.raises(ValueError, match="selective_prune compares two texts, and there is no text for 'retain'"):
        SelectivePrune()(toy.language_model(), {"forget": texts["forget"]})
