"""Whole-sentence tokenisation as oracle; batches, tags and cuts worked out by hand; a slow greedy loop for cuts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import Encoded, encode
from tests.conftest import CONTEXT, TEXT, VOCAB, sentences_of, unchecked

TOKENIZER = BertTokenizer(vocab=VOCAB, do_lower_case=True)
SIZES = {"old": 1, "paris": 2, "linholm": 3, "constantinople": 5}
"""Words by their number of sub-words."""


def plain(*sentences: str) -> Corpus:
    return build_corpus([[(w, "O", False) for w in s.split()] for s in sentences], name="words")


def pieces(encoded: Encoded) -> list[str]:
    """Each piece as its words, one for each of its sub-words."""
    words = [encoded.corpus.vocab[w] for w in encoded.corpus.word]
    cut = zip(encoded.piece_start[:-1], encoded.piece_start[1:], strict=True)
    return [" ".join(words[w] for w in encoded.word_of[a:b]) for a, b in cut]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's, trained on the small text, with a space before every word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT.replace("/", " ")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", add_prefix_space=True
    )


def characters(known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, like BERT's in its special tokens, that drops unknown characters."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *known])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


# --- ids


def test_encode_equals_tokenising_whole_sentences(corpus, encoded):
    for i, sentence in enumerate(corpus):
        whole = TOKENIZER([w.text for w in sentence], is_split_into_words=True)["input_ids"]
        assert encoded.batch(np.array([i])).ids.tolist() == [whole]


def test_encode_equals_tokenising_whole_sentences_with_a_byte_level_tokenizer(corpus):
    words = byte_level_bpe()
    encoded = encode(corpus, words)
    assert (encoded.prefix, encoded.suffix) == ((), ())
    for i, sentence in enumerate(corpus):
        whole = words([w.text for w in sentence], is_split_into_words=True)
        batch = encoded.batch(np.array([i]))
        assert batch.ids.tolist() == [whole["input_ids"]]
        first = [k for k, w in enumerate(whole.word_ids()) if k == 0 or w != whole.word_ids()[k - 1]]
        assert batch.offset.tolist() == first


def test_encode_finds_the_special_tokens(encoded):
    assert (encoded.prefix, encoded.suffix, encoded.pad) == ((VOCAB["[CLS]"],), (VOCAB["[SEP]"],), VOCAB["[PAD]"])


def test_encode_finds_the_special_tokens_of_a_tokenizer_without_the_letter_a():
    words = characters("xy")
    encoded = encode(plain("x y"), words)
    assert encoded.batch(np.array([0])).ids.tolist() == words([["x", "y"]], is_split_into_words=True)["input_ids"]


def test_encode_counts_words_that_the_tokenizer_drops():
    encoded = encode(plain("old \u200b old", "\u200b"), TOKENIZER)
    assert encoded.n_unreadable == 2
    old, unk = VOCAB["old"], VOCAB["[UNK]"]
    assert encoded.ids.tolist() == [old, unk, old, unk]
    assert encoded.notes() == ["words: 2 word(s) have no sub-words and became the unknown token"]


def test_encode_says_nothing_when_everything_fits(encoded):
    assert encoded.notes() == []
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost, encoded.n_unreadable) == (0, 0, 0, 0)


def test_encode_refuses_dropped_words_without_an_unknown_token():
    with pytest.raises(ValueError, match=r"the tokenizer drops 2 word type\(s\) of 'words', for instance \['q', 'z'\]"):
        encode(plain("a q b", "z q"), characters("ab"))


def test_encode_refuses_a_tokenizer_without_padding_token():
    words = characters("ab")
    words.pad_token = None
    with pytest.raises(ValueError, match=r"has no padding token; set one, .*pad_token = tokenizer.eos_token"):
        encode(plain("a b"), words)


def test_encode_refuses_a_tokenizer_that_takes_only_text():
    class Text:
        name_or_path, pad_token_id = "mine", 0

        def __call__(self, *_, **__):
            raise NotImplementedError("no pre-split words")

    with pytest.raises(
        ValueError, match=r"of 'mine' does not take words that are already split \(no pre-split words\)"
    ):
        encode(plain("a b"), Text())


def test_encode_refuses_a_corpus_without_sentences():
    with pytest.raises(ValueError, match=r"'words' has no "):
        encode(plain("old").take([]), TOKENIZER)


def test_encode_leaves_the_global_state_alone(corpus, untouched):
    with untouched():
        encoded = encode(corpus, TOKENIZER, context=8)
        encoded.shuffled(batch_size=2, seed=0, epoch=0)


# --- batches


def test_batch_is_what_was_worked_out_by_hand():
    text = "Anna/PER saw New/LOC York/-LOC Paris/LOC \n cold Linholm/LOC"
    corpus = build_corpus(sentences_of(text), name="two", label_names=("O", "LOC", "PER"))
    batch = encode(corpus, TOKENIZER).batch(np.array([1, 0]))
    row = ["[CLS] cold lin ##hol ##m [SEP] [PAD] [PAD] [PAD]", "[CLS] an ##na saw new york par ##is [SEP]"]
    assert batch.ids.tolist() == [[VOCAB[p] for p in r.split()] for r in row]
    assert batch.mask.tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert batch.n_tokens == 15
    assert batch.words.tolist() == [5, 6, 0, 1, 2, 3, 4]
    assert batch.label.tolist() == [0, 1, 2, 0, 1, 1, 1]
    assert batch.subword.tolist() == [1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16]
    assert batch.offset.tolist() == [0, 1, 4, 6, 7, 8, 9]
    # B-LOC 1, I-LOC 2, B-PER 3, I-PER 4; B- only on the first sub-word of a word that opens a span
    assert batch.tag.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 2, 1, 2]


def test_batch_goes_to_its_own_device_as_it_is(encoded):
    batch = encoded.batch(np.array([0]))
    assert batch.to("cpu") is batch
    assert batch.to("meta").ids.device == torch.device("meta")


@pytest.mark.parametrize("max_tokens", [1, 20, 50, 4096])
def test_batches_hold_every_piece_once_longest_first_within_max_tokens(encoded, max_tokens):
    rows, words, widths = [], [], []
    for batch in encoded.batches(max_tokens=max_tokens):
        assert batch.ids.numel() <= max_tokens or len(batch.ids) == 1
        rows += [tuple(r[m == 1].tolist()) for r, m in zip(batch.ids, batch.mask, strict=True)]
        words += batch.words.tolist()
        widths.append(batch.mask.sum(1))
        assert batch.ids.shape[1] == widths[-1].max()
    lengths = torch.cat(widths).tolist()
    assert lengths == sorted(encoded.lengths.tolist(), reverse=True)
    assert sorted(rows) == sorted(tuple(encoded.batch(np.array([i])).ids[0].tolist()) for i in range(encoded.n_pieces))
    assert sorted(words) == list(range(encoded.corpus.n_words))
    assert sum(lengths) == encoded.n_tokens


def test_shuffled_holds_every_piece_once_and_depends_on_seed_and_epoch_alone():
    encoded = encode(plain(*["old " * (1 + i % 7) for i in range(230)]), TOKENIZER)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in encoded.shuffled(batch_size=4, seed=seed, epoch=epoch)]

    first = order(0, 0)
    assert first == order(0, 0)
    assert first != order(0, 1)
    assert first != order(1, 0)
    assert order(0, 1) != order(1, 0)
    for batches in (first, order(0, 1)):
        assert sorted(piece for batch in batches for piece in batch) == list(range(230))
        assert sorted(map(len, batches)) == [2] + [4] * 57


def test_shuffled_puts_pieces_of_like_length_together():
    encoded = encode(plain(*["old " * (1 + i % 5) for i in range(200)]), TOKENIZER)
    mixed = [b for b in encoded.shuffled(batch_size=4, seed=0, epoch=0) if len(set(encoded.lengths[b])) > 1]
    assert len(mixed) <= 4  # one pool of 200: at most one batch for each change of length


# --- sentences that are longer than the context (room is two less: [CLS] and [SEP])


def test_split_cuts_between_words():
    encoded = encode(plain("old paris paris old", "old"), TOKENIZER, context=6)
    assert pieces(encoded) == ["old paris paris", "paris paris old", "old"]
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (1, 0, 0)
    assert encoded.lengths.tolist() == [5, 5, 3]
    assert encoded.notes() == ["words: 1 sentence(s) longer than the model's context were split"]


def test_split_goes_on_with_a_span_in_the_next_piece():
    corpus = build_corpus(sentences_of("old New/LOC York/-LOC"), name="x")
    batch = encode(corpus, TOKENIZER, context=4).batch(np.array([0, 1]))
    assert batch.tag.tolist() == [0, 1, 2]


def test_truncate_drops_the_end():
    encoded = encode(plain("old paris paris old", "old"), TOKENIZER, context=6, long="truncate")
    assert pieces(encoded) == ["old paris paris", "old"]
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (0, 1, 2)
    assert encoded.notes() == [
        "words: 1 sentence(s) longer than the model's context were truncated",
        "words: 2 word(s) were cut off and are not measured",
    ]


def test_split_shortens_a_word_that_is_longer_than_the_room():
    encoded = encode(plain("old constantinople old"), TOKENIZER, context=6)
    assert pieces(encoded) == ["old", " ".join(["constantinople"] * 4), "old"]
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (1, 1, 0)
    alone = encode(plain("constantinople"), TOKENIZER, context=6)
    assert (alone.n_split, alone.n_truncated, alone.n_words_lost) == (0, 1, 0)
    assert alone.ids.tolist() == [VOCAB[p] for p in ("con", "##stan", "##ti", "##no")]


def test_truncate_shortens_a_first_word_that_is_longer_than_the_room():
    encoded = encode(plain("constantinople old"), TOKENIZER, context=6, long="truncate")
    assert pieces(encoded) == [" ".join(["constantinople"] * 4)]
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (0, 1, 1)


def test_error_names_the_first_long_sentence():
    text = plain("old", "old paris paris old", "constantinople")
    with pytest.raises(
        ValueError,
        match=r"2 sentence\(s\) of 'words' are longer .* is sentence 1 with 8 tokens \(context 6\). Choose",
    ):
        encode(text, TOKENIZER, context=6, long="error")
    assert encode(text, TOKENIZER, context=8, long="error").n_pieces == 3


def test_encode_refuses_a_context_without_room():
    with pytest.raises(ValueError, match="a context of 2 tokens leaves no room beside the special tokens"):
        encode(plain("old"), TOKENIZER, context=2)


def test_encode_refuses_an_unknown_way_with_long_sentences():
    with pytest.raises(ValueError, match=r"unknown long 'cut'; known: split, truncate, error"):
        unchecked(encode)(plain("old old"), TOKENIZER, context=3, long="cut")


DRAWN = st.lists(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(DRAWN, st.integers(3, 14))
def test_split_loses_no_word_and_every_piece_fits(drawn, context):
    encoded = encode(plain(*map(" ".join, drawn)), TOKENIZER, context=context)
    room = context - 2
    expected, n_split, n_truncated = [], 0, 0
    for sentence in drawn:
        packed: list[list[str]] = [[]]
        for word in sentence:
            subwords = [word] * min(SIZES[word], room)
            if len(packed[-1]) + len(subwords) > room:
                packed.append([])
            packed[-1] += subwords
        packed = [piece for piece in packed if piece]
        expected += packed
        n_split += len(packed) > 1
        n_truncated += any(SIZES[word] > room for word in sentence)
    assert pieces(encoded) == [" ".join(piece) for piece in expected]
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (n_split, n_truncated, 0)
    assert encoded.lengths.max() <= context
    words = [w for batch in encoded.batches(max_tokens=30) for w in batch.words.tolist()]
    assert sorted(words) == list(range(sum(map(len, drawn))))


@settings(max_examples=60, deadline=None)
@given(DRAWN, st.integers(3, 14))
def test_truncate_keeps_the_beginning_of_every_sentence(drawn, context):
    encoded = encode(plain(*map(" ".join, drawn)), TOKENIZER, context=context, long="truncate")
    room = context - 2
    expected, lost, n_truncated = [], 0, 0
    for sentence in drawn:
        piece, kept, cut = [], 0, False
        for word in sentence:
            subwords = [word] * min(SIZES[word], room)
            if len(piece) + len(subwords) > room:
                break
            piece, kept, cut = piece + subwords, kept + 1, cut or SIZES[word] > room
        expected.append(" ".join(piece))
        lost += len(sentence) - kept
        n_truncated += cut or kept < len(sentence)
    assert pieces(encoded) == expected
    assert (encoded.n_split, encoded.n_truncated, encoded.n_words_lost) == (0, n_truncated, lost)


def test_text_of_the_fixtures_is_what_it_says(encoded):
    """The fixture has names of 1 to 5 sub-words, an unknown word, and one sentence that fills the context."""
    sizes = np.bincount(encoded.word_of)
    assert set(sizes[encoded.corpus.label > 0]) == {1, 2, 3, 5}
    assert (encoded.ids == VOCAB["[UNK]"]).sum() == 1
    assert encoded.lengths.max() == CONTEXT


def test_batch_says_which_piece_each_sentence_is_and_where_its_sub_words_are(encoded):
    pieces = np.array([4, 0, 7])
    batch = encoded.batch(pieces)
    assert batch.pieces.tolist() == [4, 0, 7]
    for row, piece in enumerate(pieces):
        ids = encoded.ids[encoded.piece_start[piece] : encoded.piece_start[piece + 1]]
        assert batch.ids.flatten()[batch.subword[batch.sentence == row]].tolist() == ids.tolist()
