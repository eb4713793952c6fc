"""Bad input, broadly: every case ends in a valid result or in one of our errors (`python -m tests.benchmarks fuzz`
tries 10,000)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relearn_lens.measure.tracking import Trajectory, measure
from relearn_lens.models.loading import load_bridge, load_tagger
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.store import load_run
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import build_corpus
from tests.fuzzing import STRATEGIES, finished_run, ours, outcome

CASES = 500


@pytest.mark.parametrize("name", STRATEGIES)
def test_bad_input_ends_in_a_result_or_in_our_words(name):
    strategy, check, share = STRATEGIES[name]

    @settings(
        max_examples=round(CASES * share), derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    @given(st.data())
    def one(data: Any) -> None:
        case = data.draw(strategy)
        outcome(lambda: check(case))

    one()


def test_shares_make_all_cases():
    assert sum(share for _, _, share in STRATEGIES.values()) == pytest.approx(1)


def test_errors_of_libraries_are_not_ours():
    def fail() -> None:
        raise ValueError("an error that this test raised, with a long text")

    with pytest.raises(ValueError, match="that this test raised") as found:
        fail()
    assert not ours(found.value)
    with pytest.raises(AssertionError, match=r"not one of our errors: ValueError: an error"):
        outcome(fail)


# --- model folders


@pytest.fixture
def model_folder(bert_folder, tmp_path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


def test_a_models_own_code_is_never_run(model_folder, tmp_path):
    code = f"from pathlib import Path\nPath({str(tmp_path / 'it-ran')!r}).touch()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (model_folder / f"{name}.py").write_text(code)
    config = json.loads((model_folder / "config.json").read_text())
    own = {"AutoConfig": "configuration_x.X", "AutoModelForMaskedLM": "modeling_x.X"}
    config |= {"model_type": "x", "auto_map": own}
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot load model .*asks for code of its own, which is never run"):
        load_bridge(model_folder)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"}, {"hidden_size": -1}, {"num_attention_heads": 7}, {"num_hidden_layers": None},
        {"model_type": 5}, {"model_type": "no-such"}, {"vocab_size": 0}, {"vocab_size": 10**15},
        {"hidden_act": "magic"}, {"hidden_size": 1.5}, {"max_position_embeddings": []},
        {"dtype": "float3"}, {"architectures": 5},
    ],
)  # fmt: skip
def test_a_config_of_wrong_values_is_refused_in_our_words(model_folder, change):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | change))
    assert outcome(lambda: load_tagger(model_folder, ["O", "LOC"])) in ("valid", "ValueError", "OSError")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"{}", b"\xff\x00", b"[" * 50_000])
def test_a_damaged_model_folder_is_refused_in_our_words(model_folder, name, content):
    (model_folder / name).write_bytes(content)
    assert outcome(lambda: load_tagger(model_folder, ["O", "LOC"])) in ("valid", "ValueError", "OSError")


@pytest.mark.parametrize("label", ["<script>alert(1)</script>", "地名", "&amp;", "\u202eLOC", "x" * 500])
def test_odd_label_names_are_shown_and_not_run(bert_folder, label):
    corpus = build_corpus([[("Rome", label, True), ("the", "O", False)]] * 3, name="odd <b>")
    tagger = load_tagger(bert_folder, corpus.label_names)
    found = measure(tagger, corpus, Concept(label, [label]))
    for page in (corpus._repr_html_(), Trajectory({"base": found}, None, "arm", 0, None)._repr_html_()):
        assert "<script>" not in page
        assert "<b>" not in page
    assert label in found.f1


# --- texts of errors that only bad input meets


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return Path(shutil.copytree(finished_run(), tmp_path / "run"))


def test_swapped_results_are_named(run_folder):
    tensors = run_folder / "tensors"
    shutil.copy(tensors / "damage-0.safetensors", tensors / "concept-0.safetensors")
    with pytest.raises(ValueError, match=r"concept-0\.safetensors' is damaged .*a Damage where a Trajectory should be"):
        load_run(run_folder)
    shutil.copy(tensors / "random-0.safetensors", tensors / "concept-0.safetensors")
    with pytest.raises(
        ValueError, match=r"concept-0\.safetensors' is damaged: it holds random-0; put the right file back"
    ):
        load_run(run_folder)


@pytest.mark.parametrize("content", ["[]", "5", "null"])
def test_a_manifest_that_is_no_table_is_named(run_folder, content):
    (run_folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged \(it is no table of names and values\)"):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("a.b.c.d.e.f=1", "a key has one dot at most, such as prune.fraction"),
        ("retrain.lr=inf", "retrain.lr = inf: input should be a finite number"),
        ("retrain.lr=0x" + "f" * 6000, r"retrain.lr = \(a int too large to write\)"),
        ("data.parts=[0.5, nan, 0.5]", "data.parts = .*three shares above 0 that sum to 1"),
        ("data.scheme=" + "x" * 5000, r"\.\.\. \(5,002 characters\)"),
    ],
)
def test_settings_of_wild_values_are_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        settings_of("toy", {}, [sets])


def test_a_second_line_is_no_second_setting():
    with pytest.raises(ValueError, match=r"retrain\.epochs = '1\\nlr = 2'"):
        settings_of("toy", {}, ["retrain.epochs=1\nlr = 2"])
