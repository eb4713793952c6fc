"""Similarity against numpy on plain Hugging Face, by hand, on permuted and independent neurons, and on the toy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertModel, BertTokenizer

from relearn_lens.measure.similarity import (
    ActivationSimilarity,
    Plan,
    _Moments,
    _result,
    activation_similarity,
)
from relearn_lens.models.model import Tagger
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import WordDraw, stream
from relearn_lens.remove.ablation import prune_
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import build_corpus
from relearn_lens.text.encoding import Encoded
from tests.find.test_saliency import site, slow_words
from tests.fixtures import PIECES, Untouched, sentences_of, ticks

PLACE = Concept("place", labels=("LOC",))
CPU = torch.device("cpu")


def compared(before: Any, after: Any, *, batch: int = 10_000, rows: int = 10_000) -> ActivationSimilarity:
    """The similarity of activations `[word, layer, neuron]`, given in batches and taken so many neurons at a time."""
    one, two = (torch.as_tensor(x, dtype=torch.float32) for x in (before, after))
    place = site(*one.shape[1:])
    parts = []
    for start in range(0, place.n_neurons, rows):
        moments = _Moments(place, start, Plan(1, rows, len(one), 0), CPU)
        for x, y in zip(one.split(batch), two.split(batch), strict=True):
            for layer in range(x.shape[1]):
                moments.before(layer, x[:, layer])
            for layer in range(y.shape[1]):
                moments.after(layer, y[:, layer])
        parts.append(moments.finish())
    return _result("all", parts, place)


def agree(a: ActivationSimilarity, b: ActivationSimilarity, tolerance: float = 3e-6) -> None:
    for name in ("same", "best", "flow", "cka"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=tolerance, rtol=0, equal_nan=True)
    assert torch.equal(a.best_layer, b.best_layer)
    assert torch.equal(a.best_neuron, b.best_neuron)
    assert (a.which, a.n_words, a.site) == (b.which, b.n_words, b.site)


def read_words(model: Any, encoded: Encoded, where: str) -> np.ndarray:
    """Activations `[word, layer, neuron]` of all words, as one forward pass per batch of 60 tokens gives them."""
    place = site_of(model.bridge, where)
    draw = WordDraw(place, encoded, PLACE.classes(encoded.corpus), encoded.corpus.n_words)
    stream(model, encoded, [draw], site=place, max_tokens=60)
    return draw.sample().activations.double().numpy()


def agrees_with_numpy(found: ActivationSimilarity, before: np.ndarray, after: np.ndarray) -> None:
    """Against `np.corrcoef` of all words at once, a pair of neurons at a time."""
    n, layers, width = before.shape
    one, two = before.reshape(n, -1), after.reshape(n, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.corrcoef(one, two, rowvar=False)[: layers * width, layers * width :]
    np.testing.assert_allclose(found.same.flatten(), both.diagonal(), atol=1e-5)
    flow = np.zeros((layers, layers))
    for k, row in enumerate(both):
        layer, neuron = divmod(k, width)
        best = found.best[layer, neuron]
        if np.isnan(row).all():
            assert best.isnan()
            assert found.best_layer[layer, neuron] == found.best_neuron[layer, neuron] == -1
            continue
        at = int(np.nanargmax(np.abs(row)))
        assert (found.best_layer[layer, neuron], found.best_neuron[layer, neuron]) == divmod(at, width)
        assert best == pytest.approx(row[at], abs=1e-5)
        flow[layer, at // width] += 1
    np.testing.assert_allclose(found.flow, flow / flow.sum(1, keepdims=True), atol=1e-6)
    for i in range(layers):
        for j in range(layers):
            x, y = before[:, i] - before[:, i].mean(0), after[:, j] - after[:, j].mean(0)
            cka = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
            assert found.cka[i, j] == pytest.approx(cka, abs=1e-5)


def shaken(tagger: Tagger, size: float = 0.1) -> Tagger:
    """Another model of the same shape: every weight moved at random."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tagger.weights().values():
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=size)
    return tagger


def kept(tagger: Tagger) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tagger.weights().items()}


@pytest.fixture
def normal() -> np.random.Generator:
    return np.random.default_rng(0)


# --- by hand


