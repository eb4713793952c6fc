"""Top words by hand, against a slow loop over plain Hugging Face, in any number of passes; dead and null neurons."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from relearn_lens.measure import topwords
from relearn_lens.measure.topwords import TopWords, is_dead, top_words
from relearn_lens.models.model import Tagger
from relearn_lens.models.toy import PERSON_NEURONS, PERSONS, PLACES
from relearn_lens.neurons.sites import Neurons, Slice, parameter, site_of
from relearn_lens.neurons.streaming import class_stats, stream
from relearn_lens.remove.ablation import prune_
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode
from tests.find.test_saliency import slow_words
from tests.fixtures import CONTEXT, D_MLP, D_MODEL, N_LAYERS, Untouched, sentences_of, ticks

PLACE = Concept("place", labels=("LOC",))


def same(a: TopWords, b: TopWords) -> None:
    """The same words; values to float error."""
    assert a.vocab == b.vocab
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.null, b.null)
    assert torch.equal(a.dead, b.dead)
    torch.testing.assert_close(a.value, b.value, atol=1e-5, rtol=1e-5)


def of_embedding(toy, rows: dict[str, list[float]], position: dict[int, list[float]] | None = None) -> Tagger:
    """The toy's model with the first neurons of `embed` set by hand: a word's row plus its position's."""
    model, vocab = toy.tagger.bridge.original_model, toy.tagger.tokenizer.get_vocab()
    with torch.no_grad():
        model.pos.weight.zero_()
        for word, values in rows.items():
            model.tok_embed.weight[vocab[word], : len(values)] = torch.tensor(values)
        for i, values in (position or {}).items():
            model.pos.weight[i, : len(values)] = torch.tensor(values)
    return toy.tagger


def text(*lines: str) -> Corpus:
    return build_corpus(sentences_of("\n".join(lines)), name="hand")


# --- by hand


def test_top_words_by_hand(toy):
    # Neuron 0 sees the word: salt 4, road 0, cold 1. Over salt road salt, cold road: X = 4 0 4 1 0, mean 1.8,
    # |X - mean| = 2.2 1.8 2.2 .8 1.8.
    # Neuron 1 sees the position: X = 0 3 6 0 3, mean 2.4, |X - mean| = 2.4 .6 3.6 2.4 .6: salt (2.4 + 3.6) / 2 = 3,
    # road .6, cold 2.4.
    # Neuron 2 is always 7.
    rows = {"salt": [4.0, 0.0, 7.0], "road": [0.0, 0.0, 7.0], "cold": [1.0, 0.0, 7.0]}
    tagger = of_embedding(toy, rows, {1: [0.0, 3.0], 2: [0.0, 6.0]})
    top = top_words(tagger, text("salt road salt", "cold road"), keep=0.25)
    assert top.of(("embed", 0)) == ("salt", "road", "cold")
    torch.testing.assert_close(top.value[0, 0], torch.tensor([1.0, 1.8 / 2.2, 0.8 / 2.2, 0.0, 0.0]))
    assert top.of(("embed", 1)) == ("salt", "cold")  # road's .6 / 3 is not above .25
    torch.testing.assert_close(top.value[0, 1], torch.tensor([1.0, 0.8, 0.0, 0.0, 0.0]))
    assert top.of(("embed", 2)) == ()
    assert top.value[0, 2].tolist() == [0.0] * 5
    assert top.dead[0, :3].tolist() == top.null[0, :3].tolist() == [False, False, True]
    assert (top.n_types, top.kept) == (3, 0.25)
    assert top.value.dtype == torch.float32
    assert top.words.shape == top.value.shape == (5, 32, 5)


def test_top_words_equals_the_mean_of_z_over_its_highest(toy):
    # z = |X - mean| / std itself, std^2 = ((2.2^2) 2 + (1.8^2) 2 + .8^2) / 5
    std = ((2 * 2.2**2 + 2 * 1.8**2 + 0.8**2) / 5) ** 0.5
    z = torch.tensor([2.2 / std, 1.8 / std, 0.8 / std])
    tagger = of_embedding(toy, {"salt": [4.0], "road": [0.0], "cold": [1.0]})
    top = top_words(tagger, text("salt road salt", "cold road"), k=3, keep=0)
    torch.testing.assert_close(top.value[0, 0], z / z.max())


def test_top_words_without_a_letter_are_null_but_not_dead(toy):
    # neuron 0: X = 4 0 0 0, mean 1, |X - mean| = 3 1 1 1; neuron 1: X = 4 2 0 0, mean 1.5, |X - mean| = 2.5 .5 1.5 1.5
    tagger = of_embedding(toy, {".": [4.0, 4.0], "cold": [0.0, 2.0], "salt": [0.0, 0.0], "road": [0.0, 0.0]})
    corpus = text(". cold", "salt road")
    top = top_words(tagger, corpus, keep=0.5)
    assert top.of(("embed", 0)) == (".",)
    assert (bool(top.null[0, 0]), bool(top.dead[0, 0])) == (True, False)
    assert top.of(("embed", 1)) == (".", "salt", "road")
    assert not top.null[0, 1]
    assert top_words(tagger, corpus, k=1).null[0, 1]


