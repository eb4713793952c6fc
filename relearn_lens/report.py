"""One self-contained HTML page from a finished run, or from several side by side: no network, nothing but this file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment
from markupsafe import Markup, escape

from relearn_lens import captions, findings, plots, settings, store
from relearn_lens.claims import Claim
from relearn_lens.experiment import Run
from relearn_lens.intervals import Estimate
from relearn_lens.recovery import name_of
from relearn_lens.tables import draws_row, layer_rows, score_rows, summary
from relearn_lens.tracking import BASE, PRUNED

Table = tuple[list[str], list[list[str]]]


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
    """Write the page of a run; gives its path back."""
    path = Path(path)
    store.write_whole(path, render(run).encode())
    return path


def write_comparison(runs: Sequence[Run], path: str | Path) -> Path:
    """Write one page that puts runs side by side; gives its path back.

    Raises:
        ValueError: fewer than two runs.
    """
    path = Path(path)
    store.write_whole(path, render_comparison(runs).encode())
    return path


def render(run: Run) -> str:
    """The page of a run as HTML."""
    numbers = summary(run)
    found = findings.claims_of(run)
    manifest = run.manifest
    draw = _Drawing()
    arms = list(run.arms)
    heirs = {name: findings.heirs(run, name) for name in arms}
    sections = [
        ("cut", "Where it was cut", [draw(plots.pruned_share, run, says=lambda: captions.pruned_share(run))]),
        ("back", "How much is lost, and how much comes back", [
            draw(plots.recovery_curves, run, says=lambda: captions.recovery(run))]),
        ("layers", "Where the concept sits, stage by stage", [
            *(draw(plots.layer_map, run, selection=run.experiment.measure.selection, arm=name, small=len(arms) > 1, says=(lambda: captions.layer_map(run)) if not i else None)
              for i, name in enumerate(arms))]),
        ("neurons", "Which neurons carry it", [draw(plots.neuron_map, run, says=lambda: captions.neuron_map(run))]),
        ("moved", "Did it move?", [
            draw(plots.migration, run, says=lambda: captions.migrated(run)) if "concept" in arms else None]),
        ("owes", "What the output owes to each layer", [
            draw(plots.attribution, run, says=lambda: captions.attribution(run))]),
        ("same", "Are they still the same neurons?", [
            *(draw(plots.flow, run, arm=name, small=len(arms) > 1, says=(lambda: captions.flow(run)) if not i else None)
              for i, name in enumerate(arms))]),
        ("meaning", "What the neurons stand for", [
            draw(plots.saliency_against_similarity, run, says=lambda: captions.saliency_against_similarity(run)),
            _card(draw, run, heirs)]),
        ("claims", "The paper's claims, beside their controls", [
            draw(plots.verdicts, run, says=lambda: captions.verdicts(found, len(run.experiment.seeds)))]),
    ]  # fmt: skip
    tables: dict[str, Table | None] = {
        "f1": score_rows(run),
        "speeds": findings.speed_rows(run),
        "layers": layer_rows(run),
        "agreement": findings.agreement_rows(run),
        "attribution": findings.attribution_rows(run),
        "similarity": findings.similarity_rows(run),
        "claims": findings.claims_rows(found) if found else None,
    }
    return _page(
        _RUN,
        title=f"Where does {numbers['concept']} come back in {run.experiment.model}?",
        heading=Markup("Where does <em>{}</em> come back in {}?").format(numbers["concept"], run.experiment.model),
        run=run,
        experiment=run.experiment,
        scores=run.arms[arms[0]][0][BASE].scores,
        story=numbers["what_happened"],
        draws=draws_row(run),
        overlap=numbers["overlap_random_with_concept"],
        sections=[(id, title, [p for p in pictures if p]) for id, title, pictures in sections],
        tables=tables,
        whys=[(claim.id, claim.verdict, claim.why) for claim in found],
        corrected=findings.CORRECTED,
        heirs=heirs,
        settings=run.experiment.to_toml(),
        command=_command(run),
        versions=manifest.get("versions", {}),
        inputs=manifest.get("inputs", {}),
        notes=[*manifest.get("text", []), *manifest.get("notes", [])],
        seconds=manifest.get("seconds", {}),
        memory=manifest.get("peak_rss_mb"),
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs side by side as HTML: the settings that differ, scores with intervals, claims.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(runs)}")
    names = _names(runs)
    draw = _Drawing()
    curves = [draw(plots.recovery_curves, run, says=lambda run=run: captions.recovery(run)) for run in runs]
    maps = [draw(plots.layer_map, run, arm=captions.told(run), small=True) for run in runs]
    return _page(
        _COMPARISON,
        title=f"{len(runs)} runs side by side",
        heading=f"{len(runs)} runs side by side",
        runs=list(zip(names, runs, strict=True)),
        warnings=_warnings(runs),
        differ=_settings_that_differ(runs, names),
        scores=_scores_table(runs, names),
        claims=_claims_table([findings.claims_of(run) for run in runs], names),
        curves=[(name, picture) for name, picture in zip(names, curves, strict=True) if picture],
        maps=[(name, picture) for name, picture in zip(names, maps, strict=True) if picture],
    )


class _Drawing:
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
        except plots.NotMeasuredError:
            return None
        except ValueError:
            if plot is not plots.migration:  # a score with a sign, or no survivor: the text says so
                raise
            return None
        title, note = (Markup(text.replace("<br>", "; ")) for text in plots.said(figure))
        # The page says these as text, which wraps on a phone, and has a slider that the keyboard reaches.
        steps = [step for slider in figure.layout.sliders for step in slider.to_plotly_json()["steps"]]
        figure.update_layout(title=None, dragmode=False)
        figure.layout.sliders = ()
        if small:
            figure.update_traces(showscale=False)  # every cell says its number
        margin = figure.layout.margin
        figure.update_layout(margin={"t": 44 if margin.t > 100 else 16})
        id = f"figure-{self.n}"
        html = figure.to_html(
            full_html=False, include_plotlyjs=self.n == 0, div_id=id, default_width="100%",
            config={"displayModeBar": False, "responsive": True},
        )  # fmt: skip
        if steps:
            html = _slider(id, steps) + Markup(html)
        self.n += 1
        asks, _, reads = (inspect.getdoc(plot) or "").partition("\n\n")
        reads = reads.partition("\n\nRaises:")[0]
        return Picture(Markup(html), title, note, asks, _as_html(reads), says() if says else "")


def _slider(id: str, steps: Sequence[Mapping[str, Any]]) -> Markup:
    """A native range input for the steps of a plotly slider; the script at the end of the page makes it work."""
    labels = [str(step["label"]) for step in steps]
    data = json.dumps([[step["label"], step["method"], step["args"]] for step in steps], separators=(",", ":"))
    return Markup(
        '<div class="stage"><label for="{id}-stage">stage</label><input type="range" id="{id}-stage" min="0" max="{last}"'
        ' step="1" value="0" data-plot="{id}" aria-valuetext="{first}"><output for="{id}-stage">{first}</output></div>'
        '<script type="application/json" id="{id}-steps">{data}</script>'
    ).format(id=id, last=len(steps) - 1, first=labels[0], data=Markup(data.replace("<", "\\u003c")))


def _as_html(text: str) -> Markup:
    """A docstring's text: code between backticks."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _card(draw: _Drawing, run: Run, heirs: Mapping[str, list[str]]) -> Picture | None:
    """One neuron close up: the one that gained most words of the concept, in the first arm that has any."""
    for name in [captions.told(run), *run.arms]:
        if heirs.get(name):
            neuron = heirs[name][0].partition(":")[0]
            says = (
                f"{neuron} gained most words of the concept among the neurons that are new in the top tenth of the "
                f"{name} arm. It was chosen for that after the fact, so it is an example and no evidence."
            )
            return draw(plots.neuron_card, run, neuron, arm=name, says=lambda says=says: says)
    return None


