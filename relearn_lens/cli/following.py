"""What is printed while long work is under way."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import typer

from relearn_lens.cli.printing import columns

if TYPE_CHECKING:
    from relearn_lens.bench.engines import Done
    from relearn_lens.runs.events import Event
    from relearn_lens.runs.results import Run
    from relearn_lens.runs.settings import Experiment


@contextlib.contextmanager
def following(experiment: Experiment | None = None, *, verbose: bool = False) -> Iterator[Following]:
    """For a while, a bar that says what is being done and how long still, below the lines of results."""
    follow = Following(experiment, verbose or experiment is None)
    with follow.live:
        yield follow


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """For a while, who stops the command is told that it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None


class Following:
    """What is printed while long work is under way: its bar, and of a run each arm as a line that fills up."""

    def __init__(self, experiment: Experiment | None, verbose: bool):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.experiment, self.verbose = experiment, verbose
        self.console = Console(width=columns(), highlight=False)
        shown = TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TimeElapsedColumn()
        self.bar = Progress(*shown, console=self.console)
        self.live = Live(self.bar, console=self.console, transient=True, refresh_per_second=4)
        self.task: Any = None
        self.what = ""
        self.phases: set[str] = set()
        self.run: Run | None = None
        self.arms: dict[str, dict[str, Any]] = {}
        """Scores by arm and stage, of the seed under way."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far the work has come."""
        if what != self.what:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.what, self.task = what, self.bar.add_task(what, total=total)
            phase = what.partition(" (")[0]
            if self.verbose and not self.console.is_terminal and phase not in self.phases:
                self.phases.add(phase)
                self.say(f"{phase} ...")
        self.bar.update(self.task, completed=done, total=total)

    def say(self, text: Any) -> None:
        """Print something above the bar."""
        self.console.print(text, markup=False, soft_wrap=not isinstance(text, str))

    def take(self, event: Event) -> None:
        """Print what an event of a run brings."""
        from rich.console import Group

        from relearn_lens.runs import events
        from relearn_lens.runs.results import Run
        from relearn_lens.show import brief

        experiment = self.experiment
        assert experiment is not None
        if isinstance(event, events.Prepared):
            self.run = Run(experiment, manifest={"other": event.other.name if event.other else None})
            parts = {"train": event.train, "validation": event.validation, "probe": event.probe}
            if self.verbose:
                for line in [*(repr(part.corpus) for part in parts.values()), *(f"note: {n}" for n in event.notes)]:
                    self.say(line)
            else:
                sizes = ", ".join(f"{name} {part.corpus.n_sentences:,}" for name, part in parts.items())
                self.say(f"sentences: {sizes}; {len(event.notes)} notes are on the page, and here with --verbose")
            return
        assert self.run is not None
        self.run.take(event)
        other, stages = self.run.manifest["other"], brief.stages_of(experiment)
        match event:
            case events.Base(seed=seed, snapshot=snapshot):
                scores, self.arms = snapshot.scores, {}
                by = "steps" if experiment.retrain.steps else "epochs"
                shown = ", ".join(f"{label} {value:.2f}" for label, value in snapshot.shown.items())
                self.say(f"seed {seed}: {scores.metric} of the base model {shown}")
                self.say(brief.head(f"{scores.metric} of {'+'.join(experiment.labels)}", stages, by))
            case events.Measured(arm=arm, stage=stage, snapshot=snapshot):
                self.arms.setdefault(arm, {})[stage] = snapshot.scores
                self.live.update(Group(brief.rows_of(self.arms, other, experiment.labels, stages)[arm], self.bar))
            case events.ArmDone(trajectory=path):
                self.arms[path.arm] = {stage: path[stage].scores for stage in path.stages}
                self.live.update(self.bar)
                self.say(brief.rows_of(self.arms, other, experiment.labels, stages)[path.arm])
            case events.SeedDone(seed=seed) if len(experiment.seeds) > 1 and seed == experiment.seeds[0]:
                for line in ["", *brief.brief(self.run), ""]:
                    self.say(line)


def sweeping(total: int, to: TextIO) -> Callable[..., None]:
    """A line for every cell as it starts and ends."""
    ended = 0

    def say(name: str, now: str = "", done: Done | None = None) -> None:
        nonlocal ended
        ended += now in ("complete", "done", "failed")
        count = f"[{ended}/{total}] " if now else ""
        took = f" in {done.seconds:.0f} s" if done else ""
        why = f": {done.error}" if done and done.error else ""
        print(f"{count}{name}{f': {now}' if now else ''}{took}{why}", file=to, flush=True)

    return say
