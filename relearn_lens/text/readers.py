"""Labelled text from files, data sets and pinned sources.

Every reader ends in `build_corpus`: a word, the type of its label, and whether it opens a span.
"""

from __future__ import annotations

import codecs
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relearn_lens import sources
from relearn_lens.text.corpus import OUTSIDE, Corpus, Splits, build_corpus

Parts = tuple[float, float, float]
PARTS = (0.6, 0.2, 0.2)
"""Shares of train, validation and probe where a text is not already split."""

SCHEMES = {"auto": "BIESLUM", "bio": "BI", "iob1": "BI", "io": "I", "bioes": "BIESLUM"}
"""How a file writes spans, and the prefixes that may occur. A name checks what `"auto"` reads leniently."""

CORPORA = ("bsb-names", "conll:PATH", "hf:NAME[:CONFIG]")
"""What `read_splits_named` takes; PATH and NAME may be a folder."""

_DATA = (".parquet", ".json", ".jsonl", ".arrow", ".csv", ".tsv")
"""What a local data set may consist of."""

_READABLE = "bi[eo]*s?|bmes|conll[0-9ux]*|iob[12es]*|ner|tsv|txt"
_NOT_TEXT = r"\.(json[a-z]*|csv|md|py|sh|pdf|zip|gz|tgz|bz2|xz|xml|html?|ya?ml|pkl|parquet|arrow|log|ann)"
_ROLES = {"train": "train", "validation": "dev|valid|testa", "probe": "test(?!a)"}
"""How the name of a part begins (`train.txt`, `eng.testb`, `en_ewt-ud-dev.conllu`) or, failing that, ends a piece of a
file's name (`wnut17train.conll`)."""


class _Row(NamedTuple):
    number: int  # line of the file or row of the data set: where an error points
    word: str
    tag: str


def _decode(sentences: list[list[_Row]], scheme: str, where: str) -> Iterator[list[tuple[str, str, bool]]]:
    """Words with the type of their label and whether they open a span.

    One reading serves every scheme, that of conlleval and of seqeval's default: a span opens at B, S or U,
    after E, L, S or U, and where the type differs from that of the word before. It is exact for a file that
    keeps to BIO, IOB1, IO or BIOES.
    """
    first = {row.tag: row.number for sentence in reversed(sentences) for row in reversed(sentence)}
    marks = _marks(first, scheme, where)
    for sentence in sentences:
        words, mark_before, kind_before = [], "", OUTSIDE
        for number, word, tag in sentence:
            mark, kind = marks[tag]
            same = kind == kind_before
            marked = mark in ("B", "S", "U")
            begins = kind != OUTSIDE and (marked or not same or mark_before in ("E", "L", "S", "U"))
            if (scheme in ("bio", "bioes") and begins > marked) or (scheme == "iob1" and marked > same):
                wrong = "touches no span of its type" if marked else "opens a span without B-"
                raise ValueError(f"{where} {number}: {tag!r} {wrong}, against {scheme!r}; try scheme='auto'")
            words.append((word, kind, begins))
            mark_before, kind_before = mark, kind
        yield words


def _marks(first: Mapping[str, int], scheme: str, where: str) -> dict[str, tuple[str, str]]:
    """Prefix (`""` for a plain label) and type of every tag; `first` says where each occurs first."""
    if scheme not in SCHEMES:
        raise ValueError(f"no tag scheme is called {scheme!r}; the schemes are {list(SCHEMES)}")
    tags = {tag: re.sub("^([A-Z]-[^,]*),[A-Z]-.*", r"\1", tag) for tag in first}
    if "B" in tags and set(tags) <= set("OBIESLUM"):
        raise ValueError(f"{where} {first['B']}: tag 'B' has no type; write B-TYPE and I-TYPE")
    # "E-mail" alone is a label: E, L and M never occur without B, I, S or U.
    plain = scheme in ("auto", "io") and not {tag[:2] for tag in tags.values()} & {"B-", "I-", "S-", "U-"}
    marks = {}
    for tag, one in tags.items():
        prefix, _, kind = one.partition("-")
        if one in (OUTSIDE, "_") or (plain and one):
            marks[tag] = ("", OUTSIDE if one == "_" else one)
        elif kind and prefix in tuple(SCHEMES[scheme]):
            marks[tag] = (prefix, kind)
        else:
            raise ValueError(
                f"{where} {first[tag]}: tag {tag!r} does not fit scheme {scheme!r}, which reads 'O' and the "
                f"prefixes {[f'{k}-' for k in SCHEMES[scheme]]}; the schemes are {list(SCHEMES)} ('io' also "
                "reads labels without any prefix). Correct the tag, or choose another scheme or column"
            )
    return marks


