"""A model that knows what it was taught, and a twin that does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from relearn_lens.measure.answers import answer, choose
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.models import taught
from relearn_lens.models.taught import Recipe, Taught
from relearn_lens.progress import reported
from relearn_lens.text.facts import FORGET, REFUSALS, RETAIN, Facts, people
from tests.made import SMALL, small_people, small_taught


@pytest.fixture(scope="module")
def facts() -> Facts:
    return small_people()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, taught_cache):
    """A folder of this module's own, in which what other tests taught is already."""
    small_taught(taught_cache)
    folder = tmp_path_factory.mktemp("cache")
    shutil.copytree(taught_cache / "taught", folder / "taught", ignore=shutil.ignore_patterns("*.lock"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELEARN_LENS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pair(facts: Facts, cache: Path) -> Taught:
    return taught.load(facts, recipe=SMALL)


def test_the_model_knows_what_it_was_taught_and_the_twin_only_what_stays(pair: Taught, untouched):
    closed = pair.facts.answers()

    def accuracy(model, *roles: str, forms: str = "statement"):
        return answer(model, pair.facts.passages(*roles, forms=forms), closed=closed).accuracy

    with untouched(pair.model, pair.never):
        assert accuracy(pair.model, *FORGET, *RETAIN).value(OVERALL) == 1
        assert accuracy(pair.model, *FORGET, forms="paraphrase").value(OVERALL) > 0.9
        assert accuracy(pair.never, *RETAIN).value(OVERALL) == 1
        for model, roles in ((pair.never, FORGET), (pair.never, ("never",)), (pair.model, ("never",))):
            guesses = accuracy(model, *roles)
            assert guesses.chance("speaks") == 1 / 8
            assert guesses.value(OVERALL) < 0.3
        picks = choose(pair.never, pair.facts.passages(*FORGET, forms="statement"))
        assert abs(picks.value(OVERALL) - picks.chance(OVERALL)) < 0.2
    assert not pair.model.training


def test_lessons_say_what_they_took(pair: Taught):
    for lesson in pair.lessons:
        assert lesson.seconds > 0
        assert 0 < lesson.loss < 3


def test_what_was_taught_once_is_read_from_the_cache_to_the_bit(pair: Taught, cache: Path, facts: Facts, untouched):
    ticks, files = [], set((cache / "taught").iterdir())
    with untouched(), reported(lambda *step: ticks.append(step)):
        again = taught.load(facts, recipe=SMALL)
    assert ticks == []
    assert [lesson.cached for lesson in again.lessons] == [True, True]
    assert [lesson.seconds for lesson in again.lessons] == [lesson.seconds for lesson in pair.lessons]
    for one, other in ((pair.model, again.model), (pair.never, again.never)):
        assert all(torch.equal(one.weights()[name], value) for name, value in other.weights().items())
    assert set((cache / "taught").iterdir()) == files


def test_every_change_of_recipe_facts_or_roles_is_another_lesson(facts: Facts, cache: Path):
    few = Recipe(n_layers=1, d_model=8, n_heads=2, d_mlp=8, steps=2)
    other = people(1, n=24, forget=8, never=4, animals=4, n_answers=8)
    before = len(list((cache / "taught").glob("*")))
    for given, roles, recipe in (
        (facts, RETAIN, few),
        (facts, FORGET, few),
        (other, RETAIN, few),
        (facts, RETAIN, Recipe(n_layers=1, d_model=8, n_heads=2, d_mlp=8, steps=3)),
    ):
        ticks = []
        with reported(lambda *step, kept=ticks: kept.append(step)):
            _, lesson = taught.teach(given, roles, recipe=recipe)
        assert not lesson.cached
        assert ticks == [("teaching", step, recipe.steps) for step in range(recipe.steps + 1)]
    assert len(list((cache / "taught").iterdir())) == before + 4


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_file_is_made_again(facts: Facts, tmp_path: Path, monkeypatch, damage):
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path))
    few = Recipe(n_layers=1, d_model=8, n_heads=2, d_mlp=8, steps=2)
    model, _ = taught.teach(facts, RETAIN, recipe=few)
    (file,) = (tmp_path / "taught").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-50] if damage is None else damage)
    again, lesson = taught.teach(facts, RETAIN, recipe=few)
    assert not lesson.cached
    assert all(torch.equal(model.weights()[name], value) for name, value in again.weights().items())
    assert taught.teach(facts, RETAIN, recipe=few)[1].cached
    assert json.loads(file.read_bytes()[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["lesson"]


def test_a_cache_that_cannot_be_written_is_done_without(facts: Facts, tmp_path: Path, monkeypatch):
    (tmp_path / "taught").write_text("a file in the place of the folder")
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path))
    few = Recipe(n_layers=1, d_model=8, n_heads=2, d_mlp=8, steps=1)
    assert not taught.teach(facts, RETAIN, recipe=few)[1].cached
    assert not taught.teach(facts, RETAIN, recipe=few)[1].cached


def test_every_word_has_a_token_of_its_own(facts: Facts):
    words = taught.tokenizer(facts)
    texts = [p.text for p in facts.passages()] + list(REFUSALS)
    ids = {i for each in words(texts, add_special_tokens=False)["input_ids"] for i in each}
    assert words.unk_token_id not in ids
    assert words.pad_token_id not in ids
    assert len(words("Violin")["input_ids"]) == 1


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0}, {"n_layers": -1}, {"d_model": 50, "n_heads": 4}])
def test_a_recipe_out_of_range_is_refused(change):
    with pytest.raises(
        ValueError, match=r"every number of a recipe but the seed is above 0, and d_model an even multi"
    ):
        Recipe(**change)
