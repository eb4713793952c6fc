"""What to say of a name that is not known."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn, TypeVar

T = TypeVar("T")


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like a mistaken one, in any case; None where none is near.

    A dotted name is also told by its last part: `fraction` is near `prune.fraction`.
    """
    try:
        wanted = str(name).lower()
    except ValueError:  # a number of more digits than Python writes
        return None
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


def known_name(what: str, name: T, known: Collection[object]) -> T:
    """A name that is one of those that are known.

    Raises:
        ValueError: it is none.
    """
    if name not in known:
        raise ValueError(unknown(what, name, map(str, known)))
    return name


def existing(what: str, name: T, there: Collection[str]) -> T:
    """A name of something that is there.

    Raises:
        ValueError: it is not.
    """
    if name not in there:
        raise ValueError(f"no {what} {name!r}; known: {', '.join(there) or 'none'}{meant(name, there)}")
    return name


class ByName(dict[str, T]):
    """A table by name, which says what it has where a name is not in it."""

    def __missing__(self, name: object) -> NoReturn:
        raise KeyError(unknown("name", name, self))


def suggesting_(module: ModuleType) -> None:
    """From now on a module names the nearest of its names where it lacks one, and so does what is imported into it."""
    kind = type(module)  # which may have more to it than a module has
    if not issubclass(kind, _Suggesting):
        module.__class__ = type(_Suggesting.__name__, (_Suggesting, kind), {})


class _Suggesting(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            suggesting_(value)

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(f"{self.__name__} has no attribute {name!r}")
        public = [each for each in dir(self) if self._is_own(each)]
        if name in public:
            return vars(self)["__getattr__"](name)  # says again why it could not be imported
        near = meant(name, public)
        if not near and len(public) <= 40:
            near = f"; it has {', '.join(public)}"
        raise AttributeError(f"{self.__name__} has no attribute {name!r}{near}")

    def _is_own(self, name: str) -> bool:
        """Whether a name is public, and not another package's that is used here."""
        value = vars(self).get(name)
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or self.__name__
        return not name.startswith("_") and str(home).partition(".")[0] == self.__name__.partition(".")[0]
