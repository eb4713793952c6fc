"""Figures of a bench: removers against ways back, beside the twin that never knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from relearn_lens.analysis import matrix
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.analysis.matrix import NEVER, Results
from relearn_lens.show.plots.style import DIVERGING, INK, SEQUENTIAL, NotMeasuredError, dressed, safe

# Okabe-Ito without its yellow, which is not read on white; the twin's green is that of every other figure.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#999999", "#5E3C99")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon")
TWIN = "#009E73"


def colour_of(results: Results, row: str) -> str:
    """The colour of a remover in every figure; of the twin, green."""
    return TWIN if row == NEVER else COLOURS[results.rows.index(row) % len(COLOURS)]


def _with(estimate: Estimate | None, between: str = "<br>") -> str:
    if estimate is None:
        return "refused"
    low, high = estimate.interval or (float("nan"), float("nan"))
    return f"{estimate.value:.2f}{between}[{low:.2f}, {high:.2f}]"


def _about(results: Results) -> str:
    return (
        f"seeds {', '.join(map(str, results.seeds))}; learning rates chosen on seed {results.chooses}; "
        f"{100 * results.level:.0f} % intervals over keys and seeds"
    )


def bench_matrix(results: Results) -> go.Figure:
    """How much of what was removed do the attacks bring back?

    A row for every remover, a column for every attack: the share of what calibration left removed that comes back of
    the half of the facts which the attacker never had, less what the twin gains, with its interval. 0: nothing; 1: all.
    The first columns are no shares of that: what the model still answers before any attack, and how far calibration
    let the remover go. A grey cell is refused: nothing was removed beyond noise, or no checkpoint was usable.
    """
    rows = list(results.rows)
    entries = [[matrix.entry(results, row, column) for column in results.columns] for row in rows]
    values = [[None if e.recovery is None else e.recovery.value for e in line] for line in entries]
    text = [[_with(e.recovery) for e in line] for line in entries]
    hover = [
        [
            f"{safe(e.row)} under {safe(e.column)} {e.rate}: {_with(e.recovery, ' ')}<br>answers {_with(e.left, ' ')}"
            + (f"<br>the twin gained {_with(e.twin, ' ')}" if e.twin else "")
            + (f"<br>{e.why}" if e.why else "")
            for e in line
        ]
        for line in entries
    ]
    figure = go.Figure()
    figure.add_heatmap(
        z=values, x=[safe(c) for c in results.columns], y=[safe(r) for r in rows], text=text, hovertext=hover,
        texttemplate="%{text}", hoverinfo="text", zmin=0, zmax=1, colorscale="Oranges", xgap=3, ygap=3,
        colorbar={"thickness": 10},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return dressed(figure, "What comes back", _about(results), height=170 + 52 * len(rows))


def bench_curves(results: Results, column: str) -> go.Figure:
    """How fast does it come back?

    The share of the held-out passages that is answered right against the steps of an attack, each remover at the
    learning rate that was chosen for it, mean over seeds with its interval; the step axis is logarithmic, 0 is before
    the attack. The dashed green line is the twin that never knew them, at the rate chosen for it: what it gains is
    teaching. A hollow marker is a checkpoint at which utility fell by more than the bound on some seed.
    """
    figure = go.Figure()
    rows = [*results.rows, *([NEVER] if (NEVER, results.seeds[0]) in results.cells else [])]
    for row in rows:
        rate = matrix.rate_of(results, row, column)
        rate = rate if rate is not None else next(iter(results.cells[row, results.seeds[0]].courses[column]))
        points = matrix.curve(results, row, column, rate)
        if len(points) < 3:
            continue
        usable = [set(results.cells[row, s].courses[column][rate].usable(results.bound)) for s in results.seeds]
        steps = [step for step, _ in points]
        x = [0.5 if step == 0 else step for step in steps]
        y = [e.value for _, e in points]
        low = [e.interval[0] if e.interval else e.value for _, e in points]
        high = [e.interval[1] if e.interval else e.value for _, e in points]
        colour = colour_of(results, row)
        figure.add_scatter(
            x=x + x[::-1], y=high + low[::-1], fill="toself", mode="lines", fillcolor=colour, opacity=0.13,
            line_width=0, hoverinfo="skip", showlegend=False, legendgroup=row,
        )  # fmt: skip
        kept = [i == 0 or all(i in each for each in usable) for i in range(len(points))]
        figure.add_scatter(
            x=x, y=y, name=f"{safe(row)} ({rate})" if rate else safe(row), legendgroup=row, mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": "dash" if row == NEVER else "solid"},
            marker={"size": 8, "symbol": [f"{_marker(results, row)}{'' if each else '-open'}" for each in kept]},
            customdata=[[s, a, b] for s, a, b in zip(steps, low, high, strict=True)],
            hovertemplate="step %{customdata[0]}: %{y:.2f} [%{customdata[1]:.2f}, %{customdata[2]:.2f}]"
            f"<extra>{safe(row)}</extra>",
        )  # fmt: skip
    if not figure.data:
        raise NotMeasuredError(f"{column} has no course to draw: it changes the model once")
    ticks = sorted(
        {
            step
            for row in rows
            for rate in results.cells[row, results.seeds[0]].courses[column].values()
            for step in rate.steps
        }
    )
    _log_steps(figure, ticks)
    figure.update_yaxes(range=[-0.03, 1.05])
    return dressed(
        figure, f"Held-out facts under {safe(column)}", _about(results), x="steps of the attack",
        y="held-out answered right",
    )  # fmt: skip


def _marker(results: Results, row: str) -> str:
    return "circle" if row == NEVER else MARKERS[results.rows.index(row) % len(MARKERS)]


def bench_ranks(results: Results) -> go.Figure:
    """Does the order of removers change once all keep the same ability?

    Each line is a remover: on the left the share of the held-out passages that it leaves answered as it ends, on the
    right the same once it is taken back towards the base until what was to stay is kept. Rank 1, at the top, leaves
    least. Lines that cross are removers whose order came from how much else they broke. Kendall's tau is 1 for the same
    order, -1 for the reverse.
    """
    ranking = matrix.ranking(results)
    if ranking is None:
        raise NotMeasuredError("a ranking takes three removers")
    places = [_ranks(ranking.before), _ranks(ranking.after)]
    figure = go.Figure()
    for row in results.rows:
        names = [f"{ranking.before[row]:.2f}  ", f"  {ranking.after[row]:.2f} {safe(row)}"]
        figure.add_scatter(
            x=[0, 1], y=[place[row] for place in places], mode="lines+markers+text", text=names,
            textposition=["middle left", "middle right"], showlegend=False, name=safe(row),
            line={"color": colour_of(results, row), "width": 3}, marker={"size": 11},
            textfont={"color": colour_of(results, row)}, cliponaxis=False,
            hovertemplate=f"{safe(row)}: %{{text}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        tickvals=[0, 1], ticktext=["as the remover ends", "at the same ability"], range=[-0.4, 2.3], showgrid=False
    )
    figure.update_yaxes(autorange="reversed", tickvals=list(range(1, len(results.rows) + 1)), zeroline=False)
    note = (
        f"Kendall's tau {ranking.tau.value:.2f}" if ranking.tau.value == ranking.tau.value else "no order on one side"
    )
    if ranking.tau.interval:
        note += f" [{ranking.tau.low:.2f}, {ranking.tau.high:.2f}] over {ranking.tau.over}"
    return dressed(
        figure, "Ranks before and after calibration", note, y="rank (1 leaves least)",
        height=190 + 42 * len(results.rows),
    )  # fmt: skip


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Ranks from 1, lowest first; equal values share theirs."""
    return {
        row: 1 + sum(v < value for v in values.values()) + (sum(v == value for v in values.values()) - 1) / 2
        for row, value in values.items()
    }