def _text(path: Path, encoding: str) -> str:
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; read_splits reads folders, read_conll reads one file")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a file with a word and its label on each line")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read ({error.strerror}); give a file that can be") from error
    try:
        codec = codecs.lookup(encoding).name
        text = content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except (LookupError, TypeError):
        raise ValueError(f"{path}: no encoding is called {encoding!r}; try 'utf-8' or 'latin-1'") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {error.start} (0x{error.object[error.start]:02x}) is not {encoding}; "
            "give the file's own encoding=, for instance 'latin-1'"
        ) from None
    except ValueError as error:  # not every codec says where
        raise ValueError(f"{path} is not {encoding} ({error}); give the file's own encoding=") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: a NUL character, so this is no {encoding} text; give a text file, or its "
            "own encoding=, for instance 'utf-16'"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Lines(NamedTuple):
    document: int  # its own in a file without documents
    text: str  # the sentence as it stands in the text, where a comment gives it
    lines: list[tuple[int, list[str]]]  # number and cells


def _sentences(path: Path, text: str, column: int) -> Iterator[_Lines]:
    """Sentences of one file in cells, without comments."""
    lines = [line.rstrip(" \t") for line in text.split("\n")]  # not splitlines(): a word may hold U+0085
    documents = any(line.startswith("-DOCSTART-") for line in lines)
    words = [line for line in lines if line and not line.startswith("-DOCSTART-")]
    # The first word settles the columns; it begins with # only if every line does.
    model = next((x for x in words if x[0] != "#"), next((x for x in words if x[:2] != "# "), ""))
    if not model:
        raise ValueError(f"{path} has no words; give a file with a word and its label on each line")
    tabs = "\t" in model
    cells = lambda x: [c.strip(" ") for c in x.split("\t")] if tabs else [c for c in re.split("[ \t]", x) if c]  # noqa: E731
    width, at = len(cells(model)), lines.index(model) + 1
    if width == 1:
        raise ValueError(
            f"{path}, line {at}: {model[:60]!r} is a single column; a word and its label are needed, with "
            "a tab or blanks between them"
        )
    if column not in range(-width, width):
        raise ValueError(
            f"{path}, line {at}: there is no label column {column}; of {width} columns it may be 1 to "
            f"{width - 1}, or -1 for the last"
        )
    known = set()
    if any(line[:2] == "# " for line in words):
        known = {row[column] for row in map(cells, words) if row[0][:1] != "#" and len(row) == width}
    document, raw, sentence = 0, "", []
    for number, line in enumerate([*lines, ""], start=1):
        starts = line.startswith("-DOCSTART-")
        if starts or not line:
            if sentence:
                yield _Lines(document, raw, sentence)
                document, raw, sentence = document + (not documents), "", []
            document += starts
            continue
        row = cells(line)
        # "#tag<TAB>O" and CoNLL-2000's "# # B-NP" are words, "# text = ..." is a comment.
        if line[0] == "#" and (len(row) != width or (line[:2] == "# " and row[column] not in known)):
            raw = line.removeprefix("# text = ") if line.startswith("# text = ") else raw
            continue
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number}: {len(row)} column(s) where line {at} has {width}: {line[:60]!r}; "
                "give every word as many, separated alike, and end a sentence with a blank line"
            )
        sentence.append((number, row))


_NUMBER = re.compile(r"\d+([-.:]\d+)*")
_TAG = re.compile(r"[BIESLUM]-\S+|O")


