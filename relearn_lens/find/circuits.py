"""Circuits: heads that act on the answer directly, MLPs that act through them, and whether they are enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from relearn_lens import progress
from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, pairs_of
from relearn_lens.find.patching import Pairs, Prompts, Readout, mean_by_length, refusal, shares, units_of
from relearn_lens.models.model import LanguageModel, Model, reading
from relearn_lens.neurons.sites import Kept, Neurons, Site, component_site, kept, site_of, streaming
from relearn_lens.neurons.weights import WeightMask, same_site
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Passage

HEADS = "attn_head"


class PathPatching(Localiser):
    """MLPs that act on the answer through the heads which act on it directly.

    Heads whose direct effect is larger than `threshold` in size are kept, then MLPs whose effect through those heads
    is. Gives the MLPs' weights, the heads' output weights, or both. Source: Wang et al. 2023; Guo et al. 2024.
    """

    name: ClassVar[str] = "path_patching"
    formula: ClassVar[str] = "(F_clean - F_patched) / (F_clean - F_corrupt), along one path"
    source: ClassVar[str] = "Wang et al. 2023; Guo et al. 2024"

    keep: Literal["mlps", "heads", "both"] = Field(default="mlps", description="whose weights are given")
    threshold: float = Field(default=0.02, ge=0, le=1e3, description="size of the effect above which a part is kept")
    contrast: str = Field(
        default="auto",
        description="contrasting prompts: swap (another key with another answer), or a form; auto: abc, else swap",
    )
    metric: Literal["auto", "logprob", "logit_difference"] = Field(
        default="auto", description="F: log p of the answer, or its logit less that of the other of two choices"
    )

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> WeightMask:
        """As of `Localiser`.

        Raises:
            ValueError: prompts whose difference is within noise, or no part with such an effect.
        """
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        paths = _paths(pairs_of(model, facts, self.contrast, self.metric, seed), self.threshold)
        if paths.refused:
            raise ValueError(f"path_patching: {paths.refused}, so there is no effect to trace; use other facts")
        mask = WeightMask.none(model)
        if self.keep in ("heads", "both"):
            mask |= WeightMask.of(model, paths.kept_heads)
        if self.keep in ("mlps", "both") and paths.kept_mlps:
            mask |= WeightMask.of_parts(model, [f"block {i} mlp" for i in paths.kept_mlps])
        if not mask.n_entries:
            raise ValueError(
                f"path_patching: no {self.keep} with an effect above {self.threshold}; the largest of a head is "
                f"{float(paths.heads.abs().max()):.2g}, of an MLP {float(paths.mlps.abs().max()):.2g}: lower threshold"
            )
        return mask


@dataclass(frozen=True, eq=False)
class Paths:
    """Effects along single paths, as shares of what the contrasting prompts take from the metric."""

    heads: Float[Tensor, "block head"]
    """(F_clean - F_patched) / (F_clean - F_corrupt) of each head straight to the logits: 1 where that path alone does
    all, below 0 where the head works against the answer. NaN where refused."""
    mlps: Float[Tensor, " block"]
    """The same of each MLP through the kept heads; 0 where there is none after it."""
    direct: Float[Tensor, "block head"]
    """Of each head straight to the logits, F_clean - F_patched: in the metric's own unit, mean over passages."""
    site: Site
    threshold: float
    clean: float
    """The metric, mean over passages."""
    corrupt: float
    """The same for the contrasting prompts."""
    metric: str
    unit: str
    """Of the metric."""
    n_passages: int
    n_left_out: int
    """Pairs of different lengths."""
    refused: str | None = None
    """Why there are no shares."""

    @property
    def kept_heads(self) -> Neurons:
        """The heads whose direct effect is larger than the threshold in size."""
        return Neurons(self.heads.abs() > self.threshold, self.site)

    @property
    def kept_mlps(self) -> list[int]:
        """The blocks whose MLP has such an effect through them."""
        return (self.mlps.abs() > self.threshold).nonzero().flatten().tolist()


