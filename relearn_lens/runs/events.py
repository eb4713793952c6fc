"""What a run yields as it goes: each result as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from relearn_lens.measure.grafting import Grafts
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.measure.vectors import WordVectors
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import Encoded


@dataclass(frozen=True)
class Prepared:
    """Everything loaded and checked, before any training."""

    experiment: Experiment
    """The settings, with what depends on the model's family and on the text decided."""
    model: Model
    """The model that is trained: a tagger, or a language model."""
    site: Site
    concept: Concept
    other: Concept | None
    """The second concept, whose neurons are cut for comparison; None where the text has none."""
    train: Encoded
    validation: Encoded
    """Sentences on which the size of the cut is found."""
    probe: Encoded
    """Sentences on which neurons are found, and which are scored unless the settings say otherwise."""
    notes: tuple[str, ...]
    """What the user should know: sentences cut, words lost, what was decided by the model's family."""
    inputs: Mapping[str, str]
    """Hash of every input."""
    natural: Encoded | None = None
    """As many sentences as are scored, as they come from the same part of the text; None where the scored ones are."""

    @property
    def scored(self) -> Encoded:
        """The sentences that F1 and margins are measured on."""
        how = self.experiment
        # A probe text of its own may have labels that the model does not know.
        return self.validation if how.measure.on == "validation" or how.probe_corpus is not None else self.probe


@dataclass(frozen=True)
class Dose:
    """One size of a cut, ablated and not trained: what is left of everything."""

    fraction: float
    cut: str
    """Whose neurons: `"concept"`, `"other"` or `"random"`."""
    scores: Any
    """`Scores` on the validation sentences."""


@dataclass(frozen=True)
class Sized:
    """How large a seed's cut is, and the doses that say so."""

    seed: int
    fraction: float
    base: Any
    """`Scores` of the base model on the validation sentences; None where the size was set."""
    doses: tuple[Dose, ...] = ()


@dataclass(frozen=True)
class Base:
    """The fine-tuned base model of one seed, measured."""

    seed: int
    weights: Mapping[str, Tensor]
    snapshot: Snapshot
    vectors: WordVectors
    """Word vectors from the base model's input embeddings: what concept similarity compares top words by."""


@dataclass(frozen=True)
class Cuts:
    """The sets of neurons of one seed: `"concept"`, `"other"` where there is one, and `"random"`."""

    seed: int
    sets: Mapping[str, Neurons]


@dataclass(frozen=True)
class Damage:
    """What cutting alone does to the base model; no training."""

    seed: int
    concept: Any
    """`Scores` without the concept's neurons."""
    other: Any = None
    """Without the other label's; None where there is none."""
    random: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Without random sets, by kind: `"layers"` as many in every layer, from all neurons (the exchangeable null);
    `"disjoint"` the same, but none of the cut; `"scale"` the same, matched on how much each neuron varies."""
    overlap: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Share of each random set that is in the cut too."""
    natural: Any = None
    """`Scores` of the base model, nothing cut, on sentences as they come (`Prepared.natural`), beside which those on
    drawn ones, of which more hold the concept, are to be read."""


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
    """Of the optimiser: `Checkpoints.state`."""


@dataclass(frozen=True)
class Weighed:
    """The weights of an arm at a stage that grafts will be made from; no copies."""

    arm: str
    seed: int
    stage: str
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class ArmDone:
    """One arm of one seed is done."""

    trajectory: Trajectory
    weights: Mapping[str, Tensor] | None
    """The model's weights as they are now, no copies; None for an arm that an earlier process finished."""


@dataclass(frozen=True)
class Grafted:
    """Which parts of the model brought the concept back, at some stages of the concept's arm."""

    seed: int
    stages: Mapping[str, Grafts]
    within: Mapping[str, Grafts] = field(default_factory=dict)
    """By stage, the part that alone brings back most taken apart: a group of blocks into blocks, a block into attention
    and MLP."""


@dataclass(frozen=True)
class GraftedAt:
    """What of `Grafted` was made at one stage; empty where the concept's arm has no such stage."""

    seed: int
    at: str
    """`"first"`, where the concept is first back, or `"end"`."""
    grafted: Grafted


@dataclass(frozen=True)
class Own:
    """Which parts of the model brought the concept back in an arm of one's own, at its end."""

    seed: int
    arm: str
    grafts: Grafts


@dataclass(frozen=True)
class Round:
    """The concept's neurons found and cut once more in a model that it had come back to."""

    neurons: Neurons
    share_old: float
    """Share of them that an earlier cut had taken too."""
    share_by_chance: float
    """The same of neurons drawn at random, as many in every layer."""
    cut: Any
    """`Scores` after the cut."""
    course: Mapping[int, Any]
    """Steps of retraining to `Scores`."""


@dataclass(frozen=True)
class Again:
    """The concept's arm cut again at its end."""

    seed: int
    same: Any
    """`Scores` with the neurons of the first cut cut again."""
    random: tuple[Any, ...]
    """`Scores` with random sets cut, as many in every layer."""
    rounds: tuple[Round, ...]


BACK = 0.9
"""Share of what it was at which a concept counts as back: where grafts are taken first."""


@dataclass(frozen=True)
class Blocked:
    """The concept's arm retrained once more with some weights held where the cut left them."""

    seed: int
    held: str
    """What was held: `"part"`, `"heirs"`, or `"random"`, as many neurons in every layer as there are heirs."""
    course: Mapping[int, Any]
    """Steps of retraining to `Scores`; empty where no part could be said to bring it back."""


@dataclass(frozen=True)
class SeedDone:
    """All of one seed is done."""

    seed: int


Event = (
    Prepared | Base | Sized | Cuts | Damage | Measured | Paused | Weighed | ArmDone | Own | GraftedAt | Grafted
    | Again | Blocked | SeedDone
)  # fmt: skip
