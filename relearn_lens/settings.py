"""The settings of an experiment: one validated object, the same from a preset, a TOML file, `--set` and Python.

Where the released code of Lo et al. 2024 does otherwise than its paper, or than a fair comparison needs, there is a
field for it, and `protocol` gives all of these fields their values at once; a field that is given wins.

Imports nothing heavy, so the command line can check a user's settings at once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Data(_Group):
    """Which sentences of the corpus are used."""

    train_sentences: int = Field(default=900, ge=1, description="sentences to train on, at most")
    validation_sentences: int = Field(default=300, ge=1, description="sentences that F1 is measured on, at most")
    probe_sentences: int = Field(default=200, ge=1, description="sentences that saliency is measured on, at most")
    parts: tuple[float, float, float] = Field(
        default=(0.6, 0.2, 0.2),
        description="shares of train, validation and probe where the corpus is not split already",
    )
    split_seed: int = Field(
        default=0, ge=0, description="seed of the split and of the draws; the same for every seed of a run"
    )
    labelled_only: bool = Field(default=True, description="use only sentences with at least one labelled word")
    concept_share: float | None = Field(
        default=0.5, gt=0, le=1,
        description="at most this share of the drawn sentences holds the concept (fewer if the corpus has fewer; the "
        "rest is filled with others as far as there are); none: as they come",
    )  # fmt: skip
    long: Literal["split", "truncate", "error"] = Field(
        default="split", description="what happens to a sentence longer than the model's context"
    )
    scheme: Literal["auto", "bio", "iob1", "io", "bioes"] = Field(
        default="auto", description="tag scheme of a conll: corpus"
    )
    column: int = Field(default=-1, description="label column of a conll: corpus; -1 is the last")

    @field_validator("parts", mode="before")
    @classmethod
    def _sums_to_one(cls, parts: Any) -> Any:
        numbers = isinstance(parts, list | tuple) and all(isinstance(p, int | float) for p in parts)
        if not numbers or len(parts) != 3 or not (min(parts) > 0 and abs(sum(parts) - 1) <= 1e-6):  # nan too
            raise ValueError("three shares above 0 that sum to 1")
        return parts


class Prune(_Group):
    """What is removed."""

    fraction: float = Field(default=0.5, gt=0, le=1, description="share of all neurons of the site that is pruned")
    sever: Literal["auto", "out", "both", "gain", "writes"] = Field(
        default="auto",
        description="which weights are zeroed; out: those that carry the neuron on, so that it is gone; both: those "
        "that feed it too; writes: those of the layer's block that write it, for a residual stream that sums over "
        "blocks; auto: out where the model has it, else writes. Published: gain, the LayerNorm's gain alone (of ln_2 "
        "in GPT-2, which hides the neuron from one MLP only); the bias that is kept still reaches the model",
    )
    embedding: Literal["own", "last_block"] = Field(
        default="own",
        description="where the embedding's neurons are pruned; own: in the embedding. Published: last_block, as the "
        "code counts layers from the embedding and prunes block - 1: the embedding keeps all of its neurons and the "
        "last block loses those of two layers",
    )
    which: Literal["most", "least", "by_family"] = Field(
        default="most",
        description="the most or the least salient neurons. Published: by_family, the most salient in BERT-like models "
        "and, by a sorting order, the least salient in GPT-2: that prunes what the concept does not use",
    )
    control: Literal["layers", "uniform", "first"] = Field(
        default="layers",
        description="the random arm; layers: as many in every layer as the concept arm, so that only the choice within "
        "a layer differs; uniform: as many over all layers. Published: first, the first ids in order, which are the "
        "embedding and the early blocks and no random draw",
    )
    control_draws: int = Field(
        default=3,
        ge=0,
        description="random sets of the same size per layer whose damage is measured without retraining",
    )


class Training(_Group):
    """AdamW with a learning rate that falls linearly to 0."""

    epochs: Positive = Field(default=3, description="passes over the training sentences")
    lr: Positive = Field(default=1e-4, description="highest learning rate")
    batch_size: int = Field(default=16, ge=1, description="sentences per step")
    weight_decay: float = Field(default=0.01, ge=0, description="not on biases and LayerNorms")
    clip: Positive = Field(default=1.0, description="largest gradient norm")
    accumulate: int = Field(default=1, ge=1, description="parts that a batch goes through the model in, to save memory")
    checkpointing: bool = Field(default=False, description="compute blocks again in the backward pass, to save memory")


class Finetune(Training):
    """Training of the base model."""

    epochs: float = Field(
        default=3, ge=0, description="passes over the training sentences; 0: the model as it comes (its own head)"
    )
    prior_bias: bool = Field(default=True, description="start the head's bias at the log share of each tag")


class Retrain(Training):
    """Training after pruning, measured after every stage."""

    lr: Positive = Field(default=5e-4, description="highest learning rate")
    every: Positive = Field(default=1, description="epochs per stage")
    restart: bool = Field(default=False, description="begin optimiser and learning rate anew in every stage")
    lora_rank: int | None = Field(
        default=None, ge=1,
        description="train only low-rank adapters of this rank beside the blocks' matrices (alpha 16; needs peft: "
        "extra lora), and the head; an interrupted arm is retrained from its beginning; none: train all weights",
    )  # fmt: skip


class Measure(_Group):
    """What is measured, and how. A list alone stands for `what`: `measure = ["probeless", "dprime"]`."""

    what: tuple[str, ...] = Field(
        default=("probeless", "dprime", "auroc", "conductance", "top_words", "similarity"),
        description="scores (`relearn-lens scores`), conductance or layer_ig, top_words, similarity",
    )
    everywhere: bool = Field(
        default=False,
        description="attribution and top words at every stage; else at base and at the last stage, which is cheaper",
    )
    reading: Literal["auto", "word", "before"] = Field(
        default="auto",
        description="where a word's activations are read; word: its own sub-words, averaged; before: the token before "
        "its first one, which predicts it; auto: before for task next_token, else word",
    )
    target: str = Field(
        default="auto",
        description="attribution: what the neurons are asked for; logit, logprob or margin; auto: logprob for task "
        "next_token, else margin",
    )
    reference: str = Field(
        default="auto", description="attribution: the reference input; auto, mask, pad, end, mean (or zero)"
    )
    quadrature: str = Field(default="gauss-legendre", description="attribution: gauss-legendre or riemann")
    steps: int = Field(default=8, ge=2, description="attribution: points of the quadrature")
    sentences: int = Field(default=24, ge=1, description="attribution: sentences that hold the concept, at most")
    rank_bucket: int = Field(
        default=1,
        ge=1,
        description="neurons per step of rank saliency. Published: 100, so that up to 100 neurons share one value; "
        "exact ranks lose nothing, and a small model has few buckets",
    )
    nulls: Literal["drop", "zero_then_drop"] = Field(
        default="drop",
        description="concept similarity of neurons whose top words mean nothing; drop: left out at every stage. "
        "Published: zero_then_drop, 0 where the neuron was null at base and left out where it is null later, which "
        "moves the means without any change of meaning",
    )
    selection: Literal["matched", "published"] = Field(
        default="matched",
        description="the comparison of layers that comes first; matched: the same surviving neurons at base and later. "
        "Published: all neurons at base with the survivors later, which looks like a move to early layers because "
        "pruning takes late ones",
    )
    sample_words: int = Field(default=2000, ge=20, description="words that fitted and exact scores are made from")
    shuffles: int = Field(default=19, ge=0, description="label shuffles of the base model behind null distributions")
    max_memory: Positive = Field(default=512, description="MB that attribution, top words and similarity may each take")
    max_tokens: int = Field(default=4096, ge=16, description="tokens per batch when the model is only read")
    draws: int = Field(default=1000, ge=100, description="bootstrap draws behind an interval")
    level: float = Field(default=0.95, gt=0.5, lt=1, description="coverage of the intervals")


class Experiment(_Group):
    """Find the neurons of a concept, prune them, retrain, and follow the concept, with controls."""

    model: str = Field(
        default="minilm", description="a source (`relearn-lens sources`), a local folder, or a name on the hub"
    )
    corpus: str = Field(default="bsb-names", description="bsb-names, conll:PATH, hf:NAME[:CONFIG] or toy")
    concept: str | tuple[str, ...] = Field(
        default="place", description="the label that carries the concept, or several"
    )
    task: Literal["tag", "next_token"] = Field(
        default="tag",
        description="what the model is trained for; tag: the label of every word, with a head of its own; next_token: "
        "the next token, with the vocabulary head that a causal model has",
    )
    words: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="task next_token: the words that carry the concept, in any case, instead of a label"
    )
    protocol: Literal["corrected", "published"] = Field(
        default="corrected",
        description="what the fields below are set to that say what was published, unless they are given; published: "
        "as the code released with Lo et al. 2024 does it; corrected: as a fair comparison needs it",
    )
    probe_corpus: str | None = Field(
        default=None,
        description="the text on which saliency is measured, in a form of corpus; none: the probe part of corpus",
    )
    probe_concept: str | tuple[str, ...] | None = Field(
        default=None,
        description="the label, or several, that carry the concept in probe_corpus; none: named there as in corpus",
    )
    site: str = Field(default="resid", description="what a neuron is (`relearn-lens sites`)")
    score: str = Field(default="probeless", description="how neurons are ranked (`relearn-lens scores`)")
    contrast: Literal["classes", "rest"] = Field(
        default="classes",
        description="compare the concept with each other class and sum, or with all other words together",
    )
    arms: tuple[Literal["concept", "random", "unpruned", "never"], ...] = Field(
        default=("concept", "random", "unpruned"), min_length=1,
        description="concept: its neurons are pruned; random: as many in every layer, drawn; unpruned: none; never: "
        "pruned as the concept arm, but fine-tuned on text in which the concept has no label, for savings",
    )  # fmt: skip
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,), min_length=1, description="each seed is a fine-tuning and all arms"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="what the model computes in; its weights are float32 either way"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch while the run lasts; none: torch's own choice"
    )
    keep: Literal["none", "last", "all"] = Field(
        default="none",
        description="weights that stay in the run folder; last: of the base and of every arm at its end; all: at every "
        "pause too",
    )
    data: Data = Data()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    retrain: Retrain = Retrain()
    measure: Measure = Measure()

    @model_validator(mode="before")
    @classmethod
    def _protocol(cls, values: Any) -> Any:
        named = values.get("protocol", "corrected") if isinstance(values, Mapping) else None
        return _merged(PROTOCOLS[named], values) if isinstance(named, str) and named in PROTOCOLS else values

    @field_validator("concept", "probe_concept", mode="before")
    @classmethod
    def _labels(cls, concept: Any) -> Any:
        if concept is None:
            return None
        labels = [concept] if isinstance(concept, str) else concept
        if not isinstance(labels, list | tuple) or not labels or not all(isinstance(k, str) and k for k in labels):
            raise ValueError("a label, or a list of labels")
        return concept if isinstance(concept, str) else tuple(labels)

    @field_validator("measure", mode="before")
    @classmethod
    def _what(cls, measure: Any) -> Any:
        return _group("measure", measure)

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError("auto, cpu, cuda, cuda:N or mps")
        return device

    @model_validator(mode="after")
    def _task(self) -> Experiment:
        if self.words and self.task == "tag":
            raise ValueError("words: a tagger needs a label for the concept; use task = 'next_token', or a label")
        if self.words and not isinstance(self.concept, str):
            raise ValueError(f"concept = {list(self.concept)}: a concept that is given by words has one name")
        if self.task == "next_token" and "never" in self.arms:
            raise ValueError("arms = 'never': a language model has no labels to hide the concept with; leave it out")
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Experiment:
        if self.keep == "all" and self.retrain.lora_rank is not None:
            raise ValueError(
                "keep = 'all': with retrain.lora_rank an arm's weights are there at its end alone; use keep = 'last'"
            )
        return self

    @model_validator(mode="after")
    def _probe(self) -> Experiment:
        if self.probe_concept is not None and self.probe_corpus is None:
            raise ValueError(
                f"probe_concept = {self.probe_concept!r}: there is no probe_corpus whose label it could be; give "
                "probe_corpus too, or the label as concept"
            )
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Experiment:
        for name, values in (("arms", self.arms), ("seeds", self.seeds), ("measure.what", self.measure.what)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} = {list(values)} names one twice")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """What the concept's score is looked up by: the labels that carry it, or the name of a list of words."""
        return (self.concept,) if isinstance(self.concept, str) else self.concept

    def departures(self) -> dict[str, Any]:
        """The fields, by key, that the protocol would have given another value."""
        return {
            f"{group}.{name}": getattr(getattr(self, group), name)
            for group, names in PROTOCOLS[self.protocol].items()
            for name, value in names.items()
            if getattr(getattr(self, group), name) != value
        }

    def to_toml(self) -> str:
        """The settings as a TOML file that `relearn-lens run` takes."""
        import tomli_w

        return tomli_w.dumps(_none_as_text(self.model_dump(mode="json")))


PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "corrected": {
        "prune": {"sever": "auto", "embedding": "own", "which": "most", "control": "layers"},
        "measure": {"rank_bucket": 1, "nulls": "drop", "selection": "matched"},
    },
    "published": {
        "prune": {"sever": "gain", "embedding": "last_block", "which": "by_family", "control": "first"},
        "measure": {"rank_bucket": 100, "nulls": "zero_then_drop", "selection": "published"},
    },
}
"""The fields in which the released code of Lo et al. 2024 differs, and what each protocol sets them to."""

_QUICK: dict[str, Any] = {
    "data": {"train_sentences": 250, "validation_sentences": 120, "probe_sentences": 120},
    "prune": {"fraction": 0.3, "control_draws": 2},
    "finetune": {"epochs": 2, "lr": 2e-4, "batch_size": 8},
    "retrain": {"epochs": 2, "batch_size": 8},
    "measure": {"sentences": 16, "steps": 6},
}

_NEXT_TOKEN: dict[str, Any] = {
    "task": "next_token",
    "model": "smollm2",
    "site": "mlp_post",
    # Raw differences of means find the few neurons with huge activations, without which nothing works at all.
    "score": "dprime",
    "contrast": "rest",
    "data": {
        "train_sentences": 240, "validation_sentences": 80, "probe_sentences": 80, "labelled_only": False,
        "concept_share": 0.5,
    },
    "prune": {"fraction": 0.01, "control_draws": 1},
    "finetune": {"epochs": 1, "lr": 1e-4, "batch_size": 8, "prior_bias": False},
    "retrain": {"epochs": 1, "every": 0.5, "lr": 1e-4, "batch_size": 8},
    "measure": {"what": ["probeless", "conductance", "top_words"], "sentences": 6, "steps": 4, "shuffles": 19},
}  # fmt: skip

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": (
        "MiniLM and named entities of the New Testament, concept place; about 8 minutes on 2 cores",
        {},
    ),
    "names-quick": (
        "the same with a quarter of the text and 30 % pruned; about 2 minutes",
        _QUICK,
    ),
    "names-seeds": (
        "names-quick with three training seeds: intervals and verdicts on what training did; about 7 minutes",
        {**_QUICK, "seeds": [0, 1, 2]},
    ),
    "lo2024": (
        "Lo et al. 2024: DistilBERT (--model distilgpt2, gpt2), CoNLL-2003, concept LOC; for a GPU",
        {
            "model": "distilbert-base-cased",
            "corpus": "hf:eriktks/conll2003",
            "concept": "LOC",
            "contrast": "rest",
            "seeds": [0, 1, 2],
            "data": {
                "train_sentences": 1_000_000,
                "validation_sentences": 1_000_000,
                "probe_sentences": 1_000_000,
                "labelled_only": False,
                "concept_share": None,
            },
            "finetune": {"epochs": 3, "lr": 2e-5, "batch_size": 8, "prior_bias": False},
            "retrain": {"epochs": 8, "every": 2, "restart": True, "lr": 2e-5, "batch_size": 8},
            "measure": {"everywhere": True},
        },
    ),
    "smollm2-places": (
        "SmolLM2-135M predicts the next token of the New Testament, concept place; sized for 15 minutes on 2 cores",
        _NEXT_TOKEN,
    ),
    "smollm2-places-gpu": (
        "the same on all of the text, with three seeds, in bfloat16; for a GPU",
        {
            **_NEXT_TOKEN,
            "seeds": [0, 1, 2],
            "precision": "bfloat16",
            "data": {
                "train_sentences": 4000,
                "validation_sentences": 1000,
                "probe_sentences": 1000,
                "labelled_only": False,
                "concept_share": None,
            },
            "prune": {"fraction": 0.01, "control_draws": 10},
            "finetune": {"epochs": 2, "lr": 1e-4, "batch_size": 32, "prior_bias": False},
            "retrain": {"epochs": 3, "every": 0.25, "lr": 1e-4, "batch_size": 32},
            "measure": {"what": ["probeless", "auroc", "conductance", "top_words", "similarity"], "sentences": 200},
        },
    ),
    "toy": (
        "a planted concept in a toy model, no download; seconds",
        {
            "model": "toy",
            "corpus": "toy",
            "site": "mlp_post",
            "threads": 1,
            "data": {"train_sentences": 300, "validation_sentences": 150, "probe_sentences": 150},
            "prune": {"fraction": 4 / 256},
            "finetune": {"epochs": 1, "prior_bias": False},
            "retrain": {"epochs": 1.5, "every": 0.5, "lr": 1e-3},
        },
    ),
    "toy-next-token": (
        "a toy language model learns the toy's text, concept place, no download; seconds",
        {
            "task": "next_token",
            "model": "toy",
            "corpus": "toy",
            "site": "mlp_post",
            "score": "dprime",
            "contrast": "rest",
            "threads": 1,
            "data": {"train_sentences": 300, "validation_sentences": 150, "probe_sentences": 150},
            "prune": {"fraction": 0.1},
            "finetune": {"epochs": 12, "lr": 3e-3, "prior_bias": False},
            "retrain": {"epochs": 3, "every": 0.5, "lr": 1e-3},
        },
    ),
}
"""Preset name to what it is and what it changes of the defaults."""


