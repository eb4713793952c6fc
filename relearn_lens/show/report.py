"""One self-contained HTML page from a finished run, or from several side by side: no network, nothing but this file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.analysis.recovery import name_of
from relearn_lens.files import path_of, write_whole
from relearn_lens.measure.tracking import BASE, PRUNED
from relearn_lens.runs import presets, verify
from relearn_lens.runs.results import Run
from relearn_lens.show import brief, captions, plots
from relearn_lens.show.plots.style import VERDICT_COLOURS, arm_of, measured_by, whole
from relearn_lens.show.tables import (
    CORRECTED,
    Table,
    agreement_rows,
    attribution_rows,
    claims_rows,
    draws_row,
    layer_rows,
    score_rows,
    similarity_rows,
    speed_rows,
)
from relearn_lens.text.corpus import OUTSIDE


class Picture(NamedTuple):
    """A figure on the page."""

    html: Markup
    title: Markup
    note: Markup
    asks: str
    """The question of the figure: the first line of its docstring."""
    reads: Markup
    """How to read it: the rest of its docstring."""
    says: str
    """What it shows in this run."""


def write_report(run: Run, path: str | Path) -> Path:
    """Write the page of a run; gives its path back.

    Raises:
        ValueError: it is no run, or no path.
    """
    page, path = render(whole(run)), path_of(path, "the path of a page")
    write_whole(path, page.encode())
    return path


def write_comparison(runs: Sequence[Run], path: str | Path) -> Path:
    """Write one page that puts runs side by side; gives its path back.

    Raises:
        ValueError: fewer than two runs.
    """
    write_whole(Path(path), render_comparison(runs).encode())
    return Path(path)


def render(run: Run) -> str:
    """The page of a run as HTML."""
    numbers = run.numbers
    claims = numbers.claims
    manifest = run.manifest
    draw = Drawing()
    tables: dict[str, Table | None] = {
        "f1": score_rows(run),
        # Of stages that are steps, the questions say it in steps.
        "speeds": speed_rows(run) if measured_by(arm_of(run)) == "epochs" else None,
        "layers": layer_rows(run),
        "agreement": agreement_rows(run),
        "attribution": attribution_rows(run),
        "similarity": similarity_rows(run),
        "claims": claims_rows(claims) if claims else None,
    }
    return page(
        "run.html.j2",
        title=f"Where does {name_of(next(iter(run.arms.values()))[0])} come back in {run.experiment.model}?",
        heading=brief.sentence(run),
        lead=brief.headline(run).plain,
        run=run,
        experiment=run.experiment,
        scores=_scores_of(run),
        draws=draws_row(run) if run.damage else "",
        overlap=numbers.overlap,
        lost=brief.never_back(run),
        answers=[
            (answer, VERDICT_COLOURS[answer.question.verdict], _interval_picture(answer))
            for answer in brief.answered(run)
        ],
        first=_first(run, draw),
        reading=_reading(run),
        new=_new(run),
        cards=_cards(run),
        sections=_sections(run, draw),
        tables=tables,
        whys=[(claim.id, claim.verdict, claim.why) for claim in claims],
        corrected=CORRECTED,
        heirs={name: [str(row) for row in rows] for name, rows in numbers.heirs.items()},
        settings=run.experiment.to_toml(),
        command=_command(run),
        versions=manifest.get("versions", {}),
        inputs=manifest.get("inputs", {}),
        notes=[*manifest.get("text", []), *numbers.notes],
        seconds=manifest.get("seconds", {}),
        memory=manifest.get("peak_rss_mb"),
    )


def _first(run: Run, draw: Drawing) -> dict[str, Picture | None]:
    """The pictures that the page begins with."""
    return {
        "curve": draw(plots.recovery_curves, run),
        "cut": draw(plots.pruned_share, run, says=lambda: captions.pruned_share(run)),
        "grafts": draw(plots.grafts, run),
        "blocked": draw(plots.blocked, run),
        "dose": draw(plots.dose, run),
    }


def _interval_picture(answer: brief.Answer) -> Markup:
    """The number that decides a question with its interval, and the band that is too small to count, as a small SVG."""
    number, bar = answer.question.number, answer.question.bar
    if number is None or number.interval is None:
        return Markup("")
    reach = 1.08 * max(abs(number.low), abs(number.high), bar)

    def at(value: float) -> str:
        return f"{60 + 58 * value / reach:.1f}"

    return Markup(
        '<svg viewBox="0 0 120 20" width="120" height="20" role="img" aria-label="{says}">'
        '<rect x="{low}" width="{wide:.1f}" y="1" height="18" class="bar"/>'
        '<line x1="60" x2="60" y1="0" y2="20" class="zero"/>'
        '<line x1="{a}" x2="{b}" y1="10" y2="10" class="reach" stroke="{colour}"/>'
        '<circle cx="{value}" cy="10" r="4.5" fill="{colour}"/></svg>'
    ).format(
        says=f"{answer.number}; too small to count up to {bar:g}", low=at(-bar), wide=116 * bar / reach,
        a=at(number.low), b=at(number.high), value=at(number.value), colour=VERDICT_COLOURS[answer.question.verdict],
    )  # fmt: skip


class Word(NamedTuple):
    """A word on the page, and what the model says of it at every stage."""

    text: str
    kind: str
    """`"concept"`, `"other"` (another label) or `""`."""
    right: list[bool]
    """By stage, whether the model says what is true; empty for a word without a label of which it never said any."""
    says: str
    """The same in words."""


class Read(NamedTuple):
    """Some sentences with what the model says of them, stage by stage."""

    stages: list[str]
    sentences: list[list[Word]]
    tops: list[tuple[str, list[tuple[str, list[tuple[str, bool]]]]]]
    """Of a language model: the words before the concept's first one and that word; by stage the likeliest tokens, and
    whether the word begins with them."""


def _reading(run: Run) -> Read | None:
    """A few held-out sentences as the concept arm's first seed reads them; None where they were not kept."""
    path = arm_of(run)[0]
    known = {stage: guesses for stage in path.stages if (guesses := path[stage].guesses) is not None}
    if not known:
        return None
    stages, by_stage = list(known), list(known.values())
    names = set(run.label) | {brief.name_of(path)}
    named = ["cut" if stage == PRUNED else stage for stage in stages]
    sentences, tops = [], []
    for i, words in enumerate(by_stage[0].words):
        line = []
        for k, (text, true) in enumerate(zip(words, by_stage[0].true[i], strict=True)):
            guesses = [each.said[i][k] for each in by_stage]
            kind = "concept" if true in names else "other" if true != OUTSIDE else ""
            if run.experiment.task == "tag":
                labels = [each[0] if each else OUTSIDE for each in guesses]
                shown = kind or any(each != OUTSIDE for each in labels)
                right = [each == true for each in labels] if shown else []
                line.append(Word(text, kind, right, "; ".join(f"{s}: {t}" for s, t in zip(named, labels, strict=True))))
            else:
                line.append(Word(text, kind if any(guesses) else "", [], ""))
        sentences.append(line)
        at = next((k for k, true in enumerate(by_stage[0].true[i]) if true in names and by_stage[0].said[i][k]), None)
        if run.experiment.task != "tag" and at is not None:
            guesses = [
                (s, [(token, bool(token) and words[at].startswith(token)) for token in each.said[i][at]])
                for s, each in zip(named, by_stage, strict=True)
            ]
            prompt = " ".join(words[:at]) + f" [{words[at]}]"
            if prompt not in dict(tops):
                tops.append((prompt, guesses))
    return Read(named, sentences, tops)


