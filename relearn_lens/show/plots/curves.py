"""Figures with a line, a bar or a dot per arm: how much came back, what was cut, what moved, what the output owes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from relearn_lens.analysis import migration as moves
from relearn_lens.measure.tracking import BASE, PRUNED, Trajectory
from relearn_lens.runs.results import Run
from relearn_lens.show.plots.style import (
    ARM_COLOURS,
    ARM_DASHES,
    INK,
    TEXT,
    NotMeasuredError,
    Paths,
    about,
    arm_of,
    arms_of,
    colour_of,
    concept,
    dressed,
    safe,
    shown,
    stage_title,
    whole,
)


def recovery_curves(data: Paths, *, beside: Sequence[Run] = ()) -> go.Figure:
    """Does the concept come back, and faster or slower than after a random cut?

    Read it from left to right: the concept's score (F1, or loss, for which lower is better) before pruning, right
    after, and after each stage of retraining; one line per arm, named at its end, mean over seeds. Bands are the
    interval that the settings ask for: over seeds where there are several, else bootstrap over sentences. The dotted
    bar at `pruned` spans the random sets that were ablated without retraining. A line that is missing at a stage has no
    score there. Runs that it is drawn `beside` share its axis where they have the same score.
    """
    figure = go.Figure()
    arms_by_name, over = arms_of(data), ""
    interval: dict[str, Any] = data.interval if isinstance(data, Run) else {"level": 0.95}
    first = next(iter(arms_by_name.values()))
    label = data.label if isinstance(data, Run) else first[0].label
    scores = first[0][first[0].stages[0]].scores
    for name, arms in arms_by_name.items():
        stages = list(arms[0].stages)
        estimates = [shown(label, [arm[s].scores for arm in arms], **interval) for s in stages]
        over, colour = estimates[0].over, colour_of(name, arms_by_name)
        figure.add_scatter(
            x=stages + stages[::-1],
            y=[e.high for e in estimates] + [e.low for e in estimates][::-1],
            fill="toself", mode="lines",
            fillcolor=colour, opacity=0.15, line_width=0, hoverinfo="skip", showlegend=False,
            legendgroup=name,
        )  # fmt: skip
        figure.add_scatter(
            x=stages, y=[e.value for e in estimates], name=name, legendgroup=name, mode="lines+markers",
            showlegend=False,
            line={"color": colour, "width": 2.5, "dash": ARM_DASHES.get(name, "solid")}, marker={"size": 7},
            customdata=[[e.low, e.high] for e in estimates],
            hovertemplate=f"%{{x}}: {scores.metric} %{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
            f"<extra>{name}</extra>",
        )  # fmt: skip
    damages = data.damage if isinstance(data, Run) else []
    if draws := [s.shown(label) for damage in damages for s in damage.random.get("layers", ())]:
        figure.add_scatter(
            x=["pruned", "pruned"], y=[min(draws), max(draws)], mode="lines+markers",
            name=f"{len(draws)} random sets, ablated", marker={"symbol": "line-ew-open", "size": 12},
            line={"color": ARM_COLOURS["random"], "width": 4, "dash": "dot"},
        )  # fmt: skip
    _name_ends(figure, arms_by_name, label, scores.metric)
    dressed(
        figure,
        f"{scores.metric} of {concept(first)} by stage",
        f"{about(data, first)}; band: {round(100 * interval['level'])} % interval over {over}",
        x=stage_title(first),
        y=f"{scores.metric} of {concept(first)} ({safe(scores.unit)})",
    ).update_xaxes(type="category")
    figure.update_layout(margin={"r": 84})
    if scores.metric == "F1":
        return figure.update_yaxes(range=[-0.04, 1.04])
    if beside:
        known = [
            arm[stage].scores.shown(arm.label)
            for each in (data, *beside) for arms in arms_of(each).values() for arm in arms for stage in arm.stages
            if arm[stage].scores.metric == scores.metric
        ]  # fmt: skip
        low, high = float(np.nanmin(known)), float(np.nanmax(known))
        figure.update_yaxes(range=[low - 0.06 * (high - low), high + 0.06 * (high - low)])
    return figure


def _name_ends(figure: go.Figure, arms_by_name: Mapping[str, Sequence[Trajectory]], label: Any, metric: str) -> None:
    """Write each arm's name at the end of its line."""
    ends = {
        name: shown(label, [arm[arm.stages[-1]].scores for arm in arms]).value for name, arms in arms_by_name.items()
    }
    drawn: Any = figure.data
    tops = [y for trace in drawn for y in trace.y if y is not None and np.isfinite(y)]
    reach = 1.04 if metric == "F1" else (max(tops) - min(tops) if tops else 1.0)
    for name, y in _apart(ends, 0.06 * reach, 1.0 if metric == "F1" else np.inf).items():
        figure.add_scatter(
            x=[arms_by_name[name][0].stages[-1]], y=[y], text=[f"  <b>{safe(name)}</b>"], mode="text",
            textposition="middle right", textfont={"color": colour_of(name, arms_by_name), "size": 13},
            cliponaxis=False, hoverinfo="skip", showlegend=False, legendgroup=name,
        )  # fmt: skip


