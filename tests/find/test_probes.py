"""Probes fitted to samples of words: what they find in the toy and in noise; held-out words stay out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from relearn_lens.find.probes import elastic_net, k_sparse, split
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import WordDraw, WordSample, stream
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import encode
from tests.fixtures import Untouched, unchecked

CARRIES = torch.tensor([False, True])
QUICK = {"ks": (1, 4), "n_shuffles": 2, "n_random": 1}
FITTED = pytest.mark.parametrize("fitted", [elastic_net, k_sparse])


def sample_of(x: Tensor, is_concept: Tensor, group: Tensor | None = None, seed: int = 0) -> WordSample:
    """A sample of words `[word, layer, neuron]`, three words to a sentence."""
    layers = x.shape[1]
    site = Site("resid", tuple(map(str, range(layers))), ("",) * layers, x.shape[2], ((),) * layers, ((),) * layers)
    words = torch.arange(len(x))
    group = words // 3 if group is None else group
    return WordSample(x, words, words, is_concept.long(), group, ("O", "A"), site, seed)


def noise(n: int = 300, layers: int = 2, width: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Words that say nothing, a third of them the concept's."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, layers, width))).float(), torch.from_numpy(rng.random(n) < 1 / 3)


@pytest.fixture(scope="module")
def toy_sample(toy_model) -> WordSample:
    """Hidden units of the toy on 600 words, places against all others."""
    encoded = encode(toy_model.corpus, toy_model.tagger.tokenizer)
    place = site_of(toy_model.tagger.bridge, "mlp_post")
    classes = Concept("place").classes(toy_model.corpus)
    draw = WordDraw(place, encoded, classes, 600)
    stream(toy_model.tagger, encoded, [draw], site=place)
    sample = draw.sample()
    return replace(sample, of_word=(sample.of_word == 2).long(), class_names=("O", "A"))


# --- the split


def test_split_shares_no_sentence_and_has_both_kinds_of_words_on_both_sides(toy_sample):
    for sample in (toy_sample, replace(toy_sample, seed=1)):
        parts = split(sample, CARRIES)
        train, held_out = (set(rows.tolist()) for rows in (parts.train, parts.held_out))
        assert train | held_out == set(range(600))
        assert not set(sample.group[parts.train].tolist()) & set(sample.group[parts.held_out].tolist())
        assert 0.25 < len(held_out) / 600 < 0.35
        for rows in (parts.train, parts.held_out):
            assert 0 < parts.y[rows].sum() < len(rows)
    first, second = (split(replace(toy_sample, seed=seed), CARRIES).held_out for seed in (0, 1))
    assert not torch.equal(first, second)


def test_split_does_not_depend_on_the_activations(toy_sample):
    other = replace(toy_sample, activations=toy_sample.activations.flip(0))
    assert torch.equal(split(toy_sample, CARRIES).held_out, split(other, CARRIES).held_out)


def test_split_standardises_by_the_training_words_alone():
    x, y = noise()
    x[:, 0, 3], x[:, 1, 4], x[:, 1, 5] = 0.0, 0.1, 1e-32 * x[:, 1, 5]
    x[::2, 1, 4] *= 1 + 1e-7
    parts = split(sample_of(x * 7, y), CARRIES)
    found = parts.x.view(x.shape)
    train = found[parts.train]
    moving = torch.ones(2, 10, dtype=torch.bool)
    moving[0, 3] = moving[1, 4] = False
    torch.testing.assert_close(train.mean(0), torch.zeros(2, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), moving.float(), atol=1e-4, rtol=0)
    # held-out words that are changed change nothing of the training words
    changed = x.clone()
    changed[parts.held_out] += 100
    again = split(sample_of(changed * 7, y), CARRIES)
    torch.testing.assert_close(again.x[parts.train], parts.x[parts.train])


@pytest.mark.parametrize(("which", "said"), [(True, "that carry the concept"), (False, "that do not carry it")])
def test_split_refuses_words_of_a_single_sentence(which, said):
    x, _ = noise(30)
    y = (torch.arange(30) < 3) == which
    with pytest.raises(ValueError, match=f"the sample's words {said} are in 1 sentence.*larger probe corpus"):
        split(sample_of(x, y), CARRIES)


# --- the toy's planted answer, and noise


@FITTED
def test_probe_finds_the_planted_neurons_and_its_controls_need_many(toy_model, toy_sample, fitted, untouched):
    with untouched(toy_model.tagger):
        score, quality = fitted(toy_sample, CARRIES, **({"n_shuffles": 3} if fitted is elastic_net else {"ks": (1, 8)}))
    expected = Neurons.of(toy_sample.site, toy_model.planted + toy_model.decoys)
    assert score.shape == expected.mask.shape
    assert (score >= 0).all()
    assert set(score.flatten().topk(8).indices.tolist()) == set(expected.mask.flatten().nonzero()[:, 0].tolist())
    assert quality.held_out > 0.99
    assert quality.average_precision > 0.99
    # The toy knows its few words by heart, so many of its neurons together tell any labels of them; none does alone.
    assert quality.control > 0.9
    assert all(at.control < 0.8 < 0.99 < at.held_out for at in quality.by_k if at.k == 1)
    assert quality.n_train + quality.n_held_out == 600
    parts = split(toy_sample, CARRIES)
    assert quality.n_held_out == len(parts.held_out)
    assert quality.base_rate == pytest.approx(parts.y[parts.held_out].float().mean().item())
    assert quality.metric == "AUROC"


@FITTED
def test_probe_of_shuffled_labels_is_no_better_than_chance(toy_sample, fitted):
    """Labels that say nothing: the probe itself is as good as its control."""
    held_out = []
    options = {"n_shuffles": 1} if fitted is elastic_net else QUICK
    for seed in range(4):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(seed))
        shuffled = replace(toy_sample, of_word=toy_sample.of_word[order])
        _, quality = fitted(shuffled, CARRIES, **options)
        held_out.append(quality.held_out)
    assert abs(np.mean(held_out) - 0.5) < 0.08


@FITTED
def test_probe_of_noise_reports_chance_though_it_fits_its_training_words(fitted):
    x, y = noise(240, 2, 100)
    options = {"strength": 1e-4, "max_iter": 200} if fitted is elastic_net else QUICK | {"ks": (1, 100)}
    _, quality = fitted(sample_of(x, y), CARRIES, **options)
    assert 0.35 < quality.held_out < 0.65
    assert quality.average_precision < quality.base_rate + 0.2


@FITTED
def test_probe_is_the_same_for_a_seed_and_leaves_the_global_generators_alone(fitted, untouched: Untouched):
    x, y = noise()
    x[y, 0, 2] += 1
    options = {} if fitted is elastic_net else QUICK
    with untouched():
        first, again, other = (fitted(sample_of(x, y, seed=seed), CARRIES, **options) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]


@FITTED
def test_probe_scores_follow_a_permutation_and_ignore_units(fitted):
    x, y = noise()
    x[y, 0, 2] += 2
    x[y, 1, 7] -= 1
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    options = {"max_iter": 2000} if fitted is elastic_net else QUICK
    score, quality = fitted(sample_of(x, y), CARRIES, **options)
    moved, _ = fitted(sample_of(x[:, :, order], y), CARRIES, **options)
    units, _ = fitted(sample_of(x * torch.logspace(-3, 3, 10) + torch.arange(10.0), y), CARRIES, **options)
    torch.testing.assert_close(moved, score[:, order], atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(units, score, atol=5e-3, rtol=1e-2)
    assert score.flatten().argmax() == 2
    assert quality.held_out > 0.8


@FITTED
def test_probe_gives_a_constant_neuron_nothing(fitted):
    x, y = noise()
    x[y, 0, 2] += 2
    x[:, 1, 3] = -0.1
    x[y, 1, 3] *= 1 + 1e-7
    score, _ = fitted(sample_of(x, y), CARRIES, **({} if fitted is elastic_net else QUICK))
    assert score[1, 3] == 0
    assert not score.isnan().any()


@FITTED
def test_probe_takes_half_precision(fitted):
    x, y = noise()
    x[y, 0, 2] += 2
    score, _ = fitted(sample_of(x.half(), y), CARRIES, **({} if fitted is elastic_net else QUICK))
    assert score.flatten().argmax() == 2


# --- elastic net


def test_elastic_net_agrees_with_proximal_gradient_on_its_objective():
    x, y = noise(400, 1, 6)
    x[y, 0, 0] += 1.5
    x[y, 0, 1] -= 0.7
    x[:, 0, 2] += x[:, 0, 0]
    strength, l1 = 0.05, 0.5
    sample = sample_of(x, y)
    size, quality = elastic_net(sample, CARRIES, strength=strength, l1_ratio=l1, max_iter=3000)
    assert "converged after" in quality.says
    parts = split(sample, CARRIES)
    train, held_out = parts.x[parts.train].double(), parts.x[parts.held_out].double()
    z = parts.y[parts.train].double()
    # the objective of the docstring, written out
    w, b = torch.zeros(6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    weight = torch.where(z == 1, len(z) / (2 * z.sum()), len(z) / (2 * (1 - z).sum()))
    for _ in range(3000):
        residual = weight * (torch.sigmoid(train @ w + b) - z) / len(z)
        step = w - 0.3 * (train.T @ residual + strength * (1 - l1) * w)
        w, b = step.sign() * (step.abs() - 0.3 * strength * l1).clamp(min=0), b - 0.3 * residual.sum()
    torch.testing.assert_close(size[0].double(), w.abs(), atol=0.01, rtol=0.03)
    assert (w == 0).any()
    truth = parts.y[parts.held_out].numpy()
    logits = (held_out @ w + b).numpy()
    assert quality.held_out == pytest.approx(roc_auc_score(truth, logits), abs=0.01)
    assert quality.average_precision == pytest.approx(average_precision_score(truth, logits), abs=0.02)


def test_elastic_net_says_that_it_was_stopped():
    x, y = noise(300, 2, 100)
    _, quality = elastic_net(sample_of(x, y), CARRIES, max_iter=1)
    assert "stopped, perhaps before it converged, after 1 passes" in quality.says
    assert quality.random_neurons is None
    assert quality.by_k == ()


@pytest.mark.parametrize(
    "wrong", [{"l1_ratio": 1.5}, {"l1_ratio": -0.1}, {"strength": 0}, {"n_shuffles": 0}, {"max_iter": 0}]
)
def test_elastic_net_refuses_what_is_out_of_range(wrong):
    x, y = noise(30)
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"l1_ratio must be 0 to 1, strength above 0.*{name}={value}"):
        elastic_net(sample_of(x, y), CARRIES, **wrong)


# --- k-sparse probes


def test_k_sparse_places_neurons_by_the_training_words_standardised_difference():
    x, y = noise()
    x[y] += torch.linspace(0, 1, 20).view(2, 10)
    sample = sample_of(x * torch.logspace(2, -2, 20).view(2, 10), y)
    score, quality = k_sparse(sample, CARRIES, **QUICK)
    parts = split(sample, CARRIES)
    train, z = x[parts.train].flatten(1).numpy(), y[parts.train].numpy()
    difference = np.abs(train[z].mean(0) - train[~z].mean(0)) / train.std(0)
    place = np.empty(20)
    place[np.argsort(-difference)] = np.arange(20)
    np.testing.assert_allclose(score.flatten(), 1 / (place + 1), rtol=1e-6)
    # the probe of one neuron is that neuron: its AUROC needs no fit
    best = int(difference.argmax())
    alone = roc_auc_score(y[parts.held_out].numpy(), x[parts.held_out].flatten(1)[:, best].numpy())
    assert quality.by_k[0].held_out == pytest.approx(max(alone, 1 - alone))


def test_k_sparse_reports_every_k_beside_its_controls():
    x, y = noise(600, 2, 10)
    for k in range(4):
        x[y, 0, k] += 0.8
    _, quality = k_sparse(sample_of(x, y), CARRIES, ks=(1, 4, 20, 40))
    assert [at.k for at in quality.by_k] == [1, 4, 20]  # there are 20 neurons
    one, four, every = quality.by_k
    assert four.held_out > one.held_out + 0.05
    assert four.random_neurons < four.held_out - 0.1
    assert every.random_neurons == pytest.approx(every.held_out, abs=1e-6)  # all of them are the same set
    assert all(0.3 < at.control < 0.7 for at in quality.by_k)
    assert (quality.held_out, quality.control, quality.random_neurons) == every[1:]
    assert "AUROC by k: 1: 0." in quality.says
    assert "10 label shuffles over word types and 5 random sets each" in quality.says


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (2, 1)}, {"ks": (0, 1)}, {"ks": (21,)}, {"n_random": 0}])
def test_k_sparse_refuses_what_is_out_of_range(wrong):
    x, y = noise(30)
    with pytest.raises(ValueError, match=r"ks must ascend from at least 1 \(the site has 20 neurons\)"):
        unchecked(k_sparse)(sample_of(x, y), CARRIES, **wrong)


# --- labels belong to word types


@FITTED
def test_control_of_a_probe_deals_labels_to_word_types(fitted):
    """Neurons that know words and nothing of the concept: a probe of any labels of those words does as well."""
    rng = np.random.default_rng(0)
    types = torch.from_numpy(np.repeat(np.arange(20), 30))
    y = types < 8
    sentence = torch.from_numpy(rng.permutation(len(types)) // 3)
    x = torch.from_numpy(rng.normal(size=(20, 2, 30)))[types] + 0.1 * torch.from_numpy(rng.normal(size=(600, 2, 30)))
    sample = replace(sample_of(x.float(), y, group=sentence), types=types)
    options: dict = {"n_shuffles": 3} if fitted is elastic_net else {"ks": (1, 16), "n_shuffles": 3, "n_random": 1}
    _, quality = fitted(sample, CARRIES, **options)
    assert quality.held_out > 0.95
    assert quality.control > 0.9  # by single words, it would be 0.5, and the probe would seem to have found a concept
    assert "3 label shuffle" in quality.says
    assert "over word types" in quality.says
    _, by_word = fitted(replace(sample, types=torch.arange(600)), CARRIES, **options)
    assert by_word.control < 0.7
