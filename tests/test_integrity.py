"""A run folder is what it was, or what differs is named; and checkpoints that are one checkpoint are noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from relearn_lens import integrity, store
from relearn_lens.integrity import Finding, hashes_of, not_finite, same_weights, seal_of, verify, weights_hash
from tests.test_experiment import tiny


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
    store.run(tiny(measure__what=["probeless"], keep="last"), path)
    return sealed(path)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A finished run of a test's own."""
    return shutil.copytree(finished, tmp_path / "run")


def wrong(folder: Path) -> list[tuple[str, str]]:
    return [(found.name, found.kind) for found in verify(folder)]


def test_finished_run_is_as_it_was(finished):
    seen: list[str] = []
    assert verify(finished, progress=seen.append) == []
    assert "tensors/concept-0.safetensors" in seen
    last = integrity.report_of(finished, [], integrity.checked(finished))[-1]
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
    assert integrity.checked(folder) == 0


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
    digest = integrity.sources.hash_files(text)["text.conll"]
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
    inputs = {f"model:{k}": v for k, v in integrity.sources.hash_files(model).items()}
    assert set(inputs) == {"model:deep/config.json"}
    manifest |= {"settings": manifest["settings"] | {"model": str(model)}, "inputs": inputs}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seal": seal_of(manifest)}))
    assert wrong(folder) == []
    (model / "deep" / "config.json").unlink()
    assert wrong(folder) == [("model:deep/config.json", "missing")]


def test_kept_weights_that_are_not_finite_are_named(folder):
    path = folder / "weights" / "concept-0.safetensors"
    save_file({"fine": torch.ones(2), "head.bias": torch.tensor([1.0, float("nan")])}, path)
    sealed(folder)
    (found,) = verify(folder)
    assert found.says == "weights/concept-0.safetensors: head.bias holds NaN or infinite numbers"


def test_verify_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: there is no manifest\.json; give the"):
        verify(tmp_path)


# --- weights


def test_not_finite_names_the_first():
    assert not_finite({"a": torch.ones(2), "n": torch.tensor([3])}) is None
    assert not_finite({"a": torch.ones(2), "b": torch.tensor([float("inf")])}) == "b"


def test_same_weights_are_noticed_whatever_files_hold_them(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "none": torch.ones(0)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    save_file({"a": weights["a"]}, tmp_path / "two" / "model-1.safetensors")
    save_file({k: weights[k] for k in ("b", "none")}, tmp_path / "two" / "model-2.safetensors")
    now = {**weights, "a": -weights["a"]}
    (said,) = same_weights({"step 1": tmp_path / "one", "step 2": tmp_path / "two", "now": now})
    assert said.startswith("the checkpoints step 1, step 2 hold the same weights")
    assert same_weights({"step 1": weights, "step 2": {**weights, "a": weights["a"].view(3, 2)}}) == []


def test_weights_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors weights; give a folder or a file"):
        weights_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged .*fetch or save it again"):
        weights_hash(tmp_path)
