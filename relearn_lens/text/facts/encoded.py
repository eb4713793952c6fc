"""Passages in a causal model's tokens, of which the answers' alone are in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from relearn_lens.text.corpus import build_corpus
from relearn_lens.text.encoding import Batch, Encoded
from relearn_lens.text.facts.passages import TRAINED, Facts, Passage


@dataclass(frozen=True, eq=False, repr=False)
class EncodedPassages(Encoded):
    """Passages as a text to train on and to score: each is a sentence of one word, its answer, labelled by relation.

    `word_of` is so the passage's index, also in its batches, whose sub-words are the answers' tokens alone. A passage
    is one piece; only a text without a prompt that is longer than the context is several.
    """

    scored: Bool[np.ndarray, " token"] = field(kw_only=True)
    """The tokens of answers."""
    passages: tuple[Passage, ...] = field(kw_only=True)

    @cached_property
    def _n_scored(self) -> Int[np.ndarray, " piece"]:
        return np.diff(np.concatenate([[0], np.cumsum(self.scored)])[self.piece_start])

    def n_subwords(self, pieces: Int[np.ndarray, " piece"]) -> int:
        """Tokens of the answers of some pieces."""
        return int(self._n_scored[pieces].sum())

    def batch(self, pieces: np.ndarray) -> Batch:
        """The given pieces, padded to the longest of them; sub-words and what is read are the answers' tokens."""
        whole = super().batch(pieces)
        tokens = np.concatenate([np.arange(*self.piece_start[i : i + 2].tolist()) for i in pieces])
        keep = torch.from_numpy(self.scored[tokens])
        subword, word_of, tag = whole.subword[keep], whole.word_of[keep], whole.tag[keep]
        first = torch.from_numpy(np.cumsum(self._n_scored[pieces]) - self._n_scored[pieces])
        words = word_of[first]
        label = torch.from_numpy(self.corpus.label[words.numpy()].astype(np.int64))
        return replace(
            whole, words=words, label=label, read=subword, offset=first, subword=subword, word_of=word_of, first=first,
            tag=tag,
        )  # fmt: skip


def encode_passages(
    passages: Sequence[Passage], tokenizer: Any, *, context: int | None = None, name: str = "passages"
) -> EncodedPassages:
    """Passages in a tokenizer's tokens; every one begins with a special token, as a language model's texts do.

    A token belongs to the answer if it reaches beyond the prompt, so the blank before an answer is the answer's.
    `context` is the largest number of tokens a piece may have; a text without a prompt that is longer is cut into
    several pieces.

    Raises:
        ValueError: no passage; a tokenizer without offsets, padding token or token to begin with; or a prompt with its
            answer is longer than the context.
    """
    if not passages:
        raise ValueError(f"{name!r} has no passages to encode; choose other roles or forms")
    where = f"the tokenizer of {tokenizer.name_or_path!r}"
    if not tokenizer.is_fast:
        raise ValueError(f"{where} cannot say which characters a token stands for; load a fast one (use_fast=True)")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{where} has no padding token; set one, for instance tokenizer.pad_token = tokenizer.eos_token"
        )
    texts = [p.text for p in passages]
    read = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False, padding=False)
    prefix = _opening(tokenizer, texts[0], read["input_ids"][0])
    room = None if context is None else context - len(prefix)
    ids: list[int] = []
    scored: list[bool] = []
    word_of: list[int] = []
    start = [0]
    n_split = 0
    for i, (passage, tokens, offsets) in enumerate(
        zip(passages, read["input_ids"], read["offset_mapping"], strict=True)
    ):
        answer = [end > len(passage.prompt) for _, end in offsets]
        if not any(answer):
            raise ValueError(f"{where} drops the answer {passage.answer!r} of {passage.prompt[:60]!r}; leave it out")
        if room is not None and len(tokens) > room:
            if passage.prompt:
                raise ValueError(
                    f"passage {i} of {name!r} about {passage.key!r} has {len(tokens) + len(prefix)} tokens, the "
                    f"model's context is {context}; shorten its prompt, or give it as text without a prompt"
                )
            start += range(start[-1] + room, start[-1] + len(tokens), room)
            n_split += 1
        ids += tokens
        scored += answer
        word_of += [i] * len(tokens)
        start.append(len(ids))
    keys = {key: i for i, key in enumerate(dict.fromkeys(p.key for p in passages))}
    corpus = build_corpus(
        ([(p.answer, p.relation, True)] for p in passages), name=name, groups=[keys[p.key] for p in passages]
    )
    return EncodedPassages(
        corpus=corpus, ids=np.array(ids, dtype=np.int32), word_of=np.array(word_of, dtype=np.int32),
        piece_start=np.array(start, dtype=np.int64), prefix=prefix, suffix=(), pad=int(tokenizer.pad_token_id),
        n_split=n_split, scored=np.array(scored, dtype=bool), passages=tuple(passages),
    )  # fmt: skip


def encode_facts(
    facts: Facts, *roles: str, tokenizer: Any, context: int | None = None, forms: Sequence[str] = TRAINED
) -> EncodedPassages:
    """The passages of some roles of facts (by default of all), in the forms that a model is trained in.

    Raises:
        ValueError: the roles have no passage in these forms; or as `Facts.passages` and `encode_passages`.
    """
    passages = facts.passages(*roles, forms=forms)
    if not passages:
        there = dict.fromkeys(p.form for p in facts.passages(*roles))
        raise ValueError(
            f"facts {facts.name!r} have nothing to train on in {' and '.join(roles) or 'any role'}: it takes passages "
            f"of the form {' or '.join(forms)}, and there are {', '.join(there) or 'none'}"
        )
    return encode_passages(passages, tokenizer, context=context, name=facts.name)


def _opening(tokenizer: Any, text: str, bare: list[int]) -> tuple[int, ...]:
    """What the tokenizer puts before a text, else its first token, else its end-of-text token."""
    full = tokenizer(text, truncation=False, padding=False)["input_ids"]
    own = next((full[:i] for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), [])
    if own:
        return tuple(own)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no token to begin a passage with (no bos_token, no "
            "eos_token), so its first word cannot be predicted; set tokenizer.bos_token"
        )
    return (int(first),)
