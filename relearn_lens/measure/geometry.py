"""How the weights moved: how far and in how many directions, and whether relearning goes back the way removing came.

Two models that behave alike can differ here, and the other way round: these describe, and say nothing of what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Float, jaxtyped
from torch import Tensor

from relearn_lens.measure.asking import Asked, Metric, Reference
from relearn_lens.measure.evaluation import OVERALL, Label, Scores, columns_of
from relearn_lens.models.model import LanguageModel
from relearn_lens.neurons.weights import differs, parts
from relearn_lens.text.corpus import Strings
from relearn_lens.text.facts import Facts

Weights = Mapping[str, Tensor]


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class OverWeights(Scores):
    """A number of a change of weights, by part of the model, from sums over its weights; so are its intervals: they say
    how evenly the weights of a part share it, and are none where a part has one."""

    over: ClassVar[str] = "weights"

    table: Float[np.ndarray, "weight statistic"]
    part_of: Strings
    """Of each weight."""
    labels: Strings
    """The parts, from the input to the output."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.unit}: {', '.join(f'{p} {self.shown(p):.3g}' for p in self.labels)})"

    def support(self) -> dict[str, int]:
        """Weights of each part."""
        return {part: self.part_of.count(part) for part in self.labels} | {OVERALL: len(self.part_of)}

    def sums(self, label: Label) -> Float[np.ndarray, "weight statistic"]:
        """What the number is made from, of each weight of a part."""
        columns = columns_of(self.labels, label, "no part")
        return self.table[[self.labels.index(part) in columns for part in self.part_of]]


class ChangeNorm(OverWeights):
    """Length of a change, as a share of the length of the weights."""

    metric: ClassVar[str] = "moved"
    unit: ClassVar[str] = "norm of the change / norm of the base's weights"
    quantity: ClassVar[str] = "relative change"

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Square root of the share of squares."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(sums[..., 0] / sums[..., 1]))


class ChangeRank(OverWeights):
    """Directions that a change of matrices is spread over; of several matrices their mean by squared norm."""

    metric: ClassVar[str] = "rank"
    unit: ClassVar[str] = "effective rank of the change, directions"
    quantity: ClassVar[str] = "effective rank"

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """The mean; 0 where nothing moved."""
        return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(np.shape(sums[..., 0])), where=sums[..., 1] > 0)

    def chance(self, label: Label) -> float:
        """The effective rank of noise of the same shapes, weighted alike."""
        sums = self.sums(label).sum(0)
        return float(sums[2] / sums[1]) if sums[1] > 0 else 0.0


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class ReturnCosine(OverWeights):
    """Cosine of what relearning changed with what removing changed, turned round. Chance is 0."""

    metric: ClassVar[str] = "returned"
    unit: ClassVar[str] = "cosine of the relearning update with minus the removal update, -1 to 1"
    quantity: ClassVar[str] = "cosine"

    entries: dict[str, int]
    """Entries of each part and overall that both updates moved."""

    def of_sums(self, sums: Float[np.ndarray, "*draw statistic"]) -> Float[np.ndarray, "*draw"]:
        """Dot product by norms; 0 where nothing moved."""
        norm = np.sqrt(sums[..., 1] * sums[..., 2])
        return np.divide(sums[..., 0], norm, out=np.zeros(np.shape(norm)), where=norm > 0)

    def random(self, label: str) -> float:
        """Standard deviation of the cosine of random updates of equal norm: 1 / sqrt(entries)."""
        return 1 / float(np.sqrt(max(1, self.entries[label])))


class Moved(Metric):
    """How far the weights are from the base's, by part of the model."""

    name: ClassVar[str] = "moved"
    unit: ClassVar[str] = ChangeNorm.unit
    formula: ClassVar[str] = "|W - W_base| / |W_base|, Frobenius"
    source: ClassVar[str] = "usual"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> ChangeNorm:
        (base,) = (reference or Reference()).need("base", by=self.name)
        rows, part_of, labels = _rows(
            model, base.weights(), lambda now, was: [float((now - was).square().sum()), float(was.square().sum())]
        )
        return ChangeNorm(rows, part_of, labels)


class Rank(Metric):
    """Over how many directions the change of each matrix since the base is spread: exp of the entropy of its singular
    values, as shares of their sum. 1 is a change of rank one.

    Source: Roy & Vetterli 2007.
    """

    name: ClassVar[str] = "rank"
    unit: ClassVar[str] = ChangeRank.unit
    formula: ClassVar[str] = "exp(-sum p log p), p = s / sum s, s the singular values of W - W_base"
    source: ClassVar[str] = "Roy & Vetterli 2007"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> ChangeRank:
        (base,) = (reference or Reference()).need("base", by=self.name)
        noise = torch.Generator().manual_seed(0)
        of_noise = cache(lambda shape: effective_rank(torch.randn(shape, generator=noise)))

        def row(now: Tensor, was: Tensor) -> list[float] | None:
            if now.ndim != 2 or 1 in now.shape:
                return None
            change = now - was
            weight = float(change.square().sum())
            return [weight * effective_rank(change), weight, weight * of_noise(now.shape)]

        return ChangeRank(*_rows(model, base.weights(), row))


class Returned(Metric):
    """Whether relearning undoes what removing did: its update beside the removal's, turned round.

    The removed weights are those of the first stage that was measured with this reference. Before relearning it is 0.
    """

    name: ClassVar[str] = "returned"
    unit: ClassVar[str] = ReturnCosine.unit
    formula: ClassVar[str] = "cos(W - W_removed, W_base - W_removed)"
    source: ClassVar[str] = "ours"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def __call__(
        self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None
    ) -> ReturnCosine:
        reference = reference or Reference()
        (base,) = reference.need("base", by=self.name)
        removed = reference.removed
        if removed is None:
            raise ValueError(
                "returned compares with the weights right after removing, which were not given; `track` takes them at "
                "its first stage, or pass reference=Reference(base=..., removed={name: value.clone() for ...})"
            )
        if (why := differs(removed, model.weights())) is not None:
            raise ValueError(f"the removed weights are of another model: {why}")

        updates = {name: value.float() - removed[name].float() for name, value in model.weights().items()}
        back = {name: value.float() - removed[name].float() for name, value in base.weights().items()}
        rows, part_of, labels = _rows(
            model, back, lambda now, was: [float(x.sum()) for x in (now * was, now.square(), was.square())], of=updates
        )
        names = parts(model)
        entries = {
            part: sum(int(((updates[name] != 0) & (back[name] != 0)).sum()) for name in names[part]) for part in labels
        }
        entries[OVERALL] = sum(entries.values())
        return ReturnCosine(rows, part_of, labels, entries)


def effective_rank(change: Float[Tensor, "row column"]) -> float:
    """Exp of the entropy of a matrix's singular values, as shares of their sum; 0 of a matrix of zeros."""
    values = torch.linalg.svdvals(change.float())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def _rows(
    model: LanguageModel, was: Weights, row: Callable[[Tensor, Tensor], list[float] | None], of: Weights | None = None
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """A row of numbers for every weight, the part that it is in, and all parts in their order."""
    now = model.weights() if of is None else of
    if (why := differs(now, was)) is not None:
        raise ValueError(f"the base's weights are of another model: {why}")
    table, part_of = [], []
    with torch.no_grad():
        for part, names in parts(model).items():
            for name in names:
                if (numbers := row(now[name].float(), was[name].to(now[name].device).float())) is not None:
                    table.append(numbers)
                    part_of.append(part)
    return np.array(table), tuple(part_of), tuple(dict.fromkeys(part_of))
