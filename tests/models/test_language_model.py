"""Next-token concepts: Hugging Face's own logits and slow loops as oracles, on small models of several families."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from relearn_lens.analysis.intervals import over_sentences
from relearn_lens.analysis.recovery import recovery
from relearn_lens.find.attribution import attribute
from relearn_lens.measure.evaluation import OTHERS, OVERALL, TokenLoss, evaluate
from relearn_lens.measure.similarity import activation_similarity
from relearn_lens.measure.tracking import BASE, measure, track
from relearn_lens.models.model import LanguageModel, checkpointed, computing, hidden, seeded
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.streaming import class_stats
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import prune_
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode
from tests.families import lent_language_model
from tests.fixtures import LABELS, TEXT, Untouched, sentences_of, unchecked
from tests.neurons.test_sites import save_decoder

PLACE = Concept("place", labels=["LOC"])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The small text in lower case: the decoders' tokenizer knows no other."""
    lower = [[(word.lower(), label, begins) for word, label, begins in s] for s in sentences_of(TEXT)]
    return build_corpus(lower, name="tiny", label_names=LABELS)


@pytest.fixture
def llama() -> LanguageModel:
    return lent_language_model("llama")


def sentences(model: LanguageModel, corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    """Ids of every sentence after its opening token, and the word of each; by the tokenizer, a word at a time."""
    made = []
    for start, end in zip(corpus.start, corpus.start[1:], strict=False):
        ids, words = [model.tokenizer.eos_token_id], [-1]
        for word in range(start, end):
            pieces = model.tokenizer(corpus.vocab[corpus.word[word]], add_special_tokens=False)["input_ids"]
            ids, words = ids + pieces, words + [word] * len(pieces)
        made.append((ids, words))
    return made


def by_hand(model: LanguageModel, plain: torch.nn.Module, corpus: Corpus) -> dict[str, list[float]]:
    """Nats of every token by class, from the plain model, a sentence at a time."""
    found: dict[str, list[float]] = {"LOC": [], "PER": [], OTHERS: [], OVERALL: []}
    for ids, words in sentences(model, corpus):
        with torch.no_grad():
            nats = -plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            label = corpus.label_names[corpus.label[words[at]]]
            for name in (label, *([] if label == "LOC" else [OTHERS]), OVERALL):
                if name in found:
                    found[name].append(float(nats[at - 1, ids[at]]))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen3", "gemma2"])
def test_loss_is_hugging_faces_on_each_class_of_tokens(kind, tmp_path, corpus, untouched: Untouched):
    model = lent_language_model(kind)
    save_decoder(kind, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with untouched(model):
        scores = evaluate(model, corpus, concept=PLACE, max_tokens=40)
    want = by_hand(model, plain, corpus)
    assert scores.support() == {label: len(nats) for label, nats in want.items()}
    assert scores.loss == pytest.approx({label: float(np.mean(nats)) for label, nats in want.items()}, abs=2e-5)
    assert scores.value("LOC") == pytest.approx(math.log(model.vocabulary) - np.mean(want["LOC"]), abs=2e-5)
    both = np.mean(want["LOC"] + want["PER"])
    assert scores.shown(("LOC", "PER")) == pytest.approx(both, abs=2e-5)
    assert evaluate(model, corpus, concept=PLACE).value(OVERALL) == pytest.approx(scores.value(OVERALL), abs=1e-5)


def test_loss_of_a_concept_given_by_words(llama, corpus):
    scores = evaluate(llama, corpus, concept=Concept("cold", words=["cold"]))
    assert scores.labels == ("cold", OTHERS)
    assert scores.support()["cold"] == 6  # one sub-word each
    assert scores.support()["cold"] + scores.support()[OTHERS] == scores.support()[OVERALL]


def test_logits_of_a_native_model():
    config = TransformerBridgeConfig(
        d_model=16, d_head=4, n_layers=2, n_heads=4, n_ctx=12, d_vocab=30, d_mlp=32, act_fn="gelu",
        architecture="TransformerLensNative", output_logits_soft_cap=5.0,
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config)  # pyright: ignore[reportAttributeAccessIssue]
    model = LanguageModel(bridge).eval()
    ids = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids, torch.ones_like(ids)), bridge(ids, return_type="logits"))


def test_an_encoder_is_no_language_model(bert):
    with pytest.raises(ValueError, match=r"BertForMaskedLM model sees the words after a token.*use a causal model"):
        LanguageModel(bert.bridge)


def test_a_model_that_scales_its_logits_is_refused(llama, monkeypatch):
    monkeypatch.setattr(LanguageModel, "logits", lambda self, states: 2 * self.head(states))
    with pytest.raises(ValueError, match="are not its unembedding of the last hidden state"):
        LanguageModel(llama.bridge)


