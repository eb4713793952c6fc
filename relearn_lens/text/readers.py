"""Labelled text from files, data sets and pinned sources.

Every reader ends in `build_corpus`: a word, the type of its label, and whether it opens a span.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from itertools import groupby
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

_READABLE = "bio|conll|iob|iob2|tsv|txt"
_ROLES = {"train": "train", "validation": "dev|valid|testa", "probe": "test(?!a)"}


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
        if one == OUTSIDE or (plain and one):
            marks[tag] = ("", one)
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


def _rows(path: Path, text: str, column: int) -> Iterator[tuple[int, list[_Row]]]:
    """Sentences of one file, each with the number of its document, or its own in a file without documents."""
    lines = [line.rstrip(" \t") for line in text.split("\n")]  # not splitlines(): a word may hold U+0085
    documents = any(line.startswith("-DOCSTART-") for line in lines)
    words = [line for line in lines if line and not line.startswith("-DOCSTART-")]
    # The first word settles the columns; it begins with # only if every line does.
    model = next((x for x in words if x[0] != "#"), next((x for x in words if x[:2] != "# "), ""))
    if not model:
        raise ValueError(f"{path} has no words; give a file with a word and its label on each line")
    cells = (lambda x: x.split("\t")) if "\t" in model else (lambda x: [c for c in re.split("[ \t]", x) if c])
    width, at = len(cells(model)), lines.index(model) + 1
    if width == 1:
        raise ValueError(
            f"{path}, line {at}: {model[:60]!r} is a single column; a word and its label are needed, with "
            "a tab or blanks between them"
        )
    if column not in range(-width + 1, width) or column == 0:
        raise ValueError(
            f"{path}, line {at}: there is no label column {column}; of {width} columns it may be 1 to "
            f"{width - 1}, or -1 for the last (0 is the word)"
        )
    known = set()
    if any(line[:2] == "# " for line in words):
        known = {row[column] for row in map(cells, words) if row[0][:1] != "#" and len(row) == width}
    document, sentence = 0, []
    for number, line in enumerate([*lines, ""], start=1):
        starts = line.startswith("-DOCSTART-")
        if starts or not line:
            if sentence:
                yield document, sentence
                document, sentence = document + (not documents), []
            document += starts
            continue
        row = cells(line)
        # "#tag<TAB>O" and CoNLL-2000's "# # B-NP" are words, "# text = ..." is a comment.
        if line[0] == "#" and (len(row) != width or (line[:2] == "# " and row[column] not in known)):
            continue
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number}: {len(row)} column(s) where line {at} has {width}: {line[:60]!r}; "
                "give every word as many, separated alike, and end a sentence with a blank line"
            )
        if row[0]:  # published files hold words of no characters: nothing that a model could read
            sentence.append(_Row(number, row[0], row[column]))


def read_conll(path: str | Path, *, column: int = -1, scheme: str = "auto", encoding: str = "utf-8") -> Corpus:
    """The labelled sentences of one file in columns: CoNLL-2003 and its many relatives.

    The first column is the word, the last (or `column`) its tag; tabs separate them if the first word's line
    has one, else blanks. A blank line ends a sentence. `-DOCSTART-` lines separate documents, the groups
    that a split keeps together; without them every sentence is a group. A line that begins with `# `, or with
    `#` and has another number of columns, is a comment; `#hashtag` with a tag is a word. Of several
    annotations in one cell (`B-person,B-location`) the first is taken.

    `scheme="auto"` reads BIO, IOB1 (CoNLL-2003), IO with or without `I-`, BIOES, BILOU, and mixtures of them
    as conlleval does; with a scheme's name a tag that breaks it is an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a folder, is no text in `encoding`, has no words, one column, or lines of
            different numbers of columns; it has no such column; or a tag does not fit the scheme.
    """
    path = Path(path).expanduser()
    read = list(_rows(path, _text(path, encoding), column))
    sentences = _decode([rows for _, rows in read], scheme, f"{path}, line")
    return build_corpus(sentences, name=path.stem, groups=[document for document, _ in read])


def _part_files(folder: Path) -> list[Path]:
    """The files for train, validation and probe, in this order; or the only labelled text in the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not re.match("(?i)readme|lic", p.name))
    by_role = {
        role: [p for p in files if re.fullmatch(rf"(?i)(.*[._-])?({like})[^.]*(\.({_READABLE}))?", p.name)]
        for role, like in _ROLES.items()  # train.txt, dev, eng.testb, en_ewt-test.conll
    }
    texts = {p for p in files if re.fullmatch(rf"(?i)\.({_READABLE})", p.suffix)}.union(*by_role.values())
    if len(texts) == 1:
        return list(texts)
    if wrong := {role: [p.name for p in paths] for role, paths in by_role.items() if len(paths) != 1}:
        raise ValueError(
            f"{folder} must have one file each for train (train*), validation (dev*, valid*, testa*), probe "
            f"(test*, testb*), ending in {_READABLE} or nothing; it has {wrong} among "
            f"{[p.name for p in files]}. Add or remove a file, or give one file, which is then split"
        )
    return [paths[0] for paths in by_role.values()]