def _new(run: Run) -> list[tuple[str, list[tuple[str, list[tuple[str, bool]], list[tuple[str, bool]]]]]]:
    """Arm to the neurons that took over: name, words before and after, each with whether it carries the concept."""
    heirs = {name: run.numbers.heirs[name] for name in ("concept", "random") if run.numbers.heirs.get(name)}
    carries = {name: set(run.arms[name][0][BASE].concept_words) for name in heirs}
    return [
        (
            name,
            [
                (str(row.neuron), *([(word, word in carries[name]) for word in side] for side in (row.before, row.now)))
                for row in rows
            ],
        )
        for name, rows in heirs.items()
    ]  # pyright: ignore[reportReturnType]


class Card(NamedTuple):
    """One neuron as text: its words, and what it does at the words of a few sentences."""

    name: str
    was: str
    """`"carries it now"` or `"was cut"`."""
    before: list[tuple[str, bool]]
    """Its top words at base, each with whether it carries the concept; empty where they were not measured."""
    now: list[tuple[str, bool]]
    ranks: str
    sentences: list[list[tuple[str, str, str]]]
    """Word, colour by how far the activation is from the mean of all of these words, and the activation."""


CARDS = 8
"""Neurons of each kind that the page shows as text."""


def _cards(run: Run) -> list[Card]:
    """The neurons that carry the concept at the end, and some that were cut, at the words of the kept sentences."""
    path = arm_of(run)[0]
    kept, last = path.examples, path.stages[-1]
    if kept is None:
        return []
    base, end = path[BASE], path[last]
    survivors, cards = path.survivors(), []
    for was, at, among in (("carries it now", last, survivors), ("was cut", BASE, ~survivors)):
        score = path[at].saliency.score
        named = {str(neuron): neuron for neuron in among if str(neuron) in kept.neurons}
        place = {name: (path.site.layers.index(n.layer), n.index) for name, n in named.items()}
        for name in sorted(named, key=lambda name: -float(score[place[name]]))[:CARDS]:
            words = [
                []
                if each.words is None
                else [(word, word in base.concept_words) for word in each.words.of(named[name])]
                for each in (base, end)
            ]
            ranks = [f"{float(path[s].saliency.by_rank()[place[name]]):.3f} at {s}" for s in (BASE, last)]
            cards.append(Card(name, was, words[0], words[1], " → ".join(ranks), _coloured(kept.of(name))))
    return cards


