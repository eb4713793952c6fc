"""Capital, region and demonym of countries: facts that a pretrained model knows already."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from relearn_lens import sources
from relearn_lens.text.facts.passages import Facts, Passage, halves

_RELATIONS = {
    "capital": ("The capital of {x} is", "The government of {x} sits in the city of"),
    "region": ("The country {x} is located on the continent of", "A trip to {x} is a trip to"),
    "demonym": ("Q: What do you call a person from {x}?\nA: A", "Somebody whose home is {x} is"),
}
"""Of each relation the wording that is trained on, and a second one."""
_DISTRACTORS = 7


def countries(
    seed: int = 0,
    *,
    keep: Callable[[Sequence[Passage]], Iterable[Passage]] | None = None,
    forget: float | int = 0.25,
    general: Iterable[Passage] = (),
) -> Facts:
    """Facts about the 120 most populous countries, of which a share `forget` is to be forgotten.

    Each is a statement, and a second wording with the right answer among up to 8. `keep` gets all passages and gives
    those to go on with, before the roles are dealt: `functools.partial(known, model)` keeps what a model knows. The
    forget halves share no region, where regions are left. `general` is other knowledge or plain text that is to stay.

    Raises:
        ValueError: a share not between 0 and 1, or too few countries were kept.
        OSError, ConnectionError: as `sources.fetch`, where the facts are not yet in the cache.
    """
    if not 0 < forget < 1:
        raise ValueError(f"the share of countries to forget must be between 0 and 1, got {forget}")
    passages = _passages(np.random.default_rng(seed))
    if keep is not None:
        passages = list(keep(passages))
    keys = list(dict.fromkeys(p.key for p in passages))
    n = round(forget * len(keys))
    if n < 2 or n == len(keys):
        raise ValueError(
            f"{len(keys)} countries were kept, of which {n} would be forgotten; it takes at least 2, and one that "
            "stays: keep more, or forget another share"
        )
    chosen = {keys[int(i)] for i in np.random.default_rng([seed, 1]).permutation(len(keys))[:n]}
    attacked, held_out = halves([p for p in passages if p.key in chosen], seed=seed)
    source = sources.SOURCES["countries"]
    return Facts(
        f"countries-{seed}", attacked, held_out, tuple(p for p in passages if p.key not in chosen), tuple(general),
        source=source.requirement, licence=source.licence,
    )  # fmt: skip


def _passages(rng: np.random.Generator) -> list[Passage]:
    folder = sources.fetch("countries")
    members = sources.SOURCES["countries"].members
    table = [json.loads((folder / member.name).read_text(encoding="utf-8")) for member in members]
    answers = {relation: sorted({row[relation] for row in table}) for relation in _RELATIONS}
    made = []
    for row in table:
        for relation, (own, second) in _RELATIONS.items():
            key, answer = row["name"], row[relation]
            others = [other for other in answers[relation] if other != answer]
            choices = [answer, *(others[int(i)] for i in rng.permutation(len(others))[:_DISTRACTORS])]
            made.append(Passage(own.format(x=key), answer, key, relation))
            made.append(Passage(second.format(x=key), answer, key, relation, "paraphrase", tuple(choices)))
    return made
