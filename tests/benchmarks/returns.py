"""How often grafts say what was planted: `python -m tests.benchmarks.returns [N]`, for N random seeds and blocks.

Three made pairs of a cut and a retrained toy, each with the truth of its return by construction:

1. *one*: only block l may train, so it alone is enough and needed, and all else equals the cut to the bit.
2. *either*: two blocks are each enough, and so neither is needed.
3. *both*: two blocks are needed together, none is enough, and the cumulative curve jumps at the second.

A part counts as enough or needed from a share of 0.5 of the margin on; the worst shares on either side are printed too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from relearn_lens.measure.grafting import Grafts
from tests.returns import BLOCKS, drawn_blocks, each_enough, needed_together, retrained_in

BAR = 0.5


class Truth(NamedTuple):
    """What was planted, and what the grafts gave."""

    grafted: Grafts
    enough: set[str]
    needed: set[str]
    jump: str
    """Part at which the curve from the input up passes half of the way."""


def _name(blocks: tuple[int, ...]) -> set[str]:
    return {f"block {i}" for i in blocks}


def one(seed: int) -> Truth:
    """Only one block trained."""
    block = seed % len(BLOCKS)
    made = retrained_in(block, seed)
    moved = {name for name, value in made.retrained.items() if not torch.equal(value, made.cut_weights[name])}
    assert all(f".layers.{block}." in name for name in moved), moved
    return Truth(made.grafted(f1=False, cumulative=True), _name((block,)), _name((block,)), f"block {block}")


def either(seed: int) -> Truth:
    """Two are each enough."""
    blocks = drawn_blocks(seed)
    return Truth(
        each_enough(blocks, seed).grafted(f1=False, cumulative=True), _name(blocks), set(), f"block {min(blocks)}"
    )


def both(seed: int) -> Truth:
    """Two are needed together."""
    blocks = drawn_blocks(seed)
    return Truth(
        needed_together(blocks, seed).grafted(f1=False, cumulative=True), set(), _name(blocks), f"block {max(blocks)}"
    )


PAIRS: dict[str, Callable[[int], Truth]] = {"one": one, "either": either, "both": both}


def returns(n: int = 100) -> None:
    """Print how often each pair was told right, and by how much."""
    print(f"{'pair':7s} {'n':>4s} {'right':>6s} {'least true share':>17s} {'largest false share':>20s}")
    for name, make in PAIRS.items():
        right, true, false = 0, [], []
        for seed in range(n):
            made = make(seed)
            told = True
            for kind, planted in (("enough", made.enough), ("needed", made.needed)):
                shares = {part: getattr(made.grafted, kind)(part).value for part in made.grafted.parts}
                told &= {part for part, share in shares.items() if share >= BAR} == planted
                for part, share in shares.items():
                    (true if part in planted else false).append(share)
            half = (made.grafted.value(made.grafted.cut) + made.grafted.value(made.grafted.retrained)) / 2
            told &= next(part for part, of in made.grafted.up.items() if made.grafted.value(of) > half) == made.jump
            right += told
        print(f"{name:7s} {n:4d} {right:6d} {min(true):17.3f} {max(false):20.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    returns(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
