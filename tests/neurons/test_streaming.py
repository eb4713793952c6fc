"""Histograms and samples of words against the words themselves; what depends on what, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from relearn_lens.neurons.sites import Site, parameter, site_of
from relearn_lens.neurons.streaming import BinCounts, Collector, Histograms, WordDraw, WordSample, stream
from relearn_lens.text.concept import Classes, Concept
from relearn_lens.text.corpus import build_corpus
from relearn_lens.text.encoding import Batch, Encoded, encode
from tests.fixtures import LABELS, Untouched, sentences_of, unchecked

PLACE = Concept("place", labels=("LOC",))


def site(layers: int, width: int, name: str = "resid") -> Site:
    return Site(name, tuple(map(str, range(layers))), ("",) * layers, width, ((),) * layers, ((),) * layers)


def two_classes(is_concept: np.ndarray) -> Classes:
    return Classes(("O", "A"), is_concept.astype(np.int64), np.array([False, True]))


def batch_of(words: np.ndarray) -> Batch:
    """A batch that holds nothing but which words of the corpus it has."""
    some = torch.zeros(len(words), dtype=torch.int64)
    rest = *[some] * 7, some[:1]
    return Batch(some[None], some[None], torch.from_numpy(words), *rest)  # pyright: ignore[reportCallIssue]


def feed(collector: Collector, x: Tensor, cuts: tuple[int, ...] = ()) -> None:
    """Words `[word, layer, neuron]` to a collector, in batches that end at the cuts."""
    for words in np.split(np.arange(len(x)), cuts):
        collector.begin(batch_of(words))
        for layer in range(x.shape[1]):
            collector.add(layer, x[words, layer])


def histograms_of(x: Tensor, is_concept: np.ndarray, cuts: tuple[int, ...] = (), **options) -> Histograms:
    bins = BinCounts(site(x.shape[1], x.shape[2]), two_classes(is_concept), **options)
    feed(bins, x, cuts)
    return bins.histograms()


def edges(found: Histograms) -> Tensor:
    """Activations at the boundaries between bins."""
    half = (found.counts.shape[-1] - 1) / 2
    u = (torch.arange(found.counts.shape[-1] - 1, dtype=torch.float64) + 0.5 - half) / half
    return (found.centre[..., None].double() + found.scale[..., None].double() * u / (1 - u.abs())).float()


def exact(x: Tensor, is_concept: np.ndarray) -> np.ndarray:
    """AUROC `[layer, neuron]` by scipy: U over the number of pairs."""
    flat = x.double().numpy()
    found = mannwhitneyu(flat[is_concept], flat[~is_concept], axis=0, method="asymptotic")
    return found.statistic / (is_concept.sum() * (~is_concept).sum())


def within_bound(histograms: Histograms, x: Tensor, is_concept: np.ndarray) -> None:
    off = np.abs(histograms.auroc.numpy() - exact(x, is_concept))
    assert (off <= histograms.auroc_error.numpy() + 1e-9).all()


def every_word(tagger, encoded: Encoded, where: str, classes: Classes) -> WordSample:
    place = site_of(tagger.bridge, where)
    draw = WordDraw(place, encoded, classes, encoded.corpus.n_words)
    stream(tagger, encoded, [draw], site=place)
    return draw.sample()


# --- histograms


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_histograms_of_a_model_bound_the_error_of_their_auroc(
    bert_model, corpus, encoded, where, max_tokens, untouched: Untouched
):
    classes, place = PLACE.classes(corpus), site_of(bert_model.bridge, where)
    bins = BinCounts(place, classes)
    with untouched(bert_model):
        stream(bert_model, encoded, [bins], site=place, max_tokens=max_tokens)
    found = bins.histograms()
    words = every_word(bert_model, encoded, where, classes)
    is_concept = classes.carries[classes.of_word]
    assert found.counts.shape == (2, len(place.layers), place.width, 127)
    assert (found.counts.sum(-1) == torch.tensor([is_concept.sum(), (~is_concept).sum()])[:, None, None]).all()
    within_bound(found, words.activations, is_concept)
    if max_tokens >= 60:  # a first batch of one sentence of 20 words makes poor bins
        assert found.auroc_error.median() < 0.02


def test_histograms_count_the_words_between_their_edges():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(3, 2, size=(500, 2, 3))).float()
    is_concept = rng.random(500) < 0.3
    found = histograms_of(x, is_concept, bins=11)
    assert edges(found).shape == (2, 3, 10)
    assert (edges(found).diff(dim=-1) > 0).all()
    # the centre is the middle of the middle bin
    torch.testing.assert_close(edges(found)[..., 4:6].mean(-1), found.centre)
    for layer in range(2):
        for neuron in range(3):
            for row, which in enumerate((is_concept, ~is_concept)):
                place = np.searchsorted(edges(found)[layer, neuron], x[:, layer, neuron].numpy()[which])
                assert found.counts[row, layer, neuron].tolist() == np.bincount(place, minlength=11).tolist()


def test_auroc_of_histograms_by_hand():
    # concept in bins 0, 2, 2 and rest in bins 0, 1: of 6 pairs 4 are won and 1 is a tie
    counts = torch.tensor([[[[1, 0, 2]]], [[[1, 1, 0]]]], dtype=torch.int32)
    found = Histograms(counts, torch.zeros(1, 1), torch.ones(1, 1), site(1, 1))
    assert found.auroc.item() == pytest.approx(4.5 / 6)
    assert found.auroc_error.item() == pytest.approx(0.5 / 6)  # the tie may have been won or lost
    # u = -0.5 and 0.5 lie at z = -1 and 1
    assert edges(found).tolist() == [[[-1.0, 1.0]]]


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Normal, Student t with 2 degrees of freedom, Cauchy, mostly 0, GELU-like, and large with a small spread."""
    normal = rng.normal(size=n)
    return np.stack(
        [
            normal,
            rng.standard_t(2, size=n),
            rng.standard_cauchy(n),
            np.maximum(rng.normal(size=n) - 1.5, 0),
            0.1 * np.where(normal > 0, normal, 0.05 * np.tanh(normal)),
            1000 + 0.01 * normal,
        ],
        axis=1,
    )


