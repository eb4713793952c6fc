"""Facts and small untaught models to attack."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.taught import Recipe
from relearn_lens.text.facts import Facts, people

SMALL = Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=24)


@pytest.fixture(scope="session")
def facts() -> Facts:
    return people(0, n=12, forget=4, never=2, animals=3, n_answers=8)


@pytest.fixture
def make(facts: Facts) -> Callable[[], LanguageModel]:
    """The same model with random weights, anew at every call, whose bridge has been through its first pass."""

    def made() -> LanguageModel:
        model: Any = taught.untaught(facts, recipe=SMALL)
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
        return model

    return made


@pytest.fixture
def model(make: Callable[[], LanguageModel]) -> LanguageModel:
    return make()