def path_patching(
    model: LanguageModel,
    passages: Sequence[Passage],
    corrupt: Sequence[Passage],
    *,
    metric: Readout = "auto",
    threshold: float = 0.02,
) -> Paths:
    """Which heads act on the answer directly, and which MLPs act through those?

    Of a head: it alone is as in the contrasting prompt, all other heads are held as in the clean one, and MLPs compute
    anew, so that the effect reaches the logits through no other head. Of an MLP: with all heads held as in the clean
    prompt, its output is as in the contrasting one; what the kept heads would then have gathered is put into a clean
    run. `corrupt` has a prompt of as many tokens for each passage. The model is read only: a pass for each head and two
    for each MLP. Source: Wang et al. 2023, section 3.1 and appendix; Guo et al. 2024 for MLPs.

    Raises:
        ValueError: as `Pairs`.
    """
    return _paths(Pairs(model, passages, corrupt, metric), threshold)


def _paths(pairs: Pairs, threshold: float) -> Paths:
    clean, n = pairs.clean, len(pairs.clean.passages)
    site = site_of(clean.model.bridge, HEADS)
    with reading(clean.model), progress.task("path patching", (2 + site.n_neurons + 2 * len(site.layers)) * n):
        f_clean, f_corrupt, by_head = _direct(pairs, site)
        gap = f_clean - f_corrupt
        refused = refusal(gap, f"the difference of {clean.name} between prompts")
        heads = shares(f_clean - by_head, gap, refused)
        by_mlp = _through(pairs, site, heads.abs() > threshold, f_clean)
    mlps = shares(f_clean - by_mlp, gap, refused)
    return Paths(
        heads, mlps, torch.from_numpy((f_clean - by_head).mean(-1)).float(), site, threshold, float(f_clean.mean()),
        float(f_corrupt.mean()), clean.name, clean.unit, n, pairs.n_left_out, refused,
    )  # fmt: skip


def _direct(
    pairs: Pairs, site: Site
) -> tuple[
    Float[np.ndarray, " passage"], Float[np.ndarray, " passage"], Float[np.ndarray, "block head passage"]
]:  # fmt: skip
    """The metric of both prompts, and with each head straight to the logits as in the contrasting one."""
    clean, corrupt, model = pairs.clean, pairs.corrupt, pairs.clean.model
    n = len(clean.passages)
    f_clean, f_corrupt, patched = np.zeros(n), np.zeros(n), np.zeros((len(site.layers), site.width, n))
    for group in clean.groups():
        batch = clean.batch(group)
        with kept(model.bridge, site, units=True) as own:
            f_clean[group] = clean.values(batch).cpu()
        with kept(model.bridge, site, units=True) as other:
            f_corrupt[group] = corrupt.values(corrupt.batch(group)).cpu()
        progress.advance(2 * len(group))
        for block in range(len(site.layers)):
            for head in range(site.width):
                x = own[block].clone()
                x[..., units_of(site, head)] = other[block][..., units_of(site, head)]
                with streaming(model.bridge, site, _as({**own, block: x}), units=True):
                    patched[block, head, group] = clean.values(batch).cpu()
                progress.advance(len(group))
    return f_clean, f_corrupt, patched


def _through(
    pairs: Pairs, site: Site, receivers: Bool[Tensor, "block head"], f_clean: Float[np.ndarray, " passage"]
) -> Float[np.ndarray, "block passage"]:
    """The metric with each MLP as in the contrasting prompt, on the paths into some heads alone."""
    clean, corrupt, model = pairs.clean, pairs.corrupt, pairs.clean.model
    mlps = component_site(model.bridge, "mlp")
    units = receivers.to(model.device).repeat_interleave(site.size, 1)
    patched = np.tile(f_clean, (len(site.layers), 1))
    senders = int(receivers.any(1).nonzero().max()) if receivers.any() else 0  # no head comes after the other MLPs
    for group in clean.groups():
        batch = clean.batch(group)
        with kept(model.bridge, site, units=True) as own:
            clean.values(batch)
        with kept(model.bridge, mlps) as other:
            corrupt.values(corrupt.batch(group))
        for block in range(senders):
            # What heads would have gathered is seen before they are held.
            with (
                kept(model.bridge, site, units=True) as gathered,
                streaming(model.bridge, site, _as(own), units=True),
                streaming(model.bridge, mlps, _as({block: other[block]})),
            ):
                clean.values(batch)

            def received(layer: int, x: Tensor, block: int = block, gathered: Kept = gathered) -> Tensor | None:
                return torch.where(units[layer], gathered[layer], x) if layer > block else None

            with streaming(model.bridge, site, received, units=True):
                patched[block, group] = clean.values(batch).cpu()
        progress.advance(2 * len(site.layers) * len(group))
    return patched


