"""What a run yields as it goes: each result as it comes, and what an earlier process may have left of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.measure.vectors import WordVectors
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import Encoded

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Prepared:
    """Everything loaded and checked, before any training."""

    experiment: Experiment
    """The settings, with what depends on the model's family decided."""
    tagger: Model
    """The model that is trained: a tagger, or a language model."""
    site: Site
    concept: Concept
    train: Encoded
    validation: Encoded
    probe: Encoded
    notes: tuple[str, ...]
    """What the user should know: sentences cut, words lost, what was decided by the model's family."""
    inputs: Mapping[str, str]
    """Hash of every input."""


@dataclass(frozen=True)
class Base:
    """The fine-tuned base model of one seed, measured, and the neurons that were chosen there."""

    seed: int
    weights: Mapping[str, Tensor]
    snapshot: Snapshot
    chosen: Neurons
    vectors: WordVectors
    """Word vectors from the base model's input embeddings: what concept similarity compares top words by."""


@dataclass(frozen=True)
class Damage:
    """What pruning alone does to the base model: the concept's neurons, and random sets of the same size per layer."""

    seed: int
    concept: Any
    """`Scores`"""
    random: tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """One stage of one arm was measured."""

    arm: str
    seed: int
    stage: str
    snapshot: Snapshot


@dataclass(frozen=True)
class Paused:
    """A training stands at a pause. What is here is enough to go on from it; no copies."""

    training: str
    """`"base"`, the name of an arm, or `"never-fine"` for the fine-tuning of the arm that never had the concept."""
    seed: int
    at: Checkpoint
    weights: Mapping[str, Tensor]
    """Of the model; of an arm that is retrained by adapters, `lora.adapter_weights`."""
    state: Mapping[str, Tensor]
    """Of the optimiser: `Training.state`."""


@dataclass(frozen=True)
class Arm:
    """One arm of one seed is done."""

    trajectory: Trajectory
    weights: Mapping[str, Tensor] | None
    """The model's weights as they are now, no copies; None for an arm that an earlier process finished."""


Event = Prepared | Base | Damage | Measured | Paused | Arm


@runtime_checkable
class Kept(Protocol):
    """What an earlier process of the same run left."""

    def base(self, seed: int, site: Site) -> tuple[dict[str, Tensor], Snapshot] | None:
        """Weights and measurement of a seed's base model."""

    def damage(self, seed: int) -> Damage | None:
        """The random draws' damage of a seed."""

    def arm(self, name: str, seed: int, site: Site) -> Trajectory | None:
        """A finished arm."""

    def stages(self, arm: str, seed: int) -> dict[str, Snapshot]:
        """The measured stages of an unfinished arm."""
        ...

    def state(self, training: str, seed: int) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]] | None:
        """Last pause, weights and optimiser state of an unfinished training."""
