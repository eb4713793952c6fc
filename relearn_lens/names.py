"""What to say of a name that is not known, and of an argument that is none of those that are wanted."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any, NoReturn, TypeVar, get_type_hints

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


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
    """From now on a module names the nearest of its names where it lacks one, and so do what is imported into it and
    the tables by name there, such as `METRICS`."""
    kind = type(module)  # which may have more to it than a module has
    if not issubclass(kind, _Suggesting):
        module.__class__ = type(_Suggesting.__name__, (_Suggesting, kind), {})


MADE = {
    "Facts": "facts.people() or facts.read_facts(...)", "Passage": "facts.passages(role, forms=...)",
    "Corpus": "read_conll(...) or read_splits(...)", "Encoded": "model.encode(corpus)", "Concept": "Concept(name)",
    "Model": "load_tagger(...) or load_language_model(...)", "LanguageModel": "load_language_model(...)",
    "Neurons": "Neurons.of(site, [...])", "Site": "site_of(model, name)", "Weights": "model.copied()",
    "Run": "run(...) or load_run(folder)", "Arms": "load_run(folder).arms", "Arm": "track(...), in a list of seeds",
    "Trajectory": "track(...)", "FactsTrajectory": "track(model, facts, ...)", "Snapshot": "measure(...)",
    "Saliency": "measure(...).saliency", "TopWords": "top_words(model, text)", "Classes": "concept.classes(corpus)",
    "Bench": "bench.bench_of(name)", "Sweep": "sweeps.read(file)", "Reference": "Reference(base=..., never=...)",
    "Checkpoint": "retrain_(model, text)", "Texts": "facts, or {'forget': corpus, 'retain': corpus}",
    "Material": "facts, or a corpus", "Evaluate": "a function of a model that gives its scores",
}  # fmt: skip
"""What gives what is wanted, by the name of its type."""


def explained(function: F) -> F:
    """A function, or a class, that where it fails over an argument of another type than it takes says which that is,
    what was found, and where what is wanted comes from."""
    if isinstance(function, type):
        function.__init__ = explained(function.__init__)
        return function  # pyright: ignore[reportReturnType]

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except Exception as error:
            # Of what was called within, its own message was of its own argument: whoever calls knows the outer one.
            at = error.__cause__ if isinstance(error, ValueError) else error
            wrong = isinstance(at, TypeError | AttributeError | LookupError | RuntimeError)
            if not wrong or (why := _misplaced(function, args, keywords)) is None:
                raise
            raise ValueError(why) from at

    return call  # pyright: ignore[reportReturnType]


def _misplaced(function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> str | None:
    """What to say of the first argument that is not what the function's annotations say, if there is one."""
    from beartype.door import is_bearable

    name = type(args[0]).__name__ if function.__name__.startswith("__") else function.__qualname__
    signature, names = inspect.signature(function), inspect.unwrap(function).__globals__
    known = {each: p for each, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    strange = [each for each in keywords if each not in known]
    if strange and len(known) == len(signature.parameters):
        return f"{name}() has no argument {strange[0]!r}; it has {', '.join(known)}{meant(strange[0], known)}"
    for each, value in signature.bind_partial(*args, **keywords).arguments.items():
        with contextlib.suppress(Exception):  # an annotation for type checkers alone
            hint = str(known[each].annotation)
            if not is_bearable(value, get_type_hints(type("", (), {"__annotations__": {"of": hint}}), names)["of"]):
                is_short = type(value).__module__ == "builtins" and len(repr(value)) <= 60
                made = "".join(f"; {kind}: {MADE[kind]}" for kind in re.findall(r"\w+", hint) if kind in MADE)
                here = repr(value) if is_short else f"a {type(value).__name__}"
                return f"{name}() takes {each}: {hint}, got {here}{made}"
    return None


class _Suggesting(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            suggesting_(value)
            for table, known in [*vars(value).items()]:
                if table.isupper() and type(known) is dict and all(isinstance(each, str) for each in known):
                    vars(value)[table] = ByName(known)

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