def test_words_are_read_on_the_token_before_their_first(llama, corpus):
    text = llama.encode(corpus)
    assert text.prefix == (llama.tokenizer.eos_token_id,)
    batch = text.batch(np.arange(text.n_pieces))
    firsts = {int(start) for start in corpus.start[:-1]}
    assert sorted(batch.words.tolist()) == [word for word in range(corpus.n_words) if word not in firsts]
    assert text.read_words.tolist() == sorted(batch.words.tolist())
    assert (batch.read == batch.subword[batch.first] - 1).all()
    assert (batch.word_of[batch.first] == batch.words).all()
    own = llama.encode(corpus, reading="word")
    assert own.read_words.tolist() == list(range(corpus.n_words))
    here = own.batch(np.arange(own.n_pieces))
    assert torch.equal(here.read, here.subword)

    stats, classes = class_stats(llama, text, PLACE.classes(corpus)), PLACE.classes(corpus)
    assert stats.count.tolist() == [
        int((classes.of_word[text.read_words] == k).sum()) for k in range(len(classes.names))
    ]


def test_a_sentence_of_one_word_has_nothing_to_read(llama):
    text = build_corpus(
        [[("Rome", "LOC", True)], [("he", "O", False), ("saw", "O", False), ("Rome", "LOC", True)]], name="short",
        label_names=("O", "LOC"),
    )  # fmt: skip
    encoded = llama.encode(text)
    assert encoded.read_words.tolist() == [2, 3]
    stats = class_stats(llama, encoded, PLACE.classes(text), max_tokens=2)  # the first batch holds no word that is read
    assert stats.count.tolist() == [1, 1]
    assert evaluate(llama, encoded, concept=PLACE).support() == {"LOC": 2, OTHERS: 2, OVERALL: 4}


def test_encode_refuses_to_open_without_a_token(tokenizer, corpus, monkeypatch):
    monkeypatch.setattr("relearn_lens.text.encoding._special_tokens", lambda *_: ((), ()))
    monkeypatch.setattr(type(tokenizer), "bos_token_id", None, raising=False)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    with pytest.raises(ValueError, match="no token to open a sentence with"):
        encode(corpus, tokenizer, opening=True)


def test_encode_refuses_an_unknown_reading(tokenizer, corpus):
    with pytest.raises(ValueError, match="unknown reading 'after'; known: word, before"):
        unchecked(encode)(corpus, tokenizer, reading="after")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attribution_is_of_the_words_log_probability(kind, corpus, untouched: Untouched):
    model = lent_language_model(kind)
    encoded = model.encode(corpus)
    with untouched(model):
        found = attribute(model, encoded, PLACE, site="resid", steps=24)
    assert (found.target, found.unit) == ("logprob", "nat per word")
    # f at the end of the path: log-probability of the first token of each place that is read
    nats, n = 0.0, 0
    for ids, words in sentences(model, corpus):
        with torch.no_grad():
            said = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0].log_softmax(-1)
        for at in range(2, len(ids)):
            if words[at] != words[at - 1] and corpus.label_names[corpus.label[words[at]]] == "LOC":
                nats, n = nats + float(said[at - 1, ids[at]]), n + 1
    assert found.n_words == n
    # ... and at its start, where every word is the reference
    start = 0.0
    for ids, words in sentences(model, corpus):
        blank = [ids[0]] + [model.tokenizer.pad_token_id] * (len(ids) - 1)
        with torch.no_grad():
            said = model(torch.tensor([blank]), torch.ones(1, len(ids), dtype=torch.int64))[0].log_softmax(-1)
        for at in range(2, len(ids)):
            if words[at] != words[at - 1] and corpus.label_names[corpus.label[words[at]]] == "LOC":
                start += float(said[at - 1, ids[at]])
    assert found.baseline == "pad"
    assert found.change == pytest.approx((nats - start) / n, abs=1e-4)
    assert float(found.delta.abs().max()) < 0.05 * abs(found.change)
    odds = attribute(model, encoded, PLACE, site="resid", steps=24, target="margin")
    assert odds.unit == "logit per word"
    by_words = attribute(model, encoded, Concept("cold", words=["cold"]), site="mlp_post", steps=4)
    assert by_words.n_words == 6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prune_retrain_and_track(kind, corpus, untouched: Untouched):
    model = lent_language_model(kind)
    text = model.encode(corpus)
    for _ in finetune_(model, text, epochs=30, lr=3e-3, batch_size=4, seed=0):
        pass
    with untouched(model):
        base = measure(model, text, PLACE, site="mlp_post", what=["dprime", "conductance", "top_words"], shuffles=3)
    assert isinstance(base.scores, TokenLoss)
    with pytest.raises(AttributeError, match="has no F1 but a loss"):
        _ = base.f1
    chosen = base.saliency.top(fraction=0.6)
    weights = {name: value.clone() for name, value in model.weights().items()}
    prune_(model, chosen)
    path = track(
        model, text, PLACE, retrain_(model, text, epochs=20, every=10, lr=3e-3, batch_size=4, seed=1), before=base,
        removed=chosen, site="mlp_post", arm="concept",
    )  # fmt: skip
    loss = [path[stage].scores.shown(path.label) for stage in path.stages]
    assert path.label == ("LOC",)
    assert loss[0] < 2 < loss[1] > loss[-1]
    table = path.to_dataframe()
    assert table[(table.stage == BASE) & (table.label == "LOC")].nats_per_token.item() == pytest.approx(loss[0])
    assert "loss" in path.to_xarray()
    back = recovery([path], path.label, path.stages[-1])
    assert back.share is not None
    assert back.share.value == pytest.approx((loss[1] - loss[-1]) / (loss[1] - loss[0]), abs=1e-6)
    similar = activation_similarity(weights, model, text, concept=PLACE, site="mlp_post")
    assert set(similar) == {"all", "concept"}


