"""All ways back by name, and the strongest of several that leave the model usable."""

from __future__ import annotations

from relearn_lens.relearn.attack import Attack
from relearn_lens.relearn.compression import Pruned, Quantised
from relearn_lens.relearn.finetuning import Benign, FineTune, General, Gibberish, RepairThenRelearn, RetainOnly

ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind
    for kind in (
        FineTune, RepairThenRelearn, RetainOnly, General, Gibberish, Benign, Quantised, Pruned,
    )
}  # fmt: skip
"""Attacks by name. Each has `name`, `does`, `source` and, with unit and origin, `model_fields`."""