def bench_parts(results: Results, parts: Mapping[str, Sequence[Mapping[str, Any]]], about: str) -> go.Figure:
    """Where in the model did it come back?

    For every part of the model, from the input to the output: the share of what the attack brought back that this part
    alone brings back, taken from the attacked model and put into the removed one. Bars are intervals over keys. Parts
    work together, so the shares need not add up to 1; below 0 the part alone makes it worse.
    """
    if not parts:
        raise NotMeasuredError("no attack was usable on the seed where parts are moved")
    figure = go.Figure()
    for row, each in parts.items():
        known = [p for p in each if p["enough"] is not None]
        if not known:
            continue
        values = [p["enough"] for p in known]
        ends = {
            end: [p[f"enough_{end}"] if p[f"enough_{end}"] is not None else p["enough"] for p in known]
            for end in ("low", "high")
        }
        figure.add_scatter(
            x=[safe(p["part"]) for p in known], y=values, name=safe(row), mode="markers+lines",
            line={"color": colour_of(results, row), "width": 1, "dash": "dot"},
            marker={"size": 9, "symbol": _marker(results, row), "color": colour_of(results, row)},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2,
                "array": [high - value for high, value in zip(ends["high"], values, strict=True)],
                "arrayminus": [value - low for low, value in zip(ends["low"], values, strict=True)],
            },
        )  # fmt: skip
    if not figure.data:
        raise NotMeasuredError("nothing came back that parts could be asked for")
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    # The axis has no title: on a phone its labels are long enough.
    return dressed(figure, "Return by part of the model, from input to output", about, y="share it alone brings back")