@pytest.mark.parametrize("first", [1, 5, 300])
def test_histograms_bear_heavy_tails_and_a_first_batch_that_is_unlike_the_rest(first):
    rng = np.random.default_rng(1)
    x, is_concept = heavy(rng, 4000), rng.random(4000) < 0.2
    x[is_concept] += 0.3 * np.array([1, 1, 1, 1, 0.1, 0.01])
    typical, usual, spread = torch.from_numpy(x[:, None]).float(), np.median(x, 0), x[:300].std(0)
    found = histograms_of(typical, is_concept, (first,))
    within_bound(found, typical, is_concept)
    if first == 300:
        assert found.auroc_error[0, [0, 1, 2, 5]].max() < 0.01
    for shift, factor, bound in ((0, 10, 0.05), (0, 0.2, 0.15), (2, 1, 0.03)):
        unlike = x.copy()
        unlike[:first] = usual + shift * spread + factor * (x[:first] - usual)
        moved = torch.from_numpy(unlike[:, None]).float()
        found = histograms_of(moved, is_concept, (first,))
        within_bound(found, moved, is_concept)
        if first == 300:
            assert found.auroc_error[0, 0] < bound


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3, 1e-32])
def test_histograms_keep_a_constant_neuron_and_its_rounding_in_one_bin(value):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 1, 8))).float()
    is_concept = rng.random(400) < 0.5
    x[:, 0, 3] = value
    x[torch.from_numpy(is_concept), 0, 3] *= 1 + 1e-7
    found = histograms_of(x, is_concept, (100,))
    assert (found.counts[:, 0, 3] > 0).sum() == 2
    assert found.counts[:, 0, 3, 63].sum() == 400
    assert found.auroc[0, 3] == 0.5


def test_histograms_follow_a_neuron_that_stood_still_in_the_first_batch():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2000, 1, 8))).float()
    is_concept = rng.random(2000) < 0.5
    x[torch.from_numpy(is_concept)] += 0.5
    x[:200, 0, 3] = 0.0
    found = histograms_of(x, is_concept, (200,))
    within_bound(found, x, is_concept)
    assert found.auroc_error[0, 3] < 0.02


def test_histograms_do_not_grow_with_the_text_and_do_not_depend_on_later_batches():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(900, 2, 5))).float()
    is_concept = rng.random(900) < 0.5
    one, many = (histograms_of(x, is_concept, (300, *cuts)) for cuts in ((), range(330, 900, 30)))
    assert torch.equal(one.counts, many.counts)
    assert torch.equal(one.centre, many.centre)
    assert torch.equal(one.scale, many.scale)
    bins = BinCounts(site(2, 5), two_classes(is_concept))
    sizes = []
    for k in range(3):
        feed(bins, x[300 * k : 300 * (k + 1)])
        held = (bins.all, bins.concept, bins.place)
        sizes.append(sum(t.numel() for t in held))
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("bins", [2, 128, 1, -3])
def test_bin_counts_refuse_bins_without_a_middle(bins):
    with pytest.raises(ValueError, match=f"bins must be an odd number of at least 3, got {bins}"):
        BinCounts(site(1, 3), two_classes(np.arange(4) < 2), bins=bins)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_collectors_name_the_layer_whose_activations_are_not_finite(bert, corpus, encoded, bad, untouched: Untouched):
    with torch.no_grad():
        bert.trunk.encoder.layer[1].output.dense.bias[3] = bad
    classes, place = PLACE.classes(corpus), site_of(bert.bridge, "resid")
    bins, draw = BinCounts(place, classes), WordDraw(place, encoded, classes)
    with untouched():
        stream(bert, encoded, [bins, draw], site=place)
    for finish in (bins.histograms, draw.sample):
        with pytest.raises(ValueError, match=r"activations of resid in layer '1' are not finite .* learning rate"):
            finish()


