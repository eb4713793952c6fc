"""What comes before the first changed block is given back, to the bit, and only where it is the same."""

from typing import Any

import pytest
import torch

from relearn_lens.measure.prefixes import recorded, resumed, unchanged_before
from relearn_lens.models.model import reading
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.ablation import ablated
from tests.families import IDS, KINDS, MASK, lent_tagger
from tests.fixtures import Untouched

PLENTY = 2**30


def _logits(model: Any, ids: Any = IDS) -> torch.Tensor:
    with reading(model):
        return torch.stack([model(ids, MASK), model(ids.flip(0), MASK.flip(0))])


class _Calls:
    """Counts how often each block computes."""

    def __init__(self, model: Any):
        self.n = [0] * len(model.bridge.blocks)
        self.handles = []
        for i, block in enumerate(model.bridge.blocks):
            self.handles.append(block.original_component.register_forward_pre_hook(lambda *_, i=i: self._count(i)))

    def _count(self, i: int) -> None:
        self.n[i] += 1

    def since(self) -> list[int]:
        was, self.n = self.n, [0] * len(self.n)
        return was

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reading_from_a_block_on_is_a_whole_reading(kind, untouched: Untouched):
    model: Any = lent_tagger(kind)
    with untouched(model, weights=False):
        with recorded(model, max_bytes=PLENTY) as states:
            _logits(model)
        assert (states.whole, len(states.passes)) == (True, 2)
        for start in (1, 2):
            with torch.no_grad():
                for weight in model.bridge.blocks[start].parameters():
                    weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(start))
            whole = _logits(model)
            with resumed(model, states, start):
                assert torch.equal(_logits(model), whole)
            model.head.weight.data.mul_(1.5)
            if start == 1:  # the rest goes from the weights as they are now
                with recorded(model, max_bytes=PLENTY) as states:
                    _logits(model)


def test_only_the_blocks_from_there_on_compute(bert, untouched: Untouched):
    with recorded(bert, max_bytes=PLENTY) as states:
        _logits(bert)
    with untouched(bert):
        calls = _Calls(bert)
        for start, expected in ((0, [2, 2, 2]), (1, [0, 2, 2]), (3, [0, 0, 0])):
            with resumed(bert, states, start):
                _logits(bert)
            assert calls.since() == expected
        with resumed(bert, states, 3):  # another text
            assert torch.equal(_logits(bert, (IDS + 1) % 7), _logits(bert, (IDS + 1) % 7))
        assert calls.since() == [4, 4, 4]
        calls.stop()


def test_what_is_hooked_trained_or_too_large_is_computed_in_full(bert):
    site = site_of(bert.bridge, "resid")
    neurons = Neurons.of(site, [("1", 0)])
    with recorded(bert, max_bytes=PLENTY) as states, ablated(bert, neurons):
        _logits(bert)
    assert not states.whole
    bert.train()
    with recorded(bert, max_bytes=PLENTY) as states:
        bert(IDS, MASK)
    assert not states.whole
    bert.eval()
    with recorded(bert, max_bytes=1) as states:
        _logits(bert)
    calls = _Calls(bert)
    with resumed(bert, states, 3):
        _logits(bert)
    assert calls.since() == [2, 2, 2]
    calls.stop()


def test_neurons_ablated_later_are_ablated(bert):
    neurons = Neurons.of(site_of(bert.bridge, "resid"), [("1", 0), ("2", 5)])
    with recorded(bert, max_bytes=PLENTY) as states:
        before = _logits(bert)
    with ablated(bert, neurons):
        whole = _logits(bert)
        with resumed(bert, states, unchanged_before(bert, neurons)):
            assert torch.equal(_logits(bert), whole)
    assert not torch.equal(whole, before)


def test_how_many_blocks_come_before(bert):
    of = [unchanged_before(bert, WeightMask.of_parts(bert, part)) for part in ("embedding", "block 0", "block 2")]
    assert of == [0, 0, 2]
    assert unchanged_before(bert, WeightMask.of_parts(bert, ["head"])) == 3
    assert unchanged_before(bert, WeightMask.of_parts(bert, ["head", "block 1"])) == 1
    assert unchanged_before(bert, WeightMask.none(bert)) == 3
    site = site_of(bert.bridge, "resid")
    assert [unchanged_before(bert, Neurons.of(site, [(layer, 0)])) for layer in ("embed", "0", "2")] == [0, 0, 2]
