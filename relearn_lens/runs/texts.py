"""The sentences of an experiment: which texts its settings name, what carries the concept there, which are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from relearn_lens.models import toy
from relearn_lens.runs.settings import Experiment
from relearn_lens.text import readers
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import OUTSIDE, Corpus, Splits


def read_texts(experiment: Experiment, concept: Concept) -> Splits:
    """Train, validation and probe text, whole. A probe corpus of its own has the concept under the concept's label.

    Raises:
        ValueError, OSError: a text that cannot be had or read.
    """
    splits = _named(experiment, experiment.corpus)
    if experiment.probe_corpus is None:
        return splits
    there = experiment.probe_concept or concept.labels
    probe = together(_named(experiment, experiment.probe_corpus))
    return splits._replace(probe=relabelled(probe, concept, (there,) if isinstance(there, str) else there))


def _named(experiment: Experiment, spec: str) -> Splits:
    data = experiment.data
    if spec == "toy":
        return toy.corpus().split(seed=data.split_seed, parts=data.parts)
    return readers.read_splits_named(
        spec,
        seed=data.split_seed,
        parts=data.parts,
        scheme=data.scheme,
        column=data.column,
        word_column=data.word_column,
        encoding=data.encoding,
    )


def together(parts: Sequence[Corpus]) -> Corpus:
    """Parts of one text, with the same labels, as one corpus again."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys(word for part in parts for word in part.vocab))}
    number = [np.array([vocab[word] for word in part.vocab], dtype=np.int32) for part in parts]
    sizes = np.concatenate([np.diff(part.start) for part in parts])
    n_groups = np.cumsum([0, *(part.group.max() + 1 for part in parts)])
    knows = any(part.spaced is not None for part in parts)
    return replace(
        parts[0],
        vocab=tuple(vocab),
        word=np.concatenate([new[part.word] for new, part in zip(number, parts, strict=True)]),
        label=np.concatenate([part.label for part in parts]),
        begins=np.concatenate([part.begins for part in parts]),
        spaced=np.concatenate([part.after_blank for part in parts]) if knows else None,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        start=np.concatenate([[0], np.cumsum(sizes)]),
        group=np.concatenate([part.group + first for part, first in zip(parts, n_groups, strict=False)]),
        name=parts[0].name.rpartition("/")[0] or parts[0].name,
    )


def relabelled(corpus: Corpus, concept: Concept, labels: Sequence[str]) -> Corpus:
    """The corpus with those labels, which carry the concept in it, under the concept's own (its first) label.

    Raises:
        ValueError: the corpus lacks a label, or calls something else by the concept's label.
    """
    known = [name for name in corpus.label_names if name != OUTSIDE]
    if missing := [label for label in labels if label not in known]:
        raise ValueError(
            f"probe_corpus {corpus.name!r} has no label {missing[0]!r}; its labels are {', '.join(known)}: set "
            "probe_concept to the one that carries the concept there"
        )
    if taken := [label for label in concept.labels if label in known and label not in labels]:
        raise ValueError(
            f"probe_corpus {corpus.name!r} has a label {taken[0]!r} that is not among probe_concept "
            f"({', '.join(labels)}), and {taken[0]!r} is the concept in the text that is trained on; name it in "
            "probe_concept, or rename it"
        )
    names = [name for name in corpus.label_names if name not in labels] + list(concept.labels)
    own = {name: concept.labels[0] for name in labels if name not in concept.labels}
    new = [names.index(own.get(name, name)) for name in corpus.label_names]
    return replace(corpus, label=np.array(new, dtype=corpus.label.dtype)[corpus.label], label_names=tuple(names))


def draw(corpus: Corpus, sentences: int, concept: Concept, experiment: Experiment) -> Corpus:
    """At most so many sentences of a part, with the share that holds the concept that the settings ask for."""
    data = experiment.data
    rng = np.random.default_rng(data.split_seed)
    holds = concept.held_by(corpus)
    labelled = np.add.reduceat(corpus.label > 0, corpus.start[:-1]) > 0
    usable = np.flatnonzero(labelled | ~np.array(data.labelled_only))
    if data.concept_share is None:
        chosen = rng.permutation(usable)[:sentences]
    else:
        with_it = rng.permutation(usable[holds[usable]])[: round(sentences * data.concept_share)]
        without = rng.permutation(usable[~holds[usable]])[: sentences - len(with_it)]
        chosen = np.concatenate([with_it, without])
    return corpus.take(np.sort(chosen))


def natural(corpus: Corpus, sentences: int, concept: Concept, experiment: Experiment) -> Corpus | None:
    """At most so many sentences of a part as they come: what a score of drawn ones is to be read beside.

    None where `draw` takes them so too, or where none of them holds the concept.
    """
    data = experiment.data
    if not data.labelled_only and data.concept_share is None:
        return None
    rng = np.random.default_rng(data.split_seed)
    chosen = corpus.take(np.sort(rng.permutation(corpus.n_sentences)[:sentences]))
    try:
        concept.classes(chosen)
    except ValueError:
        return None
    return chosen
