"""A run in ten seconds: what was cut, the concept's score by steps, a line for every question, a neuron that took over.

Lines of styled text from a run, for a terminal of 80 columns; the page begins with the same sentence and answers.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from relearn_lens.analysis import questions
from relearn_lens.analysis.intervals import FEWEST_SEEDS
from relearn_lens.analysis.questions import Question
from relearn_lens.analysis.recovery import name_of, retraining_stages
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.grafting import CUT, Grafts
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.runs.answers import curve, heirs, outcome
from relearn_lens.runs.events import BACK
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.show.plots.style import ARM_COLOURS, VERDICT_COLOURS, arm_of, clipped, measured_by, short_name
from relearn_lens.show.plots.style import seeds as seeds_in_words
from relearn_lens.text.corpus import printable

WIDTH = 80
"""Columns of a line."""
MOST = 25
"""Lines in all."""
_NAME, _KEY, _VERDICT = 16, 9, 14
_BARS = "▁▂▃▄▅▆▇█"
_FIXED = "\N{NO-BREAK SPACE}"
"""Holds a number and its interval on one line."""


@dataclass(frozen=True)
class Answer:
    """A question in a word, and its answer in a line."""

    name: str
    question: Question
    says: str
    """The numbers, means over seeds; there with one seed too."""
    number: str
    """What decides, less its control, with its interval; empty where there is no interval."""


def brief(run: Run, report: str | None = None) -> list[Text]:
    """All of it: headline, scores by steps, answers, a neuron that took over, and where to read on.

    At most `MOST` lines: where it would be more, the numbers in brackets are left to the page, then the neuron.
    """
    table = [headline(run), header(run), *rows(run)]
    answers, rest = answered(run), _rest(run, report)
    lines = [line for answer in answers for line in _answer(answer, whole=True)]
    if len(table) + len(lines) + len(rest) > MOST:
        lines = [line for answer in answers for line in _answer(answer, whole=False)]
    if len(table) + len(lines) + len(rest) > MOST:
        rest = [line for line in rest if not line.plain.startswith("now")]
    return [*table, *lines, *rest]


def _answer(answer: Answer, *, whole: bool) -> list[Text]:
    verdict = answer.question.verdict
    aside = f" ({answer.number})" if whole and answer.number and answer.number not in answer.says else ""
    return _entry(answer.name, answer.says + aside, verdict, VERDICT_COLOURS[verdict])


def _rest(run: Run, report: str | None) -> list[Text]:
    lines: list[Text] = []
    if lost := never_back(run):
        lines += _entry("lost", lost)
    for size in run.numbers.oversized:
        lines += _entry("size", size)
    if run.blocked:
        lines += _entry("held", held(run))
    if now := took_over(run):
        lines.append(now)
    if (n := len(arm_of(run))) < FEWEST_SEEDS:
        lines += _entry("seeds", f"{n}, so these are numbers and no verdicts: those need {FEWEST_SEEDS}")
    return lines + (_reading_on(run, report) if report else [])


def headline(run: Run) -> Text:
    """What was cut out of which model, on which text."""
    paths = arm_of(run)
    how, site = run.experiment, paths[0].site
    cut = sorted({0 if path.removed is None else len(path.removed) for path in paths})
    many = f"{cut[0]:,}" if len(cut) == 1 else f"{cut[0]:,} to {cut[-1]:,}"
    text = f"{name_of(paths[0])} in {short_name(how.model)} · {short_name(how.corpus)} · {site.name} · "
    text += f"{many} of {site.n_neurons:,} neurons cut · {seeds_in_words(len(paths))}"
    return Text(clipped(text, WIDTH), style="bold")


def sentence(run: Run) -> str:
    """What happened, in one sentence."""
    if "concept" not in run.arms:
        return "This run has no concept arm, so it says nothing about the concept."
    paths = run.arms["concept"]
    name, unit = name_of(paths[0]), _unit(paths)
    base, cut, end = (_mean(paths, stage, run) for stage in (BASE, PRUNED, paths[0].stages[-1]))
    many = round(float(np.mean([0 if path.removed is None else len(path.removed) for path in paths])))
    what = f"{name} falls from F1" if unit == "F1" else f"the {unit} on {name} goes from"
    text = f"Without {many:,} of {paths[0].site.n_neurons:,} neurons, {what} {base} to {cut}"
    other = run.manifest.get("other")
    if other and other in paths[0][BASE].scores.labels:
        text += f" ({other}: {_mean(paths, BASE, run, other)} to {_mean(paths, PRUNED, run, other)})"
    half = _steps(paths, paths, run)
    text += f"; training brings it to {end}"
    if not half.startswith((">", "0")):
        text += f", half of its margin within {half} {measured_by(paths)}"
        if "never" in run.arms:
            text += f" ({_steps(run.arms['never'], paths, run)} in a model that never had {_had(run)})"
    if place := _where(run, -1):
        part, enough, _ = place
        brings = "bring" if part.startswith("blocks ") else "brings"
        text += f"; at the end, {part} alone {brings} back {_percent(enough)} of it"
    return text + "."


def header(run: Run) -> Text:
    """The head of the table of scores."""
    paths = arm_of(run)
    return head(f"{_unit(paths)} of {name_of(paths[0])}", paths[0].stages, measured_by(paths))


def head(what: str, stages: Sequence[str], by: str) -> Text:
    """The head of a table of scores by stage."""
    named = ["cut" if stage == PRUNED else stage for stage in _shown_stages(stages)]
    return Text(f"{clipped(what, _NAME - 1):<{_NAME}}" + "".join(f"{name:>5}" for name in named) + f" {by}")


def rows(run: Run) -> list[Text]:
    """The concept's score in every arm, means over seeds."""
    stages = _shown_stages(arm_of(run)[0].stages)
    table = {
        name: {s: _value([path[s].scores for path in paths], run.label) for s in stages if s in paths[0].stages}
        for name, paths in run.arms.items()
    }
    scale = _scale(table, arm_of(run)[0][BASE].scores.metric)
    return [row(_arm(name, run.manifest.get("other")), name, values, stages, scale) for name, values in table.items()]


