"""What a finished run says, as typed numbers, each computed when it is first read and once.

Summary, report, tables, captions and pictures read these. What was not measured is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats as st

from relearn_lens.analysis import claims, migration, priming, questions, recovery, story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.migration import Migration, Selection
from relearn_lens.analysis.questions import Question
from relearn_lens.measure import meaning
from relearn_lens.measure.evaluation import Scores, SpanScores
from relearn_lens.measure.tracking import BASE, Snapshot, Trajectory
from relearn_lens.runs import answers
from relearn_lens.runs.preparation import FEWEST_SPANS

if TYPE_CHECKING:
    from relearn_lens.runs.results import Run

ByStage = dict[str, list[float]]
"""Stage to a number for each layer."""
HARDLY = 0.1
"""F1 of a base model below which a label has hardly anything that a cut could take."""


@dataclass(frozen=True, eq=False, repr=False)
class Numbers:
    """What a run says."""

    run: Run

    @cached_property
    def claims(self) -> list[Claim]:
        """C1 to C9."""
        run = self.run
        return claims.claims(
            run.arms, run.label, random_sets=[damage.random.get("layers", ()) for damage in run.damage],
            level=run.interval["level"], draws=run.interval["draws"],
        )  # fmt: skip

    @cached_property
    def questions(self) -> list[Question]:
        """In their order, one Holm family."""
        return questions.family(answers.questions_of(self.run))

    @cached_property
    def what_happened(self) -> str:
        """The run in two sentences."""
        return story.what_happened(self.run.arms, self.run.label, **self.run.interval)

    @cached_property
    def migrations(self) -> dict[str, Migration | str]:
        """Where the concept went, by the main score on all three selections, and by `"attribution"`.

        A sentence where it cannot be said: a score with a sign, no neuron that survived in both arms.
        """
        arms = self.run.arms
        if "concept" not in arms:
            return {}

        def moved(**how: Any) -> Migration | str:
            try:
                return migration.migration(arms, level=self.run.interval["level"], **how)
            except ValueError as error:
                return f"Not measured: {error}."

        selections: tuple[Selection, ...] = ("matched", "all", "published")
        migrations = {which: moved(selection=which) for which in selections}
        if all(arm[last(arm)].attribution and arm[BASE].attribution for each in arms.values() for arm in each):
            migrations["attribution"] = moved(score=lambda snapshot: snapshot.by("attribution"))
        return migrations

    @cached_property
    def agreement(self) -> dict[str, float]:
        """Spearman correlation over neurons of the ranking score with every other one, at base, mean over seeds."""
        bases = [arm[BASE] for arm in next(iter(self.run.arms.values()))]
        # What takes long was measured for the first seed alone, unless the settings say otherwise.
        return {
            kind: float(np.mean([_correlation(s, kind) for s in bases if kind in s.also or kind in s.attributions]))
            for kind in (*bases[0].also, *bases[0].attributions)
        }

    @cached_property
    def heirs(self) -> dict[str, list[meaning.Meaning]]:
        """By arm, the words of up to 8 neurons that are new in the top tenth of the survivors, most gained first."""
        return {name: _heirs(arms[0]) for name, arms in self.run.arms.items()}

    @cached_property
    def speeds(self) -> dict[str, recovery.Speeds]:
        """How fast each arm that was trained on came back."""
        run = self.run
        return {
            name: recovery.speeds(arms, run.label, unpruned=run.arms.get("unpruned"), **run.interval)
            for name, arms in run.arms.items()
            if recovery.retraining_stages(arms[0])
        }

    @cached_property
    def savings(self) -> recovery.Savings | None:
        """How much sooner than in the twin that never had the concept; None without one."""
        run = self.run
        if not {"concept", "never"} <= set(run.arms):
            return None
        return recovery.savings(run.arms["concept"], run.arms["never"], run.label, **run.interval)

    @cached_property
    def natural(self) -> list[tuple[int, Scores, Scores]]:
        """Seed, and scores of the base model on the drawn sentences and on sentences as they come, where both are
        known."""
        pairs = zip(self.run.damage, self._bases, strict=False)
        return [(damage.seed, drawn, damage.natural) for damage, drawn in pairs if damage.natural is not None]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader should know first: the run's notes, labels that the base model hardly knows, natural scores."""
        run, lines, seeds = self.run, list(self.run.manifest.get("notes", [])), self._bases
        if seeds and isinstance(seeds[0], SpanScores):
            support = seeds[0].support()
            for label in seeds[0].labels:
                f1 = float(np.mean([scores.value(label) for scores in seeds]))
                if support[label] >= FEWEST_SPANS and f1 < HARDLY:
                    lines.append(
                        f"the base model hardly knows {label!r} (F1 {f1:.2f}): it has nothing to lose, and says "
                        "nothing of what a cut takes; fine-tune for longer, or with a larger finetune.lr"
                    )
        lines += self.oversized
        if self.natural:
            drawn = np.mean([scores.shown(run.label) for _, scores, _ in self.natural])
            plain = np.mean([scores.shown(run.label) for _, _, scores in self.natural])
            lines.append(
                f"{self.natural[0][1].metric} of {'+'.join(run.label)} before any cut: {drawn:.3f} on the sentences "
                f"that are scored, drawn by data.labelled_only and data.concept_share; {plain:.3f} on as many as they "
                "come"
            )
        return lines

    @cached_property
    def oversized(self) -> list[str]:
        """A line for each seed in which no size of cut was found that takes the concept, as it was asked for."""
        gone, label = self.run.experiment.prune.gone, self.run.label
        lines = []
        for sized in self.run.sized:
            taken = next((d for d in sized.doses if d.cut == "concept" and d.fraction == sized.fraction), None)
            if taken is None or sized.base is None or taken.scores.value(label) < gone * sized.base.value(label):
                continue
            name, before = "+".join(label), sized.base.shown(label)
            lines.append(
                f"seed {sized.seed}: no cut takes {name} below {gone:g} of its {before:.2f} "
                f"and leaves the others; {100 * sized.fraction:g} % takes most, to {taken.scores.shown(label):.2f}"
            )
        return lines

    @cached_property
    def selections(self) -> tuple[Selection, ...]:
        """The neurons that layers are compared on: first as the settings ask, then matched and all."""
        return tuple(dict.fromkeys((self.run.experiment.measure.selection, "matched", "all")))

    @cached_property
    def pruned_share(self) -> dict[str, list[float]]:
        """By arm, the share of each layer's neurons that was pruned, mean over seeds."""
        return {
            name: np.mean([(~arm.survivors()).share_by_layer() for arm in arms], axis=0).tolist()
            for name, arms in self.run.arms.items()
        }

    @cached_property
    def saliency(self) -> dict[str, dict[Selection, ByStage]]:
        """By arm and selection, the mean rank saliency of each layer (1 the most salient neuron), mean over seeds."""
        return {
            name: {which: mean([story.saliency_by_layer(arm, which) for arm in arms]) for which in self.selections}
            for name, arms in self.run.arms.items()
        }

    @cached_property
    def overlap(self) -> float | None:
        """Share of the random arm's neurons that the concept's arm pruned too, mean over seeds; None without both."""
        arms = self.run.arms
        if not {"concept", "random"} <= set(arms):
            return None
        pairs = [(c.removed, r.removed) for c, r in zip(arms["concept"], arms["random"], strict=True)]
        return float(np.mean([len(cut & drawn) / len(drawn) for cut, drawn in pairs if cut and drawn]))

    @property
    def _bases(self) -> list[Scores]:
        """Scores of the base model of each seed."""
        arms = next((arms for name, arms in self.run.arms.items() if name != "never"), [])
        return [arm[BASE].scores for arm in arms]


def last(arm: Trajectory) -> str:
    """The last stage."""
    return arm.stages[-1]


def mean(seeds: list[ByStage]) -> ByStage:
    """Mean over seeds, layer by layer."""
    return {stage: np.mean([seed[stage] for seed in seeds], axis=0).tolist() for stage in seeds[0]}


def _correlation(snapshot: Snapshot, kind: str) -> float:
    """Spearman, NaN where a score is the same for every neuron."""
    mine, other = (saliency.score.flatten().numpy() for saliency in (snapshot.saliency, snapshot.by(kind)))
    if np.ptp(mine) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(st.spearmanr(mine, other)[0])  # pyright: ignore[reportArgumentType]


def _heirs(arm: Trajectory) -> list[meaning.Meaning]:
    base, now, among = arm[BASE], arm[last(arm)], arm.matched()
    if base.words is None or now.words is None or not len(among):
        return []
    new = priming.heirs(base.saliency, now.saliency, max(1, len(among) // 10), among)
    return meaning.polysemy(base.words, now.words, base.concept_words, neurons=new).rows(8)
