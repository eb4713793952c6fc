"""A run folder is what it was, or what differs is named; and checkpoints that are one checkpoint are noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from relearn_lens.runs import store
from relearn_lens.runs import verify as module
from relearn_lens.runs.verify import Finding, check_same_inputs, hashes_of, seal_of, verify
from tests.made import tiny


def sealed(path: Path) -> Path:
    """Give a run folder the hashes that a finished run has."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"outputs": hashes_of(path)}
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": seal_of(manifest)}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One finished run of the toy; tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    store.run(tiny(measure__what=[], keep="last", arms=["concept", "random"], grafts__skip=True), path)
    return sealed(path)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A finished run of a test's own."""
    return shutil.copytree(finished, tmp_path / "run")


def wrong(folder: Path) -> list[tuple[str, str]]:
    return [(found.name, found.kind) for found in verify(folder)]


def test_finished_run_is_as_it_was(finished):
    assert verify(finished) == []
    last = module.report_of(finished, [], module.checked(finished))[-1]
    assert last.endswith("file(s) with a hash; all of them are as they were")


def test_hashes_are_of_every_file_but_the_manifest_the_lock_and_the_page(finished):
    (finished / "report.html").write_text("made again at will")
    names = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert set(hashes_of(finished)) == names - {"manifest.json", ".lock", "report.html"}
    assert "weights/concept-0.safetensors" in names


def test_one_bit_is_found(folder):
    path = folder / "tensors" / "random-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (found,) = verify(folder)
    assert (found.name, found.kind, found.is_wrong) == ("tensors/random-0.safetensors", "changed", True)
    assert "put the right file back, or run again with --fresh" in found.says


def test_missing_extra_and_swapped_files_are_named(folder):
    (folder / "summary.json").unlink()
    (folder / "thesis.tex").write_text("years of work")
    one, other = (folder / "tensors" / f"{name}-0.safetensors" for name in ("concept", "random"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert wrong(folder) == [
        ("summary.json", "missing"), ("tensors/concept-0.safetensors", "changed"),
        ("tensors/random-0.safetensors", "changed"), ("thesis.tex", "extra"),
    ]  # fmt: skip


def test_a_changed_manifest_is_found(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"peak_rss_mb": 1}))
    assert wrong(folder) == [("manifest.json", "changed")]
    path.write_text("[1, 2]")
    assert wrong(folder) == [("manifest.json", "damaged")]
    path.write_text("{")
    assert wrong(folder) == [("manifest.json", "damaged")]
    assert module.checked(folder) == 0


def test_the_seal_does_not_depend_on_the_order_nor_on_itself():
    assert seal_of({"a": 1, "b": [2.5]}) == seal_of({"b": [2.5], "a": 1, "seal": "x"}) != seal_of({"a": 1, "b": [2]})


def test_a_run_without_hashes_is_no_error_and_says_why(folder):
    path = folder / "manifest.json"
    manifest = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("outputs", "seal")}
    path.write_text(json.dumps(manifest))
    (found,) = verify(folder)
    assert not found.is_wrong
    assert found.says.endswith("(its version wrote none): nothing to compare")
    path.write_text(json.dumps(manifest | {"complete": False}))
    assert "the run is not finished" in verify(folder)[0].says


def test_inputs_are_compared_where_they_are(tmp_path, folder):
    text = tmp_path / "text.conll"
    text.write_text("Rome B-LOC\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    settings = manifest["settings"] | {"corpus": f"conll:{text}", "model": str(tmp_path / "nowhere")}
    digest = module.sources.hash_files(text)["text.conll"]
    manifest |= {"settings": settings, "inputs": {"corpus:text.conll": digest, "model:config.json": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seal": seal_of(manifest)}))
    (absent,) = verify(folder)
    assert absent == Finding(f"model:{tmp_path / 'nowhere'}", "unknown", absent.says)
    assert "is not on this machine, so it was not compared" in absent.says
    text.write_text("Paris B-LOC\n")
    assert ("corpus:text.conll", "changed") in wrong(folder)


def test_a_missing_input_file_is_named(tmp_path, folder):
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "deep" / "config.json").write_text("{}")
    manifest = json.loads((folder / "manifest.json").read_text())
    inputs = {f"model:{k}": v for k, v in module.sources.hash_files(model).items()}
    assert set(inputs) == {"model:deep/config.json"}
    manifest |= {"settings": manifest["settings"] | {"model": str(model)}, "inputs": inputs}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seal": seal_of(manifest)}))
    assert wrong(folder) == []
    (model / "deep" / "config.json").unlink()
    assert wrong(folder) == [("model:deep/config.json", "missing")]


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_kept_weights_that_are_not_finite_are_named(folder, odd):
    path = folder / "weights" / "concept-0.safetensors"
    save_file({"count": torch.tensor([3]), "fine": torch.ones(2), "head.bias": torch.tensor([1.0, odd])}, path)
    sealed(folder)
    (found,) = verify(folder)
    assert found.says == "weights/concept-0.safetensors: head.bias holds NaN or infinite numbers"


def test_verify_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: there is no manifest\.json; give the"):
        verify(tmp_path)


def manifest(run_model: str = "minilm", **hashes: str) -> dict:
    """Of a run with this model, with hashes by key, `_` standing for `:`."""
    return {"settings": {"model": run_model}, "inputs": {key.replace("_", ":"): v for key, v in hashes.items()}}


def test_runs_of_one_model_that_changed_cannot_be_compared():
    one, two = manifest(model_weights="a", sentences_train="s"), manifest(model_weights="b", sentences_train="t")
    with pytest.raises(ValueError, match=r"model:weights is not the same file in first and in second.*Run both on"):
        check_same_inputs({"first": one, "second": two})


def test_runs_of_other_models_and_other_sentences_can_be_compared():
    one, two = manifest(model_weights="a", sentences_train="s"), manifest("other", model_weights="b")
    check_same_inputs({"first": one, "second": two, "third": manifest(model_weights="a", sentences_train="t")})
    check_same_inputs({"old": {}, "older": {"settings": {}}})
