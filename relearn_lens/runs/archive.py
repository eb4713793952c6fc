"""Results as named tensors and plain JSON, and back: what a run folder's safetensors files hold.

Any of our result types is taken apart field by field: tensors and arrays under a name of their own, everything else as
JSON. Nothing but the types listed here is ever made from a file.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from relearn_lens.find.attribution import Attribution
from relearn_lens.find.probes import AtK, Quality
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.evaluation import LogProbability, Margin, SpanScores, TokenLoss
from relearn_lens.measure.examples import Examples
from relearn_lens.measure.grafting import Grafts
from relearn_lens.measure.guesses import Guesses
from relearn_lens.measure.similarity import ActivationSimilarity
from relearn_lens.measure.topwords import TopWords
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site, Slice
from relearn_lens.neurons.streaming import ClassStats
from relearn_lens.runs.events import Again, Blocked, Cuts, Damage, Dose, Grafted, Own, Round, Sized
from relearn_lens.text.concept import Concept

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ActivationSimilarity, Again, AtK, Attribution, Blocked, Checkpoint, ClassStats, Concept, Cuts, Damage, Dose,
        Examples, Grafted, Grafts, Guesses, LogProbability, Margin, Neurons, Own, Quality, Round, Saliency, Site,
        Sized, Slice, Snapshot, SpanScores, TokenLoss, TopWords, Trajectory,
    )
}  # fmt: skip
"""The types that a file may hold."""
RENAMED = {"Trajectory": {"pruned": "removed"}, "Round": {"found": "neurons"}}
"""Fields that earlier versions wrote under another name."""


def pack(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A result as named tensors and JSON. Tensors that are the same object are kept once, and so are equal sites.

    Raises:
        TypeError: it holds something that is none of `TYPES`, no tensor and nothing plain.
    """
    packer = _Packer()
    return packer.tensors, {"body": packer.take(value, ""), "sites": packer.site_bodies}


def unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], kind: type = object) -> Any:
    """The result that `pack` took apart, what was one object being one again; every field is checked against its type
    and its site.

    Raises:
        ValueError: a type, a field or a tensor that is not there or not what it should be; another result than `kind`.
    """
    read = functools.cache(lambda kind, name: tensors[name].numpy() if kind == "array" else tensors[name])
    try:
        sites = [_make(body, read, []) for body in meta["sites"]]
        value = _make(meta["body"], read, sites)
        if not isinstance(value, kind):
            raise TypeError(f"a {type(value).__name__} where a {kind.__name__} should be")
        return value
    except Exception as error:  # whatever a constructor says of values that it was never meant to get
        raise ValueError(f"it does not hold what this version writes ({type(error).__name__}: {error})") from error


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is used again while we look at them
        self.sites: list[Site] = []
        self.site_bodies: list[Any] = []

    def take(self, value: Any, where: str) -> Any:
        match value:
            case None | bool() | int() | str():
                return value
            case np.integer():
                return int(value)
            case float() | np.floating():
                return float(value) if math.isfinite(value) else {"float": str(float(value))}
            case Tensor() | np.ndarray():
                return {"array" if isinstance(value, np.ndarray) else "tensor": self._tensor(value, where)}
            case Site():
                return {"site": self._site(value)}
            case Mapping():
                return {"map": [[self.take(k, ""), self.take(v, f"{where}/{k}")] for k, v in value.items()]}
            case _ if type(value) in TYPES.values():
                if is_dataclass(value):
                    return self._fields(value, where)
                return {"type": type(value).__name__, "items": [self.take(v, "") for v in value]}  # a named tuple
            case tuple() | list():
                return {"list": [self.take(v, f"{where}/{i}") for i, v in enumerate(value)]}
        raise TypeError(f"{where.strip('/') or 'the result'} is a {type(value).__name__}, which cannot be written")

    def _fields(self, value: Any, where: str) -> dict[str, Any]:
        inner = {f.name: self.take(getattr(value, f.name), f"{where}/{f.name}") for f in fields(value) if f.init}
        return {"type": type(value).__name__, "fields": inner}

    def _tensor(self, value: Tensor | np.ndarray, where: str) -> str:
        if id(value) not in self.names:
            name = where.strip("/") or "it"
            while name in self.tensors:  # such as of keys 1 and "1"
                name += "'"
            self.kept.append(value)
            self.names[id(value)] = name
            self.tensors[name] = torch.as_tensor(value)
        return self.names[id(value)]

    def _site(self, site: Site) -> int:
        if site not in self.sites:
            self.sites.append(site)
            self.site_bodies.append(self._fields(site, ""))
        return self.sites.index(site)


def _make(body: Any, read: Callable[[str, str], Any], sites: list[Any]) -> Any:
    if not isinstance(body, Mapping):
        return body
    match body:
        case {"float": text}:
            return float(text)
        case {"tensor": name}:
            return read("tensor", name)
        case {"array": name}:
            return read("array", name)
        case {"site": index}:
            return sites[index]
        case {"map": pairs}:
            return {_make(k, read, sites): _make(v, read, sites) for k, v in pairs}
        case {"list": items}:
            return tuple(_make(v, read, sites) for v in items)
    kind = TYPES[body["type"]]
    if "items" in body:
        made = kind(*(_make(v, read, sites) for v in body["items"]))
    else:
        names = RENAMED.get(body["type"], {})
        made = kind(**{str(names.get(name, name)): _make(v, read, sites) for name, v in body["fields"].items()})
    _check_fields(made)
    return made


_hints = functools.cache(get_type_hints)


def _check_fields(value: Any) -> None:
    """Refuse fields of another type, and axes of another length than the site and the classes have.

    The type checks of the classes themselves look at one item of a list; what comes from a file is looked at whole.
    """
    site = value if isinstance(value, Site) else getattr(value, "site", None)
    lengths = {"layer": len(site.layers), "neuron": site.width} if isinstance(site, Site) else {}
    if isinstance(value, ClassStats):
        lengths["class"] = len(value.class_names)
    if isinstance(value, TopWords) and not ((value.words >= -1) & (value.words < len(value.vocab))).all():
        raise ValueError("words of a TopWords that are not in its vocab")
    for name, hint in _hints(type(value)).items():
        if get_origin(hint) is ClassVar:
            continue
        value_of = getattr(value, name)
        if not _fits(value_of, hint):
            raise TypeError(
                f"{name} of a {type(value).__name__} is a {type(value_of).__name__} that does not fit {hint}"
            )
        axes = getattr(hint, "dim_str", "").split()
        if wrong := [a for a, n in zip(axes, getattr(value_of, "shape", ()), strict=False) if lengths.get(a, n) != n]:
            raise TypeError(f"{name} of a {type(value).__name__} has another number of {wrong[0]}s than its site")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, with all that it holds, is of a type."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_fits(value, one) for one in get_args(hint))
    origin, args = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is tuple:  # as `corpus.Strings` is at run time
        origin, args = tuple, (str, ...)
    if not isinstance(value, origin if isinstance(origin, type) else hint):
        return False
    if isinstance(value, Mapping):
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if args and isinstance(value, tuple | list):
        return all(_fits(item, args[0]) for item in value)
    return True
