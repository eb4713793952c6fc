"""How time and memory grow: with the length of the text, layers, width, classes and arms, as fitted exponents."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models import toy
from relearn_lens.neurons.streaming import class_stats
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.presets import settings_of
from relearn_lens.text.concept import Classes
from relearn_lens.text.conll import read_conll
from relearn_lens.text.encoding import encode


def _exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _shortest(side: Callable[[], object], rounds: int = 3) -> float:
    found = []
    side()
    for _ in range(rounds):
        began = time.perf_counter()
        side()
        found.append(time.perf_counter() - began)
    return min(found)


def _bridge(layers: int, d_model: int) -> TransformerBridge:
    config = TransformerBridgeConfig(
        d_model=d_model, d_head=32, n_layers=layers, n_heads=d_model // 32, n_ctx=64, d_vocab=500, d_mlp=4 * d_model,
        act_fn="gelu", architecture="TransformerLensNative", seed=0,
    )  # fmt: skip
    bridge: Any = TransformerBridge.boot_native(config)  # pyright: ignore[reportAttributeAccessIssue]
    bridge.eval()
    return bridge


def growth() -> None:
    """The saliency pass over a native model: time against size, one thing at a time, and the exponent of each."""
    tokenizer = toy.tagger().tokenizer
    text = toy.corpus(sentences=400)

    def seconds(layers: int = 4, d_model: int = 256, times: int = 1, classes: int = 4) -> float:
        corpus = text.take(np.tile(np.arange(text.n_sentences), times))
        bridge, encoded = _bridge(layers, d_model), encode(corpus, tokenizer, context=64)
        of_word = np.arange(corpus.n_words) % classes
        cut = Classes(tuple(map(str, range(classes))), of_word, np.arange(classes) == 0)
        return _shortest(lambda: class_stats(bridge, encoded, cut))

    for what, key, sizes in (
        ("length of the text", "times", (1, 2, 4)),
        ("layers", "layers", (2, 4, 8)),
        ("width", "d_model", (128, 256, 512)),
        ("classes", "classes", (2, 8, 32)),
    ):
        took = [seconds(**{key: size}) for size in sizes]
        said = ", ".join(f"{size}: {s:.2f} s" for size, s in zip(sizes, took, strict=True))
        print(f"saliency pass against {what} ({said}): exponent {_exponent(sizes, took):.2f}")

    def arms(seeds: int) -> float:
        experiment = settings_of("toy", {"seeds": list(range(seeds))})
        began = time.perf_counter()
        list(perform(experiment))
        return time.perf_counter() - began

    arms(1)
    sizes = (1, 2, 4)
    took = [arms(size) for size in sizes]
    said = ", ".join(f"{3 * size}: {s:.1f} s" for size, s in zip(sizes, took, strict=True))
    print(f"the toy run against arms ({said}): exponent {_exponent(sizes, took):.2f}")


def ten_million_words(words: int = 10_000_000) -> None:
    """Bytes that a corpus of ten million words holds, read from a CoNLL file; the process's growth beside it."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.conll"
        with path.open("w", encoding="utf-8") as file:
            for begin in range(0, words, 1_000_000):
                kinds = rng.zipf(1.3, min(1_000_000, words - begin)) % 100_000
                place = rng.random(len(kinds)) < 0.1
                ends = np.arange(1, len(kinds) + 1) % 25 == 0
                rows = zip(kinds.tolist(), place.tolist(), ends.tolist(), strict=True)
                file.writelines(f"w{k} {'B-place' if p else 'O'}\n" + "\n" * e for k, p, e in rows)
        size, before = path.stat().st_size, resident_mb()
        began = time.perf_counter()
        corpus = read_conll(path)
        seconds = time.perf_counter() - began
    arrays = sum(value.nbytes for value in vars(corpus).values() if isinstance(value, np.ndarray))
    strings = sum(sys.getsizeof(word) + 8 for word in corpus.vocab)
    print(
        f"{corpus.n_words:,} words in {corpus.n_sentences:,} sentences: {arrays / 2**20:.0f} MB of arrays and "
        f"{strings / 2**20:.0f} MB of distinct words (goal: within 200 MB); the process grew by "
        f"{resident_mb() - before:,.0f} MB; read in {seconds:.0f} s from {size / 2**20:.0f} MB"
    )


def resident_mb() -> float:
    """Memory that this process holds now, in MB; 0 where /proc does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


if __name__ == "__main__":
    growth()
    ten_million_words()
