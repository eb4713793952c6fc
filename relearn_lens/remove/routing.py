"""Training-time removers: what is to be forgotten is learnt in a place of its own, which is taken away afterwards.

They take a *fresh* model and teach it both texts; compare what they give at its own retained ability with the model
that plain teaching gives. Used on a model that knows the facts already they have nothing to route: that is their
negative control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from relearn_lens.methods import Training
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint, Gradient, Step, Stepped, plain, train_
from relearn_lens.neurons.sites import Neurons, site_of, streaming
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.ablation import ablated, held, prune_
from relearn_lens.remove.losses import likely
from relearn_lens.remove.removal import FORGET, RETAIN, Remover, Removing, Term, n_subwords
from relearn_lens.text.encoding import Batch


class GradientRoute(Remover):
    """Gradient routing (ERA): in some blocks the forgotten text is learnt by a few MLP units alone; they are ablated,
    and the rest is tuned on the retained text.

    On the forgotten text the gradient through the last `units` MLP units of the first `layers` blocks is as usual, and
    that through their other units is multiplied by `scale`. The retained text trains as usual, with an L1 penalty on
    the mean absolute activation of all units of those blocks. At the end the units are pruned, and `tuning` steps on
    the retained text follow. Embeddings and attention learn from both texts, as published, so what those alone can hold
    is not routed. The published method adds the units to the model; here they are of its own width. It
    weighs tokens by how often they are in each text, here a text is one or the other; its bulk script passes
    another method's configuration.

    Source: Cloud et al. 2024 (gradient routing).
    """

    name: ClassVar[str] = "gradient_route"
    formula: ClassVar[str] = "CE_f, x <- m x + (1 - m) (s x + (1 - s) stopgrad x); + CE_r + l1 |x|_r; x_m <- 0; CE_r"
    source: ClassVar[str] = "Cloud et al. 2024 (gradient routing)"
    usual: ClassVar[Training] = Removing(lr=5e-4, epochs=1)
    fresh: ClassVar[bool] = True

    units: int = Field(default=64, ge=1, le=10**6, description="MLP units of a block that the forgotten text goes to")
    layers: int = Field(default=5, ge=1, le=10_000, description="first blocks in which it is routed, or all")
    scale: float = Field(default=-0.75, ge=-10, le=1, description="of the gradient through the other units")
    l1: float = Field(default=1e-4, ge=0, le=1e3, description="weight of the mean absolute activation")
    tuning: int = Field(default=40, ge=0, le=10**6, description="steps on the retained text when the units are gone")

    def routed(self, model: Model) -> Neurons:
        """The units that the forgotten text goes to.

        Raises:
            ValueError: a block has no more units than those.
        """
        return _last_units(model, self.units, self.layers)

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        mask, site = self.routed(model).mask, site_of(model.bridge, "mlp_post")
        blocks, own = range(min(self.layers, len(site.layers))), likely(1.0)

        def routing(layer: int, x: Tensor) -> Tensor | None:
            if layer not in blocks:
                return None
            return torch.where(mask[layer].to(x.device), x, self.scale * x + (1 - self.scale) * x.detach())

        def forgotten(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            with streaming(model.bridge, site, routing):
                return own.value(model, batch, None)

        def retained(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            sizes: list[Tensor] = []

            def look(layer: int, x: Tensor) -> None:
                if layer in blocks:
                    sizes.append(x.flatten(0, 1)[batch.subword].abs().mean(-1).sum())

            with streaming(model.bridge, site, look):
                nats = model.losses(batch)
            return nats.sum() + self.l1 * torch.stack(sizes).sum(), len(nats)

        return {RETAIN: Term(retained, n_subwords), FORGET: replace(own, value=forgotten)}

    def __call__(self, model: Model, texts: Any, where: Any = None, **keywords: Any) -> Iterator[Checkpoint]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As of `Remover`, of a fresh model; yields once more when the units are gone and the rest is tuned.

        Raises:
            ValueError: as of `Remover`, or a `resume`.
        """
        if keywords.get("resume") is not None:
            raise ValueError("gradient_route trains twice, and does not resume")
        training, seed = super().__call__(model, texts, where, **keywords), keywords.get("seed", 0)
        tuned = self.texts(model, texts, [RETAIN], seed)
        return self._both(model, training, tuned, where, seed)

    def _both(self, model: Model, training: Any, texts: Any, where: Any, seed: int) -> Iterator[Checkpoint]:
        last = None
        for last in training:
            yield last
        if last is None:
            return
        prune_(model, self.routed(model))
        if self.tuning:
            how = training.how.model_copy(update={"steps": (self.tuning,)})
            # What was pruned stays so.
            with held(model, self.routed(model)):
                for pause in train_(model, texts, how, only=where, seed=seed + 1, what="tuning"):
                    tokens = last.tokens_seen + pause.tokens_seen
                    yield replace(pause, epoch=last.epoch, step=last.step + pause.step, tokens_seen=tokens, by=last.by)


