"""Neurons by what they do: by any score of a concept's words, and by what patching them would do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, pairs_of, statements
from relearn_lens.find.patching import Pairs, Prompts
from relearn_lens.find.saliency import SCORES, Saliency, score_many, score_of
from relearn_lens.models.model import LanguageModel, Model, reading
from relearn_lens.neurons.sites import SITES, Site, site_of, streaming
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import Batch
from relearn_lens.text.facts import RETAIN, Facts
from relearn_lens.text.facts.encoded import EncodedPassages

SiteName = Literal["resid", "mlp_post", "attn_head"]


class ByScore(Localiser):
    """Any score of how neurons tell a concept's words from others (`find.saliency.SCORES`).

    Of facts, the words are the tokens that answers are predicted from: those of what is to be forgotten against those
    of what is to stay. Source: as the score's own.
    """

    name: ClassVar[str] = "score"
    formula: ClassVar[str] = "a score of a on the concept's words against all others"
    source: ClassVar[str] = "as the score's own"
    gives: ClassVar[str] = "neurons"

    score: str = Field(default="dprime", description=f"one of {', '.join(SCORES)}")
    site: SiteName = Field(default="mlp_post", description=f"what a neuron is: {', '.join(SITES)}")

    @field_validator("score")
    @classmethod
    def _known(cls, score: str) -> str:
        return score_of(score).name

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> Saliency:
        if isinstance(text, Corpus) and concept is not None:
            encoded = model.encode(text)
        else:
            facts = facts_of(text, concept, name=self.name)
            encoded, concept = _forget_or_retain(language_model(model, self.name), facts), Concept("forget")
        classes = concept.classes(encoded.corpus)
        (saliency,) = score_many(model, encoded, concept, classes, [self.score], site=self.site, seed=seed).values()
        return saliency


@dataclass(frozen=True, eq=False, repr=False)
class _Before(EncodedPassages):
    """Passages that are read on the tokens from which their answers are predicted."""

    def batch(self, pieces: np.ndarray) -> Batch:
        batch = super().batch(pieces)
        return replace(batch, read=batch.read - 1)


def _forget_or_retain(model: LanguageModel, facts: Facts) -> EncodedPassages:
    """The statements of facts as a text of one word each, labelled by whether it is to be forgotten."""
    forget, retain = statements(facts), statements(facts, *RETAIN)
    encoded = Prompts(model, [*forget, *retain], "logprob").encoded
    labels = ["forget"] * len(forget) + ["retain"] * len(retain)
    corpus = build_corpus(
        ([(p.answer, label, True)] for p, label in zip(encoded.passages, labels, strict=True)), name=facts.name
    )
    return _Before(**{**vars(encoded), "corpus": corpus, "passages": encoded.passages})


class AttributionPatching(Localiser):
    """What patching each neuron from a contrasting prompt to the own one would do to the answer, to first order.

    (a_clean - a_corrupt) . dF/da at the contrasting prompt, summed over positions, mean over passages; its size ranks.
    A head's is that of its units together. F is `metric`. Source: Nanda 2023; Syed et al. 2023.
    """

    name: ClassVar[str] = "attribution_patching"
    formula: ClassVar[str] = "|mean of (a_clean - a_corrupt) . dF/da at a_corrupt|"
    source: ClassVar[str] = "Syed et al. 2023"
    gives: ClassVar[str] = "neurons"

    site: SiteName = Field(default="mlp_post", description=f"what a neuron is: {', '.join(SITES)}")
    contrast: str = Field(
        default="auto",
        description="contrasting prompts: swap (another key with another answer), or a form; auto: abc, else swap",
    )
    metric: Literal["auto", "logprob", "logit_difference"] = Field(
        default="auto", description="F: log p of the answer, or its logit less that of the other of two choices"
    )

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> Saliency:
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        pairs = pairs_of(model, facts, self.contrast, self.metric, seed)
        site = site_of(model.bridge, self.site)
        score = attribution_patching(pairs, site)
        return Saliency(score.abs(), self.name, pairs.clean.unit, facts.name, site)


def attribution_patching(pairs: Pairs, site: Site) -> Float[Tensor, "layer neuron"]:
    """First-order estimate of what patching each neuron from the contrasting passage to the clean one does to the
    metric, in its unit; signed, summed over positions, mean over pairs, float32 on the CPU.

    Source: Syed et al. 2023. Positive: towards the clean passage the metric rises.
    """
    model, total = pairs.clean.model, torch.zeros(len(site.layers), site.width)
    with reading(model):
        for group in pairs.clean.groups():
            clean: list[Tensor] = []
            with streaming(model.bridge, site, lambda _, x, seen=clean: seen.append(x), units=True):
                pairs.clean.values(pairs.clean.batch(group))
            batch = pairs.corrupt.batch(group)
            with torch.enable_grad():
                leaves: list[Tensor] = []

                def keep(_: int, x: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                    # The graph begins at the first layer: whether weights take gradients does not matter.
                    leaves.append(x if leaves else x.detach().requires_grad_())
                    return leaves[-1]

                with streaming(model.bridge, site, keep, units=True):
                    slopes = torch.autograd.grad(pairs.corrupt.values(batch).sum(), leaves)
            for layer, (x, leaf, slope) in enumerate(zip(clean, leaves, slopes, strict=True)):
                by_unit = ((x.float() - leaf.detach().float()) * slope.float()).sum((0, 1))
                total[layer] += by_unit.unflatten(0, (site.width, site.size)).sum(1).cpu()
    return total / len(pairs.clean.passages)
