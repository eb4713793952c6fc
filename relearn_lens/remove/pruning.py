"""Pruning as a remover: weights to what has no effect, once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from relearn_lens.methods import Method
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Sever
from relearn_lens.neurons.weights import WeightMask, check_prunable
from relearn_lens.remove.ablation import prune_


class Pruner(Method):
    """Takes something out of a model at once, without training: an iterator of one checkpoint, at step 0."""

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]

    def __call__(self, model: Model, texts: Any = None, where: Any = None, *, seed: int = 0) -> Iterator[Checkpoint]:
        """Take it out, once the iterator is asked; yields then.

        Raises:
            ValueError: nothing to take out, or what it needs is not there; at the call.
        """
        raise NotImplementedError


class Prune(Pruner):
    """Sets the weights of neurons to what has no effect (`ablation.prune_`); trains nothing, so it needs no text.

    On the taught toys, where .95 of what is near is kept, .86 of what was to be forgotten is still answered (five
    seeds, the neurons of attribution patching, `RESULTS.md`): most of these answer for what is near too.

    Source: Lo et al. 2024, section 3.
    """

    name: ClassVar[str] = "prune"
    formula: ClassVar[str] = "theta_i <- 0 for the weights of the given neurons"
    source: ClassVar[str] = "Lo et al. 2024, section 3"

    sever: Sever = Field(default="out", description="which weights of a neuron are cut, as `prune_` says")

    def __call__(
        self, model: Model, texts: Any = None, where: Neurons | WeightMask | None = None, *, seed: int = 0
    ) -> Iterator[Checkpoint]:
        """Prune the neurons, or the entries of a mask, `where`, once the iterator is asked; yields then, at step 0,
        with no loss (nan).

        `texts` and `seed` are what other removers take; nothing here depends on them.

        Raises:
            ValueError: no neurons, or weights that the model does not have; at the call.
        """
        if isinstance(where, WeightMask):
            where.check(model)
        if where is None or not (where.n_entries if isinstance(where, WeightMask) else len(where)):
            raise ValueError("prune: no neurons to prune; give a set of them as where=")
        if isinstance(where, Neurons):
            check_prunable(model, where, self.sever)
        return self._pruned(model, where)

    def _pruned(self, model: Model, neurons: Neurons | WeightMask) -> Iterator[Checkpoint]:
        prune_(model, neurons, sever=self.sever)
        yield Checkpoint(epoch=0.0, step=0, tokens_seen=0, loss=math.nan)
