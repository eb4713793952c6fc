"""The checks of the test run bite: on types and shapes, in functions, methods and dataclasses."""

import importlib.util
import sys

import pytest
from jaxtyping import TypeCheckError

from tests import typed

SOURCE = '''
from __future__ import annotations
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor
if TYPE_CHECKING:
    from nowhere import Unknown

def plus(one: Float[Tensor, "row col"], other: Float[Tensor, "row col"]) -> Float[Tensor, "row col"]:
    return one + other

def turned(x: Float[Tensor, "row col"]) -> Float[Tensor, "row col"]:
    return x.T

def later(x: Later) -> int:
    return x

def unknown(x: Unknown, n: int) -> int:
    """What it says."""
    return n

@dataclass(frozen=True)
class Pair:
    one: Float[Tensor, "row"]
    other: Float[Tensor, "row"]

    @property
    def n(self) -> int:
        return self.one

    @staticmethod
    def double(n: int) -> int:
        return 2 * n

    @classmethod
    def of(cls, n: int) -> Pair:
        return cls

@contextmanager
def lent(n: int) -> Iterator[int]:
    yield n

def outer(n: int):
    def inner(x: str) -> str:
        return x
    return inner(n)

Later = int
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module as the import hook makes those of the package."""
    path = tmp_path / "a_module_of_the_package.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=typed._Loader(path.stem, str(path)))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, made)
    spec.loader.exec_module(made)
    return made


def test_shapes_of_one_call_go_together(module):
    import torch

    one = torch.ones(2, 3)
    assert module.plus(one, one).shape == (2, 3)
    assert module.plus(one.T, one.T).shape == (3, 2)  # each call has its own sizes
    assert module.Pair(one[0], one[1]).one.shape == (3,)
    for wrong in (
        lambda: module.plus(one, one.T),
        lambda: module.turned(one),
        lambda: module.plus(one, one.long()),
        lambda: module.Pair(one[0], one[:, 0]),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    assert module.turned(torch.eye(2)).shape == (2, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m.later("one"),
        lambda m: m.unknown(object(), "n"),
        lambda m: m.Pair.double("n"),
        lambda m: m.Pair.of(1),
        lambda m: m.lent("n").__enter__(),
        lambda m: m.outer(1),
    ],
)
def test_types_are_checked_wherever_there_is_a_function(module, wrong):
    with pytest.raises(TypeCheckError):
        wrong(module)


def test_what_is_right_goes_through(module):
    import torch

    assert module.later(3) == 3
    assert module.unknown(object(), 2) == 2
    assert module.Pair.double(2) == 4
    with module.lent(3) as n:
        assert n == 3
    with pytest.raises(TypeCheckError):
        _ = module.Pair(torch.ones(2), torch.ones(2)).n
    assert module.unknown.__doc__ == "What it says."
    assert module.unknown.__wrapped__.__annotations__ == {"x": "Unknown", "n": "int", "return": "int"}


def test_the_package_is_checked_here_and_its_own_checks_are_jaxtypings():
    from relearn_lens.measure.evaluation import SpanScores
    from relearn_lens.names import unknown

    assert unknown.__wrapped__.__globals__[typed.NAME] is typed.checked
    with pytest.raises(TypeCheckError):
        unknown(1, 2, 3)  # pyright: ignore[reportArgumentType]
    assert SpanScores.__init__.__globals__["__name__"].startswith("jaxtyping")
