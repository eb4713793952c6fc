"""How far long work has come: whoever wants to know opens `reported`, whatever takes long opens `task`.

The innermost work knows how much there is, the outermost what it is for. So of tasks within each other the outermost
gives the name, and also the amount if it knows it; what happens inside counts towards it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass
class _Task:
    what: str
    total: int | None
    done: int = 0
    fixed: bool = False
    """Whether the amount is the task's own, and not that of what happens in it."""


_TO: ContextVar[Progress | None] = ContextVar("to", default=None)
_TASK: ContextVar[_Task | None] = ContextVar("task", default=None)


@contextlib.contextmanager
def reported(to: Progress | None) -> Iterator[None]:
    """For a while, report all long work to `to`; None reports to nobody."""
    token = _TO.set(to)
    try:
        yield
    finally:
        _TO.reset(token)


@contextlib.contextmanager
def task(what: str, total: int | None = None, *, done: int = 0) -> Iterator[None]:
    """For a while, something long is under way: `total` units of it, of which some may be `done`.

    Without a `total`, the amount is that of the tasks within.
    """
    outer = _TASK.get()
    if outer is None:
        token = _TASK.set(_Task(what, total, done, total is not None))
        try:
            if total is not None:
                advance(0)
            yield
        finally:
            _TASK.reset(token)
        return
    if not outer.fixed:
        outer.total, outer.done = total, done
    yield


def advance(n: int = 1) -> None:
    """So many more units of the task under way are done."""
    current, to = _TASK.get(), _TO.get()
    if current is None:
        return
    current.done += n
    if to is not None and current.total is not None:
        to(current.what, min(current.done, current.total), current.total)
