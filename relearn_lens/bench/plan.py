"""What a bench asks for: removers by ways back by seeds over one set of facts; presets, and every way to change one.

    preset = "facts-toy"
    seeds = [1, 2, 3]                # reported
    chooses = 0                      # learning rates and the strongest attack are chosen here
    [rows.npo]                       # a row: a remover by its recipe, and what differs from it
    remover = "npo"
    fields = {lr = 1e-4}
    [columns.relearn]                # a column: an attack, at several learning rates where it trains
    attack = "relearn"
    rates = [1e-4, 3e-4]

Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from relearn_lens.analysis.matrix import BEARABLE, NEVER
from relearn_lens.files import read_toml
from relearn_lens.methods import Method, Rate, meant_of
from relearn_lens.names import explained, meant, unknown
from relearn_lens.runs.presets import value_of
from relearn_lens.runs.settings import none_as_text

Seed = Annotated[int, Field(ge=0, le=10**9)]
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,40}", re.ASCII)


class Row(Method):
    """A remover, as it is used."""

    remover: str = Field(description="by name (`npo`), or with a wrapper around it (`npo+sam`)")
    recipe: str = Field(
        default="auto", description="the kind of model whose recipe gives its values; auto: of this model; published"
    )
    fields: dict[str, Any] = Field(default_factory=dict, description="what differs from the recipe")
    where: dict[str, Any] = Field(default_factory=dict, description="what differs from the localiser's defaults")
    rounds: int = Field(
        default=1, ge=1, le=100, description="how often it removes; between rounds it trains on what is to stay"
    )
    repair: int = Field(default=32, ge=1, le=10**6, description="steps on what is to stay, between rounds")
    repair_lr: Rate = Field(default=3e-4, description="learning rate between rounds")
    held: bool = Field(
        default=False, description="the attacker cannot move what was cut: a bound, for whoever keeps it elsewhere"
    )


class Column(Method):
    """A way back, as it is used."""

    attack: str = Field(description="by name")
    fields: dict[str, Any] = Field(default_factory=dict, description="what differs from the attack's defaults")
    rates: tuple[Rate, ...] = Field(default=(), description="learning rates, of which one is chosen; none: its own")


class Teaching(Method):
    """How a pretrained model is taught the facts before anything is removed, and its twin without what is forgotten."""

    epochs: float = Field(default=10, gt=0, le=10_000, description="passes over what is taught")
    lr: Rate = Field(default=1e-4, description="highest learning rate")
    batch_size: int = Field(default=32, ge=1, le=100_000, description="passages a step")


class Bench(Method):
    """Removers by ways back by seeds, over one set of facts."""

    model: str = Field(
        default="taught", description="taught (a small model made for these facts), a source, a folder or a name"
    )
    facts: str = Field(default="people", description="people, countries, ontology, a JSONL file or hf:NAME")
    retain: str | None = Field(default=None, description="what is to stay, of facts that are a file or hf:NAME")
    teach: Teaching | None = Field(
        default=None, description="teach a pretrained model the facts first, and a twin all but what is forgotten"
    )
    seeds: tuple[Seed, ...] = Field(default=(1, 2, 3), min_length=1, description="reported")
    chooses: Seed = Field(default=0, description="the seed on which rates and the strongest attack are chosen")
    rows: dict[str, Row] = Field(min_length=1, description="removers")
    columns: dict[str, Column] = Field(min_length=1, description="ways back")
    tau: float = Field(default=0.95, gt=0, le=1, description="share of the base's ability that calibration keeps")
    points: int = Field(default=32, ge=1, le=1024, description="steps between base and removed model in calibration")
    bound: float = Field(default=BEARABLE, ge=0, lt=1, description="share of utility that an attack may cost")
    keys: int = Field(default=48, ge=2, le=10**6, description="keys of each role that are asked, at most")
    wordings: int = Field(default=2, ge=1, le=100, description="wordings in which each fact is asked, at most")
    draws: int = Field(default=2000, ge=100, le=10**6, description="of keys and seeds, behind every interval")
    grafts: bool = Field(default=True, description="move parts of the model on the first reported seed, to say where")
    metrics: tuple[str, ...] = Field(
        default=("inside",),
        description="read of the held-out half at every checkpoint of the first attack that trains, by layer where "
        "they have layers, on the first reported seed; depth, returned, moved and rank take a copy of the model",
    )
    bands: int | None = Field(default=None, ge=1, le=1000, description="groups of blocks that are moved; none: each")
    device: str = Field(default="auto", description="auto, cpu, cuda, mps")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="what the model computes in")
    threads: int | None = Field(default=1, ge=1, le=1024, description="CPU threads of each process")

    @field_validator("rows", "columns")
    @classmethod
    def _names(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not _NAME.fullmatch(name) or name == NEVER:
                raise ValueError(f"name {name!r}: letters, digits and . _ + -, and not {NEVER!r}, which is the twin")
        return given

    @model_validator(mode="after")
    def _apart(self) -> Bench:
        if len(set(self.seeds)) != len(self.seeds) or (self.chooses in self.seeds and len(self.seeds) > 1):
            raise ValueError(
                f"seeds = {list(self.seeds)}, chooses = {self.chooses}: each seed once, and what is chosen on one is "
                "reported on others (a single seed may do both, and says nothing of other seeds)"
            )
        return self

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seed that chooses first, then those that are reported."""
        return tuple(dict.fromkeys((self.chooses, *self.seeds)))

    def only(self, row: str, seed: int) -> Bench:
        """One cell of it."""
        rows = {name: each for name, each in self.rows.items() if row in (name, NEVER)}
        return self.model_copy(update={"rows": rows, "seeds": (seed,), "chooses": seed})

    def to_toml(self) -> str:
        """As a file that `relearn-lens bench` takes."""
        import tomli_w

        return tomli_w.dumps(none_as_text(self.model_dump(mode="json")))


