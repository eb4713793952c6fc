"""What a step of a remover can do beside following the gradient: wrappers, over any remover."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from relearn_lens.methods import Method
from relearn_lens.models.model import Model
from relearn_lens.models.training import Gradient, Stepped
from relearn_lens.neurons.sites import component_site, streaming
from relearn_lens.remove.removal import FORGET, blocks_of

Slopes = Sequence[tuple[Tensor, Tensor]]
"""Weights, and for each a tensor of its shape: a gradient, or a direction."""


class SAM(Method):
    """Sharpness-aware: the forgetting gradient is taken where a small step makes forgetting worst, so that a few steps
    of relearning find no way back near by.

    With g the gradient of the forget part at theta, it is taken again at theta + rho g / |g|, over all entries that may
    move; all other parts' at theta. Costs three passes in the place of one, and a copy of the weights that move.

    Source: Foret et al. 2021; Fan et al. 2025, on unlearning.
    """

    name: ClassVar[str] = "sam"
    formula: ClassVar[str] = "grad f(theta + rho grad f / |grad f|) + grad r(theta)"
    source: ClassVar[str] = "Foret et al. 2021; Fan et al. 2025"

    rho: float = Field(
        default=0.01, ge=0, le=1e3, description="radius, L2 norm over all weights that move (Fan et al. 2025); 0: none"
    )

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        if self.rho == 0:
            gradient()
            return
        _against(model, gradient, self.rho, 1)


class TARLight(Method):
    """Tamper-resistant, of first order: the forgetting gradient is taken where an adversary stands after some steps of
    relearning.

    The adversary goes `adversary` times along the gradient of the forget part, each step of length rho; the gradient of
    that part is taken there alone, and applied at theta. With one step it is `SAM`. The published method has several
    adversaries with optimisers of their own, on data of theirs, and an entropy loss.

    Source: Tamirisa et al. 2024 (TAR).
    """

    name: ClassVar[str] = "tar_light"
    formula: ClassVar[str] = "grad f(theta + adversary steps of rho grad f / |grad f|) + grad r(theta)"
    source: ClassVar[str] = "Tamirisa et al. 2024 (TAR)"

    rho: float = Field(default=0.01, ge=0, le=1e3, description="length of a step of the adversary, L2 norm")
    adversary: int = Field(default=8, ge=1, le=10_000, description="steps of the adversary; published: 64")

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        _against(model, gradient, self.rho, self.adversary)


class LAT(Method):
    """Latent adversarial: the forgetting gradient is taken where hidden states are disturbed so that forgetting is
    worst.

    At every token a vector d is added to the outputs of `layers`. It goes `ascent` times along the gradient of the
    forget part in it, each step of length `rate`, and back into the ball of radius `eps` (L2, at each token). The
    forgetting gradient is then taken with it, all other parts' without. Costs `ascent` + 2 passes in the place of one.

    The published method lets the adversary aim at an answer of its own, disturb prompts alone, and step by Adam; here
    it raises what the remover lowers, everywhere, by steps of a length.

    Source: Casper et al. 2024; Sheshadri et al. 2024 (targeted LAT).
    """

    name: ClassVar[str] = "lat"
    formula: ClassVar[str] = "grad f(theta, h_l + d) + grad r(theta), d = argmax of f over |d| <= eps at every token"
    source: ClassVar[str] = "Casper et al. 2024; Sheshadri et al. 2024"

    eps: float = Field(
        default=1.0, ge=0, le=1e6, description="largest disturbance of a token, activation units; 0: none"
    )
    rate: float = Field(default=0.25, gt=0, le=1e6, description="length of a step of it, activation units")
    ascent: int = Field(default=16, ge=1, le=10_000, description="steps of it (Sheshadri et al. 2024)")
    layers: tuple[int, ...] | None = Field(
        default=None, description="blocks whose outputs are disturbed, from 0; none: as deep as 8, 16, 24 of Llama's 32"
    )

    def at(self, model: Model) -> tuple[int, ...]:
        """The blocks whose outputs are disturbed.

        Raises:
            ValueError: the model does not have one of them.
        """
        return blocks_of(model, self.layers, lambda n: (k * n // 4 for k in (1, 2, 3)))

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        layers, site = self.at(model), component_site(model.bridge, "resid")
        if self.eps == 0:
            gradient()
            return
        disturbed: dict[tuple[int, int], Tensor] = {}
        passes = dict.fromkeys(layers, 0)

        def disturb(layer: int, x: Tensor) -> Tensor | None:
            if layer not in passes:
                return None
            # A gradient may take several passes, of several texts or of parts of a batch: each time the same ones.
            passes[layer] += 1
            at = layer, passes[layer]
            if at not in disturbed:
                disturbed[at] = torch.zeros_like(x, requires_grad=True)
            return x + disturbed[at]

        def forgetting() -> tuple[str, ...]:
            passes.update(dict.fromkeys(layers, 0))
            with streaming(model.bridge, site, disturb):
                return gradient(FORGET)

        for _ in range(self.ascent):
            parts = forgetting()
            taken(model)
            for d in disturbed.values():
                if (slope := d.grad) is not None:
                    with torch.no_grad():
                        d += self.rate * torch.nn.functional.normalize(slope, dim=-1, eps=1e-30)
                        d *= (self.eps / d.norm(dim=-1, keepdim=True).clamp(min=self.eps)).to(d)
                    d.grad = None
        forgetting()
        _others(gradient, parts)


class Smoothed(Method):
    """Randomised smoothing: the forgetting gradient is the mean of those at `n` points around theta.

    The noise is normal, over all entries that have a gradient, and drawn from the seed of each step.

    Source: Cohen et al. 2019; Fan et al. 2025, on unlearning.
    """

    name: ClassVar[str] = "smoothed"
    formula: ClassVar[str] = "mean_n grad f(theta + sigma N(0, I)) + grad r(theta)"
    source: ClassVar[str] = "Cohen et al. 2019; Fan et al. 2025"

    n: int = Field(default=3, ge=1, le=1000, description="points")
    sigma: float = Field(default=1e-4, ge=0, le=1e3, description="of the noise, in units of a weight (Fan et al. 2025)")

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        parts = gradient(FORGET)
        here = taken(model)
        # What may not move has a gradient of 0, and stays where it is.
        for _ in range(self.n):
            noise = [(weight, torch.randn_like(weight) * (slope != 0)) for weight, slope in here]
            with moved(noise, self.sigma):
                gradient(FORGET)
        for weight, _ in here:
            weight.grad = None if weight.grad is None else weight.grad / self.n
        _others(gradient, parts)


class GradientPenalty(Method):
    """Penalises the norm of the forgetting gradient, so that forgetting ends where the loss is flat.

    The gradient of |grad f| is the change of grad f along its own direction u, taken as a central difference over
    +-`radius` u. Costs four passes in the place of one.

    In the release of Fan et al. 2025 the penalty is a number without a gradient, and its weight is always .01:
    `faithful=True` is that, a step along the plain gradient.

    Source: Fan et al. 2025.
    """

    name: ClassVar[str] = "gradient_penalty"
    formula: ClassVar[str] = "grad (f + rho |grad f|) + grad r"
    source: ClassVar[str] = "Fan et al. 2025"

    rho: float = Field(default=0.01, ge=0, le=1e6, description="weight of the penalty (Fan et al. 2025)")
    radius: float = Field(default=0.01, gt=0, le=1e3, description="of the difference, L2 norm over what moves")
    faithful: bool = Field(default=False, description="a penalty without a gradient, as released")

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        parts = gradient(FORGET)
        if not self.faithful:
            slopes = taken(model)
            bend = _curvature(model, gradient, _unit(slopes), self.radius)
            _add(slopes, 1.0)
            _add(bend, self.rho)
        _others(gradient, parts)


class Curvature(Method):
    """Penalises how much the forgetting gradient changes over a small step, so that forgetting ends where the loss is
    not curved.

    v is the direction of the forgetting gradient, through which no gradient goes; w that of the change of the gradient
    from theta to theta + mu v. The penalty's gradient, (H(theta + mu v) - H(theta)) w, is taken by central differences
    over +-`radius` w. Costs seven passes in the place of one.

    In the release of Fan et al. 2025 the penalty is a number without a gradient, and the forget loss is
    back-propagated twice: `faithful=True` is that, 2 grad f + grad r.

    Source: Moosavi-Dezfooli et al. 2019; Fan et al. 2025, on unlearning.
    """

    name: ClassVar[str] = "curvature"
    formula: ClassVar[str] = "grad (f + rho |grad f(theta + mu v) - grad f(theta)|) + grad r, v = grad f / |grad f|"
    source: ClassVar[str] = "Moosavi-Dezfooli et al. 2019; Fan et al. 2025"

    rho: float = Field(default=10.0, ge=0, le=1e6, description="weight of the penalty (Fan et al. 2025)")
    mu: float = Field(default=0.01, gt=0, le=1e3, description="length of the step, L2 norm (Fan et al. 2025)")
    radius: float = Field(default=0.01, gt=0, le=1e3, description="of the differences, L2 norm over what moves")
    faithful: bool = Field(default=False, description="no gradient of the penalty, twice that of f, as released")

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        parts = gradient(FORGET)
        if self.faithful:
            gradient(FORGET)
        else:
            here = taken(model)
            direction = _unit(here)
            with moved(direction, self.mu):
                gradient(FORGET)
                there = taken(model)
                bend = _unit([(w, far - near) for (w, far), (_, near) in zip(there, here, strict=True)])
                far = _curvature(model, gradient, bend, self.radius)
            near = _curvature(model, gradient, bend, self.radius)
            _add(here, 1.0)
            _add(far, self.rho)
            _add(near, -self.rho)
        _others(gradient, parts)


class Averaged(Method):
    """At the end the weights become the mean of what they were on the way, from step `start` on.

    Until then training goes on from weights that are not averaged, and a pause shows those. Costs a copy of the weights
    that move.

    Source: Izmailov et al. 2018; Fan et al. 2025, on unlearning.
    """

    name: ClassVar[str] = "averaged"
    formula: ClassVar[str] = "theta <- mean of theta at steps start, start + stride, ..."
    source: ClassVar[str] = "Izmailov et al. 2018; Fan et al. 2025"

    start: int = Field(default=100, ge=1, le=10**9, description="first step that counts (Fan et al. 2025)")
    stride: int = Field(
        default=5, ge=1, le=10**9, description="steps from one that counts to the next (Fan et al. 2025)"
    )

    def __call__(self, model: Model, gradient: Gradient) -> None:
        """As `train_` takes a step."""
        gradient()

    def after(self, model: Model, stepped: Stepped) -> None:
        """Take the weights into the mean; at the end, put the mean in their place.

        Raises:
            ValueError: the training ends before step `start`.
        """
        if stepped.last < self.start:
            raise ValueError(f"averaged: no step counts, the first is {self.start} and the last {stepped.last}")
        memory = stepped.memory
        if stepped.step >= self.start and (stepped.step - self.start) % self.stride == 0:
            n = float(memory.get("averaged", torch.zeros(()))) + 1
            memory["averaged"] = torch.tensor(n)
            for name, weight in stepped.moving.items():
                wide = torch.promote_types(weight.dtype, torch.float32)
                mean = memory.setdefault(f"averaged.{name}", torch.zeros_like(weight, dtype=wide))
                mean.lerp_(weight.to(wide), 1 / n)
        if stepped.step == stepped.last:
            for name, weight in stepped.moving.items():
                weight.copy_(memory[f"averaged.{name}"])


# --- gradients, and steps that are taken back


def _others(gradient: Gradient, parts: Iterable[str]) -> None:
    """Add the gradient of all parts but the forgotten one."""
    if others := [part for part in parts if part != FORGET]:
        gradient(*others)


def _against(model: Model, gradient: Gradient, rho: float, steps: int) -> None:
    """The gradient of the forget part where an adversary stands after so many steps of length rho up it, and that of
    all other parts where the model is."""
    parts: tuple[str, ...] = ()
    with contextlib.ExitStack() as stack:
        for _ in range(steps):
            parts = gradient(FORGET)
            slopes = taken(model)
            stack.enter_context(moved(slopes, rho / (norm(slopes) + 1e-12)))
        gradient(FORGET)
    _others(gradient, parts)


def taken(model: Model) -> list[tuple[Tensor, Tensor]]:
    """The gradients that the parameters have, which have none afterwards."""
    slopes: list[tuple[Tensor, Tensor]] = [(w, w.grad) for w in model.parameters() if w.grad is not None]
    for weight, _ in slopes:
        weight.grad = None
    return slopes


def norm(slopes: Slopes) -> Tensor:
    """The L2 norm over all of them, in float32 or better."""
    wide = [torch.promote_types(slope.dtype, torch.float32) for _, slope in slopes]
    return torch.stack([torch.linalg.vector_norm(s, dtype=d) for (_, s), d in zip(slopes, wide, strict=True)]).norm()


@contextlib.contextmanager
def moved(slopes: Slopes, by: float | Tensor) -> Iterator[None]:
    """For a while, the weights so far along a direction; back to the bit, also after an error.

    Warns where weights in 16 bits round most of the way off: then a wrapper does next to nothing.
    """
    here = [weight.detach().clone() for weight, _ in slopes]
    try:
        with torch.no_grad():
            for weight, slope in slopes:
                weight.add_(slope * by)
            if any(weight.element_size() < 4 for weight, _ in slopes):
                way = norm([(w, w - old) for (w, _), old in zip(slopes, here, strict=True)])
                _check_rounding(float(norm(slopes) * abs(by)), float(way), here[0].dtype)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(slopes, here, strict=True):
                weight.copy_(value)


def _check_rounding(wanted: float, way: float, dtype: torch.dtype) -> None:
    if not 0.5 * wanted <= way <= 2 * wanted:
        warnings.warn(
            f"a way of length {wanted:.3g} in weights of {str(dtype).removeprefix('torch.')} became one of {way:.3g} "
            "by rounding, so the wrapper does not do what it says; take a larger one, or float32",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


def _unit(slopes: Slopes) -> list[tuple[Tensor, Tensor]]:
    length = norm(slopes) + 1e-12
    return [(weight, slope / length) for weight, slope in slopes]


def _add(slopes: Slopes, by: float) -> None:
    for weight, slope in slopes:
        weight.grad = by * slope if weight.grad is None else weight.grad + by * slope


def _curvature(model: Model, gradient: Gradient, along: Slopes, radius: float) -> list[tuple[Tensor, Tensor]]:
    """The forget part's second derivative along a direction, by a central difference."""

    def at(by: float) -> dict[int, Tensor]:
        with moved(along, by):
            gradient(FORGET)
            return {id(weight): slope for weight, slope in taken(model)}

    ahead, behind = at(radius), at(-radius)
    return [(weight, (ahead[id(weight)] - behind[id(weight)]) / (2 * radius)) for weight, _ in along]