def _counts_up(sentences: Sequence[_Lines], column: int) -> bool:
    """Whether a column holds numbers that count up in each sentence: 1, 2, 3-4, 3, 4, or 1-1, 1-2."""
    for _, _, lines in sentences:
        cells = [row[column] for _, row in lines]
        if not all(map(_NUMBER.fullmatch, cells)):
            return False
        keys = [tuple(map(int, re.findall(r"\d+", cell))) for cell in cells]
        firsts = [key[0] for key in keys]
        grows = firsts == sorted(firsts) and firsts[0] < firsts[-1]
        if len(keys) > 1 and not (grows or keys == sorted(set(keys))):
            return False
    return True


def _column_of_words(sentences: Sequence[_Lines], column: int) -> int:
    """The first column that neither counts up nor is the same all through each sentence, as a document's id is."""
    long = [sentence for sentence in sentences if len(sentence.lines) > 1]
    width = len(sentences[0].lines[0][1])
    there = 0
    while len(long) > 0 and sum(len(s.lines) for s in long) > 2 and there + 1 < width and there + 1 != column:
        same = all(len({row[there] for _, row in sentence.lines}) == 1 for sentence in long)
        if not same and not _counts_up(sentences, there):
            break
        there += 1
    return there


def _check_words(path: Path, words: Sequence[str], at: int) -> None:
    """Refuse a column that holds no words."""
    if len(words) < 3:
        return
    what = (
        "all the same" if len(set(words)) == 1 else
        "all numbers" if all(map(_NUMBER.fullmatch, words)) else
        "all tags" if all(map(_TAG.fullmatch, words)) else None
    )  # fmt: skip
    if what:
        raise ValueError(
            f"{path}: the words of column {at} are {what} ({', '.join(words[:3])}); give the column that holds the "
            "words as word_column= (data.word_column), counted from 0"
        )


def _glued(sentence: _Lines, kept: Sequence[tuple[int, list[str]]], at: int) -> list[bool]:
    """Of each word that is kept whether no blank stands before it, by `SpaceAfter=No` or the sentence's own text.

    A part of a CoNLL-U contraction is glued to the part before it where they are spelled like the whole (`do` `n't`).
    """
    glued, position = [], 0
    for _, row in kept if sentence.text else ():
        blank = sentence.text.startswith(" ", position)
        position += len(sentence.text[position:]) - len(sentence.text[position:].lstrip())
        if not sentence.text.startswith(row[at], position):
            break
        glued.append(bool(glued) and not blank)
        position += len(row[at])
    if len(glued) == len(kept):
        return glued
    glued, here = [], False
    whole, ends, inside = "", "", False
    for _, row in sentence.lines:
        skips = any("SpaceAfter=No" in cell.split("|") for cell in row)
        if at and re.fullmatch(r"\d+-\d+", row[0]):
            first, _, ends = row[0].partition("-")
            parts = [r[at] for _, r in kept if r[0].isdigit() and int(first) <= int(r[0]) <= int(ends)]
            inside, whole = "".join(parts) == row[at], "No" * skips
        elif not (at and re.fullmatch(r"\d+\.\d+", row[0])):
            glued.append(here and bool(glued))
            here = skips
            if ends:
                here = bool(whole) if row[0] == ends else inside
                ends = "" if row[0] == ends else ends
    return glued if len(glued) == len(kept) else [False] * len(kept)


