"""One self-contained HTML page from a finished run: no network, nothing but this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from relearn_lens import findings, plots, store
from relearn_lens.experiment import Run
from relearn_lens.tables import draws_row, f1_rows, layer_rows, summary


def write_report(run: Run, path: str | Path) -> Path:
    """Write the page of a run; gives its path back."""
    path = Path(path)
    store.write_whole(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page of a run as HTML."""
    figures = [plots.recovery_curves(run), plots.pruned_share(run.arms)]
    figures += [plots.layer_map(arms) for arms in run.arms.values()]
    numbers = summary(run)
    f1, layers = f1_rows(run), layer_rows(run)
    found = findings.claims_of(run)
    manifest = run.manifest
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=f"{numbers['concept']} in {run.experiment.model}",
            experiment=run.experiment,
            story=numbers["what_happened"],
            draws=draws_row(run),
            overlap=numbers["overlap_random_with_concept"],
            figures=[_figure(figure, first=i == 0) for i, figure in enumerate(figures)],
            f1=f1,
            layers=layers,
            claims=findings.claims_rows(found) if found else None,
            whys=[(claim.id, claim.verdict, claim.why) for claim in found],
            corrected=findings.CORRECTED,
            speeds=findings.speed_rows(run),
            attribution=findings.attribution_rows(run),
            agreement=findings.agreement_rows(run),
            similarity=findings.similarity_rows(run),
            heirs={name: findings.heirs(run, name) for name in run.arms},
            moves=[found["says"] for found in numbers["migration"].values()],
            settings=run.experiment.to_toml(),
            versions=manifest.get("versions", {}),
            inputs=manifest.get("inputs", {}),
            notes=[*manifest.get("text", []), *manifest.get("notes", [])],
            seconds=manifest.get("seconds", {}),
            memory=manifest.get("peak_rss_mb"),
        )
    )


def _figure(figure: Any, *, first: bool) -> Markup:
    """A figure as HTML; the first brings plotly.js along. Plotly escapes what is in the figure."""
    html = figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False, "responsive": True})
    return Markup(html)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - relearn-lens</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.story { border-left: 4px solid #D55E00; padding-left: 1rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid rgba(128,128,128,.3); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.first td { border-top: 2px solid rgba(128,128,128,.6); }
pre { overflow-x: auto; background: rgba(128,128,128,.12); padding: .8rem; font-size: .85rem; }
code.hash { font-size: .75rem; word-break: break-all; }
small { color: #777; }
</style>
</head>
<body>
<h1>Where does <em>{{ title }}</em> come back?</h1>
<p>{{ experiment.corpus }}, site {{ experiment.site }}, score {{ experiment.score }}, {{ '%g' % (100 * experiment.prune.fraction) }} % of
the neurons pruned, seed(s) {{ experiment.seeds | join(', ') }}.</p>
<p class="story">{{ story }}</p>

<h2>How much is lost, and how much comes back</h2>
{{ figures[0] }}
<p>{{ draws }}{% if overlap is not none %} Where pruning takes most of a layer, any random set overlaps with it: the random arm shares
{{ '%.0f' % (100 * overlap) }} % of its neurons with the concept arm.{% endif %}</p>
{% macro table(data) %}<div class="scroll"><table>
<thead><tr>{% for cell in data[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in data[1] %}<tr{% if not loop.first and row[:1] != data[1][loop.index0 - 1][:1] %} class="first"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endmacro %}
{{ table(f1) }}
{{ table(speeds) }}
<p><small>Strict span F1 (nervaluate), means over seeds. A stage is <em>base</em>, <em>pruned</em>, or epochs of retraining.</small></p>

<h2>Where it was cut</h2>
{{ figures[1] }}

<h2>Where the concept sits, stage by stage</h2>
<p>Among the neurons that survived pruning, on both sides of it. A move counts only where the control arms do not show it.</p>
{% for figure in figures[2:] %}{{ figure }}{% endfor %}
<details><summary>All numbers by layer</summary>
{{ table(layers) }}
<p><small>Mean rank saliency, 1 the most salient neuron and 0 the least. <em>matched</em>: survivors ranked among themselves;
<em>all</em>: all neurons, where pruned ones rank last by construction.</small></p></details>

{% if moves %}<h2>Did it move?</h2>
<ul>{% for line in moves %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}

{% if claims %}<h2>The paper's claims, against the controls</h2>
{{ table(claims) }}
<ul>{% for id, verdict, why in whys %}<li><b>{{ id }}: {{ verdict }}.</b> {{ why }}</li>{% endfor %}</ul>
<p><small>{{ corrected }}</small></p>{% endif %}

{% if attribution[1] %}<h2>What the output owes to each layer</h2>
{{ table(attribution) }}
<p><small>Share of each layer in the summed size of its neurons' attributions ({{ experiment.measure.target }}, per concept word).
<em>output change</em>: what the path from the reference input to the text adds; <em>completeness error</em>: the largest difference between
that and a layer's sum, as a share of it. Only a layer of <code>resid</code> must account for all of it: MLP units are by-passed.</small></p>{% endif %}

{% if agreement[1] %}<h2>Do the scores agree?</h2>
{{ table(agreement) }}{% endif %}

{% if similarity[1] %}<h2>Are they still the same neurons?</h2>
{{ table(similarity) }}
<p><small>Activations over the same words, base model against the last stage of each arm. What the unpruned arm shows is what training on
does by itself. CKA is the biased estimator: with fewer words than neurons in a layer it is near 1 whatever the models.</small></p>{% endif %}

{% for name, lines in heirs.items() if lines %}{% if loop.first %}<h2>What the new neurons stand for</h2>
<p>Top words at base &gt; at the end, of surviving neurons that are new in the top tenth for the concept; those that gained most concept words first.</p>{% endif %}
<h3>{{ name }} arm</h3>
<ul>{% for line in lines %}<li><code>{{ line }}</code></li>{% endfor %}</ul>{% endfor %}

<h2>How to repeat it</h2>
<p><code>relearn-lens run settings.toml</code> with</p>
<pre>{{ settings }}</pre>
<details><summary>Text, versions, time and hashes</summary>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<p>{% for name, version in versions.items() %}{{ name }} {{ version }}{% if not loop.last %} · {% endif %}{% endfor %}</p>
<p>{% for name, s in seconds.items() %}{{ name }} {{ '%.0f' % s }} s{% if not loop.last %} · {% endif %}{% endfor %};
peak memory {{ memory }} MB</p>
<p>{% for name, digest in inputs.items() %}{{ name }}<br><code class="hash">{{ digest }}</code><br>{% endfor %}</p></details>
</body>
</html>
"""