def row(
    title: str, arm: str, values: Mapping[str, float], stages: Sequence[str], scale: tuple[float, float] = (0.0, 1.0)
) -> Text:
    """An arm's scores as far as they are known, and a small picture of them."""
    text = Text()
    text.append(f"{clipped(title, _NAME - 1):<{_NAME}}", style=f"bold {ARM_COLOURS.get(arm, '')}".strip())
    text.append("".join(f"{number(values[s]) if s in values else '':>5}" for s in stages))
    text.append("   " + spark([values[s] for s in stages if s in values], *scale), style=ARM_COLOURS.get(arm, ""))
    text.rstrip()
    return text


def rows_of(
    arms: Mapping[str, Mapping[str, Scores]], other: str | None, label: Label, stages: Sequence[str]
) -> dict[str, Text]:
    """`row` of every arm of a seed under way, from the scores by stage so far."""
    values = {name: {stage: each.shown(label) for stage, each in scores.items()} for name, scores in arms.items()}
    scale = _scale(values, next((each.metric for scores in arms.values() for each in scores.values()), "F1"))
    return {name: row(_arm(name, other), name, each, _shown_stages(stages), scale) for name, each in values.items()}


def stages_of(how: Experiment) -> list[str]:
    """The stages that a run will have, by its settings."""
    if how.retrain.steps:
        return [BASE, PRUNED, *map(str, how.retrain.steps)]
    every = how.retrain.every or how.retrain.epochs
    counts = [*np.arange(every, how.retrain.epochs, every), how.retrain.epochs]
    return [BASE, PRUNED, *(f"{round(float(count), 3):.10g}" for count in counts)]