def test_highest_gives_ties_to_the_earlier_type_and_drops_what_is_not_there():
    table = torch.tensor([[2.0, 0.0], [6.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    count = torch.tensor([1, 2, 1, 5])  # averages 2 3 3 0
    value, which = topwords._highest(table, count, 3)
    assert which.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(value, torch.tensor([[1.0, 1.0, 2 / 3], [0.0, 0.0, 0.0]]))
    assert topwords._highest(table, count, 9)[1].shape == (2, 4)


def test_highest_agrees_with_sorting():
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.integers(0, 6, (40, 30)).astype(np.float32))
    table[:, 3] = 0
    _, which = topwords._highest(table, torch.ones(40, dtype=torch.int64), 5)
    expected = np.argsort(-table.numpy(), axis=0, kind="stable")[:5].T
    assert np.array_equal(which, expected)


# --- against a slow loop


@pytest.mark.parametrize("where", ["resid", "mlp_post"])
def test_top_words_agree_with_a_slow_loop(bert, plain, tokenizer, corpus, encoded, where, untouched: Untouched):
    bert.train()
    with untouched(bert):
        top = top_words(bert, encoded, site=where, max_tokens=60)
    words = slow_words(plain, tokenizer, corpus, where)
    z = np.abs(words - words.mean(0)) / words.std(0)
    sums: dict[str, list[np.ndarray]] = defaultdict(list)
    for i, one in enumerate(w.text for sentence in corpus for w in sentence):
        sums[one].append(z[i])
    types = list(sums)
    means = np.stack([np.mean(each, axis=0) for each in sums.values()])
    means /= means.max(0)
    order = np.argsort(-means, axis=0, kind="stable")[:5]
    assert top.n_types == len(types)
    assert not top.dead.any()
    for layer in range(words.shape[1]):
        for neuron in range(words.shape[2]):
            found = top.of((top.site.layers[layer], neuron))
            mine = [
                (types[i], means[i, layer, neuron]) for i in order[:, layer, neuron] if means[i, layer, neuron] > 0.1
            ]
            values = [value for _, value in mine]
            np.testing.assert_allclose(top.value[layer, neuron, : len(found)], values, atol=1e-4)
            # words that are all but equal may change places
            if min(-np.diff(values), default=1) > 1e-4:
                assert list(found[:-1]) == [word for word, _ in mine[:-1]]
    assert not top.null.any()


@pytest.mark.parametrize(("max_memory", "max_tokens"), [(2**28, 1), (2**28, 60), (2000, 4096), (1500, 60), (12345, 37)])
def test_top_words_do_not_depend_on_passes_or_batches(bert_model, encoded, max_memory, max_tokens, monkeypatch):
    whole = top_words(bert_model, encoded, site="mlp_post")
    held: list[int] = []

    def watched(model, text, collectors, **keywords) -> None:
        stream(model, text, collectors, **keywords)
        held.append(sum(t.numel() * t.element_size() for t in collectors[0].table.values()))

    monkeypatch.setattr(topwords, "stream", watched)
    parts = top_words(bert_model, encoded, site="mlp_post", max_memory=max_memory / 2**20, max_tokens=max_tokens)
    same(parts, whole)
    assert whole.n_types == 25
    assert max(held) <= max_memory
    assert len(held) == -(-N_LAYERS * D_MLP // min(max_memory // (4 * 25), N_LAYERS * D_MLP))


def test_top_words_with_stats_take_one_pass_less(bert_model, corpus, encoded, untouched: Untouched):
    stats = class_stats(bert_model, encoded, PLACE.classes(corpus))
    with untouched(bert_model), ticks() as once:
        given = top_words(bert_model, encoded, stats=stats)
    assert sum(once) == encoded.n_tokens
    with ticks() as twice:
        same(given, top_words(bert_model.bridge, corpus))
    assert sum(twice) == 2 * encoded.n_tokens


def test_top_words_leave_out_words_that_were_cut_off(bert_model, tokenizer):
    corpus = text("old town Rome cold road", "he left")
    cut = encode(corpus, tokenizer, context=5, long="truncate")
    assert cut.n_words_lost == 2
    top = top_words(bert_model, cut)
    assert top.n_types == 5
    assert not {"cold", "road"} & set(top.vocab)


# --- neurons that mean nothing


def test_pruned_coordinates_are_dead_and_null(bert, encoded, untouched: Untouched):
    chosen = Neurons.of(site_of(bert.bridge), [("embed", 3), ("0", 0), ("2", 7), ("2", 31)])
    prune_(bert, chosen)
    with untouched(bert):
        top = top_words(bert, encoded)
    assert torch.equal(top.dead, chosen.mask)
    assert torch.equal(top.null, chosen.mask)
    assert (top.words[chosen.mask] == -1).all()
    assert (top.value[chosen.mask] == 0).all()
    assert (top.value[~chosen.mask][:, 0] == 1).all()


def test_a_coordinate_that_keeps_its_bias_is_dead_too(bert, corpus, encoded):
    # as published: gain 0, bias kept. Averaged over three sub-words a constant is no longer exactly one.
    site = site_of(bert.bridge)
    chosen = Neurons.of(site, [("embed", 3), ("1", 5), ("2", 7)])
    with torch.no_grad():
        for layer, index in chosen:
            gain, bias = site.writes[site.layers.index(layer)]
            assert isinstance(gain, Slice)
            parameter(bert.bridge, gain)[index] = 0
            parameter(bert.bridge, bias)[index] = 1.1
    stats = class_stats(bert, encoded, PLACE.classes(corpus))
    assert torch.equal(is_dead(stats), chosen.mask)
    assert torch.equal(top_words(bert, encoded, stats=stats).null, chosen.mask)


def test_hidden_units_that_were_cut_off_from_the_rest_go_on_meaning_what_they_did(bert, encoded):
    before = top_words(bert, encoded, site="mlp_post")
    chosen = Neurons.of(before.site, [("2", 0), ("2", 9)])
    prune_(bert, chosen)
    same(top_words(bert, encoded, site="mlp_post"), before)
    prune_(bert, chosen, sever="both")
    assert torch.equal(top_words(bert, encoded, site="mlp_post").dead, chosen.mask)


def test_one_word_makes_every_neuron_dead(bert_model):
    top = top_words(bert_model, text("Rome", "Rome"))
    assert top.dead.all()
    assert top.vocab == ()
    assert repr(top) == "TopWords(resid: 0 of 1 word types drive 128 neurons; 128 null, of them 128 dead)"


# --- the planted answer


def test_top_words_of_planted_neurons_are_what_was_planted(toy_model, untouched: Untouched):
    with untouched(toy_model.tagger):
        top = top_words(toy_model.tagger, toy_model.corpus, site="mlp_post")
    for neurons, names in ((toy_model.planted, PLACES), (toy_model.decoys, PLACES), (PERSON_NEURONS, PERSONS)):
        for neuron in neurons:
            assert set(top.of(neuron)) <= set(names), neuron
            assert len(top.of(neuron)) == 5
    others = [k for k in range(64) if ("1", k) not in toy_model.planted]
    assert not any(set(top.of(("1", k))) <= set(PLACES) for k in others)


# --- errors, before any forward pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k": 0}, r"top words need k of at least 1 and keep from 0 to below 1, got k=0, keep=0\.1"),
        ({"keep": 1.0}, "keep from 0 to below 1, got k=5, keep=1.0"),
        ({"keep": -0.1}, "keep from 0 to below 1"),
        ({"site": "magic"}, "unknown site 'magic'; known: resid, mlp_post"),
        (
            {"max_memory": 99 / 2**20},
            r"max_memory=9\.44\S+ MB cannot hold the 25 word types of 'tiny' .*; give at least 9\.5e-05",
        ),
    ],
)
def test_top_words_refuse_what_is_out_of_range(bert_model, encoded, arguments, said):
    with pytest.raises(ValueError, match=said), ticks(KeyError("a pass")):
        top_words(bert_model, encoded, **arguments)


def test_top_words_refuse_stats_of_something_else(bert_model, corpus, encoded, tokenizer):
    stats = class_stats(bert_model, encoded, PLACE.classes(corpus), site="mlp_post")
    said = "86 words at site 'mlp_post', and top words are asked of the 86 words of 'tiny' at site 'resid'"
    with pytest.raises(ValueError, match=said), ticks(KeyError("a pass")):
        top_words(bert_model, encoded, stats=stats)
    half = encode(corpus.take(range(4)), tokenizer, context=CONTEXT)
    with (
        pytest.raises(ValueError, match="pass those of the same model, text and site, or leave stats= out"),
        ticks(KeyError("a pass")),
    ):
        top_words(bert_model, half, site="mlp_post", stats=stats)


def test_of_refuses_a_neuron_that_is_not_there(bert_model, encoded):
    top = top_words(bert_model, encoded)
    assert len(top.of(("2", D_MODEL - 1))) > 0
    for neuron in (("9", 0), ("2", D_MODEL), ("2", -1)):
        with pytest.raises(ValueError, match="resid has no neuron"):
            top.of(neuron)