def _coloured(sentences: Sequence[tuple[Sequence[str], Sequence[float]]]) -> list[list[tuple[str, str, str]]]:
    """Words on a colour that is the stronger the farther the activation is from the mean of all: orange above it."""
    values = np.array([value for _, each in sentences for value in each])
    middle = float(np.nanmean(values))
    reach = float(np.nanmax(np.abs(values - middle))) or 1.0

    def shade(value: float) -> str:
        far = (value - middle) / reach
        return "" if not abs(far) >= 0.1 else f"rgba({'212,85,0' if far > 0 else '94,60,153'},{0.6 * abs(far):.2f})"

    return [
        [(word, shade(value), f"{value:+.3g}") for word, value in zip(words, each, strict=True)]
        for words, each in sentences
    ]


def _sections(run: Run, draw: Drawing) -> list[tuple[str, str, list[Picture]]]:
    """What is folded: id, heading, and the pictures of what was measured."""

    def each(
        plot: Callable[..., Any], says: Callable[[], str], arms: Sequence[str], **how: Any
    ) -> list[Picture | None]:
        """A picture per arm, of which the first says what all show."""
        return [
            draw(plot, run, arm=name, small=len(arms) > 1, says=None if i else says, **how)
            for i, name in enumerate(arms)
        ]

    # Beside an arm in which nothing was cut, what training does by itself is taken off.
    twin = "unpruned" if "unpruned" in run.arms and len(run.arms) > 1 else None
    maps: dict[str, Any] = {"against": twin} if twin else {"selection": run.experiment.measure.selection}
    sections = [
        ("scores", "Every score, and how fast it came back", []),
        ("layers", "Where the concept sits, stage by stage",
            each(plots.layer_map, lambda: captions.layer_map(run, twin), [n for n in run.arms if n != twin], **maps)),
        ("neurons", "Which neurons carry it", [draw(plots.neuron_map, run, says=lambda: captions.neuron_map(run))]),
        ("moved", "Did its saliency move between layers?", [
            draw(plots.migration, run, says=lambda: captions.migrated(run)) if "concept" in run.arms else None]),
        ("owes", "What the output owes to each layer", [
            draw(plots.attribution, run, says=lambda: captions.attribution(run))]),
        ("same", "Are they still the same neurons?", each(plots.flow, lambda: captions.flow(run), list(run.arms))),
        ("meaning", "What the neurons stand for", [
            draw(plots.saliency_against_similarity, run, says=lambda: captions.saliency_against_similarity(run)),
            _card(draw, run)]),
        ("claims", "The paper's claims, beside their controls", [
            draw(plots.verdicts, run, says=lambda: captions.verdicts(run.numbers.claims, len(run.experiment.seeds)))]),
    ]  # fmt: skip
    return [(id, title, [p for p in pictures if p]) for id, title, pictures in sections]


