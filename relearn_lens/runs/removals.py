"""One removal, from names to a folder: a model, facts, a remover and where it may work; what is known before and after.

config.json, *.safetensors, tokenizer...    as any Hugging Face folder; of a native model its weights and tokenizer
removal.json                                versions, hashes, settings, what was answered before and after
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relearn_lens import sources
from relearn_lens.files import as_json, check_free, whole, write_tensors, write_whole
from relearn_lens.find.localisers import localiser_of
from relearn_lens.measure.answers import Answered, known
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.facts import TRAINED_WORDING, asked, is_text, know
from relearn_lens.methods import Method
from relearn_lens.models import taught
from relearn_lens.models.export import export
from relearn_lens.models.loading import load_language_model
from relearn_lens.models.lora import adapted, adapter_weights
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.models.training import Checkpoint
from relearn_lens.names import meant, unknown
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.pruning import Pruner
from relearn_lens.remove.recipes import RECIPES, Recipe, recipe
from relearn_lens.runs import needs
from relearn_lens.runs.presets import value_of
from relearn_lens.runs.store import versions
from relearn_lens.text.facts import FORGET, RETAIN, Facts, countries, ontology, people, read_facts
from relearn_lens.text.facts.encoded import encode_facts

TAUGHT, MANIFEST, WEIGHTS = "taught", "removal.json", "weights.safetensors"
MADE = ("people", "countries", "ontology")
"""Facts that are made by name."""
KINDS = {TAUGHT: "toy", "smollm2": "smollm2"}
"""The recipes that are usual for a model; for any other, values are the published ones."""


@dataclass(frozen=True)
class Subject:
    """A model and facts about which it may know something."""

    name: str
    """What the model was asked for by."""
    model: LanguageModel
    facts: Facts
    native: bool
    """Whether the model has no Hugging Face form."""
    never: LanguageModel | None = None
    """The twin that was never taught what is to be forgotten, where there is one."""


@dataclass(frozen=True)
class Removed:
    """What a removal did."""

    before: Mapping[str, Answered]
    after: Mapping[str, Answered]
    pause: Checkpoint
    """Its end."""
    where: str
    """What it worked on, in words."""
    seconds: float
    folder: Path | None
    notes: tuple[str, ...]
    memory: Mapping[str, int]
    """Megabytes that it was reckoned to take at most, by what takes them."""


def subject(
    model: str,
    facts: str,
    *,
    retain: str | None = None,
    held_out: str | None = None,
    general: str | None = None,
    seed: int = 0,
    half: bool = False,
) -> Subject:
    """A model and facts by their names; `half`: its weights in bfloat16.

    `model` is `taught` (a small one that is taught these facts, and its twin), a source, a folder, or a name on the
    hub. `facts` is `people`, `countries` (as far as the model knows them) or `ontology`; or what is to be forgotten, as
    a JSONL file or `hf:NAME`, and then `retain` is what is to stay.

    Raises:
        ValueError, OSError: a name that there is not, rows that cannot be read, facts without what is to stay.
    """
    own = {"retain": retain, "held_out": held_out, "general": general}
    if facts in MADE:
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(
                f"facts {facts!r} are made with what is to stay, so --{given[0].replace('_', '-')} is none of theirs; "
                "leave it out, or give what is to be forgotten as a file or hf:NAME"
            )
    elif not facts.startswith("hf:") and not Path(facts).suffix:
        raise ValueError(unknown("facts", facts, [*MADE, "a JSONL file", "hf:NAME"], meant(facts, MADE)))
    elif retain is None:
        raise ValueError(f"facts {facts!r} say what is to be forgotten; give what is to stay as --retain FILE.jsonl")
    made: Facts | None = None
    if facts == "people":
        made = people(seed)
    elif facts == "ontology":
        made = ontology(seed)
    elif facts != "countries":
        made = read_facts(facts, retain=str(retain), held_out=held_out, general=general, seed=seed)
    if model == TAUGHT and half:
        raise ValueError("the taught model is small, and its weights are float32; leave out --half")
    if model == TAUGHT:
        whole = taught.load(made or countries(seed), recipe=taught.Recipe(seed=seed))
        return Subject(TAUGHT, whole.model, whole.facts, True, whole.never)
    lm = load_language_model(model, dtype=torch.bfloat16 if half else torch.float32)
    return Subject(model, lm, made or countries(seed, keep=partial(known, lm)), False)


def recipe_for(model: str, method: str, fields: Mapping[str, Any] | None = None, *, kind: str | None = None) -> Recipe:
    """The recipe of a remover for a model: of `kind`, or the one that is usual for it; `published`: without one.

    Raises:
        ValueError: as `recipes.recipe`.
    """
    if not kind and KINDS.get(model) in RECIPES:
        kind = KINDS[model]
    return recipe(None if kind == "published" else kind or None, method, fields)


def located(model: Model, facts: Facts, removal: Recipe, *, seed: int = 0) -> Neurons | WeightMask | None:
    """What a recipe's localiser chooses: for pruning neurons, for training the weights that carry them on.

    Raises:
        ValueError: an unknown localiser, a field that it does not have, or none that says how many neurons.
    """
    if removal.where is None:
        return None
    choice = localiser_of(removal.where, **removal.where_fields)(model, facts, seed=seed)
    if isinstance(choice, WeightMask):
        return choice
    if removal.fraction is None:
        raise ValueError(
            f"localiser {removal.where!r} ranks neurons, and nothing says how many of them; give --set fraction=0.01"
        )
    neurons = choice.top(fraction=removal.fraction)
    return neurons if isinstance(removal.remover, Pruner) else WeightMask.of(model, neurons)


def carry_out(
    subject: Subject,
    removal: Recipe,
    *,
    out: Path | None = None,
    lora: int | None = None,
    seed: int = 0,
    says: Mapping[str, Any] | None = None,
) -> Removed:
    """Remove, ask before and after, and write the model with a manifest (`says` goes into it) where `out` says.

    With `lora`, adapters of that rank train in the place of weights, and are added to them at the end.

    Raises:
        FileExistsError: the folder is there and holds something.
        ValueError: adapters for pruning or beside a localiser; as the localiser, the remover and `export`.
    """
    if out is not None:
        check_free(out)
    model, facts = subject.model, subject.facts
    chosen = isinstance(removal.remover, Pruner) or removal.where is not None
    if lora is not None and (chosen or removal.remover.entries(model) is not None):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"lora = {lora}: adapters train in the place of all weights, and {removal.remover.name} works on some; "
            "leave it out, or take a method that trains all weights, without a localiser"
        )
    digest = weights_sha256(model)
    memory = memory_of(subject, removal, lora=lora)
    before = know(model, facts)
    notes = [*facts.notes, *_unknown(facts, before)]
    if getattr(removal.remover, "fresh", False):
        notes.append(f"{removal.remover.name} teaches a fresh model; on one that is taught already it is a control")
    begin = time.perf_counter()
    where = located(model, facts, removal, seed=seed)
    with contextlib.nullcontext() if lora is None else adapted(model, rank=lora, seed=seed):
        *_, end = removal(model, facts, where, seed=seed)
    seconds = time.perf_counter() - begin
    after = know(model, facts)
    place = f"adapters of rank {lora}" if lora else "all weights" if where is None else repr(where)
    if where is None and not isinstance(removal.remover, Pruner) and removal.remover.entries(model) is not None:
        place = f"what is usual for {removal.remover.name}"
    done = Removed(before, after, end, place, seconds, out, tuple(notes), memory)
    if out is not None:
        _write(subject, removal, done, {"seed": seed, "model_sha256": digest, **(says or {})})
    return done


def memory_of(subject: Subject, removal: Recipe, *, lora: int | None = None) -> dict[str, int]:
    """What a removal takes at most, in megabytes by what takes it (`needs.removal_mb`), as far as is known before
    anything is located: then as if all weights moved."""
    model, config = subject.model, subject.model.bridge.cfg
    weights = {id(p): p for p in model.plain().values()}.values()
    n = sum(p.numel() for p in weights)
    shape = needs.Shape(int(config.n_layers), int(config.d_model), int(config.n_heads), n, model.vocabulary)
    half, moving, how = next(iter(weights)).element_size() == 2, 0, removal.how
    if how is None:
        return needs.removal_mb(shape, moving=0, half=half, batch=0, longest=0)
    if lora is not None:
        with adapted(model, rank=lora):
            moving = sum(p.numel() for p in adapter_weights(model).values())
    elif isinstance(removal.remover, Pruner) or (usual := removal.remover.entries(model)) is None:
        moving = n
    else:
        moving = sum(mask.numel() for mask in usual.values())
    text = encode_facts(subject.facts, *FORGET, *RETAIN, tokenizer=model.tokenizer, context=model.context)
    return needs.removal_mb(
        shape, moving=moving, half=half, adapters=lora is not None, batch=-(-how.batch_size // how.accumulate),
        longest=int(text.lengths.max()), checkpointing=how.checkpointing,
    )  # fmt: skip


def weights_sha256(model: Model) -> str:
    """Hash of a model's weights, names, shapes and types, wherever they are."""
    digest = hashlib.sha256()
    for name, value in sorted(model.weights().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unknown(facts: Facts, before: Mapping[str, Answered]) -> list[str]:
    """A note where there is nothing to remove."""
    accuracy = before[TRAINED_WORDING].accuracy
    if is_text(asked(facts)[TRAINED_WORDING]) or accuracy.interval(OVERALL)[0] > accuracy.chance(OVERALL):
        return []
    return [f"the model knew what is to be forgotten no better than chance ({accuracy.shown(OVERALL):.2f})"]


def summary(answered: Answered) -> dict[str, Any]:
    """Accuracy and loss with interval and chance, as plain values."""
    return {
        score.metric: {
            "value": score.shown(OVERALL), "interval": list(score.interval(OVERALL)), "chance": score.chance(OVERALL),
            "unit": score.unit, "passages": score.support()[OVERALL], "keys": len(score.keys),
        }
        for score in answered
    }  # fmt: skip


def fields_of(removal: Recipe) -> dict[str, Any]:
    """All that a recipe says, as plain values."""
    step = removal.step
    return {
        "remover": removal.remover.name, **removal.remover.model_dump(mode="json"),
        **({"wrapper": getattr(step, "name", "")} | step.model_dump(mode="json") if isinstance(step, Method) else {}),
        **(removal.how.model_dump(mode="json") if removal.how else {}),
        "where": removal.where, "fraction": removal.fraction,
        **({"where_fields": dict(removal.where_fields)} if removal.where_fields else {}),
    }  # fmt: skip


def _write(subject: Subject, removal: Recipe, done: Removed, says: Mapping[str, Any]) -> None:
    """The folder, under its name once all of it is there."""
    assert done.folder is not None
    out = done.folder
    with whole(out) as work:
        if subject.native:
            work.mkdir(parents=True)
            weights = {name: value.cpu() for name, value in subject.model.weights().items()}
            write_tensors(work / WEIGHTS, weights, {"model": subject.name})
            subject.model.tokenizer.save_pretrained(work)
        else:
            export(subject.model, work)
        rows = {
            when: {row: summary(answered) for row, answered in rows.items()}
            for when, rows in (("before", done.before), ("after", done.after))
        }
        facts = {"name": subject.facts.name, "sha256": subject.facts.sha256(), "source": subject.facts.source}
        manifest = {
            "model": subject.name, "facts": facts, "settings": fields_of(removal), "where": done.where, **says, **rows,
            "steps": done.pause.step, "tokens": done.pause.tokens_seen, "loss": done.pause.loss,
            "memory_mb": done.memory, "seconds": done.seconds, "notes": done.notes, "versions": versions(),
            "outputs": sources.hash_files(work),
        }  # fmt: skip
        write_whole(work / MANIFEST, as_json(manifest))


def fields_from(sets: Sequence[str]) -> dict[str, Any]:
    """Of `KEY=VALUE` strings the fields of a recipe.

    Raises:
        ValueError: a string that is not so.
    """
    fields: dict[str, Any] = {}
    for text in sets:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ValueError(f"--set {text!r}: write key=value, such as lr=1e-4, or where.site=resid")
        fields[key] = value_of(value)
    return fields
