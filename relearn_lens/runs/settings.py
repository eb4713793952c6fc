"""The settings of an experiment: one validated object, the same from a preset, a TOML file, `--set` and Python.

Where the released code of Lo et al. 2024 does otherwise than its paper, or than a fair comparison needs, there is a
field for it, and `protocol` gives all of these fields their values at once; a field that is given wins.

Imports nothing heavy, so the command line can check a user's settings at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from relearn_lens.methods import AtMost, Finetuning, Measuring, Method, Retraining, Size, meant_of
from relearn_lens.names import meant, unknown
from relearn_lens.text import markup

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


ArmName = Literal["concept", "other", "random", "unpruned", "never"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)


_TAKEN = ("base", "sized", "cuts", "damage", "grafted", "own", "again", "blocked")
"""What else files of a run folder begin with."""


class Data(Method):
    """Which sentences of the corpus are used."""

    train_sentences: AtMost = Field(default=600, description="sentences to train on, at most")
    validation_sentences: AtMost = Field(
        default=150,
        description="sentences on which the size of the cut is found, at most; they neither train, nor find neurons, "
        "nor are scored unless measure.on says so",
    )
    probe_sentences: AtMost = Field(
        default=150, description="sentences that F1, margins and saliency are measured on, in one pass, at most"
    )
    parts: tuple[float, float, float] = Field(
        default=(0.6, 0.2, 0.2),
        description="shares of train, validation and probe where the corpus is not split already",
    )
    split_seed: Seed = Field(
        default=0, description="seed of the split and of the draws; the same for every seed of a run"
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
    column: int = Field(default=-1, ge=-1000, le=1000, description="label column of a conll: corpus; -1 is the last")
    word_column: int | None = Field(
        default=None, ge=-1000, le=1000,
        description="column of the words of a conll: corpus, counted from 0; none: the first that neither counts up "
        "nor names a document",
    )  # fmt: skip
    encoding: str = Field(default="utf-8", description="encoding of a conll: corpus, for instance latin-1")

    @field_validator("parts", mode="before")
    @classmethod
    def _sums_to_one(cls, parts: Any) -> Any:
        numbers = isinstance(parts, list | tuple) and all(isinstance(p, int | float) for p in parts)
        if not numbers or len(parts) != 3 or not (min(parts) > 0 and abs(sum(parts) - 1) <= 1e-6):  # nan too
            raise ValueError("three shares above 0 that sum to 1")
        return parts


class Prune(Method):
    """What is removed."""

    fraction: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        description="share of all neurons of the site that is pruned; auto: the smallest of `grid` that takes the "
        "concept and leaves the others, on the validation sentences, for each seed; where there is none, that which "
        "takes most, if half or more, and the run says so",
    )
    grid: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20), min_length=1, description="fractions that auto tries"
    )
    gone: float = Field(
        default=0.1, gt=0, lt=1, description="auto: the concept's F1 is to fall below this share of what it was"
    )
    spared: float = Field(
        default=0.85, gt=0, lt=1,
        description="auto: the F1 of all labels with 30 spans or more, together, is to keep this share of what it was, "
        "at the lower end of its interval",
    )  # fmt: skip
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
    control: Literal["disjoint", "layers", "uniform", "first"] = Field(
        default="disjoint",
        description="the random arm; disjoint: as many in every layer as the concept arm, none of them the concept "
        "arm's where there is room; layers: as many in every layer, from all; uniform: as many over all layers. "
        "Published: first, the first ids in order, which are the embedding and the early blocks and no random draw",
    )
    control_draws: int = Field(
        default=4,
        ge=0,
        le=1000,
        description="random sets of each kind whose damage is measured without retraining, per seed",
    )


class Measure(Measuring):
    """What is measured, and how. A list alone stands for `what`: `measure = ["probeless", "dprime"]`."""

    what: tuple[str, ...] = Field(
        default=("dprime", "probeless", "auroc", "conductance", "top_words", "similarity"),
        description=Measuring.model_fields["what"].description,
    )
    on: Literal["probe", "validation"] = Field(
        default="probe",
        description="the sentences that F1 and margins are measured on; validation where the probe text is another one",
    )
    dear: Literal["first", "all"] = Field(
        default="first",
        description="which seeds get attribution and similarity, which take longest; first: the first seed",
    )
    everywhere: bool = Field(
        default=False,
        description="attribution, top words and the scores beside the main one at every stage; else at base and at the "
        "last stage, which is cheaper",
    )
    reading: Literal["auto", "word", "before"] = Field(
        default="auto",
        description="where a word's activations are read; word: its own sub-words, averaged; before: the token before "
        "its first one, which predicts it; auto: before for task next_token, else word",
    )
    sentences: AtMost = Field(default=24, description="attribution: sentences that hold the concept, at most")
    selection: Literal["matched", "published"] = Field(
        default="matched",
        description="the comparison of layers that comes first; matched: the same surviving neurons at base and later. "
        "Published: all neurons at base with the survivors later, which looks like a move to early layers because "
        "pruning takes late ones",
    )
    shuffles: int = Field(default=19, ge=0, le=1000, description=Measuring.model_fields["shuffles"].description)
    max_tokens: int = Field(
        default=1024, ge=16, le=1_000_000,
        description="tokens per batch when the model is only read; so few stay in a core's cache",
    )  # fmt: skip
    draws: int = Field(default=1000, ge=100, le=100_000, description="bootstrap draws behind an interval")
    level: float = Field(default=0.95, gt=0.5, le=0.9999, description="coverage of the intervals")

    @field_validator("target", "quadrature")
    @classmethod
    def _by_name(cls, name: Any) -> Any:
        if not isinstance(name, str):
            raise ValueError("a name; a function can be given in Python alone, to attribute()")
        return name


class Grafting(Method):
    """Where it came back, by moving parts of the model between the cut and the retrained weights."""

    skip: bool = Field(default=False, description="leave this out, and cutting again with it")
    bands: int | None = Field(
        default=None, ge=1, le=1000, description="blocks in so many groups of neighbours; none: each for itself"
    )
    within: Literal["first", "all", "none"] = Field(
        default="first",
        description="seeds in which the part that alone brings back most is taken apart: a group of blocks into its "
        "blocks, a block into attention and MLP; first: the first seed",
    )
    cumulative: bool = Field(default=False, description="also all parts up to each, from the input and from the output")


class Blocking(Method):
    """Train on with something held where the cut left it: does it need to come back there?"""

    held: tuple[Literal["part", "heirs", "random"], ...] = Field(
        default=(),
        description="part: the part of the model that alone brings most back; heirs: the neurons that carry the "
        "concept at the end; random: as many others in every layer",
    )


class ArmRemoval(Method):
    """An arm of one's own: another way of removing the concept, retrained, measured and grafted as the first one is."""

    remove: str = Field(
        default="prune", description="how (`relearn-lens removers`), with a wrapper as npo+sam; values as published"
    )
    where: str | None = Field(
        default=None,
        description="a localiser (`relearn-lens localisers`): the neurons that are pruned, as many as of the concept's "
        "arm, or the weights that may move; none: of prune those of the concept's arm, else what is usual",
    )
    set: dict[str, Any] = Field(
        default={}, description="fields of the remover, its wrapper and its training, such as { lr = 1e-3 }"
    )

    @field_validator("where", mode="before")
    @classmethod
    def _text_as_none(cls, where: Any) -> Any:
        return None if where == "none" else where


