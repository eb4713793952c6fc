"""Labelled text from files, data sets and pinned sources.

Every reader ends in `build_corpus`: a word, the type of its label, and whether it opens a span.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relearn_lens.files import path_of
from relearn_lens.names import explained, meant
from relearn_lens.text.bsb import read_bsb_names
from relearn_lens.text.conll import read_conll
from relearn_lens.text.corpus import OUTSIDE, Corpus, Splits
from relearn_lens.text.hf import from_hf, load_hf

Parts = tuple[float, float, float]
PARTS = (0.6, 0.2, 0.2)
"""Shares of train, validation and probe where a text is not already split."""

CORPORA = ("bsb-names", "conll:PATH", "hf:NAME[:CONFIG]")
"""What `read_splits_named` takes; PATH and NAME may be a folder."""

_READABLE = "bi[eo]*s?|bmes|conll[0-9ux]*|iob[12es]*|ner|tsv|txt"
_NOT_TEXT = r"\.(json[a-z]*|csv|md|py|sh|pdf|zip|gz|tgz|bz2|xz|xml|html?|ya?ml|pkl|parquet|arrow|log|ann)"
_ROLES = {"train": "train", "validation": "dev|valid|testa", "probe": "test(?!a)"}
"""How the name of a part begins (`train.txt`, `eng.testb`, `en_ewt-ud-dev.conllu`) or, failing that, ends a piece of a
file's name (`wnut17train.conll`)."""


