"""Methods as frozen objects: what a training, a measurement or an attribution does is told by its fields.

Each field says its unit and where its value is from; the same object stands in Python, in a TOML file and on the
command line, so that no default stands twice. Imports nothing heavy: settings are checked before torch is there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from relearn_lens.names import explained, meant

Size = Annotated[float, Field(gt=0, le=10**9)]
Epochs = Annotated[float, Field(gt=0, le=10_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
AtMost = Annotated[int, Field(ge=1, le=10**9)]
"""So many, or all where there are fewer."""

STAGES = 10_000
"""Most stages of one training: each is measured."""

M = TypeVar("M", bound="Method")


class _Told(type(BaseModel)):
    if not TYPE_CHECKING:  # which knows the fields

        def __call__(cls, *given: Any, **fields: Any) -> Any:
            """Make one; what is wrong is a line, as everywhere, where a person makes it."""
            if given:
                some = next(iter(cls.model_fields))
                raise ValueError(f"the fields of a {cls.__name__} are given by name: {cls.__name__}({some}=...)")
            try:
                return super().__call__(**fields)
            except ValidationError as error:
                raise ValueError("; ".join(_line(cls, each) for each in error.errors())) from None


class Method(BaseModel, metaclass=_Told):
    """A frozen object whose fields are checked when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "__call__" in vars(cls):
            cls.__call__ = explained(cls.__call__)


def of(kind: type[M], how: M | None, fields: Mapping[str, Any]) -> M:
    """A method as it was given, or the default one, with some of its fields changed.

    Raises:
        ValueError: a field that the method does not have, or a value out of range; one line for each.
    """
    if how is not None and not isinstance(how, Method):
        raise ValueError(f"how is a {kind.__name__}(...), or left out, got {how!r}"[:200])
    given = {} if how is None else {name: getattr(how, name) for name in how.model_fields_set}
    # A length of training takes the place of another.
    for one, other in (({"steps"}, {"epochs", "every"}), ({"epochs", "every"}, {"steps"})):
        if any(fields.get(name) is not None for name in one):
            given = {name: value for name, value in given.items() if name not in other}
    if not fields and how is not None:
        return how
    return (kind if how is None else type(how))(**{**given, **fields})