def test_accumulating_gives_the_same_gradient(corpus):
    ends = []
    for parts in (1, 3):
        model = lent_language_model("llama")
        pause = list(finetune_(model, corpus, epochs=2, lr=1e-3, batch_size=6, seed=0, accumulate=parts))[-1]
        ends.append((model.copied(), pause))
    assert ends[0][1].loss == pytest.approx(ends[1][1].loss, rel=1e-5)
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], atol=2e-5, rtol=1e-4)


def test_interval_of_a_loss_is_of_nats_over_tokens():
    nats = np.array([[2.0, 3.0, 5.0], [1.0, 0.0, 1.0], [4.0, 6.0, 10.0]])
    tokens = np.array([[1, 2, 3], [1, 0, 1], [2, 2, 4]])
    scores = TokenLoss(nats, tokens, ("place", OTHERS), 100)
    assert scores.loss == {"place": 7 / 4, OTHERS: 9 / 4, OVERALL: 2}
    assert scores.value("place") == pytest.approx(math.log(100) - 7 / 4)
    gap = over_sentences(np.subtract, "place", scores, scores)
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)
    low, high = scores.interval("place", n=500)
    assert 1 <= low < 7 / 4 < high <= 2
    assert np.isnan(TokenLoss(nats[1:2], tokens[1:2], ("place", OTHERS), 100).value(OTHERS))
    with pytest.raises(ValueError, match="no scores of label 'person'; known: place, others, overall"):
        scores.value("person")


def test_a_language_model_is_judged_for_a_concept(llama, corpus):
    with pytest.raises(ValueError, match=r"judged on the tokens of a concept: give evaluate\(..., concept"):
        evaluate(llama, corpus)


def test_prior_bias_is_for_taggers(llama, corpus):
    with pytest.raises(ValueError, match="prior_bias is for the head of a tagger"):
        finetune_(llama, corpus, prior_bias=True)
    list(finetune_(llama, corpus, epochs=1))  # and the default leaves its head alone


def test_pruning_a_set_of_one_keeps_the_weights_names(llama):
    site = site_of(llama.bridge, "mlp_post")
    names = set(llama.weights())
    assert "head.weight" in names
    prune_(llama, Neurons.of(site, [("0", 3)]))
    assert set(llama.weights()) == names


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "qwen3", "gemma2"])
def test_checkpointing_gives_the_same_gradients(kind, corpus):
    model = lent_language_model(kind)
    batch = model.encode(corpus).batch(np.arange(6))
    found = []
    for block in (nullcontext(), checkpointed(model)):
        model.train()
        model.zero_grad()
        with block, seeded(0):
            model.losses(batch).sum().backward()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)
    model.eval()
    assert list(finetune_(model, corpus, epochs=1, lr=1e-3, batch_size=6, seed=0, checkpointing=True))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_native_model_cannot_checkpoint(toy):
    with pytest.raises(ValueError, match="cannot checkpoint its blocks; use accumulate"):
        list(finetune_(toy.tagger, toy.corpus, epochs=0.1, checkpointing=True))


def test_bfloat16_ranks_neurons_as_float32(llama, corpus):
    text = llama.encode(corpus)
    with computing(llama, torch.bfloat16):
        narrow = measure(llama, text, PLACE, site="mlp_post")
        seen = hidden(llama.bridge, torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    wide = measure(llama, text, PLACE, site="mlp_post")
    assert seen.dtype == torch.float32
    assert not torch.equal(narrow.saliency.score, wide.saliency.score)
    rank: Any = spearmanr(narrow.saliency.score.flatten(), wide.saliency.score.flatten())
    assert rank.statistic > 0.99
    assert narrow.scores.value(OVERALL) == pytest.approx(wide.scores.value(OVERALL), abs=0.02)
    with (
        pytest.raises(ValueError, match=r"computes in float32, bfloat16 or float16, not in torch\.float64"),
        computing(llama, torch.float64),
    ):
        pass


def test_training_in_bfloat16_moves_float32_weights(llama, corpus):
    with computing(llama, torch.bfloat16):
        first, last = list(finetune_(llama, corpus, epochs=8, every=4, lr=1e-3, batch_size=6, seed=0))
    assert last.loss < first.loss
    assert {weight.dtype for weight in llama.weights().values()} == {torch.float32}
