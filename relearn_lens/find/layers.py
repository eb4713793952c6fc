"""Layers at which what a model would answer and what it is to answer lie farthest apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, statements
from relearn_lens.find.patching import Prompts
from relearn_lens.models.model import LanguageModel, Model, reading
from relearn_lens.neurons.sites import component_site, kept, ordered
from relearn_lens.neurons.weights import WeightMask, output_matrices
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Passage, refused


class LayerDistance(Localiser):
    """The block after which the answer and a refusal in its place lie farthest apart; its MLP's output matrix.

    Distances are between the means of h_l over the tokens of each answer alone, the prompt left out as in the released
    code, and means over passages. h_l grows with depth, and the raw distance with it, so by default it is divided by
    the mean length of the two. Source: Wang et al. 2024 (DINM), whose distance is raw.
    """

    name: ClassVar[str] = "layer_distance"
    formula: ClassVar[str] = "argmax_l |h_l(answer) - h_l(refusal)| / |h_l|"
    source: ClassVar[str] = "Wang et al. 2024 (DINM)"

    normalised: bool = Field(default=True, description="divide by the length of the hidden states (ours)")
    against: Literal["refusal", "choice"] = Field(
        default="refusal", description="what stands in the place of the answer: a refusal, or another of the choices"
    )
    layers: int = Field(default=1, ge=1, le=10_000, description="blocks taken, those of the largest distance")

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> WeightMask:
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        passages = statements(facts)
        if self.against == "refusal":
            others = refused(passages, seed=seed)
        else:
            if lone := [p for p in passages if len(p.choices) < 2]:
                raise ValueError(
                    f"against = 'choice': {lone[0].prompt[:60]!r} has no other choice; use against='refusal'"
                )
            others = tuple(replace(p, answer=next(c for c in p.choices if c != p.answer)) for p in passages)
        distance = layer_distance(model, passages, others)
        by_layer = distance.normalised if self.normalised else distance.raw
        if self.layers > len(by_layer):
            raise ValueError(f"layers = {self.layers}: this model has {len(by_layer)} blocks")
        best = output_matrices(model, ordered(by_layer)[: self.layers].tolist())
        return WeightMask.of_parts(model, "output matrices", among={"output matrices": best})


@dataclass(frozen=True, eq=False)
class Distance:
    """How far apart two answers lie after every block."""

    raw: Float[Tensor, " block"]
    """In activation units."""
    normalised: Float[Tensor, " block"]
    """Over the mean length of the two hidden states; no unit."""


def layer_distance(model: LanguageModel, passages: tuple[Passage, ...], others: tuple[Passage, ...]) -> Distance:
    """How far apart the hidden states of two answers to the same prompts lie after every block, mean over passages.

    Raises:
        ValueError: as `Prompts`.
    """
    one, other = (_answer_states(Prompts(model, each, "logprob")) for each in (passages, others))
    gap = (one - other).norm(dim=-1)
    length = (one.norm(dim=-1) + other.norm(dim=-1)) / 2
    return Distance(gap.mean(1), (gap / length).mean(1))


def _answer_states(prompts: Prompts) -> Float[Tensor, "block passage d_model"]:
    """The hidden state after every block, mean over the tokens of each answer; float32 on the CPU."""
    model, site = prompts.model, component_site(prompts.model.bridge, "resid")
    states = torch.zeros(len(site.layers), len(prompts.passages), site.width)
    with reading(model), kept(model.bridge, site) as activations:
        for group in prompts.groups():
            batch = prompts.batch(group)
            prompts.values(batch)
            count = batch.sentence.bincount(minlength=len(group)).unsqueeze(1)
            for layer, x in activations.items():
                answers = x.float().flatten(0, 1)[batch.subword]
                sums = torch.zeros(len(group), site.width, device=x.device).index_add(0, batch.sentence, answers)
                states[layer, group] = (sums / count).cpu()
    return states
