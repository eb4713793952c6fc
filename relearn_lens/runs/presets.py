"""The presets, and every way to say what differs from one: a TOML file, `--set`, and Python.

Imports nothing heavy, so the command line can check a user's settings at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relearn_lens.runs.settings import PROTOCOLS, Experiment, as_group, experiment, merged

_QUICK: dict[str, Any] = {
    "data": {"train_sentences": 250, "validation_sentences": 120, "probe_sentences": 120},
    "prune": {"fraction": 0.3, "control_draws": 2},
    "finetune": {"epochs": 2, "lr": 2e-4, "batch_size": 8},
    "retrain": {"epochs": 2, "batch_size": 8},
    "measure": {"sentences": 16, "steps": 6},
}

_NEXT_TOKEN: dict[str, Any] = {
    "task": "next_token",
    "model": "smollm2",
    "site": "mlp_post",
    # Raw differences of means find the few neurons with huge activations, without which nothing works at all.
    "score": "dprime",
    "contrast": "rest",
    "data": {
        "train_sentences": 240, "validation_sentences": 80, "probe_sentences": 80, "labelled_only": False,
        "concept_share": 0.5,
    },
    "prune": {"fraction": 0.01, "control_draws": 1},
    "finetune": {"epochs": 1, "lr": 1e-4, "batch_size": 8, "prior_bias": False},
    "retrain": {"epochs": 1, "every": 0.5, "lr": 1e-4, "batch_size": 8},
    "measure": {"what": ["probeless", "conductance", "top_words"], "sentences": 6, "steps": 4, "shuffles": 19},
}  # fmt: skip

FOR_A_GPU = frozenset({"lo2024", "smollm2-places-gpu"})
"""Presets that are sized for a GPU."""

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": (
        "MiniLM and named entities of the New Testament, concept place; about 8 minutes on 2 cores",
        {},
    ),
    "names-quick": (
        "the same with a quarter of the text and 30 % pruned; about 2 minutes",
        _QUICK,
    ),
    "names-seeds": (
        "names-quick with three training seeds: intervals and verdicts on what training did; about 7 minutes",
        {**_QUICK, "seeds": [0, 1, 2]},
    ),
    "lo2024": (
        "Lo et al. 2024: DistilBERT (--model distilgpt2, gpt2), CoNLL-2003, concept LOC; for a GPU",
        {
            "model": "distilbert-base-cased",
            "corpus": "hf:eriktks/conll2003",
            "concept": "LOC",
            "contrast": "rest",
            "seeds": [0, 1, 2],
            "data": {
                "train_sentences": 1_000_000,
                "validation_sentences": 1_000_000,
                "probe_sentences": 1_000_000,
                "labelled_only": False,
                "concept_share": None,
            },
            "finetune": {"epochs": 3, "lr": 2e-5, "batch_size": 8, "prior_bias": False},
            "retrain": {"epochs": 8, "every": 2, "restart": True, "lr": 2e-5, "batch_size": 8},
            "measure": {"everywhere": True},
        },
    ),
    "smollm2-places": (
        "SmolLM2-135M predicts the next token of the New Testament, concept place; sized for 15 minutes on 2 cores",
        _NEXT_TOKEN,
    ),
    "smollm2-places-gpu": (
        "the same on all of the text, with three seeds, in bfloat16; for a GPU",
        {
            **_NEXT_TOKEN,
            "seeds": [0, 1, 2],
            "precision": "bfloat16",
            "data": {
                "train_sentences": 4000,
                "validation_sentences": 1000,
                "probe_sentences": 1000,
                "labelled_only": False,
                "concept_share": None,
            },
            "prune": {"fraction": 0.01, "control_draws": 10},
            "finetune": {"epochs": 2, "lr": 1e-4, "batch_size": 32, "prior_bias": False},
            "retrain": {"epochs": 3, "every": 0.25, "lr": 1e-4, "batch_size": 32},
            "measure": {"what": ["probeless", "auroc", "conductance", "top_words", "similarity"], "sentences": 200},
        },
    ),
    "toy": (
        "a planted concept in a toy model, no download; seconds",
        {
            "model": "toy",
            "corpus": "toy",
            "site": "mlp_post",
            "threads": 1,
            "data": {"train_sentences": 300, "validation_sentences": 150, "probe_sentences": 150},
            "prune": {"fraction": 4 / 256},
            "finetune": {"epochs": 1, "prior_bias": False},
            "retrain": {"epochs": 1.5, "every": 0.5, "lr": 1e-3},
        },
    ),
    "toy-next-token": (
        "a toy language model learns the toy's text, concept place, no download; seconds",
        {
            "task": "next_token",
            "model": "toy",
            "corpus": "toy",
            "site": "mlp_post",
            "score": "dprime",
            "contrast": "rest",
            "threads": 1,
            "data": {"train_sentences": 300, "validation_sentences": 150, "probe_sentences": 150},
            "prune": {"fraction": 0.1},
            "finetune": {"epochs": 12, "lr": 3e-3, "prior_bias": False},
            "retrain": {"epochs": 3, "every": 0.5, "lr": 1e-3},
        },
    ),
}
"""Preset name to what it is and what it changes of the defaults."""


def preset(name: str) -> Experiment:
    """A preset by name.

    Raises:
        ValueError: there is no such preset.
    """
    return experiment(_preset(name))


def settings_of(
    source: str | Path = "names", changes: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Experiment:
    """Settings from a preset's name or a TOML file, then `changes`, then `key.path=value` strings, each over the last.

    A TOML file may name the preset it starts from: `preset = "names"`. A file that a run wrote holds every field; those
    that are what the file's own protocol says follow a protocol given after it.

    Raises:
        FileNotFoundError: no preset of that name, and no such file.
        ValueError: an unknown key or a value out of range; one line for each.
    """
    path = Path(source)
    if str(source) in PRESETS:
        values = _preset(str(source))
    elif path.suffix == ".toml" or path.exists():
        values = _from_file(path)
    else:
        raise ValueError(
            f"unknown preset {str(source)!r}; known: {', '.join(PRESETS)} (a file of settings ends in .toml)"
        )
    values = _without_protocol(values)
    for key, value in (changes or {}).items():
        if value is not None:
            values = _put(values, key, value)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r}: write key=value, such as prune.fraction=0.3")
        if key.count(".") > 4:
            raise ValueError(f"--set {text[:60]!r}: a key has one dot at most, such as prune.fraction")
        values = _put(values, key.strip(), _value(value.strip(), optional=key.strip().split(".")[-1] in _OPTIONAL))
    return experiment(values)


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name][1]


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {str(path)!r}, and no preset of that name ({', '.join(PRESETS)})")
    try:
        values = _text_as_none(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise ValueError(f"{str(path)!r} is not valid TOML: {error}") from error
    return merged(_preset(str(values.pop("preset"))), values) if "preset" in values else values


def _without_protocol(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that their own protocol gives anyway."""
    under = PROTOCOLS.get(str(values.get("protocol", "corrected")), {})
    left = dict(values)
    for group, names in under.items():
        given = as_group(group, left.get(group))
        if isinstance(given, Mapping):
            left[group] = {k: v for k, v in given.items() if k not in names or names[k] != v}
    return left


def _text_as_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _text_as_none(v) if isinstance(v, Mapping) else None if v == "none" and k in _OPTIONAL else v
        for k, v in values.items()
    }


_OPTIONAL = {"concept_share", "threads", "probe_corpus", "probe_concept", "lora_rank", "max_memory"}
"""The settings that may be none."""


def _put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The values with one more, at a dotted key."""
    first, _, rest = key.partition(".")
    inner = as_group(first, values.get(first))
    if not rest:
        value = as_group(key, value)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        return {**values, first: {**inner, **value} if both else value}
    return {**values, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _value(text: str, *, optional: bool) -> Any:
    """A value as TOML would read it; what TOML does not read is a string, and `none` is None where a setting may be."""
    if optional and text.lower() == "none":
        return None
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return values["value"] if len(values) == 1 else text