def test_two_neurons_that_changed_places_by_hand():
    # before: a and b are uncorrelated. After: neuron 0 is 5 - 3 b, neuron 1 is 2 a.
    a, b = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, -2.0, 1.0])
    found = compared(torch.stack([a, b], 1)[:, None], torch.stack([5 - 3 * b, 2 * a], 1)[:, None])
    torch.testing.assert_close(found.same, torch.zeros(1, 2))
    torch.testing.assert_close(found.best, torch.tensor([[1.0, -1.0]]))
    assert (found.best_layer.tolist(), found.best_neuron.tolist()) == ([[0, 0]], [[1, 0]])
    assert found.flow.tolist() == [[1.0]]
    # |a|^2 = 2, |b|^2 = 6: X'X = diag(2, 6), Y'Y = diag(54, 8), Y'X holds -18 and 4
    torch.testing.assert_close(found.cka, torch.tensor([[(18**2 + 4**2) / ((4 + 36) * (54**2 + 64)) ** 0.5]]))
    assert (found.n_words, found.which) == (3, "all")
    assert found.cka.dtype == found.same.dtype == found.best.dtype == found.flow.dtype == torch.float32


def test_a_match_in_another_layer_makes_the_flow():
    # layer 0 before: x and x^2; layer 1 before: constant and x. After, x is in layer 1 and x^2 in layer 0.
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    one, noise = torch.ones(5), torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    before = torch.stack([torch.stack([x, x**2], 1), torch.stack([one, x], 1)], 1)
    after = torch.stack([torch.stack([x**2, noise], 1), torch.stack([-x, 3 * one], 1)], 1)
    found = compared(before, after)
    torch.testing.assert_close(found.flow, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert found.best_layer.tolist() == [[1, 0], [-1, 1]]
    assert found.best_neuron.tolist() == [[0, 0], [-1, 0]]
    nan = float("nan")
    torch.testing.assert_close(found.best, torch.tensor([[-1.0, 1.0], [nan, -1.0]]), equal_nan=True)
    assert found.same.isnan().tolist() == [[False, False], [True, True]]


def test_all_constant_gives_nan_everywhere():
    found = compared(torch.ones(4, 2, 3), torch.ones(4, 2, 3))
    for values in (found.same, found.best, found.flow, found.cka):
        assert values.isnan().all()
    assert (found.best_layer == -1).all()
    assert np.isnan([found.chance, found.chance_high, found.above_chance()]).all()


@pytest.mark.parametrize("value", [0.1, -7.3, 1e4, 1e-20])
def test_a_constant_neuron_is_nan_whatever_its_value_and_the_batches(normal, value):
    before = normal.normal(size=(40, 2, 3))
    after = before.copy()
    before[:, 0, 1] = value
    after[:, 1, 2] = value
    found = compared(before, after, batch=7)
    assert found.same.isnan().nonzero().tolist() == [[0, 1], [1, 2]]
    assert found.best.isnan().nonzero().tolist() == [[0, 1]]


def test_a_neuron_of_the_size_of_rounding_counts_as_constant(normal):
    # MiniLM has neurons with a gain of 1e-31
    before = normal.normal(size=(40, 2, 3))
    before[:, 1, 1] *= 1e-31
    assert compared(before, before).same.isnan().nonzero().tolist() == [[1, 1]]


# --- permutations, parts, batches


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(12)), st.sampled_from([5, 7, 12]), st.sampled_from([10, 30]))
def test_permuted_neurons_are_found_wherever_they_went(order, rows, batch):
    rng = np.random.default_rng(0)
    before = rng.normal(size=(30, 3, 4))
    sign = np.where(np.arange(12) % 2, 1.0, -2.0)
    after = np.empty((30, 12))
    after[:, order] = before.reshape(30, 12) * sign + 3
    found = compared(before, after.reshape(30, 3, 4), rows=rows, batch=batch)
    assert (found.best_layer * 4 + found.best_neuron).flatten().tolist() == list(order)
    torch.testing.assert_close(found.best.flatten(), torch.from_numpy(np.sign(sign)).float(), atol=1e-5, rtol=0)
    expected = np.zeros((3, 3))
    for k, to in enumerate(order):
        expected[k // 4, to // 4] += 0.25
    np.testing.assert_allclose(found.flow, expected, atol=1e-6)


@pytest.mark.parametrize(("rows", "batch"), [(1, 25), (4, 7), (5, 3), (14, 25)])
def test_parts_and_batches_do_not_change_the_result(normal, rows, batch):
    before = normal.normal(size=(50, 3, 5)) * 3 + 2
    after = before @ normal.normal(size=(5, 5)) + normal.normal(size=(50, 3, 5))
    before[:, 1, 2] = 4
    agrees_with_numpy(compared(before, after, rows=rows, batch=batch), before, after)
    agree(compared(before, after, rows=rows, batch=batch), compared(before, after))


def test_a_large_mean_does_not_swallow_the_variance(normal):
    before = (normal.normal(size=(2000, 2, 4)) + 300 * normal.normal(size=(2, 4))).astype(np.float32)
    after = (0.5 * before + normal.normal(size=(2000, 2, 4)) + 1000).astype(np.float32)
    agrees_with_numpy(compared(before, after, batch=100), before.astype(np.float64), after.astype(np.float64))


def test_a_first_batch_unlike_the_rest_does_not_swallow_the_variance(normal):
    # as where the concept has a single word in the longest sentences, and its activations are massive
    before = normal.normal(size=(1000, 2, 4))
    before[0] += 1e5
    before = before.astype(np.float32)
    after = (0.5 * before + normal.normal(size=(1000, 2, 4))).astype(np.float32)
    after[0] = normal.normal(size=(2, 4))
    agrees_with_numpy(compared(before, after, batch=1), before.astype(np.float64), after.astype(np.float64))


# --- chance


def best_by_chance(before: np.ndarray, after: np.ndarray, draws: int) -> np.ndarray:
    """Best |correlation| of random neurons before, their words permuted, with any neuron after: the slow way."""
    rng = np.random.default_rng(5)
    y = after.reshape(len(after), -1)
    y = (y - y.mean(0)) / np.linalg.norm(y - y.mean(0), axis=0)
    found = []
    for _ in range(draws):
        x = rng.permutation(before.reshape(len(before), -1)[:, rng.integers(before[0].size)])
        found.append(np.abs((x - x.mean()) / np.linalg.norm(x - x.mean()) @ y).max())
    return np.array(found)


@pytest.mark.parametrize("batch", [5, 1000])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_chance_agrees_with_a_simulation(normal, batch, tails):
    before, after = normal.normal(size=(2, 80, 3, 40))
    if tails == "heavy":  # few words drive each neuron, so that two of them meet by chance
        before, after = before**5, after**5
    found, simulated = compared(before, after, batch=batch), best_by_chance(before, after, 600)
    assert found.chance == pytest.approx(simulated.mean(), abs=4 * simulated.std() / 8)
    assert found.chance_high == pytest.approx(np.quantile(simulated, 0.95), rel=0.12)
    # independent neurons: about one in twenty is above the 95th percentile
    assert 0.0 <= found.above_chance() < 0.15
    assert compared(before, before, batch=batch).above_chance() == 1.0


def test_chance_falls_with_more_words_and_rises_with_more_neurons(normal):
    def chance(words: int, width: int) -> float:
        before, after = normal.normal(size=(2, words, 2, width))
        return compared(before, after).chance

    assert chance(30, 40) > chance(300, 40) + 0.2
    assert chance(100, 100) > chance(100, 5) + 0.05


def test_above_chance_of_some_neurons(normal):
    before, after = normal.normal(size=(2, 200, 2, 6))
    after[:, 1, :3] = before[:, 0, :3]
    found = compared(before, after)
    moved = Neurons.of(found.site, [("0", 0), ("0", 1), ("0", 2)])
    assert found.above_chance(moved) == 1.0
    assert found.above_chance(~moved) <= 2 / 9
    assert found.best_layer[moved.mask].tolist() == [1, 1, 1]


# --- models


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_similarity_agrees_with_a_slow_loop(
    bert_folder, bert, bert_model, plain, tokenizer, corpus, encoded, where, untouched: Untouched
):
    shaken(bert)
    if where == "resid":
        prune_(bert, Neurons.of(site_of(bert.bridge), [("embed", 3), ("1", 0), ("2", 31)]))
    other = BertModel.from_pretrained(bert_folder, attn_implementation="eager", add_pooling_layer=False).eval()
    weights = {name.removeprefix("trunk."): value for name, value in bert.weights().items()}
    other.load_state_dict(weights, strict=False)
    bert.train()
    plans: list[Plan] = []
    with untouched(bert, bert_model):
        found = activation_similarity(
            bert_model, bert, encoded, concept=PLACE, site=where, max_tokens=60, on_plan=plans.append
        )
    before, after = (read_words(model, encoded, where) for model in (bert_model, bert))
    # The activations against Hugging Face one sentence at a time, the correlations against numpy in float64 on these
    # activations: where few words hardly move a neuron, its correlation turns what two forward passes round
    # differently, which depends on the processor, into more than any tolerance that would find a mistake.
    for mine, model in ((before, plain), (after, other)):
        np.testing.assert_allclose(mine, slow_words(model, tokenizer, corpus, where), rtol=1e-5, atol=2e-5)
    carries = PLACE.classes(corpus).of_word == corpus.label_names.index("LOC")
    assert list(found) == ["all", "concept"]
    assert (found["all"].n_words, found["concept"].n_words) == (corpus.n_words, carries.sum())
    # what the two implementations make of a weight of zero is zero in both
    assert int(found["all"].same.isnan().sum()) == (3 if where == "resid" else 0)
    agrees_with_numpy(found["all"], before, after)
    agrees_with_numpy(found["concept"], before[carries], after[carries])
    assert found["concept"].chance > found["all"].chance
    assert [plan.passes for plan in plans] == [1]
    alone = activation_similarity(bert_model, bert, corpus, site=where, max_tokens=60)
    assert list(alone) == ["all"]
    agree(alone["all"], found["all"], 0.0)
    assert alone["all"].chance == found["all"].chance


def test_a_model_is_wholly_similar_to_itself(bert_model, encoded, untouched: Untouched):
    with untouched(bert_model):
        found = activation_similarity(bert_model, bert_model.bridge, encoded, concept=PLACE)
    for one in found.values():
        torch.testing.assert_close(one.same, torch.ones_like(one.same), atol=1e-5, rtol=0)
        torch.testing.assert_close(one.flow, torch.eye(4))
        torch.testing.assert_close(one.cka.diagonal(), torch.ones(4), atol=1e-5, rtol=0)
        assert torch.equal(one.best_neuron, torch.arange(32).expand(4, 32))
        assert one.above_chance() == 1.0


def test_several_passes_give_the_same_within_the_bound(bert_model, bert, encoded):
    shaken(bert)
    plans: list[Plan] = []
    whole = activation_similarity(bert_model, bert, encoded, concept=PLACE, max_tokens=60)
    for bound in (345_000, 450_000, 700_000):
        with ticks() as seen:
            parts = activation_similarity(
                bert_model, bert, encoded, concept=PLACE, max_tokens=60, max_memory=bound / 2**20, on_plan=plans.append
            )
        assert plans[-1].n_bytes <= bound
        assert sum(seen) == 2 * plans[-1].passes * encoded.n_tokens
        for which in whole:
            agree(parts[which], whole[which])
            assert parts[which].chance == pytest.approx(whole[which].chance, abs=1e-5)
    assert [plan.passes for plan in plans] == sorted((plan.passes for plan in plans), reverse=True)
    assert plans[0].passes > plans[-1].passes
    # 4 G (N ((L + 2) r + 64 L) + W (r + 4 N + 384)) with G = 2, N = 32, L = 4
    plan = plans[0]
    r, words = plan.neurons_per_pass, plan.words_per_batch
    assert plan.n_bytes == 8 * (32 * (6 * r + 64 * 4) + words * (r + 4 * 32 + 384))


def test_sums_stay_within_the_plan(bert_model, encoded):
    plans: list[Plan] = []
    activation_similarity(bert_model, bert_model, encoded, max_tokens=60, on_plan=plans.append)
    moments = _Moments(site_of(bert_model.bridge), 0, plans[0], CPU)
    held = (moments.cross, moments.gram, moments.words, moments.pool)
    assert 0.5 * plans[0].n_bytes < 4 * sum(x.numel() for x in held) < plans[0].n_bytes


def test_similarity_does_not_depend_on_the_batches(bert_model, bert, encoded):
    shaken(bert)
    whole = activation_similarity(bert_model, bert, encoded, concept=PLACE)
    for max_tokens in (1, 37):
        parts = activation_similarity(bert_model, bert, encoded, concept=PLACE, max_tokens=max_tokens)
        for which in whole:
            agree(parts[which], whole[which], 2e-5)


def test_weights_kept_from_before_do_as_well_as_a_second_model(bert_model, bert, encoded, untouched: Untouched):
    was = kept(bert)
    shaken(bert)
    with untouched(bert):
        found = activation_similarity(was, bert, encoded, concept=PLACE, max_tokens=60)
    expected = activation_similarity(bert_model, bert, encoded, concept=PLACE, max_tokens=60)
    for which in expected:
        agree(found[which], expected[which], 0.0)
    assert found["all"].same.nanmean() < 0.99


def test_an_error_in_the_middle_leaves_the_weights_of_after(bert, encoded, untouched: Untouched):
    was = kept(bert)
    shaken(bert)
    with untouched(bert), pytest.raises(KeyboardInterrupt), ticks(KeyboardInterrupt()):
        activation_similarity(was, bert, encoded)


# --- the planted answer


def test_pruned_outputs_change_what_comes_after_and_not_the_neurons_themselves(toy, untouched: Untouched):
    was = kept(toy.tagger)
    place = site_of(toy.tagger.bridge, "mlp_post")
    prune_(toy.tagger, Neurons.of(place, toy.planted))
    with untouched(toy.tagger):
        neurons = activation_similarity(was, toy.tagger, toy.corpus, site="mlp_post")["all"]
        states = activation_similarity(was, toy.tagger, toy.corpus)["all"]
    # they are in layer 1: their own input is as it was, the residual stream behind them is not
    torch.testing.assert_close(neurons.same[:2], torch.ones(2, 64), atol=1e-5, rtol=0)
    assert neurons.same[2:].min() < 0.999
    torch.testing.assert_close(states.cka.diagonal()[:2], torch.ones(2), atol=1e-5, rtol=0)
    assert (states.cka.diagonal()[2:] < 0.999).all()
    assert states.same[2].min() < 0.99


def test_what_pruned_neurons_did_is_found_in_the_decoys(toy):
    was = kept(toy.tagger)
    place = site_of(toy.tagger.bridge, "mlp_post")
    planted, decoys = Neurons.of(place, toy.planted), Neurons.of(place, toy.decoys)
    prune_(toy.tagger, planted, sever="both")
    found = activation_similarity(was, toy.tagger, toy.corpus, site="mlp_post", concept=Concept("place"))["all"]
    # without input weights they are constant: no correlation with themselves, and the best match is elsewhere
    assert torch.equal(found.same.isnan(), planted.mask)
    assert found.above_chance(planted) == 1.0
    for layer, index in toy.planted:
        match = (str(found.best_layer[int(layer), index].item()), int(found.best_neuron[int(layer), index]))
        assert match in decoys
        assert found.best[int(layer), index] > 0.95
    # everything else is where it was
    layer = torch.arange(4)[:, None].expand(4, 64)
    assert torch.equal(found.best_layer[~planted.mask], layer[~planted.mask])


def test_what_only_rounding_moves_correlates_with_nothing(toy):
    # Place words all enter block 0 alike, so a few of its units have one value for them, to rounding. What correlates
    # there is the rounding of one way to cut batches (.16 by these, .07 by the others).
    was = kept(toy.tagger)
    for _ in finetune_(toy.tagger, toy.corpus, epochs=1, lr=1e-3, seed=0):
        pass
    text = toy.corpus.take(range(60))
    ways = [
        activation_similarity(was, toy.tagger, text, site="mlp_post", concept=Concept("place"), max_tokens=n)
        for n in (16, 4096)
    ]
    few, many = (way["concept"].same for way in ways)
    assert (int(few[0].isnan().sum()), int(few[1:].isnan().sum())) == (4, 0)
    torch.testing.assert_close(few, many, atol=1e-5, rtol=0, equal_nan=True)
    assert not ways[0]["all"].same.isnan().any()


# --- errors


def test_similarity_refuses_models_that_do_not_pair_up(bert, bert_model, toy_model, encoded):
    said = (
        "neurons of mlp_post pair up between a model and a pruned or retrained copy of it on the same device; before "
        "is TransformerLensNative, 4 layers of 64, on cpu; after is BertForMaskedLM, 3 layers of 48, on cpu"
    )
    with pytest.raises(ValueError, match=said):
        activation_similarity(toy_model.tagger, bert_model, encoded, site="mlp_post")
    with pytest.raises(ValueError, match="unknown site 'magic'; known: resid"):
        activation_similarity(bert, bert_model, encoded, site="magic")
    bert.bridge.tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(["[UNK]", "[PAD]", *PIECES])})
    with pytest.raises(ValueError, match="cut words by different vocabularies; compare models that share a tokenizer"):
        activation_similarity(bert, bert_model, encoded)