def number(value: float) -> str:
    """A score in at most five columns: .92, 1.00, 12.3."""
    if not np.isfinite(value):
        return "-"
    text = f"{value:.{2 if abs(value) < 10 else 1}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def spark(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """A bar for every value."""
    reach = (high - low) or 1.0
    level = [0 if not np.isfinite(v) else round((len(_BARS) - 1) * (v - low) / reach) for v in values]
    return "".join(_BARS[min(max(k, 0), len(_BARS) - 1)] for k in level)


def answered(run: Run) -> list[Answer]:
    """The run's questions, each with its numbers in a line; those that were not measured are left out."""
    verdicts = [each.verdict for each in run.numbers.questions if each.key.startswith("where")]
    tell: dict[str, tuple[str, Callable[[Run, str], str | None]]] = {
        "specific": ("gone?", _gone),
        "returns": ("back?", _back),
        "sooner": ("sooner?", _sooner),
        "where when it is first back": ("where?", lambda run, _: _sits(run, 0, verdicts[0])),
        "where at the end": ("where?", lambda run, _: _sits(run, -1, verdicts[-1])),
        "same": ("same?", _same),
        "primed": ("primed?", lambda run, _: _heirs(run, "primed")),
        "mixed": ("mixed?", lambda run, _: _heirs(run, "mixed")),
    }
    lines = []
    for question in run.numbers.questions:
        name, say = tell.get(question.key, (question.key, lambda *_: None))
        decides = _number(question)
        if not (says := say(run, decides)):
            says = question.says.removeprefix("Undecided: ").rstrip(".")
        elif question.falls_to_holm:
            says += "; not beyond Holm"
        lines.append(Answer(name, question, says, decides))
    return lines


def never_back(run: Run) -> str:
    """The labels that a cut took and that training did not bring back; empty where there are none."""
    labels = []
    for name, paths in run.arms.items():
        if name == "never" or _unit(paths) != "F1" or not retraining_stages(paths[0]):
            continue
        last = paths[0].stages[-1]
        for label in paths[0][BASE].scores.labels:
            base, end = (float(np.mean([path[s].scores.shown(label) for path in paths])) for s in (BASE, last))
            if base >= 0.1 and end < base / 2:  # of less there is nothing to come back
                when = f"{measured_by(paths)[:-1]} {last}"
                labels.append(f"{label} is at {number(end)} of {number(base)} in the {name} arm at {when}")
    return "; ".join(labels)


def took_over(run: Run) -> Text | None:
    """A neuron that took over: its words before and after. The one that gained most, so an example and no evidence."""
    neuron = next(iter(run.numbers.heirs.get("concept", [])), None)
    if neuron is None:
        return None
    text = Text(f"{'now':<{_KEY}}")
    text.append(str(neuron.neuron), style=f"bold {ARM_COLOURS['concept']}")
    before, now = (", ".join(map(printable, words[:3])) for words in (neuron.before, neuron.now))
    text.append(f"  {before} → {now}")
    text.truncate(WIDTH, overflow="ellipsis")
    return text


def held(run: Run) -> str:
    """At which step the concept was back while something was held where the cut had left it, beside the free arm."""
    steps: dict[str, set[tuple[float, str]]] = {}
    for path in run.arms["concept"]:
        free = {at.step: path[stage].scores for stage in path.stages if stage != BASE and (at := path[stage].at)}
        mine = {each.held: each.course for each in run.blocked if each.seed == path.seed}
        for name, course in {"": free, **mine}.items():
            enough = BACK * path[BASE].scores.value(run.label)
            never = (np.inf, f"> {max(course)}" if course else "(none known)")
            back = ((n, str(n)) for n, scores in course.items() if scores.value(run.label) >= enough)
            steps.setdefault(name, set()).add(next(back, never))
    when = {name: " or ".join(says for _, says in sorted(each)) for name, each in steps.items()}
    names = {"part": "the part held", "heirs": "the heirs", "random": "others"}
    others = ", ".join(f"{name} {when[held]}" for held, name in names.items() if held in when)
    return f"{_percent(BACK)} is back at step {when['']}; with {others}"


