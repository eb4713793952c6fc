"""One figure per question. Every function takes results and returns a plotly Figure; nothing is shown or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from relearn_lens import analysis
from relearn_lens.analysis import Selection
from relearn_lens.experiment import Run
from relearn_lens.tracking import Trajectory

# Okabe-Ito: told apart with every common kind of colour blindness, on white and on black.
ARM_COLOURS = {"concept": "#D55E00", "random": "#0072B2", "unpruned": "#999999"}


def recovery_curves(run: Run) -> go.Figure:
    """Does the concept come back, and faster or slower than after a random cut?

    Read it from left to right: F1 of the concept's label before pruning, right after, and after each stage of
    retraining; one line per arm, mean over seeds. Bands are the interval that the settings ask for: over seeds where
    there are several, else bootstrap over sentences. The dotted line at `pruned` spans the random sets that were
    ablated without retraining.
    """
    figure = go.Figure()
    interval = run.interval
    over = ""
    for name, arms in run.arms.items():
        stages = list(arms[0].stages)
        found = [analysis.estimate(np.asarray, run.label, [arm[s].scores for arm in arms], **interval) for s in stages]
        over, colour = found[0].over, ARM_COLOURS[name]
        figure.add_scatter(
            x=stages + stages[::-1],
            y=[e.high for e in found] + [e.low for e in found][::-1],
            fill="toself", mode="lines",
            fillcolor=colour, opacity=0.15, line_width=0, hoverinfo="skip", showlegend=False,
            legendgroup=name,
        )  # fmt: skip
        figure.add_scatter(
            x=stages, y=[e.value for e in found], name=name, legendgroup=name, mode="lines+markers",
            line={"color": colour, "width": 2},
            customdata=[[e.low, e.high] for e in found],
            hovertemplate="%{x}: F1 %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra>" + name + "</extra>",
        )  # fmt: skip
    draws = [scores.value(run.label) for damage in run.damage for scores in damage.random]
    if draws:
        figure.add_scatter(
            x=["pruned", "pruned"], y=[min(draws), max(draws)], mode="lines", name=f"{len(draws)} random sets, ablated",
            line={"color": ARM_COLOURS["random"], "width": 4, "dash": "dot"},
        )  # fmt: skip
    level = round(100 * interval["level"])
    return _dressed(
        figure,
        f"F1 of {analysis.name_of(next(iter(run.arms.values()))[0])} by stage",
        f"band: {level} % interval over {over}",
        x="stage (base, pruned, epochs of retraining)",
        y="strict span F1",
    ).update_yaxes(range=[-0.02, 1.02])


def layer_map(path: Trajectory | Sequence[Trajectory], *, selection: Selection = "matched") -> go.Figure:
    """In which layers does the concept sit, and does that change from stage to stage?

    Each cell is the mean rank saliency of a layer's neurons at a stage: 0.5 is what a layer would have if neurons
    were ranked at random. `matched` ranks the neurons that survived pruning, at base too, so that a change is not an
    effect of which neurons were taken; `all` ranks all of them. A blank cell is a layer without any survivor. For
    several trajectories (the seeds of an arm) the mean is drawn. Look at the same map of the control arms before
    believing a change.
    """
    arms = [path] if isinstance(path, Trajectory) else list(path)
    stages = list(arms[0].stages)
    each = [analysis.saliency_by_layer(arm, selection) for arm in arms]
    table = np.mean([[by_stage[stage] for stage in stages] for by_stage in each], axis=0).T
    figure = go.Figure(
        go.Heatmap(
            z=table, x=stages, y=list(arms[0].site.layers), colorscale="RdBu_r", zmid=0.5, zmin=0, zmax=1,
            text=np.vectorize(lambda v: "" if np.isnan(v) else f"{v:.2f}")(table), texttemplate="%{text}",
            colorbar={"title": "rank<br>saliency"},
            hovertemplate="layer %{y}, stage %{x}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    who = "surviving neurons on both sides" if selection == "matched" else "all neurons"
    if selection == "matched" and arms[0].compare is not None:
        who = "the neurons that survive in the concept arm"
    first = arms[0]
    return _dressed(
        figure,
        f"Saliency of {analysis.name_of(first)}: {first.arm or 'arm'} arm",
        f"mean rank saliency, {who}, {len(arms)} seed(s); 0.5 is chance",
        x="stage (base, pruned, epochs of retraining)",
        y=f"layer ({first.site.name})",
    ).update_yaxes(type="category")


def pruned_share(arms: Mapping[str, Sequence[Trajectory]]) -> go.Figure:
    """Which layers lost how much to pruning?

    Bars are the share of each layer's neurons that the concept arm pruned, mean over seeds. The random arm prunes as
    many in every layer by construction, so it has no bars of its own.
    """
    chosen = arms["concept"] if "concept" in arms else next(iter(arms.values()))
    shares = np.mean([(~arm.survivors()).share_by_layer() for arm in chosen], axis=0)
    colour = ARM_COLOURS["concept" if "concept" in arms else next(iter(arms))]
    figure = go.Figure(
        go.Bar(
            x=list(chosen[0].site.layers), y=shares, marker_color=colour,
            text=[f"{s:.2f}" for s in shares], hovertemplate="layer %{x}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    return _dressed(
        figure,
        "Pruned share of each layer",
        f"{chosen[0].site.name}, {len(chosen)} seed(s)",
        x="layer",
        y="share of neurons pruned",
    ).update_layout(yaxis_range=[0, 1.05], xaxis_type="category")


def _dressed(figure: go.Figure, title: str, note: str, *, x: str, y: str) -> go.Figure:
    """Title, note and axes; transparent, so that the page's own light or dark background shows."""
    return (
        figure.update_layout(
            title={"text": f"{title}<br><sup>{note}</sup>"},
            xaxis_title=x,
            yaxis_title=y,
            xaxis_type="category",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"t": 70, "r": 20},
            font={"color": "#7a7a7a"},
            modebar={"orientation": "v"},
            legend={"orientation": "h", "y": -0.25},  # below, so that a phone has room for the picture
        )
        .update_xaxes(gridcolor="rgba(128,128,128,0.25)")
        .update_yaxes(gridcolor="rgba(128,128,128,0.25)")
    )
