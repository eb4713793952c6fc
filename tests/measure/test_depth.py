"""Unlearning depth: 0 for the model that knew, 1 for the one that never did, and what lies between."""

import numpy as np
import pytest
import torch

from relearn_lens.measure.asking import Reference, ask
from relearn_lens.measure.depth import UnlearningDepth
from relearn_lens.models import taught
from relearn_lens.models.training import train_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED
from relearn_lens.text.facts.encoded import encode_passages

FACTS = made.people(0, n=12, forget=8, never=0, animals=2, n_answers=8)
SMALL = taught.Recipe(n_layers=2, d_model=32, n_heads=2, d_mlp=64)


def small(*roles: str, steps: int = 60):
    model = taught.untaught(FACTS, recipe=SMALL)
    text = encode_passages(FACTS.passages(*roles, forms=TRAINED), model.tokenizer, context=model.context)
    for _ in train_(model, text, steps=(steps,), lr=1e-2, batch_size=64, seed=0):
        pass
    return model.eval()


def copy_of(model):
    copy = taught.untaught(FACTS, recipe=SMALL)
    copy.load_weights(model.weights())
    return copy.eval()


@pytest.fixture(scope="module")
def models():
    """The base and its twin, and another copy of each."""
    base, never = small(*FORGET, *RETAIN), small(*RETAIN)
    return base, never, copy_of(base), copy_of(never)


@pytest.mark.parametrize("faithful", [False, True])
def test_depth_of_the_base_is_0_and_of_the_twin_1(models, untouched, faithful):
    base, never, again, twin = models
    metric, reference = UnlearningDepth(faithful=faithful), Reference(base, never)
    with untouched(base), untouched(never), untouched(again):
        of_base = metric(again, FACTS, reference=reference)
    of_twin = metric(twin, FACTS, reference=reference)
    assert len(reference.kept) == 1  # what the base and the twin give is kept
    for place in of_base.labels:
        assert of_base.shown(place) == pytest.approx(0, abs=1e-6)
        assert of_twin.shown(place) == pytest.approx(1, abs=1e-6)
        assert of_twin.chance(place) == 1
        assert of_base.value(place) > of_twin.value(place)
        for layer in of_base.layers:
            assert of_base.layer(layer).shown(place) == pytest.approx(0, abs=1e-6)
            assert of_twin.layer(layer).shown(place) == pytest.approx(1, abs=1e-6)


def test_depth_is_that_of_patches_made_by_hand(models):
    base, never, _, _ = models
    half = copy_of(base)
    with torch.no_grad():
        ours, theirs = half.weights(), never.weights()
        for name, value in ours.items():
            if value.is_floating_point():
                value.copy_((value + theirs[name]) / 2)
    asked = ask(FACTS, keys=1, wordings=1)
    depth = UnlearningDepth()(half, asked, reference=Reference(base, never))
    expected, layers = [], []
    for passage, place in zip(asked.passages, asked.places, strict=True):
        if place != FORGET[1]:
            continue
        text = encode_passages([passage], base.tokenizer)
        ids = torch.tensor([[*text.prefix, *text.ids.tolist()]])
        answer = [len(text.prefix) + i for i in np.flatnonzero(text.scored)]
        at = [i - 1 for i in answer]

        def log_p(patch=None, layer=None, ids=ids, at=at, answer=answer):
            def put(activations, hook):
                activations = activations.clone()
                activations[0, at] = patch[0, at]  # pyright: ignore[reportOptionalSubscript]
                return activations

            hooks = [] if patch is None else [(f"blocks.{layer}.hook_out", put)]
            with torch.no_grad():
                logits = base.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)[0].log_softmax(-1)
            return float(logits[at, ids[0, answer]].mean())

        s1, s2 = [], []
        for layer in (0, 1):
            with torch.no_grad():
                states = [m.bridge.run_with_cache(ids)[1][f"blocks.{layer}.hook_out"] for m in (never, half)]
            s1.append(log_p() - log_p(states[0], layer))
            s2.append(log_p() - log_p(states[1], layer))
        s1, s2 = np.array(s1), np.array(s2)
        there = s1 > 0.05
        share = (s2[there] / s1[there]).clip(0, 1)
        if there.any():
            expected.append((s1[there] * share).sum() / s1[there].sum())
            layers.append([(s2[i] / s1[i]).clip(0, 1) if there[i] else np.nan for i in (0, 1)])
    assert 0 < np.mean(expected) < 1
    assert depth.shown(FORGET[1]) == pytest.approx(np.mean(expected), abs=1e-4)
    assert list(depth.by_layer(FORGET[1]).values()) == pytest.approx(np.nanmean(layers, 0).tolist(), abs=1e-4)


def test_what_the_twin_knows_too_is_left_out_and_counted(models):
    base, never, again, _ = models
    depth = UnlearningDepth(least=100.0)
    with pytest.raises(ValueError, match=r"take nothing \(more than 100.0 nats per token\) from the base at any layer"):
        depth(again, FACTS, reference=Reference(base, never))
    reference = Reference(base, never)
    UnlearningDepth()(again, FACTS, reference=reference)
    (s1,) = reference.kept.values()
    middle = float(np.median(s1.max(1)))
    partly = UnlearningDepth(least=middle)(again, FACTS, reference=reference)
    assert sum(partly.left_out.values()) == (s1.max(1) <= middle).sum()
    assert sum(partly.left_out.values()) + partly.support()["overall"] == len(s1)


def test_depth_refuses_what_it_cannot_compare(models):
    base, never, again, _ = models
    with pytest.raises(ValueError, match=r"depth compares with the model 'never', which was not given; pass"):
        UnlearningDepth()(again, FACTS, reference=Reference(base))
    with pytest.raises(ValueError, match=r"no layer '7'; known: 0, 1"):
        UnlearningDepth()(again, FACTS, reference=Reference(base, never)).layer("7")
    wide = taught.untaught(FACTS, recipe=taught.Recipe(n_layers=1, d_model=32, n_heads=2, d_mlp=64))
    with pytest.raises(ValueError, match=r"the model 'never' has 1 blocks of width 32 .* tokens, this one has 2 of 32"):
        UnlearningDepth()(again, FACTS, reference=Reference(base, wide))
    with pytest.raises(ValueError, match=r"depth is of what was forgotten, and none of forget_attacked"):
        UnlearningDepth()(again, ask(FACTS, roles=RETAIN), reference=Reference(base, never))
