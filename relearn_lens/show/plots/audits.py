"""Figures of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from relearn_lens.analysis.audit import Evidence
from relearn_lens.show.plots.style import ARM_COLOURS, INK, NotMeasuredError, dressed, safe

MODEL, TWIN = ARM_COLOURS["concept"], ARM_COLOURS["never"]


def audit_layers(evidence: Evidence) -> go.Figure:
    """What do probes still read, by layer?

    The share of what is to be forgotten whose answer a linear probe reads from the output of each block, fitted to
    other keys. The dotted line is chance: probes of shuffled answers.
    """
    if not evidence.by_layer:
        raise NotMeasuredError("no closed sets of answers")
    blocks = [f"block {safe(name)}" for name in evidence.by_layer]
    figure = go.Figure(go.Bar(x=blocks, y=list(evidence.by_layer.values()), marker_color=MODEL))
    if evidence.inside_chance is not None:
        figure.add_hline(y=evidence.inside_chance, line={"color": INK, "dash": "dot"})
    figure.update_yaxes(range=[0, 1.02])
    beside = [
        f"{who} {value:.2f}"
        for who, value in (
            ("original", evidence.original_inside),
            ("twin", evidence.twin_inside),
            ("chance", evidence.inside_chance),
        )
        if value is not None
    ]
    return dressed(figure, "Read inside", ", ".join(beside), y="share that a probe reads", height=340)


def audit_curve(curve: Mapping[str, Sequence[float | int]], rate: float) -> go.Figure:
    """Does relearning half of the facts bring back the other half?

    The share of the held-out half that is answered against the steps of training on the other half. The dashed line is
    the twin that never knew: what it gains is teaching.
    """
    figure = go.Figure()
    x = [0.5 if step == 0 else step for step in curve["steps"]]
    for name, colour, dash in (("model", MODEL, "solid"), ("twin", TWIN, "dash")):
        if name in curve:
            n = min(len(x), len(curve[name]))
            figure.add_scatter(
                x=x[:n], y=list(curve[name])[:n], name=name, mode="lines+markers",
                line={"color": colour, "width": 2.5, "dash": dash},
            )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=x, ticktext=[str(step) for step in curve["steps"]])
    figure.update_yaxes(range=[-0.02, 1.02])
    return dressed(
        figure, "Held-out half", f"learning rate {rate:g}", x="steps on the other half", y="answered right", height=340
    )


def audit_parts(grafts: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Where in the model did it come back?

    The share of what relearning brought back that each part alone brings back, from the input to the output.
    """
    known = [g for g in grafts if g["enough"] == g["enough"]]
    if not known:
        raise NotMeasuredError("nothing came back")
    shares = go.Bar(x=[safe(g["part"]) for g in known], y=[g["enough"] for g in known], marker_color=MODEL)
    figure = go.Figure(shares)
    return dressed(figure, "Return by part", "each alone, grafted into the model as it came", y="share", height=340)


def audit_states(states: Mapping[str, float]) -> go.Figure:
    """What is the state of each item?

    Retained: a probe reads the answer and the model gives it; suppressed: a probe alone; lucky guess: the model alone;
    gone from what we can read: neither. Probes err, so a few items of each state are expected by chance.
    """
    if not states:
        raise NotMeasuredError("no closed sets of answers")
    shares = go.Bar(y=[safe(name) for name in states], x=list(states.values()), orientation="h", marker_color=MODEL)
    figure = go.Figure(shares).update_yaxes(autorange="reversed")
    return dressed(figure, "State of each item", "share of passages", x="share", height=300)
