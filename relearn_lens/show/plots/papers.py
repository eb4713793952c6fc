"""Figures of the field's claims put to the test, and of what heads do from one stage of training to the next."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from relearn_lens.measure.crosspatch import HeadRoles
from relearn_lens.show.plots.style import DIVERGING, INK, TEXT, VERDICT_COLOURS, NotMeasuredError, dressed, safe, seeds

if TYPE_CHECKING:
    import pandas as pd

    from relearn_lens.reproduce.protocol import Reproduction

COLOURS = {
    "reproduced": VERDICT_COLOURS["supported"],
    "not reproduced at this scale": VERDICT_COLOURS["not supported"],
    "reversed": VERDICT_COLOURS["reversed"],
    "inconclusive": VERDICT_COLOURS["inconclusive"],
    "not measured": VERDICT_COLOURS["inconclusive"],
}
SYMBOLS = {
    "reproduced": "circle", "not reproduced at this scale": "square", "reversed": "triangle-left",
    "inconclusive": "circle-open", "not measured": "x-thin-open",
}  # fmt: skip
HEAD_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe-Ito."""
FURTHEST = 3.0
"""Bars from 0 that a figure of several papers reaches; what lies further is drawn there."""


def against_bars(results: Sequence[Reproduction]) -> pd.DataFrame:
    """A row for every claim: effect, interval and control in its unit, its bar, and the verdict.

    `scaled`, `scaled_low` and `scaled_high` are in bars, so that claims of different units can stand below each other;
    where the bar is 0, in the largest of effect and ends of its interval. NaN where nothing was measured, and where
    there is no interval.
    """
    import pandas as pd

    rows = []
    for result in results:
        for row in result.rows:
            ends = (np.nan,) * 3 if row.effect is None else (row.effect.value, row.effect.low, row.effect.high)
            sizes = np.abs(ends)[np.isfinite(ends)]
            scale = row.claim.bar or max(sizes, default=0.0) or 1.0
            scaled = dict(zip(("scaled", "scaled_low", "scaled_high"), np.array(ends) / scale, strict=True))
            rows.append(
                {
                    "paper": result.paper.name, "claim": row.claim.key, "says": row.claim.says, "unit": row.claim.unit,
                    "effect": ends[0], "low": ends[1], "high": ends[2],
                    "control": np.nan if row.control is None else row.control, "bar": row.claim.bar,
                    "rule": row.claim.rule, "verdict": "not measured" if row.effect is None else row.verdict, **scaled,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def reproductions(results: Sequence[Reproduction]) -> go.Figure:
    """Which claims hold here: effects with their intervals, against the bars that were set before.

    Of one paper, every claim has an axis in its own unit: the dotted line is the bar, the diamond the control, a shaded
    band the bars of a claim that something is within them. A claim is reproduced where the whole interval lies to the
    right of the bar, or within the band. Of several papers, effects are in bars, so that 1 is the bar of each claim
    (where the bar is 0, in the far end of the interval); what lies beyond three is drawn at the edge. A claim without
    a dot was not measured; a dot without a line has no interval, as one seed has none.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise NotMeasuredError("there is no reproduction to draw; reproduce(NAME) gives one")
    return _one(results[0]) if len(results) == 1 else _several(results)


def _one(result: Reproduction) -> go.Figure:
    """Every claim on an axis of its own."""
    rows = against_bars([result]).to_dict("records")
    says = (wrap(f"{row['verdict']}: {row['says']} ({row['unit']})", 110) for row in rows)
    titles = ["<br>".join(map(safe, lines)) for lines in says]
    figure = make_subplots(len(rows), 1, subplot_titles=titles, vertical_spacing=0.55 / len(rows))
    for k, row in enumerate(rows, 1):
        verdict, bar = row["verdict"], row["bar"]
        _dot(figure, [row], ("effect", "low", "high"), [""], row=k, legend=False)
        if np.isfinite(row["control"]):
            figure.add_scatter(
                x=[row["control"]], y=[""], mode="markers", showlegend=False, row=k, col=1,
                marker={"symbol": "diamond-open", "size": 11, "color": INK, "line": {"width": 2}},
                hovertemplate="control: %{x:.3g}<extra></extra>",
            )  # fmt: skip
        if verdict == "not measured":
            figure.add_scatter(x=[bar], y=[""], mode="text", text=["not measured"], showlegend=False, row=k, col=1)
        # After what is drawn: plotly leaves empty panels without lines.
        if row["rule"] == "within":
            figure.add_vrect(-bar, bar, fillcolor=INK, opacity=0.2, line_width=0, row=k, col=1)  # pyright: ignore[reportArgumentType]
        else:
            figure.add_vline(bar, line={"color": INK, "width": 2, "dash": "dot"}, row=k, col=1)  # pyright: ignore[reportArgumentType]
        sizes = [0.0, bar, *(row[name] for name in ("effect", "low", "high", "control") if np.isfinite(row[name]))]
        sizes += [-bar] if row["rule"] == "within" else []
        room = 0.06 * (max(sizes) - min(sizes) or 1.0)
        figure.update_xaxes(range=[min(sizes) - room, max(sizes) + room], row=k, col=1)
    paper = result.paper
    dressed(
        figure,
        f"{safe(paper.name)}: {safe(paper.title)}",
        f"{safe(paper.source)}; {result.scale}, {seeds(len(result.seeds))}; dotted: bar, shaded: within it, diamond: "
        "control",
        height=130 + 110 * len(rows),
    )
    figure.update_yaxes(showticklabels=False, showgrid=False)
    figure.update_annotations(font={"size": 12, "color": TEXT}, x=0, xanchor="left", align="left")
    return figure.update_layout(margin={"t": 120, "l": 20})


def _several(results: Sequence[Reproduction]) -> go.Figure:
    """All claims below each other, in bars."""
    rows = against_bars(results).to_dict("records")
    figure = go.Figure()
    for row in rows:
        row["name"] = f"{row['paper']} {row['claim']}"
        for end in ("scaled", "scaled_low", "scaled_high"):
            row[end] = float(np.clip(row[end], -FURTHEST, FURTHEST))
    for verdict in COLOURS:
        theirs = [row for row in rows if row["verdict"] == verdict]
        if theirs and verdict != "not measured":
            _dot(figure, theirs, ("scaled", "scaled_low", "scaled_high"), [row["name"] for row in theirs], legend=True)
    for x in (-1, 1):
        figure.add_vline(x, line={"color": INK, "width": 2, "dash": "dot"})  # pyright: ignore[reportArgumentType]
    within = [row["name"] for row in rows if row["rule"] == "within"]
    figure.add_scatter(
        x=[0] * len(within), y=within, mode="markers", hoverinfo="skip", showlegend=bool(within),
        name="reproduced only between the lines",
        marker={"symbol": "line-ns", "size": 12, "color": INK, "line": {"width": 2, "color": INK}},
    )  # fmt: skip
    dressed(
        figure,
        "What the papers claim, measured here",
        f"{len(results)} papers, {len(rows)} claims, {seeds(len(results[0].seeds))}; without a dot: not measured",
        x="effect, in bars (bar 0: in the far end of its interval)",
        height=170 + 21 * len(rows),
    )
    figure.update_xaxes(range=[-FURTHEST - 0.15, FURTHEST + 0.15])
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=[row["name"] for row in reversed(rows)],
        range=[-0.7, len(rows) - 0.3], dtick=1,
    )  # fmt: skip
    return figure.update_layout(legend={"y": -80 / (170 + 21 * len(rows)), "yanchor": "top"})


def _dot(figure: go.Figure, rows: list[dict], ends: tuple[str, str, str], y: list[str], *, row: int | None = None,
         legend: bool) -> None:  # fmt: skip
    """Effects of one verdict, with their intervals."""
    value, low, high = ([each[name] for each in rows] for name in ends)
    verdict = rows[0]["verdict"]
    shown = [
        f"{safe(each['says'])}<br>{each['effect']:.3g} [{each['low']:.3g}, {each['high']:.3g}] {safe(each['unit'])}"
        f"<br>bar {each['bar']:g}: {each['verdict']}"
        for each in rows
    ]
    reach = [[None if np.isnan(b - a) else max(0.0, b - a) for a, b in zip(*pair, strict=True)]
             for pair in ((value, high), (low, value))]  # fmt: skip
    figure.add_scatter(
        x=[None if np.isnan(each) else each for each in value], y=y, mode="markers", name=verdict, showlegend=legend,
        marker={"symbol": SYMBOLS[verdict], "size": 10, "color": COLOURS[verdict], "line": {"width": 2}},
        error_x={"type": "data", "symmetric": False, "array": reach[0], "arrayminus": reach[1], "thickness": 2,
                 "width": 4, "color": COLOURS[verdict]},
        hovertext=shown, hovertemplate="%{hovertext}<extra></extra>",
        **({} if row is None else {"row": row, "col": 1}),
    )  # fmt: skip


def head_roles(roles: HeadRoles, *, circuit: int = 0) -> go.Figure:
    """What does each head do for the answer, before, between and after?

    A panel is a stage of training, in order; a cell is a head, and its colour what the metric loses where that head
    alone is as in the contrasting prompt and acts straight on the logits. Orange heads work for the answer, violet ones
    against it, pale ones do nothing by themselves. All panels have one scale. The number beside a stage is the metric
    there. Framed in every panel are the `circuit` heads of the largest effect, in size, at the first stage: where they
    are pale, the circuit does not work; where others are dark, others do its work.

    Raises:
        ValueError: more heads than there are.
    """
    values = roles.effect.numpy()
    framed = list(roles.top(roles.stages[0], circuit)) if circuit else []
    largest = float(np.abs(values).max()) or 1.0
    titles = [f"{safe(stage)}: {clean:.2f}" for stage, clean in zip(roles.stages, roles.clean, strict=True)]
    figure = make_subplots(1, len(titles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    blocks = [str(layer) for layer in roles.site.layers]
    for k, effect in enumerate(values, 1):
        figure.add_heatmap(
            z=effect, x=[str(head) for head in range(effect.shape[1])], y=blocks, coloraxis="coloraxis", xgap=2, ygap=2,
            hovertemplate="head %{x} of block %{y}: %{z:.3f}<extra>" + titles[k - 1] + "</extra>", row=1, col=k,
        )  # fmt: skip
        for head in framed:
            x, y = head.index, blocks.index(str(head.layer))
            figure.add_annotation(x=x, y=y, text=f"{effect[y, x]:.2f}", showarrow=False, row=1, col=k)
            figure.add_shape(
                type="rect", x0=x - 0.46, x1=x + 0.46, y0=y - 0.46, y1=y + 0.46, line={"color": TEXT, "width": 3},
                row=1, col=k,
            )  # fmt: skip
    metric = safe(roles.metric.replace("_", " "))
    dressed(
        figure,
        f"What each head does for the {metric}",
        f"direct effect on the logits, mean over {roles.n_passages} passages; above each panel the {metric} "
        f"({safe(roles.unit)})"
        + (f"; framed: the {circuit} heads that do most when {safe(roles.stages[0])}" * bool(circuit)),
        x="head",
        height=190 + 46 * len(blocks),
    )
    figure.update_xaxes(type="category", showgrid=False).update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title_text="block", col=1)
    figure.update_annotations(font={"size": 13, "color": TEXT})
    colours = {"colorscale": DIVERGING, "cmin": -largest, "cmax": largest, "colorbar": {"title": safe(roles.unit)}}
    return figure.update_layout(margin={"t": 112}, coloraxis=colours)


def head_courses(roles: HeadRoles, *, circuit: int = 5) -> go.Figure:
    """Do the same heads come back, or others?

    A line is a head; its height is what the metric loses where that head alone is as in the contrasting prompt and acts
    straight on the logits. The `circuit` heads of the largest effect, in size, at the first stage are in colour, with
    their numbers in the legend; all others are grey. Where coloured lines fall and rise again the same heads do the
    work; where a grey one rises, another took it over.

    Raises:
        ValueError: more heads than there are, or than can be told apart by colour.
    """
    if circuit > len(HEAD_COLOURS):
        raise ValueError(f"circuit = {circuit}: at most {len(HEAD_COLOURS)} heads can be told apart by colour")
    blocks, first = [str(layer) for layer in roles.site.layers], roles.of(roles.stages[0])
    chosen = [(blocks.index(str(head.layer)), head.index) for head in roles.top(roles.stages[0], circuit)]
    chosen.sort(key=lambda at: -float(first[at]))
    others = [(i, j) for i in range(len(blocks)) for j in range(roles.site.width) if (i, j) not in chosen]
    figure = go.Figure()
    for k, (i, j) in enumerate([*others, *chosen]):
        course, grey = roles.effect[:, i, j].tolist(), (i, j) in others
        name = f"head {j} of block {blocks[i]}"
        numbers = " > ".join(f"{value:.2f}" for value in course)
        colour = INK if grey else HEAD_COLOURS[k - len(others)]
        figure.add_scatter(
            x=list(range(len(course))), y=course, mode="lines" if grey else "lines+markers",
            name=f"the other {len(others)} heads" if grey else f"{name}: {numbers}",
            legendgroup="others" if grey else name, showlegend=not grey or not k,
            legendrank=2000 if grey else 1000, opacity=0.45 if grey else 1,
            line={"color": colour, "width": 1 if grey else 3}, marker={"size": 9},
            hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    metric = safe(roles.metric.replace("_", " "))
    dressed(
        figure,
        f"What becomes of the heads that did most for the {metric}",
        f"direct effect on the logits, mean over {roles.n_passages} passages; below each stage the {metric}",
        y=f"effect ({safe(roles.unit)})",
        height=440,
    )
    ticks = [f"{safe(stage)}<br>{value:.2f}" for stage, value in zip(roles.stages, roles.clean, strict=True)]
    figure.update_xaxes(
        tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.15, len(ticks) - 0.85], tickfont_size=14
    )
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left"})
