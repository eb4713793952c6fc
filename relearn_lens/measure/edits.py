"""What an edit of facts did: whether it took, in other wordings too, and what else changed with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from relearn_lens.measure.answers import choose
from relearn_lens.measure.asking import read_answers
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.keymeans import KeyMeans, tabulated
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import told
from relearn_lens.text.facts import RETAIN, TRAINED, Facts, Passage

if TYPE_CHECKING:
    import pandas as pd

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
        import pandas as pd

        rows = []
        for name, scores in self.scores.items():
            low, high = scores.interval(OVERALL)
            rows.append(
                {
                    "measure": name, "value": scores.shown(OVERALL), "low": low, "high": high,
                    "chance": scores.chance(OVERALL), "unit": scores.unit, "keys": len(scores.keys),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return "Edited(" + ", ".join(f"{name} {s.shown(OVERALL):.3f}" for name, s in self.scores.items()) + ")"


@told
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
            scores[name] = _shares(passages, now.right, before.right)
    keys = {p.key for p in edits}
    if others := [p for p in facts.passages(*RETAIN, forms=TRAINED) if p.key not in keys]:
        now, before = read_answers(model, others), read_answers(base, others)
        scores[LOCALITY] = _shares(others, now.right == before.right, None)
    if instances := [p for p in facts.passages(forms="yes-no") if p.key in keys]:
        scores[INSTANCES] = _shares(instances, _preferred(model, instances) != _preferred(base, instances), None)
    if implied:
        chosen = choose(model, implied, labels=[p.relation for p in implied])
        scores[CONSISTENCY] = EditScore(chosen.total, chosen.guessed, chosen.passages, chosen.keys, chosen.labels)
    return Edited(scores)


def definitions(facts: Facts, *, seed: int = 0) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    """Edits of every concept to be forgotten of an `ontology`: the definition of another one of its half, and the class
    that the new definition names (what is implied).

    Raises:
        ValueError: facts without definitions and classes.
    """
    rng = np.random.default_rng(seed)
    edits: list[Passage] = []
    implied: list[Passage] = []
    for role in ("forget_attacked", "forget_held_out"):
        passages = facts.passages(role)
        definition = {p.key: p.answer for p in passages if p.relation == "definition"}
        classes = {p.key: p.answer for p in passages if p.relation == "class"}
        keys = [key for key in definition if key in classes]
        if len({classes[key] for key in keys}) < 2:
            raise ValueError(
                f"facts {facts.name!r} have no two definitions of different classes in {role}; use an ontology"
            )
        for key in keys:
            others = [k for k in keys if classes[k] != classes[key]]
            other = others[int(rng.integers(len(others)))]
            for p in passages:
                if p.key != key:
                    continue
                if p.relation == "definition":
                    edits.append(replace(p, answer=definition[other]))
                elif p.relation == "class":
                    choices = p.choices
                    if classes[other] not in choices:  # in the place of one that is not the old answer
                        wrong = next(c for c in choices if c != p.answer)
                        choices = tuple(classes[other] if c == wrong else c for c in choices)
                    implied.append(replace(p, answer=classes[other], choices=choices))
    return tuple(edits), tuple(implied)


def _shares(passages: Sequence[Passage], yes: np.ndarray, guess: np.ndarray | None) -> EditScore:
    by_chance = np.full(len(passages), np.nan) if guess is None else guess.astype(float)
    keys, labels, (total, guessed, count) = tabulated(
        passages, [p.relation for p in passages], yes.astype(float), by_chance, np.ones(len(passages))
    )
    return EditScore(total, guessed, count.astype(np.int64), keys, labels)


def _preferred(model: LanguageModel, passages: Sequence[Passage]) -> np.ndarray:
    """Which of its choices each passage's model prefers."""
    read = read_answers(model, [replace(p, answer=c) for p in passages for c in p.choices])
    nats = np.split(read.summed(read.nats), np.cumsum([len(p.choices) for p in passages])[:-1])
    return np.array([p.choices[int(each.argmin())] for p, each in zip(passages, nats, strict=True)])
