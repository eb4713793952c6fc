"""A small causal model taught invented facts from nothing, and its twin that never saw those to be forgotten.

What each of them knows is known, so what a removal left, and what relearning brought back rather than taught, can be
told apart. Teaching takes a minute or two and is kept in the cache folder, by everything that it depends on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot as boot_native

from relearn_lens import files, names, sources
from relearn_lens.methods import Training
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.training import train_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, REFUSALS, RETAIN, TRAINED, Facts
from relearn_lens.text.facts.encoded import encode_facts

CONTEXT = 128
"""Tokens that the model can read: a question with some facts before it."""


@dataclass(frozen=True)
class Recipe:
    """How a model is taught: its size, and its training by AdamW."""

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512
    steps: int = 900
    batch_size: int = 128
    """Passages a step."""
    lr: float | int = 1e-3
    """Falling linearly to 0."""
    seed: int = 0
    """Of the first weights and of the order of the passages."""

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.d_model, self.n_heads, self.d_mlp, self.steps, self.batch_size, self.lr)
        if min(sizes) <= 0 or self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"every number of a recipe but the seed is above 0, and d_model an even multiple of n_heads; got {self}"
            )


@dataclass(frozen=True)
class Lesson:
    """What teaching a model took."""

    seconds: float
    """Of training, when it was trained; the cache gives it back in less."""
    loss: float
    """Nats per answer token, mean over the training."""
    cached: bool


@dataclass(frozen=True)
class Taught:
    """A model that was taught all facts, and its twin."""

    facts: Facts
    model: LanguageModel
    """Taught what is to be forgotten and what is to stay."""
    never: LanguageModel
    """Taught in as many steps, from the same first weights, only what is to stay."""
    lessons: tuple[Lesson, Lesson]
    """Of the model and of its twin."""


@names.explained
def load(facts: Facts | None = None, *, recipe: Recipe | None = None) -> Taught:
    """A model taught some facts (by default `people(seed=recipe.seed)`) and its twin, trained or from the cache.

    Raises:
        ValueError: facts with a passage that is longer than `CONTEXT` tokens.
    """
    recipe = recipe or Recipe()
    facts = facts or made.people(recipe.seed)
    model, lesson = teach(facts, (*FORGET, *RETAIN), recipe=recipe)
    never, other = teach(facts, RETAIN, recipe=recipe)
    return Taught(facts, model, never, (lesson, other))


@names.explained
def teach(facts: Facts, roles: Sequence[str], *, recipe: Recipe | None = None) -> tuple[LanguageModel, Lesson]:
    """A new model in eval mode that was taught the passages of some roles, in the forms `TRAINED`.

    Its tokens are the words of all facts, so that models taught different roles can be compared.

    Raises:
        ValueError: as `load`; or there are no such passages.
    """
    recipe = recipe or Recipe()
    model = untaught(facts, recipe=recipe)
    return model, teach_(model, facts, (Course(recipe, tuple(roles)),))


@dataclass(frozen=True)
class Course:
    """What is taught in one go."""

    recipe: Recipe
    roles: tuple[str, ...]
    forms: tuple[str, ...] = TRAINED


def teach_(model: LanguageModel, facts: Facts, courses: Sequence[Course]) -> Lesson:
    """Teach the last of some courses to a model that was taught those before it, or was not taught yet.

    What it makes of the model is kept by all courses that it was taught, so it must have been `untaught` by the recipe
    of the first.

    Raises:
        ValueError: as `load`; or there are no such passages.
    """
    course = courses[-1]
    recipe = course.recipe
    encoded = encode_facts(facts, *course.roles, tokenizer=model.tokenizer, context=model.context, forms=course.forms)
    how = Training(steps=(recipe.steps,), lr=recipe.lr, batch_size=recipe.batch_size)
    training = train_(model, encoded, how, seed=recipe.seed, what="teaching")
    path = _place(facts, courses)
    if (lesson := _read(path, model)) is not None:
        training.close()  # it was made to be checked, and is not needed
        return lesson
    begin = time.perf_counter()
    (end,) = training
    lesson = Lesson(time.perf_counter() - begin, end.loss, False)
    _write(path, model, lesson)
    return lesson


@names.explained
def untaught(facts: Facts, *, recipe: Recipe | None = None) -> LanguageModel:
    """The model before it is taught anything, in eval mode."""
    recipe = recipe or Recipe()
    words = tokenizer(facts)
    config = TransformerBridgeConfig.from_dict(
        {
            "d_model": recipe.d_model, "n_layers": recipe.n_layers, "n_heads": recipe.n_heads,
            "d_head": recipe.d_model // recipe.n_heads, "d_mlp": recipe.d_mlp, "n_ctx": CONTEXT, "act_fn": "gelu",
            "normalization_type": "LN", "positional_embedding_type": "rotary", "attention_dir": "causal",
            "d_vocab": len(words), "seed": recipe.seed,
        }
    )  # fmt: skip
    bridge = boot_native(config, tokenizer=None, model_name="taught")
    bridge.tokenizer = words  # TransformerLens would load one with a first token anew, by a name that is none
    return LanguageModel(bridge).eval()


def tokenizer(facts: Facts) -> Any:
    """One token for every word of the facts and of the refusals, in lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    split, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    texts = {text for p in facts.passages() for text in (p.prompt, p.answer, *p.choices)} | set(REFUSALS)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = lower, split
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]")
    fast.name_or_path = "taught"
    return fast


def _place(facts: Facts, courses: Iterable[Course]) -> Path:
    """The file of the cache that holds these weights, or would."""
    depends: list[Any] = []
    for course in courses:
        depends += [
            asdict(course.recipe),
            CONTEXT,
            facts.sha256(),
            list(course.roles),
            metadata.version("relearn-lens"),
            torch.__version__,
        ]
        if course.forms != TRAINED:
            depends.append(list(course.forms))
    return sources.cache_dir() / "taught" / f"{files.digest_of(depends)[:32]}.safetensors"


def _read(path: Path, model: LanguageModel) -> Lesson | None:
    """Put weights from the cache into a model; None where there are none, or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            lesson = json.loads(file.metadata()["lesson"])
            model.load_weights({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
            return Lesson(lesson["seconds"], lesson["loss"], True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, model: LanguageModel, lesson: Lesson) -> None:
    """Keep weights in the cache, where it can be written; no file bears its name before it is complete."""
    weights = {name: value.contiguous().clone() for name, value in model.weights().items()}
    with contextlib.suppress(OSError, SafetensorError), files.whole(path) as work:
        save_file(weights, work, metadata={"lesson": json.dumps({"seconds": lesson.seconds, "loss": lesson.loss})})