class Experiment(Method):
    """Find the neurons of a concept, prune them, retrain, and follow the concept, with controls."""

    model: str = Field(
        default="minilm", description="a source (`relearn-lens sources`), a local folder, or a name on the hub"
    )
    head: Literal["trained", "fresh"] = Field(
        default="trained",
        description="task tag: the head of a model that has one; trained: its rows for the labels of the text, by "
        "name; fresh: a new one",
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
    score: str = Field(default="dprime", description="how neurons are ranked (`relearn-lens scores`)")
    contrast: Literal["classes", "rest"] = Field(
        default="rest",
        description="compare the concept with all other words together, or with each other class and sum: that ranks "
        "the neurons of other concepts too. Published: classes",
    )
    other: str = Field(
        default="auto",
        description="the label of the arm other; auto: the most frequent other one with 30 spans in the probe text; "
        "without one the arm is left out",
    )
    arms: tuple[ArmName, ...] = Field(
        default=ARMS, min_length=1,
        description="concept: its neurons are pruned; other: those of another label, as many, and nothing is trained; "
        "random: drawn, as many; unpruned: none; never: pruned as the concept arm, but fine-tuned without the "
        "concept's label",
    )  # fmt: skip
    never: Literal["absent", "outside"] = Field(
        default="absent",
        description="what the arm never is fine-tuned on; absent: the concept's words are in no loss, and its label is "
        "none that could be given; outside: they are labelled O, which teaches against the concept",
    )
    seeds: tuple[Seed, ...] = Field(
        default=(0, 1, 2), min_length=1,
        description="each seed is a fine-tuning and all arms; what training did gets a verdict from three on",
    )  # fmt: skip
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="what the model computes in; its weights are float32 either way; auto: bfloat16 where the "
        "processor has units for it",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of torch while the run lasts; none: torch's own choice"
    )
    workers: int | None = Field(
        default=None, ge=1, le=64,
        description="processes that compute parts of the run side by side, each with its share of the threads; none: "
        "as many as cores and memory allow, at most 4, and 1 for a model below 5 million weights or on a GPU",
    )  # fmt: skip
    keep: Literal["none", "last", "all"] = Field(
        default="none",
        description="weights that stay in the run folder; last: of the base and of every arm at its end; all: at every "
        "pause too",
    )
    max_memory: Size | None = Field(
        default=None,
        description="MB that the whole run may take; raises accumulate and lowers measure.max_tokens and "
        "measure.max_memory until it should fit, and is refused where nothing would; none: as they are set",
    )
    arm: dict[str, ArmRemoval] = Field(
        default={},
        description="arms of one's own, [arm.NAME] with remove, where and set: each removes the concept in another way "
        "from the model that the concept's arm starts from",
    )
    data: Data = Data()
    prune: Prune = Prune()
    finetune: Finetuning = Finetuning()
    retrain: Retraining = Retraining()
    measure: Measure = Measure()
    grafts: Grafting = Grafting()
    rounds: int = Field(
        default=1, ge=0, le=100, description="how often the concept is found and cut again in the model it came back to"
    )
    block: Blocking = Blocking()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_lines(error)) from None

    def changes(self) -> dict[str, Any]:
        """The settings, by key, that are not the default ones."""
        return {key: value for key, usual, _ in fields() if (value := attrgetter(key)(self)) != usual}

    def __repr__(self) -> str:
        what = f"{self.model}, {self.corpus}, concept {'+'.join(self.labels)}, site {self.site}"
        changed = len(self.changes().keys() - {"model", "corpus", "concept", "site"})
        n, more = len(self.seeds), f"; {changed} more changed" if changed else ""
        return f"Experiment({what}; arms {', '.join(self.arms)}; {n} seed{'s' * (n > 1)}{more})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The settings that are not the default ones."""
        usual = {key: default for key, default, _ in fields()}
        rows = [[key, _plainly(value), _plainly(usual[key])] for key, value in self.changes().items()]
        return markup.box(repr(self), markup.table(["setting", "value", "default"], rows) if rows else "")

    @model_validator(mode="before")
    @classmethod
    def _protocol(cls, values: Any) -> Any:
        named = values.get("protocol", "corrected") if isinstance(values, Mapping) else None
        return merged(PROTOCOLS[named], values) if isinstance(named, str) and named in PROTOCOLS else values

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
        return as_group("measure", measure)

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError("auto, cpu, cuda, cuda:N or mps")
        return device

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.words and self.task == "tag":
            raise ValueError("words: a tagger needs a label for the concept; use task = 'next_token', or a label")
        if self.words and not isinstance(self.concept, str):
            raise ValueError(f"concept = {list(self.concept)}: a concept that is given by words has one name")
        if self.task == "next_token" and self.never == "outside":
            raise ValueError("never = 'outside': a language model has no label O; use never = 'absent'")
        if self.task == "next_token" and self.prune.fraction == "auto":
            raise ValueError(
                "prune.fraction = 'auto': the size of a cut is found by F1, which a language model does not have; give "
                "a number, such as 0.01"
            )
        if self.keep == "all" and self.retrain.lora_rank is not None:
            raise ValueError(
                "keep = 'all': with retrain.lora_rank an arm's weights are there at its end alone; use keep = 'last'"
            )
        for name in self.arm:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in {*ARMS, *_TAKEN}:
                raise ValueError(
                    f"arm.{name}: a name of small letters, digits and _ that is none of {', '.join((*ARMS, *_TAKEN))}"
                )
        if self.arm and "concept" not in self.arms:
            raise ValueError(f"arm.{next(iter(self.arm))}: it is compared with the arm concept, which arms leaves out")
        if self.arm and self.retrain.lora_rank is not None:
            raise ValueError(
                f"arm.{next(iter(self.arm))}: arms of one's own are retrained by their weights; leave out "
                "retrain.lora_rank"
            )
        if self.probe_concept is not None and self.probe_corpus is None:
            raise ValueError(
                f"probe_concept = {self.probe_concept!r}: there is no probe_corpus whose label it could be; give "
                "probe_corpus too, or the label as concept"
            )
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

        return tomli_w.dumps(none_as_text(self.model_dump(mode="json")))


PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "corrected": {
        "prune": {"sever": "auto", "embedding": "own", "which": "most", "control": "disjoint"},
        "measure": {"rank_bucket": 1, "nulls": "drop", "selection": "matched"},
    },
    "published": {
        "prune": {"sever": "gain", "embedding": "last_block", "which": "by_family", "control": "first"},
        "measure": {"rank_bucket": 100, "nulls": "zero_then_drop", "selection": "published"},
    },
}
"""The fields in which the released code of Lo et al. 2024 differs, and what each protocol sets them to."""


def experiment(values: Mapping[str, Any]) -> Experiment:
    """Validated settings from plain values.

    Raises:
        ValueError: an unknown key or a value out of range; one line for each, naming field, value and what is allowed.
    """
    if strange := [key for key in values if not isinstance(key, str)]:
        raise ValueError(unknown("setting", strange[0], [name for name, _, _ in fields()]))
    return Experiment(**values)


def are_of(kept: Any, experiment_: Experiment) -> bool:
    """Whether plain settings are those of an experiment; one that was not there when they were written counts as its
    default."""
    try:
        return experiment(kept) == experiment_
    except (ValueError, TypeError):
        return False


def _lines(error: ValidationError) -> str:
    """What pydantic found, a line for each field."""
    every = [{**e, "loc": _place(e["loc"])} for e in error.errors()]
    # pydantic calls a tuple too short whose items it refused.
    inside = {e["loc"][:-1] for e in every}
    errors = [e for e in every if e["type"] != "too_short" or e["loc"] not in inside]
    lines: dict[Any, str] = {}
    for e in errors:  # of what may be a number or a word, each is an error of its own
        more = e["msg"].removeprefix("Input should be ")
        lines[e["loc"] or e["msg"]] = f"{line}; or {more}" if (line := lines.get(e["loc"])) else _said(e)
    return "\n".join(lines.values())