def _as(activations: Kept) -> Callable[[int, Tensor], Tensor | None]:
    """These activations in the place of what is there."""
    return lambda layer, _: activations.get(layer)


@dataclass(frozen=True)
class Faithfulness:
    """How much of what a model does some heads do alone."""

    value: float
    """(F(circuit) - F(empty)) / (F(whole) - F(empty)): 1 as the whole model, 0 as with no head; NaN where refused."""
    circuit: float
    """The metric with all other heads at their mean, mean over passages."""
    whole: float
    """With all heads as they are."""
    empty: float
    """With all heads at their mean."""
    unit: str
    """Of the metric."""
    n_heads: int
    n_passages: int
    refused: str | None = None
    """Why there is no share."""


def faithfulness(
    model: LanguageModel,
    passages: Sequence[Passage],
    reference: Sequence[Passage],
    heads: Neurons,
    *,
    metric: Readout = "auto",
) -> Faithfulness:
    """How much of what a model does on some passages do these heads do, with all others at their mean?

    The mean is of each position, over those passages of `reference` that have as many tokens (form `abc` of `ioi`: the
    same sentences, in which nothing says the answer). MLPs stay. Source: Wang et al. 2023, section 4.

    Raises:
        ValueError: neurons that are no heads, or of another model; a length that no reference has; as `Prompts`.
    """
    if heads.site.name != HEADS:
        raise ValueError(f"a circuit is a set of heads ({HEADS}), and these are neurons of {heads.site.name}")
    site = same_site(model, heads)
    prompts, reference_prompts = Prompts(model, passages, metric), Prompts(model, reference, "logprob")
    if lacking := sorted(set(prompts.lengths.tolist()) - set(reference_prompts.lengths.tolist())):
        raise ValueError(
            f"no reference passage has {lacking[0]} tokens, as some of the passages have, so there is no mean of their "
            "positions; give references of the same lengths"
        )
    outcomes = {}
    with reading(model):
        means = mean_by_length(reference_prompts, site)
        for name, mask in (("whole", None), ("circuit", heads.mask), ("empty", torch.zeros_like(heads.mask))):
            values = np.zeros(len(prompts.passages))
            for group in prompts.groups():
                mean = means[int(prompts.lengths[group[0]])]
                with (
                    contextlib.nullcontext()
                    if mask is None
                    else streaming(model.bridge, site, _at_mean(mask, mean, site), units=True)
                ):
                    values[group] = prompts.values(prompts.batch(group)).cpu()
            outcomes[name] = values
    whole, circuit, empty = (outcomes[name] for name in ("whole", "circuit", "empty"))
    refused = refusal(whole - empty, f"what all heads add to {prompts.name}")
    value = float(shares(circuit - empty, whole - empty, refused))
    return Faithfulness(
        value, float(circuit.mean()), float(whole.mean()), float(empty.mean()), prompts.unit, len(heads), len(whole),
        refused,
    )  # fmt: skip


def _at_mean(mask: Tensor, mean: Tensor, site: Site) -> Callable[[int, Tensor], Tensor]:
    """All heads but those of a mask at their mean."""
    stays = mask.repeat_interleave(site.size, 1).to(mean.device)
    return lambda layer, x: torch.where(stays[layer], x, mean[layer].to(x.dtype))
