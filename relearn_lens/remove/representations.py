"""Removers that work on hidden states: what is to be forgotten is led astray inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel, Model, hidden
from relearn_lens.models.training import Stepped
from relearn_lens.neurons.sites import Component, component_site, kept
from relearn_lens.remove.losses import likely
from relearn_lens.remove.removal import (
    FORGET,
    RETAIN,
    Remover,
    Removing,
    Term,
    block_of,
    blocks_of,
    by_sentence,
    kept_by_piece,
    kept_of,
    n_subwords,
    written,
)
from relearn_lens.text.encoding import Batch, Reading


class RMU(Remover):
    """Representation misdirection: hidden states of the forgotten text go to one random direction, those of the
    retained text stay.

    h_l is the output of block l at each sub-word that carries the loss, or (`reading="before"`) at the token before it,
    from which it is predicted: of an answer of one sub-word that alone has a part in answering. u is a vector of
    entries from U[0, 1] (all positive, as released), of length 1, drawn from the seed. Squared errors are means over
    the d_model coordinates.

    Unless `where` says something else, the MLPs' output matrices of `matrices` blocks up to l train. What the retained
    text's states were is kept on the CPU: sub-words x d_model.

    Published: Li et al. 2024 for Zephyr, the defaults; Che et al. 2025: c 20, alpha 100; open-unlearning: c 2, alpha 1,
    layer 7, all weights.

    Source: Li et al. 2024 (WMDP).
    """

    name: ClassVar[str] = "rmu"
    formula: ClassVar[str] = "|h_l - c u|^2_f / d + alpha |h_l - h0_l|^2_r / d"
    source: ClassVar[str] = "Li et al. 2024 (WMDP)"
    usual: ClassVar[Training] = Removing(lr=5e-5)

    layer: int | None = Field(
        default=None, ge=0, le=10_000,
        description="block whose output is led astray, from 0; none: as deep as 7 is of Zephyr's 32 (Li et al. 2024)",
    )  # fmt: skip
    coefficient: float = Field(
        default=6.5, gt=0, le=1e6, description="c, length of the vector that is led to, in activation units (Zephyr)"
    )
    alpha: float = Field(default=1200.0, ge=0, le=1e9, description="weight of retaining (Zephyr); 0: no retained text")
    reading: Reading = Field(
        default="word",
        description="where hidden states are read; word: at the sub-words themselves, as released; before: at the "
        "token before each, from which it is predicted (ours)",
    )
    matrices: int = Field(default=3, ge=1, le=10_000, description="blocks up to `layer` whose W_out trains (Zephyr)")

    def at(self, model: Model) -> int:
        """The block whose output is led astray.

        Raises:
            ValueError: the model does not have it.
        """
        return block_of(model, self.layer, lambda n: round(7 / 32 * n))

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        layer, before = self.at(model), self.reading == "before"
        goal = torch.rand(int(model.bridge.cfg.d_model), generator=torch.Generator().manual_seed(seed))
        goal = self.coefficient * goal / goal.norm()

        def astray(model: Model, batch: Batch, _: None) -> tuple[Tensor, int]:
            return _distance(states(model, batch, layer, before=before), goal.to(model.device))

        def still(model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
            return _distance(states(model, batch, layer, before=before), kept_of(kept, batch))

        keep = kept_by_piece(lambda model, batch: by_sentence(states(model, batch, layer, before=before), batch))
        retained = {RETAIN: Term(still, n_subwords, keep, self.alpha)} if self.alpha else {}
        return {FORGET: Term(astray, n_subwords), **retained}

    def entries(self, model: Model) -> Mapping[str, Bool[Tensor, ...]]:
        """All of the MLPs' output matrices of the last blocks up to `layer`."""
        layer = self.at(model)
        return written(model, range(max(0, layer + 1 - self.matrices), layer + 1))