def _apart(ends: Mapping[str, float], least: float, highest: float) -> dict[str, float]:
    """Heights of labels at the ends of lines: in the order of the lines, none on another, none above `highest`."""
    order = sorted((name for name in ends if np.isfinite(ends[name])), key=lambda name: ends[name])
    at = [ends[name] for name in order]
    for _ in range(100):
        for k in range(len(at) - 1):
            lacking = max(0.0, least - (at[k + 1] - at[k]))
            at[k], at[k + 1] = at[k] - lacking / 2, at[k + 1] + lacking / 2
    for k in reversed(range(len(at))):
        at[k] = min(at[k], highest if k == len(at) - 1 else at[k + 1] - least)
    return dict(zip(order, at, strict=True))


def pruned_share(data: Paths, *, arm: str | None = None) -> go.Figure:
    """Which layers lost how much to pruning?

    Bars are the share of each layer's neurons that an arm pruned (by default the concept arm), mean over seeds. The
    line is a cut that takes the same share of every layer. The random arm prunes as many in every layer as the concept
    arm by construction, so it has no bars of its own.
    """
    arms = arm_of(data, arm)
    shares = np.mean([(~each.survivors()).share_by_layer() for each in arms], axis=0)
    layers = list(arms[0].site.layers)
    figure = go.Figure(
        go.Bar(
            x=layers, y=shares, marker_color=ARM_COLOURS.get(arms[0].arm, INK), showlegend=False,
            text=[f"{s:.2f}" for s in shares], textposition="outside", cliponaxis=False,
            hovertemplate="layer %{x}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=layers, y=[float(shares.mean())] * len(layers), mode="lines", name="an even cut of every layer",
        line={"color": INK, "dash": "dash", "width": 2}, hovertemplate="an even cut: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    # A cut of 1 % would be a flat line below an axis up to 1.
    top = 1.08 if shares.max() > 0.4 else max(1.3 * float(shares.max()), 0.01)
    return dressed(
        figure,
        f"Pruned share of each layer: {arms[0].arm or 'arm'} arm",
        f"{concept(arms)}; {about(data, arms)}",
        x=f"layer ({safe(arms[0].site.name)})",
        y="share of neurons pruned",
        height=340,
    ).update_layout(yaxis_range=[0, top], xaxis_type="category")


def migration(run: Run, *, control: str = "random") -> go.Figure:
    """Did the concept move between layers, and would the control have you believe the same?

    Each dot is the change of a layer's share of the summed score from base to the last stage, in percentage points:
    right of the line the layer gained. Left panel: the very same surviving neurons on both sides. Right panel: as
    published, all neurons at base against the survivors later, where pruning alone makes late layers lose. Where the
    two arms' dots lie on each other the change is not about the concept. Whiskers are intervals over seeds, from three
    seeds on; a layer without a dot has no neuron to compare.

    Raises:
        ValueError: no concept arm, no neuron that survived in both arms, or a score below 0.
    """
    control = control if control in whole(run).arms else ""
    both: list[tuple[moves.Selection, str]] = [("matched", "matched"), ("published", "as published")]
    migrations = {
        which: moves.migration(run.arms, selection=which, control=control, level=run.interval["level"])
        for which, _ in both
    }
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[says for _, says in both])
    for k, (which, _) in enumerate(both, 1):
        here = migrations[which]
        layers = list(here.share)
        for name, side in ((control, "control"), ("concept", "concept")):
            each = [getattr(here.share[layer], side) for layer in layers]
            if None in each:
                continue
            value = 100 * np.array([e.value for e in each])
            reach = 100 * np.array([e.high - e.value for e in each])
            figure.add_scatter(
                x=value, y=layers, mode="lines+markers", name=f"{name} arm", legendgroup=name, showlegend=k == 1,
                line={"color": ARM_COLOURS[name], "dash": ARM_DASHES[name], "width": 1.5},
                marker={"size": 11, "symbol": "diamond-open" if name != "concept" else "circle", "line": {"width": 2}},
                error_x={"type": "data", "array": reach, "visible": bool(np.isfinite(reach).any()), "thickness": 1.2},
                hovertemplate=f"{name} arm, layer %{{y}}: %{{x:+.2f}} points<extra></extra>",
                row=1, col=k,
            )  # fmt: skip
        figure.add_vline(x=0, line={"color": INK, "width": 1}, row=1, col=k)  # pyright: ignore[reportArgumentType]
    moved = "; ".join(
        f"{which} {here.moved.concept.value:+.3f}"
        + (f" ({control} arm {here.moved.control.value:+.3f})" if here.moved.control else "")
        for which, here in migrations.items()
    )
    arms, first = run.arms["concept"], migrations["matched"]
    dressed(
        figure,
        f"Where the {safe(first.score)} saliency of {concept(arms)} went, base to stage {safe(first.stage)}",
        f"{about(run, arms)}<br>mean depth moved, in shares of the depth: {moved}",
        x="change (points)",
    )
    figure.update_xaxes(matches="x")  # the same change is as far from 0 in both
    figure.update_yaxes(title_text=f"layer ({safe(arms[0].site.name)})", type="category", col=1)
    return figure.update_annotations(font={"size": 13, "color": TEXT}).update_layout(margin={"t": 125})


def attribution(run: Run) -> go.Figure:
    """What does the output owe to each layer, and is the account complete?

    Upper panel: each layer's share of the summed size of its neurons' attributions, at base and at the last stage of
    each arm, mean over seeds. Lower panel: the signed sum over a layer's neurons as a share of what the path from the
    reference input to the text changes in the output. In a layer that everything goes through (`resid`) it should be 1,
    and what is missing is the completeness error of the quadrature; MLP units are by-passed, so there it is what the
    MLP accounts for. A missing line was not measured.

    Raises:
        ValueError: attribution was not measured.
    """
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.09)
    errors: list[float] = []
    known: Any = None
    for label, name, arms, stage in _attributed(whole(run)):
        attributions: list[Any] = [arm[stage].attribution for arm in arms]
        known = attributions[0]
        share = np.mean([moves.layer_share(each.saliency()) for each in attributions], axis=0)
        sums = np.mean([(each.score.sum(1) / each.change).numpy() for each in attributions], axis=0)
        errors += [float((each.delta / each.change).abs().max()) for each in attributions]
        layers = list(known.site.layers)
        look = {"color": INK if stage == BASE else ARM_COLOURS[name], "width": 2.5,
                "dash": "longdash" if stage == BASE else ARM_DASHES[name]}  # fmt: skip
        for row, values, what in ((1, share, "share %{y:.3f}"), (2, sums, "sum over the change %{y:.3f}")):
            figure.add_scatter(
                x=layers, y=values, mode="lines+markers", line=look, name=label, legendgroup=label, showlegend=row == 1,
                hovertemplate=f"layer %{{x}}: {what}<extra>{label}</extra>", row=row, col=1,
            )  # fmt: skip
    if known is None:
        raise NotMeasuredError("attribution was not measured in this run; add 'conductance' to measure.what")
    first = next(iter(run.arms.values()))
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=1)  # pyright: ignore[reportArgumentType]
    error = f"completeness error at most {max(errors):.0%}" if known.is_cut_set else "MLP units are by-passed: no error"
    dressed(
        figure,
        f"What the output owes to each layer for {concept(first)}",
        f"{about(run, first)}; {safe(known.form)}, target {safe(known.target)} in {safe(known.unit)}; {error}",
        height=520,
    )
    figure.update_xaxes(type="category").update_xaxes(title_text=f"layer ({safe(known.site.name)})", row=2)
    figure.update_yaxes(title_text="share of attribution", rangemode="tozero", row=1)
    return figure.update_yaxes(title_text="sum / change", row=2).update_layout(legend_y=-0.2)


def _attributed(run: Run) -> list[tuple[str, str, list[Trajectory], str]]:
    """Label, arm, trajectories and stage of every attribution that is drawn: base once, then each arm's last stage."""
    rows = []
    for name, arms in run.arms.items():
        for stage in ([] if rows else [BASE]) + [arms[0].stages[-1]]:
            if stage != PRUNED and all(arm[stage].attribution is not None for arm in arms):
                rows.append(("base" if stage == BASE else f"{name} arm, stage {stage}", name, arms, stage))
    return rows
