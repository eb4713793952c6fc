"""Words to sub-words, and sub-words to batches of similar length.

A word's ids are those that it has in running text: after a blank, or glued to the word before it where the text says
so. Every word type is tokenised once in each of the two places, and the corpus becomes one flat array of ids. Some
sentences are then tokenised whole, and what differs is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Int, jaxtyped
from torch import Tensor

from relearn_lens.methods import MAX_TOKENS
from relearn_lens.names import explained, known_name
from relearn_lens.text.corpus import Corpus, Strings, one_of

LongSentences = Literal["split", "truncate", "error"]
Reading = Literal["word", "before"]
"""Where a word's activations are read: on its own sub-words (their mean), or on the token before its first one, from
which a causal model predicts it."""

COMPARED = 50
"""Sentences of a text that are tokenised whole, to be compared with their words' pieces."""
_COMPARED_WORDS = 200
"""Words of such a sentence, at most."""
_COMPARED_TOKENS = 4000
"""A sentence of more is not searched for what differs."""


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class Batch:
    """Padded sentences, where their sub-words are, and where the activations of their words are read.

    Words are numbered within the batch, in the order of their sub-words. Positions are flat: row * width + column.
    """

    ids: Int[Tensor, "sentence token"]
    mask: Int[Tensor, "sentence token"]
    """1 for tokens, 0 for padding."""
    words: Int[Tensor, " word"]
    """Index in the corpus of each word that is read."""
    label: Int[Tensor, " word"]
    read: Int[Tensor, " read"]
    """The positions that words are read at."""
    offset: Int[Tensor, " word"]
    """Word i is read from `read[offset[i]]` up to the next word's."""
    subword: Int[Tensor, " subword"]
    """Position of every sub-word; special tokens and padding are left out."""
    word_of: Int[Tensor, " subword"]
    """Index in the corpus of every sub-word's word."""
    first: Int[Tensor, " word"]
    """The first sub-word of word i is `subword[first[i]]`."""
    tag: Int[Tensor, " subword"]
    """BIO tag of every sub-word: 0 outside, 2k - 1 opens a span of label k, 2k inside one."""
    pieces: Int[Tensor, " sentence"]
    """Which piece of the text each sentence is."""

    @property
    def sentence(self) -> Int[Tensor, " subword"]:
        """The sentence of the batch that each sub-word is in."""
        return self.subword // self.ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding, special tokens included."""
        return int(self.mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        if self.ids.device == torch.device(device):
            return self
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """A corpus in a model's sub-words, cut into pieces that fit its context.

    A piece is a sentence, or a part of one that was too long.
    """

    corpus: Corpus
    ids: Int[np.ndarray, " token"]
    word_of: Int[np.ndarray, " token"]
    """Index of the word in the corpus that each token belongs to."""
    piece_start: Int[np.ndarray, " boundary"]
    prefix: tuple
    """Special tokens before every piece."""
    suffix: tuple
    pad: int
    n_split: int = 0
    """Sentences that were cut into several pieces."""
    n_truncated: int = 0
    """Sentences that lost their end."""
    n_words_lost: int = 0
    """Words that no piece holds; they are never measured and count as predicted `"O"`."""
    n_unreadable: int = 0
    """Words that the tokenizer drops and the unknown token stands for."""
    reading: Reading = "word"
    remarks: Strings = ()
    """How the words' pieces compare with those of running text, in words; empty where they are the same."""

    @property
    def n_pieces(self) -> int:
        """Number of pieces."""
        return len(self.piece_start) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " piece"]:
        """Tokens per piece, special tokens included."""
        return np.diff(self.piece_start) + len(self.prefix) + len(self.suffix)

    @property
    def read_words(self) -> Int[np.ndarray, " word"]:
        """Index in the corpus of every word that is read: not what was cut off, nor what nothing is before if words are
        read on the token before them."""
        there = np.unique(self.word_of).astype(np.int64)
        return there if self.reading == "word" else np.setdiff1d(there, self.word_of[self.piece_start[:-1]])

    @property
    def vocabulary(self) -> Int[np.ndarray, " id"]:
        """Every id that a batch can hold, once, in order."""
        return np.unique(np.append(self.ids, [*self.prefix, *self.suffix, self.pad])).astype(np.int64)

    @property
    def n_tokens(self) -> int:
        """Tokens of all pieces, special tokens included."""
        return int(self.lengths.sum())

    def n_subwords(self, pieces: Int[np.ndarray, " piece"]) -> int:
        """Tokens of some pieces, special tokens not included."""
        return int(np.diff(self.piece_start)[pieces].sum())

    def notes(self) -> list[str]:
        """What the text's reader decided, what differs from running text and what did not fit, in words; empty when
        all is plain."""
        notes = {
            "sentence(s) longer than the model's context were split": self.n_split,
            "sentence(s) longer than the model's context were truncated": self.n_truncated,
            "word(s) were cut off and are not measured": self.n_words_lost,
            "word(s) have no sub-words and became the unknown token": self.n_unreadable,
        }
        counts = [f"{self.corpus.name}: {n} {what}" for what, n in notes.items() if n]
        return [*self.corpus.notes, *self.remarks, *counts]

    def batch(self, pieces: np.ndarray) -> Batch:
        """The given pieces, padded to the longest of them."""
        lengths = np.diff(self.piece_start)[pieces]
        rows = np.repeat(np.arange(len(pieces)), lengths)
        columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = np.repeat(self.piece_start[:-1][pieces], lengths) + columns
        width = int(lengths.max()) + len(self.prefix) + len(self.suffix)
        ids = np.full((len(pieces), width), self.pad, dtype=np.int64)
        ids[:, : len(self.prefix)] = self.prefix
        ids[rows, columns + len(self.prefix)] = self.ids[tokens]
        end = lengths + len(self.prefix)
        for k, token in enumerate(self.suffix):
            ids[np.arange(len(pieces)), end + k] = token
        mask = (np.arange(width) < (end + len(self.suffix))[:, None]).astype(np.int64)

        word_of = self.word_of[tokens]
        opens = np.flatnonzero(np.diff(word_of, prepend=-1) != 0)
        kind = self.corpus.label[word_of].astype(np.int64)
        tag = 2 * kind
        begins = opens[self.corpus.begins[word_of[opens]]]
        tag[begins] -= 1
        position = rows * width + columns + len(self.prefix)
        read, offset = position, opens
        if self.reading == "before":
            # What precedes a piece's first word is a special token, whose activations are like no other's.
            opens = opens[columns[opens] > 0]
            read, offset = position[opens] - 1, np.arange(len(opens))
        return Batch(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            words=torch.from_numpy(word_of[opens].astype(np.int64)),
            label=torch.from_numpy(kind[opens]),
            read=torch.from_numpy(read),
            offset=torch.from_numpy(offset.astype(np.int64)),
            subword=torch.from_numpy(position),
            word_of=torch.from_numpy(word_of.astype(np.int64)),
            first=torch.from_numpy(opens.astype(np.int64)),
            tag=torch.from_numpy(tag),
            pieces=torch.from_numpy(np.asarray(pieces, dtype=np.int64)),
        )

    def cuts(self, *, max_tokens: int = MAX_TOKENS) -> list[Int[np.ndarray, " piece"]]:
        """The pieces of each batch: every piece once, longest first, at most so many tokens (padding counted) a batch.

        Longest first: the batch that needs the most memory comes first, so it fails early or not at all.
        """
        lengths = self.lengths
        order = np.argsort(-lengths, kind="stable")
        groups, i = [], 0
        while i < len(order):
            size = max(1, max_tokens // int(lengths[order[i]]))
            groups.append(order[i : i + size])
            i += size
        return groups

    def batches(self, *, max_tokens: int = MAX_TOKENS, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """The batches of `cuts`, on a device."""
        return (self.batch(pieces).to(device) for pieces in self.cuts(max_tokens=max_tokens))

    def shuffled(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The pieces of one epoch's training batches, shuffled and bucketed by length.

        Pools of 50 batches are drawn at random, sorted by length and cut; then the batches are shuffled. The order
        depends on nothing but `seed` and `epoch`.
        """
        rng = np.random.default_rng([seed, epoch])
        order, lengths = rng.permutation(self.n_pieces), self.lengths
        pool = 50 * batch_size
        batches = []
        for i in range(0, len(order), pool):
            part = order[i : i + pool]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches += [part[k : k + batch_size] for k in range(0, len(part), batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __repr__(self) -> str:
        return f"Encoded({self.corpus.name}: {self.n_pieces:,} pieces, {self.n_tokens:,} tokens)"


@explained
def encode(
    corpus: Corpus,
    tokenizer: Any,
    *,
    context: int | None = None,
    long: LongSentences = "split",
    reading: Reading = "word",
    opening: bool = False,
) -> Encoded:
    """The corpus in a tokenizer's sub-words: each word's are those that it has in running text after a blank, or
    without one where `corpus.spaced` is false. Special tokens are those that the tokenizer puts at the ends of a text.

    `context` is the largest number of tokens a piece may have, special tokens included. A longer sentence is cut
    between words (`long="split"`), loses its end (`"truncate"`) or is refused (`"error"`). A single word that alone
    is longer loses its last sub-words. What happened is counted in the result.

    With `opening` every piece begins with a special token (the tokenizer's first, else its end-of-text token), so that
    a causal model predicts the first word too. `reading="before"` leaves out each piece's first word: nothing of the
    text is before it.

    Raises:
        ValueError: the tokenizer takes no text, has no padding token, or drops a word without having an unknown token;
            it cuts most words otherwise in running text; a sentence is too long and `long="error"`; or there is no
            special token to open with.
    """
    corpus = one_of(corpus)
    if hasattr(tokenizer, "tokenizer") or not hasattr(tokenizer, "pad_token_id"):
        has = ", which has one: give its" if hasattr(tokenizer, "tokenizer") else "; give a model's"
        raise ValueError(f"a tokenizer is wanted, got a {type(tokenizer).__name__}{has} .tokenizer")
    known_name("reading", reading, get_args(Reading))
    known_name("long", long, get_args(LongSentences))
    if not corpus.n_words:
        raise ValueError(f"corpus {corpus.name!r} has no sentences")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no padding token; set one, for instance "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    # A word type has two entries at most: after a blank (even), and without one (odd).
    used, inverse = np.unique(2 * corpus.word.astype(np.int64) + ~corpus.after_blank, return_inverse=True)
    words = [corpus.vocab[i // 2] for i in used]
    pieces = word_pieces(tokenizer, words, spaced=(used % 2 == 0).tolist())
    empty = [i for i, ids in enumerate(pieces) if not ids]
    if empty and tokenizer.unk_token_id is None:
        some = [words[i] for i in empty[:5]]
        raise ValueError(f"the tokenizer drops {len(empty)} word type(s) of {corpus.name!r}, for instance {some}")
    remarks = _against_running_text(corpus, tokenizer, [pieces[i] for i in inverse])
    for i in empty:
        pieces[i] = [tokenizer.unk_token_id]
    prefix, suffix = _special_tokens(tokenizer, words)
    if opening and not prefix:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no token to open a sentence with (no bos_token, no "
                "eos_token), so its first word cannot be predicted; set tokenizer.bos_token"
            )
        prefix = (int(first),)
    size = np.array([len(ids) for ids in pieces], dtype=np.int64)
    flat, first = np.concatenate(pieces).astype(np.int32), np.cumsum(size) - size

    n_sub = size[inverse]
    ids = flat[np.repeat(first[inverse] - (np.cumsum(n_sub) - n_sub), n_sub) + np.arange(n_sub.sum())]
    word_of = np.repeat(np.arange(corpus.n_words, dtype=np.int32), n_sub)
    piece_start = np.concatenate([[0], np.cumsum(n_sub)])[corpus.start]
    whole = Encoded(
        corpus, ids, word_of, piece_start, prefix, suffix, int(tokenizer.pad_token_id),
        n_unreadable=int(np.isin(inverse, empty).sum()), reading=reading, remarks=remarks,
    )  # fmt: skip
    room = None if context is None else context - len(prefix) - len(suffix)
    if room is None or int(np.diff(piece_start).max()) <= room:
        return whole
    if room < 1:
        raise ValueError(f"a context of {context} tokens leaves no room beside the special tokens")
    return _fit(whole, n_sub, room, long)


def _fit(whole: Encoded, n_sub: np.ndarray, room: int, long: LongSentences) -> Encoded:
    """Cut the pieces that are longer than `room` tokens."""
    corpus = whole.corpus
    too_long = np.flatnonzero(np.diff(whole.piece_start) > room)
    if long == "error":
        i = int(too_long[0])
        raise ValueError(
            f"{len(too_long)} sentence(s) of {corpus.name!r} are longer than the model's context; the first is "
            f"sentence {i} with {whole.lengths[i]} tokens (context {room + len(whole.prefix) + len(whole.suffix)}). "
            "Choose long='split' or long='truncate'"
        )
    keep = np.ones(len(whole.ids), dtype=bool)
    cuts: set[int] = set()
    n_split = n_truncated = 0
    word_start = np.concatenate([[0], np.cumsum(n_sub)])
    for i in too_long:
        here, n_cuts, lost = int(whole.piece_start[i]), 0, False
        for w in range(corpus.start[i], corpus.start[i + 1]):
            begin, end = int(word_start[w]), int(word_start[w + 1])
            if end - begin > room:  # one word alone does not fit: its last sub-words go
                keep[begin + room : end] = False
                end, lost = begin + room, True
            if end - here > room:
                if long == "truncate":
                    keep[begin : whole.piece_start[i + 1]] = False
                    lost = True
                    break
                cuts.add(begin)
                here, n_cuts = begin, n_cuts + 1
        n_split, n_truncated = n_split + (n_cuts > 0), n_truncated + lost
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    word_of = whole.word_of[keep]
    return replace(
        whole,
        ids=whole.ids[keep],
        word_of=word_of,
        piece_start=kept_before[np.array(sorted(cuts | set(whole.piece_start.tolist())))],
        n_split=n_split,
        n_truncated=n_truncated,
        n_words_lost=corpus.n_words - len(np.unique(word_of)),
    )


def word_pieces(tokenizer: Any, words: Sequence[str], *, spaced: Sequence[bool] | None = None) -> list[list[int]]:
    """Sub-word ids that words have in running text, without special tokens: after a blank, or glued to what is before
    them where `spaced` is false. A word that the tokenizer drops has none.

    Each is read behind something short that it cannot merge with, so it does not matter whether a tokenizer puts a
    blank before a text.

    Raises:
        ValueError: the tokenizer takes no text.
    """
    after = [True] * len(words) if spaced is None else spaced
    pieces: list[list[int] | None] = [None] * len(words)
    for anchors in zip(*_ANCHORS.values(), strict=True):
        by_kind = dict(zip(_ANCHORS, anchors, strict=True))
        left = [i for i, ids in enumerate(pieces) if ids is None]
        before = [by_kind["blank" if after[i] else "letter" if words[i][0].isalnum() else "mark"] for i in left]
        heads = {
            text: ids for text, ids in zip(anchors, _ids(tokenizer, [a.rstrip(" ") for a in anchors]), strict=True)
        }
        whole = _ids(tokenizer, [text + words[i] for text, i in zip(before, left, strict=True)])
        for i, text, ids in zip(left, before, whole, strict=True):
            if ids[: len(heads[text])] == heads[text]:
                pieces[i] = ids[len(heads[text]) :]
    left = [i for i, ids in enumerate(pieces) if not ids]  # merged with all, or are known only by themselves
    for i, ids in zip(left, _ids(tokenizer, [words[i] for i in left]), strict=True):
        pieces[i] = ids if tokenizer.unk_token_id not in ids else pieces[i]
    return [ids or [] for ids in pieces]


_ANCHORS = {"blank": ("a ", ". ", "1 "), "letter": ("(", "\n", "1"), "mark": ("a", "\n", "1")}
"""What a word is read behind, by what it follows and begins with, in the order in which they are tried."""


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of some texts, without special tokens."""
    if not texts:
        return []
    try:
        return tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
    except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} takes no text ({error}); load the model's own with "
            "AutoTokenizer.from_pretrained"
        ) from error


def _against_running_text(corpus: Corpus, tokenizer: Any, pieces: Sequence[list[int]]) -> tuple[str, ...]:
    """What differs between the words' pieces and those of some sentences as they stand in the text.

    Words that a tokenizer drops are left out. Raises where most words between two blanks, which nothing can merge with,
    differ.
    """
    sample = np.unique(np.linspace(0, corpus.n_sentences - 1, COMPARED).astype(np.int64))
    ends = np.minimum(corpus.start[1:], corpus.start[:-1] + _COMPARED_WORDS)
    spans = [range(int(corpus.start[i]), int(ends[i])) for i in sample]
    after = corpus.after_blank
    texts = ["a" + "".join(" " * bool(after[w]) + corpus.vocab[corpus.word[w]] for w in span) for span in spans]
    (head,) = _ids(tokenizer, ["a"])
    compared, differ, alone = [], [], set()
    for span, whole in zip(spans, _ids(tokenizer, texts), strict=True):
        mine = head + [token for w in span for token in pieces[w]]
        same = np.ones(len(mine), dtype=bool)
        if mine != whole:
            if len(mine) > _COMPARED_TOKENS:
                continue
            same[:] = False
            for block in SequenceMatcher(None, mine, whole, autojunk=False).get_matching_blocks():
                same[block.a : block.a + block.size] = True
        at = len(head)
        for w in span:
            if pieces[w]:
                compared.append(w)
                if after[w] and (w == span[-1] or after[w + 1]):
                    alone.add(w)
                differ += [] if same[at : at + len(pieces[w])].all() else [w]
                at += len(pieces[w])
    remarks = []
    if differ:
        first = corpus.vocab[corpus.word[differ[0]]]
        if 2 * len(alone.intersection(differ)) > len(alone) > 0:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} cuts {len(differ)} of {len(compared)} words of "
                f"{corpus.name!r} otherwise in running text than by themselves ({first!r} is the first), so a word has "
                "no sub-words of its own; use the tokenizer that the model was trained with, saved whole with "
                "tokenizer.save_pretrained(folder)"
            )
        remarks.append(
            f"{corpus.name}: {len(differ)} of {len(compared)} words that were compared have other sub-words in running "
            f"text, where they merge with a neighbour (the first is {first!r})"
        )
    if corpus.spaced is None and compared:
        glued = word_pieces(tokenizer, [corpus.vocab[corpus.word[w]] for w in compared], spaced=[False] * len(compared))
        if 2 * sum(ids != pieces[w] for ids, w in zip(glued, compared, strict=True)) > len(compared):
            remarks.append(
                f"{corpus.title}: the text does not say where no blank stands between two words; each is read after a "
                "blank, punctuation too"
            )
    return tuple(remarks)


def _special_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text, seen around a word that it knows."""
    for word in words:
        (bare,) = _ids(tokenizer, [word])
        if bare:
            full = tokenizer([word], truncation=False, padding=False)["input_ids"][0]
            for i in range(len(full) - len(bare) + 1):
                if full[i : i + len(bare)] == bare:
                    return tuple(full[:i]), tuple(full[i + len(bare) :])
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} changes words when it adds special tokens")
    raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} drops every word of this text")
