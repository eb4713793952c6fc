"""Whom long work tells how far it is: whoever asks, an interactive session by itself, a script nobody."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from relearn_lens import progress


class Shell:
    """What the bar needs of IPython: the number of the cell, and the event at its end."""

    def __init__(self, kernel: object | None):
        self.execution_count, self.kernel, self.at_end = 1, kernel, []
        self.events = SimpleNamespace(register=self._register, unregister=self._unregister)

    def _register(self, name: str, call: Callable) -> None:
        assert name == "post_run_cell"
        self.at_end.append(call)

    def _unregister(self, _: str, call: Callable) -> None:
        self.at_end.remove(call)

    def end_cell(self) -> None:
        for call in list(self.at_end):
            call(None)
        self.execution_count += 1


@pytest.fixture
def notebook(monkeypatch) -> tuple[Shell, list[str]]:
    """A shell with a kernel, and everything that it shows, the last of it last."""
    shell, shown = Shell(object()), []

    def display(data: Any, *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        shown.append(data["text/html"])
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/html"]))

    ipython = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress.Bar, "WAIT", 0.0)
    monkeypatch.setattr(progress.Bar, "EVERY", 0.0)
    monkeypatch.setattr(progress, "_BAR", [])
    return shell, shown


def work(what: str = "retraining <b>") -> None:
    with progress.task(what, 4):
        progress.advance(3)


def test_a_notebook_shows_a_bar_and_keeps_the_seconds(notebook):
    shell, shown = notebook
    work()
    assert 'value="3" max="4"' in shown[-1]
    assert "retraining &lt;b&gt;, 0 s" in shown[-1]
    shell.end_cell()
    assert shown[-1] == '<div style="opacity:.75;font-size:.9em">0 s</div>'
    assert shell.at_end == []


def test_tasks_of_one_cell_share_a_bar_and_the_next_cell_has_its_own(notebook):
    shell, shown = notebook
    work("one")
    work("two")
    assert len(shell.at_end) == 1
    shell.end_cell()
    work("three")
    assert len(shell.at_end) == 1
    assert "three" in shown[-1]


def test_what_is_quick_shows_nothing(notebook, monkeypatch):
    shell, shown = notebook
    monkeypatch.setattr(progress.Bar, "WAIT", 60.0)
    work()
    shell.end_cell()
    assert shown == []


def test_who_asks_is_told_in_the_place_of_the_bar(notebook):
    _, shown = notebook
    told = []
    with progress.reported(lambda *how: told.append(how)):
        work()
    with progress.reported(None):
        work()
    assert told[-1] == ("retraining <b>", 3, 4)
    assert shown == []


def test_a_terminal_writes_over_its_line(notebook, capsys):
    shell, shown = notebook
    shell.kernel = None
    work("retraining")
    shell.end_cell()
    said = capsys.readouterr().err
    assert "retraining 75%" in said
    assert said.endswith("\r\x1b[K")
    assert shown == []


def test_a_script_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress.Bar, "WAIT", 0.0)
    for ipython in (None, SimpleNamespace(get_ipython=lambda: None)):
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        work()
    assert capsys.readouterr() == ("", "")


def test_measuring_and_attribution_say_how_far_they_are(toy_model):
    from relearn_lens.measure.tracking import measure

    told: dict[str, list[tuple[int, int]]] = {}
    with progress.reported(lambda what, done, total: told.setdefault(what, []).append((done, total))):
        measure(
            toy_model.tagger, toy_model.corpus, "place", site="mlp_post", what=("conductance", "top_words"),
            sentences=8, steps=4, validation=toy_model.corpus.take(range(20)),
        )  # fmt: skip
    assert list(told) == ["measuring", "attribution"]
    for steps in told.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
