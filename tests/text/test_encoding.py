"""Whole-sentence tokenisation as oracle; batches, tags and cuts worked out by hand; a slow greedy loop for cuts."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import Encoded, encode
from tests.fixtures import CONTEXT, TEXT, VOCAB, sentences_of, unchecked

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


def test_encode_refuses_a_tokenizer_that_takes_no_text():
    class Images:
        name_or_path, pad_token_id = "mine", 0

        def __call__(self, *_, **__):
            raise NotImplementedError("images alone")

    with pytest.raises(ValueError, match=r"of 'mine' takes no text \(images alone\); load the model's own with"):
        encode(plain("a b"), Images())


def test_encode_refuses_a_corpus_without_sentences():
    with pytest.raises(ValueError, match=r"'words' has no "):
        encode(plain("old").take([]), TOKENIZER)


def test_encode_leaves_the_global_state_alone(corpus, untouched):
    with untouched():
        encoded = encode(corpus, TOKENIZER, context=8)
        encoded.shuffled(batch_size=2, seed=0, epoch=0)


# --- words as they stand in running text

LINES = [
    "Anna saw Rome , and New York ; Paris",
    "the U.S. in 1996 : “ Rome ” ( old )",
    "old towns don't re-elect 3.5 naïve Zürich .",
]
GLUED = set(",;.”)")
"""Words before which no blank stands, besides those after an opening mark."""


def running(spaced: bool = True) -> Corpus:
    words = [line.split() for line in LINES]
    blank = [i == 0 or not (w in GLUED or s[i - 1] in "“(") for s in words for i, w in enumerate(s)]
    sentences = [[(w, "O", False) for w in s] for s in words]
    return build_corpus(sentences, name="run/train", spaced=blank if spaced else None)


def trained(
    pre: Any, *, special: tuple[str, ...] = ("<end>",), model: Any = None, **more: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer with this way of cutting a text, trained on the lines above as running text."""
    backend = Tokenizer(model or models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    text = [_joined(running(), i, 0) for i in range(3)] * 3
    if model is None:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=330, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
            ),
        )
    else:
        backend.train_from_iterator(
            text,
            trainers.UnigramTrainer(
                vocab_size=120, special_tokens=[*special], unk_token=special[0], show_progress=False
            ),
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], unk_token=special[0], **more)


def _joined(corpus: Corpus, i: int, first: int) -> str:
    span = range(corpus.start[i] + first, corpus.start[i + 1])
    return "".join(" " * bool(corpus.after_blank[w]) + corpus.vocab[corpus.word[w]] for w in span).strip()


def split_at(pattern: str) -> Any:
    """As in Qwen, Llama 3 and SmolLM2: a pattern cuts, and no option puts a blank before a text."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TOKENIZERS = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, prefix": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True), add_prefix_space=True),
    "qwen": lambda: trained(split_at(QWEN)),
    "smollm2": lambda: trained(DIGITS),
    "t5": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="always"), model=models.Unigram()),
    "gemma": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="never"), model=models.Unigram()),
    "bert": lambda: TOKENIZER,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("spaced", [True, False])
def test_words_have_the_pieces_of_running_text(kind, spaced):
    """The text itself, tokenised whole behind a word of another sentence, is the oracle."""
    tokenizer, corpus = TOKENIZERS[kind](), running(spaced)
    encoded = encode(corpus, tokenizer)
    (before,) = tokenizer(["Rome"], add_special_tokens=False)["input_ids"]
    for i in range(len(corpus)):
        whole = tokenizer([f"Rome {_joined(corpus, i, 0)}"], add_special_tokens=False)["input_ids"][0]
        mine = encoded.ids[encoded.piece_start[i] : encoded.piece_start[i + 1]].tolist()
        assert before + mine == whole
    # A text that does not know its blanks says so, to a tokenizer to which they matter.
    unsure = [note for note in encoded.remarks if note.startswith("run: the text does not say where no blank stands")]
    assert list(encoded.remarks) == unsure
    assert bool(unsure) == (kind != "bert" and not spaced)


def test_a_word_has_other_pieces_where_no_blank_is_before_it():
    tokenizer = TOKENIZERS["gpt2"]()
    corpus = build_corpus([[("Rome", "O", False), ("Rome", "O", False)]], name="x", spaced=[True, False])
    encoded = encode(corpus, tokenizer)
    assert tokenizer.decode(encoded.ids) == " RomeRome"
    assert tokenizer.decode(encoded.ids[encoded.word_of == 0]) == " Rome"


def test_notes_say_once_that_a_text_does_not_know_its_blanks():
    parts = [encode(part, TOKENIZERS["gpt2"]()) for part in running(spaced=False).split(seed=0)]
    assert len({note for part in parts for note in part.notes()}) == 1
    assert encode(running(spaced=False), TOKENIZER).notes() == []  # BERT drops blanks: it is all one to it


def test_notes_count_words_that_merge_with_a_neighbour():
    tokenizer = trained(
        pre_tokenizers.Split(" ", "merged_with_next")
    )  # `York;` is one piece of text, and then one token
    encoded = encode(running(), tokenizer)
    (note,) = encoded.notes()
    assert re.fullmatch(
        r"run/train: \d+ of 28 words that were compared have other sub-words in running text, .*'\S+'\)", note
    )


def test_encode_refuses_a_tokenizer_to_which_words_are_nothing():
    whole = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "old": 2, "town": 3}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[UNK]", unk_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"cuts 2 of 2 words of 'words' otherwise in running text .*\('old' is the first"
    ):
        encode(plain("old town"), words)


def test_encode_keeps_the_special_tokens_that_a_tokenizer_gives():
    words = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), special=("<end>", "<begin>"), bos_token="<begin>")
    assert encode(running(), words).prefix == ()
    assert encode(running(), words, opening=True).prefix == (words.bos_token_id,)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 0)]
    )
    for opening in (False, True):
        encoded = encode(running(), words, opening=opening)
        assert (encoded.prefix, encoded.suffix) == ((1,), (0,))


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
