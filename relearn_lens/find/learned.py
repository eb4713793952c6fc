"""Masks that are learnt: the neurons without which a model has no answer, and says all else as before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relearn_lens import progress
from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, statements
from relearn_lens.find.saliency import Saliency
from relearn_lens.models.model import LanguageModel, Model, reading, seeded
from relearn_lens.neurons.sites import Site, site_of, streaming
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import TRAINED, Passage
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages


class LearnedMask(Localiser):
    """The MLP neurons without which the answers become even among all tokens, and other predictions stay.

    Of each neuron a score s; the model computes with (1 - m) times its activation, where m is 0 or 1, drawn anew every
    step by a straight-through Gumbel-sigmoid of s; p is what it then predicts, p0 what it predicts as it is. KL is the
    mean over answer tokens. Adam moves s alone. The learnt mask has the neurons whose s is above 0 at the end, which
    may be none, where nothing can go without what stays. Published: sparsities of 98 % and more.

    Source: Bayazit et al. 2024 (knowledge-critical subnetworks).
    """

    name: ClassVar[str] = "learned_mask"
    formula: ClassVar[str] = (
        "min_s forget KL(uniform, p)_f + KL(p0, p)_near + KL(p0, p)_general + lambda mean sigmoid(s)"
    )
    source: ClassVar[str] = "Bayazit et al. 2024"
    gives: ClassVar[str] = "neurons"

    forget: float = Field(default=1.5, gt=0, le=1e6, description="weight of what is to be forgotten")
    sparsity: float = Field(default=2.0, ge=0, le=1e6, description="lambda, in the first half of the steps")
    later: float = Field(default=3.0, ge=0, le=1e6, description="lambda, in the second half")
    tau: float = Field(default=1.0, gt=0, le=1e3, description="temperature of the Gumbel-sigmoid")
    start: float = Field(default=0.45, gt=0, lt=1, description="sigmoid(s) at first")
    lr: float = Field(default=0.2, gt=0, le=10, description="of Adam on s, after 10 % of the steps")
    steps: int = Field(default=200, ge=1, le=10**6, description="steps of Adam")
    batch_size: int = Field(default=32, ge=1, le=10**5, description="passages of each text per step")

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> Saliency:
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        near, general = statements(facts, "retain_near"), facts.passages("retain_general", forms=TRAINED)
        site = site_of(model.bridge, "mlp_post")
        scores = self.scores(model, statements(facts), (near, *([general] if general else [])), seed=seed)
        return Saliency(scores, self.name, "logit of being masked", facts.name, site)

    def scores(
        self, model: LanguageModel, forget: Sequence[Passage], kept: Sequence[Sequence[Passage]], *, seed: int = 0
    ) -> Float[Tensor, "layer neuron"]:
        """s at the end; above 0 where a neuron is to go."""
        site = site_of(model.bridge, "mlp_post")
        texts = [encode_passages(each, model.tokenizer, context=model.context) for each in (forget, *kept)]
        first = math.log(self.start / (1 - self.start))
        s = torch.full((len(site.layers), site.width), first, device=model.device, requires_grad=True)
        adam = torch.optim.Adam([s], lr=self.lr)
        rng, warmup = np.random.default_rng(seed), max(1, round(0.1 * self.steps))
        with reading(model), seeded(seed, model.device), progress.task("learning a mask", self.steps):
            for step in range(self.steps):
                with torch.enable_grad():
                    loss = self.loss(
                        model, site, s, [rng.permutation(text.n_pieces)[: self.batch_size] for text in texts], texts
                    )
                    loss = loss + (self.sparsity if 2 * step < self.steps else self.later) * s.sigmoid().mean()
                (s.grad,) = torch.autograd.grad(loss, [s])
                adam.param_groups[0]["lr"] = self.lr * min(1.0, (step + 1) / warmup)
                adam.step()
                progress.advance()
        return s.detach().cpu()

    def loss(
        self,
        model: LanguageModel,
        site: Site,
        s: Tensor,
        pieces: Sequence[np.ndarray],
        texts: Sequence[EncodedPassages],
    ) -> Tensor:
        """All but the sparsity, on some pieces of each text, with masks drawn from torch's generator."""
        total = s.new_zeros(())
        u = torch.rand_like(s).clamp(1e-6, 1 - 1e-6)
        soft = ((s + u.log() - (-u).log1p()) / self.tau).sigmoid()
        keep = 1 - ((soft > 0.5).to(s) - soft.detach() + soft)
        for i, (which, text) in enumerate(zip(pieces, texts, strict=True)):
            batch = text.batch(which).to(model.device)
            with streaming(model.bridge, site, lambda layer, x: x * keep[layer].to(x.dtype)):
                logs = model.predictions(batch)[0].log_softmax(-1)
            if i == 0:
                # KL(uniform, p)
                total = total + self.forget * (-math.log(logs.shape[1]) - logs.mean(-1)).mean()
                continue
            with torch.no_grad():
                before = model.predictions(batch)[0].log_softmax(-1)
            total = total + (before.exp() * (before - logs)).sum(-1).mean()
        return total