def test_similarity_refuses_weights_that_are_not_from_before(
    bert, bert_model, toy_model, encoded, untouched: Untouched
):
    with untouched(bert):
        with pytest.raises(ValueError, match=r"are the tensors of the model after, not clones, .*value.clone\(\)"):
            activation_similarity(bert.weights(), bert, encoded)
        with pytest.raises(ValueError, match="the model after is a bridge; give one of these"):
            activation_similarity(kept(bert), bert.bridge, encoded)
        with pytest.raises(ValueError, match="these weights are of another model"):
            activation_similarity(kept(toy_model.tagger), bert, encoded)


def test_similarity_refuses_too_few_words(bert_model):
    few = build_corpus(sentences_of("Rome/LOC left"), name="few", label_names=("O", "LOC"))
    with pytest.raises(ValueError, match=r"needs at least 3 words, and 'few' has 2 \(all words; .* use a larger text"):
        activation_similarity(bert_model, bert_model, few)
    some = build_corpus(sentences_of("Rome/LOC left the town"), name="some", label_names=("O", "LOC"))
    with pytest.raises(ValueError, match=r"needs at least 3 words, and 'some' has 1 \(concept words"):
        activation_similarity(bert_model, bert_model, some, concept=PLACE)
    with pytest.raises(ValueError, match="corpus 'some' has no label 'ORG'"):
        activation_similarity(bert_model, bert_model, some, concept=Concept("ORG"))


