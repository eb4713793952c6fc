"""Word vectors: any function from words to vectors, the model's own input embeddings, or a file read by gensim."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.files import path_of
from relearn_lens.models.model import Model, bridge_of
from relearn_lens.text.encoding import word_pieces

WordVectors = Callable[[Sequence[str]], Float[Tensor, "word d"]]
"""One vector for each word, in order; a row of NaN for a word that is not known. A NumPy array will do."""

_FASTTEXT = (793712314).to_bytes(4, "little")
"""How a file in fastText's own binary format begins."""
_PICKLES = {".kv", ".model", ".pkl", ".pickle", ".pt", ".pth"}


def look_up(vectors: WordVectors, words: Sequence[str]) -> Float[Tensor, "word d"]:
    """The vectors of some words, float32 on the CPU.

    Raises:
        ValueError: the function does not give one vector for each word.
    """
    if not words:
        return torch.zeros(0, 1)
    rows = torch.as_tensor(vectors(list(words))).detach()
    if rows.ndim != 2 or len(rows) != len(words):
        raise ValueError(
            f"word vectors must be one row for each of the {len(words)} words asked for, got shape "
            f"{tuple(rows.shape)}; give a row of NaN for a word that is not known"
        )
    return rows.to("cpu", torch.float32)


def input_embeddings(model: Model | TransformerBridge) -> WordVectors:
    """Word vectors from the model's input embedding as it is now: the mean over the sub-words of each word.

    The embedding is copied, so training the model later does not move them. Sub-words are those that `encode` makes
    after a blank.
    Unknown sub-words are left out, and a word that has no others is not known.
    """
    bridge = bridge_of(model)
    inner: Any = bridge.original_model
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else inner.tok_embed
    table = embedding.weight.detach().to("cpu", torch.float32, copy=True)
    tokenizer: Any = bridge.tokenizer

    def vectors(words: Sequence[str]) -> Float[Tensor, "word d"]:
        rows = torch.full((len(words), table.shape[1]), torch.nan)
        for i, ids in enumerate(word_pieces(tokenizer, words)):
            if known := [token for token in ids if token != tokenizer.unk_token_id]:
                rows[i] = table[known].mean(0)
        return rows

    return vectors


def vectors_from_file(path: str | Path, *, lower: bool | Literal["auto"] = "auto") -> WordVectors:
    """Word vectors from a file: word2vec, fastText or GloVe text (`.vec`, `.txt`), word2vec or fastText binary
    (`.bin`), each also as `.gz`. `lower` as in `keyed_vectors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle (gensim's own `.kv` and `.model`), which is never loaded, or not a file of word vectors.
        ImportError: gensim is not installed.
    """
    path = path_of(path, "the path of one file")
    if not path.is_file():
        raise FileNotFoundError(f"no file of word vectors at {str(path)!r}")
    packed = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if packed else path.suffix
    with gzip.open(path) if packed else path.open("rb") as file:
        line = file.readline(1000)
    if suffix in _PICKLES or line.startswith(b"\x80"):
        raise ValueError(
            f"{str(path)!r} is a pickle, which can run code when loaded; where you trust it, load it with gensim, save "
            "it with save_word2vec_format('vectors.vec') and pass that file"
        )
    try:
        from gensim.models import KeyedVectors  # pyright: ignore[reportMissingImports]
        from gensim.models.fasttext import load_facebook_vectors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading word vectors from a file needs gensim: pip install gensim") from error
    try:
        if line.startswith(_FASTTEXT):
            keyed = load_facebook_vectors(str(path))
        else:
            # GloVe's text has no first line with the number of words and dimensions.
            bare = len(line.split()) != 2
            keyed = KeyedVectors.load_word2vec_format(str(path), binary=suffix == ".bin", no_header=bare)
    except (ValueError, EOFError, IndexError, AssertionError) as error:
        raise ValueError(
            f"{str(path)!r} is no file of word vectors that gensim can read ({error}); known: word2vec, fastText and "
            "GloVe text (.vec, .txt), word2vec and fastText binary (.bin)"
        ) from error
    return keyed_vectors(keyed, lower=lower)


def keyed_vectors(keyed: Any, *, lower: bool | Literal["auto"] = "auto") -> WordVectors:
    """Word vectors from gensim's `KeyedVectors` in memory.

    `lower`: look every word up in lower case; `"auto"` does so where fewer than 1 % of the entries have a capital.
    A fastText model with sub-words makes vectors for words that it has not seen.

    Raises:
        ValueError: `lower` is not known.
    """
    if lower not in (True, False, "auto"):
        raise ValueError(f"unknown lower {lower!r}; known: True, False, auto")
    keys = keyed.index_to_key
    if lower == "auto":
        lower = sum(key != key.lower() for key in keys) < 0.01 * len(keys)

    def vectors(words: Sequence[str]) -> Float[Tensor, "word d"]:
        rows = np.full((len(words), keyed.vector_size), np.nan, dtype=np.float32)
        for i, word in enumerate(words):
            try:
                rows[i] = keyed[word.lower() if lower else word]
            except KeyError:
                continue
        rows[~rows.any(1)] = np.nan  # a zero vector has no direction
        return torch.from_numpy(rows)

    return vectors
