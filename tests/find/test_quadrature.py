"""Integrals that are known, along paths that are known."""

import numpy as np
import pytest
import torch

from relearn_lens.find.quadrature import QUADRATURES


@pytest.mark.parametrize("steps", [2, 5, 16, 64])
def test_gauss_legendre_is_exact_for_polynomials(steps):
    """The integral of a^q d(a^p) from 0 to 1 is p / (p + q)."""
    nodes, weights = QUADRATURES["gauss-legendre"](steps)
    assert nodes.dtype == weights.dtype == torch.float64
    assert len(nodes) == steps
    for p in {1, 2, steps - 1} - {steps}:
        for q in {0, 1, steps, 2 * steps - p}:
            assert nodes**q @ weights @ nodes**p == pytest.approx(p / (p + q), rel=1e-10)


@pytest.mark.parametrize("steps", [2, 5, 16])
def test_riemann_is_exact_along_any_path_for_a_gradient_that_is_linear_in_x(steps):
    """g = x: the mean of the ends times the increment telescopes to (x(1)^2 - x(0)^2) / 2."""
    nodes, weights = QUADRATURES["riemann"](steps)
    assert (nodes[0], nodes[-1], len(nodes)) == (0, 1, steps + 1)
    x = torch.exp(3 * nodes)
    assert x @ weights @ x == pytest.approx((np.exp(6) - 1) / 2)
    assert torch.ones_like(x) @ weights @ x == pytest.approx(np.exp(3) - 1)


@pytest.mark.parametrize("name", list(QUADRATURES))
def test_no_quadrature_sees_a_constant_and_all_converge(name):
    nodes, weights = QUADRATURES[name](40)
    torch.testing.assert_close(weights.sum(1), torch.zeros_like(nodes), atol=1e-10, rtol=0)
    # sin(2a) d(exp a) = exp(a) (sin 2a - 2 cos 2a) / 5 between the ends
    exact = (np.e * (np.sin(2) - 2 * np.cos(2)) + 2) / 5
    found = float(torch.sin(2 * nodes) @ weights @ nodes.exp())
    tolerance = {"gauss-legendre": 1e-12, "riemann": 1e-3}.get(name, 5e-2)
    assert found == pytest.approx(exact, rel=tolerance)


def test_captums_sums_take_the_increment_after_each_node():
    """By hand: x = 0, 1, 4 at a = 0, 1/2, 1 with gradients 5, 7, 9: 5 (1 - 0) + 7 (4 - 1)."""
    nodes, weights = QUADRATURES["captum-riemann"](2)
    assert nodes.tolist() == [0, 0.5, 1]
    x, g = torch.tensor([0.0, 1, 4]).double(), torch.tensor([5.0, 7, 9]).double()
    assert float(g @ weights @ x) == 26
    assert float(g @ QUADRATURES["riemann"](2)[1] @ x) == 6 * 1 + 8 * 3