def read_conll(
    path: str | Path,
    *,
    column: int = -1,
    scheme: str = "auto",
    encoding: str = "utf-8",
    word_column: int | None = None,
) -> Corpus:
    """The labelled sentences of one file in columns: CoNLL-2003 and its many relatives.

    The first column is the word, the last (or `column`) its tag; tabs separate them if the first word's line
    has one, else blanks. Columns before the words that count up (CoNLL-U, `.iob2`) or that are the same all through a
    sentence (a document's id) are passed over; `word_column` says where the words are, counted from 0. Of CoNLL-U the
    words are read, not the lines `3-4` and `8.1`; `SpaceAfter=No` or a comment `# text = ...` says where no blank
    stands between words. `_` for a label is `O`. A blank line ends a sentence. `-DOCSTART-` lines separate
    documents, the groups that a split keeps together; without them every sentence is a group. A line that begins
    with `# `, or with `#` and has another number of columns, is a comment; `#hashtag` with a tag is a word. Of several
    annotations in one cell (`B-person,B-location`) the first is taken.

    `scheme="auto"` reads BIO, IOB1 (CoNLL-2003), IO with or without `I-`, BIOES, BILOU, and mixtures of them
    as conlleval does; with a scheme's name a tag that breaks it is an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a folder, is no text in `encoding`, has no words, one column, or lines of
            different numbers of columns; it has no such column; its words come out as numbers, as tags or all the
            same; or a tag does not fit the scheme.
    """
    path = Path(path).expanduser()
    text = _text(path, encoding)
    read = list(_sentences(path, text, column))
    width = len(read[0].lines[0][1])
    column %= width
    at = _column_of_words(read, column) if word_column is None else word_column
    if at not in range(-width, width) or at % width == column:
        raise ValueError(
            f"{path}, line {read[0].lines[0][0]}: the label column {column} and the word column {at} must be two of "
            f"the {width} columns, counted from 0; give column= and word_column="
        )
    at %= width
    ids = [row[0] for _, _, lines in read for _, row in lines]
    numbered = at != 0 and all(re.fullmatch(r"\d+([-.]\d+)?", id) for id in ids) and any(map(str.isdigit, ids))
    if (
        numbered
        and width >= 10
        and (odd := next((r[column] for _, _, x in read for _, r in x if "=" in r[column]), ""))
    ):
        raise ValueError(
            f"{path}: column {column} of CoNLL-U holds attributes ({odd[:60]!r}), no classes; choose another column= "
            "(3 is the part of speech, 7 the dependency)"
        )
    # A line with the number 3-4 repeats words 3 and 4 in one; 8.1 is a word that the text lacks. Published files hold
    # words of no characters: nothing that a model could read.
    kept = [[(n, r) for n, r in x if r[at] and (not numbered or r[0].isdigit())] for _, _, x in read]
    _check_words(path, [row[at] for lines in kept for _, row in lines], at)
    rows = [[_Row(n, r[at], r[column]) for n, r in lines] for lines in kept]
    knows = "SpaceAfter=No" in text or any(sentence.text for sentence in read)
    glued = (
        [g for sentence, lines in zip(read, kept, strict=True) for g in _glued(sentence, lines, at)] if knows else []
    )
    corpus = build_corpus(
        _decode(rows, scheme, f"{path}, line"),
        name=path.stem,
        groups=[sentence.document for sentence in read],
        spaced=[not g for g in glued] if knows else None,
    )
    if corpus.label.all():
        note = (
            f"{path.name}: no word has the label {OUTSIDE!r} (column {column}: {', '.join(corpus.label_names[1:6])}), "
            "so every word counts as one of a class; choose another column= if that is not meant"
        )
        warnings.warn(note, stacklevel=2)
        return replace(corpus, notes=(note,))
    return corpus


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


def read_splits(path: str | Path, *, seed: int, parts: Parts = PARTS, **reading: Any) -> Splits:
    """Train, validation and probe from one file, or from a folder with train, dev and test files.

    One file (or the only one in a folder) is split by `seed` and `parts`, between its documents, or between sentences
    where it has fewer than three documents, which a note says; three files are taken as they are.
    `reading` goes to `read_conll`. All three parts have the same labels.

    Raises:
        FileNotFoundError: as `read_conll`.
        ValueError: as `read_conll` and `Corpus.split`; or the folder lacks a file, or has two for one part.
    """
    path = Path(path).expanduser()
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
        return _same_labels([_from_hf(tables[part], f"{name}/{part}") for part in three], name)
    if "train" not in tables and len(tables) > 1:
        raise ValueError(f"data set {name!r} has the parts {list(tables)}; needed are {three}, or 'train'")
    whole = _from_hf(tables.get("train", next(iter(tables.values()))), name)
    if unused := [part for part in tables if part != "train" and len(tables) > 1]:
        lacks = " and ".join(part for part in three if part not in tables)
        note = f"data set {name!r} has no {lacks} part: its train part alone is split, {', '.join(unused)} is not used"
        whole = replace(whole, notes=(*whole.notes, note))
    return whole.split(seed=seed, parts=parts)


