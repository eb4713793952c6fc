"""What a preset needs of a machine, by calculation from sizes; no model is loaded and torch is not imported.

Resident memory is a sum, because what the allocator keeps of one phase is rarely what the next one asks for:

    baseline    Python with torch, transformers, TransformerLens and pandas imported, and what a run imports later
    text        the text while it is read
    weights     6 copies of the model in float32: the model, the base of the seed, gradients, two moments of AdamW,
                and one that is being read or written; and half a one where it computes in bfloat16
    grafts      the cut model, the retrained one, what is put back, and of each control its end and its start (where
                nothing was cut, that is the base); gradients and moments are gone by then, but for two copies that the
                allocator keeps: so one copy more than before, and those of the controls
    training    activations of the longest batch, kept for the backward pass, and logits of a language model
    measuring   what attribution and top words may take at once: what they need, at most `measure.max_memory`

and a tenth of it all is what allocators keep beside. It is of one process: a run starts others where memory is free.

Activations of a transformer layer are 68 d + 10 h s bytes a token in float32 (d wide, h heads, sentences of s tokens;
Korthikanti et al. 2022, section 4.1, twice the bytes of 16-bit numbers).

Said and measured peaks in MB, of the larger of two processes or of one alone: `toy` 690 and 634; `names-quick` 2,234
and 2,073, cut short in one process 2,087; `smollm2-places` 8,626 and 6,907, cut short in one process; `names` 2,746 and
2,470, measured when a training's state was still copied whole before it was written (2,410 now in the first process).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from relearn_lens import sources
from relearn_lens.runs.presets import FOR_A_GPU, PRESETS, preset
from relearn_lens.runs.settings import Experiment

BASELINE_MB = 515
"""Resident after the imports of a run, measured with torch 2.13 on Linux x86-64 without CUDA."""

COPIES = 6
"""Of the weights before anything is grafted, as the sum above counts them."""

KNOWN = 0.9
"""Share of what is resident that the sum knows of."""

REPORT_MB = 8
"""What the page of a run takes at most."""

LATER_MB = 60
"""What a run imports, and small things it makes, once model and text are there."""

_MB = 2**20


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that its needs follow from."""

    layers: int
    d_model: int
    heads: int
    parameters: int
    vocabulary: int = 0

    @property
    def bytes(self) -> int:
        """Its weights in float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Text:
    """The sizes of a text: its longest sentence in sub-words, its labels, and megabytes while it is read."""

    longest: int
    labels: int
    megabytes: int


SHAPES: dict[str, Shape] = {
    "toy": Shape(4, 32, 2, 36_000),
    "minilm": Shape(6, 384, 12, 22_713_216),
    "smollm2": Shape(30, 576, 9, 134_515_008, 49_152),
    "distilbert-base-cased": Shape(6, 768, 12, 65_190_912),
    "distilgpt2": Shape(6, 768, 12, 81_912_576, 50_257),
    "gpt2": Shape(12, 768, 12, 124_439_808, 50_257),
    "bert-base-cased": Shape(12, 768, 12, 108_310_272),
}
"""Models by name, from their published config.json."""

TEXTS: dict[str, Text] = {
    "toy": Text(12, 3, 0),
    "bsb-names": Text(83, 4, 200),
    "hf:eriktks/conll2003": Text(160, 5, 120),
}
"""Texts by name."""

_UNKNOWN_TEXT = Text(128, 5, 100)


@dataclass(frozen=True)
class Estimate:
    """What a run needs; None where it cannot be said."""

    memory_mb: int
    disk_mb: int
    fetch_mb: int
    """What must come over the network first; 0 where all is here."""


def shape_of(model: str) -> Shape | None:
    """The sizes of a model, from `SHAPES` or a local folder's config.json and safetensors; None if neither knows it.

    Raises:
        ValueError: a folder whose config.json is damaged.
    """
    if model in SHAPES:
        return SHAPES[model]
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = [
            next((int(config[key]) for key in keys if key in config), None)
            for keys in (
                ("num_hidden_layers", "n_layers", "n_layer"),
                ("hidden_size", "dim", "n_embd"),
                ("num_attention_heads", "n_heads", "n_head"),
            )
        ]
        layers, width, heads = (size for size in sizes if size is not None)
        vocabulary = int(config.get("vocab_size", 0))
        half = str(config.get("dtype") or config.get("torch_dtype")).endswith("16")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(folder / 'config.json')!r} does not say how large the model is ({type(error).__name__}: {error}); "
            "save the model again with save_pretrained"
        ) from error
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Shape(layers, width, heads, stored // (2 if half else 4), vocabulary)


def estimate(experiment: Experiment) -> Estimate | None:
    """What a run with these settings needs of memory and disk; None for a model whose size is not known here.

    Raises:
        ValueError: as `shape_of`.
    """
    shape = shape_of(experiment.model)
    if shape is None:
        return None
    text = TEXTS.get(experiment.corpus, _UNKNOWN_TEXT)
    token = _token_bytes(shape, text.longest)
    batch = max(experiment.finetune.batch_size, experiment.retrain.batch_size)
    training = batch * text.longest * (shape.layers * token + _logit_bytes(experiment, shape))
    wants = experiment.measure
    measuring = 0.0
    if {"conductance", "layer_ig"} & set(wants.what):
        measuring = wants.sentences * wants.steps * text.longest * shape.layers * token
    if "top_words" in wants.what:  # a table of word types by neurons
        measuring = max(measuring, 4.0 * 5000 * (shape.layers + 1) * shape.d_model)
    if "auroc" in (experiment.score, *wants.what):  # every word, where a sentence is a quarter of the longest
        n_words = experiment.data.probe_sentences * text.longest / 4
        measuring = max(measuring, 4.0 * n_words * (shape.layers + 1) * shape.d_model)
    measuring = min(measuring, wants.max_memory * _MB)
    copies = _copies(experiment)
    memory = BASELINE_MB + LATER_MB + text.megabytes + (copies * shape.bytes + training + measuring) / _MB
    return Estimate(math.ceil(memory / KNOWN), _disk(experiment, shape, text), _fetch(experiment, shape))


def _copies(experiment: Experiment) -> float:
    """Copies of the weights that there are at most, half ones in bfloat16 too, which `auto` may mean."""
    arms, copies = experiment.arms, COPIES + 0.5 * (experiment.precision != "float32")
    if experiment.grafts.skip or "concept" not in arms or experiment.retrain.lora_rank:
        return copies
    return copies + 1 + 2 * ("random" in arms) + ("unpruned" in arms)


def removal_mb(
    shape: Shape,
    *,
    moving: int,
    half: bool = False,
    adapters: bool = False,
    batch: int,
    longest: int,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Megabytes that removing takes at most, by what takes them; of weights in 32 bits, or in 16 (`half`).

    `moving` counts the entries of all weights of which some may move, or of `adapters` beside them. Each has a gradient
    in the weights' bytes, two moments, a copy of the weight from which its still entries are put back, and of weights
    in 16 bits one in float32, with a copy too. What stands still has its weight alone. `batch` sentences of what is
    forgotten, and as many of what is retained, go through the model at once, of at most `longest` tokens.
    """
    size = 2 if half else 4
    token = _token_bytes(shape, longest) * size / 4
    layers = shape.layers * (size * shape.d_model if checkpointing else token) + (token if checkpointing else 0)
    items = {
        "weights": shape.parameters * size + (moving * size if adapters else 0),
        "what moves": moving * (size + 8 + size + (8 if half else 0)),
        "a batch": 2 * batch * longest * (layers + 3 * 4 * shape.vocabulary),
    }
    return {"Python": BASELINE_MB, **{name: math.ceil(value / _MB) for name, value in items.items()}}