class CircuitBreaker(Remover):
    """Rerouting: hidden states of the forgotten text turn away from what they were, those of the retained text stay.

    t counts steps. Cosine and norm are means over `layers` and over the sub-words that carry the loss, read as RMU
    reads them. What all states were is kept on the CPU: sub-words x layers x d_model.

    The release averages the retained norm over padding too, which has none: `faithful=True` does so, and then batches
    cannot go through the model in parts.

    Source: Zou et al. 2024 (circuit breakers); alpha is 10 there, and 5 in parts of the release.
    """

    name: ClassVar[str] = "circuit_breaker"
    formula: ClassVar[str] = "alpha (1 - t/T) mean relu(cos(h0, h))_f + alpha (t/T) mean |h - h0|_r"
    source: ClassVar[str] = "Zou et al. 2024 (circuit breakers)"
    usual: ClassVar[Training] = Removing(lr=1e-4, steps=(150,))

    layers: tuple[int, ...] | None = Field(
        default=None, description="blocks whose outputs turn, from 0; none: as deep as 10 and 20 are of Llama's 32"
    )
    alpha: float = Field(default=10.0, gt=0, le=1e6, description="weight of both terms together")
    horizon: int = Field(default=300, ge=1, le=10**9, description="T, steps until only the retained term weighs")
    reading: Reading = Field(default="word", description=RMU.model_fields["reading"].description)
    faithful: bool = Field(default=False, description="retained norm averaged over padding too, as released")

    def at(self, model: Model) -> tuple[int, ...]:
        """The blocks whose outputs turn.

        Raises:
            ValueError: the model does not have one of them.
        """
        return blocks_of(model, self.layers, lambda n: (round(10 / 32 * n), round(20 / 32 * n)))

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        layers, before = self.at(model), self.reading == "before"
        memory = {"step": torch.zeros(())}

        def here(model: Model, batch: Batch) -> Tensor:
            return component_states(model, batch, "resid", layers, before=before)

        def share() -> float:
            return min(1.0, float(memory["step"]) / self.horizon)

        def turned(model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
            cosine = torch.cosine_similarity(here(model, batch).float(), kept_of(kept, batch).float(), dim=-1)
            return (1 - share()) * cosine.relu().mean(1).sum(), len(cosine)

        def still(model: Model, batch: Batch, kept: list[Tensor]) -> tuple[Tensor, int]:
            far = here(model, batch).float() - kept_of(kept, batch).float()
            # A norm has no gradient at 0, where it starts.
            norms = (far.square().sum(-1) + 1e-12).sqrt().mean(1)
            return share() * norms.sum(), batch.ids.numel() if self.faithful else len(norms)

        def count(_: Model, stepped: Stepped, kept: Any) -> None:
            memory["step"] = torch.tensor(float(stepped.step))

        keep = kept_by_piece(lambda model, batch: by_sentence(here(model, batch), batch))
        counted = None if self.faithful else n_subwords
        return {
            FORGET: Term(turned, n_subwords, keep, self.alpha, memory=memory, after=count),
            RETAIN: Term(still, counted, keep, self.alpha, memory=memory),
        }


class RepNoise(Remover):
    """Makes what the MLPs write on the forgotten text look like noise, and raises the loss of reading it at any depth.

    MMD is the squared maximum mean discrepancy between the MLPs' outputs at the sub-words that carry the loss and as
    many draws of N(0, I), with a sum of five Gaussian kernels whose widths are 1/4 to 4 times the mean squared
    distance; the mean over blocks. CE_l is the cross-entropy by the model's own head from the output of block l (logit
    lens). Neither is a sum over sub-words, so batches cannot go through the model in parts.

    Source: Rosati et al. 2024 (RepNoise).
    """

    name: ClassVar[str] = "rep_noise"
    formula: ClassVar[str] = "CE_r + beta mean_l MMD(mlp_l, N(0, I))_f - alpha log(1 + mean(CE, CE_1, ..., CE_L)_f)"
    source: ClassVar[str] = "Rosati et al. 2024 (RepNoise)"
    usual: ClassVar[Training] = Removing(lr=2e-5, epochs=1)

    alpha: float = Field(default=1.0, ge=0, le=1e6, description="weight of the ascent")
    beta: float = Field(default=1e-3, ge=0, le=1e6, description="weight of the noise")

    def terms(self, model: Model, seed: int) -> dict[str, Term]:
        if not isinstance(model, LanguageModel):
            raise ValueError("rep_noise reads hidden states through the vocabulary head, and this model is a tagger")

        def value(model: LanguageModel, batch: Batch, _: None) -> tuple[Tensor, int]:
            mlp, resid = component_site(model.bridge, "mlp"), component_site(model.bridge, "resid")
            with kept(model.bridge, mlp) as by_mlp, kept(model.bridge, resid) as by_block:
                last = hidden(model.bridge, batch.ids, batch.mask)
            right = batch.ids.flatten()[batch.subword]
            depths = [last.flatten(0, 1), *(model.bridge.ln_final(x.flatten(0, 1)) for x in by_block.values())]
            losses = [F.cross_entropy(model.logits(x[batch.subword - 1]).float(), right) for x in depths]
            written = [x.flatten(0, 1)[batch.subword].float() for x in by_mlp.values()]
            noise = torch.stack([mmd(x, torch.randn_like(x)) for x in written]).mean()
            return self.beta * noise - self.alpha * torch.stack(losses).mean().log1p(), 1

        return {FORGET: Term(value, None), RETAIN: likely(1.0)}


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy of two samples, with five Gaussian kernels."""
    both = torch.cat([x, y])
    square = (both[:, None] - both[None]).square().sum(-1)
    width = square.detach().sum() / max(len(both) * (len(both) - 1), 1)
    kernel = torch.stack([(-square / (width * 2.0**k + 1e-12)).exp() for k in range(-2, 3)]).sum(0)
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def states(model: Model, batch: Batch, layer: int, *, before: bool = False) -> Float[Tensor, "subword d_model"]:
    """The output of a block at each sub-word of a batch that carries the loss, or at the token `before` it."""
    return component_states(model, batch, "resid", (layer,), before=before)[:, 0]


def component_states(
    model: Model, batch: Batch, component: Component, layers: Sequence[int], *, before: bool = False
) -> Float[Tensor, "subword layer d_model"]:
    """What a component of some blocks gives at each sub-word that carries the loss, or at the token `before` it."""
    with kept(model.bridge, component_site(model.bridge, component), layers=layers) as seen:
        hidden(model.bridge, batch.ids, batch.mask)
    return torch.stack([seen[layer].flatten(0, 1)[batch.subword - int(before)] for layer in layers], 1)


def _distance(here: Tensor, there: Tensor) -> tuple[Tensor, int]:
    return (here.float() - there.float()).square().mean(-1).sum(), len(here)
