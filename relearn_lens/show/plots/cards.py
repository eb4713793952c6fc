"""Figures to read like a page: everything about one neuron, and every claim beside its control."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from relearn_lens.analysis.claims import Claim
from relearn_lens.find.saliency import dprime_of_each
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.neurons.sites import Neuron
from relearn_lens.runs.results import Run
from relearn_lens.show.plots.style import (
    ARM_COLOURS,
    ARM_DASHES,
    DIVERGING,
    GRID,
    INK,
    TEXT,
    VERDICT_COLOURS,
    NotMeasuredError,
    about,
    arm_of,
    clipped,
    concept,
    dressed,
    of_seed,
    safe,
    whole,
)

Example = tuple[Sequence[str], Sequence[float | int]]
"""The words of a sentence, and the neuron's activation on each."""

VERDICTS = {
    "supported": (VERDICT_COLOURS["supported"], "circle"),
    "reversed": (VERDICT_COLOURS["reversed"], "diamond"),
    "not supported": (VERDICT_COLOURS["not supported"], "square"),
    "inconclusive": (VERDICT_COLOURS["inconclusive"], "circle-open"),
}
"""Colour and symbol of a verdict: told apart by either alone."""


def neuron_card(
    run: Run, neuron: str | tuple[str, int], *, arm: str = "concept", seed: int | None = None,
    examples: Sequence[Example] = (),
) -> go.Figure:  # fmt: skip
    """What is this neuron, what did it tell apart before and after, and which words drive it?

    Upper left: its rank saliency at every stage, in every arm (1 the most salient of all neurons); crosses are an arm
    that pruned it, after which it may grow back. Upper right: how well it tells each class of words from all others
    (d', in standard deviations, signed), at base and at the last stage. Below: its top words at every stage where they
    were measured. `examples` (words and activations, see `explore.examples`) are drawn as rows of words, coloured by
    how far the activation is from the mean of those drawn; by default those that the run kept of 50 neurons, at the
    last stage. Of other neurons the note says that there are none. A bar that is missing is a class without words.

    Raises:
        ValueError: a name that is no neuron of this run's site, an unknown arm or seed.
    """
    arms = arm_of(whole(run), arm)
    path = of_seed(arms, seed)
    where = neuron_of(path, neuron)
    examples = examples or (path.examples.of(where) if path.examples is not None else ())
    layer, index = path.site.layers.index(where.layer), where.index
    figure = make_subplots(
        2 + bool(examples), 2, vertical_spacing=0.2, horizontal_spacing=0.16,
        row_heights=[0.42, 0.33, 0.25] if examples else [0.55, 0.45],
        specs=[[{}, {}], [{"type": "table", "colspan": 2}, None], *([[{"colspan": 2}, None]] if examples else [])],
        subplot_titles=["rank saliency by stage", "tells classes apart", "", "example sentences"][: 3 + bool(examples)],
    )  # fmt: skip
    for name, each in run.arms.items():
        theirs = next((one for one in each if one.seed == path.seed), each[0])
        cut = theirs.removed is not None and where in theirs.removed
        stages = list(theirs.stages)
        figure.add_scatter(
            x=stages, y=[float(theirs[s].saliency.by_rank(theirs.there(s))[layer, index]) for s in stages],
            mode="lines+markers",
            name=f"{safe(name)} arm" + " (pruned)" * cut, marker={"size": 8, "symbol": "x" if cut else "circle"},
            line={"color": ARM_COLOURS.get(name, INK), "dash": ARM_DASHES.get(name, "solid"), "width": 2.5},
            hovertemplate="%{x}: %{y:.3f}<extra>" + safe(name) + "</extra>", row=1, col=1,
        )  # fmt: skip
    for stage, look in ((path.stages[0], {"color": INK}), (path.stages[-1], {"color": ARM_COLOURS.get(path.arm, INK)})):
        names, values = separations(path[stage], layer, index)
        figure.add_bar(
            x=[safe(name) for name in names], y=values, name=f"stage {safe(stage)}", marker=look,
            hovertemplate="%{x}: d' %{y:+.2f}<extra>stage " + safe(stage) + "</extra>", row=1, col=2,
        )  # fmt: skip
    rows = [
        (safe(stage), ", ".join(safe(clipped(w)) for w in top.of(where)) or "none")
        for stage in path.stages
        if (top := path[stage].words) is not None
    ]
    rows = rows or [("", "top words were not measured (measure.what with top_words)")]
    figure.add_table(
        header={"values": ["stage", "top words, highest first"], "align": "left", "fill_color": "rgba(0,0,0,0)",
                "line_color": GRID, "font": {"color": TEXT}},
        cells={"values": [list(column) for column in zip(*rows, strict=True)], "align": "left",
               "fill_color": "rgba(0,0,0,0)", "line_color": GRID, "font": {"color": TEXT}, "height": 26},
        columnwidth=[1, 6], row=2, col=1,
    )  # fmt: skip
    _draw_examples(figure, examples)
    here = "pruned in this arm" if path.removed is not None and where in path.removed else "not pruned in this arm"
    missing = "" if examples else "<br>without example sentences: the run keeps activations of 50 neurons"
    dressed(
        figure,
        f"Neuron {safe(where)} and {concept(arms)}: {safe(path.arm or 'arm')} arm",
        f"{here}; {about(run, arms)}" + (f", seed {path.seed} drawn" if len(arms) > 1 else "") + missing,
        height=660 if examples else 500,
    ).update_layout(barmode="group", legend_y=-0.06, margin={"t": 125 if examples else 140})
    figure.update_xaxes(type="category", row=1, col=1)
    figure.update_yaxes(title_text="rank (1 highest)", range=[-0.03, 1.03], row=1, col=1)
    figure.update_yaxes(title_text="d' (sd)", zeroline=True, row=1, col=2)
    return figure.update_annotations(font={"size": 13, "color": TEXT})


