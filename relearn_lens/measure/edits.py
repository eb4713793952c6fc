"""What an edit of facts did: whether it took, in other wordings too, and what else changed with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from relearn_lens.measure.answers import choose, nats_of_choices
from relearn_lens.measure.asking import read_answers
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.keymeans import KeyMeans, means_of
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import explained
from relearn_lens.text.facts import RETAIN, TRAINED, Facts, Passage

RELIABILITY, GENERALISATION, LOCALITY = "reliability", "generalisation", "locality"
INSTANCES, CONSISTENCY = "instance change", "concept consistency"


class EditScore(KeyMeans):
    """One of the measures of an edit."""

    metric: ClassVar[str] = "edit"
    unit: ClassVar[str] = "share of passages, 0 to 1"
    quantity: ClassVar[str] = "share"


@dataclass(frozen=True, eq=False, repr=False)
class Edited:
    """The measures of an edit by name, each over keys; those that the facts have no passages for are not there."""

    scores: dict[str, KeyMeans]

    def __getitem__(self, name: str) -> KeyMeans:
        if name not in self.scores:
            raise ValueError(f"{name!r} was not measured; measured: {', '.join(self.scores)}")
        return self.scores[name]

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each measure: its value with interval, chance, and over how many keys."""
        rows = [
            {
                "measure": name, "value": scores.shown(OVERALL),
                **dict(zip(("low", "high"), scores.interval(OVERALL), strict=True)),
                "chance": scores.chance(OVERALL), "unit": scores.unit, "keys": len(scores.keys),
            }
            for name, scores in self.scores.items()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return "Edited(" + ", ".join(f"{name} {s.shown(OVERALL):.3f}" for name, s in self.scores.items()) + ")"


@explained
def edited(
    model: LanguageModel,
    base: LanguageModel,
    facts: Facts,
    edits: Sequence[Passage],
    *,
    implied: Sequence[Passage] = (),
) -> Edited:
    """How an edit went. `edits` are passages of the facts with their new answers; `base` is the model before.

    - *reliability*: share of edits that were taught (statements) and are answered; *generalisation*: the same of
      their paraphrases. Chance is what the base answers so.
    - *locality*: share of answers about other keys (`retain_near`, `retain_general`) that are right or wrong as before.
    - *instance change*: share of yes/no questions about the edited keys whose likelier answer flips. An edit of what a
      concept is said to be should leave the examples of it alone, or turn them all: it is reported, not judged.
    - *concept consistency*: share of `implied` passages, what follows from the edit (the class that a new definition
      names), whose answer is the likeliest of their choices.

    Source: Wang et al. 2024 (ConceptEdit), whose consistency is judged by a language model; ours by `implied`.

    Raises:
        ValueError: no edit, the model is its own base, or an implied passage without choices.
    """
    if not edits or model is base:
        raise ValueError(
            "an edit is measured by passages with their new answers, against the model before as one of its own; got "
            f"{len(edits)} edits{' and the model itself as base' if model is base else ''}"
        )
    scores: dict[str, KeyMeans] = {}
    for name, forms in ((RELIABILITY, TRAINED), (GENERALISATION, ("paraphrase",))):
        if passages := [p for p in edits if p.form in forms]:
            now, before = read_answers(model, passages), read_answers(base, passages)
            scores[name] = means_of(EditScore, passages, now.right, before.right)
    keys = {p.key for p in edits}
    if others := [p for p in facts.passages(*RETAIN, forms=TRAINED) if p.key not in keys]:
        now, before = read_answers(model, others), read_answers(base, others)
        scores[LOCALITY] = means_of(EditScore, others, now.right == before.right)
    if instances := [p for p in facts.passages(forms="yes-no") if p.key in keys]:
        scores[INSTANCES] = means_of(EditScore, instances, _preferred(model, instances) != _preferred(base, instances))
    if implied:
        chosen = choose(model, implied, labels=[p.relation for p in implied])
        scores[CONSISTENCY] = EditScore(chosen.total, chosen.guessed, chosen.passages, chosen.keys, chosen.labels)
    return Edited(scores)


def _preferred(model: LanguageModel, passages: Sequence[Passage]) -> np.ndarray:
    """Which of its choices each passage's model prefers."""
    nats = nats_of_choices(model, passages)
    return np.array([p.choices[int(each.argmin())] for p, each in zip(passages, nats, strict=True)])
