"""Two checkpoints of one model, compared by intervention on what passes through them: activation of the one put into
the other, and what each head does at each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from relearn_lens import progress
from relearn_lens.find.circuits import HEADS, path_patching
from relearn_lens.find.patching import Prompts, Readout, refusal, shares, units_of
from relearn_lens.models.model import LanguageModel, lent, reading, wearing
from relearn_lens.names import existing, explained
from relearn_lens.neurons.sites import Kept, Neurons, Site, component_site, kept, site_of, streaming
from relearn_lens.neurons.weights import differs
from relearn_lens.text.facts import Passage

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class CrossPatch:
    """What each component of one checkpoint, put into another, moves the metric by: 0 as the one, 1 as the other."""

    heads: Float[Tensor, "block head"]
    """(F_patched - F_A) / (F_B - F_A): A with this head's activation as in B, on every token; NaN where refused."""
    mlps: Float[Tensor, " block"]
    """The same of what each MLP gives."""
    resid: Float[Tensor, " block"]
    """The same of the hidden state after each block: all before it as in B."""
    into: float
    """F_A, mean over passages."""
    source: float
    """F_B, mean over passages."""
    metric: str
    unit: str
    """Of the metric."""
    site: Site
    n_passages: int
    refused: str | None = None
    """Why there are no shares."""

    def concentration(self, k: int = 10) -> float:
        """Share of all heads' effects, in size, that the `k` largest have: k / heads where all are alike; NaN where
        refused.

        Raises:
            ValueError: no such number of heads.
        """
        sizes = self.heads.abs().flatten().sort(descending=True).values
        if not 1 <= k <= len(sizes):
            raise ValueError(f"k must be 1 to {len(sizes)}, the number of heads, got {k}")
        return float(sizes[:k].sum() / sizes.sum())

    def __repr__(self) -> str:
        ends = f"{self.metric} {self.into:.3g} to {self.source:.3g} {self.unit}"
        if self.refused:
            return f"CrossPatch({ends}; no shares: {self.refused})"
        block, head = divmod(int(self.heads.abs().argmax()), self.site.width)
        most = f"head {head} of block {block} at {float(self.heads[block, head]):.2f}"
        return f"CrossPatch({ends}; most {most}; MLPs at most {float(self.mlps.abs().max()):.2f})"


@explained
def cross_patch(
    model: LanguageModel, into: Weights, source: Weights, passages: Sequence[Passage], *, metric: Readout = "auto"
) -> CrossPatch:
    """Where do two checkpoints of one architecture differ? A reads the passages with one component's activation as B
    has it on the same passage.

    `into` are A's weights and `source` B's (`Model.weights`, copied); `model` lends its body, and its own weights are
    back afterwards, to the bit, after an error too. A pass for each head, MLP and block.

    Source: Prakash et al. 2024 (cross-model activation patching); Chhabra et al. 2025.

    Raises:
        ValueError: weights of another model, low-rank adapters, or as `find.patching.Prompts`; before any work.
    """
    prompts = Prompts(model, passages, metric)
    a, b = _steady(model, {"into": into, "source": source})
    heads = site_of(model.bridge, HEADS)
    wholes = [component_site(model.bridge, "mlp"), component_site(model.bridge, "resid")]
    blocks, n = range(len(heads.layers)), len(prompts.passages)
    f_a, f_b = np.zeros(n), np.zeros(n)
    by_head, by_whole = np.zeros((len(blocks), heads.width, n)), np.zeros((2, len(blocks), n))
    with (
        lent(model),
        reading(model),
        progress.task("cross-patching", n * (2 + heads.n_neurons + 2 * len(blocks))),
    ):
        for group in prompts.groups():
            batch = prompts.batch(group)
            model.load_weights(b)
            with contextlib.ExitStack() as stack:
                theirs, *others = (
                    stack.enter_context(kept(model.bridge, site, units=True)) for site in (heads, *wholes)
                )
                f_b[group] = prompts.values(batch).cpu()
            model.load_weights(a)
            f_a[group] = prompts.values(batch).cpu()
            progress.advance(2 * len(group))
            for block in blocks:
                for head in range(heads.width):
                    with streaming(model.bridge, heads, _head_as(theirs, heads, block, head), units=True):
                        by_head[block, head, group] = prompts.values(batch).cpu()
                for i, (site, other) in enumerate(zip(wholes, others, strict=True)):
                    with streaming(model.bridge, site, lambda at, _, x=other[block], b=block: x if at == b else None):
                        by_whole[i, block, group] = prompts.values(batch).cpu()
                progress.advance((heads.width + 2) * len(group))
    gap = f_b - f_a
    refused = refusal(gap, f"the difference of {prompts.name} between the two checkpoints")
    mlps, resid = shares(by_whole - f_a, gap, refused)
    return CrossPatch(
        shares(by_head - f_a, gap, refused), mlps, resid, float(f_a.mean()), float(f_b.mean()), prompts.name,
        prompts.unit, heads, n, refused,
    )  # fmt: skip