def neuron_of(path: Trajectory, neuron: str | tuple[str, int]) -> Neuron:
    """A neuron by name (`L4N217`) or as (layer, index).

    Raises:
        ValueError: a name that is not of that form, or a neuron that the site does not have.
    """
    site = path.site
    if isinstance(neuron, str):
        neuron = Neuron.named(neuron)
    layer, index = str(neuron[0]), int(neuron[1])
    if layer not in site.layers or not 0 <= index < site.width:
        raise ValueError(
            f"{site.name} of this run has no neuron {index} in layer {layer!r}; layers {', '.join(site.layers)}, "
            f"neurons 0 to {site.width - 1}"
        )
    return Neuron(layer, index)


def separations(snapshot: Snapshot, layer: int, index: int) -> tuple[list[str], list[float | None]]:
    """Signed d' of each class of words against all others, for one neuron; None for a class without words."""
    stats = snapshot.stats
    both = (stats.count > 0) & (stats.count < stats.count.sum())
    signed = dprime_of_each(stats)[:, layer, index]
    return list(stats.class_names), [float(d) if known else None for d, known in zip(signed, both, strict=True)]


def _draw_examples(figure: go.Figure, examples: Sequence[Example]) -> None:
    """Rows of words, coloured by activation."""
    if not examples:
        return
    figure.update_xaxes(visible=False, row=3, col=1).update_yaxes(visible=False, row=3, col=1)
    longest = max(len(words) for words, _ in examples)
    text = [[safe(clipped(w, 12)) for w in words] + [""] * (longest - len(words)) for words, _ in examples]
    values = [[*map(float, values)] + [np.nan] * (longest - len(values)) for _, values in examples]
    centred = np.array(values) - np.nanmean(values)
    reach = float(np.nanmax(np.abs(centred))) or 1.0
    figure.add_heatmap(
        z=centred[::-1], text=text[::-1], texttemplate="%{text}", colorscale=DIVERGING, zmid=0, zmin=-reach, zmax=reach,
        showscale=False, hoverongaps=False, hovertemplate="%{text}: %{z:+.3f} from the mean<extra></extra>",
        row=3, col=1,
    )  # fmt: skip


