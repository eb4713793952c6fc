"""What many tests need: small experiments, and settings for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from relearn_lens.runs.events import ArmDone, Event
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import Experiment

TINY: Mapping[str, Any] = {
    "seeds": [0], "other": "person", "data.train_sentences": 64, "data.validation_sentences": 40,
    "data.probe_sentences": 40, "prune.control_draws": 1, "finetune.epochs": 0.5, "finetune.lr": 1e-5,
    "finetune.batch_size": 8, "retrain.steps": [8, 16], "retrain.lr": 3e-3, "retrain.batch_size": 8,
    "measure.draws": 100, "grafts.bands": 2,
}  # fmt: skip
"""What makes a run of the toy take a second or two: one seed, few sentences, two pauses of retraining."""


def tiny(sets: Sequence[str] = (), **changes: Any) -> Experiment:
    """The smallest experiment; `prune__fraction=1` changes `prune.fraction`."""
    return settings_of("toy", {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}, sets)


def arms_in(events: Sequence[Event]) -> dict[str, Any]:
    """Arm name to trajectory, of one seed's events."""
    return {event.trajectory.arm: event.trajectory for event in events if isinstance(event, ArmDone)}


def same(a: Any, b: Any) -> bool:
    """Equal all the way down, NaN with NaN."""
    if isinstance(a, torch.Tensor | np.ndarray):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return alike and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
    if isinstance(a, float):
        return isinstance(b, float) and (a == b or (math.isnan(a) and math.isnan(b)))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and type(b) is (tuple if isinstance(a, list) else type(a)) and all(map(same, a, b))
    return type(a) is type(b) and a == b