def _head_as(theirs: Kept, site: Site, block: int, head: int):
    """One head as it is elsewhere."""
    units = units_of(site, head)

    def of(layer: int, x: Tensor) -> Tensor | None:
        if layer != block:
            return None
        x = x.clone()
        x[..., units] = theirs[block][..., units]
        return x

    return of


@dataclass(frozen=True, eq=False, repr=False)
class HeadRoles:
    """What each head does straight to the logits, at each of several checkpoints."""

    effect: Float[Tensor, "stage block head"]
    """F_clean - F_patched: what the metric loses where this head alone is as in the contrasting prompt and acts on the
    logits through no other head; in the metric's unit, mean over passages. Below 0: it works against the answer."""
    stages: tuple[str, ...]
    clean: tuple[float, ...]
    """The metric at each stage, mean over passages."""
    metric: str
    unit: str
    site: Site
    n_passages: int

    def of(self, stage: str) -> Float[Tensor, "block head"]:
        """The effects at one stage.

        Raises:
            ValueError: no such stage.
        """
        return self.effect[self.stages.index(existing("stage", stage, self.stages))]

    def top(self, stage: str, k: int) -> Neurons:
        """The `k` heads of the largest effect, in size, at one stage."""
        effect = self.of(stage).abs()
        if not 1 <= k <= effect.numel():
            raise ValueError(f"k must be 1 to {effect.numel()}, the number of heads, got {k}")
        return Neurons.highest(effect, self.site, k)

    def rank_correlation(self, one: str, other: str) -> float:
        """Spearman's correlation of all heads' effects at two stages, -1 to 1; no interval: heads are no sample."""
        correlation: Any = spearmanr(self.of(one).flatten().numpy(), self.of(other).flatten().numpy())
        return float(correlation.statistic)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for every stage and head, with the effect and its unit."""
        rows = [
            {"stage": stage, "block": block, "head": head, "effect": float(effect), "unit": self.unit}
            for stage, by_block in zip(self.stages, self.effect, strict=True)
            for block, by_head in zip(self.site.layers, by_block, strict=True)
            for head, effect in enumerate(by_head)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        ends = ", ".join(f"{stage} {value:.3g}" for stage, value in zip(self.stages, self.clean, strict=True))
        return f"HeadRoles({self.effect[0].numel()} heads; {self.metric} ({self.unit}): {ends})"


@explained
def head_roles(
    model: LanguageModel,
    stages: Mapping[str, Weights],
    passages: Sequence[Passage],
    corrupt: Sequence[Passage],
    *,
    metric: Readout = "auto",
) -> HeadRoles:
    """What does each head do for the answer at each checkpoint: the direct effects of `find.path_patching`.

    `stages` names weights (`Model.weights`, copied), in the order of training; `corrupt` has a contrasting prompt of as
    many tokens for each passage. The model's own weights are back afterwards, to the bit.

    Raises:
        ValueError: no stage, weights of another model, low-rank adapters, or as `find.patching.Pairs`.
    """
    if not stages:
        raise ValueError("there are no stages to read heads at; give at least one: {name: weights}")
    steady = _steady(model, stages)
    paths = []
    with lent(model), reading(model):
        for weights in steady:
            model.load_weights(weights)
            paths.append(path_patching(model, passages, corrupt, metric=metric))
    return HeadRoles(
        torch.stack([each.direct for each in paths]), tuple(stages), tuple(each.clean for each in paths),
        paths[0].metric, paths[0].unit, paths[0].site, paths[0].n_passages,
    )  # fmt: skip


def _steady(model: LanguageModel, given: Mapping[str, Weights]) -> list[Weights]:
    """Weights that do not move with the model's own.

    Raises:
        ValueError: they are of another model, or this one has low-rank adapters.
    """
    if wearing(model.bridge):
        raise ValueError("this model has low-rank adapters now; patch when the block of `adapted` has ended")
    live = model.weights()
    for name, weights in given.items():
        if (why := differs(live, weights)) is not None:
            raise ValueError(f"the weights {name!r} are of another model: {why}")
    return [
        {n: w.clone() if w.data_ptr() == live[n].data_ptr() else w for n, w in weights.items()}
        for weights in given.values()
    ]
