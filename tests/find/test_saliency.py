"""Class statistics against a slow loop; scores against peers; ranks by hand; the toy's planted answer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, pointbiserialr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from relearn_lens.find.saliency import (
    SCORES,
    Gathered,
    Saliency,
    Score,
    auroc,
    auroc_exact,
    difference,
    dprime,
    gather,
    point_biserial,
    probeless,
    saliency,
    score_many,
    score_of,
    signed_dprime,
    signed_point_biserial,
)
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.toy import PERSON_NEURONS
from relearn_lens.neurons.sites import Neurons, Site, parameter, site_of
from relearn_lens.neurons.streaming import BinCounts, ClassStats, ClassSums, WordSample, class_stats
from relearn_lens.text.concept import Classes, Concept
from relearn_lens.text.corpus import build_corpus
from relearn_lens.text.encoding import Batch, encode
from tests.fixtures import LABELS, Untouched, sentences_of, ticks, unchecked

PLACE = Concept("place", labels=("LOC",))


def site(layers: int, width: int) -> Site:
    return Site("resid", tuple(map(str, range(layers))), ("",) * layers, width, ((),) * layers, ((),) * layers)


def stats_of(count: list[int], mean: Any, names: tuple[str, ...] | None = None) -> ClassStats:
    """Statistics with the given means, `[class][layer][neuron]`, and no variance."""
    means = torch.tensor(mean, dtype=torch.float64)
    names = names or tuple("OABCDEF"[: len(count)])
    return ClassStats(torch.tensor(count), means, torch.zeros_like(means), names, site(*means.shape[1:]))


def saliency_of(score: Any) -> Saliency:
    scores = torch.tensor(score, dtype=torch.float32)
    return Saliency(scores, "probeless", "activation", "place", site(*scores.shape))


def slow_words(plain, tokenizer, corpus, where: str) -> np.ndarray:
    """Activations `[word, layer, neuron]` of each word, one sentence at a time, by plain Hugging Face."""
    found: list[np.ndarray] = []
    for sentence in corpus:
        inputs = tokenizer([w.text for w in sentence], is_split_into_words=True, return_tensors="pt")
        inner: list[Tensor] = []
        handles = [
            layer.output.dense.register_forward_pre_hook(lambda _, args, inner=inner: inner.append(args[0]))
            for layer in plain.encoder.layer
        ]
        with torch.no_grad():
            states = plain(**inputs, output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        layers = np.stack([x[0].double().numpy() for x in (states if where == "resid" else inner)])
        word_ids = inputs.word_ids()
        for w in range(len(sentence)):
            columns = [k for k, word in enumerate(word_ids) if word == w]
            found.append(np.sum([layers[:, k] for k in columns], axis=0) / len(columns))
    return np.stack(found)


def close(a: ClassStats, b: ClassStats, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.mean, b.mean, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.m2, b.m2, atol=tolerance, rtol=tolerance)


# --- class statistics


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_class_stats_agree_with_a_slow_loop(bert, plain, tokenizer, corpus, encoded, where, untouched: Untouched):
    classes = PLACE.classes(corpus)
    bert.train()
    with untouched(bert):
        stats = class_stats(bert, encoded, classes, site=where, max_tokens=60)
    words = slow_words(plain, tokenizer, corpus, where)
    assert stats.class_names == LABELS
    assert stats.mean.dtype == stats.m2.dtype == torch.float64
    for k in range(3):
        members = words[classes.of_word == k]
        assert stats.count[k] == len(members) > 3
        np.testing.assert_allclose(stats.mean[k], members.mean(0), atol=1e-5)
        np.testing.assert_allclose(stats.m2[k], members.var(0) * len(members), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(stats.variance[k], members.var(0), atol=1e-5, rtol=1e-5)


def test_class_stats_take_a_bridge_and_report_every_token(bert_model, corpus, encoded, untouched: Untouched):
    classes = PLACE.classes(corpus)
    with untouched(bert_model), ticks() as seen:
        stats = class_stats(bert_model.bridge, encoded, classes, max_tokens=60)
    close(stats, class_stats(bert_model, encoded, classes), 1e-5)
    assert len(seen) > 2
    assert sum(seen) == encoded.n_tokens


@pytest.mark.parametrize("max_tokens", [1, 37, 100])
def test_class_stats_do_not_depend_on_the_batches(bert_model, corpus, encoded, max_tokens):
    classes = PLACE.classes(corpus)
    close(
        class_stats(bert_model, encoded, classes, max_tokens=max_tokens),
        class_stats(bert_model, encoded, classes),
        1e-4,
    )


def test_class_stats_leave_out_words_that_were_cut_off(bert_model, tokenizer):
    corpus = build_corpus(sentences_of("old Rome/LOC old old Rome/LOC old Paris/LOC"), name="long")
    encoded = encode(corpus, tokenizer, context=6, long="truncate")
    stats = class_stats(bert_model, encoded, PLACE.classes(corpus))
    assert encoded.n_words_lost == 3
    assert stats.count.tolist() == [3, 1]


def test_class_stats_keep_the_variance_of_a_neuron_with_a_large_mean(bert, plain, tokenizer, corpus, encoded):
    """Mean 1,000 and standard deviation 0.01: a sum of squares in float32 would have nothing left."""
    k, classes = 5, PLACE.classes(corpus)
    gain, bias = (parameter(bert.bridge, part) for part in site_of(bert.bridge).writes[0])
    norm = plain.embeddings.LayerNorm
    with torch.no_grad():
        for weight, value in ((gain, 0.01), (norm.weight, 0.01), (bias, 1000.0), (norm.bias, 1000.0)):
            weight[k] = value
    stats = class_stats(bert, encoded, classes, max_tokens=60)
    words = slow_words(plain, tokenizer, corpus, "resid")[:, 0, k]
    for c in range(3):
        members = words[classes.of_word == c]
        assert 990 < members.mean() < 1010
        assert 0.003 < members.std() < 0.03
        assert stats.mean[c, 0, k] == pytest.approx(members.mean(), abs=1e-4)
        assert stats.variance[c, 0, k].sqrt() == pytest.approx(members.std(), rel=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_class_stats_name_the_layer_whose_activations_are_not_finite(bert, corpus, encoded, bad, where, untouched):
    with torch.no_grad():
        bert.trunk.encoder.layer[1].output.dense.bias[3] = bad
    layer = "1" if where == "resid" else "2"
    said = f"activations of {where} in layer '{layer}' are not finite .* weights and at the learning rate"
    with untouched(), pytest.raises(ValueError, match=said):
        class_stats(bert, encoded, PLACE.classes(corpus), site=where)


def test_class_stats_leave_no_hook_after_an_error(bert, corpus, encoded, untouched: Untouched):
    bert.train()
    with untouched(bert), pytest.raises(KeyboardInterrupt), ticks(KeyboardInterrupt()):
        class_stats(bert, encoded, PLACE.classes(corpus))


def test_class_stats_agree_in_bfloat16(bert_folder, bert_model, corpus, encoded):
    """Half precision keeps the ranking: most of the top tenth is the same."""
    half = load_tagger(bert_folder, LABELS, dtype=torch.bfloat16)
    classes = PLACE.classes(corpus)
    tops = []
    for tagger in (half, bert_model):
        stats = class_stats(tagger, encoded, classes)
        assert stats.mean.dtype == torch.float64
        tops.append(saliency(stats, PLACE, torch.from_numpy(classes.carries)).top(fraction=0.1))
    assert len(tops[0] & tops[1]) >= 0.8 * len(tops[1])


# --- scores


def test_probeless_of_two_classes_is_the_distance_of_the_means():
    stats = stats_of([10, 2], [[[1.0, 2.0, -1.0]], [[4.0, 2.0, 1.5]]])
    for contrast in ("classes", "rest"):
        score = probeless(stats, torch.tensor([False, True]), contrast)
        assert score.tolist() == [[3.0, 0.0, 2.5]]


def test_probeless_of_three_classes_sums_over_the_others_or_pools_them():
    stats = stats_of([6, 2, 2], [[[1.0, 0.0]], [[4.0, 5.0]], [[-1.0, 8.0]]])
    carries = torch.tensor([False, True, False])
    # |4 - 1| + |4 + 1| = 8 and |5 - 0| + |5 - 8| = 8
    assert probeless(stats, carries, "classes").tolist() == [[8.0, 8.0]]
    # pooled others: (6 * 1 - 2 * 1) / 8 = 0.5 and 16 / 8 = 2
    assert probeless(stats, carries, "rest").tolist() == [[3.5, 3.0]]


def test_probeless_pools_the_concepts_labels_by_their_counts():
    stats = stats_of([5, 3, 1], [[[0.0]], [[1.0]], [[5.0]]])
    carries = torch.tensor([False, True, True])
    assert stats.pooled(carries).tolist() == [[2.0]]  # (3 * 1 + 1 * 5) / 4
    for contrast in ("classes", "rest"):
        assert probeless(stats, carries, contrast).tolist() == [[2.0]]


def test_probeless_ignores_classes_without_words():
    with_empty = stats_of([6, 2, 0, 0], [[[1.0]], [[4.0]], [[0.0]], [[0.0]]])
    for contrast in ("classes", "rest"):
        for carries in ([False, True, False, False], [False, True, False, True]):
            assert probeless(with_empty, torch.tensor(carries), contrast).tolist() == [[3.0]]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(2)), st.sampled_from(["classes", "rest"]), st.data())
def test_scores_follow_a_permutation_of_the_neurons(neurons, layers, contrast, data):
    values = st.lists(st.floats(-5, 5), min_size=36, max_size=36)
    mean = torch.tensor(data.draw(values), dtype=torch.float64).view(3, 2, 6)
    stats = replace(stats_of([4, 3, 2], mean.tolist()), m2=mean.square())
    moved = replace(stats, mean=mean[:, layers][:, :, neurons], m2=stats.m2[:, layers][:, :, neurons])
    carries = torch.tensor([False, True, False])
    for score in (score for score in SCORES.values() if score.needs == "stats"):
        expected = score.of(stats, carries, contrast)[layers][:, neurons]
        torch.testing.assert_close(score.of(moved, carries, contrast), expected, equal_nan=True)


def test_saliency_of_a_model_follows_a_permutation_of_its_hidden_units(toy, untouched: Untouched):
    concept = Concept("place")
    classes = concept.classes(toy.corpus)
    encoded = encode(toy.corpus, toy.tagger.tokenizer)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def scored() -> Tensor:
        stats = class_stats(toy.tagger, encoded, classes, site="mlp_post")
        return saliency(stats, concept, torch.from_numpy(classes.carries)).score

    before = scored()
    mlp = toy.tagger.trunk.layers[1].mlp
    with torch.no_grad():
        mlp.fc_in.weight.copy_(mlp.fc_in.weight[order].clone())
        mlp.fc_in.bias.copy_(mlp.fc_in.bias[order].clone())
        mlp.fc_out.weight.copy_(mlp.fc_out.weight[:, order].clone())
    after = scored()
    torch.testing.assert_close(after[1], before[1][order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], atol=1e-5, rtol=1e-5)


def test_saliency_says_what_it_is():
    stats = stats_of([10, 2], [[[1.0, 2.0]], [[4.0, 2.0]]])
    scored = saliency(stats, PLACE, torch.tensor([False, True]))
    assert (scored.kind, scored.unit, scored.concept, scored.site) == ("probeless", "activation", "place", stats.site)
    assert scored.score.dtype == torch.float32
    assert repr(scored) == "Saliency(place, probeless, resid; highest L0N0 at 3 activation)"


def test_saliency_takes_a_function_or_a_score():
    def spread(stats: ClassStats, carries: Tensor, contrast: str) -> Tensor:
        """Widest of all."""
        return stats.mean.amax(0) - stats.mean.amin(0)

    stats = stats_of([1, 1, 1], [[[1.0]], [[4.0]], [[-2.0]]])
    carries = torch.tensor([False, True, False])
    scored = saliency(stats, PLACE, carries, score=spread)
    assert (scored.score.tolist(), scored.kind, scored.unit) == ([[6.0]], "spread", "")
    assert score_of(spread).says == "Widest of all."
    mine = Score("mine", "metres", "", spread)
    assert score_of(mine) is mine
    assert saliency(stats, PLACE, carries, score=mine).unit == "metres"


def test_top_takes_from_those_that_are_there():
    made = saliency_of([[3.0, 1.0], [2.0, 3.0]])
    there = Neurons(torch.tensor([[False, True], [True, True]]), made.site)
    assert [(n.layer, n.index) for n in made.top(2, among=there)] == [("1", 0), ("1", 1)]
    assert made.top(fraction=1.0, among=there).mask.equal(there.mask)
    with pytest.raises(ValueError, match="k must be 1 to 3"):
        made.top(4, among=there)


def test_the_default_contrast_does_not_rank_other_concepts_neurons(toy_model):
    classes = Concept("place").classes(toy_model.corpus)
    text = encode(toy_model.corpus, toy_model.tagger.tokenizer)
    top = {}
    hows: tuple[dict[str, Any], ...] = ({}, {"contrast": "classes"})
    for how in hows:
        made = score_many(
            toy_model.tagger, text, Concept("place"), classes, ["probeless"], site="mlp_post", **how
        )["probeless"]  # fmt: skip
        top[bool(how)] = {(n.layer, n.index) for n in made.top(8)}
    assert top[False] == {*toy_model.planted, *toy_model.decoys}
    assert top[True] == {*toy_model.planted, *PERSON_NEURONS}


def test_saliency_lists_the_known_scores_and_contrasts():
    stats, carries = stats_of([1, 1], [[[0.0]], [[1.0]]]), torch.tensor([False, True])
    with pytest.raises(ValueError, match=r"unknown score 'magic'; known: probeless"):
        saliency(stats, PLACE, carries, score="magic")
    with pytest.raises(ValueError, match="unknown contrast 'most'; known: classes, rest"):
        unchecked(saliency)(stats, PLACE, carries, contrast="most")


def test_saliency_refuses_a_concept_whose_words_were_all_cut_off(bert_model, tokenizer):
    corpus = build_corpus(sentences_of("old old old old old Rome/LOC"), name="tail")
    encoded = encode(corpus, tokenizer, context=5, long="truncate")
    classes = PLACE.classes(corpus)
    with pytest.raises(ValueError, match="place"):
        saliency(class_stats(bert_model, encoded, classes), PLACE, torch.from_numpy(classes.carries))


# --- scores against peers

STREAMED = ("probeless", "difference", "dprime", "point_biserial", "auroc", "auroc_exact")


class Words:
    """Words `[word, layer, neuron]` of two classes, as one pass would gather them."""

    def __init__(self, x: Tensor, is_concept: np.ndarray):
        self.x, self.is_concept = x, is_concept
        self.carries = torch.tensor([False, True])
        self.of_word = is_concept.astype(np.int64)
        self.site = site(*x.shape[1:])

    @property
    def gathered(self) -> Gathered:
        classes = Classes(("O", "A"), self.of_word, self.carries.numpy())
        sums, bins = ClassSums(self.site, classes), BinCounts(self.site, classes)
        words = torch.arange(len(self.x))
        for collector in (sums, bins):
            collector.begin(Batch(words[None], words[None], *[words] * 8, words[:1]))  # pyright: ignore[reportCallIssue]
            for layer in range(self.x.shape[1]):
                collector.add(layer, self.x[:, layer])
        of_word = torch.from_numpy(self.of_word)
        sample = WordSample(self.x, words, words, of_word, words // 3, ("O", "A"), self.site, 0)
        return Gathered(sums.all()[0], bins.histograms(), sample)

    def score(self, name: str) -> Tensor:
        return saliency(self.gathered, PLACE, self.carries, score=name, contrast="rest").score


def some_words(seed: int = 0, n: int = 400) -> Words:
    """Neurons that rise and fall with the concept, with ties (rounded), of all sizes."""
    rng = np.random.default_rng(seed)
    is_concept = rng.random(n) < 0.3
    x = rng.normal(size=(n, 2, 4)) + is_concept[:, None, None] * np.array([[0, 1, -2, 0.3], [5, -0.1, 0.5, -0.5]])
    x[:, 1] = np.round(x[:, 1] * 2)
    return Words(torch.from_numpy(x * np.array([1, 100, 0.01, 3]) + 7).float(), is_concept)


def test_dprime_is_the_difference_in_pooled_standard_deviations():
    # concept 2, 4 (m2 = 2) and rest 0, 1, 2 (m2 = 2): (3 - 1) / sqrt((2 + 2) / 3)
    words = Words(torch.tensor([2.0, 4.0, 0.0, 1.0, 2.0]).view(5, 1, 1), np.arange(5) < 2)
    for flip in (False, True):
        stats = words.gathered.stats
        assert stats is not None
        expected = 2 / (4 / 3) ** 0.5 * (-1 if flip else 1)
        carries = ~words.carries if flip else words.carries
        assert signed_dprime(stats, carries).item() == pytest.approx(expected)
        assert dprime(stats, carries).item() == pytest.approx(abs(expected))
        assert difference(stats, carries).item() == pytest.approx(-2 if flip else 2)


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_scores_of_a_model_agree_with_numpy_and_scipy(bert_model, corpus, encoded, where, untouched: Untouched):
    classes = PLACE.classes(corpus)
    carries = torch.from_numpy(classes.carries)
    with untouched(bert_model):
        got = gather(
            bert_model, encoded, classes, ("stats", "histograms", "sample"), site=where, sample_words=500, max_tokens=60
        )
    assert got.stats is not None
    assert got.histograms is not None
    assert got.sample is not None
    x, y = got.sample.activations.double().numpy(), classes.carries[got.sample.of_word.numpy()]
    assert len(x) == corpus.n_words
    a, b = x[y], x[~y]
    np.testing.assert_allclose(difference(got.stats, carries), a.mean(0) - b.mean(0), atol=1e-5)
    pooled = ((a.var(0, ddof=1) * (len(a) - 1) + b.var(0, ddof=1) * (len(b) - 1)) / (len(x) - 2)) ** 0.5
    np.testing.assert_allclose(signed_dprime(got.stats, carries), (a.mean(0) - b.mean(0)) / pooled, atol=1e-4)
    u = mannwhitneyu(a, b, axis=0, method="asymptotic").statistic / (len(a) * len(b))
    np.testing.assert_allclose(auroc_exact(got.sample, carries), np.maximum(u, 1 - u), atol=1e-9)
    off = np.abs(auroc(got.histograms, carries).numpy() - np.maximum(u, 1 - u))
    assert (off <= got.histograms.auroc_error.numpy() + 1e-9).all()
    assert np.median(off) < 0.005
    r = signed_point_biserial(got.stats, carries).numpy()
    for layer in range(x.shape[1]):
        for neuron in range(0, x.shape[2], 5):
            column = x[:, layer, neuron]
            assert r[layer, neuron] == pytest.approx(pointbiserialr(y, column)[0], abs=1e-5)
            area = roc_auc_score(y, column)
            assert auroc_exact(got.sample, carries)[layer, neuron] == pytest.approx(max(area, 1 - area))
    np.testing.assert_allclose(point_biserial(got.stats, carries), np.abs(r))


def test_auroc_of_a_small_text_is_that_of_its_words_and_of_a_large_one_bounded(
    bert_model, corpus, encoded, untouched: Untouched
):
    classes, place = PLACE.classes(corpus), site_of(bert_model.bridge, "mlp_post")
    carries, bytes_of_all = torch.from_numpy(classes.carries), 4 * corpus.n_words * place.n_neurons
    how: Any = {"site": place, "max_tokens": 60}
    with untouched(bert_model):
        small, large = (
            gather(bert_model, encoded, classes, ["words"], max_memory=most / 2**20, **how)
            for most in (bytes_of_all, bytes_of_all - 1)
        )
        many = score_many(bert_model, encoded, PLACE, classes, ["auroc"], max_memory=bytes_of_all / 2**20, **how)
    assert small.words is not None
    assert large.histograms is not None
    assert (small.histograms, large.words) == (None, None)
    exact, binned = (saliency(one, PLACE, carries, score="auroc") for one in (small, large))
    y = classes.carries[classes.of_word]
    u = mannwhitneyu(small.words.activations.numpy()[y], small.words.activations.numpy()[~y], axis=0).statistic
    u = u / (y.sum() * (~y).sum())
    np.testing.assert_allclose(exact.score, np.maximum(u, 1 - u), atol=1e-6)
    off = np.abs(binned.score.numpy() - np.maximum(u, 1 - u))
    assert off.max() > 1e-4  # the words themselves are better than their bins
    assert (off <= large.histograms.auroc_error.numpy() + 1e-6).all()
    assert exact.unit == "AUROC 0.5 to 1, exact"
    assert binned.unit == "AUROC 0.5 to 1, from histograms"
    assert torch.equal(many["auroc"].score, exact.score)
    assert many["auroc"].unit == exact.unit


def test_auroc_exact_counts_ties_half():
    # pairs of concept 1, 2, 2 and rest 1, 2, 0: wins 0 + 2 * 1 + 3 below, ties 1 + 2
    words = Words(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 0.0]).view(6, 1, 1), np.arange(6) < 3)
    assert words.score("auroc_exact").item() == pytest.approx((1 + 2 + 2 + 3 / 2) / 9)


def test_scores_agree_with_peers_where_values_tie_and_sizes_differ():
    words = some_words()
    x, y = words.x.double().numpy(), words.is_concept
    for layer in range(2):
        for neuron in range(4):
            column = x[:, layer, neuron]
            area, r = roc_auc_score(y, column), float(np.corrcoef(y, column)[0, 1])
            assert words.score("auroc_exact")[layer, neuron] == pytest.approx(max(area, 1 - area), abs=1e-6)
            assert words.score("auroc")[layer, neuron] == pytest.approx(max(area, 1 - area), abs=0.02)
            assert words.score("point_biserial")[layer, neuron] == pytest.approx(abs(r), abs=1e-6)


@pytest.mark.parametrize("name", ["dprime", "point_biserial", "auroc", "auroc_exact"])
def test_scores_without_a_unit_do_not_depend_on_a_neurons_scale_shift_or_sign(name):
    words = some_words()
    before = words.score(name)
    scale = torch.tensor([[0.01, 4.0, 1.0, 1000.0], [-1.0, 0.25, -8.0, 3.0]])
    after = Words(words.x * scale + torch.tensor([0.0, -5.0, 3.0, 1.0]), words.is_concept).score(name)
    # histograms round a value at the edge of a bin to either side
    torch.testing.assert_close(after, before, atol=0.01 if name == "auroc" else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", STREAMED)
def test_every_streamed_score_follows_a_permutation_of_the_neurons(name):
    words = some_words()
    moved = Words(words.x[:, [1, 0]][:, :, [2, 0, 3, 1]], words.is_concept)
    torch.testing.assert_close(moved.score(name), words.score(name)[[1, 0]][:, [2, 0, 3, 1]])


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3])
@pytest.mark.parametrize("name", STREAMED)
def test_constant_neuron_scores_nothing_and_never_nan(name, value):
    words = some_words()
    words.x[:, 1, 2] = value
    words.x[torch.from_numpy(words.is_concept), 1, 2] *= 1 + 1e-7  # what averaging sub-words leaves
    score = words.score(name)
    assert not score.isnan().any()
    expected = 0.5 if name.startswith("auroc") else 0.0
    assert score[1, 2] == pytest.approx(expected, abs=1e-3 if name in ("probeless", "difference") else 0)


def test_neuron_whose_squares_underflow_is_constant_to_statistics_but_not_to_auroc():
    """MiniLM has one: its last LayerNorm multiplies it by 1e-32."""
    words = some_words()
    words.x[:, 0, 1] = (words.x[:, 0, 1] - 7) * 1e-32
    before = some_words()
    assert words.score("dprime")[0, 1] == words.score("point_biserial")[0, 1] == 0
    for name in ("auroc", "auroc_exact"):
        assert words.score(name)[0, 1] == pytest.approx(before.score(name)[0, 1].item(), abs=0.01)


def test_dprime_of_a_perfect_detector_is_finite():
    words = Words(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(4, 1, 1), np.arange(4) < 2)
    assert words.score("dprime").isfinite().all()
    assert words.score("dprime").item() > 1e4
    assert words.score("point_biserial").item() == pytest.approx(1)
    assert words.score("auroc").item() == words.score("auroc_exact").item() == 1


def test_every_score_says_its_unit():
    for name, score in SCORES.items():
        assert (score.name, bool(score.unit), bool(score.says)) == (name, True, True)
        assert score.of.__doc__


# --- several scores at once


def test_score_many_is_one_pass_for_every_score(toy_model, untouched: Untouched):
    concept = Concept("place")
    classes = concept.classes(toy_model.corpus)
    encoded = encode(toy_model.corpus, toy_model.tagger.tokenizer)

    def spread(stats: ClassStats, carries: Tensor, contrast: str) -> Tensor:
        return stats.mean.amax(0) - stats.mean.amin(0)

    scores = [*SCORES, spread]
    with untouched(toy_model.tagger), ticks() as seen:
        many = score_many(
            toy_model.tagger, encoded, concept, classes, scores, site="mlp_post", contrast="rest", sample_words=500,
            seed=2,
        )  # fmt: skip
    assert list(many) == [*SCORES, "spread"]
    assert sum(seen) == encoded.n_tokens  # one pass for all of them
    place = many["probeless"].site
    planted = Neurons.of(place, toy_model.planted)
    both = Neurons.of(place, toy_model.planted + toy_model.decoys)
    for name, scored in many.items():
        assert (scored.kind, scored.concept, scored.site) == (name, "place", place)
        assert not scored.score.isnan().any()
        if name != "spread":
            # decoys answer to places as planted neurons do: only their size tells the two apart
            assert scored.top(8) == both, name
        if name in ("probeless", "difference"):
            assert scored.top(4) == planted
        if name in ("elastic_net", "k_sparse"):
            assert scored.quality is not None
            assert scored.quality.held_out > 0.99
            assert 0.4 < scored.quality.control <= scored.quality.held_out
        else:
            assert scored.quality is None
    alone = gather(toy_model.tagger, encoded, classes, ["sample"], site="mlp_post", sample_words=500, seed=2)
    assert (alone.stats, alone.histograms) == (None, None)
    again = saliency(alone, concept, torch.from_numpy(classes.carries), score="auroc_exact")
    assert torch.equal(again.score, many["auroc_exact"].score)


def test_gather_takes_label_shuffles_along(bert_model, corpus, encoded):
    classes = PLACE.classes(corpus)
    other = np.random.default_rng(0).permutation(classes.of_word)
    got = gather(bert_model, encoded, classes, relabelled=[other])
    assert got.stats is not None
    close(got.stats, class_stats(bert_model, encoded, classes))
    (shuffled,) = got.shuffled
    close(shuffled, class_stats(bert_model, encoded, classes._replace(of_word=other)))


def test_score_many_refuses_before_any_pass(bert_model, corpus, encoded):
    classes = PLACE.classes(corpus)

    def run(scores: list, **options: Any) -> None:
        with ticks(KeyError("a pass")):
            unchecked(score_many)(bert_model, encoded, PLACE, classes, scores, **options)

    with pytest.raises(ValueError, match="unknown score 'magic'; known: probeless, difference, dprime"):
        run(["auroc", "magic"])
    with pytest.raises(ValueError, match="unknown contrast 'most'"):
        run(["auroc"], contrast="most")
    with pytest.raises(ValueError, match=r"each with a name of its own, got \['auroc', 'auroc'\]"):
        run(["auroc", SCORES["auroc"]])
    with pytest.raises(ValueError, match=r"scores must be at least one, .* got \[\]"):
        run([])
    with pytest.raises(ValueError, match="unknown need 'magic' of a score; known: stats, histograms, sample, words"):
        unchecked(gather)(bert_model, encoded, classes, ["magic"])


def test_saliency_says_what_a_score_needs_and_what_it_was_given():
    got, carries = some_words().gathered, torch.tensor([False, True])
    for thing, had in ((got.stats, "'stats'"), (got.sample, "'sample'"), (Gathered(), "nothing")):
        said = rf"score 'auroc' needs 'words', and {had} was gathered; use score_many\(..., \['auroc'\]\)"
        with pytest.raises(ValueError, match=said):
            saliency(thing, PLACE, carries, score="auroc")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="score 'probeless' needs 'stats', and 'histograms' was gathered"):
        saliency(got.histograms, PLACE, carries)  # pyright: ignore[reportArgumentType]
    for name in ("dprime", "auroc", "auroc_exact"):
        thing: Any = got.histograms if name == "auroc" else getattr(got, SCORES[name].needs)
        assert torch.equal(
            saliency(thing, PLACE, carries, score=name).score, saliency(got, PLACE, carries, score=name).score
        )


@pytest.mark.parametrize(("words", "said"), [(0, "no word that carries"), (400, "no word that does not carry")])
def test_saliency_refuses_one_sided_words_whatever_was_gathered(words, said):
    one_sided = Words(some_words().x, np.arange(400) < words)
    for name in ("dprime", "auroc", "auroc_exact", "elastic_net"):
        with pytest.raises(ValueError, match=f"{said} concept 'place' was measured"):
            one_sided.score(name)


# --- ranks


def test_top_takes_the_highest_over_all_layers():
    scored = saliency_of([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]])
    assert list(scored.top(3)) == [("0", 1), ("1", 0), ("1", 2)]
    assert scored.top(fraction=0.5) == scored.top(3)
    assert len(scored.top(6)) == len(scored.top(fraction=1.0)) == 6


def test_top_gives_ties_to_the_earlier_neuron():
    scored = saliency_of([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    assert list(scored.top(4)) == [("0", 0), ("0", 1), ("0", 2), ("1", 2)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give k= or fraction=, one of them"),
        ({"k": 2, "fraction": 0.5}, "give k= or fraction=, one of them"),
        ({"k": 0}, r"k must be 1 to 6 \(the neurons of resid\), got 0"),
        ({"k": 7}, "k must be 1 to 6 .*, got 7"),
        ({"k": -1}, "k must be 1 to 6 .*, got -1"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ({"fraction": 0.01}, "k must be 1 to 6 .*, got 0"),
    ],
)
def test_top_refuses_what_is_out_of_range(arguments, said):
    with pytest.raises(ValueError, match=said):
        saliency_of([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]]).top(**arguments)


def test_rank_is_zero_for_the_most_salient_and_ties_share_theirs():
    scored = saliency_of([[5.0, 1.0, 3.0], [3.0, 0.0, 3.0]])
    assert scored.rank().tolist() == [[0.0, 4.0, 2.0], [2.0, 5.0, 2.0]]


def test_rank_among_some_counts_only_those():
    scored = saliency_of([[5.0, 1.0, 3.0], [4.0, 0.0, 3.0]])
    among = Neurons.of(scored.site, [("0", 1), ("1", 0), ("1", 1)])
    nan = float("nan")
    expected = torch.tensor([[nan, 1.0, nan], [0.0, 2.0, nan]])
    torch.testing.assert_close(scored.rank(among), expected, equal_nan=True)
    # s = (N - 1 - i) / (N - 1) of the three
    expected = torch.tensor([[nan, 0.5, nan], [1.0, 0.0, nan]])
    torch.testing.assert_close(scored.by_rank(among), expected, equal_nan=True)


def test_by_rank_is_one_for_the_most_salient_and_zero_for_the_least():
    scored = saliency_of([[4.0, 1.0], [3.0, 2.0]])
    torch.testing.assert_close(scored.by_rank(), torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))
    assert scored.by_rank().mean() == pytest.approx(0.5)


def test_by_rank_of_two_hundred_neurons_in_published_buckets_is_one_or_zero():
    # N = 200: |(floor(i / 100) + 1 - 2) / (1 - 2)| is 1 for the first hundred and 0 for the second
    values = saliency_of(torch.arange(200.0).flip(0).view(4, 50).tolist()).by_rank(bucket=100)
    assert values.flatten().tolist() == [1.0] * 100 + [0.0] * 100


def test_by_rank_in_published_buckets_does_not_reach_zero_where_the_last_bucket_is_not_full():
    # N = 250: N / 100 = 2.5; |1 - 2.5| / 1.5 = 1, |2 - 2.5| / 1.5 = 1/3, |3 - 2.5| / 1.5 = 1/3
    values = saliency_of(torch.arange(250.0).flip(0).view(5, 50).tolist()).by_rank(bucket=100).flatten()
    torch.testing.assert_close(values, torch.tensor([1.0] * 100 + [1 / 3] * 150))


def test_by_rank_of_the_papers_model_in_its_buckets():
    # DistilBERT: 7 * 768 neurons, N / 100 = 53.76
    values = saliency_of(torch.arange(5376.0).flip(0).view(7, 768).tolist()).by_rank(bucket=100).flatten()
    for i in (0, 99, 100, 3000, 5299, 5300, 5375):
        assert values[i] == pytest.approx(abs((i // 100 + 1 - 53.76) / (1 - 53.76)), abs=1e-5)


def test_by_rank_of_one_bucket_is_one():
    assert saliency_of([[3.0, 1.0, 2.0]]).by_rank(bucket=100).tolist() == [[1.0, 1.0, 1.0]]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(24)))
def test_by_rank_has_a_mean_that_no_order_changes(order):
    values = saliency_of(torch.tensor(order).view(3, 8).tolist()).by_rank()
    assert values.mean() == pytest.approx(0.5)
    assert values.flatten().argmax() == order.index(23)


# --- the planted answer


def test_saliency_finds_the_planted_neurons_of_the_toy(toy_model, untouched: Untouched):
    concept = Concept("place")
    classes = concept.classes(toy_model.corpus)
    encoded = encode(toy_model.corpus, toy_model.tagger.tokenizer)
    with untouched(toy_model.tagger):
        stats = class_stats(toy_model.tagger, encoded, classes, site="mlp_post")
    carries = torch.from_numpy(classes.carries)
    for contrast in ("classes", "rest"):
        scored = saliency(stats, concept, carries, contrast=contrast)
        assert scored.top(4) == Neurons.of(stats.site, toy_model.planted)
    # the decoys come next, against all other words together
    assert scored.top(8) == Neurons.of(stats.site, toy_model.planted + toy_model.decoys)
    # and not where it is not: for persons the planted places rank behind
    person = Concept("person")
    carries = torch.from_numpy(person.classes(toy_model.corpus).carries)
    scored = saliency(stats, person, carries, contrast="rest")
    assert not scored.top(4) & Neurons.of(stats.site, toy_model.planted + toy_model.decoys)
