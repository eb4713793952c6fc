"""Quadratures: how an integral along a path is summed up from a few points of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Rule = tuple[Float[Tensor, " node"], Float[Tensor, "node node"]]
"""Nodes in [0, 1] and W, float64: the integral of g dx/da over the path is the sum of W[i, j] g(node i) x(node j)."""


def gauss_legendre(steps: int) -> Rule:
    """Gauss-Legendre nodes; dX/da at a node is that of the polynomial through X at all nodes.

    W[i, j] = w_i D[i, j] with the barycentric differentiation matrix D. Exact where X(a) is a polynomial below degree
    `steps` and the integrand one below `2 steps`. Source: Berrut & Trefethen 2004, section 9.3, for D.
    """
    nodes, weights = _legendre(steps)
    gaps = nodes[:, None] - nodes + np.eye(steps)
    # Barycentric weights 1 / prod(gaps), as logarithms: the products underflow for many nodes.
    size, sign = np.log(np.abs(gaps)).sum(1), np.sign(gaps).prod(1)
    slopes = np.exp(size[:, None] - size) * sign[:, None] * sign / gaps
    np.fill_diagonal(slopes, 0)
    np.fill_diagonal(slopes, -slopes.sum(1))  # a constant has no slope
    return torch.from_numpy(nodes), torch.from_numpy(weights[:, None] * slopes)


def riemann(steps: int) -> Rule:
    """`steps` equal intervals: the mean of the gradients at an interval's two ends times X's increment."""
    nodes, left = captum_riemann(steps)
    return nodes, (left + left.roll(1, 0)) / 2


def captum_gauss_legendre(steps: int) -> Rule:
    """captum's LayerConductance with `method="gausslegendre"` and `n_steps=steps`.

    The gradient at each of `steps + 1` nodes times X's increment to the next; the path before the first and after the
    last is left out.
    """
    return torch.from_numpy(_legendre(steps + 1)[0]), _next_increment(steps)


def captum_riemann(steps: int) -> Rule:
    """captum's LayerConductance with `method="riemann_trapezoid"`: the gradient at the start of each interval."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64), _next_increment(steps)


def _legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (1 + nodes) / 2, weights / 2


def _next_increment(steps: int) -> Float[Tensor, "node node"]:
    """W of the gradient at node i times X(node i + 1) - X(node i); nothing at the last node."""
    here = torch.eye(steps + 1, dtype=torch.float64)
    here[-1] = 0
    return here.roll(1, 1) - here


QUADRATURES: dict[str, Callable[[int], Rule]] = {
    "gauss-legendre": gauss_legendre,
    "riemann": riemann,
    "captum-gauss-legendre": captum_gauss_legendre,
    "captum-riemann": captum_riemann,
}
"""Quadrature name to the rule for a number of steps."""