def _line(kind: type[Method], error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"]) or kind.__name__
    if error["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        return f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}{meant(name, known)}"
    if error["type"] == "tuple_type":
        return f"{name} = {error['input']!r}: a list is wanted: {name}=[...]"
    return f"{name} = {error['input']!r}: {error['msg'].removeprefix('Value error, ')}{meant_of(error)}"


def meant_of(error: Any) -> str:
    """What may have been meant in the place of a value that is none of a few, as pydantic tells it."""
    return meant(error["input"], re.findall("'([^']*)'", error.get("ctx", {}).get("expected", "")))


class Training(Method):
    """AdamW with all that moves a model: how long, how fast, and where it stands still to be looked at.

    Source: Loshchilov & Hutter 2019; learning rates as in Lo et al. 2024, section 4, where nothing else is said.
    """

    epochs: float = Field(default=3, gt=0, le=10_000, description="passes over the training sentences")
    every: Epochs | None = Field(default=None, description="epochs per stage; none: each epoch is one")
    steps: tuple[Annotated[int, Field(ge=1, le=10**9)], ...] | None = Field(
        default=None,
        description="optimiser steps after which training stands still, the last of them its end, in place of epochs "
        "and every; none: by epochs",
    )
    lr: Rate = Field(default=1e-4, description="highest learning rate")
    schedule: Literal["linear", "constant"] = Field(
        default="linear",
        description="learning rate; linear: falls to 0 at the end; constant: step 8 of 16 is step 8 of 64",
    )
    warmup: int = Field(default=0, ge=0, le=10**9, description="steps over which the learning rate rises first")
    batch_size: int = Field(default=16, ge=1, le=100_000, description="sentences per step")
    weight_decay: float = Field(default=0.01, ge=0, le=10, description="not on biases and LayerNorms")
    clip: Size = Field(default=1.0, description="largest gradient norm")
    restart: bool = Field(default=False, description="begin optimiser and learning rate anew in every stage")
    accumulate: int = Field(
        default=1, ge=1, le=100_000, description="parts that a batch goes through the model in, to save memory"
    )
    checkpointing: bool = Field(default=False, description="compute blocks again in the backward pass, to save memory")

    @property
    def n_stages(self) -> int:
        """How often training stands still."""
        return math.ceil(self.epochs / (self.every or 1.0) - 1e-9) if self.steps is None else len(self.steps)

    @model_validator(mode="before")
    @classmethod
    def _by(cls, values: Any) -> Any:
        """Who says epochs means a training that is measured by epochs."""
        if not isinstance(values, Mapping):
            return values
        if {"epochs", "every"} & values.keys() and values.get("steps") is None:
            return {**values, "steps": None}
        usual = {name: cls.model_fields[name].default for name in ("epochs", "every")}
        # Settings written in full hold the epochs too that steps take the place of.
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    @model_validator(mode="after")
    def _stages(self) -> Training:
        if self.steps is not None:
            if {"epochs", "every"} & self.model_fields_set:
                raise ValueError(f"steps = {list(self.steps)} and epochs or every: a training has one of them")
            if list(self.steps) != sorted(set(self.steps)):
                raise ValueError(f"steps = {list(self.steps)}: numbers of steps that rise")
        elif self.every is not None and self.epochs / self.every > STAGES * (1 + 1e-9):
            raise ValueError(
                f"every = {self.every}: {self.epochs} epochs would be more than {STAGES:,} stages, each is "
                f"measured; make it {self.epochs / STAGES:g} or more"
            )
        return self


class Finetuning(Training):
    """Training of a model that nothing was taken from yet."""

    epochs: float = Field(
        default=3,
        ge=0,
        le=10_000,
        description="passes over the training sentences; 0: the model as it comes (its own head)",
    )
    prior_bias: bool = Field(
        default=True,
        description="start a tagger's bias at the log share of each tag; a fresh head otherwise makes the body learn, "
        "as a constant part of its hidden state, that most words are O, and without it collapses",
    )


class Retraining(Training):
    """Training after something was removed, measured after every stage."""

    steps: tuple[Annotated[int, Field(ge=1, le=10**9)], ...] | None = Field(
        default=(1, 2, 4, 8, 16, 32, 64), description=Training.model_fields["steps"].description
    )
    lr: Rate = Field(default=5e-5, description=Training.model_fields["lr"].description)
    schedule: Literal["linear", "constant"] = Field(
        default="constant", description=Training.model_fields["schedule"].description
    )
    warmup: int = Field(default=2, ge=0, le=10**9, description=Training.model_fields["warmup"].description)
    lora_rank: int | None = Field(
        default=None, ge=1, le=10_000,
        description="train only low-rank adapters of this rank beside the blocks' matrices (alpha 16; needs peft: "
        "extra lora), and the head; none: train all weights",
    )  # fmt: skip


Baseline = Literal["auto", "mask", "pad", "end", "mean", "zero"]
"""The embedding that stands in place of each word where a path of integrated gradients begins."""
MEMORY = 512
"""MB that attribution, top words and activation similarity may each take, where nothing is said."""


MAX_TOKENS = 4096
"""Tokens per batch when a model is only read, where nothing is said."""
SAMPLE_WORDS = 2000
"""Words that fitted and exact scores are made from, where nothing is said."""


class Attributing(Method):
    """What the neurons are asked for by integrated gradients, along which path and how finely.

    Source: Sundararajan, Taly, Yan 2017; Dhamdhere, Sundararajan, Yan 2018.
    """

    target: Any = Field(
        default="auto",
        description="attribution: what the neurons are asked for; logit, logprob or margin; auto: logprob of a "
        "language model, else margin",
    )
    baseline: Baseline = Field(
        default="auto",
        description="attribution: the input that the path begins at, in place of every word; auto: the first of mask, "
        "pad and end that the tokenizer has; mean of all embeddings; zero is no text",
    )
    quadrature: Any = Field(default="gauss-legendre", description="attribution: gauss-legendre or riemann")
    steps: int = Field(default=16, ge=2, le=1000, description="attribution: points of the quadrature")
    sentences: AtMost | None = Field(
        default=None, description="attribution: sentences that hold the concept, at most; none: all"
    )
    max_memory: Size = Field(
        default=MEMORY, description="MB that attribution, top words and similarity may each take, beside the weights"
    )

    @property
    def max_bytes(self) -> int:
        """`max_memory` in bytes."""
        return megabytes(self.max_memory)


class Measuring(Attributing):
    """What is measured at a pause, and how."""

    what: tuple[str, ...] = Field(
        default=(), description="scores (`relearn-lens scores`), conductance or layer_ig, top_words, similarity"
    )

    @field_validator("what", mode="before")
    @classmethod
    def _one(cls, what: Any) -> Any:
        return (what,) if isinstance(what, str) else what

    rank_bucket: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="neurons per step of rank saliency. Published: 100, so that up to 100 neurons share one value; "
        "exact ranks lose nothing, and a small model has few buckets",
    )
    nulls: Literal["drop", "zero_then_drop"] = Field(
        default="drop",
        description="concept similarity of neurons whose top words mean nothing; drop: left out at every stage. "
        "Published: zero_then_drop, 0 where the neuron was null at base and left out where it is null later, which "
        "moves the means without any change of meaning",
    )
    sample_words: int = Field(
        default=SAMPLE_WORDS, ge=20, le=1_000_000, description="words that fitted and exact scores are made from"
    )
    shuffles: int = Field(
        default=0, ge=0, le=1000, description="label shuffles of the base model behind null distributions"
    )
    max_tokens: int = Field(
        default=MAX_TOKENS, ge=16, le=1_000_000, description="tokens per batch when the model is only read"
    )


def megabytes(n: float | int) -> int:
    """So many MB (2**20 bytes) in bytes."""
    return int(n * 2**20)