# --- the numbers of each question, means over seeds


def _gone(run: Run, decides: str) -> str | None:
    paths = run.arms["concept"]
    text = f"{name_of(paths[0])} {_mean(paths, BASE, run)} → {_mean(paths, PRUNED, run)}"
    other = run.manifest.get("other")
    if other and other in paths[0][BASE].scores.labels:
        text += f", {other} {_mean(paths, BASE, run, other)} → {_mean(paths, PRUNED, run, other)}"
    if draws := [scores for damage in run.damage for scores in damage.random.get("layers", ())]:
        cuts = "a random cut leaves" if len(draws) == 1 else f"{len(draws)} random cuts leave"
        text += f"; {cuts} {number(_value(draws, run.label))}"
    return text + (f" (margin: {decides})" if decides else "")


def _back(run: Run, decides: str) -> str | None:
    paths = run.arms["concept"]
    twins = run.arms.get("unpruned", paths)
    shares = []
    for path, twin in zip(paths, twins, strict=True):
        start, end, base = (outcome(path[s].scores, run.label).margin for s in (PRUNED, path.stages[-1], BASE))
        had = outcome(twin[twin.stages[-1]].scores, run.label).margin if twin is not path else base
        shares.append((end - start) / (had - start) if had > start else np.nan)
    by, last = measured_by(paths), paths[0].stages[-1]
    if not np.isfinite(shares).all():
        return f"{_mean(paths, PRUNED, run)} → {_mean(paths, last, run)} at {by[:-1]} {last}; there was nothing to lose"
    return f"{decides or _percent(np.mean(shares))} of the margin at {by[:-1]} {last}; {_half(paths, run)}"


def _sooner(run: Run, _: str) -> str | None:
    if "never" not in run.arms:
        return None
    paths, twins = run.arms["concept"], run.arms["never"]
    twin = _steps(twins, paths, run)
    ours, never = _half(paths, run), f"a model that never had {_had(run)}"
    if twin == "0":  # the margin of both is measured against the base's
        return f"{ours}; nor did {never}" if ours.startswith("it ") else f"{ours}; {never} is not below half"
    return f"{ours}, {twin} in {never}"


def _half(paths: Sequence[Trajectory], run: Run) -> str:
    """When half of the margin was there again."""
    half = _steps(paths, paths, run)
    return "it never fell to half" if half == "0" else f"half in {half} {measured_by(paths)}"


def _sits(run: Run, which: int, verdict: str) -> str | None:
    place = _where(run, which)
    stages = list(dict.fromkeys(list(each.stages)[which] for each in run.grafted if each.stages))
    if place is None or not stages:
        return None
    part, enough, needed = place
    controls = [[max(by.values()) for by in _controls(each).values()] for each in _grafts(run, which)]
    control = float(np.mean([np.mean(each) for each in controls]))
    when = ("first back, " if which == 0 else "") + f"{measured_by(run.arms['concept'])[:-1]} {' or '.join(stages)}"
    lost = f"{_percent(needed)} is lost" if round(100 * needed) > 0 else "nothing is lost"
    brings = "bring" if part.startswith("blocks ") else "brings"
    text = f"{when}: {part} alone {brings} back {_percent(enough)} (controls {_percent(control)}), without it {lost}"
    text += _within(run, part) if which == -1 else ""
    # Where an interval reaches across a bar, which side the mean is on says nothing.
    return text if verdict == "inconclusive" else f"{text}: {_verdict_on(enough, needed)}"


def _within(run: Run, part: str) -> str:
    """Where in a part most of it is, in the seeds in which that part was taken apart."""
    made = [list(each.within.values())[-1] for each in run.grafted if each.within]
    # Each seed takes apart the part that brings back most in it, which need not be the one that is named over all.
    made = [each for each in made if _is_in(each, part) and each.value(each.retrained) > each.value(each.cut)]
    if not made:
        return ""
    shares = _alone(made)
    most = max(shares, key=shares.__getitem__)
    return f" (in it, {most.removeprefix(part).strip()} most, {_percent(shares[most])})"


