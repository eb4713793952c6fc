"""How the command line prints text and tables."""

from __future__ import annotations

import os
import re
import sys
from typing import Any


def print_prose(text: str, indent: int = 0) -> None:
    """Text wrapped at words: to the terminal's width, or 80 columns where it is piped."""
    import textwrap

    print(textwrap.fill(text, columns(), initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)))


def print_table(title: str, header: list[str], rows: list[list[str]], *, piped: int = 200) -> None:
    """A table; what is wider than the terminal (or `piped` columns) is printed in pieces, each with the first columns
    again."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=columns(piped))
    for i, piece in enumerate(_pieces(header, rows, console.width)):
        grid = Table(title=title if i == 0 else None, title_justify="left", box=None, pad_edge=False)
        for k in piece:
            grid.add_column(header[k], no_wrap=_widest(header, rows, k) <= _PROSE, overflow="fold")
        for row in rows:
            grid.add_row(*(Text(row[k]) for k in piece))
        console.print(grid)
        print()


_PROSE = 26
"""Cells that are wider are prose, which may be wrapped."""


def _widest(header: list[str], rows: list[list[str]], column: int) -> int:
    return max(len(cells[column]) for cells in (header, *rows))


def _pieces(header: list[str], rows: list[list[str]], width: int) -> list[list[int]]:
    """The columns of each piece of a table: those before the first one of numbers in each, and as many as fit."""

    def is_number(k: int) -> bool:
        cells = [row[k] for row in rows if row[k]]
        return bool(cells) and all(re.match(r"[-+]?[\d.]", cell) for cell in cells)

    every = range(len(header))
    taken = [min(_widest(header, rows, k), _PROSE) + 2 for k in every]
    first = next((k for k in every if is_number(k)), len(header))
    if sum(taken) - 2 <= width or sum(taken[:first]) > width / 2:
        return [list(every)]
    pieces, room = [], 0
    for k in range(first, len(header)):
        room -= taken[k]
        if not pieces or room < 0:
            pieces.append(list(range(first)))
            room = width + 2 - sum(taken[:first]) - taken[k]
        pieces[-1].append(k)
    return pieces


def columns(piped: int = 80) -> int:
    """Columns of the terminal; where output is piped, as many as COLUMNS says, else `piped`."""
    import shutil

    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    wanted = os.environ.get("COLUMNS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else piped


def short(value: Any) -> str:
    """A setting as a table shows it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
