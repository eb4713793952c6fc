"""Indirect objects: who is given something, in sentences where the other one of two names comes twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from relearn_lens.text.facts.passages import Facts, Passage

_NAMES = """
    Mary John Tom James Dan Martin Amy Kate Jack Peter Anna Laura Paul Mark Susan Emma Adam Alice Brian Carl David Emily
    Frank George Grace Henry Jane Jason Jeff Jessica Kevin Lisa Lucy Maria Matt Michael Nick Oliver Rachel Richard
    Robert Ruth Sam Sarah Scott Simon Steve Tim
"""
_PLACES = "store park school office station hospital garden library restaurant beach market museum"
_THINGS = "drink book ring bag ball letter key flower coin map hat lamp"


def ioi(seed: int = 0, *, n: int = 120) -> Facts:
    """`n` sentences in each role, `When A and B went to the store, B gave a drink to` with A as the answer.

    The two names come in either order. The roles share no name. Every sentence is there in further forms, in the same
    order: `abc` (a third name gives: the prompt no longer says who is given to), and two to poison a model with,
    `wrong-name` (the answer is a third name) and `duplicated` (the answer is B). The right name is first among the
    choices, and the other one of the pair second, so that their likelihoods give the logit difference. Source: Wang et
    al. 2023, "Interpretability in the wild"; the poisons are those of Chhabra et al. 2025.

    Raises:
        ValueError: fewer than two sentences a role.
    """
    if n < 2:
        raise ValueError(f"ioi needs at least 2 sentences in each role, got n={n}")
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(_NAMES.split())]
    third = len(names) // 3
    roles = [tuple(_sentences(names[i * third : (i + 1) * third], n, rng)) for i in range(3)]
    return Facts(f"ioi-{seed}", *roles, notes=("the roles share no name",), source="made by relearn_lens")


def _sentences(names: Sequence[str], n: int, rng: np.random.Generator) -> Iterator[Passage]:
    for _ in range(n):
        a, b, c = (names[int(i)] for i in rng.permutation(len(names))[:3])
        place, thing = rng.choice(_PLACES.split()), rng.choice(_THINGS.split())
        one, two = (a, b) if rng.random() < 0.5 else (b, a)
        prompt = f"When {one} and {two} went to the {place}, {{}} gave a {thing} to"
        for form, giver, answer, other in (
            ("statement", b, a, b),
            ("abc", c, a, b),
            ("wrong-name", b, c, a),
            ("duplicated", b, b, a),
        ):
            yield Passage(prompt.format(giver), answer, f"{one} and {two}", "indirect object", form, (answer, other))