def bench_metric(results: Results, by_row: Mapping[str, Mapping[str, Any]], metric: str, about: str) -> go.Figure:
    """How does what can be read of the model follow what it answers?

    One metric of the held-out facts at every checkpoint of the attack, one line for each remover and a dashed green one
    for the twin that never knew; the step axis is logarithmic, 0 is before the attack. The dotted line is chance, or of
    depth the twin.
    """
    if not by_row:
        raise NotMeasuredError(f"{metric} was not read")
    figure = go.Figure()
    for row, course in by_row.items():
        x, colour = [max(step, 0.5) for step in course["steps"]], colour_of(results, row)
        whole = [[v if v is not None else float("nan") for v in each] for each in course["whole"]]
        y, low, high = ([each[i] for each in whole] for i in range(3))
        figure.add_scatter(
            x=x + x[::-1], y=high + low[::-1], fill="toself", mode="lines", fillcolor=colour, opacity=0.13,
            line_width=0, hoverinfo="skip", showlegend=False, legendgroup=row,
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=y, name=safe(row), legendgroup=row, mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": "dash" if row == NEVER else "solid"},
            marker={"size": 8, "symbol": _marker(results, row)}, customdata=list(zip(low, high, strict=True)),
            hovertemplate="%{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]" + f"<extra>{safe(row)}</extra>",
        )  # fmt: skip
    one = next(iter(by_row.values()))
    if one["chance"][0] is not None and one["chance"][0] == one["chance"][0]:
        figure.add_hline(y=one["chance"][0], line={"color": INK, "dash": "dot", "width": 1.5})
    _log_steps(figure, one["steps"])
    return dressed(
        figure, f"{safe(metric.capitalize())} along the attack", f"{about}; {safe(one['unit'])}",
        x="steps of the attack", y=safe(metric),
    )  # fmt: skip


