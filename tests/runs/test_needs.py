"""What the doctor says: needs against measured peaks, and this machine's limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relearn_lens import sources
from relearn_lens.models import toy
from relearn_lens.runs import needs
from relearn_lens.runs.needs import Estimate, doctor_rows, estimate, memory_mb, removal_mb, shape_of, verdict
from relearn_lens.runs.presets import FOR_A_GPU, PRESETS, preset, settings_of
from relearn_lens.runs.settings import Experiment


@pytest.mark.parametrize(
    ("name", "measured"), [("names", 2470), ("names-quick", 2087), ("smollm2-places", 6907), ("toy", 634)]
)
def test_estimate_is_the_measured_peak_or_up_to_30_percent_more(name, measured):
    need = estimate(preset(name))
    assert need is not None
    assert measured <= need.memory_mb <= 1.3 * measured


LLAMA_8B = needs.Shape(32, 4096, 32, 8_030_261_248, 128_256)
"""Llama 3.1 8B, by its configuration: MLPs of 14,336, eight heads of keys and values."""


@pytest.mark.parametrize("what", ["adapters", "mask"])
def test_a_removal_from_an_8b_model_fits_a_card_of_80_gb(what):
    """Beside weights in 16 bits, adapters of rank 8 on every matrix of every block, or three output matrices of MLPs;
    batches of 32 and 32 in parts of four sentences of 256 tokens. All of its weights, or weights in 32 bits, do not."""
    matrices = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # q and o, k and v, the MLP's
    moving = {"adapters": 32 * 8 * matrices, "mask": 3 * 4096 * 14336}[what]
    how = {"moving": moving, "adapters": what == "adapters", "batch": 4, "longest": 256, "checkpointing": True}
    card = 80e9 / 2**20
    items = removal_mb(LLAMA_8B, half=True, **how)
    assert sum(items.values()) < 0.5 * card
    assert items["weights"] == pytest.approx(2 * LLAMA_8B.parameters / 2**20, rel=0.01)
    assert items["what moves"] == pytest.approx(20 * moving / 2**20, abs=1)
    assert sum(removal_mb(LLAMA_8B, half=False, **how).values()) > sum(items.values()) + 15_000
    assert sum(removal_mb(LLAMA_8B, half=True, **{**how, "moving": LLAMA_8B.parameters}).values()) > card


def test_estimate_grows_with_what_takes_memory():
    def memory(*sets: str) -> int:
        need = estimate(settings_of("names", {}, sets))
        assert need is not None
        return need.memory_mb

    plain = memory()
    assert memory("finetune.batch_size=64") > plain + 300
    assert memory("measure.max_memory=64") < plain - 300
    assert memory("model=gpt2") > plain + 1500
    assert memory("measure.what=['auroc']") < plain
    weights = needs.SHAPES["minilm"].bytes / 2**20 / needs.KNOWN
    alone = plain - memory('arms=["concept"]')
    assert alone == pytest.approx(3 * weights, abs=2)
    assert plain - memory("precision=float32") == pytest.approx(weights / 2, abs=2)
    for never in ("grafts.skip=true", "retrain.lora_rank=4", 'arms=["random", "unpruned"]'):
        assert plain - memory(never) == pytest.approx(4 * weights, abs=2)


def test_disk_grows_with_seeds_and_with_what_is_kept():
    def disk(*sets: str) -> int:
        need = estimate(settings_of("names", {}, sets))
        assert need is not None
        return need.disk_mb

    weights = 4 * needs.SHAPES["minilm"].parameters / 2**20
    assert disk("keep=last") - disk() == pytest.approx(5 * 3 * weights, abs=2)  # arms and seeds
    skip = "grafts.skip=true"
    assert disk("workers=1") - disk("workers=1", skip) == pytest.approx(6 * weights, abs=2)
    # The controls at each of seven stages, as long as it is not known which is grafted.
    assert disk() - disk(skip) == pytest.approx((2 + 2 * 7) * weights, abs=2)
    assert disk(skip) - disk(skip, 'arms=["concept", "random"]') >= weights
    assert disk("seeds=[0, 1]") - disk("seeds=[0]") >= weights


def test_known_sizes_are_those_of_the_models():
    made = toy.tagger()
    assert needs.SHAPES["toy"].parameters == pytest.approx(sum(w.numel() for w in made.weights().values()), rel=0.2)
    minilm = next(m for m in sources.SOURCES["minilm"].members if m.name == "model.safetensors")
    assert needs.SHAPES["minilm"].bytes == pytest.approx(minilm.size, rel=0.01)


def test_shape_of_a_folder_is_read_from_its_config(bert_folder):
    found = shape_of(str(bert_folder))
    assert found is not None
    assert (found.layers, found.d_model, found.heads) == (3, 32, 4)
    stored = (bert_folder / "model.safetensors").stat().st_size
    assert found.bytes == pytest.approx(stored, abs=8)
    assert shape_of("an/unknown-model") is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"num_hidden_layers": "many", "hidden_size": 1}'])
def test_folder_whose_config_says_no_sizes_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json' does not say how large the model is .*save_pretrained"):
        shape_of(str(tmp_path))


def test_a_half_precision_folder_counts_as_float32(tmp_path):
    config = {"n_layer": 2, "n_embd": 8, "n_head": 2, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    found = shape_of(str(tmp_path))
    assert found is not None
    assert found.bytes == 2000


# --- this machine


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_is_what_is_free(tmp_path):
    root = machine(tmp_path, proc__meminfo="MemTotal: 9999999 kB\nMemAvailable: 2048000 kB\n")
    assert memory_mb(root) == 2000


def test_memory_is_within_the_limit_of_a_container(tmp_path):
    root = machine(tmp_path, proc__meminfo="MemAvailable: 2048000 kB\n")
    limits = root / "sys/fs/cgroup"
    limits.mkdir(parents=True)
    (limits / "memory.max").write_text("max\n")
    assert memory_mb(root) == 2000
    (limits / "memory.max").write_text(f"{700 * 2**20}\n")
    (limits / "memory.current").write_text(f"{200 * 2**20}\n")
    assert memory_mb(root) == 500


def test_memory_is_within_the_limit_of_an_old_container(tmp_path):
    limits = tmp_path / "sys/fs/cgroup/memory"
    limits.mkdir(parents=True)
    (limits / "memory.limit_in_bytes").write_text(str(300 * 2**20))
    (limits / "memory.usage_in_bytes").write_text(str(400 * 2**20))
    assert memory_mb(tmp_path) == 0


def test_this_machine_says_how_much_it_has():
    found = memory_mb()
    assert found is None or found > 100


# --- verdicts


@pytest.mark.parametrize(
    ("need", "has", "disk", "says"),
    [
        (Estimate(600, 10, 0), 1000, 1000, "runs here"),
        (Estimate(600, 10, 0), None, 1000, "runs here"),
        (Estimate(600, 10, 95), 1000, 1000, "runs here, after a fetch of 95 MB"),
        (Estimate(2470, 10, 0), 1500, 1000, "does not fit: needs about 2,470 MB of memory, there are 1,500 MB"),
        (Estimate(600, 10, 95), 1000, 100, "does not fit: needs about 105 MB of disk, there are 100 MB"),
    ],
)
def test_verdict_is_in_plain_words(need, has, disk, says):
    assert verdict(need, has, disk) == says


def test_doctor_has_a_row_for_every_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    rows = {row[0]: row for row in doctor_rows(out=tmp_path / "runs" / "deep", has_mb=1000)}
    assert list(rows) == list(PRESETS)
    assert all(len(row) == len(needs.HEADER) for row in rows.values())
    assert rows["toy"][-1] == "runs here"
    assert rows["names"][-1].startswith("does not fit: needs about")
    rich = {row[0]: row[-1] for row in doctor_rows(out=tmp_path, has_mb=100_000)}
    assert rich["names"].startswith("runs here, after a fetch of 8")
    assert rich["lo2024"].startswith("runs here, after a fetch of 2")


def test_doctor_says_that_a_preset_for_a_gpu_would_run_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    slow = {row[0]: row[-1] for row in doctor_rows(out=tmp_path, has_mb=100_000, has_gpu=False)}
    fast = {row[0]: row[-1] for row in doctor_rows(out=tmp_path, has_mb=100_000, has_gpu=True)}
    said = ", but on the CPU: it is sized for a GPU, and here is none"
    assert {name for name in PRESETS if slow[name] == fast[name] + said} == FOR_A_GPU
    assert all(slow[name] == fast[name] for name in PRESETS if name not in FOR_A_GPU)
    assert {name for name, (says, _) in PRESETS.items() if "for a GPU" in says} == FOR_A_GPU


def test_doctor_says_when_a_size_is_not_known(monkeypatch):
    monkeypatch.setattr(needs, "SHAPES", {})
    assert doctor_rows(presets={"names": None})[0][-1] == "the size of model 'minilm' is not known before it is fetched"


def test_estimates_need_no_torch():
    code = "from relearn_lens.runs import needs; needs.doctor_rows(); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_peak_is_the_processs_own_and_not_its_parents():
    held = bytearray(300 * 2**20)  # makes this process larger than the one that it starts
    script = "from relearn_lens.runs.needs import peak_rss_mb; print(peak_rss_mb())"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert len(held)
    assert 5 < float(said) < 200


# --- within max_memory

LARGE = needs.Shape(12, 768, 12, 100_000_000)  # 381 MB of weights; 37 kB a token and layer at 60 tokens


def within(max_memory: int | None, *sets: str) -> tuple[Experiment, list[str]]:
    asked = settings_of(
        "names", {"max_memory": max_memory}, ["finetune.batch_size=64", "measure.max_tokens=4096", *sets]
    )
    return needs.fitted(asked, LARGE, taken_mb=1000, longest_train=60, longest_read=80)


def test_without_a_limit_nothing_is_changed():
    made, said = within(None)
    assert made == settings_of("names", {}, ["finetune.batch_size=64", "measure.max_tokens=4096"])
    assert said == []


def test_a_limit_cuts_batches_into_parts_and_lowers_what_is_read_at_once():
    wide, said = within(20_000)
    assert (wide.finetune.accumulate, wide.measure.max_tokens, wide.measure.max_memory) == (1, 4096, 512)
    tight, said = within(5_600)
    # 0.9 x 5,600 - (1,000 + 60 + 9.5 x 381) MB are left, and a piece of 60 tokens takes 12 layers x 60 x 59,424 bytes.
    room = 0.9 * 5_600 - (1_000 + needs.LATER_MB + 9.5 * LARGE.bytes / 2**20)
    pieces = int(room * 2**20 // (12 * 60 * (68 * 768 + 10 * 12 * 60)))
    assert tight.finetune.accumulate == -(-64 // pieces) > 1
    assert tight.finetune.batch_size == 64
    assert tight.measure.max_memory == int(room)
    assert tight.measure.max_tokens < 4096
    assert said[0].startswith("max_memory=5600 MB: about 4,684 MB are taken whatever the batches; accumulate=")


def test_a_limit_that_nothing_fits_is_refused_with_what_would():
    with pytest.raises(ValueError, match=r"max_memory=5000 MB is too little: this run needs 5,2\d\d MB even with one"):
        within(5_000)
    made, _ = within(5_400)
    assert made.finetune.accumulate > 1


def test_parts_that_were_asked_for_stay():
    assert within(20_000, "finetune.accumulate=4")[0].finetune.accumulate == 4
