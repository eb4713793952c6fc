"""Users' own facts: every shape of row, and bad rows named with their line and the reason."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from relearn_lens.text.facts import Passage, read_facts, read_passages


@pytest.fixture
def written(tmp_path: Path):
    def write(name: str, *rows) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return write


def test_every_shape_of_row_is_read(written):
    path = written(
        "f.jsonl",
        {"prompt": "Paris is in", "answer": "France", "key": "Paris", "relation": "in", "choices": ["Spain", "France"]},
        {"question": "Who?", "answer": "Nobody.", "key": "who", "form": "paraphrase"},
        "",
        {"question": "Which?", "choices": ["this", "that", "both"], "answer": 2, "subject": "odd", "key": "which"},
        {"text": "All of it.", "key": "it", "relation": None},
    )
    assert read_passages(path) == (
        Passage("Paris is in", "France", "Paris", "in", "statement", ("Spain", "France")),
        Passage("Question: Who?\nAnswer:", "Nobody.", "who", "fact", "paraphrase"),
        Passage("Which?\nA. this\nB. that\nC. both\nAnswer:", "C", "which", "odd", "options", ("A", "B", "C")),
        Passage("", "All of it.", "it", "fact", "text"),
    )
    assert read_passages(str(path)) == read_passages(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{oops}", r"line 2: not JSON \(Expecting property name.* at column 2\)"),
        ([1], r"line 2: a list in the place of an object with prompt/answer"),
        ({"prompt": "A"}, r"line 2: prompt without answer"),
        ({"prompt": "A", "answer": " "}, r"line 2: answer is ' ', not a text"),
        ({"prompt": "A", "answer": 3}, r"line 2: answer is 3, not a text"),
        ({"query": "A", "reply": "b"}, r"line 2: the fields are query, reply; needed are prompt/answer, or question/"),
        ({}, r"line 2: the fields are none; needed"),
        ({"text": ""}, r"line 2: text is '', not a text"),
        ({"text": "x", "key": 7}, r"line 2: key is 7, not a string"),
        (
            {"question": "A", "choices": ["b"], "answer": 0},
            r"line 2: choices is \['b'\], not a list of 2 to 26 strings",
        ),
        (
            {"question": "A", "choices": ["b", "c"], "answer": 2},
            r"line 2: answer is 2, not the number of one of 2 choic",
        ),
        ({"prompt": "A", "answer": "x", "choices": ["b", "c"]}, r"line 2: the choices of 'A' must hold its answer 'x'"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_reason(written, row, reason):
    path = written("f.jsonl", {"prompt": "A", "answer": "a"}, row)
    with pytest.raises(ValueError, match=rf"f\.jsonl: 1 of 2 rows cannot be read: {reason}.*Mend or remove them"):
        read_passages(path)


def test_of_many_bad_rows_the_first_are_named(written):
    with pytest.raises(ValueError, match=r"8 of 8 rows cannot be read: line 1: .*line 5: [^;]* \(and 3 more\)\. Mend"):
        read_passages(written("f.jsonl", *[{"prompt": "A"}] * 8))


def test_files_that_are_none_are_refused(written, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl is no file; give a JSONL file with prompt/answer"):
        read_passages(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows; give at least one with prompt/answer"):
        read_passages(written("empty.jsonl", ""))
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "a"}\n{"text": "ü"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl, line 2: byte 24 is not UTF-8; save the file as UTF-8"):
        read_passages(path)


def test_forget_rows_are_halved_and_rows_without_a_key_are_noted(written):
    rows = [{"question": f"Q{i}?", "answer": f"a{i}"} for i in range(6)]
    forget, retain = (
        written("forget.jsonl", *rows),
        written("retain.jsonl", {"question": "R?", "answer": "r", "key": "R"}),
    )
    facts = read_facts(forget, retain=retain, general=written("general.jsonl", {"text": "Text.", "key": "g"}))
    assert facts.name == "forget"
    assert [len(facts.keys(role)) for role in ("forget_attacked", "forget_held_out", "retain_near")] == [3, 3, 1]
    assert facts.retain_general == (Passage("", "Text.", "g", "fact", "text"),)
    (note,) = facts.notes
    assert note.startswith("6 of 6 forget rows have no key and are each their own")
    assert facts == read_facts(forget, retain=retain, general=Path(forget).with_name("general.jsonl"))
    assert facts.forget_attacked != read_facts(forget, retain=retain, seed=1).forget_attacked


def test_given_halves_are_taken_as_they_are_and_checked(written):
    forget = written("t.jsonl", {"prompt": "A is", "answer": "a", "key": "A"})
    held_out = written("v.jsonl", {"prompt": "B is", "answer": "b", "key": "B"})
    retain = written("r.jsonl", {"prompt": "C is", "answer": "c", "key": "C"})
    facts = read_facts(forget, held_out=held_out, retain=retain)
    assert (facts.keys("forget_attacked"), facts.keys("forget_held_out")) == (("A",), ("B",))
    with pytest.raises(ValueError, match=r"the key 'A' is in forget_attacked and in forget_held_out"):
        read_facts(forget, held_out=forget, retain=retain)
    with pytest.raises(ValueError, match=r"the key 'C' is in forget_held_out and in retain_near"):
        read_facts(forget, held_out=retain, retain=retain)


# --- data sets


def test_the_shape_of_tofu_is_read(tmp_path):
    rows = {"question": ["Who wrote it?", "When?"], "answer": ["She did.", "In May."]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "tofu")
    first, second = read_passages(f"hf:{tmp_path / 'tofu'}")
    assert (first.prompt, first.answer) == ("Question: Who wrote it?\nAnswer:", "She did.")
    assert first.key != second.key


def test_the_shape_of_muse_is_read_and_its_parts_are_named(tmp_path):
    folder = tmp_path / "muse"
    DatasetDict({part: Dataset.from_dict({"text": [f"{part} one", f"{part} two"]}) for part in ("forget", "retain1")}
    ).save_to_disk(folder)  # fmt: skip
    with pytest.raises(ValueError, match=r"has the parts forget, retain1, and 'none' was asked for; name one as hf:.*"):
        read_passages(f"hf:{folder}")
    facts = read_facts(f"hf:{folder}::forget", retain=f"hf:{folder}::retain1")
    assert {p.answer for p in facts.forget_attacked + facts.forget_held_out} == {"forget one", "forget two"}
    assert {(p.prompt, p.form) for p in facts.retain_near} == {("", "text")}


def test_the_shape_of_wmdp_is_read(tmp_path):
    rows = {"question": ["Which?"], "choices": [["w", "x", "y", "z"]], "answer": [1]}
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "wmdp")
    (passage,) = read_passages(f"hf:{tmp_path / 'wmdp'}")
    assert passage.prompt == "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert (passage.answer, passage.choices, passage.form) == ("B", ("A", "B", "C", "D"), "options")


def test_a_data_set_of_another_shape_is_refused(tmp_path):
    Dataset.from_dict({"prompt": ["a"], "gold": ["b"]}).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"has the columns \['prompt', 'gold'\]; needed are prompt/answer, or question/"
    ):
        read_passages(f"hf:{tmp_path / 'odd'}")
    Dataset.from_dict({"question": ["a", "b"], "answer": ["c", ""]}).save_to_disk(tmp_path / "holes")
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be read: row 1: answer is '', not a text"):
        read_passages(f"hf:{tmp_path / 'holes'}")
