"""Named recipes: values of removers for a kind of model, told once. What a remover has by itself are published values,
for models thousands of times the size of a toy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from relearn_lens import methods
from relearn_lens.methods import Method, Training
from relearn_lens.models.model import Model
from relearn_lens.models.training import Checkpoint, Step, plain
from relearn_lens.names import known_name, meant
from relearn_lens.neurons.sites import Neurons
from relearn_lens.remove.pruning import Pruner
from relearn_lens.remove.removal import Remover, Removing, Texts
from relearn_lens.remove.removers import WRAPPERS, remove_, remover_of

RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # The small model of `models.taught`, `people` forgotten: chosen on seed 0 by a few short tries each. Wrappers are
    # around npo as it is, by their published values but for passes, of which there are fewer.
    "toy": {
        "alt_po": {"lr": 3e-4, "epochs": 5},
        "ce_u": {"lr": 1e-4, "steps": (32,)},
        "circuit_breaker": {
            "layers": (1, 2, 3),
            "horizon": 192,
            "reading": "before",
            "lr": 1e-3,
            "steps": (96,),
        },
        "dinm": {"where": "layer_distance", "edit": 1, "alpha": 0.3, "lr": 1e-2, "steps": (96,)},
        "dpo": {"lr": 3e-4, "epochs": 5},
        "grad_diff": {"alpha": 5, "lr": 4e-4, "steps": (144,)},
        "grad_diff@random_mlps": {"where.blocks": 2, "alpha": 3, "lr": 8e-4},
        "gradient_ascent": {"lr": 3e-4, "steps": (16,)},
        "gradient_route": {"lr": 1e-3, "steps": (900,), "batch_size": 128},
        "idk": {"lr": 3e-4, "epochs": 5},
        "ilu": {"lr": 3e-4, "steps": (96,)},
        "layered": {
            "over": {"layer": 2, "coefficient": 20, "alpha": 3, "reading": "before"},
            "lr": 1e-2,
            "steps": (48,),
        },
        "mend": {"answers": "alt_po", "rank": 128, "scale": 1e-3, "lr": 1e-3, "steps": (150,), "batch_size": 64},
        "npo": {"lr": 3e-4, "steps": (96,)},
        "npo+averaged": {"start": 48, "lr": 3e-4, "steps": (96,)},
        "npo+curvature": {"lr": 3e-4, "steps": (96,)},
        "npo+gradient_penalty": {"lr": 3e-4, "steps": (96,)},
        "npo+lat": {"ascent": 4, "lr": 3e-4, "steps": (96,)},
        "npo+sam": {"rho": 0.01, "lr": 3e-4, "steps": (96,)},
        # A probe rises over every block of a toy: the middle half of its rise is looked up there.
        "npo+sam@lookup": {"where.first": 0.25, "where.last": 0.75, "lr": 1e-3},
        "npo+smoothed": {"lr": 3e-4, "steps": (96,)},
        "npo+tar_light": {"adversary": 4, "lr": 3e-4, "steps": (96,)},
        "pdu": {"gamma": 0.1, "eps": 0.05, "warmup_epochs": 1, "lr": 3e-4, "epochs": 5},
        "prune": {"where": "attribution_patching", "fraction": 0.35},
        "prune@learned_mask": {"fraction": 0.02},
        "rep_noise": {"lr": 3e-4, "epochs": 5},
        "rmu": {"layer": 2, "coefficient": 20, "alpha": 3, "reading": "before", "lr": 1e-2, "steps": (96,)},
        "sat_imp": {"gamma": 1, "lr": 3e-4, "steps": (96,)},
        "selective_prune": {"share": 0.5, "reading": "before"},
        "set_difference_prune": {"forget": 1.0, "retain": 0.1, "reading": "before"},
        "sgtm": {"lr": 1e-3, "steps": (900,), "batch_size": 128},
        "simnpo": {"gamma": 1, "lr": 3e-4, "epochs": 5},
        "task_vector": {"scale": 3, "lr": 3e-4, "steps": (48,)},
        "undial": {"beta": 30, "alpha": 1, "lr": 1e-3, "steps": (120,)},
        "undo": {
            "first": {"alpha": 5},
            "suppressing": {"lr": 4e-4, "steps": (144,)},
            "alpha": 0.1,
            "lr": 1e-3,
            "steps": (144,),
            "batch_size": 64,
        },
        "wga": {"lr": 1e-4, "epochs": 5},
        "who_is": {"alpha": 30, "reinforcing": {"lr": 1e-3, "steps": (60,)}, "lr": 3e-4, "steps": (96,)},
    },
    # SmolLM2-135M, some `countries` that it knows forgotten: on seed 0, grad_diff as much as leaves near countries
    # whole; of prune there is no size that takes these countries more than those near by.
    "smollm2": {
        "grad_diff": {
            "where": "layer_distance",
            "where.layers": 3,
            "alpha": 4,
            "lr": 3e-4,
            "steps": (192,),
            "batch_size": 8,
        },
        "prune": {"where": "attribution_patching", "fraction": 0.01},
    },
}
"""By kind of model, and by remover (`npo`) or remover and wrapper (`npo+sam`): fields of the remover, of the wrapper
and of `Removing`, and which localiser gives what may change (`where`, its fields as `where.KEY`), and for `prune` what
share of the neurons (`fraction`). With a localiser behind it (`npo+sam@lookup`): what differs from the same without."""


def values_of(kind: str | None, name: str) -> dict[str, Any]:
    """The fields that a recipe sets; for None, or where there is none for this remover, no more than where."""
    known = RECIPES[kind] if kind else {}
    values, (usual, _, where) = dict(known.get(name, {})), name.partition("@")
    return _changed(known.get(usual, {}), {"where": where, **values}) if where else values


def _changed(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe with some others: a length of training takes the place of another, and those of another
    localiser are not its own."""
    gone = [key for key in values if key in ("epochs", "every")] if "steps" in fields else []
    if "where" in fields:
        gone += [key for key in values if key.startswith("where.")]
    return {**{key: value for key, value in values.items() if key not in gone}, **fields}