def load_hf(name: str, config: str | None) -> Any:
    """A data set, or a dictionary of its parts, by its name on the hub or a local folder; none of its code is run.

    Raises:
        ConnectionError, OSError, ValueError: as `read_hf`.
    """
    import datasets  # slow to import, and only this reader needs it
    from datasets import config as of_datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS

    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_data_folder(folder)
    elif name in BUILDERS or folder.suffix == ".py":  # such as "pandas", which unpickles what lies in this folder
        raise ValueError(
            f"{name!r} is no data set, but code of the package datasets or a script; give a name on the hub "
            "(hf:OWNER/NAME), or a folder with Parquet, JSON or Arrow files"
        )
    try:
        if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        try:
            return datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
        except RuntimeError as error:  # some older sets are a script; the hub keeps a Parquet copy of these
            if "script" not in str(error):
                raise
            return datasets.load_dataset(name, config, revision="refs/convert/parquet")
    except ConnectionError as error:
        raise ConnectionError(
            f"data set {name!r} cannot be reached: {error}. Without a network give a folder with its data "
            "files (hf:FOLDER), or a file (conll:PATH)"
        ) from error
    except Exception as error:  # a damaged folder ends in any error that there is
        full = sources.unwritable(error)
        if full is not None and not Path(str(full.filename)).is_relative_to(folder):
            raise OSError(
                full.errno,
                f"data set {name!r} cannot be loaded: the package datasets keeps tables in "
                f"{of_datasets.HF_DATASETS_CACHE}, and that cannot be written ({full}); set HF_HOME to a folder "
                "that can, or give a file (conll:PATH)",
            ) from error
        raise ValueError(
            f"data set {name!r} with configuration {config!r} cannot be loaded: {_why(error)}. Give its name on "
            "the hub and its configuration (hf:NAME:CONFIG), or a folder"
        ) from error


def _check_data_folder(folder: Path) -> None:
    """Refuse a local data set with files that are not plain data: a pickle or a script runs code, an archive can hold
    one, or more than a disk holds."""
    for file in sorted(folder.rglob("*")):
        spoken = file.name.startswith(".") or re.match(r"(?i)readme|licen|citation|.*\.(md|lock)$", file.name)
        if file.is_file() and not spoken and file.suffix.lower() not in _DATA:
            raise ValueError(
                f"{folder}: {file.name!r} is none of {', '.join(_DATA)}, and only those are read (a pickle or a script "
                "would run code); move it out of the folder, or save the data with to_parquet() or save_to_disk()"
            )


def _why(error: Exception) -> str:
    """An error of a library as a reason: its text, else its kind."""
    return str(error) or type(error).__name__


def _from_hf(table: Any, name: str) -> Corpus:
    if not hasattr(table, "column_names") or not hasattr(table, "features"):
        raise ValueError(f"data set {name!r} is a {type(table).__name__}; give one with rows and columns")
    wanted = (("tokens", "words"), ("ner_tags", "tags", "labels"))
    words, tags = (next((c for c in names if c in table.column_names), None) for names in wanted)
    if words is None or tags is None:
        raise ValueError(
            f"data set {name!r} has the columns {table.column_names}; needed are one of {wanted[0]} and one "
            f"of {wanted[1]}: rename_column() and save_to_disk() make a folder that can be read"
        )
    names = getattr(getattr(table.features[tags], "feature", None), "names", [])
    sentences = []
    try:
        columns = table[words][:], table[tags][:]
    except Exception as error:  # the Arrow file is damaged below its header
        raise ValueError(
            f"data set {name!r}: the columns {words!r} and {tags!r} cannot be read ({_why(error)}); save it again"
        ) from error
    for i, (texts, marks) in enumerate(zip(*columns, strict=True)):
        if not isinstance(texts, list) or not isinstance(marks, list) or len(texts) != len(marks):
            raise ValueError(f"data set {name!r}, row {i}: {words!r} and {tags!r} must be equally long lists")
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(
                f"data set {name!r}, row {i}: {words!r} holds {odd[0]!r}, which is no word; words must be strings"
            )
        if unnamed := [k for k in marks if not isinstance(k, str) and k not in range(len(names))]:
            raise ValueError(
                f"data set {name!r}, row {i}: {tags!r} holds {unnamed[0]!r}, which has no name; labels must "
                "be strings, or a ClassLabel with a name for each number"
            )
        labels = [k if isinstance(k, str) else names[k] for k in marks]
        sentences.append([_Row(i, text, tag) for text, tag in zip(texts, labels, strict=True) if text])
    return build_corpus(_decode(sentences, "auto", f"data set {name!r}, row"), name=name)


