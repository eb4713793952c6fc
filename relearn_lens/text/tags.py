"""Tags on words, in any of the schemes that mark spans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from relearn_lens.names import meant
from relearn_lens.text.corpus import OUTSIDE

SCHEMES = {"auto": "BIESLUM", "bio": "BI", "iob1": "BI", "io": "I", "bioes": "BIESLUM"}
"""How a file writes spans, and the prefixes that may occur. A name checks what `"auto"` reads leniently."""


class Row(NamedTuple):
    """A word with its tag."""

    number: int  # line of the file or row of the data set: where an error points
    word: str
    tag: str


def decode(sentences: list[list[Row]], scheme: str, where: str) -> Iterator[list[tuple[str, str, bool]]]:
    """Words with the type of their label and whether they open a span.

    One reading serves every scheme, that of conlleval and of seqeval's default: a span opens at B, S or U,
    after E, L, S or U, and where the type differs from that of the word before. It is exact for a file that
    keeps to BIO, IOB1, IO or BIOES.
    """
    first = {row.tag: row.number for sentence in reversed(sentences) for row in reversed(sentence)}
    marks = _marks(first, scheme, where)
    for sentence in sentences:
        words, mark_before, kind_before = [], "", OUTSIDE
        for number, word, tag in sentence:
            mark, kind = marks[tag]
            same = kind == kind_before
            marked = mark in ("B", "S", "U")
            begins = kind != OUTSIDE and (marked or not same or mark_before in ("E", "L", "S", "U"))
            if (scheme in ("bio", "bioes") and begins > marked) or (scheme == "iob1" and marked > same):
                wrong = "touches no span of its type" if marked else "opens a span without B-"
                raise ValueError(f"{where} {number}: {tag!r} {wrong}, against {scheme!r}; try scheme='auto'")
            words.append((word, kind, begins))
            mark_before, kind_before = mark, kind
        yield words


def _marks(first: Mapping[str, int], scheme: str, where: str) -> dict[str, tuple[str, str]]:
    """Prefix (`""` for a plain label) and type of every tag; `first` says where each occurs first."""
    if scheme not in SCHEMES:
        raise ValueError(f"no tag scheme is called {scheme!r}; the schemes are {list(SCHEMES)}{meant(scheme, SCHEMES)}")
    tags = {tag: re.sub("^([A-Z]-[^,]*),[A-Z]-.*", r"\1", tag) for tag in first}
    if "B" in tags and set(tags) <= set("OBIESLUM"):
        raise ValueError(f"{where} {first['B']}: tag 'B' has no type; write B-TYPE and I-TYPE")
    # "E-mail" alone is a label: E, L and M never occur without B, I, S or U.
    plain = scheme in ("auto", "io") and not {tag[:2] for tag in tags.values()} & {"B-", "I-", "S-", "U-"}
    marks = {}
    for tag, one in tags.items():
        prefix, _, kind = one.partition("-")
        if one in (OUTSIDE, "_") or (plain and one):
            marks[tag] = ("", OUTSIDE if one == "_" else one)
        elif kind and prefix in tuple(SCHEMES[scheme]):
            marks[tag] = (prefix, kind)
        else:
            raise ValueError(
                f"{where} {first[tag]}: tag {tag!r} does not fit scheme {scheme!r}, which reads 'O' and the "
                f"prefixes {[f'{k}-' for k in SCHEMES[scheme]]}; the schemes are {list(SCHEMES)} ('io' also "
                "reads labels without any prefix). Correct the tag, or choose another scheme or column"
            )
    return marks