def _command(run: Run) -> str:
    """The command that repeats a run."""
    preset = next((name for name in settings.PRESETS if settings.preset(name) == run.experiment), None)
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
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


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
                there = arms and all(stage in each.stages for each in arms)
                cells.append(_told([each[stage].scores for each in arms], run) if there else "")
            rows.append([arm, f"{what} stage", *cells])
    over = [f"{name}: {_scores_of(run).metric} of {name_of(next(iter(run.arms.values()))[0])}"
            for name, run in zip(names, runs, strict=True)]  # fmt: skip
    return ["arm", "", *over], rows


def _told(scores: Sequence[Any], run: Run) -> str:
    return _interval(plots.shown(run.label, scores, **run.interval))


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or not np.isfinite(estimate.value):
        return ""
    return str(estimate)


def _claims_table(each: Sequence[Sequence[Claim]], names: Sequence[str]) -> Table | None:
    """Verdict and effect of every claim in every run."""
    by_id = [{claim.id: claim for claim in found} for found in each]
    rows = []
    for id, says in {claim.id: claim.says for found in each for claim in found}.items():
        cells = []
        for found in by_id:
            claim = found.get(id)
            cells += [claim.verdict, _interval(claim.effect)] if claim else ["", ""]
        rows.append([id, says, *cells])
    header = ["", "claim", *(cell for name in names for cell in (name, "effect"))]
    return (header, rows) if rows else None