class SGTM(Remover):
    """Selective gradient masking: the forgotten text trains a few MLP units and heads alone, which the retained text
    never sees; at the end they are pruned.

    The last `units` MLP units and the last `heads` heads of every block are those. On the forgotten text all other
    entries get no gradient (output biases neither); on the retained text these are ablated.

    Source: Shilov et al. 2025 (SGTM): 64 of 2,048 units and 1 of 32 heads.
    """

    name: ClassVar[str] = "sgtm"
    formula: ClassVar[str] = "m grad CE_f + grad CE_r(theta without m); theta_m <- 0"
    source: ClassVar[str] = "Shilov et al. 2025 (SGTM)"
    usual: ClassVar[Training] = Removing(lr=5e-4, epochs=1)
    fresh: ClassVar[bool] = True

    units: int = Field(default=64, ge=1, le=10**6, description="MLP units of every block")
    heads: int = Field(default=1, ge=0, le=10**4, description="attention heads of every block")

    def routed(self, model: Model) -> tuple[Neurons, ...]:
        """The units, and the heads if there are any.

        Raises:
            ValueError: a block has no more than those.
        """
        heads = (_last_units(model, self.heads, None, site="attn_head"),) if self.heads else ()
        return (_last_units(model, self.units, None), *heads)

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        neurons, of = self.routed(model), likely(1.0)

        def retained(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            with contextlib.ExitStack() as stack:
                for each in neurons:
                    stack.enter_context(ablated(model, each))
                return of.value(model, batch, None)

        def cut(model: Model, stepped: Stepped, _: None) -> None:
            if stepped.step == stepped.last:
                for each in neurons:
                    prune_(model, each)

        return {RETAIN: Term(retained, of.count, after=cut), FORGET: of}

    def __call__(self, model: Model, texts: Any, where: Any = None, *, step: Step = plain, **keywords: Any) -> Any:
        """As of `Remover`, of a fresh model; `step` cannot be changed.

        Raises:
            ValueError: as of `Remover`, or another `step`.
        """
        if step is not plain:
            raise ValueError("sgtm masks gradients by its own step, so no wrapper can stand around it")
        mask = WeightMask.none(model)
        for each in self.routed(model):
            # Grouped heads share keys and values, which then are not theirs.
            mask |= WeightMask.of(model, each, sever="both" if all(each.site.reads) else "out")
        entries = {id(weight): mask[name].to(weight.device) for name, weight in model.plain().items()}

        def masked(model: Model, gradient: Gradient) -> None:
            gradient(FORGET)
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(entries[id(weight)])
            gradient(RETAIN)

        return super().__call__(model, texts, where, step=masked, **keywords)


def _last_units(model: Model, n: int, layers: int | None, *, site: str = "mlp_post") -> Neurons:
    """The last so many neurons of each of the first blocks."""
    of = site_of(model.bridge, site)
    if n >= of.width:
        raise ValueError(f"{n} of {of.width} neurons of a block's {site!r}: nothing would be left for the rest")
    mask = torch.zeros(len(of.layers), of.width, dtype=torch.bool)
    mask[: len(of.layers) if layers is None else layers, -n:] = True
    return Neurons(mask, of)
