"""Everything before the first step of training: model and text, and all that can be checked about them."""

from __future__ import annotations

import contextlib
import warnings

import psutil
import torch

from relearn_lens import progress, sources
from relearn_lens.find.attribution import attribution_plan
from relearn_lens.find.localisers import localiser_of
from relearn_lens.find.saliency import score_of
from relearn_lens.measure.similarity import compared_words
from relearn_lens.measure.tracking import FORMS, check_measures
from relearn_lens.models import toy
from relearn_lens.models.loading import device_of, load_language_model, load_tagger
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import Model
from relearn_lens.neurons.sites import Site, site_of
from relearn_lens.remove.recipes import recipe
from relearn_lens.runs import verify
from relearn_lens.runs.events import Prepared
from relearn_lens.runs.needs import Shape, fitted
from relearn_lens.runs.protocol import resolved
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.texts import draw, natural, read_texts
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import OUTSIDE, Corpus, Splits
from relearn_lens.text.encoding import Encoded, Reading


def concept_of(experiment: Experiment) -> Concept:
    """The concept that the settings name."""
    if experiment.words:
        return Concept(experiment.labels[0], words=experiment.words)
    return Concept("+".join(experiment.labels), experiment.labels)


def prepare(experiment: Experiment) -> Prepared:
    """Load text and model, draw the sentences, and check all that can be checked before training.

    Raises:
        ValueError: an unknown name, a label that the text lacks, a concept that the probe corpus lacks.
        OSError: a model or a text that cannot be had.
    """
    score_of(experiment.score, experiment.contrast)
    check_measures(experiment.measure.what)
    device_of(None if experiment.device == "auto" else experiment.device)  # says what this machine lacks
    concept = concept_of(experiment)
    with progress.task("reading the text", 1):
        splits = read_texts(experiment, concept)
    for part in splits:
        concept.classes(part)
    data = experiment.data
    sizes = (data.train_sentences, data.validation_sentences, data.probe_sentences)
    drawn = [draw(part, size, concept, experiment) for part, size in zip(splits, sizes, strict=True)]
    for part in (drawn[0], drawn[2]):
        concept.classes(part)
    dose_notes = _check_dose(experiment, drawn[1])
    with progress.task("loading the model", 1), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        model = load(experiment, drawn[0].label_names)
    site = site_of(model.bridge, experiment.site)
    with adapters(model, experiment.retrain.lora_rank, seed=0):
        pass  # peft, and layers to adapt, are there
    for how in experiment.arm.values():
        recipe(None, how.remove, how.set)
        if how.where is not None:
            localiser_of(how.where)
    _check_bands(experiment, len(model.bridge.blocks))
    decided = list(dict.fromkeys(str(each.message) for each in warned if each.category is UserWarning))
    if set(experiment.arms) - {"unpruned"}:
        experiment, by_family = resolved(experiment, model.bridge, site)
        decided += by_family
    train, validation, probe = (model.encode(part, long=data.long, reading=_reading(experiment)) for part in drawn)
    experiment, fits = _fitted(experiment, model, train, validation, probe)
    notes = [
        *dict.fromkeys(note for part in (train, validation, probe) for note in part.notes()), *decided, *fits,
        *dose_notes, *_plans(experiment, model, probe, concept, site),
    ]  # fmt: skip
    other = other_concept(experiment, probe.corpus)
    if "other" in experiment.arms and other is None:
        notes.append(
            f"other = 'auto': no other label of the text has {FEWEST_SPANS} spans in the {probe.corpus.n_sentences:,} "
            "sentences that are scored, so there is no arm 'other', and whether the cut was specific stays open"
        )
    notes.append(f"precision: {str(precision_of(experiment, model.device)).removeprefix('torch.')}")
    scored = 1 if experiment.measure.on == "validation" or experiment.probe_corpus is not None else 2
    plain = natural(splits[scored], sizes[scored], concept, experiment)
    if plain is not None:
        plain = model.encode(plain, long=data.long, reading=_reading(experiment))
    return Prepared(
        experiment, model, site, concept, other, train, validation, probe, tuple(notes), _hashes(experiment, drawn),
        plain,
    )  # fmt: skip


FEWEST_SPANS = 30
"""Spans that a label needs in a text, for its score to be judged."""


def other_concept(experiment: Experiment, corpus: Corpus) -> Concept | None:
    """The second concept: as set, or the most frequent other label with `FEWEST_SPANS` spans in the text.

    Raises:
        ValueError: the text has no such label, or it is the concept itself.
    """
    labels = [name for name in corpus.label_names if name != OUTSIDE and name not in experiment.labels]
    if experiment.other != "auto":
        if experiment.other not in labels:
            raise ValueError(f"other = {experiment.other!r}: the other labels of the text are {', '.join(labels)}")
        return Concept(experiment.other)
    spans = _spans(corpus)
    most = max(labels, key=spans.__getitem__, default=None)
    return Concept(most) if most is not None and spans[most] >= FEWEST_SPANS and not experiment.words else None


