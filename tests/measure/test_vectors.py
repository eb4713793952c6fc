"""Word vectors from a model equal a manual average; from files they equal what was written there."""

import gzip
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.measure.vectors import input_embeddings, keyed_vectors, look_up, vectors_from_file
from relearn_lens.models.toy import PLACES
from tests.fixtures import Untouched, unchecked

ROWS = {"rome": [1.0, 0.0, 2.0], "paris": [0.5, -1.0, 0.25], "old": [0.0, 3.0, 0.0]}


# --- the model's own


def test_input_embeddings_average_the_sub_words(bert_model, plain, untouched: Untouched):
    table, vocab = plain.embeddings.word_embeddings.weight.detach(), bert_model.tokenizer.get_vocab()
    words = ["Rome", "Constantinople", "paris", "zebra", "in-York"]
    with untouched(bert_model):
        found = input_embeddings(bert_model)(words)
    pieces = [["rome"], ["con", "##stan", "##ti", "##no", "##ple"], ["par", "##is"]]
    for row, mine in zip(found, pieces, strict=False):
        torch.testing.assert_close(row, torch.stack([table[vocab[piece]] for piece in mine]).mean(0))
    assert found[3].isnan().all()
    # "-" is unknown and left out
    torch.testing.assert_close(found[4], (table[vocab["in"]] + table[vocab["york"]]) / 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(input_embeddings(bert_model.bridge)(["rome"])[0], table[vocab["rome"]])
    assert input_embeddings(bert_model)([]).shape == (0, table.shape[1])


def test_input_embeddings_do_not_move_with_the_model(bert):
    vectors = input_embeddings(bert)
    before = vectors(["rome"])
    with torch.no_grad():
        bert.bridge.original_model.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(vectors(["rome"]), before)
    torch.testing.assert_close(input_embeddings(bert)(["rome"]), before + 1)


def test_input_embeddings_of_a_native_bridge(toy_model):
    found = input_embeddings(toy_model.tagger)(PLACES)
    table, vocab = toy_model.tagger.bridge.original_model.tok_embed.weight, toy_model.tagger.tokenizer.get_vocab()
    torch.testing.assert_close(found[0], table[vocab["Tarn"]])
    torch.testing.assert_close(found[2], (table[vocab["Osm"]] + table[vocab["##ere"]]) / 2)


# --- any function


def test_look_up_takes_arrays_and_refuses_other_shapes():
    found = look_up(lambda words: np.array([[1.0, 2.0]] * len(words)), ("a", "b"))  # pyright: ignore[reportArgumentType]
    assert (found.tolist(), found.dtype) == ([[1.0, 2.0], [1.0, 2.0]], torch.float32)
    said = r"one row for each of the 2 words asked for, got shape \(3, 4\); give a row of NaN"
    with pytest.raises(ValueError, match=said):
        look_up(lambda words: torch.zeros(3, 4), ("a", "b"))
    assert look_up(lambda words: torch.zeros(3, 4), ()).shape == (0, 1)


# --- files


class Keyed:
    """The part of gensim's KeyedVectors that is read."""

    def __init__(self, rows: dict[str, list[float]]):
        self.index_to_key, self.vector_size = list(rows), 3
        self.rows = rows

    def __getitem__(self, word: str) -> list[float]:
        return self.rows[word]


def test_keyed_vectors_are_looked_up_in_lower_case_where_hardly_any_entry_has_a_capital():
    low = {f"word{i}": [1.0, 1.0, 1.0] for i in range(200)} | ROWS
    found = keyed_vectors(Keyed(low | {"USA": [1.0, 0.0, 0.0]}))(["Rome", "nowhere", "USA"])
    assert found[0].tolist() == ROWS["rome"]
    assert found[1:].isnan().all()  # "usa" is no entry
    cased = Keyed(ROWS | {"Rome": [9.0, 9.0, 9.0]})
    assert keyed_vectors(cased)(["Rome", "Old"])[0].tolist() == [9.0, 9.0, 9.0]
    assert keyed_vectors(cased)(["Rome", "Old"])[1].isnan().all()
    assert keyed_vectors(cased, lower=True)(["Rome"])[0].tolist() == ROWS["rome"]
    assert keyed_vectors(Keyed(low), lower=False)(["Rome"]).isnan().all()
    with pytest.raises(ValueError, match="unknown lower 'yes'; known: True, False, auto"):
        unchecked(keyed_vectors)(cased, lower="yes")


def test_keyed_vectors_give_a_zero_vector_no_direction():
    assert keyed_vectors(Keyed({"rome": [0.0, 0.0, 0.0]}))(["rome"]).isnan().all()


def write_text(path: Path, *, head: bool = True) -> Path:
    lines = [f"{len(ROWS)} 3"] * head + [f"{word} {' '.join(map(str, row))}" for word, row in ROWS.items()]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_binary(path: Path) -> Path:
    rows = [word.encode() + b" " + np.array(row, dtype="<f4").tobytes() + b"\n" for word, row in ROWS.items()]
    path.write_bytes(b"%d 3\n" % len(ROWS) + b"".join(rows))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.vec", write_text),
        ("a.txt", write_text),
        ("a.vec.gz", write_text),
        ("glove.txt", lambda path: write_text(path, head=False)),
        ("a.bin", write_binary),
    ],
)
def test_vectors_from_file_are_those_in_the_file(tmp_path, name, write):
    pytest.importorskip("gensim")
    found = vectors_from_file(write(tmp_path / name))(["Rome", "old", "nowhere"])
    assert found[:2].tolist() == [ROWS["rome"], ROWS["old"]]
    assert found[2].isnan().all()
    assert vectors_from_file(str(write(tmp_path / name)), lower=False)(["Rome"]).isnan().all()


def test_vectors_from_fasttexts_own_format_know_words_they_have_not_seen(tmp_path):
    fasttext: Any = pytest.importorskip("gensim.models.fasttext")
    text = [["rome", "and", "paris"], ["old", "rome"]] * 5
    model = fasttext.FastText(text, vector_size=8, min_count=1, epochs=1, bucket=100, workers=1, seed=0)
    fasttext.save_facebook_model(model, str(tmp_path / "small.bin"))
    found = vectors_from_file(tmp_path / "small.bin")(["Rome", "romes"])
    np.testing.assert_allclose(found[0], model.wv["rome"], atol=1e-6)
    np.testing.assert_allclose(found[1], model.wv["romes"], atol=1e-6)


def test_vectors_from_file_refuse_what_is_damaged(tmp_path):
    pytest.importorskip("gensim")
    for name, content in (
        ("a.vec", b"3 3\nrome 1 0\n"),
        ("a.bin", b"9 3\nrome \x00"),
        ("a.txt", b"hello world again\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' is no file of word vectors that gensim can read"):
            vectors_from_file(tmp_path / name)


def test_vectors_from_file_never_load_a_pickle(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    (tmp_path / "a.kv").write_bytes(b"anything")
    (tmp_path / "a.vec").write_bytes(pickle.dumps(ROWS))
    for name in ("a.kv", "a.vec"):
        with pytest.raises(
            ValueError, match=rf"{name}' is a pickle, .* save it with save_word2vec_format\('vectors.vec'\)"
        ):
            vectors_from_file(tmp_path / name)


def test_vectors_from_file_say_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file of word vectors at .*nowhere\.vec"):
        vectors_from_file(tmp_path / "nowhere.vec")
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    with pytest.raises(ImportError, match="reading word vectors from a file needs gensim: pip install gensim"):
        vectors_from_file(write_text(tmp_path / "a.vec"))
