"""CoNLL-style files: a word and its label on every line, sentences apart by blank lines."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from relearn_lens.files import path_of
from relearn_lens.text.corpus import OUTSIDE, Corpus, build_corpus
from relearn_lens.text.tags import Row, decode

_NUMBER = re.compile(r"\d+([-.:]\d+)*")
_TAG = re.compile(r"[BIESLUM]-\S+|O")


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
    path = path_of(path, "the path of one file").expanduser()
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
    rows = [[Row(n, r[at], r[column]) for n, r in lines] for lines in kept]
    knows = "SpaceAfter=No" in text or any(sentence.text for sentence in read)
    glued = (
        [g for sentence, lines in zip(read, kept, strict=True) for g in _glued(sentence, lines, at)] if knows else []
    )
    corpus = build_corpus(
        decode(rows, scheme, f"{path}, line"),
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
