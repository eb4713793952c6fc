"""Facts from files and data sets: rows with a prompt or a question and its answer, with choices, or of plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relearn_lens.text.facts.passages import Facts, Passage, halves
from relearn_lens.text.hf import load_hf

SHAPES = (("prompt", "answer"), ("question", "answer"), ("question", "choices", "answer"), ("text",))
"""The fields that a row may have; `key`, `relation` (or `subject`) and `form` may stand beside them."""
_SHOWN = 5


def read_facts(
    forget: str | Path,
    *,
    retain: str | Path,
    held_out: str | Path | None = None,
    general: str | Path | None = None,
    seed: int = 0,
) -> Facts:
    """Facts of a user's own: what is to be forgotten, and what is to stay.

    Each is a JSONL file, or a data set as `hf:NAME[:CONFIG[:PART]]`; rows as `read_passages`. Without `held_out` the
    forget rows are halved by key and `seed`.

    Raises:
        ValueError: as `read_passages`, `halves` and `Facts`.
        FileNotFoundError, ConnectionError: as `read_passages`.
    """
    passages = {
        role: read_passages(source)
        for role, source in (("forget", forget), ("held_out", held_out), ("near", retain), ("general", general))
        if source is not None
    }
    notes = [
        f"{n} of {len(each)} {role} rows have no key and are each their own: what two rows say of one thing may "
        "stand on both sides"
        for role, each in passages.items()
        if (n := sum(p.key.startswith(_OWN) for p in each))
    ]
    given = passages["forget"], passages.get("held_out", ())
    attacked, kept_out = halves(passages["forget"], seed=seed) if held_out is None else given
    return Facts(
        name=Path(str(forget)).stem,
        forget_attacked=attacked,
        forget_held_out=kept_out,
        retain_near=passages["near"],
        retain_general=passages.get("general", ()),
        notes=tuple(notes),
        source=", ".join(map(str, filter(None, (forget, held_out, retain, general)))),
    )


def read_passages(source: str | Path) -> tuple[Passage, ...]:
    """The passages of a JSONL file, or of a data set `hf:NAME[:CONFIG[:PART]]` (a name on the hub, or a folder).

    A row has `prompt` and `answer`; or `question` and `answer` (as TOFU), which are put as `Question: ...` and
    `Answer:`; or `question`, `choices` and the number of the right one (as WMDP and MMLU), which are put as lettered
    options whose answer is the letter; or `text` (as MUSE), all of which is the answer. A row without `key` is a key
    of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached, and the data set is not in its cache.
        ValueError: rows without these fields, each with its line and the reason; a data set of several parts.
    """
    spec = str(source)
    name, rows = _hf_rows(spec.removeprefix("hf:")) if spec.startswith("hf:") else _jsonl_rows(Path(spec).expanduser())
    passages: list[Passage] = []
    wrong: list[str] = []
    n = 0
    for where, row in rows:
        n += 1
        try:
            passages.append(_passage(json.loads(row) if isinstance(row, str) else row, f"{_OWN}{name}, {where}"))
        except json.JSONDecodeError as error:
            wrong.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{name}: {len(wrong)} of {n} rows cannot be read: {'; '.join(wrong[:_SHOWN])}{more}. Mend or remove them"
        )
    if not passages:
        raise ValueError(f"{name} has no rows; give at least one with {_shapes()}")
    return tuple(passages)


_OWN = "row of "
"""How the key of a row without a key begins."""


def _shapes() -> str:
    return ", or ".join("/".join(shape) for shape in SHAPES)


def _jsonl_rows(path: Path) -> tuple[str, Iterator[tuple[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file; give a JSONL file with {_shapes()} in each line, or a data set as hf:NAME"
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    return str(path), ((f"line {i}", line) for i, line in enumerate(lines, start=1) if line.strip())


def _hf_rows(spec: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    name, config, part = spec, "", ""
    if not Path(spec).expanduser().exists():
        name, _, rest = spec.partition(":")
        config, _, part = rest.partition(":")
    loaded = load_hf(name, config or None)
    parts = loaded if isinstance(loaded, dict) else {part: loaded}
    if not part and len(parts) == 1:
        (part,) = parts
    if part not in parts:
        raise ValueError(
            f"data set {name!r} has the parts {', '.join(parts)}, and {part or 'none'!r} was asked for; name one as "
            f"hf:{name}:{config}:{next(iter(parts))}"
        )
    table = parts[part]
    columns = table.column_names
    if not any(set(shape) <= set(columns) for shape in SHAPES):
        raise ValueError(f"data set {name!r} has the columns {columns}; needed are {_shapes()}: use rename_column()")
    return f"data set {spec!r}", ((f"row {i}", row) for i, row in enumerate(table))


def _passage(row: Any, own: str) -> Passage:
    """The passage of one row; a ValueError says what is wrong with it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a {type(row).__name__} in the place of an object with {_shapes()}")
    row = {field: value for field, value in row.items() if value is not None}
    key = row.get("key", own)
    relation = row.get("relation", row.get("subject", "fact"))
    form = row.get("form", "statement")
    for field, value in (("key", key), ("relation", relation), ("form", form)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{field} is {value!r}, not a string")
    if "choices" in row and "question" in row:
        return _with_options(row, key, relation)
    prompt_field = next((field for field in ("prompt", "question") if field in row), None)
    if prompt_field is None:
        if "text" not in row:
            raise ValueError(f"the fields are {', '.join(row) or 'none'}; needed are {_shapes()}")
        return Passage("", _string(row, "text"), key, relation, "text")
    if "answer" not in row:
        raise ValueError(f"{prompt_field} without answer")
    prompt, answer = _string(row, prompt_field), _string(row, "answer")
    choices = tuple(_choices(row)) if "choices" in row else ()
    return Passage(
        f"Question: {prompt}\nAnswer:" if prompt_field == "question" else prompt, answer, key, relation, form, choices
    )


def _with_options(row: Mapping[str, Any], key: str, relation: str) -> Passage:
    """Lettered options, and the letter of the right one."""
    choices, number = _choices(row), row.get("answer")
    if isinstance(number, str) and number in choices:
        number = choices.index(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise ValueError(f"answer is {number!r}, not the number of one of {len(choices)} choices, from 0")
    letters = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)])
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return Passage(f"{_string(row, 'question')}\n{listed}\nAnswer:", letters[number], key, relation, "options", letters)


def _choices(row: Mapping[str, Any]) -> Sequence[str]:
    choices = row["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"choices is {choices!r}, not a list of 2 to 26 strings")
    return choices


def _string(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is {value!r}, not a text")
    return value