def read_splits(path: str | Path, *, seed: int, parts: Parts = PARTS, **reading: Any) -> Splits:
    """Train, validation and probe from one file, or from a folder with train, dev and test files.

    One file (or the only one in a folder) is split by `seed` and `parts`; three files are taken as they are.
    `reading` goes to `read_conll`. All three parts have the same labels.

    Raises:
        FileNotFoundError: as `read_conll`.
        ValueError: as `read_conll` and `Corpus.split`; or the folder lacks a file, or has two for one part.
    """
    path = Path(path).expanduser()
    files = _part_files(path) if path.is_dir() else [path]
    if len(files) == 1:
        return read_conll(files[0], **reading).split(seed=seed, parts=parts)
    return _same_labels([read_conll(file, **reading) for file in files], path.name)


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
    three = ("train", "dev" if "dev" in tables else "validation", "test")
    if all(part in tables for part in three):
        return _same_labels([_from_hf(tables[part], f"{name}/{part}") for part in three], name)
    if "train" not in tables and len(tables) > 1:
        raise ValueError(f"data set {name!r} has the parts {list(tables)}; needed are {three}, or 'train'")
    return _from_hf(tables.get("train", next(iter(tables.values()))), name).split(seed=seed, parts=parts)


def load_hf(name: str, config: str | None) -> Any:
    """A data set, or a dictionary of its parts, by its name on the hub or a local folder; none of its code is run.

    Raises:
        ConnectionError, ValueError: as `read_hf`.
    """
    import datasets  # slow to import, and only this reader needs it
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

    words = list(_columns(verses, "id", "source_verse", "text"))
    forms = [re.sub("’s?$", "", text) if text[:1].isupper() else "" for _, _, text in words]
    occurs: Counter[str] = Counter(forms)
    votes: dict[str, Counter[str]] = {}
    for (id, _, _), form in zip(words, forms, strict=True):
        if form and aligned.get(id, "other") != "other":
            votes.setdefault(form, Counter())[aligned[id]] += 1
    label = {form: n.most_common(1)[0][0] for form, n in votes.items() if 3 * n.total() >= occurs[form]}

    def kind_of(id: str, form: str) -> str:
        kind = aligned.get(id, label[form]) if form in label else OUTSIDE
        return OUTSIDE if kind == "other" else kind

    rows = [_Row(int(verse), text, kind_of(id, form)) for (id, verse, text), form in zip(words, forms, strict=True)]
    sentences = [list(verse) for _, verse in groupby(rows, key=lambda row: row.number)]
    return build_corpus(
        _decode(sentences, "io", "verse"),
        name="bsb-names",
        groups=[verse[0].number // 1000 for verse in sentences],  # BBCCCVVV
        source="Berean Standard Bible, New Testament; Clear Bible alignments",
        licence="CC BY 4.0",
    )


def read_splits_named(spec: str, *, seed: int, parts: Parts = PARTS, **reading: Any) -> Splits:
    """Train, validation and probe of the corpus that `--corpus` names, in a form of `CORPORA`.

    `reading` (scheme, column) is for `conll:`.

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
