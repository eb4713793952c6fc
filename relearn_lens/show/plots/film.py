"""The whole story in one moving picture: what the model can do, and where the concept is, stage by stage."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from relearn_lens.measure.tracking import PRUNED, Trajectory
from relearn_lens.runs.results import Run
from relearn_lens.show.plots.style import (
    ARM_COLOURS,
    ARM_DASHES,
    BLANK,
    SEQUENTIAL,
    about,
    concept,
    dressed,
    png_of,
    said,
    shown,
    stage_title,
)

COLUMNS = 64
"""Cells in a row of a map, at most."""
SECONDS = 1.4
"""For which a stage is seen; the last one twice as long."""


def film(run: Run) -> go.Figure:
    """What is lost, what comes back, and where? A figure with a frame for each stage, a slider and a play button.

    On the left the concept's score (F1, or loss) of every arm up to the stage, mean over seeds. On the right a map for
    the concept arm and one for its control, of their first seed: a row is a layer, a cell a few of its neurons, those
    that were most salient at base on the left. Colour is their mean score now, as a share of the score that the highest
    twentieth of all neurons had at base; a grey cell was pruned whole. What counts is whether the map of the concept
    arm does something that the control's does not.
    """
    arms = {name: paths for name, paths in run.arms.items() if paths}
    maps = [name for name in ("concept", "random", "unpruned") if name in arms][:2] or list(arms)[:1]
    first = next(iter(arms.values()))
    stages = list(first[0].stages)
    tables = {name: _table(arms[name][0], stages) for name in maps}
    curves = {
        name: [
            shown(run.label, [arm[s].scores for arm in paths], **run.interval).value if s in paths[0].stages else np.nan
            for s in stages
        ]
        for name, paths in arms.items()
    }
    scores = first[0][stages[0]].scores
    layers = list(first[0].site.layers)
    figure = make_subplots(
        rows=len(maps), cols=2, column_widths=[0.42, 0.58], horizontal_spacing=0.12, vertical_spacing=0.2,
        specs=[[{"rowspan": len(maps)}, {}], *([None, {}] for _ in maps[1:])],
        subplot_titles=["", *(f"{name} arm" for name in maps)],
    )  # fmt: skip
    places = [(1, 1)] * len(curves) + [(row, 2) for row in range(1, len(maps) + 1)]
    for trace, (row, column) in zip(_traces(0, stages, curves, tables, layers), places, strict=True):
        figure.add_trace(trace, row=row, col=column)
    figure.frames = [
        go.Frame(
            name=stage,
            data=_traces(k, stages, curves, tables, layers),
            traces=list(range(len(places))),
            layout={"title": {"text": _caption(first, stage, k, curves, scores.metric)}},
        )
        for k, stage in enumerate(stages)
    ]
    dressed(
        figure, f"{concept(first)}: cut out, trained on, stage by stage",
        f"{about(run, first)}; {_size(first[0].site.width)} neurons to a cell", height=470,
    )  # fmt: skip
    figure.update_xaxes(
        type="category", categoryarray=stages, range=[-0.3, len(stages) - 0.7], col=1, title_text=stage_title(first)
    )
    if scores.metric == "F1":
        figure.update_yaxes(range=[-0.03, 1.03], col=1)
    figure.update_yaxes(title_text=f"{scores.metric} of {concept(first)}", col=1)
    figure.update_yaxes(title_text="layer", type="category", col=2)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, col=2)
    figure.update_yaxes(showgrid=False, zeroline=False, col=2)
    figure.update_xaxes(title_text="neurons, most salient at base first", row=len(maps), col=2)
    for row in range(1, len(maps) + 1):
        figure.add_shape(
            type="rect", x0=0, x1=1, y0=0, y1=1, xref="x domain", yref="y domain", fillcolor=BLANK, line_width=0,
            layer="below", row=row, col=2,
        )  # fmt: skip
    return figure.update_layout(
        margin={"b": 110}, legend={"y": -0.3},
        sliders=[_slider(stages)], updatemenus=[_play()],
    )  # fmt: skip


def _traces(
    k: int, stages: list[str], curves: Mapping[str, Sequence[float]], tables: Mapping[str, np.ndarray],
    layers: Sequence[str],
) -> list[Any]:  # fmt: skip
    """The lines up to a stage, and the maps at it."""
    lines: list[Any] = [
        go.Scatter(
            x=stages[: k + 1], y=values[: k + 1], name=name, mode="lines+markers", marker={"size": 7},
            line={"color": ARM_COLOURS[name], "width": 2.5, "dash": ARM_DASHES[name]},
        )
        for name, values in curves.items()
    ]  # fmt: skip
    return lines + [
        go.Heatmap(
            z=np.round(table[k], 3), y=layers, zmin=0, zmax=1, colorscale=SEQUENTIAL,
            showscale=name == next(iter(tables)),
            hovertemplate=f"{name} arm, layer %{{y}}: %{{z:.2f}}<extra></extra>",
            colorbar={"title": {"text": "score / its 95th<br>percentile at base", "side": "right"}, "thickness": 12},
        )
        for name, table in tables.items()
    ]  # fmt: skip


def _caption(arms: Sequence[Trajectory], stage: str, k: int, curves: Mapping[str, Sequence[float]], metric: str) -> str:
    """What is to be seen at a stage, in a line."""
    now = next(iter(curves.values()))[k]
    at = arms[0][stage].at
    when = "before the cut" if k == 0 else "cut out" if at is None else f"trained on, {at.by} {stage}"
    twin = f", {curves['never'][k]:.2f} in a twin that never had it" if at is not None and "never" in curves else ""
    return f"{concept(arms)}: {when}, {metric} {now:.2f}{twin}"


def _size(width: int) -> int:
    return -(-width // COLUMNS)


def _table(arm: Trajectory, stages: list[str]) -> Float[np.ndarray, "stage layer cell"]:
    """Mean score of each cell at each stage, as a share of the 95th percentile at base; NaN where all are pruned."""
    base = arm[stages[0]].saliency.score.double().numpy()
    order = np.argsort(-base, axis=1, kind="stable")
    top = float(np.nanquantile(base, 0.95)) or 1.0
    alive = arm.survivors().mask.numpy()
    cuts = np.arange(0, base.shape[1], _size(base.shape[1]))
    rows = []
    for stage in stages:
        score = arm[stage].saliency.score.double().numpy()
        there = np.ones_like(alive) if stage == stages[0] or (stage == PRUNED and arm.removed is None) else alive
        score, there = (np.take_along_axis(x, order, 1) for x in (score, there))
        n = np.add.reduceat(there.astype(float), cuts, axis=1)
        total = np.add.reduceat(np.where(there, np.nan_to_num(score), 0.0), cuts, axis=1)
        rows.append(np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0) / top)
    return np.stack(rows)


def _slider(stages: list[str]) -> dict[str, Any]:
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": stage, "method": "animate", "args": [[stage], still]} for stage in stages]
    return {"steps": steps, "currentvalue": {"prefix": "stage: "}, "x": 0.12, "len": 0.88, "y": -0.28, "pad": {"t": 30}}


def _play() -> dict[str, Any]:
    how = {"frame": {"duration": round(1000 * SECONDS), "redraw": True}, "transition": {"duration": 0}}
    return {
        "type": "buttons", "x": 0.0, "xanchor": "left", "y": -0.28, "yanchor": "top", "pad": {"t": 40},
        "buttons": [{"label": "play", "method": "animate", "args": [None, how]}],
    }  # fmt: skip


def save_gif(figure: go.Figure, path: str | Path, *, width: int = 900, height: int = 470) -> Path:
    """Write the frames of a figure as an animated GIF on a white background, which goes on for ever; gives the path.

    Raises:
        ValueError: the figure has no frames.
        ImportError: Pillow, kaleido, or the Chrome or Chromium that it draws with, is missing.
    """
    frames: Any = figure.frames
    if not frames:
        raise ValueError("this figure has no frames to show one after the other; use save_png, or plots.film(run)")
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('a GIF needs the package Pillow: pip install "relearn-lens[png]"') from error
    pictures = []
    for frame in frames:
        still: Any = go.Figure(figure)
        for trace, k in zip(frame.data, frame.traces, strict=True):
            still.data[k].update(trace)
        still.layout.updatemenus = ()
        heading = frame.layout.title.text or f"{said(figure)[0]} ({frame.name})"
        still.update_layout(title={"text": heading}, margin={"b": 70}, legend={"y": -0.2})
        pictures.append(Image.open(io.BytesIO(png_of(still, width=width, height=height, scale=1))).convert("RGB"))
    # One palette for all: each with its own would change the colour of the lines from frame to frame.
    strip = Image.new("RGB", (width, height * len(pictures)))
    for k, picture in enumerate(pictures):
        strip.paste(picture, (0, k * height))
    palette = strip.quantize(256, method=Image.Quantize.FASTOCTREE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    times = [*[round(1000 * SECONDS)] * (len(pictures) - 1), round(1000 * SECONDS * 2)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    return Path(path)
