"""The presets, and every way to say what differs from one: a TOML file, `--set`, and Python.

Imports nothing heavy, so the command line can check a user's settings at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relearn_lens.files import path_of, read_toml
from relearn_lens.names import unknown
from relearn_lens.runs.settings import OPTIONAL, PROTOCOLS, Experiment, as_group, experiment, merged

_NEXT_TOKEN: dict[str, Any] = {
    "task": "next_token",
    "model": "smollm2",
    "site": "mlp_post",
    "data": {
        "train_sentences": 160, "validation_sentences": 40, "probe_sentences": 40, "labelled_only": False,
        "concept_share": 0.5,
    },
    "prune": {"fraction": 0.01, "control_draws": 1},
    "finetune": {"epochs": 1, "lr": 1e-4, "batch_size": 8},
    "retrain": {"steps": [1, 2, 4, 8, 16], "lr": 5e-5, "batch_size": 8},
    "measure": {"what": ["dprime", "top_words"], "shuffles": 19, "max_tokens": 4096},
    "grafts": {"bands": 6},
}  # fmt: skip

_TOY: dict[str, Any] = {
    "model": "toy",
    "corpus": "toy",
    "site": "mlp_post",
    "threads": 1,
    "precision": "float32",
    "data": {"train_sentences": 300, "validation_sentences": 150, "probe_sentences": 150},
    "measure": {"max_tokens": 4096},
}
FOR_A_GPU = frozenset({"lo2024", "smollm2-places-gpu"})
"""Presets that are sized for a GPU."""

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": (
        "MiniLM and named entities of the New Testament, concept place, three seeds",
        {},
    ),
    "names-quick": (
        "one seed of it on less text, for half as long, without the arms that verdicts need",
        {
            "seeds": [0],
            "arms": ["concept", "random", "unpruned"],
            "data": {"train_sentences": 450, "validation_sentences": 120, "probe_sentences": 90},
            "prune": {"control_draws": 2},
            "retrain": {"steps": [2, 4, 8, 16, 32]},
            "grafts": {"within": "none"},
            "measure": {"what": ["dprime", "top_words"]},
        },
    ),
    "names-blocked": (
        "names with the return blocked: the block, the heirs, or as many other neurons held while it trains on",
        {"seeds": [0], "block": {"held": ["part", "heirs", "random"]}},
    ),
    "lo2024": (
        "Lo et al. 2024: DistilBERT (--model distilgpt2, gpt2), CoNLL-2003, concept LOC; for a GPU",
        {
            "model": "distilbert-base-cased",
            "corpus": "hf:eriktks/conll2003",
            "concept": "LOC",
            "score": "probeless",
            "precision": "float32",
            "arms": ["concept", "random", "unpruned"],
            "data": {
                "train_sentences": 1_000_000,
                "validation_sentences": 1_000_000,
                "probe_sentences": 1_000_000,
                "labelled_only": False,
                "concept_share": None,
            },
            "prune": {"fraction": 0.5},
            "finetune": {"epochs": 3, "lr": 2e-5, "batch_size": 8, "prior_bias": False},
            "retrain": {
                "epochs": 8, "every": 2, "restart": True, "lr": 2e-5, "batch_size": 8, "schedule": "linear",
                "warmup": 0,
            },
            "measure": {"on": "validation", "everywhere": True, "dear": "all", "max_tokens": 4096},
        },
    ),
    "smollm2-places": (
        "SmolLM2-135M predicts the next token of the New Testament, concept place",
        {**_NEXT_TOKEN, "seeds": [0]},
    ),
    "smollm2-places-gpu": (
        "the same on all of the text, with three seeds; for a GPU",
        {
            **_NEXT_TOKEN,
            "data": {
                "train_sentences": 4000, "validation_sentences": 1000, "probe_sentences": 1000,
                "labelled_only": False, "concept_share": None,
            },
            "prune": {"fraction": 0.01, "control_draws": 4},
            "finetune": {"epochs": 2, "lr": 1e-4, "batch_size": 32},
            "retrain": {"steps": [1, 2, 4, 8, 16, 32, 64, 128], "lr": 5e-5, "batch_size": 32},
        },
    ),
    "toy": (
        "a planted concept in a toy model, three seeds, no download",
        {
            **_TOY,
            # Decoys that nothing uses tell places apart as well; what is used has the larger difference of means.
            "score": "probeless",
            "prune": {"fraction": 4 / 256},
            "finetune": {"epochs": 1, "prior_bias": False},
            "retrain": {"steps": [1, 2, 4, 8, 16, 32], "lr": 1e-3},
        },
    ),
    "toy-next-token": (
        "a toy language model learns the toy's text, concept place, three seeds, no download",
        {
            **_TOY,
            "task": "next_token",
            "prune": {"fraction": 0.1},
            "finetune": {"epochs": 12, "lr": 3e-3},
            "retrain": {"steps": [1, 2, 4, 8, 16, 32], "lr": 1e-3},
        },
    ),
}  # fmt: skip
"""Preset name to what it is and what it changes of the defaults."""


def preset(name: str) -> Experiment:
    """A preset by name.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(name, str):
        raise ValueError(f"a preset is told by its name, got a {type(name).__name__}; settings_of() takes more")
    return experiment(_preset(name))


