"""A toy whose concept comes back where it is made to: the truth of a return, for grafts to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relearn_lens.measure.evaluation import SpanScores, evaluate
from relearn_lens.measure.grafting import Grafts, grafts
from relearn_lens.models import toy
from relearn_lens.models.model import Tagger, reading
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import held, prune_
from relearn_lens.text.encoding import Encoded, encode
from tests.fixtures import warmed

BLOCKS = range(toy.N_LAYERS)


@dataclass(frozen=True)
class Return:
    """A toy without its places, and the same after they came back by construction."""

    tagger: Tagger
    text: Encoded
    cut: WeightMask
    cut_weights: dict[str, Tensor]
    retrained: dict[str, Tensor]

    def outcomes(self, tagger: Any) -> dict[str, float]:
        """Mean margin of place words, in logits, and F1."""
        scores = evaluate(tagger, self.text)
        assert isinstance(scores, SpanScores)
        return {"margin": margin(tagger, self.text), "F1": scores.f1["place"]}

    def grafted(self, *, f1: bool = True, **how: Any) -> Grafts:
        """Grafts between the two, by the margin, and by F1 too unless it is not wanted (most of the time)."""
        outcomes = self.outcomes if f1 else lambda tagger: {"margin": margin(tagger, self.text)}
        return grafts(self.tagger, self.cut_weights, self.retrained, outcomes, cut=self.cut, **how)


def margin(tagger: Tagger, text: Encoded) -> float:
    """Mean over the first sub-words of places: the best tag of a place less the best other one."""
    place = text.corpus.label_names.index("place")
    own = torch.tensor([tag.endswith("-place") for tag in tagger.tags])
    margins = []
    with reading(tagger):
        for batch in text.batches():
            logits = tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword][batch.first]
            here = torch.from_numpy(text.corpus.label)[batch.words] == place
            margins.append((logits[:, own].amax(1) - logits[:, ~own].amax(1))[here])
    return float(torch.cat(margins).mean())


def copied(tagger: Tagger) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: weight.clone() for name, weight in tagger.weights().items()}


def cut_toy(seed: int, sentences: int = 24) -> tuple[Return, Tensor, Tensor, Tensor]:
    """The toy without its places; and what its neurons read, their bias and what they wrote."""
    tagger = warmed(toy.tagger(seed=seed))
    text = encode(toy.corpus(sentences=sentences, seed=seed), tagger.tokenizer, context=tagger.context)
    mlp = mlp_of(tagger, 1)
    index = toy.PLANTED[0][1]
    reads, bias, writes = mlp.fc_in.weight[index], mlp.fc_in.bias[index], mlp.fc_out.weight[:, index]
    planted = [part.detach().clone() for part in (reads, bias, writes)]
    neurons = Neurons.of(site_of(tagger.bridge, "mlp_post"), toy.PLANTED)
    prune_(tagger, neurons)
    cut = WeightMask.of(tagger, neurons)
    weights = copied(tagger)
    return Return(tagger, text, cut, weights, weights), planted[0], planted[1], planted[2]


def mlp_of(tagger: Tagger, block: int) -> Any:
    """The MLP of a block of the toy."""
    layers: Any = tagger.trunk.layers
    return layers[block].mlp


def write(tagger: Tagger, block: int, rng: np.random.Generator, reads: Tensor, bias: Tensor, writes: Tensor) -> None:
    """Make four drawn neurons of a block, none that was cut, read and write these."""
    taken = {index for layer, index in toy.PLANTED if layer == str(block)}
    free = [index for index in range(toy.D_MLP) if index not in taken]
    mlp = mlp_of(tagger, block)
    with torch.no_grad():
        for index in rng.choice(free, size=4, replace=False):
            mlp.fc_in.weight[index], mlp.fc_in.bias[index], mlp.fc_out.weight[:, index] = reads, bias, writes


def retrained_in(block: int, seed: int) -> Return:
    """Only one block may train, without the entries of the cut."""
    made, *_ = cut_toy(seed)
    free = WeightMask.of_parts(made.tagger, f"block {block}") - made.cut
    with held(made.tagger, ~free):
        list(retrain_(made.tagger, made.text, epochs=12, every=12, lr=1e-2, batch_size=8, seed=seed))
    return Return(made.tagger, made.text, made.cut, made.cut_weights, copied(made.tagger))


def each_enough(blocks: tuple[int, int], seed: int) -> Return:
    """Two blocks, of which either writes so much of the place that the last LayerNorm leaves nothing to add."""
    made, reads, bias, writes = cut_toy(seed)
    rng = np.random.default_rng(seed)
    for block in blocks:
        write(made.tagger, block, rng, reads, bias, 20 * writes)
    return _with_other_changes(made, blocks, seed)


def needed_together(blocks: tuple[int, int], seed: int) -> Return:
    """The first block makes the place larger, which nothing reads; the second reads large places alone."""
    made, reads, bias, writes = cut_toy(seed)
    rng = np.random.default_rng(seed)
    first, second = sorted(blocks)
    place = reads / reads.norm()
    write(made.tagger, first, rng, reads, bias, place)
    write(made.tagger, second, rng, 4 * place, torch.tensor(-4 * 4.2), writes)
    return _with_other_changes(made, blocks, seed)


def _with_other_changes(made: Return, blocks: tuple[int, int], seed: int) -> Return:
    """The other blocks change too, in more entries, and bring nothing back."""
    generator = torch.Generator().manual_seed(seed)
    for block in set(BLOCKS) - set(blocks):
        weight = mlp_of(made.tagger, block).fc_in.weight.data
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return Return(made.tagger, made.text, made.cut, made.cut_weights, copied(made.tagger))


def drawn_blocks(seed: int) -> tuple[int, int]:
    """Two blocks."""
    first, second = np.random.default_rng(seed).choice(len(BLOCKS), size=2, replace=False).tolist()
    return first, second


def blocks_that(grafted: Grafts, share: str, *, at_least: float) -> set[int]:
    """The blocks with at least so much of a share."""
    return {i for i in BLOCKS if getattr(grafted, share)(f"block {i}").value >= at_least}