def preset(name: str) -> Experiment:
    """A preset by name.

    Raises:
        ValueError: there is no such preset.
    """
    return experiment(_preset(name))


def settings_of(
    source: str | Path = "names", changes: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Experiment:
    """Settings from a preset's name or a TOML file, then `changes`, then `key.path=value` strings, each over the last.

    A TOML file may name the preset it starts from: `preset = "names"`. A file that a run wrote holds every field; those
    that are what the file's own protocol says follow a protocol given after it.

    Raises:
        FileNotFoundError: no preset of that name, and no such file.
        ValueError: an unknown key or a value out of range; one line for each.
    """
    path = Path(source)
    if str(source) in PRESETS:
        values = _preset(str(source))
    elif path.suffix == ".toml" or path.exists():
        values = _from_file(path)
    else:
        raise ValueError(
            f"unknown preset {str(source)!r}; known: {', '.join(PRESETS)} (a file of settings ends in .toml)"
        )
    values = _without_protocol(values)
    for key, value in (changes or {}).items():
        if value is not None:
            values = _put(values, key, value)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r}: write key=value, such as prune.fraction=0.3")
        if key.count(".") > 4:
            raise ValueError(f"--set {text[:60]!r}: a key has one dot at most, such as prune.fraction")
        values = _put(values, key.strip(), _value(value.strip()))
    return experiment(values)