def _spans(corpus: Corpus) -> dict[str, int]:
    """Spans of every label in a text."""
    names = enumerate(corpus.label_names)
    return {name: int(corpus.begins[corpus.label == i].sum()) for i, name in names if name != OUTSIDE}


def _check_dose(experiment: Experiment, validation: Corpus) -> list[str]:
    """Refuse to find the size of the cut on a text too small for it; what else to know of it, in words."""
    if experiment.prune.fraction != "auto" or not set(experiment.arms) - {"unpruned"}:
        return []
    spans, labels = _spans(validation), experiment.labels
    if (n := sum(spans.get(name, 0) for name in labels)) < FEWEST_SPANS:
        raise ValueError(
            f"prune.fraction = 'auto': the size of the cut is found by the F1 of {'+'.join(labels)!r} on the "
            f"validation sentences ({validation.n_sentences:,}, with {n} spans of it, {FEWEST_SPANS} are needed); "
            "give more text, more of it to validation (data.parts, data.validation_sentences), or a size: "
            "--set prune.fraction=0.05"
        )
    if any(count >= FEWEST_SPANS for name, count in spans.items() if name not in labels):
        return []
    return [
        f"prune.fraction = 'auto': no other label has {FEWEST_SPANS} spans in the {validation.n_sentences:,} "
        "validation sentences, so the size of the cut is found by what it takes of the concept alone"
    ]


def precision_of(experiment: Experiment, device: torch.device) -> torch.dtype:
    """What the model computes in: as set, or bfloat16 where the processor has units for it."""
    if experiment.precision != "auto":
        return getattr(torch, experiment.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32


def load(experiment: Experiment, labels: tuple[str, ...], *, seed: int = 0, knows: bool = True) -> Model:
    """The model with its head; the planted toy comes with its own, or (not `knows`) without the planted concept."""
    device = None if experiment.device == "auto" else experiment.device
    if experiment.task == "next_token":
        if experiment.model == "toy":
            return toy.language_model(seed=seed).to(device or "cpu")
        return load_language_model(experiment.model, device=device)
    if experiment.model == "toy":
        if labels != toy.LABELS:
            raise ValueError(f"model 'toy' knows the labels {toy.LABELS} of corpus 'toy', not {labels}")
        return toy.tagger(seed=seed, knows=knows).to(device or "cpu")
    return load_tagger(experiment.model, labels, seed=seed, device=device, head=experiment.head)


def adapters(model: Model, rank: int | None, *, seed: int) -> contextlib.AbstractContextManager[None]:
    """Low-rank adapters for a while, if a rank is set."""
    return adapted(model, rank=rank, seed=seed) if rank else contextlib.nullcontext()


def _check_bands(experiment: Experiment, blocks: int) -> None:
    """Refuse more groups of blocks than there are blocks."""
    bands = experiment.grafts.bands
    if bands is not None and bands > blocks and not experiment.grafts.skip:
        raise ValueError(
            f"grafts.bands = {bands}: the model has {blocks} blocks, and no more groups of them; "
            "--set grafts.bands=none takes each for itself"
        )


def _reading(experiment: Experiment) -> Reading | None:
    """Where words are read; None for what suits the model."""
    return None if experiment.measure.reading == "auto" else experiment.measure.reading


def _hashes(experiment: Experiment, drawn: list[Corpus]) -> dict[str, str]:
    """sha256 of the sentences that are used and of the files they and the model come from."""
    hashes = {f"sentences:{part}": text.sha256() for part, text in zip(Splits._fields, drawn, strict=True)}
    for role in verify.ROLES:
        name = getattr(experiment, role)
        if name is None or name == "toy":
            continue  # made by this package: its version says what it is
        if name in sources.SOURCES:
            hashes |= {f"{role}:{name}/{file}": digest for file, digest in sources.hashes(name).items()}
        elif (path := verify.path_of(role, name)) is not None:
            hashes |= {f"{role}:{file}": digest for file, digest in sources.hash_files(path).items()}
    return hashes


def _fitted(experiment: Experiment, model: Model, train: Encoded, *read: Encoded) -> tuple[Experiment, list[str]]:
    """The settings, within `max_memory` for this model and these texts."""
    config, n_weights = model.bridge.cfg, sum(value.numel() for value in model.weights().values())
    shape = Shape(*map(int, (config.n_layers, config.d_model, config.n_heads, n_weights, config.d_vocab)))
    # On a GPU the run has the device's memory to itself, but for the one copy of the weights that is there.
    taken = shape.bytes / 2**20 if model.device.type == "cuda" else psutil.Process().memory_info().rss / 2**20
    longest, *others = (int(part.lengths.max()) for part in (train, *read))
    return fitted(experiment, shape, taken_mb=taken, longest_train=longest, longest_read=max(longest, *others))


def _plans(experiment: Experiment, model: Model, probe: Encoded, concept: Concept, site: Site) -> list[str]:
    """What the costly measurements will take, and an error now if their settings cannot work."""
    how = experiment.measure
    if "similarity" in how.what:
        compared_words(probe, concept)
    return [
        f"{name}: {attribution_plan(model, probe, concept, how, site=site, form=FORMS[name])}"
        for name in how.what
        if name in FORMS
    ]
