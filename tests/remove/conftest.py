"""Small language models for removers to work on."""

import pytest

from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel
from tests.made import Pool

MODELS = Pool(toy.language_model)


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """`toy.language_model()` gives each test models that others had before it; of another seed, new ones."""
    new, lend = toy.language_model, MODELS.lend()

    def model(*, seed: int = 0) -> LanguageModel:
        return new(seed=seed) if seed else lend()

    monkeypatch.setattr(toy, "language_model", model)