def settings_of(
    source: str | Path | Mapping[str, Any] | Experiment = "names",
    changes: Mapping[str, Any] | None = None,
    sets: str | Sequence[str] = (),
) -> Experiment:
    """Settings from a preset's name, a TOML file, a mapping or other settings, then `changes`, then `key.path=value`
    strings, each over the last.

    A TOML file or a mapping may name the preset it starts from: `preset = "names"`. A file that a run wrote holds every
    field; those that are what the file's own protocol says follow a protocol given after it.

    Raises:
        FileNotFoundError: no preset of that name, and no such file.
        ValueError: what is no settings; an unknown key or a value out of range, one line for each.
    """
    if isinstance(source, Mapping):
        source, changes = source.get("preset", "names"), {**source, **(changes or {}), "preset": None}
    if not isinstance(changes, Mapping | None):
        raise ValueError(
            f"changes are a mapping, such as {{'prune.fraction': 0.3}}, got a {type(changes).__name__}; texts of "
            "key=value are given as sets="
        )
    values = _without_protocol(source.model_dump() if isinstance(source, Experiment) else _named(source))
    for key, value in (changes or {}).items():
        if value is not None:
            values = _put(values, key, value)
    for text in [sets] if isinstance(sets, str) else sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r}: write key=value, such as prune.fraction=0.3")
        if key.count(".") > 4:
            raise ValueError(f"--set {text[:60]!r}: a key has one dot at most, such as prune.fraction")
        values = _put(values, key.strip(), value_of(value.strip(), optional=key.strip() in OPTIONAL))
    return experiment(values)


def _named(source: object) -> dict[str, Any]:
    """What a preset or a file says."""
    path = path_of(source, "a preset's name, a TOML file's path, a mapping or other settings")
    if str(source) in PRESETS:
        return _preset(str(source))
    if path.suffix == ".toml" or path.exists():
        return _from_file(path)
    raise ValueError(f"{unknown('preset', str(source), PRESETS)} (a file of settings ends in .toml)")


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    return PRESETS[name][1]


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {str(path)!r}, and no preset of that name ({', '.join(PRESETS)})")
    values = read_toml(path, _text_as_none)
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


def _text_as_none(values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    return {
        k: _text_as_none(v, f"{k}.") if isinstance(v, Mapping) else None if v == "none" and group + k in OPTIONAL else v
        for k, v in values.items()
    }


def _put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The values with one more, at a dotted key."""
    first, _, rest = key.partition(".")
    inner = as_group(first, values.get(first))
    if not rest:
        return merged(values, {key: value})
    return {**values, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value)}


def value_of(text: str, *, optional: bool = False) -> Any:
    """A value as TOML would read it; what TOML does not read is a string, and `none` is None where a setting may be."""
    if optional and text.lower() == "none":
        return None
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return values["value"] if len(values) == 1 else text
