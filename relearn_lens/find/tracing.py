"""Causal tracing: the subject is made unreadable, and one component at a time is put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from relearn_lens import progress
from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, some_blocks, statements
from relearn_lens.find.patching import Prompts, refusal, shares, subjects
from relearn_lens.models.model import LanguageModel, Model, reading
from relearn_lens.neurons.sites import (
    Component,
    Kept,
    component_site,
    kept,
    ordered,
    streaming,
    token_site,
    token_vectors,
)
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Passage

At = Literal["last", "subject", "every"]
COMPONENTS: tuple[Component, ...] = ("mlp", "attn", "resid")
_PARTS = {"mlp": "block {} mlp", "attn": "block {} attention", "resid": "block {}"}


class CausalTracing(Localiser):
    """The blocks whose component, put back as it was, brings most of an answer back whose subject was made unreadable.

    Gives the weights of that component of the `blocks` highest blocks; of `resid` the whole blocks. Source: Meng et al.
    2022, who draw noise 10 times and put back 10 neighbouring blocks at once of MLPs and attention.
    """

    name: ClassVar[str] = "causal_tracing"
    formula: ClassVar[str] = "(p_patched - p_corrupt) / (p_clean - p_corrupt)"
    source: ClassVar[str] = "Meng et al. 2022"

    component: Component = Field(default="mlp", description="what is put back: mlp, attn, or resid (the hidden state)")
    at: At = Field(default="last", description="at which tokens: the subject's last, all of the subject, or every")
    sd: float = Field(default=3.0, gt=0, le=1e3, description="noise, in standard deviations of subjects' embeddings")
    draws: int = Field(default=3, ge=1, le=1000, description="noises drawn for each passage (Meng et al.: 10)")
    window: int = Field(
        default=1, ge=1, le=10_000, description="neighbouring blocks put back at once (Meng et al.: 10)"
    )
    blocks: int | None = Field(default=None, ge=1, le=10_000, description="blocks taken; none: a third, rounded up")

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> WeightMask:
        """As of `Localiser`.

        Raises:
            ValueError: noise that changes nothing beyond noise, or more blocks than the model has.
        """
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        k = some_blocks(model, self.blocks)
        traces = causal_tracing(
            model, statements(facts), components=(self.component,), at=self.at, sd=self.sd, draws=self.draws,
            window=self.window, seed=seed,
        )  # fmt: skip
        if traces.refused:
            raise ValueError(f"causal_tracing: {traces.refused}, so nothing can be brought back; use more passages")
        best = sorted(ordered(traces.effect[0])[:k].tolist())
        return WeightMask.of_parts(model, [_PARTS[self.component].format(i) for i in best])


@dataclass(frozen=True, eq=False)
class Traces:
    """How much of an answer's probability each component brings back."""

    effect: Float[Tensor, "component block"]
    """(p_patched - p_corrupt) / (p_clean - p_corrupt), differences summed over passages first; NaN where refused."""
    components: tuple[Component, ...]
    clean: float
    """Probability of the answer, mean over passages."""
    corrupt: float
    """The same with a subject that cannot be read."""
    n_passages: int
    refused: str | None = None
    """Why there are no shares."""


def causal_tracing(
    model: LanguageModel,
    passages: Sequence[Passage],
    *,
    components: Sequence[Component] = COMPONENTS,
    at: At = "last",
    sd: float = 3.0,
    draws: int = 3,
    window: int = 1,
    seed: int = 0,
) -> Traces:
    """Corrupt the subject's embeddings by noise, put one component of one block back as it was, and see how much of the
    answer's probability that brings back.

    Noise is normal, `sd` standard deviations of all subjects' embeddings, the same for every component and block. The
    model is read only: one pass for each draw, component and block. Source: Meng et al. 2022.

    Raises:
        ValueError: an unknown component; as `Prompts` and `subjects`.
    """
    prompts = Prompts(model, passages, "logprob")
    where = subjects(prompts)
    sites = [component_site(model.bridge, component) for component in components]
    tokens, blocks = token_site(model.bridge), range(int(model.bridge.cfg.n_layers))
    ids = [prompts.encoded.batch(np.array([i])).ids[0, span] for i, span in enumerate(where)]
    with reading(model):
        spread = float(token_vectors(model.bridge, torch.cat(ids).to(model.device)).float().std())
    generator = torch.Generator().manual_seed(seed)
    noises = [[sd * spread * torch.randn(len(i), tokens.width, generator=generator) for i in ids] for _ in range(draws)]

    p_clean, p_corrupt = np.zeros(len(passages)), np.zeros(len(passages))
    p_patched = np.zeros((len(sites), len(blocks), len(passages)))
    with reading(model), progress.task("tracing", draws * (1 + len(sites) * len(blocks)) * len(passages)):
        for group in prompts.groups():
            batch = prompts.batch(group)
            shape = (*batch.ids.shape, 1)
            with contextlib.ExitStack() as stack:
                clean = [stack.enter_context(kept(model.bridge, site)) for site in sites]
                p_clean[group] = prompts.values(batch).exp().cpu()
            back = _positions(where, group, shape, at).to(model.device)
            for noise in noises:
                added = torch.zeros(*batch.ids.shape, tokens.width)
                for row, i in enumerate(group):
                    added[row, where[i]] = noise[i]
                added = added.to(model.device)
                with streaming(model.bridge, tokens, lambda _, x, added=added: (x.float() + added).to(x.dtype)):
                    p_corrupt[group] += prompts.values(batch).exp().cpu().numpy() / draws
                    progress.advance(len(group))
                    for s, site in enumerate(sites):
                        for block in blocks:
                            with streaming(model.bridge, site, _restoring(clean[s], back, block, window)):
                                p_patched[s, block, group] += prompts.values(batch).exp().cpu().numpy() / draws
                            progress.advance(len(group))
    gap = p_clean - p_corrupt
    refused = refusal(gap, "what noise takes from the answer's probability", falls=True)
    effect = shares(p_patched - p_corrupt, gap, refused)
    return Traces(effect, tuple(components), float(p_clean.mean()), float(p_corrupt.mean()), len(passages), refused)


def _positions(
    where: Sequence[np.ndarray], group: np.ndarray, shape: tuple[int, ...], at: At
) -> Bool[Tensor, "passage token 1"]:
    back = torch.full(shape, at == "every")
    for row, i in enumerate(group):
        tokens = where[i]
        back[row, tokens[-1:] if at == "last" else tokens] = True
    return back


def _restoring(clean: Kept, back: Tensor, block: int, window: int):
    """Some neighbouring blocks as they were, where `back` says."""
    first = block - (window - 1) // 2

    def of(layer: int, x: Tensor) -> Tensor | None:
        return torch.where(back, clean[layer], x) if first <= layer < first + window else None

    return of
