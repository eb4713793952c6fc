"""Data sets of the Hugging Face hub, or in its form in a folder, with labelled words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from relearn_lens import sources
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.tags import Row, decode

_DATA = (".parquet", ".json", ".jsonl", ".arrow", ".csv", ".tsv")
"""What a local data set may consist of."""


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


def from_hf(table: Any, name: str) -> Corpus:
    """The corpus of one table.

    Raises:
        ValueError: as `read_hf`.
    """
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
        sentences.append([Row(i, text, tag) for text, tag in zip(texts, labels, strict=True) if text])
    return build_corpus(decode(sentences, "auto", f"data set {name!r}, row"), name=name)