def _is_in(made: Grafts, part: str) -> bool:
    """Whether what was taken apart is this part: halves of a block, or the blocks of a group."""
    names = [name for name in made.parts if name != CUT]
    if part.startswith("blocks "):
        first, last = part.removeprefix("blocks ").split(" to ")
        return names[0] == f"block {first}" and names[-1] == f"block {last}"
    return all(name.startswith(f"{part} ") for name in names)


def _same(run: Run, _: str) -> str | None:
    if not run.again:
        return None
    paths = run.arms["concept"]

    def taken(scores: Sequence[Scores], path: Trajectory) -> float:
        cut, end = (outcome(path[s].scores, run.label).margin for s in (PRUNED, path.stages[-1]))
        return float(np.mean([(end - outcome(each, run.label).margin) / (end - cut) for each in scores]))

    pairs = list(zip(run.again, paths, strict=True))
    text = f"cut again, {_percent(np.mean([taken([again.same], path) for again, path in pairs]))} goes"
    if all(again.random for again, _ in pairs):
        text += f", with random ones {_percent(np.mean([taken(again.random, path) for again, path in pairs]))}"
    if rounds := [again.rounds[0] for again in run.again if again.rounds]:
        old, chance = (np.mean([getattr(each, name) for each in rounds]) for name in ("share_old", "share_by_chance"))
        text += f"; {_percent(old)} of those found now are old, {_percent(chance)} by chance"
    return text


def _heirs(run: Run, which: str) -> str | None:
    seeds = heirs(run, which)
    if not seeds:
        return None
    arms = [name for name in ("concept", "random", "unpruned") if getattr(seeds[0], name) is not None]
    means = {name: float(np.mean([getattr(each, name) for each in seeds])) for name in arms}
    if not all(map(np.isfinite, means.values())):
        return None
    shown = ", ".join([number(means.pop("concept")), *(f"{name} {number(value)}" for name, value in means.items())])
    what = "nearness before and gain correlate by" if which == "primed" else "heirs that mix:"
    return f"{what} {shown}" + ("" if len(seeds) == len(run.arms["concept"]) else f" ({seeds_in_words(len(seeds))})")


def _grafts(run: Run, which: int) -> list[Grafts]:
    """The grafts of every seed at its first or last stage, where they have shares and controls."""
    made = [list(each.stages.values())[which] for each in run.grafted if each.stages]
    return [each for each in made if each.controls and each.value(each.retrained) > each.value(each.cut)]


def _controls(made: Grafts) -> dict[str, dict[str, float]]:
    return {
        name: {part: _share(made, made.value(by[part])) for part in by if part != CUT}
        for name, by in made.controls.items()
    }


def _share(made: Grafts, value: float) -> float:
    cut = made.value(made.cut)
    return (value - cut) / (made.value(made.retrained) - cut)


def _alone(made: Sequence[Grafts]) -> dict[str, float]:
    """What each part alone brings back, mean over seeds."""
    parts = [part for part in made[0].parts if part != CUT]
    return {part: float(np.mean([_share(each, each.value(each.alone[part])) for each in made])) for part in parts}


def _where(run: Run, which: int) -> tuple[str, float, float] | None:
    """The part that alone brings back most, mean over seeds, with how much, and how much goes without it."""
    made = _grafts(run, which)
    if not made or len(made) < len(run.grafted):
        return None
    enough = _alone(made)
    part = max(enough, key=enough.__getitem__)
    needed = float(np.mean([1 - _share(each, each.value(each.reverted[part])) for each in made]))
    return part, enough[part], needed