@dataclass(frozen=True)
class Recipe:
    """A remover with how it trains; called as a remover is."""

    remover: Remover | Pruner
    how: Training | None = None
    step: Step = plain
    where: str | None = None
    """The localiser whose choice is to be given as `where`; None: what is usual for the remover."""
    fraction: float | None = None
    """The share of all neurons that are taken of a localiser that ranks them; None: of one that gives a mask."""
    where_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the localiser."""

    def departures(self) -> dict[str, Any]:
        """The fields that are not as published."""
        parts = (self.remover, self.how, self.step)
        fields = {
            name: getattr(part, name)
            for part in parts
            if isinstance(part, Method)
            for name in type(part).model_fields
            if name in part.model_fields_set
        }
        fields |= {name: value for name in ("where", "fraction") if (value := getattr(self, name)) is not None}
        return fields | {f"where.{name}": value for name, value in self.where_fields.items()}

    def __call__(
        self,
        model: Model,
        texts: Texts | None,
        where: Mapping[str, Bool[Tensor, ...]] | Neurons | None = None,
        *,
        seed: int = 0,
        **keywords: Any,
    ) -> Iterator[Checkpoint]:
        """Remove, as `removers.remove_` does.

        Raises:
            ValueError: as `remove_`.
        """
        if self.how is not None:
            keywords = {"how": self.how, "step": self.step, **keywords}
        return remove_(model, texts, self.remover, where, seed=seed, **keywords)


def recipe(kind: str | None, name: str, fields: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a remover (`"npo"`, with a wrapper around it `"npo+sam"`, on what a localiser finds `"npo@lookup"`)
    for a kind of model, with some fields changed; for None, or where there is none for this remover, with the values
    that were published. A field that the remover and the wrapper both have is named with its owner:
    `"gradient_penalty.faithful"`.

    Raises:
        ValueError: an unknown kind, remover, wrapper or field, or a value out of range.
    """
    if kind is not None:
        known_name("recipes", kind, RECIPES)
    base, _, wrapper = name.partition("@")[0].partition("+")
    remover = remover_of(base)
    around = WRAPPERS[known_name("wrapper", wrapper, WRAPPERS)] if wrapper else None
    values = _changed(values_of(kind, name), fields or {})
    chosen: dict[str, Any] = {key: values.pop(key) for key in ("where", "fraction") if key in values}
    of_where = [key for key in values if key.startswith("where.")]
    chosen["where_fields"] = {key.removeprefix("where."): values.pop(key) for key in of_where}
    if (fraction := chosen.get("fraction")) is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: a share of all neurons, above 0 and at most 1")
    if around and (shared := sorted(set(values) & set(remover.model_fields) & set(around.model_fields))):
        raise ValueError(f"{name}: both have a field {shared[0]!r}; say {base}.{shared[0]} or {wrapper}.{shared[0]}")
    of_wrapper = _taken(around, values, wrapper) if around else {}
    own = _taken(remover, values, base)
    if issubclass(remover, Pruner):
        if wrapper:
            raise ValueError(f"{name}: pruning takes no steps, so nothing can stand around them")
        return Recipe(methods.of(remover, None, {**own, **values}), **chosen)
    step = methods.of(around, None, of_wrapper) if around else plain
    if strange := sorted(set(values) - set(Removing.model_fields)):
        known = [*remover.model_fields, *(around.model_fields if around else ()), *Removing.model_fields]
        raise ValueError(f"{name} has no field {strange[0]!r}; it has {', '.join(known)}{meant(strange[0], known)}")
    how = methods.of(Removing, getattr(remover, "usual", None), values)
    return Recipe(methods.of(remover, None, own), how, step, **chosen)


def _taken(kind: Any, values: dict[str, Any], owner: str) -> dict[str, Any]:
    """The fields of a kind, taken out of the values, whether or not their owner is named with them."""
    names = {prefix + field: field for field in kind.model_fields for prefix in ("", f"{owner}.")}
    return {names[key]: values.pop(key) for key in list(values) if key in names}
