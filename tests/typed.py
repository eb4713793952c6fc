"""Annotations of the package are checked wherever the tests call it: types by beartype, shapes by jaxtyping.

jaxtyping has an import hook for that (`--jaxtyping-packages`). It checks arguments twice, once more with the result,
makes its checks for thousands of functions of which a process calls some, and has libraries that the package imports
compiled anew: a third of the test run. Here the same annotations are checked once a call, by a check that is made when
a function is first called. What the package itself decorates is left alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped
from jaxtyping._storage import clear_treeflatten_memo

NAME, CACHE = "__checked__", ".checked-1.pyc"  # another number where another code is made
_typed = beartype(conf=BeartypeConf(violation_type=TypeCheckError))
_axes = jaxtyped("context")


def checked(what: Any) -> Any:
    """A function, descriptor or dataclass whose annotations are checked when it is called."""
    if isinstance(what, classmethod | staticmethod):
        return type(what)(checked(what.__func__))
    if isinstance(what, property):
        return property(*(part and checked(part) for part in (what.fget, what.fset, what.fdel)))
    if inspect.isclass(what):
        # An __init__ that is wrapped is one that the package's own decorator checks.
        if dataclasses.is_dataclass(what) and not hasattr(what.__init__, "__wrapped__"):
            what.__init__ = checked(what.__init__)
        return what
    return _checked(what) if getattr(what, "__annotations__", None) else what


def _checked(function: FunctionType) -> Callable[..., Any]:
    call = FunctionType(_first.__code__, globals())
    call.__kwdefaults__ = {"_checked": function, "_itself": call}
    return functools.wraps(function)(call)


def _first(*args: Any, _checked: FunctionType, _itself: FunctionType, **keywords: Any) -> Any:
    """Become the check of a function, and call it: from then on nothing stands before the check."""
    _itself.__code__, _itself.__kwdefaults__ = _check(_checked)
    return _itself(*args, **keywords)


def _scoped(*args: Any, _checked: Callable[..., Any], **keywords: Any) -> Any:
    with _axes:
        return _checked(*args, **keywords)


def _bare(*args: Any, _checked: Callable[..., Any], **keywords: Any) -> Any:
    return _checked(*args, **keywords)


_checks: dict[int, tuple[CodeType, FunctionType, bool]] = {}
"""By its code, the check of every function that was called, and whether it has axes: a function within a function is
made again and again, and its check is the same."""


def _check(function: FunctionType) -> tuple[CodeType, dict[str, Any]]:
    """Code and defaults of the function behind beartype and, where an annotation has axes, in a scope of its own for
    their names."""
    code = function.__code__
    if id(code) not in _checks:
        _checks[id(code)] = code, *_made(function)
    _, made, has_axes = _checks[id(code)]
    if made.__code__ is code:  # nothing is to be checked
        return _bare.__code__, {"_checked": function}
    defaults = {**(made.__kwdefaults__ or {}), "__beartype_func": function}
    if not has_axes:
        return made.__code__, defaults
    call = FunctionType(made.__code__, made.__globals__, made.__name__)
    call.__kwdefaults__ = defaults
    return _scoped.__code__, {"_checked": call}


def _made(function: FunctionType) -> tuple[FunctionType, bool]:
    # Without what it closes over, which is not to be kept.
    cells = tuple(CellType() for _ in function.__closure__ or ()) or None
    alike = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    for name in ("__kwdefaults__", "__module__", "__qualname__"):
        setattr(alike, name, getattr(function, name))
    hints = {name: _hint(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    alike.__annotations__ = hints
    return _typed(alike), any(map(_has_axes, hints.values()))


def _hint(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation that is a string as what it stands for; Any where that is imported for type checkers alone."""
    if not isinstance(hint, str):
        return hint
    try:
        return get_type_hints(type("Annotated", (), {"__annotations__": {"hint": hint}}), names, {}, True)["hint"]
    except Exception:
        return Any


def _has_axes(hint: Any) -> bool:
    return hasattr(hint, "dim_str") or any(map(_has_axes, get_args(hint)))


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # pyright: ignore[reportIncompatibleMethodOverride]
        tree = ast.parse(data)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                decorator = ast.copy_location(ast.Name(NAME, ast.Load()), node)
                # A function before its other decorators see it, a class after it is a dataclass.
                node.decorator_list.insert(0 if isinstance(node, ast.ClassDef) else len(node.decorator_list), decorator)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: Any) -> bytes:
        return super().get_data(_kept(path))

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(_kept(path), data, _mode=_mode)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, NAME, checked)
        super().exec_module(module)


def _kept(path: str) -> str:
    return path.removesuffix(".pyc") + CACHE if path.endswith(".pyc") else path


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.partition(".")[0] == "relearn_lens" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check what is imported of the package from now on."""
    sys.meta_path.insert(0, _Finder())
    # Before Python 3.12 every isinstance of a protocol lists its members anew, which takes longer than the checks.
    names: Any = vars(typing)
    names["_get_protocol_attrs"] = functools.cache(names["_get_protocol_attrs"])
    clear_treeflatten_memo()  # for as long as it is not set, every check of an array raises an error and catches it