def _verdict_on(enough: float, needed: float) -> str:
    """In words, by the bars of the questions; a description, which an interval may not bear out."""
    return {
        (True, True): "enough and needed",
        (True, False): "enough, not needed",
        (False, True): "needed, not enough",
        (False, False): "neither enough nor needed",
    }[enough > questions.RULES["enough"].value, needed > questions.RULES["needed"].value]


def _steps(paths: Sequence[Trajectory], base: Sequence[Trajectory], run: Run) -> str:
    """Steps until half of the base's margin is there, mean over seeds; "> N" where it is not reached in all."""
    steps = [
        questions.steps_to(curve(path, run.label), outcome(first[BASE].scores, run.label).margin, 0.5)
        for path, first in zip(paths, base, strict=True)
    ]
    reached = [each.steps for each in steps if each.reached]
    last = max(each.steps for each in steps)
    if len(reached) == len(steps):
        return f"{np.mean(reached):.0f}"
    return f"{min(reached):.0f} to > {last:.0f}" if reached else f"> {last:.0f}"


# --- how it is written


def _entry(key: str, says: str, verdict: str = "", colour: str = "") -> list[Text]:
    """A key, a verdict and a text wrapped at words beside them."""
    indent = _KEY + (_VERDICT if verdict else 0)
    says = re.sub(r"(?<=\d) (?=%)|(?<=%) (?=\[)|(?<=\d) (?=\[)|(?<=\d,) (?=-?[\d.]+\])", _FIXED, says)
    lines = [line.replace(_FIXED, " ") for line in textwrap.wrap(says, WIDTH - indent, break_long_words=False)] or [""]
    first = Text(f"{key:<{_KEY}}")
    if verdict:
        first.append(f"{verdict:<{_VERDICT}}", style=f"bold {colour}")
    first.append(lines[0])
    return [first, *(Text(" " * indent + line) for line in lines[1:])]


def _reading_on(run: Run, report: str) -> list[Text]:
    line = f"{'report':<{_KEY}}{report}"
    if run.folder is None:
        return [Text(line)]
    more = f"more: relearn-lens show {run.folder} --all"
    gap = WIDTH - len(line) - len(more)
    return [Text(line + " " * gap + more)] if gap >= 2 else [Text(line), Text(" " * _KEY + more)]


def _number(question: Question) -> str:
    """The number that decides, with its interval."""
    estimate = question.number
    if estimate is None or estimate.interval is None:
        return ""
    if question.key in ("primed", "mixed"):
        return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _percent(share: float | np.floating) -> str:
    return f"{100 * share:.0f} %"


def _value(scores: Iterable[Scores], label: Label) -> float:
    return float(np.mean([each.shown(label) for each in scores]))


def _mean(paths: Sequence[Trajectory], stage: str, run: Run, label: str | None = None) -> str:
    return number(_value([path[stage].scores for path in paths], run.label if label is None else label))


def _unit(paths: Sequence[Trajectory]) -> str:
    return paths[0][BASE].scores.metric


def _had(run: Run) -> str:
    """What a twin lacks: a pretrained model has seen the words."""
    return "the label" if run.experiment.task == "tag" else "those words in training"


def _arm(name: str, other: str | None) -> str:
    return f"other ({other})" if name == "other" and other else name


def _scale(table: Mapping[str, Mapping[str, float]], metric: str) -> tuple[float, float]:
    """What the bars of all arms reach from and to."""
    # A loss of the twin that never had the concept is so far off that the others' bars would be flat.
    near = [value for name, row in table.items() for value in row.values() if name != "never" or len(table) == 1]
    known = [value for value in near if np.isfinite(value)]
    return (0.0, 1.0) if metric == "F1" or not known else (min(known), max(known))


def _shown_stages(stages: Sequence[str]) -> list[str]:
    """The stages that a line has room for: five columns and a bar each."""
    room = (WIDTH - _NAME - 8) // 6
    if len(stages) <= room:
        return list(stages)
    return [stages[k] for k in sorted({0, 1, *np.linspace(2, len(stages) - 1, room - 2).round().astype(int).tolist()})]