def _part_files(folder: Path) -> list[Path]:
    """The files for train, validation and probe, in this order; or the only labelled text in the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not re.match(r"(?i)readme|lic|\.", p.name))
    texts = [p for p in files if not re.fullmatch(f"(?i){_NOT_TEXT}", p.suffix)]
    # A release of Universal Dependencies has the plain text beside each file.
    texts = [p for p in texts if p.suffix != ".txt" or p.with_suffix(".conllu") not in texts]
    by_role = {role: _of_role(texts, like) for role, like in _ROLES.items()}
    labelled = {p for p in texts if re.fullmatch(rf"(?i)\.({_READABLE})", p.suffix)}.union(*by_role.values())
    if len(labelled) == 1:
        return list(labelled)
    if wrong := {role: [p.name for p in paths] for role, paths in by_role.items() if len(paths) != 1}:
        largest = max(
            by_role["train"] or labelled or texts or [folder / "FILE"], key=lambda p: p.exists() and p.stat().st_size
        )
        raise ValueError(
            f"{folder} must have one file each for train (train*), validation (dev*, valid*, testa*), probe "
            f"(test*, testb*); it has {wrong} among {[p.name for p in files]}. Add or remove a file, or give one file, "
            f"which is then split into all three by data.parts: conll:{largest}"
        )
    return [paths[0] for paths in by_role.values()]


def _of_role(files: Sequence[Path], like: str) -> list[Path]:
    """The files that are named as one part; a file that is named as two (`train_dev.tsv`) is none."""
    for pattern in (rf"(?i)(.*[._-])?({like}).*", rf"(?i).*({like})([._-].*)?"):
        named = [p for p in files if re.fullmatch(pattern, p.name) and not re.search(r"(?i)train[._-]?dev", p.name)]
        if named:
            return named
    return []


@explained
def read_splits(path: str | Path, *, seed: int, parts: Parts = PARTS, **reading: Any) -> Splits:
    """Train, validation and probe from one file, or from a folder with train, dev and test files.

    One file (or the only one in a folder) is split by `seed` and `parts`, between its documents, or between sentences
    where it has fewer than three documents, which a note says; three files are taken as they are.
    `reading` goes to `read_conll`. All three parts have the same labels.

    Raises:
        FileNotFoundError: as `read_conll`.
        ValueError: as `read_conll` and `Corpus.split`; or the folder lacks a file, or has two for one part.
    """
    path = path_of(path, "the path of one file or folder").expanduser()
    files = _part_files(path) if path.is_dir() else [path]
    if len(files) == 1:
        return _by_sentences(read_conll(files[0], **reading)).split(seed=seed, parts=parts)
    return _same_labels([read_conll(file, **reading) for file in files], path.name)


def _by_sentences(corpus: Corpus) -> Corpus:
    """The corpus with each sentence as its own group where it has too few documents to split between."""
    n = len(np.unique(corpus.group))
    if n >= len(Splits._fields) or len(corpus) < len(Splits._fields):
        return corpus
    note = (
        f"{corpus.name}: {n} document(s), too few to split between, so each sentence is a group of its own and one "
        "document's sentences may be in train and in probe"
    )
    return replace(corpus, group=np.arange(len(corpus)), notes=(*corpus.notes, note))


def _same_labels(corpora: Sequence[Corpus], name: str) -> Splits:
    """The corpora with one list of labels between them, named as parts of one."""
    names = (OUTSIDE, *sorted({k for corpus in corpora for k in corpus.label_names} - {OUTSIDE}))
    parts = []
    for corpus, part in zip(corpora, Splits._fields, strict=True):
        new = np.array([names.index(k) for k in corpus.label_names], dtype=corpus.label.dtype)
        parts.append(replace(corpus, label=new[corpus.label], label_names=names, name=f"{name}/{part}"))
    return Splits(*parts)


@explained
def read_hf(name: str, *, seed: int, parts: Parts = PARTS, config: str | None = None) -> Splits:
    """Train, validation and probe from a Hugging Face data set, by its name on the hub or a local folder.

    The folder may come from `save_to_disk`, or hold data files (Parquet, JSON). Words stand in a column of
    lists of strings called `tokens` or `words`, labels in `ner_tags`, `tags` or `labels`, as class labels or
    strings; every row is a group. The set's own train, validation and test parts are used if it has all
    three; else its train part (or its only one) is split by `seed` and `parts`. No code of a data set is run.

    Raises:
        ConnectionError: the hub cannot be reached, and the data set is not in its cache.
        ValueError: there is no such data set or configuration, or it lacks such columns, parts or labels.
    """
    loaded = load_hf(name, config)
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}  # a DatasetDict is a dict
    three = ("train", next((k for k in ("dev", "valid", "val") if k in tables), "validation"), "test")
    if all(part in tables for part in three):
        return _same_labels([from_hf(tables[part], f"{name}/{part}") for part in three], name)
    if "train" not in tables and len(tables) > 1:
        raise ValueError(f"data set {name!r} has the parts {list(tables)}; needed are {three}, or 'train'")
    whole = from_hf(tables.get("train", next(iter(tables.values()))), name)
    if unused := [part for part in tables if part != "train" and len(tables) > 1]:
        lacks = " and ".join(part for part in three if part not in tables)
        note = f"data set {name!r} has no {lacks} part: its train part alone is split, {', '.join(unused)} is not used"
        whole = replace(whole, notes=(*whole.notes, note))
    return whole.split(seed=seed, parts=parts)


def read_splits_named(spec: str, *, seed: int, parts: Parts = PARTS, **reading: Any) -> Splits:
    """Train, validation and probe of the corpus that `--corpus` names, in a form of `CORPORA`.

    `reading` (scheme, column, word_column, encoding) is for `conll:`.

    Raises:
        ValueError: there is no such form; and whatever the reader raises.
    """
    form, _, rest = spec.partition(":")
    if spec == "bsb-names":
        return read_bsb_names().split(seed=seed, parts=parts)
    if form == "conll" and rest:
        return read_splits(rest, seed=seed, parts=parts, **reading)
    if form == "hf" and rest:
        name, _, config = (rest, "", "") if Path(rest).expanduser().exists() else rest.partition(":")
        return read_hf(name, seed=seed, parts=parts, config=config or None)
    hint = f"; did you mean 'conll:{spec}'?" if spec and Path(spec).expanduser().exists() else meant(spec, CORPORA)
    raise ValueError(f"no corpus is called {spec!r}; the forms are {list(CORPORA)}{hint}")