def test_similarity_refuses_a_bound_that_holds_nothing(bert_model, encoded):
    plans: list[Plan] = []
    said = r"max_memory of 1,000 bytes does not hold .* a single neuron of resid .*: [\d,]+ bytes are needed with up to"
    with pytest.raises(ValueError, match=said):
        activation_similarity(bert_model, bert_model, encoded, max_memory=1000 / 2**20, on_plan=plans.append)
    assert not plans


def test_similarity_refuses_activations_that_are_not_finite(bert, bert_model, encoded):
    with torch.no_grad():
        bert.trunk.encoder.layer[1].output.dense.bias[0] = torch.nan
    said = "activations of resid in layer '1' of the model {} are not finite .* look at its weights"
    with pytest.raises(ValueError, match=said.format("after")):
        activation_similarity(bert_model, bert, encoded)
    with pytest.raises(ValueError, match=said.format("before")):
        activation_similarity(bert, bert_model, encoded)


def test_neurons_of_another_site_are_refused(normal):
    found = compared(*normal.normal(size=(2, 9, 2, 3)))
    other = Neurons.of(Site("mlp_post", ("0",), ("",), 4, ((),), ((),)), [("0", 1)])
    with pytest.raises(ValueError, match=r"these neurons are of site 'mlp_post' .* with 4 .* of 'resid' with 6"):
        found.above_chance(other)


# --- in words


def test_similarity_says_what_it_is():
    a = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]], [[3.0, 4.0]], [[4.0, 2.0]]])
    found = compared(a, a)
    assert repr(found).startswith(
        "ActivationSimilarity(all, resid, 4 words; median correlation 1.00 with itself, 1.00 with the best match, "
    )
