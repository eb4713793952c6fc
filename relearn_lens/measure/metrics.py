"""The metrics of facts that are known by name, told once, and several of them measured together."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from relearn_lens.measure.asking import Asked, Metric, OfAnswers, Reference, read_answers
from relearn_lens.measure.depth import UnlearningDepth
from relearn_lens.measure.evaluation import Scores
from relearn_lens.measure.extraction import (
    Accuracy,
    Choice,
    ExtractionStrength,
    Familiarity,
    Loss,
    Probability,
    TruthRatio,
)
from relearn_lens.measure.geometry import Moved, Rank, Returned
from relearn_lens.measure.inside import KnownInside
from relearn_lens.measure.utility import Repetition
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import known_name

METRICS: dict[str, type[Metric]] = {
    kind.name: kind
    for kind in (
        Accuracy, Loss, Choice, Probability, TruthRatio, Familiarity, ExtractionStrength, UnlearningDepth, KnownInside,
        Moved, Rank, Returned, Repetition,
    )
}  # fmt: skip
"""Metrics by name. Each has `name`, `unit`, `formula`, `source` and, with unit and origin, `model_fields`."""
USUAL = ("accuracy", "loss", "extraction")
"""What is measured unless something else is asked for: all from one reading of the answers."""


def metric_of(metric: str | Metric) -> Metric:
    """A metric by its name, or itself.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(metric, Metric):
        return metric
    return METRICS[known_name("metric", metric, METRICS)]()


def checked(metrics: Iterable[str | Metric], reference: Reference | None, model: LanguageModel) -> tuple[Metric, ...]:
    """Metrics, with all that they need.

    Raises:
        ValueError: an unknown name, none, two of one name, or a reference that is missing or is the model itself.
    """
    made = tuple(metric_of(metric) for metric in metrics)
    names = [metric.name for metric in made]
    if not made or len(set(names)) < len(names):
        raise ValueError(f"metrics need at least one, and each name once; got {names}")
    for metric in made:
        if metric.needs:
            (reference or Reference()).need(*metric.needs, by=metric.name)
    if reference is not None and any(other is model for other in (reference.base, reference.never)):
        raise ValueError(
            "the reference is the model itself, which changes while it is trained; load the base and the twin as "
            "models of their own"
        )
    return made


def measured(
    model: LanguageModel, questions: Asked, metrics: Iterable[Metric], reference: Reference | None = None
) -> dict[str, Scores]:
    """Each metric's scores by name; those of the tokens of answers from one reading."""
    read = cache(lambda: read_answers(model, questions.passages))
    return {
        each.name: each.of(read(), questions)
        if isinstance(each, OfAnswers)
        else each(model, questions, reference=reference)
        for each in metrics
    }