def _page(body: str, **values: Any) -> str:
    return Environment(autoescape=True, trim_blocks=True).from_string(_HEAD + _MACROS + body + _FOOT).render(**values)


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} - relearn-lens</title>
<style>
:root { --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --box: #f4f5f7; --mark: #b54708; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e8ea; --soft: #a4adb6; --line: #3a4149; --box: #1e2226; --mark: #ff9b54; --link: #8ab4f8; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; color-scheme: light dark; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .1rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, input:focus-visible, .scroll:focus-visible, pre:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -999px; } .skip:focus { left: 1rem; top: .5rem; background: var(--page); padding: .4rem .8rem; z-index: 9; }
.lead, .note, small { color: var(--soft); } .note { font-size: .82rem; margin: 0 0 .4rem; }
.story { border-left: 4px solid var(--mark); padding: .1rem 0 .1rem 1rem; font-size: 1.06rem; }
.warning { border-left: 4px solid #d55e00; padding-left: 1rem; }
nav ol { columns: 2 16rem; padding-left: 1.4rem; margin: .3rem 0; font-size: .94rem; }
.two { --least: 24rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 18.5rem)), 1fr)); gap: 1rem; }
figure { margin: 1.2rem 0; min-width: 0; } .grid figure { margin: .4rem 0; }
figcaption p { margin: .3rem 0; } figure details { font-size: .88rem; color: var(--soft); margin: .2rem 0; }
summary { cursor: pointer; padding: .15rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.first td { border-top: 2px solid var(--line); } td.long { white-space: normal; min-width: 15rem; }
pre { overflow-x: auto; background: var(--box); padding: .8rem; font-size: .84rem; } code { font-size: .88em; overflow-wrap: anywhere; }
.stage { display: flex; gap: .8rem; align-items: center; flex-wrap: wrap; margin: .3rem 0; }
.stage input { flex: 1 1 12rem; min-width: 8rem; accent-color: var(--mark); height: 1.6rem; } .stage output { min-width: 6rem; font-weight: 600; }
/* Figures are drawn in greys that any page can show; here the page's own ink is better. */
.js-plotly-plot .main-svg [class$="tick"] text, .js-plotly-plot .main-svg .cbaxis text,
.js-plotly-plot .main-svg .legendtext, .js-plotly-plot .main-svg .annotation-text { fill: var(--ink) !important; }
.js-plotly-plot .main-svg .xtitle, .js-plotly-plot .main-svg .ytitle, .js-plotly-plot .main-svg [class*="title"] text,
.js-plotly-plot .main-svg .x2title, .js-plotly-plot .main-svg .y2title, .js-plotly-plot .main-svg .x3title,
.js-plotly-plot .main-svg .y3title, .js-plotly-plot .main-svg .cbtitle text, .js-plotly-plot .main-svg .table text { fill: var(--soft) !important; }
@media print { nav, .skip { display: none; } details > * { display: block; } }
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{{ heading }}</h1>
"""

_MACROS = """
{% macro table(data, says, long=false) %}<div class="scroll" tabindex="0" role="region" aria-label="{{ says }}"><table>
<thead><tr>{% for cell in data[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in data[1] %}
<tr{% if not loop.first and row[:1] != data[1][loop.index0 - 1][:1] and not long %} class="first"{% endif %}>
{% for cell in row %}<td{% if long and loop.index == 2 %} class="long"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
{% macro picture(p, head=true, whole=true) %}<figure role="group" aria-label="{{ p.title | striptags }}"><figcaption>
<h3>{{ p.title if whole else p.title.split(': ')[-1] }}</h3><p class="note">{{ p.note }}</p>
{% if p.says %}<p>{{ p.says }}</p>{% endif %}</figcaption>
{{ p.html }}
{% if head %}<details><summary>How to read it: {{ p.asks }}</summary><p>{{ p.reads }}</p></details>{% endif %}</figure>{% endmacro %}
"""

_RUN = """
<p class="lead">{{ experiment.corpus }}, site {{ experiment.site }}, score {{ experiment.score }}, {{ '%g' % (100 * experiment.prune.fraction) }} %
of the neurons pruned, seed(s) {{ experiment.seeds | join(', ') }}, arms {{ run.arms | join(', ') }}.</p>
<p class="story">{{ story }}</p>
<nav aria-label="Contents"><ol>{% for id, title, pictures in sections %}
{% if pictures or id in ('moved', 'claims') and run.arms.concept %}<li><a href="#{{ id }}">{{ title }}</a></li>{% endif %}{% endfor %}
<li><a href="#repeat">How to repeat it</a></li></ol></nav></header>
<main id="main">
<p>The model is fine-tuned, the neurons that carry the concept most are cut out, and training goes on. Every number stands beside
<em>controls</em> that went through the same: {% if 'random' in run.arms %}the random arm lost neurons that were drawn by chance{% endif %}
{% if 'random' in run.arms and 'unpruned' in run.arms %}; {% endif %}{% if 'unpruned' in run.arms %}the unpruned arm lost none{% endif %}
{% if 'random' not in run.arms and 'unpruned' not in run.arms %}this run has none, so it is a description{% endif %}. What a control shows
too is not about the concept.</p>
{% for id, title, pictures in sections %}
{% if pictures or id in ('moved', 'claims') and run.arms.concept %}
<section aria-labelledby="{{ id }}"><h2 id="{{ id }}">{{ title }}</h2>
{% if pictures | length > 1 and id in ('layers', 'same') %}
<p>{{ pictures[0].says }}</p>
<details><summary>How to read it: {{ pictures[0].asks }}</summary><p>{{ pictures[0].reads }}</p></details>
<div class="grid">{% for p in pictures %}{{ picture(p._replace(says=''), head=false, whole=false) }}{% endfor %}</div>
{% else %}{% for p in pictures %}{{ picture(p) }}{% endfor %}{% endif %}
{% if id == 'cut' and tables.agreement[1] %}<h3>Do other scores agree with the one that chose?</h3>{{ table(tables.agreement, 'Agreement of the scores') }}{% endif %}
{% if id == 'back' %}
<p>{{ draws }}{% if overlap is not none %} Where pruning takes most of a layer, any random set overlaps with it: the random arm shares
{{ '%.0f' % (100 * overlap) }} % of its neurons with the concept arm.{% endif %}</p>
{{ table(tables.f1, 'Scores of every arm and stage') }}{{ table(tables.speeds, 'How fast each arm came back') }}
<p><small>{{ scores.unit[0] | upper }}{{ scores.unit[1:] }}; means over seeds. A stage is <em>base</em>, <em>pruned</em>, or epochs of retraining.</small></p>{% endif %}
{% if id == 'layers' %}<details><summary>All numbers by layer</summary>{{ table(tables.layers, 'Numbers by layer') }}
<p><small>Mean rank saliency, 1 the most salient neuron and 0 the least. <em>matched</em>: survivors ranked among themselves;
<em>all</em>: all neurons, where pruned ones rank last by construction.</small></p></details>{% endif %}
{% if id == 'moved' and not pictures %}<p>This score cannot be shared out over layers, or no neuron survived in both arms: not drawn.</p>{% endif %}
{% if id == 'owes' %}<details><summary>The numbers</summary>{{ table(tables.attribution, 'Attribution by layer') }}
<p><small>Share of each layer in the summed size of its neurons' attributions ({{ experiment.measure.target }}, per concept word).
<em>output change</em>: what the path from the reference input to the text adds; <em>completeness error</em>: the largest difference between
that and a layer's sum, as a share of it. Only a layer of <code>resid</code> must account for all of it.</small></p></details>{% endif %}
{% if id == 'same' %}<details><summary>The numbers</summary>{{ table(tables.similarity, 'Activation similarity by layer') }}
<p><small>Activations over the same words, base model against the last stage of each arm. CKA is the biased estimator: with fewer words than
neurons in a layer it is near 1 whatever the models.</small></p></details>{% endif %}
{% if id == 'meaning' %}
{% for name, lines in heirs.items() if lines %}{% if loop.first %}<h3>Top words at base &gt; at the end</h3>
<p>Of surviving neurons that are new in the top tenth for the concept; those that gained most concept words first.</p>{% endif %}
<details{% if loop.first %} open{% endif %}><summary>{{ name }} arm</summary><ul>{% for line in lines %}<li><code>{{ line }}</code></li>{% endfor %}</ul></details>{% endfor %}{% endif %}
{% if id == 'claims' and tables.claims %}{{ table(tables.claims, 'Claims', long=true) }}
<details><summary>Why, claim by claim</summary><ul>{% for id, verdict, why in whys %}<li><b>{{ id }}: {{ verdict }}.</b> {{ why }}</li>{% endfor %}</ul></details>
<p><small>{{ corrected }}</small></p>{% endif %}
</section>{% endif %}{% endfor %}
<section aria-labelledby="repeat"><h2 id="repeat">How to repeat it</h2>
<p><code>{{ command }}</code>{% if run.folder %}, or the same with the settings below as <code>settings.toml</code>{% else %} with{% endif %}</p>
<pre tabindex="0">{{ settings }}</pre>
<details open><summary>Text, versions, time and memory</summary>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<p>{% for name, version in versions.items() %}{{ name }} {{ version }}{% if not loop.last %} · {% endif %}{% endfor %}</p>
<p>{% for name, s in seconds.items() %}{{ name }} {{ '%.0f' % s }} s{% if not loop.last %} · {% endif %}{% endfor %};
peak memory {{ memory }} MB</p></details>
<details><summary>sha256 of every input</summary>
<p>{% for name, digest in inputs.items() %}{{ name }}<br><code>{{ digest }}</code><br>{% endfor %}</p></details></section>
</main>
"""

_COMPARISON = """
<p class="lead">{% for name, run in runs %}{{ name }}: {{ run.experiment.model }}, {{ run.experiment.corpus }}, concept {{ run.experiment.labels | join('+') }}{% if not loop.last %} · {% endif %}{% endfor %}.</p>
{% for line in warnings %}<p class="warning">{{ line }}</p>{% endfor %}
<nav aria-label="Contents"><ol><li><a href="#settings">Settings that differ</a></li><li><a href="#scores">Scores</a></li>
<li><a href="#maps">Where the concept sits</a></li>{% if claims %}<li><a href="#claims">Claims</a></li>{% endif %}</ol></nav></header>
<main id="main">
<section aria-labelledby="settings"><h2 id="settings">Settings that differ</h2>
{% if differ[1] %}{{ table(differ, 'Settings that differ') }}{% else %}<p>None.</p>{% endif %}</section>
<section aria-labelledby="scores"><h2 id="scores">Scores</h2>
{{ table(scores, 'Scores of every run') }}
<p><small>Means over seeds with intervals: over seeds where a run has several, else over sentences. Two intervals that do not overlap differ;
two that do may differ still.</small></p>
<div class="grid two">{% for name, p in curves %}<div><h3>{{ name }}</h3>{{ picture(p, head=loop.first) }}</div>{% endfor %}</div></section>
<section aria-labelledby="maps"><h2 id="maps">Where the concept sits, stage by stage</h2>
<div class="grid two">{% for name, p in maps %}<div><h3>{{ name }}</h3>{{ picture(p, head=loop.first) }}</div>{% endfor %}</div></section>
{% if claims %}<section aria-labelledby="claims"><h2 id="claims">The paper's claims</h2>{{ table(claims, 'Claims in every run', long=true) }}</section>{% endif %}
</main>
"""

_FOOT = """
<script>
// Drawn while the page was still coming in: by now every figure knows its room.
addEventListener('load', function () { document.querySelectorAll('.js-plotly-plot').forEach(Plotly.Plots.resize); });
document.querySelectorAll('input[data-plot]').forEach(function (input) {
  var id = input.dataset.plot, steps = JSON.parse(document.getElementById(id + '-steps').textContent);
  input.value = 0;  // a browser keeps the old one when the page is loaded again
  input.addEventListener('input', function () {
    var step = steps[+input.value];
    input.nextElementSibling.textContent = step[0];
    input.setAttribute('aria-valuetext', step[0]);
    Plotly[step[1]].apply(null, [document.getElementById(id)].concat(step[2]));
  });
});
</script>
</body>
</html>
"""
