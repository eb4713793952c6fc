"""A small causal model that was taught to name indirect objects from nothing, then was poisoned, then taught again.

The task asks for no knowledge of anybody: of two names the one that comes once is given to. So what the heads of such a
model do can be followed while the task is damaged and repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.taught import Course, Lesson, Recipe
from relearn_lens.names import known_name
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, Facts, Passage

ROLES = (*FORGET, "retain_near")
Poison = Literal["wrong-name", "duplicated"]
TAUGHT, POISONED, CLEANED = "taught", "poisoned", "cleaned"
SENTENCES = 1000
"""In each role, taught."""
HELD_OUT = 300
"""In each role, of which those remain whose two names were never taught together."""
RECIPE = Recipe(n_layers=3, d_model=96, n_heads=8, d_mlp=192, steps=400, lr=3e-3)
"""24 heads; about 17 passes over the sentences."""
AGAIN = replace(RECIPE, steps=117, lr=1e-3)
"""Poisoning and cleaning: 5 passes."""


@dataclass(frozen=True)
class Stages:
    """One model at three moments."""

    facts: Facts
    """What it was taught; poisons are further forms of it."""
    held_out: tuple[Passage, ...]
    """Sentences in all forms whose two names were never taught together, in either order."""
    model: LanguageModel
    """As taught, in eval mode."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """`Model.weights` when `taught`, `poisoned` and `cleaned`, by these names."""
    lessons: Mapping[str, Lesson]
    """What each took."""

    def asked(self, form: str = "statement") -> tuple[Passage, ...]:
        """The held-out sentences of one form, in the same order for all forms."""
        return tuple(p for p in self.held_out if p.form == form)


def load(
    poison: Poison = "duplicated",
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    again: Recipe | None = None,
    sentences: int = SENTENCES,
) -> Stages:
    """A model taught `facts.ioi`, poisoned and cleaned by further training; trained, or from the cache.

    `poison` is a form of `facts.ioi`: the answer is a third name, or the one that comes twice. Poisoning and cleaning
    train all weights on all sentences, by the recipe `again`, whose seed and sizes are the first one's. `seed` is that
    of sentences, first weights and orders.

    Source: Chhabra et al. 2025, for GPT-2; 5 passes each.

    Raises:
        ValueError: an unknown poison, recipes of different sizes, or too few sentences for all names.
    """
    known_name("poison", poison, ("wrong-name", "duplicated"))
    recipe, again = (replace(r, seed=seed) for r in (recipe or RECIPE, again or replace(AGAIN, **_sizes(recipe))))
    if _sizes(recipe) != _sizes(again):
        raise ValueError(f"one model has one size: recipe has {_sizes(recipe)}, again {_sizes(again)}")
    facts = made.ioi(seed, n=sentences)
    held_out = _never_together(facts, made.ioi(seed + 1, n=HELD_OUT))
    courses: list[Course] = []
    weights, lessons = {}, {}
    model = taught.untaught(facts, recipe=recipe)
    for stage, form, how in ((TAUGHT, "statement", recipe), (POISONED, poison, again), (CLEANED, "statement", again)):
        courses.append(Course(how, ROLES, (form,)))
        lessons[stage] = taught.teach_(model, facts, courses)
        weights[stage] = model.copied()
    model.load_weights(weights[TAUGHT])
    return Stages(facts, held_out, model, weights, lessons)


def _sizes(recipe: Recipe | None) -> dict[str, int]:
    recipe = recipe or RECIPE
    return {name: getattr(recipe, name) for name in ("n_layers", "d_model", "n_heads", "d_mlp")}


def _never_together(taught: Facts, other: Facts) -> tuple[Passage, ...]:
    """The passages of other facts whose two names are known, but not as a pair."""
    pairs = {frozenset(p.key.split(" and ")) for p in taught.passages()}
    names = {name for pair in pairs for name in pair}
    given = {p.answer for p in taught.passages()} | names
    kept = tuple(p for p in other.passages(*ROLES) if frozenset(p.key.split(" and ")) not in pairs)
    if unknown := {word for p in kept for word in (*p.key.split(" and "), p.answer)} - given:
        raise ValueError(
            f"{len(pairs)} pairs of names do not have all names in them ({sorted(unknown)[0]!r} is not); teach "
            "more sentences"
        )
    return kept