def fields() -> list[tuple[str, Any, str]]:
    """Every setting: key, default, what it is."""
    rows = []
    for name, field in Experiment.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Method):
            rows += [
                (f"{name}.{key}", getattr(default, key), inner.description or "")
                for key, inner in type(default).model_fields.items()
            ]
        else:
            rows.append((name, default, field.description or ""))
    return rows


OPTIONAL = frozenset(
    f"{group}{name}"
    for group, kind in [("", Experiment)]
    + [(f"{name}.", type(f.default)) for name, f in Experiment.model_fields.items() if isinstance(f.default, Method)]
    for name, field in kind.model_fields.items()
    if type(None) in get_args(field.annotation)
)
"""The settings, by key, that may be none."""


def none_as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: None is written as "none", as on the command line."""
    return {k: none_as_text(v) if isinstance(v, Mapping) else "none" if v is None else v for k, v in values.items()}


_RIVALS = {"epochs": ("steps",), "every": ("steps",), "steps": ("epochs", "every")}
"""What says how long a training is, and what else would."""


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings, group by group, with others over them; what is a group already gives what was set in it.

    A length of training over another takes its place, also where one is said in epochs and the other in steps.
    """
    gone = {rival for key, value in over.items() if value is not None for rival in _RIVALS.get(key, ())}
    both = {key: value for key, value in under.items() if key not in gone}
    for key, value in over.items():
        mine, value = both.get(key), as_group(key, value)
        if isinstance(mine, Mapping) and isinstance(value, Method):
            value = value.model_dump(exclude_unset=True)
        both[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return both


def as_group(key: str, value: Any) -> Any:
    """A list of measurements is the group `measure` with that list in it."""
    return {"what": value} if key == "measure" and isinstance(value, list | tuple) else value


def _place(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where in the settings an error is, without pydantic's names for what a field may be."""
    kind: Any = Experiment
    for n, part in enumerate(loc):
        if not isinstance(part, str) or not hasattr(kind, "model_fields"):
            return loc[: n + 1] if isinstance(part, int) else loc[:n]
        field = kind.model_fields.get(part)
        kind = None if field is None else field.annotation
        if field is None:
            return loc
    return loc


def _said(error: dict[str, Any]) -> str:
    """One pydantic error as one line: field, value, what is allowed."""
    where = [str(part) for part in error["loc"]]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        if key == "sweep":
            return "these settings are many runs ([sweep]): relearn-lens sweep FILE.toml runs them"
        known = [name for name, _, _ in fields()]
        inside = [name for name in known if name.startswith(".".join([*where[:-1], ""]))] or known
        return unknown("setting", key, inside, meant(key, known) or meant(where[-1], known))
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "value_error" and any(name.startswith(f"{key}.") for name, _, _ in fields()):
        return f"{key}.{message}"  # of a whole group: it names the field
    if error["type"] == "model_type":
        inside = [name for name, _, _ in fields() if name.startswith(f"{key}.")]
        message = f"a group of settings: {', '.join(inside)}"
    if error["type"] == "tuple_type":
        message = f"a list is wanted: {key}=[...]"
    if error["type"] == "int_parsing_size":
        message = "input is too large"
    if error["type"].startswith(("greater_than", "less_than", "int_parsing_size")):
        message += f"; the range is {_range(error['loc'])}"
    return f"{key} = {_shown(error['input'])}: {message}{meant_of(error)}" if key else message


def _plainly(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _range(where: Sequence[Any]) -> str:
    """In words, what a number at a place in the settings may be."""
    kind: Any = Experiment
    limits: list[Any] = []
    for part in where:
        if isinstance(part, str):
            field = kind.model_fields[part]
            kind, limits = field.annotation, [*field.metadata, *_limits(field.annotation)]
    says = {"gt": "above {:,}", "ge": "from {:,}", "le": "up to {:,}", "lt": "below {:,}"}
    return " ".join(text.format(getattr(m, k)) for k, text in says.items() for m in limits if hasattr(m, k))


def _limits(kind: Any) -> Iterator[Any]:
    """The limits that are written into a type, or into one that it is made of."""
    for each in getattr(kind, "__metadata__", ()):
        yield from getattr(each, "metadata", (each,))
    for inner in get_args(kind):
        yield from _limits(inner)


def _shown(value: Any) -> str:
    """A value as a message can bear it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return f"(a {type(value).__name__} too large to write)"
    return text if len(text) <= 200 else f"{text[:200]} ... ({len(text):,} characters)"
