"""Facts and small untaught models to attack."""

from collections.abc import Callable

import pytest

from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.taught import Recipe
from relearn_lens.text.facts import Facts, people
from tests.made import Pool

SMALL = Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture(scope="session")
def facts() -> Facts:
    return people(0, n=12, forget=4, never=2, animals=3, n_answers=8)


@pytest.fixture(scope="session")
def models(facts: Facts) -> Pool[LanguageModel]:
    return Pool(lambda: taught.untaught(facts, recipe=SMALL))


@pytest.fixture
def make(models: Pool[LanguageModel]) -> Callable[[], LanguageModel]:
    """The same model with random weights, another at every call, whose bridge has been through its first pass."""
    return models.lend()


@pytest.fixture
def model(make: Callable[[], LanguageModel]) -> LanguageModel:
    return make()
