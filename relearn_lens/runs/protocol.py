"""Which neurons a run prunes and how: the choice, the layer it is carried out in, the random arm, the weights.

Where the released code of Lo et al. 2024 does otherwise, the settings have a field for it (`settings.PROTOCOLS`); here
is what each of its values does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.find.saliency import Saliency
from relearn_lens.names import unknown
from relearn_lens.neurons.sites import Neurons, Site, random_neurons
from relearn_lens.neurons.weights import check_prunable
from relearn_lens.runs.settings import Experiment

EMBEDDING = "embed"
LEAST_SALIENT = ("GPT2LMHeadModel",)
"""The families in which the published code prunes the least salient neurons."""


def choose(saliency: Saliency, fraction: float, which: str = "most") -> Neurons:
    """The share of all neurons that a score puts first (`"most"`) or last (`"least"`); ties go to the earlier neuron.

    Raises:
        ValueError: `which` is neither, or the fraction is out of range.
    """
    if which not in ("most", "least"):
        raise ValueError(f"{unknown('which', which, ['most', 'least'])} (by_family is decided by prepare())")
    return (saliency if which == "most" else replace(saliency, score=-saliency.score)).top(fraction=fraction)


def placed(neurons: Neurons, embedding: str) -> Neurons:
    """Where a choice is carried out: in its own layers, or with the embedding's indices in the last block.

    `"last_block"` is what the published code does; the result is smaller than the choice where both layers hold an
    index. A site without the embedding is not changed.
    """
    if embedding == "own" or neurons.site.layers[0] != EMBEDDING:
        return neurons
    mask = neurons.mask.clone()
    mask[-1] |= mask[0]
    mask[0] = False
    return Neurons(mask, neurons.site)


def control_of(chosen: Neurons, how: str, *, seed: int) -> Neurons:
    """As many neurons as were chosen, for the random arm.

    `"disjoint"`: as many in every layer, drawn from the others where there is room; `"layers"`: drawn from all;
    `"uniform"`: drawn over all layers; `"first"`: the first in order, layer by layer, without a draw, as published.
    """
    if how in ("disjoint", "layers"):
        return random_neurons(like=chosen, seed=seed, apart=chosen if how == "disjoint" else None)
    n = chosen.site.n_neurons
    order = torch.arange(n) if how == "first" else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[: len(chosen)]] = True
    return Neurons(mask.view_as(chosen.mask), chosen.site)


def resolved(experiment: Experiment, bridge: TransformerBridge, site: Site) -> tuple[Experiment, list[str]]:
    """The settings with all that depends on the model's family decided, and what was decided, in words.

    Raises:
        ValueError: the model has no weights that could be pruned as the settings ask.
    """
    prune, family = experiment.prune, str(bridge.cfg.architecture)
    which, sever, notes = prune.which, prune.sever, []
    if which == "by_family":
        which = "least" if family in LEAST_SALIENT else "most"
        notes.append(f"prune.which = 'by_family': the {which} salient neurons are pruned, as published for {family}")
    everywhere = placed(Neurons(torch.ones(len(site.layers), site.width, dtype=torch.bool), site), prune.embedding)
    if sever == "auto":
        sever = "out"
        try:
            check_prunable(bridge, everywhere, sever=sever)
        except ValueError:
            sever = "writes"
        of = f"site {site.name!r} of a {family} model"
        has = "has weights that carry its neurons on" if sever == "out" else "sums over blocks"
        notes.append(f"prune.sever = 'auto': {sever!r} is taken, as {of} {has}")
    check_prunable(bridge, everywhere, sever=sever)
    if experiment.protocol == "published" and (others := experiment.departures()):
        listed = ", ".join(f"{key} = {value!r}" for key, value in others.items())
        notes.append(f"protocol 'published', but for {listed}")
    prune = prune.model_copy(update={"which": which, "sever": sever})
    return experiment.model_copy(update={"prune": prune}), notes
