"""Small pieces of HTML that notebooks show for our objects: every text escaped, colours for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_CELL = "padding:.1em .7em;border-bottom:1px solid rgba(128,128,128,.3);text-align:{side}"
_BAR = "display:inline-block;height:.7em;background:#0072B2;opacity:.75;width:{width:.2f}em"


def box(title: object, *parts: str) -> str:
    """A titled block of `parts`, which are HTML."""
    return (
        f'<div style="font-size:.95em"><div style="margin-bottom:.3em">{escape(str(title))}</div>{"".join(parts)}</div>'
    )


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is flush left, numbers are flush right."""
    head = "".join(_cell("th", name, i) for i, name in enumerate(header))
    body = "".join(f"<tr>{''.join(_cell('td', cell, i) for i, cell in enumerate(row))}</tr>" for row in rows)
    return f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def bars(header: Sequence[object], values: Mapping[str, float], *, most: float = 1.0) -> str:
    """A row with a bar for each value from 0 to `most`; a value that is NaN has none."""
    head = "".join(_cell("th", name, i) for i, name in enumerate(header))
    rows = []
    for name, value in values.items():
        known = value == value
        width = 10 * min(max(value / most, 0), 1) if known and most > 0 else 0
        bar = f'<td style="padding:.1em .7em"><span style="{_BAR.format(width=width)}"></span></td>'
        number = f"{value:.3f}".removesuffix(".000") if known else ""
        rows.append(f"<tr>{_cell('td', name, 0)}{_cell('td', number, 1)}{bar}</tr>")
    return (
        f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of labels, in their order (Okabe-Ito: told apart with every common kind of colour blindness)."""


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label; the seventh has the first one's again."""
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def sentence(spans: Iterable[tuple[str, str]], outside: str = "O", colour: Mapping[str, str] | None = None) -> str:
    """A sentence of (words, label): what has a label is on its colour, and followed by the label."""
    parts, colour = [], colour or {}
    for text, label in spans:
        if label == outside:
            parts.append(escape(text))
        else:
            shade = colour.get(label, COLOURS[0])
            parts.append(
                f'<span style="background:{shade}2e;border-bottom:2px solid {shade};padding:0 .2em">{escape(text)} '
                f'<small style="opacity:.8">{escape(label)}</small></span>'
            )
    return f'<p style="margin:.3em 0;line-height:1.6">{" ".join(parts)}</p>'


def line(text: object) -> str:
    """A line of text."""
    return f'<p style="margin:.2em 0">{escape(str(text))}</p>'


def _cell(tag: str, text: object, column: int) -> str:
    return f'<{tag} style="{_CELL.format(side="right" if column else "left")}">{escape(str(text))}</{tag}>'
