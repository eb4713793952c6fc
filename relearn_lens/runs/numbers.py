"""What is told of a run, each number computed once: the summary, tables, pages, captions and figures read it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from relearn_lens.analysis import recovery, story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.questions import Question
from relearn_lens.measure.meaning import Meaning
from relearn_lens.runs import answers, findings, summary
from relearn_lens.runs.results import Run


@dataclass(frozen=True, eq=False)
class Numbers:
    """Everything that a finished run is asked for; computed when it is first read, and kept."""

    run: Run

    @cached_property
    def claims(self) -> list[Claim]:
        """C1 to C9; none without a concept arm."""
        return findings.claims_of(self.run)

    @cached_property
    def questions(self) -> list[Question]:
        """The questions, one Holm family; none without a concept arm."""
        return answers.answers(self.run)

    @cached_property
    def migration(self) -> dict[str, Any]:
        """Where the concept went, by selection and by attribution."""
        return findings.migration_of(self.run)

    @cached_property
    def speeds(self) -> Mapping[str, recovery.Speeds]:
        """How fast each arm came back."""
        run = self.run
        return {
            name: recovery.speeds(arms, run.label, unpruned=run.arms.get("unpruned"), **run.interval)
            for name, arms in run.arms.items()
        }

    @cached_property
    def agreement(self) -> dict[str, float]:
        """Rank correlation of the ranking score with every other, at base."""
        return findings.agreement(self.run)

    @cached_property
    def heirs(self) -> dict[str, list[Meaning]]:
        """By arm, the words of the neurons that are new in the top tenth, those that gained most first."""
        return {name: findings.heir_rows(self.run, name) for name in self.run.arms}

    @cached_property
    def what_happened(self) -> str:
        """Two sentences."""
        return story.what_happened(self.run.arms, self.run.label, **self.run.interval)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All of `summary.json`."""
        return summary.summary(self.run)