class Compared(NamedTuple):
    """Several runs side by side."""

    names: list[str]
    warnings: list[str]
    """What keeps their numbers from being compared."""
    differ: Table
    """Settings that differ."""
    scores: Table
    """With intervals."""
    claims: Table | None


def compared(runs: Sequence[Run]) -> Compared:
    """The numbers of several runs side by side: the settings that differ, scores with intervals, claims.

    Raises:
        ValueError: fewer than two runs, or runs whose inputs changed in between.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(runs)}")
    names = _names(runs)
    verify.check_same_inputs({name: run.manifest for name, run in zip(names, runs, strict=True)})
    return Compared(
        names, list(_warnings(runs)), _settings_that_differ(runs, names), _scores_table(runs, names),
        _claims_table([run.numbers.claims for run in runs], names),
    )  # fmt: skip


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs side by side as HTML.

    Raises:
        ValueError: as `compared`.
    """
    beside = compared(runs)
    names, draw = beside.names, Drawing()
    curves = [
        draw(plots.recovery_curves, run, beside=runs, says=lambda run=run: captions.recovery(run)) for run in runs
    ]
    maps = [draw(plots.layer_map, run, arm=captions.explained(run), small=True) for run in runs]
    return page(
        "comparison.html.j2",
        title=f"{len(runs)} runs side by side",
        heading=f"{len(runs)} runs side by side",
        runs=list(zip(names, runs, strict=True)),
        warnings=beside.warnings,
        differ=beside.differ,
        scores=beside.scores,
        claims=beside.claims,
        curves=[(name, picture) for name, picture in zip(names, curves, strict=True) if picture],
        maps=[(name, picture) for name, picture in zip(names, maps, strict=True) if picture],
    )


class Drawing:
    """Draws the figures of one page; the first brings plotly.js along."""

    def __init__(self):
        self.n = 0

    def __call__(
        self,
        plot: Callable[..., Any],
        *data: Any,
        says: Callable[[], str] | None = None,
        small: bool = False,
        **how: Any,
    ) -> Picture | None:
        """A figure, or None where what it shows was not measured; `small` for one of several maps in a row."""
        try:
            figure = plot(*data, **how)
        except ValueError as error:
            # Of migration also a score with a sign, or no survivor: the text says so.
            if not isinstance(error, plots.NotMeasuredError) and plot is not plots.migration:
                raise
            return None
        title, note = (Markup(text.replace("<br>", "; ")) for text in plots.said(figure))
        # The page says these as text, which wraps on a phone, and has a slider that the keyboard reaches.
        steps = [step for slider in figure.layout.sliders for step in slider.to_plotly_json()["steps"]]
        figure.update_layout(title=None, dragmode=False, margin={"t": 44 if figure.layout.margin.t > 100 else 16})
        figure.layout.sliders = ()
        if small:
            figure.update_traces(showscale=False)  # every cell says its number
        id = f"figure-{self.n}"
        html = figure.to_html(
            full_html=False, include_plotlyjs=self.n == 0, div_id=id, default_width="100%",
            config={**plots.config(id), "modeBarButtons": [["toImage"]], "displaylogo": False},
        )  # fmt: skip
        if steps:
            html = _slider(id, steps) + Markup(html)
        self.n += 1
        asks, _, reads = (inspect.getdoc(plot) or "").partition("\n\nRaises:")[0].partition("\n\n")
        reads = Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(reads))))
        return Picture(Markup(html), title, note, asks, reads, says() if says else "")


def _slider(id: str, steps: Sequence[Mapping[str, Any]]) -> Markup:
    """A native range input for the steps of a plotly slider; the script at the end of the page makes it work."""
    labels = [str(step["label"]) for step in steps]
    data = json.dumps([[step["label"], step["method"], step["args"]] for step in steps], separators=(",", ":"))
    return Markup(
        '<div class="stage"><label for="{id}-stage">stage</label>'
        '<input type="range" id="{id}-stage" min="0" max="{last}" step="1" value="0" data-plot="{id}"'
        ' aria-valuetext="{first}"><output for="{id}-stage">{first}</output></div>'
        '<script type="application/json" id="{id}-steps">{data}</script>'
    ).format(id=id, last=len(steps) - 1, first=labels[0], data=Markup(data.replace("<", "\\u003c")))


