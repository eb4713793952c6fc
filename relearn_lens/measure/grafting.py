"""Where a concept came back, by intervention: one part of the model moved between the cut and the retrained weights.

*Enough*: that part alone, grafted into the cut model, brings the concept back. *Needed*: it alone, put back as it was
after the cut, loses it again. And which neurons: those found in the retrained model, cut again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, TypeVar, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from relearn_lens.measure.course import FactsTrajectory
from relearn_lens.measure.evaluation import OVERALL, Label, Scores
from relearn_lens.measure.prefixes import States, recorded, resumed, unchanged_before
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.methods import MEMORY, megabytes
from relearn_lens.models.model import Model, wearing
from relearn_lens.names import existing, explained
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import Parts, WeightMask, differs
from relearn_lens.neurons.weights import parts as parts_of
from relearn_lens.text import markup

CUT = "cut"
"""The part that the entries of the cut are: what they bring back was regrown in place."""
Weights = Mapping[str, Tensor]
Outcome = float | Scores
Evaluate = Callable[[Model], Scores | Mapping[str, Outcome]]
"""What a model does, as one or several named outcomes, the primary one first."""
Outcomes = Mapping[str, Outcome]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """A share of what came back with retraining: 0 as after the cut, 1 as retrained."""

    value: float
    """NaN where it is refused."""
    low: float = math.nan
    """Ends of its 95 % bootstrap interval over sentences; NaN for outcomes that are bare numbers."""
    high: float = math.nan
    refused: str | None = None
    """Why there is no share."""


@dataclass(frozen=True, eq=False, repr=False)
class Grafts:
    """Outcomes of a model with one part moved, beside those of the whole models."""

    parts: tuple[str, ...]
    """From the input to the output; last, if a cut was given, `"cut"`: its entries, which are then in no other part."""
    cut: Outcomes
    """After the cut."""
    retrained: Outcomes
    alone: Mapping[str, Outcomes]
    """By part: the cut model with this part as retrained."""
    reverted: Mapping[str, Outcomes]
    """By part: the retrained model with this part as after the cut."""
    controls: Mapping[str, Mapping[str, Outcomes]] = field(default_factory=dict)
    """By control and part: the cut model with another arm's change of this part added; of no part that is the cut."""
    whole: Mapping[str, Outcomes] = field(default_factory=dict)
    """By control: the same with its change of all parts."""
    up: Mapping[str, Outcomes] = field(default_factory=dict)
    """By part: the cut model with all parts up to this one as retrained, the cut's entries where they lie."""
    down: Mapping[str, Outcomes] = field(default_factory=dict)
    """By part: the same with this part and all after it: all that `up` of the part before leaves out."""
    base: Outcomes | None = None
    """Before the cut."""
    label: Label = OVERALL
    """Of which label the outcomes that are scores are read."""
    noise: float = 0.0
    """Returns of the primary outcome that are not larger have no shares."""

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Names of the outcomes, the primary one first."""
        return tuple(self.cut)

    def value(self, of: Outcomes, outcome: str | None = None) -> float:
        """One outcome as a number, by default the primary one."""
        given = of[self._known(outcome)]
        return given.value(self.label) if isinstance(given, Scores) else float(given)

    def enough(self, part: str, outcome: str | None = None) -> Share:
        """(graft - cut) / (retrained - cut): what the part alone brings back."""
        return self._share(self.cut, self._of(self.alone, part), outcome)

    def needed(self, part: str, outcome: str | None = None) -> Share:
        """(retrained - revert) / (retrained - cut): what is lost without the part."""
        return self._share(self._of(self.reverted, part), self.retrained, outcome)

    def control(self, name: str, part: str, outcome: str | None = None) -> Share:
        """`enough` of another arm's change of the part, which should bring nothing back."""
        return self._share(self.cut, self._of(self._of(self.controls, name, "control"), part), outcome)

    def most_of_controls(self, outcome: str | None = None) -> float:
        """The largest `enough` of any control and part, which a part named must exceed; NaN without controls."""
        shares = [self.control(name, part, outcome).value for name, by in self.controls.items() for part in by]
        return max((share for share in shares if not math.isnan(share)), default=math.nan)

    def _known(self, outcome: str | None) -> str:
        return existing("outcome", outcome or self.outcomes[0], self.outcomes)

    def _of(self, by_name: Mapping[str, _T], name: str, what: str = "part") -> _T:
        return by_name[existing(what, name, by_name)]

    def _share(self, low: Outcomes, high: Outcomes, outcome: str | None) -> Share:
        """What lies between two outcomes, as a share of what came back."""
        outcome = self._known(outcome)
        cut, retrained = (self.value(of, outcome) for of in (self.cut, self.retrained))
        given = (of[outcome] for of in (self.cut, self.retrained, low, high))
        drawn = [each.resampled(self.label) if isinstance(each, Scores) else None for each in given]
        gap = retrained - cut
        noise = self.noise if outcome == self.outcomes[0] else 0.0
        between = f"{outcome} is {cut:.3g} after the cut and {retrained:.3g} after retraining"
        if not gap > noise:
            return Share(math.nan, refused=f"{between}: nothing came back beyond noise ({noise:.3g})")
        value = (self.value(high, outcome) - self.value(low, outcome)) / gap
        if any(draws is None for draws in drawn):
            return Share(value)
        at_cut, at_end, below, above = (np.asarray(draws) for draws in drawn)
        gaps = at_end - at_cut
        if not np.nanquantile(gaps, 0.025) > noise:
            return Share(math.nan, refused=f"{between}: the interval of the difference reaches noise ({noise:.3g})")
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = ((above - below) / gaps)[gaps > 0]
        lower, upper = np.nanquantile(shares, [0.025, 0.975])
        return Share(value, float(lower), float(upper))

    def to_dataframe(self) -> pd.DataFrame:
        """A row for every part and outcome: both interventions, their shares with intervals, and every control."""
        rows = []
        for outcome in self.outcomes:
            for part in self.parts:
                enough, needed = self.enough(part, outcome), self.needed(part, outcome)
                rows.append(
                    {
                        "part": part,
                        "outcome": outcome,
                        "alone": self.value(self.alone[part], outcome),
                        "reverted": self.value(self.reverted[part], outcome),
                        "enough": enough.value,
                        "enough_low": enough.low,
                        "enough_high": enough.high,
                        "needed": needed.value,
                        "needed_low": needed.low,
                        "needed_high": needed.high,
                        **{
                            f"control_{name}": self.control(name, part, outcome).value if part in by else math.nan
                            for name, by in self.controls.items()
                        },
                        "refused": enough.refused,
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        ends = f"{self.outcomes[0]} {self.value(self.cut):.3g} cut, {self.value(self.retrained):.3g} retrained"
        shares = {part: (self.enough(part), self.needed(part).value) for part in self.parts}
        if refused := next((enough.refused for enough, _ in shares.values() if enough.refused), None):
            return f"Grafts({ends}; no shares: {refused})"
        most = sorted(shares, key=lambda part: -max(shares[part][0].value, shares[part][1]))[:3]
        shown = ", ".join(f"{part} enough {shares[part][0].value:.2f} needed {shares[part][1]:.2f}" for part in most)
        control = f"; controls at most {self.most_of_controls():.2f}" if self.controls else ""
        return f"Grafts({ends}; {shown}{control})"

    def _repr_html_(self) -> str:
        """Both shares of every part, with their intervals, beside the largest of its controls."""

        def cell(share: Share) -> str:
            if not math.isfinite(share.value):
                return "refused" if share.refused else ""
            ends = f" [{100 * share.low:.0f}, {100 * share.high:.0f}]" if math.isfinite(share.low) else ""
            return f"{100 * share.value:.0f} %{ends}"

        header, rows = ["part", "alone brings back", "without it is lost"], []
        for part in self.parts:
            shares = [self.control(name, part).value for name, by in self.controls.items() if part in by]
            most = max((share for share in shares if math.isfinite(share)), default=math.nan)
            rows.append([part, cell(self.enough(part)), cell(self.needed(part)), cell(Share(most))])
        refused = next((share.refused for part in self.parts if (share := self.enough(part)).refused), "")
        between = f"{self.outcomes[0]}: {self.value(self.cut):.3g} cut, {self.value(self.retrained):.3g} retrained"
        width = 3 + bool(self.controls)
        rows = [row[:width] for row in rows]
        return markup.box(between, markup.table([*header, "most of its controls"][:width], rows), markup.line(refused))


@overload
def grafts(
    model: Trajectory | FactsTrajectory,
    *,
    parts: Parts | None = None,
    controls: Mapping[str, Trajectory | FactsTrajectory] | None = None,
    cumulative: bool = False,
    noise: float = 0.0,
) -> Grafts: ...


@overload
def grafts(
    model: Model, cut_weights: Weights, retrained_weights: Weights, evaluate: Evaluate, **keywords: Any
) -> Grafts: ...


@explained
def grafts(model: Model | Trajectory | FactsTrajectory, *args: Any, **keywords: Any) -> Grafts:
    """Which part of a model brought back what was taken out: `grafts_between` two sets of its weights, or those of a
    path that was tracked with `keep_weights=True`, from its start to its end.

    Of labelled text the outcome is the margin (of a language model the log-probability) and the score of the concept,
    of facts the loss on what is held out and the other scores of answers. The neurons that were pruned are a part of
    their own where the path says which (cut as `prune_` does by default; else give `cut`). `controls` are other paths
    of the same model, such as the twin's. The other keywords are those of `grafts_between`.

    Raises:
        ValueError: a path without weights; or as `grafts_between`.
    """
    if isinstance(model, Model):
        return grafts_between(model, *args, **keywords)
    path: Any = model
    controls = keywords.pop("controls", None) or {}
    if missing := [name for name, each in {"the path": path, **controls}.items() if each.ends is None]:
        raise ValueError(
            f"{missing[0]} kept no weights to graft; track it with keep_weights=True, or give grafts(model, "
            "cut_weights, retrained_weights, evaluate)"
        )
    mask = WeightMask.of(path.ends.model, path.removed) if isinstance(path.removed, Neurons) else None
    cut = keywords.pop("cut", mask)
    return grafts_between(
        path.ends.model, path.ends.start, path.ends.end, path.ends.evaluate, cut=cut,
        controls={name: (each.ends.start, each.ends.end) for name, each in controls.items()},
        label=path.ends.label, **keywords,
    )  # fmt: skip


@explained
def grafts_between(
    model: Model,
    cut_weights: Weights,
    retrained_weights: Weights,
    evaluate: Evaluate,
    *,
    parts: Parts | None = None,
    cut: WeightMask | None = None,
    controls: Mapping[str, tuple[Weights, Weights]] | None = None,
    base_weights: Weights | None = None,
    cumulative: bool = False,
    label: Label = OVERALL,
    noise: float = 0.0,
    max_memory: float = MEMORY,
) -> Grafts:
    """Which part of a model brought back what was cut, by moving one part at a time between two sets of its weights.

    Every part is grafted alone from the retrained weights into the cut ones, and alone put back in the retrained ones.
    `parts` are by default those that `neurons.weights.parts` names; the entries of `cut` are a part of their own. A
    control is another arm's start and end: their difference, not its end (which would undo the cut), is added to the
    cut model, part by part, and the cut's entries stay as cut. `cumulative` adds the curves from the input up and from
    the output down. `evaluate` reads the model and gives its outcomes, the primary one first: two evaluations a part,
    one more for each control, two more if `cumulative`. Scores are read for `label`, with an interval over sentences;
    of bare numbers, returns up to `noise` have no shares. Blocks before the part that is moved are computed once for
    all parts, in up to `max_memory` MB, as long as `evaluate` reads the same batches each time.

    The model's own weights are back afterwards, to the bit, after an error too.

    Source: ours; a graft is activation patching (Vig et al. 2020; Meng et al. 2022) of weights in place of activations.

    Raises:
        ValueError: weights or a mask of another model, unknown weights in a part, a weight in two parts, a part named
            `"cut"` beside a cut, or low-rank adapters; before any evaluation.
    """
    controls = controls or {}
    masks, whole = _masks(model, parts_of(model) if parts is None else parts, cut)
    moving = _Moving(model, evaluate, megabytes(max_memory))
    started, ended = moving.steady("cut_weights", cut_weights), moving.steady("retrained_weights", retrained_weights)
    before = None if base_weights is None else moving.steady("base_weights", base_weights)
    ends = {
        name: tuple(
            moving.steady(f"the {end} of control {name!r}", each)
            for end, each in zip(("start", "end"), pair, strict=True)
        )
        for name, pair in controls.items()
    }
    kept = {part: mask for part, mask in masks.items() if part != CUT or cut is None}
    by_control, of_whole, up, down = {}, {}, {}, {}
    try:
        base = None
        if before is not None:
            moving.put(before)
            base = moving.outcomes()
        at_cut, states = moving.whole(started)
        alone = {part: moving.moved(mask, started, ended.__getitem__, states) for part, mask in masks.items()}
        for name, (start, end) in ends.items():
            added = partial(_added, started, start, end)
            by_control[name] = {part: moving.moved(mask, started, added, states) for part, mask in kept.items()}
            of_whole[name] = moving.moved(reduce(operator.or_, kept.values()), started, added, states)
        for i, part in enumerate(names := list(whole) if cumulative else []):
            for curve, within in ((up, names[: i + 1]), (down, names[i:])):
                mask = reduce(operator.or_, (whole[name] for name in within))
                curve[part] = moving.moved(mask, started, ended.__getitem__, states)
        del states  # before those of the other end are kept
        at_end, states = moving.whole(ended)
        reverted = {part: moving.moved(mask, ended, started.__getitem__, states) for part, mask in masks.items()}
    finally:
        moving.put(moving.own)
    return Grafts(tuple(masks), at_cut, at_end, alone, reverted, by_control, of_whole, up, down, base, label, noise)


class _Moving:
    """A model whose weights are moved, with those that it came with."""

    def __init__(self, model: Model, evaluate: Evaluate, max_bytes: int):
        self.model, self.evaluate, self.max_bytes = model, evaluate, max_bytes
        self.live = model.weights()
        self.own = {name: value.clone() for name, value in self.live.items()}
        self.known: dict[int, tuple[WeightMask, WeightMask, int]] = {}
        """Masks by their ids: each here and on the model's device, and how many blocks come before it."""

    def steady(self, what: str, weights: Weights) -> Weights:
        """Weights that do not move with the model: those that are its own are what it came with.

        Raises:
            ValueError: they are of another model.
        """
        if (why := differs(self.live, weights)) is not None:
            raise ValueError(f"{what} are of another model: {why}")
        return {
            name: self.own[name] if value.data_ptr() == self.live[name].data_ptr() else value
            for name, value in weights.items()
        }

    def put(self, weights: Weights, names: Iterable[str] | None = None) -> None:
        """Put some weights into the model, or all."""
        with torch.no_grad():
            for name in self.live if names is None else names:
                self.live[name].copy_(weights[name])

    def whole(self, weights: Weights) -> tuple[Outcomes, States]:
        """Outcomes with all of the weights, and what the blocks give: models that are the same up to some block need
        not compute it again."""
        self.put(weights)
        with recorded(self.model, max_bytes=self.max_bytes) as states:
            return self.outcomes(), states

    def moved(self, mask: WeightMask, into: Weights, of: Callable[[str], Tensor], states: States) -> Outcomes:
        """With the mask's entries changed in the model as it is, which then is as it was, and gave these states."""
        if id(mask) not in self.known:
            self.known[id(mask)] = mask, mask.on(self.model.device), unchanged_before(self.model, mask)
        _, changed, first = self.known[id(mask)]
        with torch.no_grad():
            for name in mask.weights():
                live = self.live[name]
                there = into[name].to(live.device)
                live.copy_(torch.where(changed[name], of(name).to(live.device), there))
        with resumed(self.model, states, first):
            outcomes = self.outcomes()
        self.put(into, mask.weights())
        return outcomes

    def outcomes(self) -> Outcomes:
        """Of the model as it is."""
        result = self.evaluate(self.model)
        return {result.quantity: result} if isinstance(result, Scores) else dict(result)


def _added(to: Weights, start: Weights, end: Weights, name: str) -> Tensor:
    """A weight with another arm's change added."""
    at = to[name].device
    change = end[name].to(at).float() - start[name].to(at).float()
    return (to[name].float() + change).to(to[name].dtype)


def _masks(model: Model, parts: Parts, cut: WeightMask | None) -> tuple[dict[str, WeightMask], dict[str, WeightMask]]:
    """Every part without the cut's entries, which are the last; and every part with them."""
    if wearing(model.bridge):
        raise ValueError("this model has low-rank adapters now; graft when the block of `adapted` has ended")
    named = [weight for names in parts.values() for weight in names]
    if unknown := sorted(set(named) - set(model.plain())):
        raise ValueError(f"parts name weights that the model does not have, such as {unknown[0]!r}")
    if len(named) > len(set(named)):
        twice = next(weight for weight in named if named.count(weight) > 1)
        raise ValueError(f"parts must share no weight, and {twice!r} is in two; give disjoint parts")
    if not parts:
        raise ValueError("there are no parts to graft; leave `parts` out for all of the model")
    whole = {part: WeightMask.of_parts(model, part, among=parts) for part in parts}
    if cut is None:
        return whole, whole
    cut.check(model)
    if CUT in parts:
        raise ValueError(f"a part is named {CUT!r}, which is the name of the cut's own entries; name it otherwise")
    return {part: mask - cut for part, mask in whole.items()} | {CUT: cut}, whole


def share_old(new: Neurons, old: Neurons) -> float:
    """Share of a new set of neurons that are in an old one, 0 to 1; NaN for an empty set.

    Raises:
        ValueError: sets of two sites.
    """
    return len(new & old) / len(new) if len(new) else math.nan