_FIVE = {name: {"remover": name} for name in ("grad_diff", "npo", "rmu", "gradient_ascent", "prune")}
_RELEARN = {"attack": "relearn", "fields": {"batch_size": 16}, "rates": [1e-4, 3e-4]}
_TOY: dict[str, Any] = {
    "rows": _FIVE, "columns": {"relearn": _RELEARN, "quantised": {"attack": "quantised", "fields": {"bits": 4}}},
    "metrics": ["inside", "depth", "returned"],
}  # fmt: skip

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "facts-toy": (
        "five removers and the twin on a small taught model: relearning at two rates, and quantised; three seeds",
        _TOY,
    ),
    "facts-toy-slowed": (
        "what slows the return: npo as it is, by sam, smoothed, in a mask; pruning once, in rounds, with the cut held",
        {
            **_TOY,
            "rows": {
                "npo": {"remover": "npo"},
                "npo+sam": {"remover": "npo+sam"},
                "npo+smoothed": {"remover": "npo+smoothed", "fields": {"lr": 3e-4, "steps": [96]}},
                "npo-masked": {"remover": "npo", "fields": {"where": "lookup"}},
                "prune": {"remover": "prune"},
                "prune-rounds": {"remover": "prune", "rounds": 3},
                "prune-held": {"remover": "prune", "held": True},
            },
        },
    ),
    "facts-smollm2": (
        "SmolLM2-135M taught invented people, five removers, more ways back; for a GPU, or a night",
        {
            "model": "smollm2",
            "teach": {"epochs": 10, "lr": 1e-4},
            "rows": _FIVE,
            "columns": {
                "relearn": {"attack": "relearn", "fields": {"batch_size": 16}, "rates": [2e-5, 1e-4]},
                "relearn-lora": {"attack": "relearn", "fields": {"lora": 16, "batch_size": 16}, "rates": [1e-4, 1e-3]},
                "retain-only": {"attack": "retain_only", "fields": {"batch_size": 16}, "rates": [2e-5, 1e-4]},
                "quantised": {"attack": "quantised", "fields": {"bits": 4}},
                "pruned": {"attack": "pruned"},
            },
            "bands": 6,
            "threads": None,
        },
    ),
}
"""Preset name to what it is and what it says."""


@explained
def bench_of(source: str | Path = "facts-toy", sets: Sequence[str] = ()) -> Bench:
    """A bench from a preset's name or a TOML file, then `key.path=value` strings, each over the last.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown preset or key, or a value out of range; one line for each.
    """
    path = Path(source)
    if str(source) in PRESETS:
        values = PRESETS[str(source)][1]
    elif path.suffix == ".toml":
        values = _from_file(path)
    else:
        raise ValueError(f"{unknown('bench', str(source), PRESETS)} (a file of settings ends in .toml)")
    for text in sets:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ValueError(f"--set {text!r}: write key=value, such as columns.relearn.rates=[1e-4]")
        values = _put(values, key.split("."), value_of(value, optional=True))
    try:
        return Bench.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_line(each) for each in error.errors()))) from None


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no bench at {str(path)!r}, and no preset of that name ({', '.join(PRESETS)})")
    values = read_toml(path, _text_as_none)
    name = values.pop("preset", None)
    if name is None:
        return values
    if name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    # Rows and columns are whole: who names some means these.
    return {**PRESETS[name][1], **values}


def _put(values: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = keys
    inner = values.get(first)
    return {**values, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _line(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *above, _ = error["loc"]
        kind = {"rows": Row, "columns": Column, "teach": Teaching}.get(str(above[0]) if above else "", Bench)
        near = meant(error["loc"][-1], kind.model_fields)
        return f"unknown setting {key!r}; known here: {', '.join(kind.model_fields)}{near}"
    if error["type"] == "missing":
        return f"{key}: it has to be given"
    message = error["msg"].removeprefix("Value error, ")
    return (
        f"{key} = {error['input']!r}: {message}{meant_of(error)}" if key and error["type"] != "value_error" else message
    )


def _text_as_none(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _text_as_none(value) for key, value in values.items()}
    return None if values == "none" else values
