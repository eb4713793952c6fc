"""Rates, scales and seeds of the masks; what is small, read only or elsewhere is torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relearn_lens.models.dropout import LEAST, quick_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_at_the_rate_and_scales_what_it_keeps(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 1001, dtype=dtype, requires_grad=True)
    with quick_dropout():
        y = F.dropout(x, p)
    assert y.dtype == dtype
    assert float((y == 0).double().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    assert y.float().unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # pyright: ignore[reportArgumentType]
    rows = (y == 0).double().mean(1)  # no row, column or place among four has a rate of its own
    assert float(rows.std()) == pytest.approx((p * (1 - p) / 1001) ** 0.5, rel=0.15)
    each = (y.flatten()[: 4 * 250_000].view(-1, 4) == 0).double().mean(0)
    assert each.tolist() == pytest.approx([p] * 4, abs=5 * (p * (1 - p) / 25e4) ** 0.5)


def test_masks_follow_the_seed():
    x, drawn = torch.ones(LEAST), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with quick_dropout():
            drawn.append(nn.Dropout(0.1).train()(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_is_small_or_only_read_is_torchs_own():
    usual, small, large = F.dropout, torch.ones(LEAST - 1), torch.ones(LEAST)
    torch.manual_seed(0)
    want = usual(small, 0.1)
    torch.manual_seed(0)
    with quick_dropout():
        assert torch.equal(F.dropout(small, 0.1), want)
        assert F.dropout(large, 0.1, training=False) is large
        assert torch.equal(F.dropout(large, 0.0), large)
        assert not F.dropout(large, 1.0).any()
        F.dropout(large, 0.5, inplace=True)
        assert 0 < int((large == 0).sum()) < LEAST
    assert F.dropout is usual
    with pytest.raises(RuntimeError), quick_dropout():
        raise RuntimeError
    assert F.dropout is usual