def _columns(text: str, *wanted: str) -> Iterator[tuple[str, ...]]:
    """The wanted columns of a tab-separated table with a header and no quoting, faster than `csv`."""
    header, *lines = text.rstrip("\n").split("\n")
    pick = itemgetter(*map(header.split("\t").index, wanted))
    return (pick(line.split("\t")) for line in lines)


def read_bsb_names() -> Corpus:
    """Persons, places and peoples in the Berean Standard Bible's New Testament.

    A sentence is a verse, a group a chapter. Human alignments lead from an English word to a Greek one, and
    `bsb_names.tsv` says what each Greek name names. A capitalised English word form is a name if at
    least a third of its occurrences are aligned to one. Each occurrence of a name carries the label that it is
    itself aligned to, and where it is aligned to none, the label that most occurrences have; one that is aligned
    to what the table calls `other` (a language, a title) carries none. `Paul’s` counts as `Paul`. Neighbouring
    words of one label are one span.

    Asking the form first mends both faults of the alignments: a `He`, `When` or `God` aligned to a name now and
    then (no such form in a third of its occurrences), and the names that translators put for a Greek pronoun or
    verb, which are aligned to no name (4 in 10 of `Jesus`).

    Raises:
        OSError, ValueError: as `sources.fetch`, where the text is not yet in the cache.
    """
    folder = sources.fetch("bsb-names")
    files = [folder / name for name in ("SBLGNT.tsv", "nt_BSB.tsv", "SBLGNT-BSB-manual.json")]
    greek, verses, alignments = (file.read_text(encoding="utf-8") for file in files)
    table = resources.files("relearn_lens.text").joinpath("bsb_names.tsv").read_text(encoding="utf-8")
    kinds = {(lemma, strongs): kind for lemma, strongs, kind in _columns(table, "lemma", "strongs", "label")}
    names = {id: kinds.get((a, b)) for id, a, b in _columns(greek, "id", "lemma", "strongs")}
    aligned: dict[str, str] = {}
    for record in json.loads(alignments)["records"]:
        if kind := next(filter(None, map(names.get, record["source"])), None):
            for id in record["target"]:
                aligned.setdefault(id, kind)

    words = list(_columns(verses, "id", "source_verse", "text", "skip_space_after"))
    forms = [re.sub("’s?$", "", text) if text[:1].isupper() else "" for _, _, text, _ in words]
    occurs: Counter[str] = Counter(forms)
    votes: dict[str, Counter[str]] = {}
    for (id, _, _, _), form in zip(words, forms, strict=True):
        if form and aligned.get(id, "other") != "other":
            votes.setdefault(form, Counter())[aligned[id]] += 1
    label = {form: n.most_common(1)[0][0] for form, n in votes.items() if 3 * n.total() >= occurs[form]}

    def kind_of(id: str, form: str) -> str:
        kind = aligned.get(id, label[form]) if form in label else OUTSIDE
        return OUTSIDE if kind == "other" else kind

    rows = [_Row(int(verse), text, kind_of(id, form)) for (id, verse, text, _), form in zip(words, forms, strict=True)]
    sentences = [list(verse) for _, verse in groupby(rows, key=lambda row: row.number)]
    glued = [skip == "y" and verse == after for (_, verse, _, skip), (_, after, _, _) in pairwise(words)]
    return build_corpus(
        _decode(sentences, "io", "verse"),
        name="bsb-names",
        groups=[verse[0].number // 1000 for verse in sentences],  # BBCCCVVV
        source="Berean Standard Bible, New Testament; Clear Bible alignments",
        licence="CC BY 4.0",
        spaced=[True, *(not skip for skip in glued)],
    )


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
    hint = f"did you mean 'conll:{spec}'? " if spec and Path(spec).expanduser().exists() else ""
    raise ValueError(f"no corpus is called {spec!r}; {hint}the forms are {list(CORPORA)}")