# --- samples of words


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_word_sample_holds_the_activations_of_its_words(bert_model, corpus, encoded, where, untouched: Untouched):
    classes, place = PLACE.classes(corpus), site_of(bert_model.bridge, where)
    seen: dict[tuple[int, int], Tensor] = {}

    class Keep:
        def begin(self, batch: Batch) -> None:
            self.words = batch.words.tolist()

        def add(self, layer: int, words: Tensor) -> None:
            seen.update({(word, layer): row.clone() for word, row in zip(self.words, words, strict=True)})

        def together(self) -> None: ...

    draw = WordDraw(place, encoded, classes, 30, seed=3)
    with untouched(bert_model):
        stream(bert_model, encoded, [draw, Keep()], site=place, max_tokens=60)
    sample = draw.sample()
    assert sample.activations.shape == (30, len(place.layers), place.width)
    assert sample.activations.dtype == torch.float32
    assert (sample.class_names, sample.site, sample.seed) == (LABELS, place, 3)
    assert len(set(sample.words.tolist())) == 30
    for i, word in enumerate(sample.words.tolist()):
        assert sample.of_word[i] == classes.of_word[word]
        assert corpus.start[sample.group[i]] <= word < corpus.start[sample.group[i] + 1]
        for layer in range(len(place.layers)):
            assert torch.equal(sample.activations[i, layer], seen[word, layer])


def test_word_draw_depends_on_the_seed_alone(bert_model, corpus, encoded, untouched: Untouched):
    classes, place = PLACE.classes(corpus), site_of(bert_model.bridge)
    with untouched():
        drawn = [WordDraw(place, encoded, classes, 20, seed).words.tolist() for seed in (0, 0, 1)]
        other_site = WordDraw(site_of(bert_model.bridge, "mlp_post"), encoded, classes, 20, 0).words.tolist()
    assert drawn[0] == drawn[1] == other_site == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    samples = []
    for max_tokens in (40, 4096):
        draw = WordDraw(place, encoded, classes, 20)
        stream(bert_model, encoded, [draw], site=place, max_tokens=max_tokens)
        samples.append(draw.sample())
    assert torch.equal(samples[0].words, samples[1].words)
    torch.testing.assert_close(samples[0].activations, samples[1].activations, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "n_concept"), [(10, 5), (11, 5), (28, 14), (75, 14), (1000, 14)])
def test_word_draw_takes_half_of_the_concept_and_fills_up_with_the_others(bert_model, corpus, encoded, n, n_concept):
    classes = PLACE.classes(corpus)
    assert classes.carries[classes.of_word].sum() == 14
    draw = WordDraw(site_of(bert_model.bridge), encoded, classes, n)
    assert classes.carries[draw.of_word].sum() == n_concept
    assert len(draw.words) == min(n, corpus.n_words)


def test_word_draw_fills_up_with_the_concept_where_others_are_few(bert_model, tokenizer):
    corpus = build_corpus(sentences_of("Rome/LOC Paris/LOC old Rome/LOC Rome/LOC\nParis/LOC the York/LOC"), name="many")
    encoded, classes = encode(corpus, tokenizer), PLACE.classes(corpus)
    draw = WordDraw(site_of(bert_model.bridge), encoded, classes, 6)
    assert classes.carries[draw.of_word].tolist().count(False) == 2
    assert len(draw.words) == 6


def test_word_draw_is_uniform_within_each_half(bert_model, corpus, encoded):
    classes, place = PLACE.classes(corpus), site_of(bert_model.bridge)
    times = np.zeros(corpus.n_words)
    for seed in range(400):
        times[WordDraw(place, encoded, classes, 12, seed).words] += 1
    is_concept = classes.carries[classes.of_word]
    for which in (is_concept, ~is_concept):
        p = 6 / which.sum()
        assert np.abs(times[which] / 400 - p).max() < 4.5 * (p * (1 - p) / 400) ** 0.5


def test_word_draw_never_draws_a_word_that_was_cut_off(bert_model, tokenizer):
    corpus = build_corpus(sentences_of("old Rome/LOC old old Rome/LOC old Paris/LOC"), name="long")
    encoded = encode(corpus, tokenizer, context=6, long="truncate")
    sample = every_word(bert_model, encoded, "resid", PLACE.classes(corpus))
    assert sample.words.tolist() == [0, 1, 2, 3]


def test_word_draw_refuses_a_sample_with_one_side_only(bert_model, corpus, encoded):
    with pytest.raises(ValueError, match="a sample needs at least 2 words, one on each side, got n=1"):
        unchecked(WordDraw)(site_of(bert_model.bridge), encoded, PLACE.classes(corpus), 1)


def test_constant_neuron_of_a_model_is_constant_to_every_collector(bert, corpus, encoded):
    """Averaging two or three sub-words rounds, and names have more sub-words than others."""
    gain, bias = (parameter(bert.bridge, part) for part in site_of(bert.bridge).writes[2])
    with torch.no_grad():
        gain[5], bias[5] = 0.0, 0.1
    classes, place = PLACE.classes(corpus), site_of(bert.bridge)
    bins = BinCounts(place, classes)
    stream(bert, encoded, [bins], site=place, max_tokens=60)
    found = bins.histograms()
    assert found.auroc[2, 5] == 0.5
    assert (found.counts[:, 2, 5] > 0).sum() == 2