def _card(draw: Drawing, run: Run) -> Picture | None:
    """One neuron close up: the one that gained most words of the concept, in the first arm that has any."""
    for name in [captions.explained(run), *run.arms]:
        if run.numbers.heirs[name]:
            neuron = str(run.numbers.heirs[name][0].neuron)
            says = (
                f"{neuron} gained most words of the concept among the neurons that are new in the top tenth of the "
                f"{name} arm. It was chosen for that after the fact, so it is an example and no evidence."
            )
            return draw(plots.neuron_card, run, neuron, arm=name, says=lambda says=says: says)
    return None


def _command(run: Run) -> str:
    """The command that repeats a run."""
    preset = next((name for name in presets.PRESETS if presets.preset(name) == run.experiment), None)
    return f"relearn-lens run {preset}" if preset else "relearn-lens run settings.toml"


def _names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its folder's where these differ, else numbered."""
    names = [Path(run.folder).name if run.folder else f"run {i}" for i, run in enumerate(runs, 1)]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """What keeps the runs' numbers from being compared."""
    for what, values in (
        ("concepts", {name_of(next(iter(run.arms.values()))[0]) for run in runs}),
        ("scores", {_scores_of(run).unit for run in runs}),
        ("texts", {tuple(v for k, v in run.manifest.get("inputs", {}).items() if k == "sentences:validation")
                   for run in runs}),
    ):  # fmt: skip
        if len(values) > 1:
            how = "" if what == "texts" else f" ({', '.join(sorted(map(str, values)))})"
            yield f"The runs are scored on different {what}{how}; their scores are not on one scale."


def _scores_of(run: Run) -> Any:
    arm = next(iter(run.arms.values()))[0]
    return arm[arm.stages[0]].scores


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _settings_that_differ(runs: Sequence[Run], names: Sequence[str]) -> Table:
    each = [_flat(run.experiment.model_dump(mode="json")) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in each for k in one) if len({repr(o.get(key)) for o in each}) > 1]

    def said(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)

    return ["setting", *names], [[key, *(said(one.get(key)) for one in each)] for key in keys]


def _scores_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Base, pruned and last stage of every arm, with the interval that each run asks for."""
    rows = []
    for arm in dict.fromkeys(name for run in runs for name in run.arms):
        for what in (BASE, PRUNED, "last"):
            cells = []
            for run in runs:
                arms = run.arms.get(arm, [])
                stage = arms[0].stages[-1] if arms and what == "last" else what
                there = arms and all(stage in each.stages for each in arms) and (what, stage) != ("last", PRUNED)
                scores = [each[stage].scores for each in arms] if there else []
                cells.append(_interval(plots.shown(run.label, scores, **run.interval)) if there else "")
            rows.append([arm, f"{what} stage", *cells])
    over = [f"{name}: {_scores_of(run).metric} of {name_of(next(iter(run.arms.values()))[0])}"
            for name, run in zip(names, runs, strict=True)]  # fmt: skip
    return ["arm", "", *over], rows


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None or not np.isfinite(estimate.value) else str(estimate)


def _claims_table(each: Sequence[Sequence[Claim]], names: Sequence[str]) -> Table | None:
    """Verdict and effect of every claim in every run."""
    by_id = [{claim.id: claim for claim in claims} for claims in each]
    rows = []
    for id, says in {claim.id: claim.says for claims in each for claim in claims}.items():
        cells = []
        for claims in by_id:
            claim = claims.get(id)
            cells += [claim.verdict, _interval(claim.effect)] if claim else ["", ""]
        rows.append([id, says, *cells])
    return (["", "claim", *(cell for name in names for cell in (name, "effect"))], rows) if rows else None


def page(template: str, **values: Any) -> str:
    """A template of the package's `data` folder with these values in it, every string escaped."""
    pages = Environment(loader=PackageLoader("relearn_lens.show"), autoescape=True, trim_blocks=True)
    return pages.get_template(template).render(**values)
