"""Only the answers' tokens are trained on and scored."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from relearn_lens.models import toy
from relearn_lens.models.training import finetune_
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.encoded import encode_passages

PASSAGES = (
    Passage("Mira walked from", "Tarn", "Mira", "from"),
    Passage("a letter came from Linholm for", "Tamsin and Ilse", "letter", "for"),
    Passage("", "the baker walked home", "baker", "text", "text"),
    Passage("in Osmere\n", "the baker met Oskar", "Osmere", "met"),
)


@pytest.fixture(scope="module")
def words() -> Any:
    return toy.tokenizer(opening=True)


def test_sub_words_of_a_batch_are_those_of_the_answers(words):
    encoded = encode_passages(PASSAGES, words)
    assert (encoded.n_pieces, encoded.prefix, encoded.suffix) == (4, (words.bos_token_id,), ())
    batch = encoded.batch(np.array([1, 2, 0]))
    ids = batch.ids.flatten()
    scored = [[int(ids[at]) for at, i in zip(batch.subword, batch.word_of, strict=True) if i == k] for k in (1, 2, 0)]
    assert [words.convert_ids_to_tokens(each) for each in scored] == [
        ["Tam", "##sin", "and", "Ilse"], ["the", "baker", "walked", "home"], ["Tarn"],
    ]  # fmt: skip
    assert batch.words.tolist() == [1, 2, 0]
    assert [encoded.corpus.label_names[k] for k in batch.label] == ["for", "text", "from"]
    assert batch.subword[batch.first].tolist() == batch.read[batch.offset].tolist()
    assert batch.first.tolist() == [0, 4, 8]
    assert batch.mask.sum() == batch.n_tokens == encoded.lengths[[1, 2, 0]].sum()
    assert encoded.n_subwords(np.array([1, 2, 0])) == len(batch.subword) == 9
    assert [int(n) for n in batch.ids[:, 0]] == [words.bos_token_id] * 3


def test_a_prompt_that_ends_in_a_blank_keeps_its_tokens(words):
    batch = encode_passages(PASSAGES[3:], words).batch(np.array([0]))
    tokens = words.convert_ids_to_tokens(batch.ids.flatten()[batch.subword].tolist())
    assert tokens == ["the", "baker", "met", "Oskar"]


def test_a_text_longer_than_the_context_is_several_pieces(words):
    long = Passage("", " ".join(["the baker walked home"] * 5), "k", "text", "text")
    encoded = encode_passages([PASSAGES[0], long], words, context=9)
    assert encoded.lengths.tolist() == [5, 9, 9, 5]
    assert encoded.n_split == 1
    batch = encoded.batch(np.arange(4))
    assert batch.words.tolist() == [0, 1, 1, 1]
    assert batch.word_of.tolist() == [0] + [1] * 20
    whole = encode_passages([long], words).batch(np.array([0]))
    assert torch.equal(batch.ids.flatten()[batch.subword[1:]], whole.ids.flatten()[whole.subword])


def test_a_question_longer_than_the_context_is_refused(words):
    with pytest.raises(
        ValueError, match=r"passage 1 of 'passages' about 'letter' has \d+ tokens, the model's context is 6"
    ):
        encode_passages(PASSAGES, words, context=6)


def test_what_cannot_be_encoded_is_refused(words):
    with pytest.raises(ValueError, match=r"'none' has no passages to encode; choose other roles or forms"):
        encode_passages([], words, name="none")
    with pytest.raises(ValueError, match=r"has no token to begin a passage with .*set tokenizer.bos_token"):
        encode_passages(PASSAGES, toy.tokenizer())
    unpadded = toy.tokenizer(opening=True)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer of 'toy' has no padding token; set one"):
        encode_passages(PASSAGES, unpadded)
    with pytest.raises(ValueError, match=r"cannot say which characters a token stands for; load a fast one"):
        encode_passages(PASSAGES, _Slow())


class _Slow:
    is_fast, name_or_path = False, "slow"


def test_training_lowers_the_loss_on_answers_by_their_tokens_alone(words, untouched):
    """The loss that training reports is a plain loop's over the answers' tokens, and prompts get no gradient of
    their own."""
    model = toy.language_model(seed=0)
    encoded = encode_passages(PASSAGES, model.tokenizer)
    nats, n = 0.0, 0
    with torch.no_grad(), untouched(model):
        for p in PASSAGES:
            prompt = words(p.prompt, add_special_tokens=False)["input_ids"]
            answer = words(p.answer, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[words.bos_token_id, *prompt, *answer]])
            logits = model.bridge(ids, return_type="logits")[0].log_softmax(-1)
            for at in range(1 + len(prompt), ids.shape[1]):
                nats -= float(logits[at - 1, ids[0, at]])
                n += 1
    (checkpoint,) = finetune_(model, encoded, epochs=1, batch_size=4, lr=1e-3)
    assert n == encoded.n_subwords(np.arange(4))
    assert checkpoint.loss == pytest.approx(nats / n, rel=1e-5)
    assert checkpoint.tokens_seen == encoded.n_tokens


def test_an_answer_that_the_tokenizer_drops_is_refused():
    dropping = toy.tokenizer(opening=True)
    dropping.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(ValueError, match=r"drops the answer '~' of 'Mira walked from'; leave it out"):
        encode_passages([replace(PASSAGES[0], answer="~")], dropping)
