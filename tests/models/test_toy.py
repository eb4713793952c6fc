"""The planted answer is there, is used, and is nowhere else."""

import pytest
import torch
from torch import Tensor

from relearn_lens.measure.evaluation import evaluate
from relearn_lens.models import toy as toy_module
from relearn_lens.models.model import reading
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.remove.ablation import ablated
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import encode
from tests.fixtures import Untouched


def f1_without(model: toy_module.Toy, members) -> dict[str, float]:
    """F1 by label with some hidden units at zero."""
    chosen = Neurons.of(site_of(model.tagger.bridge, "mlp_post"), members)
    with ablated(model.tagger, chosen):
        return evaluate(model.tagger, model.corpus).f1


def tagged(model: toy_module.Toy) -> tuple[Tensor, Tensor]:
    """The right tag and the logits of every sub-word."""
    (batch,) = encode(model.corpus, model.tagger.tokenizer).batches()
    with reading(model.tagger):
        scores = model.tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword]
    return batch.tag, scores


def test_toy_tags_its_corpus_without_a_mistake(toy_model, untouched: Untouched):
    with untouched(toy_model.tagger):
        scores = evaluate(toy_model.tagger, toy_model.corpus)
    assert scores.f1 == {"person": 1.0, "place": 1.0, "overall": 1.0}
    assert min(scores.support().values()) > 50


def test_toy_tags_every_subword_by_a_margin(toy_model):
    """Also the later sub-words, which F1 does not count; no tag rests on the rounding of a tie."""
    assert (toy_model.tagger.tags[3], toy_model.tagger.tags[4]) == ("B-place", "I-place")
    tag, scores = tagged(toy_model)
    assert torch.equal(scores.argmax(1), tag)
    best = scores.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.1


def test_words_without_their_planted_neurons_are_outside_by_a_margin(toy_model):
    chosen = Neurons.of(site_of(toy_model.tagger.bridge, "mlp_post"), toy_model.planted)
    with ablated(toy_model.tagger, chosen):
        tag, scores = tagged(toy_model)
    places = tag >= 3
    assert (scores[places, 0] - scores[places, 1:].amax(1)).min() > 0.1


def test_ablating_the_planted_neurons_kills_places_alone(toy_model):
    f1 = f1_without(toy_model, toy_model.planted)
    assert f1["place"] == 0
    assert f1["person"] == 1


def test_ablating_the_decoys_kills_nothing(toy_model):
    assert f1_without(toy_model, toy_model.decoys)["overall"] == 1


def test_ablating_the_person_neurons_kills_persons_alone(toy_model):
    f1 = f1_without(toy_model, toy_module.PERSON_NEURONS)
    assert f1["person"] == 0
    assert f1["place"] == 1


def test_ablating_every_other_hidden_unit_kills_nothing(toy_model):
    site = site_of(toy_model.tagger.bridge, "mlp_post")
    used = Neurons.of(site, toy_model.planted + toy_module.PERSON_NEURONS)
    assert f1_without(toy_model, list(~used))["overall"] == 1


def test_decoys_respond_to_places_and_write_nothing(toy_model):
    out = toy_model.tagger.trunk.layers[2].mlp.fc_out.weight
    assert (out[:, [3, 11, 40, 61]] == 0).all()
    assert (out != 0).any()


def test_toy_in_another_seed_has_the_same_answer():
    other = toy_module.load(sentences=60, seed=5)
    assert evaluate(other.tagger, other.corpus).f1["overall"] == 1
    assert f1_without(other, other.planted)["place"] == 0


def test_tokenizer_cuts_names_of_six_letters_and_more():
    tokenizer = toy_module.tokenizer()
    assert tokenizer.tokenize("Linholm Tarn Mira Castor walked .") == [
        "Lin", "##holm", "Tarn", "Mira", "Cas", "##tor", "walked", ".",
    ]  # fmt: skip
    names = (*toy_module.PLACES, *toy_module.PERSONS)
    assert {len(tokenizer.tokenize(name)) for name in names} == {1, 2}
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("[PAD]", "[UNK]")


def test_tokenizer_knows_every_word_of_the_corpus(toy_model):
    ids = toy_module.tokenizer()([list(toy_model.corpus.vocab)], is_split_into_words=True)["input_ids"][0]
    assert toy_model.tagger.tokenizer.unk_token_id not in ids


def test_corpus_labels_every_name_and_nothing_else():
    corpus = toy_module.corpus(sentences=300)
    assert len(corpus) == 300
    kinds = {name: "person" for name in toy_module.PERSONS} | {name: "place" for name in toy_module.PLACES}
    for sentence in corpus:
        for word in sentence:
            assert word.label == kinds.get(word.text, "O")
    assert set(kinds) <= set(corpus.vocab)
    assert (corpus.begins == (corpus.label > 0)).all()


def test_corpus_depends_on_the_seed_alone(untouched: Untouched):
    with untouched():
        hashes = [toy_module.corpus(sentences=40, seed=seed).sha256() for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_load_is_deterministic_and_moves_no_generator(untouched: Untouched):
    with untouched():
        one = toy_module.load(sentences=5)
    torch.manual_seed(99)
    two = toy_module.load(sentences=5)
    weights = [dict(model.tagger.named_parameters()) for model in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.corpus.sha256() == two.corpus.sha256()
    other = toy_module.tagger(seed=1)
    assert not torch.equal(next(other.parameters()), next(one.tagger.parameters()))


def test_toy_is_as_small_as_it_says(toy_model):
    site = site_of(toy_model.tagger.bridge, "mlp_post")
    assert (len(site.layers), site.width) == (toy_module.N_LAYERS, toy_module.D_MLP)
    assert sum(p.numel() for p in toy_model.tagger.parameters()) < 50_000
    assert toy_model.tagger.training is False


@pytest.mark.parametrize("members", [toy_module.PLANTED, toy_module.DECOYS, toy_module.PERSON_NEURONS])
def test_planted_sets_are_four_neurons_of_one_layer(members):
    assert len(set(members)) == 4
    assert len({layer for layer, _ in members}) == 1


def test_the_language_model_learns_its_text():
    model, text = toy_module.language_model(seed=1), toy_module.corpus(sentences=100)
    place = Concept("place")
    before = evaluate(model, text, concept=place).value("place")
    assert abs(before) < 1  # it knows no more than a uniform guess
    list(finetune_(model, text, epochs=4.0, lr=3e-3, batch_size=8, seed=0))
    assert evaluate(model, text, concept=place).value("place") > before + 1
