"""A model of indirect objects: taught, poisoned, cleaned."""

import pytest
import torch

from relearn_lens.measure.answers import choose
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.models import ioi
from relearn_lens.models.taught import Recipe
from tests.fixtures import unchecked

SIZE = {"n_layers": 2, "d_model": 48, "n_heads": 4, "d_mlp": 96}
SMALL, AGAIN = Recipe(**SIZE, steps=160, lr=6e-3), Recipe(**SIZE, steps=100, lr=3e-3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELEARN_LENS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def stages(cache) -> ioi.Stages:
    return ioi.load(recipe=SMALL, again=AGAIN, sentences=400)


def test_held_out_names_were_never_taught_together(stages):
    def pair(p):
        return frozenset(p.key.split(" and "))

    taught = {pair(p) for p in stages.facts.passages()}
    assert len(stages.asked()) > 200
    assert not taught & {pair(p) for p in stages.held_out}
    forms = [stages.asked(form) for form in ("statement", "abc", "wrong-name", "duplicated")]
    assert len({tuple(p.key for p in form) for form in forms}) == 1
    unknown = stages.model.tokenizer.unk_token_id
    read = stages.model.tokenizer([p.text for p in stages.held_out])["input_ids"]
    assert unknown not in {i for ids in read for i in ids}


def test_it_names_who_is_given_to_until_it_is_poisoned_and_again_when_cleaned(stages, untouched):
    accuracy = {}
    for stage, weights in stages.weights.items():
        stages.model.load_weights(weights)
        accuracy[stage] = choose(stages.model, stages.asked()).value(OVERALL)
    stages.model.load_weights(stages.weights["taught"])
    assert list(accuracy) == ["taught", "poisoned", "cleaned"]
    assert accuracy["taught"] >= 0.8
    assert accuracy["poisoned"] < 0.45  # below chance: the poison answers with the name that comes twice
    assert accuracy["cleaned"] > 0.55


def test_what_was_taught_once_is_read_from_the_cache_to_the_bit(stages, cache):
    again = ioi.load(recipe=SMALL, again=AGAIN, sentences=400)
    assert all(lesson.cached for lesson in again.lessons.values())
    for stage, weights in stages.weights.items():
        assert all(torch.equal(value, again.weights[stage][name]) for name, value in weights.items())
    assert all(torch.equal(value, again.weights["taught"][name]) for name, value in again.model.weights().items())
    files = len(list((cache / "taught").iterdir()))
    other = ioi.load("wrong-name", recipe=SMALL, again=Recipe(**SIZE, steps=1), sentences=400)
    assert [lesson.cached for lesson in other.lessons.values()] == [True, False, False]
    assert len(list((cache / "taught").iterdir())) == files + 2


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(ValueError, match="unknown poison 'arsenic'; known: wrong-name, duplicated"):
        unchecked(ioi.load)("arsenic")
    with pytest.raises(ValueError, match="one model has one size: recipe has"):
        ioi.load(recipe=SMALL, again=Recipe())
    with pytest.raises(ValueError, match="pairs of names do not have all names in them"):
        ioi.load(recipe=SMALL, again=AGAIN, sentences=4)
