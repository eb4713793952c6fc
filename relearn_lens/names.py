"""What to say of a name that is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like a mistaken one, in any case; None where none is near.

    A dotted name is also told by its last part: `fraction` is near `prune.fraction`.
    """
    wanted = str(name).lower()
    by_form: dict[str, str] = {}
    for each in known:
        for form in (each.lower(), each.lower().rpartition(".")[2]):
            by_form.setdefault(form, each)
    # One letter of three or four weighs more; two letters are near to too much.
    close = get_close_matches(wanted, by_form, n=1, cutoff=0.6 if len(wanted) in (3, 4) else 0.7)
    return by_form[close[0]] if close else None


def meant(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'toy'?"`, to end a message with; empty where no known name is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def unknown(what: str, name: object, known: Iterable[str], near: str = "") -> str:
    """A message that lists the known names after the one that may have been meant."""
    known = list(known)
    near = near or meant(name, known)
    return f"unknown {what} {name!r}{near}{' Known' if near else '; known'}: {', '.join(known)}"


def suggesting(module: str, named: Callable[[str], object], known: Iterable[str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names are made when they are used: what it lacks is told the nearest."""

    def attribute(name: str) -> object:
        if name in known:
            return named(name)
        raise AttributeError(f"No {module} attribute {name}{meant(name, known)}")

    return attribute
