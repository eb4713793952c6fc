"""Ways back: training on, after something was removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from relearn_lens import methods
from relearn_lens.methods import Retraining, Training
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint, Checkpoints, train_
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded


def retrain_(
    model: Model,
    text: Corpus | Encoded,
    how: Training | None = None,
    *,
    seed: int = 0,
    resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
    only: Mapping[str, Bool[Tensor, ...]] | None = None,
    what: str = "retraining",
    **fields: Any,
) -> Checkpoints:
    """Train on after something was removed: `train_` with the model's own cross-entropy, to be measured at each pause.

    Keywords as of `train_`; other fields of `Retraining` by name. Source: Lo et al. 2024, section 4.

    Raises:
        ValueError, FloatingPointError: as `train_`.
    """
    how = methods.of(Retraining, how, fields)
    return train_(model, text, how, seed=seed, resume=resume, only=only, what=what)
