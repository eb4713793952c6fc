"""How far long work has come: whoever wants to know opens `reported`, whatever takes long opens `task`.

The innermost work knows how much there is, the outermost what it is for. So of tasks within each other the outermost
gives the name, and also the amount if it knows it; what happens inside counts towards it. Where nobody has opened
`reported`, a notebook or an interactive IPython shows a bar by itself, and a script shows nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from html import escape
from typing import Any

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass
class _Task:
    what: str
    total: int | None
    done: int = 0
    fixed: bool = False
    """Whether the amount is the task's own, and not that of what happens in it."""


class Bar:
    """A bar of one cell of a notebook, or of one line of an interactive IPython: what is under way, how much of it is
    done, and the seconds so far. Nothing is shown of what is quick; at its end the cell keeps the seconds alone."""

    WAIT, EVERY = 0.7, 0.25
    """Seconds until it is shown, and between two changes."""

    def __init__(self, shell: Any):
        self.cell = shell.execution_count
        self._shell = shell
        self._began = self._shown = time.monotonic()
        self._handle: Any = None
        shell.events.register("post_run_cell", self._finish)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if now - self._began >= self.WAIT and now - self._shown >= self.EVERY:
            self._shown = now
            bar = f'<progress value="{done}" max="{total}" style="width:16em;vertical-align:middle"></progress>'
            self._show(f"{bar} {escape(what)}, {now - self._began:.0f} s", f"{what} {done / max(total, 1):.0%}")

    def _show(self, html: str, plain: str) -> None:
        if getattr(self._shell, "kernel", None) is None:
            sys.stderr.write(f"\r\x1b[K{plain}")  # a terminal: the line is written over
            sys.stderr.flush()
            self._handle = self
            return
        shown = {"text/html": f'<div style="opacity:.75;font-size:.9em">{html}</div>', "text/plain": plain}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def _finish(self, *_: Any) -> None:
        """The cell has ended."""
        self._shell.events.unregister("post_run_cell", self._finish)
        if self._handle is not None:
            plain = f"{time.monotonic() - self._began:.0f} s"
            self._show(plain, "" if self._handle is self else plain)


_NOBODY_SAID: Any = object()
_TO: ContextVar[Progress | None] = ContextVar("to", default=_NOBODY_SAID)
_BAR: list[Bar] = []
"""The bar of the cell that is running, or of the last one that had any."""


def _reporter() -> Progress | None:
    """Whom progress is reported to: as `reported` says, else the bar of an interactive session."""
    if (to := _TO.get()) is not _NOBODY_SAID:
        return to
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        return None
    if not _BAR or _BAR[0].cell != shell.execution_count:
        _BAR[:] = [Bar(shell)]
    return _BAR[0]


_TASK: ContextVar[_Task | None] = ContextVar("task", default=None)


@contextlib.contextmanager
def reported(to: Progress | None) -> Iterator[None]:
    """For a while, report all long work to `to`; None reports to nobody, and shows no bar either."""
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
    current = _TASK.get()
    if current is None:
        return
    current.done += n
    if current.total is not None and (to := _reporter()) is not None:
        to(current.what, min(current.done, current.total), current.total)