def bench_layers(results: Results, by_row: Mapping[str, Mapping[str, Any]], metric: str, about: str) -> go.Figure:
    """In which layers does it come back first?

    A map for each remover, and for the twin that never knew: layers (or parts of the model) from the input at the
    bottom to the output at the top, checkpoints of the attack from left to right, 0 before it; the colour is the metric
    of the held-out facts. A blank cell could not be measured.
    """
    layered = {row: course for row, course in by_row.items() if course["layers"]}
    if not layered:
        raise NotMeasuredError(f"{metric} is not by layer")
    lines = -(-len(layered) // 2)
    n = max(len(course["layers"]) for course in layered.values())
    high = 60 + max(110, 16 * n)
    figure = make_subplots(
        lines, 2, shared_yaxes=True, subplot_titles=[safe(row) for row in layered], horizontal_spacing=0.04,
        vertical_spacing=45 / (high * lines),
    )  # fmt: skip
    values = [v for course in layered.values() for each in course["layers"].values() for v in each if v is not None]
    top = max((abs(v) for v in values if v == v), default=1.0)
    signed = any(v < 0 for v in values)
    scale: dict[str, Any] = {"zmin": 0, "zmax": max(top, 1e-9), "colorscale": SEQUENTIAL}
    if signed:
        scale |= {"zmin": -top, "colorscale": DIVERGING}
    for k, course in enumerate(layered.values()):
        figure.add_heatmap(
            z=list(course["layers"].values()), x=[str(step) for step in course["steps"]],
            y=[safe(name) for name in course["layers"]], xgap=1, ygap=1, showscale=k == 0, colorbar={"thickness": 10},
            hovertemplate="step %{x}, %{y}: %{z:.2f}<extra></extra>", row=k // 2 + 1, col=k % 2 + 1, **scale,
        )  # fmt: skip
    figure.update_xaxes(type="category").update_yaxes(type="category")
    figure = dressed(
        figure, f"{safe(metric.capitalize())} by layer", f"{about}; {safe(next(iter(layered.values()))['unit'])}",
        height=120 + high * lines,
    )  # fmt: skip
    figure.update_xaxes(title_text="steps", row=lines)
    return figure.update_layout(margin={"t": 112})  # the names over the first line of maps


def _log_steps(figure: go.Figure, steps: Sequence[int]) -> None:
    """A logarithmic axis of steps, on which 0 has a place."""
    figure.update_xaxes(type="log", tickvals=[max(step, 0.5) for step in steps], ticktext=[str(step) for step in steps])


def bench_components(results: Results) -> go.Figure:
    """Do the attacks tell the same story?

    Removed models in the plane of the two directions in which they differ most under all attacks (each attack at each
    learning rate is one number per model: the most it leaves answered). The arrows are the attacks: those that point
    the same way bring back the same models. A first axis with nearly all of the variance means that one attack would
    have told as much as all.
    """
    components = matrix.components(results)
    if components is None:
        raise NotMeasuredError("it takes three attacks and four models")
    figure = go.Figure()
    for row in results.rows:
        at = [i for i, name in enumerate(components.models) if name.rpartition(" ")[0] == row]
        figure.add_scatter(
            x=components.scores[at, 0], y=components.scores[at, 1], mode="markers", name=safe(row),
            marker={"size": 10, "color": colour_of(results, row), "symbol": _marker(results, row)},
            text=[safe(components.models[i]) for i in at], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    reach = float(abs(components.scores[:, :2]).max())
    for k, name in enumerate(components.attacks):
        x, y = (reach * components.loadings[k, :2]).tolist()
        figure.add_scatter(
            x=[0, x], y=[0, y], mode="lines+text", text=["", safe(name)], textposition="top center",
            line={"color": INK, "width": 1.5}, textfont={"color": INK, "size": 11}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    note = (
        f"{len(components.models)} models, {len(components.attacks)} attacks; three components have "
        f"{100 * float(components.explained[:3].sum()):.0f} % of the variance"
    )
    axes = [f"component {k + 1} ({100 * components.explained[k]:.0f} %)" for k in range(2)]
    return dressed(figure, "Attacks as directions", note, x=axes[0], y=axes[1])
