"""What a step of a remover can do beside following the gradient: wrappers, over any remover."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from relearn_lens.methods import Method
from relearn_lens.models.model import Model
from relearn_lens.models.training import Gradient
from relearn_lens.remove.removal import FORGET


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
        others = [part for part in gradient(FORGET) if part != FORGET]
        slopes = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(slope, dtype=torch.float32) for _, slope in slopes]).norm()
        here = [weight.detach().clone() for weight, _ in slopes]
        try:
            with torch.no_grad():
                for weight, slope in slopes:
                    weight.add_(slope * (self.rho / (norm + 1e-12)))
                    weight.grad = None
            gradient(FORGET)
        finally:
            with torch.no_grad():
                for (weight, _), value in zip(slopes, here, strict=True):
                    weight.copy_(value)
        if others:
            gradient(*others)
