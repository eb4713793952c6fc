"""A run's questions, answered: what was measured, as the numbers that `analysis.questions` judges."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relearn_lens.analysis import evidence, questions
from relearn_lens.analysis.questions import Again, Back, Curve, Cuts, Grafts, Heirs, Outcome, Question
from relearn_lens.measure.evaluation import Scores, SpanScores
from relearn_lens.measure.grafting import CUT
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.neurons.sites import Neurons
from relearn_lens.runs.preparation import FEWEST_SPANS

if TYPE_CHECKING:
    from relearn_lens.runs.results import Run


def questions_of(run: Run) -> list[Question]:
    """The questions of a run in their order; those that were not measured say so."""
    if "concept" not in run.arms:
        return []
    return [each for each in (_specific(run), *_back(run), *_where(run), _same(run), *_heirs(run)) if each is not None]


def outcome(scores: Scores, label: Any) -> Outcome:
    """How well a model does on a label: margin and F1 of a tagger, of a language model its gain over a guess."""
    if isinstance(scores, SpanScores):
        assert scores.margin is not None
        return Outcome(scores.margin.value(label), scores.value(label))
    return Outcome(scores.value(label))


def curve(path: Trajectory, label: Any) -> Curve:
    """The course of an arm from the cut on."""
    stages = [stage for stage in path.stages if stage != BASE]
    outcomes = [outcome(path[stage].scores, label) for stage in stages]
    steps = [0 if stage == PRUNED or (at := path[stage].at) is None else at.step for stage in stages]
    f1 = [each.f1 for each in outcomes if each.f1 is not None]
    return Curve(steps, [each.margin for each in outcomes], f1)


def _specific(run: Run) -> Question | None:
    if not run.damage or not any(run.damage[0].random.values()):
        return None
    concept, bases = "+".join(run.label), [path[BASE].scores for path in run.arms["concept"]]
    support = bases[0].support()
    # What a base model hardly knows cannot be spared either: a share of a margin that is not there says nothing.
    judged = [
        name
        for name in bases[0].labels
        if name not in run.label and support[name] >= FEWEST_SPANS and min(outcome(b, name).margin for b in bases) > 0
    ]
    other = run.manifest.get("other")
    labels: Mapping[str, Any] = {concept: run.label, **{name: name for name in judged}}

    def by_label(scores: Scores) -> dict[str, Outcome]:
        return {name: outcome(scores, label) for name, label in labels.items()}

    seeds = [
        Cuts(
            damage.seed, by_label(path[BASE].scores), by_label(damage.concept),
            None if damage.other is None else by_label(damage.other),
            *([by_label(scores) for scores in damage.random.get(kind, ())] for kind in ("layers", "disjoint", "scale")),
        )
        for damage, path in zip(run.damage, run.arms["concept"], strict=True)
    ]  # fmt: skip
    return questions.specific(seeds, concept, other if other in labels else None)


def _back(run: Run) -> list[Question]:
    arms: dict[str, Sequence[Trajectory | None]] = {name: run.arms[name] for name in run.arms}
    nothing = [None] * len(run.arms["concept"])
    seeds = [
        Back(
            path.seed, outcome(path[BASE].scores, run.label), curve(path, run.label),
            *(None if twin is None else curve(twin, run.label) for twin in (never, unpruned)),
        )
        for path, never, unpruned in zip(
            run.arms["concept"], arms.get("never", nothing), arms.get("unpruned", nothing), strict=True
        )
    ]  # fmt: skip
    return [questions.returns(seeds), questions.sooner(seeds)]


def _where(run: Run) -> list[Question]:
    """Where it is first back, and where it is at the end: the answer changes."""
    if not run.grafted or not all(grafted.stages for grafted in run.grafted):
        return []
    stages = []
    for at, which in (("when it is first back", 0), ("at the end", -1)):
        if which == 0 and all(len(grafted.stages) < 2 for grafted in run.grafted):
            continue
        seeds = []
        for grafted in run.grafted:
            made = list(grafted.stages.values())[which]
            parts = [part for part in made.parts if part != CUT]
            if made.controls:
                seeds.append(
                    Grafts(
                        grafted.seed, made.value(made.cut), made.value(made.retrained),
                        {part: made.value(made.alone[part]) for part in parts},
                        {part: made.value(made.reverted[part]) for part in parts},
                        {kind: {part: made.value(by[part]) for part in parts} for kind, by in made.controls.items()},
                    )
                )  # fmt: skip
        if seeds:
            stages.append(questions.where(seeds, at))
    return stages


def _same(run: Run) -> Question | None:
    if not run.again:
        return None
    seeds = []
    for again, path in zip(run.again, run.arms["concept"], strict=True):
        cut, retrained, same = (
            outcome(scores, run.label).margin
            for scores in (path[PRUNED].scores, path[path.stages[-1]].scores, again.same)
        )
        first = again.rounds[0] if again.rounds else None
        seeds.append(
            Again(
                again.seed, cut, retrained, same, [outcome(scores, run.label).margin for scores in again.random],
                None if first is None else first.share_old, None if first is None else first.share_by_chance,
            )
        )  # fmt: skip
    return questions.same(seeds)


def _heirs(run: Run) -> list[Question]:
    return [
        ask(seeds) for ask, seeds in ((questions.primed, heirs(run, "primed")), (questions.mixed, heirs(run, "mixed")))
        if seeds is not None
    ]  # fmt: skip


def heirs(run: Run, which: str) -> list[Heirs] | None:
    """Whether heirs were near the concept before (`"primed"`), or mix meanings (`"mixed"`): a number per seed and arm,
    on the neurons that survive in all; None where there is no second arm."""
    arms = {name: run.arms[name] for name in ("concept", "random", "unpruned") if name in run.arms}
    if len(arms) < 2:
        return None
    measured = {"primed": _primed, "mixed": _mixed}[which]
    seeds = []
    for paths in zip(*arms.values(), strict=True):
        among = functools.reduce(operator.and_, (path.survivors() for path in paths))
        try:
            values = dict(zip(arms, (measured(path, among) for path in paths), strict=True))
        except evidence.Missing:
            continue
        seeds.append(Heirs(paths[0].seed, **values))
    return seeds


def _primed(path: Trajectory, among: Neurons) -> float:
    return evidence.predicted(path, path.stages[-1], among, by_words=path[BASE].near_concept is not None)


def _mixed(path: Trajectory, among: Neurons) -> float:
    return float(np.float64(evidence.mixed(path, path.stages[-1], among)))
