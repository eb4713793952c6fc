"""Texts that are too small for what is asked of them: said before any work, and what runs with a note."""

from typing import Any

import pytest

from relearn_lens.measure.tracking import BASE, Trajectory, measure
from relearn_lens.measure.vectors import input_embeddings
from relearn_lens.models import toy
from relearn_lens.runs.cuts import size
from relearn_lens.runs.events import Base
from relearn_lens.runs.experiment import first_back
from relearn_lens.runs.preparation import load, prepare
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.settings import Experiment


def small(**changes: Any) -> Experiment:
    """The toy; `data__train_sentences=9` changes `data.train_sentences`."""
    sizes = {"data.train_sentences": 60, "data.validation_sentences": 60, "data.probe_sentences": 40}
    return settings_of("toy", sizes | {key.replace("__", "."): value for key, value in changes.items()})


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def test_a_size_is_not_found_on_few_spans(monkeypatch):
    monkeypatch.setattr("relearn_lens.runs.preparation.load", fail)
    with pytest.raises(
        ValueError,
        match=r"prune\.fraction = 'auto': .* F1 of 'place' on the validation sentences \(6, with \d+ spans of it, "
        r"30 are needed\).*data\.validation_sentences.*--set prune\.fraction=0\.05",
    ):
        prepare(small(prune__fraction="auto", data__validation_sentences=6))


def test_few_spans_are_enough_where_the_size_is_given():
    assert not any("fraction" in note for note in prepare(small(data__validation_sentences=6)).notes)


def test_a_size_that_no_other_label_bounds_is_found_with_a_note():
    alone = prepare(small(prune__fraction="auto", data__concept_share=1.0, data__validation_sentences=30))
    assert any("no other label has 30 spans in the 30 validation sentences" in note for note in alone.notes)
    both = prepare(small(prune__fraction="auto", data__validation_sentences=150))
    assert not any("no other label has 30 spans" in note and "fraction" in note for note in both.notes)


def test_more_groups_of_blocks_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"grafts\.bands = 9: the model has \d blocks.*--set grafts\.bands=none"):
        prepare(small(grafts__bands=9))
    prepare(small(grafts__bands=9, grafts__skip=True))


def test_activations_are_not_compared_on_fewer_than_three_words():
    with pytest.raises(ValueError, match=r"a correlation needs at least 3 words, and '.*' has [12] \(concept words"):
        prepare(small(data__probe_sentences=2, measure__what=["probeless", "similarity"]))
    prepare(small(data__probe_sentences=2, measure__what=["probeless"]))


def test_what_the_base_does_not_know_has_no_size_and_is_never_back():
    experiment = small(prune__fraction="auto")
    ready = prepare(experiment)
    weights = load(experiment, toy.LABELS, knows=False).weights()
    ready.model.load_weights(weights)
    snapshot = measure(ready.model, ready.probe, ready.concept, site=ready.site, score="probeless")
    base = Base(0, weights, snapshot, input_embeddings(ready.model))
    with pytest.raises(ValueError, match=r"seed 0 does not know 'place'.* is 0\.00 \[0\.00, 0\.00\]; train it longer"):
        size(ready, base, whole=False)
    path = Trajectory({BASE: snapshot, "pruned": snapshot, "1": snapshot}, None, concept=ready.concept)
    assert first_back(path) is None
