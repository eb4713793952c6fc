"""How deep an answer is gone: what the model's hidden states still bring to the model that knew it, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped
from pydantic import Field

from relearn_lens.measure.asking import Asked, Metric, Reference, asked_of
from relearn_lens.measure.evaluation import Label
from relearn_lens.measure.keymeans import KeyMeans, tabulated
from relearn_lens.measure.states import blocks_of, check_alike, last_of, nats_of, put_in, states_of
from relearn_lens.models.model import LanguageModel, reading
from relearn_lens.names import existing
from relearn_lens.text.corpus import Strings
from relearn_lens.text.facts import FORGET, Facts
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages


class LayerDepth(KeyMeans):
    """Share of what never having known takes away that is gone; `value` is what is left of it."""

    metric: ClassVar[str] = "depth"
    unit: ClassVar[str] = "share of what never having known takes away, 0 (as the base) to 1 (as never)"
    quantity: ClassVar[str] = "what is left"

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """What is left, 1 less the depth."""
        return np.asarray(1 - super().of_sums(sums))

    def displayed(self, value: float) -> float:
        """The depth."""
        return 1 - value


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Depth(LayerDepth):
    """Unlearning depth by place: mean over passages, of all layers together and of each."""

    layers: Strings
    layer_total: Float[np.ndarray, "layer key label"]
    """Depth at each layer, summed over the passages that have the layer."""
    layer_passages: Int[np.ndarray, "layer key label"]
    """Passages for which the never twin's states at this layer take away more than `least`."""
    left_out: dict[str, int]
    """By place: passages without any such layer, which have no depth."""

    def layer(self, name: str) -> LayerDepth:
        """The depth at one layer.

        Raises:
            ValueError: there is no such layer.
        """
        i = self.layers.index(existing("layer", name, self.layers))
        count = self.layer_passages[i]
        return LayerDepth(self.layer_total[i], count.astype(float), count, self.keys, self.labels)

    def by_layer(self, label: Label) -> dict[str, float]:
        """The depth at every layer; NaN where no passage has it."""
        return {name: self.layer(name).shown(label) for name in self.layers}


class UnlearningDepth(Metric):
    """What the model's hidden states take from the base's answer, as a share of what those of a twin that never knew
    take: 0 for the base, 1 for the twin. By layer, from one patch of the base at a time.

    For each passage and layer l: S1 = log p_base(y) - log p(y | the twin's states at l put into the base), S2 the same
    with the model's. log p is the mean per answer token, and only positions that predict the answer are replaced.
    Layers with S1 of at most `least` say nothing; passages without any other are left out, and counted. What the
    base and the twin give is computed once and kept in the reference.

    `faithful` replaces at the last layer what comes after the final norm, by the model's own norm, as released: then
    the last layer of a model whose norm moved is not 0 where its states are the base's.

    Source: the unlearning depth score (2026).
    """

    name: ClassVar[str] = "depth"
    unit: ClassVar[str] = LayerDepth.unit
    formula: ClassVar[str] = "sum over layers with S1 > least of S1 clip(S2/S1, 0, 1), divided by the sum of S1"
    source: ClassVar[str] = "unlearning depth score, 2026"
    needs: ClassVar[tuple[str, ...]] = ("base", "never")
    least: float = Field(default=0.05, ge=0, le=100, description="nats per token that a layer must tell apart")
    faithful: bool = Field(default=False, description="the last layer after the final norm, as released")

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> Depth:
        reference = reference or Reference()
        base, never = reference.need("base", "never", by=self.name)
        check_alike(model, base, "base")
        check_alike(model, never, "never")
        questions = asked_of(facts)
        questions = questions.where([place.startswith(FORGET) for place in questions.places])
        if not questions.passages:
            raise ValueError(
                f"depth is of what was forgotten, and none of {', '.join(FORGET)} is asked; ask in these roles"
            )
        encoded = encode_passages(questions.passages, model.tokenizer, context=model.context)
        s1 = reference.once(("depth", self.faithful, questions.passages), lambda: self._taken(base, never, encoded))
        s2 = self._taken(base, model, encoded)
        there = s1 > self.least
        share = np.divide(s2, s1, out=np.zeros_like(s1), where=there).clip(0, 1)
        weight = np.where(there, s1, 0.0)
        known = there.any(1)
        if not known.any():
            raise ValueError(
                f"the twin's states take nothing (more than {self.least} nats per token) from the base at any layer, "
                "so there is no depth: either the base does not know these facts, or the twin does"
            )
        each = (weight * share)[known].sum(1) / weight[known].sum(1)
        whole = questions.where(known)
        keys, labels, (total, count, *by_layer) = tabulated(
            whole.passages, whole.places, each, 1.0, *(share * there)[known].T, *there[known].T
        )
        out = questions.where(~known).places
        return Depth(
            total, count, count.astype(np.int64), keys, labels, blocks_of(model).layers,
            np.stack(by_layer[: share.shape[1]]), np.stack(by_layer[share.shape[1] :]).astype(np.int64),
            {place: out.count(place) for place in questions.names},
        )  # fmt: skip

    def _taken(
        self, base: LanguageModel, source: LanguageModel, encoded: EncodedPassages
    ) -> Float[np.ndarray, "passage layer"]:
        """log p of the base less log p of the base with the source's states at each layer, mean per answer token."""
        layers = blocks_of(base).layers
        taken = np.zeros((len(encoded.passages), len(layers)))
        tokens = np.bincount(encoded.word_of[encoded.scored], minlength=len(encoded.passages))
        with reading(base):
            for pieces in encoded.cuts():
                batch = encoded.batch(pieces).to(base.device)
                states, last = states_of(source, batch.to(source.device))
                own = nats_of(base, batch, last_of(base, batch))
                for i, name in enumerate(layers):
                    if self.faithful and i == len(layers) - 1:
                        patched = nats_of(base, batch, last.to(own.device))
                    else:
                        with put_in(base, batch, {name: states[name]}):
                            patched = nats_of(base, batch, last_of(base, batch))
                    np.add.at(taken[:, i], batch.word_of.cpu().numpy(), (patched - own).double().cpu().numpy())
        return taken / tokens[:, None]
