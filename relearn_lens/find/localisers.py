"""The localisers that are known by name, told once."""

from __future__ import annotations

from typing import Any

from relearn_lens import methods
from relearn_lens.find.circuits import PathPatching
from relearn_lens.find.controls import AllMLPs, Everything, RandomMLPs, RandomNeurons
from relearn_lens.find.layers import LayerDistance
from relearn_lens.find.learned import LearnedMask
from relearn_lens.find.localising import Localiser, Text
from relearn_lens.find.lookups import Lookup
from relearn_lens.find.saliency import Saliency
from relearn_lens.find.scored import AttributionPatching, ByScore
from relearn_lens.find.tracing import CausalTracing
from relearn_lens.models.model import Model, bridge_of
from relearn_lens.names import explained, known_name
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.text.concept import Concept

LOCALISERS: dict[str, type[Localiser]] = {
    kind.name: kind
    for kind in (
        ByScore,
        AttributionPatching,
        CausalTracing,
        PathPatching,
        Lookup,
        LayerDistance,
        LearnedMask,
        RandomNeurons,
        RandomMLPs,
        AllMLPs,
        Everything,
    )
}
"""Localisers by name. Each has `name`, `formula`, `source`, `gives` and, with unit and origin, `model_fields`."""


@explained
def locate(
    model: Model,
    text: Text | None,
    localiser: str | Localiser,
    *,
    concept: Concept | None = None,
    seed: int = 0,
    **fields: Any,
) -> Saliency | WeightMask:
    """Where a model holds some facts, or a concept of a text: by a localiser's name and fields, or by a localiser.

    Raises:
        ValueError: an unknown name or field, and as the localiser says; before any work.
    """
    bridge_of(model)  # says what is none
    return localiser_of(localiser, **fields)(model, text, concept=concept, seed=seed)


def localiser_of(localiser: str | Localiser, **fields: Any) -> Localiser:
    """A localiser by name, or as it is, with some of its fields changed.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    if not isinstance(localiser, str):
        return methods.of(type(localiser), localiser, fields)
    return methods.of(LOCALISERS[known_name("localiser", localiser, LOCALISERS)], None, fields)