def verdicts(data: Run | Sequence[Claim]) -> go.Figure:
    """Which of the paper's claims hold in this run, once each stands beside its control?

    A table with a row per claim in the colour of its verdict: what is claimed, and a small interval. The dot is the
    measured effect in units of the claim's own bar, the
    smallest effect that counts: right is the direction of the claim, and the grey band from -1 to 1 is too small to
    count. The verdict follows from where the interval lies: beyond the band to the right *supported*, to the left
    *reversed*, inside it *not supported*, anything else, or no interval (a training claim with fewer than three seeds),
    *inconclusive*. The scale is drawn together towards its ends. A row without a dot was not measured.

    Raises:
        ValueError: there is no claim (a run without a concept arm), or it is no run.
    """
    claims = list(data) if isinstance(data, Sequence) else whole(data).numbers.claims
    if not claims:
        raise NotMeasuredError("claims are about pruning a concept, and this run has no concept arm")
    height = dict(zip([claim.id for claim in claims], range(len(claims), 0, -1), strict=True))
    figure = go.Figure()
    figure.add_vrect(x0=-_drawn_at(1), x1=_drawn_at(1), fillcolor="rgba(128,128,128,0.22)", line_width=0, layer="below")
    end = _drawn_at(3.5)
    for verdict, (colour, symbol) in VERDICTS.items():
        here = [claim for claim in claims if claim.verdict == verdict]
        if not here:
            continue
        at = np.array([[_drawn_at(_bars(claim, part)) for part in ("value", "low", "high")] for claim in here])
        end = max(end, 1.08 * float(np.nan_to_num(np.abs(at)).max()))
        figure.add_scatter(
            x=at[:, 0], y=[height[claim.id] for claim in here], mode="markers", name=verdict,
            marker={"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2, "color": colour}},
            error_x={"type": "data", "array": at[:, 2] - at[:, 0], "arrayminus": at[:, 0] - at[:, 1], "color": colour,
                     "thickness": 3, "width": 0},
            customdata=[[safe(c.effect), f"{c.bar:g}", safe(c.measures), _p(c)] for c in here],
            hovertemplate="effect %{customdata[0]}, bar %{customdata[1]}<br>%{customdata[2]}%{customdata[3]}"
            f"<extra>{verdict}</extra>",
        )  # fmt: skip
    for claim in claims:
        figure.add_shape(
            type="rect", xref="paper", x0=0, x1=1, y0=height[claim.id] - 0.46, y1=height[claim.id] + 0.46,
            fillcolor=VERDICT_COLOURS[claim.verdict], opacity=0.16, line_width=0, layer="below",
        )  # fmt: skip
        figure.add_annotation(
            x=0.008, xref="paper", xanchor="left", y=height[claim.id], yanchor="middle", align="left",
            showarrow=False, text=_wrapped(claim),
        )  # fmt: skip
    for claim in claims:
        if claim.effect is not None:
            figure.add_annotation(
                x=_drawn_at(_bars(claim, "value")), y=height[claim.id] - 0.12, yanchor="top", showarrow=False,
                text=safe(claim.effect),
            )  # fmt: skip
    note = ""
    if isinstance(data, Run):
        first = next(iter(data.arms.values()))
        note = f"{concept(first)}; {about(data, first)}; {100 * data.interval['level']:g} % intervals"
    dressed(
        figure, "The paper's claims, each beside its control", note,
        x="effect / smallest that counts; right: as claimed", height=170 + 66 * len(claims),
    )  # fmt: skip
    ticks = (-100, -10, -3, -1, 0, 1, 3, 10, 100)
    figure.update_xaxes(
        tickvals=[_drawn_at(t) for t in ticks], ticktext=[str(t) for t in ticks], range=[-end, end], domain=[0.5, 1],
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False, range=[0.45, len(claims) + 0.55])
    figure.update_annotations(font={"size": 12, "color": TEXT})
    return figure.update_layout(legend_y=-0.09, margin={"b": 90, "l": 20})


def _bars(claim: Claim, part: str) -> float:
    """A part of the effect in units of the bar; NaN where there is none."""
    value = getattr(claim.effect, part, float("nan"))
    return value / claim.bar if claim.bar else value


def _drawn_at(value: float | int) -> float:
    """Near 0 as it is, far out drawn together."""
    return float(np.arcsinh(value))


def _p(claim: Claim) -> str:
    return "" if claim.p_holm is None else f"<br>p (Holm) {claim.p_holm:.3g}"


def _wrapped(claim: Claim, width: int = 32) -> str:
    """A claim and its verdict on short lines, safe to draw."""
    head = f"{claim.id}, {claim.verdict}:"
    lines = "<br>".join(safe(line) for line in textwrap.wrap(f"{head} {claim.says}", width))
    return lines.replace(safe(head), f"<b>{safe(head)}</b>", 1)
