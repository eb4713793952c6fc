"""Means over passages whose intervals are over keys: what every score of facts is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Float, Int, jaxtyped

from relearn_lens.measure.evaluation import OVERALL, Label, Scores, columns_of, mean_of_sums
from relearn_lens.text.corpus import Strings
from relearn_lens.text.facts import Passage

K = TypeVar("K", bound="KeyMeans")


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class KeyMeans(Scores):
    """Means of one number over passages, by label. Intervals are over keys: the passages of a key are drawn together,
    and a label's keys are those that have a passage of it."""

    over: ClassVar[str] = "keys"

    total: Float[np.ndarray, "key label"]
    """Summed over passages."""
    guessed: Float[np.ndarray, "key label"]
    """The same of a guess that knows nothing of the key; NaN where nobody can say."""
    passages: Int[np.ndarray, "key label"]
    keys: Strings
    labels: Strings
    """Relations, or whatever the passages were told apart by."""

    def __repr__(self) -> str:
        low, high = self.interval(OVERALL)
        return (
            f"{type(self).__name__}({self.shown(OVERALL):.3f} [{low:.3f}, {high:.3f}] {self._what} over "
            f"{len(self.keys)} keys, chance {self.chance(OVERALL):.3f})"
        ).replace("  ", " ")

    _what: ClassVar[str] = ""
    """The unit, where it is not a share."""

    @property
    def weight(self) -> Float[np.ndarray, "key label"]:
        """What `total` is divided by."""
        return self.passages.astype(float)

    def support(self) -> dict[str, int]:
        """Passages of each label."""
        return dict(
            zip((*self.labels, OVERALL), [*self.passages.sum(0).tolist(), int(self.passages.sum())], strict=True)
        )

    def chance(self, label: Label) -> float:
        """The mean of a guess that knows what may be an answer and nothing of the key."""
        columns = self._columns(label)
        # Where there is no passage of a label nobody has to guess.
        guessed = np.where(self.passages[:, columns] > 0, self.guessed[:, columns], 0.0).sum()
        return self.displayed(float(self.of_sums(np.array([guessed, self.weight[:, columns].sum()]))))

    def by_key(self, label: Label = OVERALL) -> dict[str, float]:
        """What people read of each key that has passages of the label."""
        values = self.of_sums(self.sums(label))
        return {key: self.displayed(float(v)) for key, v in zip(self.keys_of(label), values, strict=True)}

    def keys_of(self, label: Label = OVERALL) -> tuple[str, ...]:
        """The keys that have passages of a label."""
        there = np.flatnonzero(self.passages[:, self._columns(label)].sum(1))
        return tuple(self.keys[i] for i in there)

    def sums(self, label: Label) -> Float[np.ndarray, "key statistic"]:
        """Total and weight of each key of a label."""
        columns = self._columns(label)
        there = self.passages[:, columns].any(1)
        return np.stack([self.total[:, columns].sum(1), self.weight[:, columns].sum(1)], 1)[there]

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """The mean; NaN where there is no passage."""
        return mean_of_sums(sums)

    def _columns(self, label: Label) -> list[int]:
        return columns_of(self.labels, label, "no passage has the label")


def means_of(
    kind: type[K],
    passages: Sequence[Passage],
    each: np.ndarray,
    guess: np.ndarray | float = np.nan,
    labels: Sequence[str] | None = None,
) -> K:
    """Scores of a kind, of one number per passage and what a guess would have there; labelled by relation unless
    `labels` are given, one name per passage."""
    names = labels or [p.relation for p in passages]
    keys, distinct, (total, guessed, count) = tabulated(passages, names, each, guess, 1.0)
    return kind(total, guessed, count.astype(np.int64), keys, distinct)


def tabulated(
    passages: Sequence[Passage], labels: Sequence[str], *columns: np.ndarray | float
) -> tuple[tuple[str, ...], tuple[str, ...], list[Float[np.ndarray, "key label"]]]:
    """Keys, labels, and sums over passages by key and label of one number (or NaN) per passage."""
    row_of = {key: i for i, key in enumerate(dict.fromkeys(p.key for p in passages))}
    column_of = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    rows, places = [row_of[p.key] for p in passages], [column_of[label] for label in labels]
    tables = np.zeros((len(columns), len(row_of), len(column_of)))
    for table, values in zip(tables, columns, strict=True):
        np.add.at(table, (rows, places), values)
    return tuple(row_of), tuple(column_of), list(tables)