def _token_bytes(shape: Shape, longest: int) -> int:
    """Activations of one token in one layer, in sentences of so many tokens."""
    return 68 * shape.d_model + 10 * shape.heads * longest


def _logit_bytes(experiment: Experiment, shape: Shape) -> int:
    """Of one token: logits, their probabilities and the gradient, over the whole vocabulary of a language model."""
    return 3 * 4 * shape.vocabulary if experiment.task == "next_token" else 0


def fitted(
    experiment: Experiment, shape: Shape, *, taken_mb: float | int, longest_train: int, longest_read: int
) -> tuple[Experiment, list[str]]:
    """The settings with batches and chunks small enough for `max_memory`, and what was decided, in words.

    `taken_mb` is taken already, with one copy of the weights in it; `longest_train` is the longest piece to train on,
    `longest_read` the longest of all, in tokens. Batches keep their size: they go through the model in more parts
    (`accumulate`), for the same gradient but for dropout's draws.

    Raises:
        ValueError: not even one piece at a time fits.
    """
    if experiment.max_memory is None:
        return experiment, []
    copies = _copies(experiment)
    fixed = taken_mb + LATER_MB + (copies - 1) * shape.bytes / _MB
    room = (KNOWN * experiment.max_memory - fixed) * _MB
    layer, reading = (_token_bytes(shape, n) for n in (longest_train, longest_read))
    logits = _logit_bytes(experiment, shape)
    piece = longest_train * (shape.layers * layer + logits)
    token = 2 * reading + logits  # nothing is kept for a backward pass: one layer and what it becomes
    need = max(piece, longest_read * token, _MB)
    if room < need:
        raise ValueError(
            f"max_memory={experiment.max_memory:g} MB is too little: this run needs "
            f"{(fixed + need / _MB) / KNOWN:,.0f} MB even with one sentence at a time "
            f"({fixed:,.0f} MB of it for Python and {copies:g} copies of {shape.parameters:,} weights); "
            "give it more, or use a smaller model"
        )
    groups = {}
    for name in ("finetune", "retrain"):
        training = getattr(experiment, name)
        parts = max(training.accumulate, -(-training.batch_size // int(room // piece)))
        groups[name] = training.model_copy(update={"accumulate": parts})
    measuring = experiment.measure
    tokens = max(16, min(measuring.max_tokens, int(room // token)))
    megabytes = min(measuring.max_memory, max(1, int(room // _MB)))
    groups["measure"] = measuring.model_copy(update={"max_tokens": tokens, "max_memory": megabytes})
    hint = (
        f"max_memory={experiment.max_memory:g} MB: about {fixed:,.0f} MB are taken whatever the batches; accumulate="
        f"{groups['finetune'].accumulate} in fine-tuning and {groups['retrain'].accumulate} in retraining, "
        f"measure.max_tokens={tokens:,}, measure.max_memory={megabytes:g}"
    )
    return experiment.model_copy(update=groups), [hint]


def _disk(experiment: Experiment, shape: Shape, text: Text) -> int:
    """Megabytes of the run folder at its largest."""
    neurons = (shape.layers + 1) * shape.d_model * (4 if experiment.site.startswith("mlp") else 1)
    return math.ceil(disk_bytes(experiment, weights=shape.bytes, neurons=neurons, classes=text.labels) / _MB)


def disk_bytes(experiment: Experiment, *, weights: int, neurons: int, classes: int) -> int:
    """Bytes of disk that a run takes at most at one time, from the sizes of the model and of the results."""
    arms = len(experiment.arms) + len(experiment.arm)
    seeds, stages = len(experiment.seeds), experiment.retrain.n_stages
    kept = {"none": 0, "last": arms * seeds, "all": arms * seeds * (stages + 1)}[experiment.keep]
    # Of one seed, the concept's arm and those of one's own at two stages; its controls too, or at every one where other
    # processes may be ahead of it.
    controls = len({"random", "unpruned"} & {*experiment.arms}) * (2 if experiment.workers == 1 else max(2, stages))
    grafted = 2 + controls + 2 * len(experiment.arm)
    if experiment.grafts.skip or "concept" not in experiment.arms:
        grafted = 0
    grafted += "never" in experiment.arms
    # Per neuron and stage: mean and spread of every class in float64, and a few scores and indices in float32.
    numbers = 2 * seeds * (arms + 1) * (stages + 2) * neurons * (16 * classes + 4 * 12)
    # The base of every seed, one training's weights with two moments each, and the file that is about to replace it.
    return weights * (seeds + 2 * 3 + kept + grafted) + numbers + REPORT_MB * 2**20


def _fetch(experiment: Experiment, shape: Shape) -> int:
    """Megabytes to fetch first: archives of sources that are not in the cache, models and texts of the hub."""
    total = 0.0
    for name in {experiment.model, experiment.corpus, experiment.probe_corpus} & set(sources.SOURCES):
        total += 0 if sources.is_cached(name) else sources.SOURCES[name].size
    model = experiment.model
    if model not in ("toy", *sources.SOURCES) and not Path(model).expanduser().is_dir() and not _on_hub_cache(model):
        total += shape.bytes
    name = experiment.corpus.removeprefix("hf:")
    if name != experiment.corpus and not Path(name).expanduser().is_dir() and not _on_hub_cache(name, "datasets"):
        total += 5 * _MB
    return math.ceil(total / _MB)


def _on_hub_cache(name: str, kind: str = "models") -> bool:
    """Whether the hub's own cache holds something of that name."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return (cache / f"{kind}--{name.replace('/', '--')}" / "snapshots").is_dir()


def memory_mb(root: Path = Path("/")) -> int | None:
    """Memory that a new process can have on this machine: what is free, within the limits of container and shell.

    None where the system does not say.
    """
    limits = [n for n in (_free(root), _cgroup(root), _rlimit()) if n is not None]
    return min(limits) // _MB if limits else None


def _free(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # all of it, where what is free is not said
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup(root: Path) -> int | None:
    """What a container's limit leaves, by cgroups of version 2 or 1."""
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int((root / folder / limit).read_text())  # "max" is no number: no limit
            return max(0, most - int((root / folder / used).read_text()))
        except (OSError, ValueError):
            continue
    return None


def _rlimit() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if most == resource.RLIM_INFINITY else most


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (2**20 bytes)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # Not getrusage where there is a choice: on Linux a new process inherits its parent's peak there.
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset / _MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


HEADER = ["preset", "memory needed", "there is", "disk needed", "free", "verdict"]


def doctor_rows(
    *,
    out: Path = Path("runs"),
    has_mb: int | None = None,
    has_gpu: bool = True,
    presets: Mapping[str, Any] = PRESETS,
) -> list[list[str]]:
    """A row of `HEADER` for each preset: whether this machine can run it, in plain words.

    `out` is where run folders would lie; `has_mb` is the memory to judge by, by default this machine's. Without a GPU
    it is said which presets are sized for one.
    """
    has = memory_mb() if has_mb is None else has_mb
    place = out.absolute()
    disk = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free // _MB
    rows = []
    for name, experiment in ((name, preset(name)) for name in presets):
        need = estimate(experiment)
        says = f"the size of model {experiment.model!r} is not known before it is fetched"
        if need is not None:
            says = verdict(need, has, disk, slow=name in FOR_A_GPU and not has_gpu)
        memory, room = (None, None) if need is None else (need.memory_mb, need.disk_mb)
        rows.append([name, *map(_said, (memory, has, room, disk)), says])
    return rows


def verdict(need: Estimate, has_mb: int | None, disk_mb: int, *, slow: bool = False) -> str:
    """Whether a run fits, in plain words; `slow` if it is sized for a GPU and there is none."""
    if has_mb is not None and need.memory_mb > has_mb:
        return f"does not fit: needs about {need.memory_mb:,} MB of memory, there are {has_mb:,} MB"
    if need.disk_mb + need.fetch_mb > disk_mb:
        return f"does not fit: needs about {need.disk_mb + need.fetch_mb:,} MB of disk, there are {disk_mb:,} MB"
    fetch = f", after a fetch of {need.fetch_mb:,} MB" if need.fetch_mb else ""
    return f"runs here{fetch}" + (", but on the CPU: it is sized for a GPU, and here is none" if slow else "")


def _said(megabytes: int | None) -> str:
    return "?" if megabytes is None else f"{megabytes:,} MB"