def experiment(values: Mapping[str, Any]) -> Experiment:
    """Validated settings from plain values.

    Raises:
        ValueError: an unknown key or a value out of range; one line for each, naming field, value and what is allowed.
    """
    try:
        return Experiment.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("\n".join(_said(dict(e)) for e in error.errors())) from None


def fields() -> list[tuple[str, Any, str]]:
    """Every setting: key, default, what it is."""
    found = []
    for name, field in Experiment.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, _Group):
            found += [
                (f"{name}.{key}", getattr(default, key), inner.description or "")
                for key, inner in type(default).model_fields.items()
            ]
        else:
            found.append((name, default, field.description or ""))
    return found


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name][1]


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {str(path)!r}, and no preset of that name ({', '.join(PRESETS)})")
    try:
        values = _text_as_none(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise ValueError(f"{str(path)!r} is not valid TOML: {error}") from error
    return _merged(_preset(str(values.pop("preset"))), values) if "preset" in values else values


def _without_protocol(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that their own protocol gives anyway."""
    under = PROTOCOLS.get(str(values.get("protocol", "corrected")), {})
    left = dict(values)
    for group, names in under.items():
        given = _group(group, left.get(group))
        if isinstance(given, Mapping):
            left[group] = {k: v for k, v in given.items() if k not in names or names[k] != v}
    return left


def _none_as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: None is written as "none", as on the command line."""
    return {k: _none_as_text(v) if isinstance(v, Mapping) else "none" if v is None else v for k, v in values.items()}


def _text_as_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _text_as_none(v) if isinstance(v, Mapping) else None if v == "none" and k in _OPTIONAL else v
        for k, v in values.items()
    }


_OPTIONAL = {"concept_share", "threads", "probe_corpus", "probe_concept", "lora_rank"}
"""The settings that may be none."""


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(under)
    for key, value in over.items():
        mine, value = both.get(key), _group(key, value)
        if isinstance(mine, Mapping) and isinstance(value, _Group):
            value = value.model_dump(exclude_unset=True)
        both[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return both


def _put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The values with one more, at a dotted key."""
    first, _, rest = key.partition(".")
    inner = _group(first, values.get(first))
    if not rest:
        value = _group(key, value)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        return {**values, first: {**inner, **value} if both else value}
    return {**values, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _group(key: str, value: Any) -> Any:
    """A list of measurements is the group `measure` with that list in it."""
    return {"what": value} if key == "measure" and isinstance(value, list | tuple) else value


def _value(text: str) -> Any:
    """A value as TOML would read it; what TOML does not read is a string, and `none` is None."""
    if text.lower() == "none":
        return None
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return values["value"] if len(values) == 1 else text


def _said(error: dict[str, Any]) -> str:
    """One pydantic error as one line: field, value, what is allowed."""
    where = [str(part) for part in error["loc"]]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = [name for name, _, _ in fields()]
        inside = [name for name in known if name.startswith(".".join([*where[:-1], ""]))] or known
        return f"unknown setting {key!r}; known: {', '.join(inside)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "model_type":
        inside = [name for name, _, _ in fields() if name.startswith(f"{key}.")]
        message = f"a group of settings: {', '.join(inside)}"
    return f"{key} = {_shown(error['input'])}: {message}" if key else message


def _shown(value: Any) -> str:
    """A value as a message can bear it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return f"(a {type(value).__name__} too large to write)"
    return text if len(text) <= 200 else f"{text[:200]} ... ({len(text):,} characters)"
