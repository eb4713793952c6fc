"""How every figure looks: colours, titles, text that is safe to draw, and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import plotly.graph_objects as go

from relearn_lens.analysis import recovery
from relearn_lens.analysis.intervals import Estimate, estimate
from relearn_lens.analysis.recovery import name_of
from relearn_lens.measure.evaluation import Label, Scores
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.names import meant
from relearn_lens.runs.results import Run


class _Looks(dict[str, str]):
    """What the usual arms look like; one of one's own has another look, always the same by its name."""

    def __init__(self, usual: Mapping[str, str], others: Sequence[str]):
        super().__init__(usual)
        self.others = others

    def __missing__(self, name: str) -> str:
        return self.others[crc32(name.encode()) % len(self.others)]

    def get(self, name: str, default: Any = None) -> Any:
        """As `[name]`: every arm has a look."""
        return self[name]


# Okabe-Ito: told apart with every common kind of colour blindness, on white and on black.
ARM_COLOURS = _Looks(
    {"concept": "#D55E00", "other": "#CC79A7", "random": "#0072B2", "unpruned": "#999999", "never": "#009E73"},
    ("#56B4E9", "#E69F00", "#8C6BB1", "#6B8E23", "#B5651D"),
)
ARM_DASHES = _Looks(
    {"concept": "solid", "other": "longdash", "random": "dash", "unpruned": "dot", "never": "dashdot"},
    ("longdashdot", "6px,2px", "2px,6px"),
)
"""Arms differ in their line too, for print and for eyes that see no colour."""

VERDICT_COLOURS = {
    "supported": "#009E73", "reversed": "#D55E00", "not supported": "#56B4E9", "inconclusive": "#7d7d7d",
    "undecided": "#7d7d7d",
}  # fmt: skip

DIVERGING = [[0, "#5e3c99"], [0.25, "#b2abd2"], [0.5, "#f4f2ef"], [0.75, "#fdb863"], [1, "#d45500"]]
"""ColorBrewer's PuOr, dark orange high: its ends differ in lightness from its middle and in hue from each other."""
SEQUENTIAL = "cividis"
TEXT, PAPER = "#1f2328", "#ffffff"
"""Figures are dark on white, also in a dark notebook; our pages put their own ink and paper in the place of these."""
INK, GRID, BLANK = "#7d7d7d", "rgba(128,128,128,0.25)", "rgba(128,128,128,0.3)"
"""Greys of lines, seen on white and on black; `BLANK` is behind maps, so a cell without a value is grey in both."""


def measured_by(arms: Sequence[Trajectory]) -> str:
    """What the stages are named by: optimiser steps, or epochs."""
    return f"{recovery.measured_by(arms)}s"


def stage_title(arms: Sequence[Trajectory]) -> str:
    """Title of an axis of stages."""
    return f"stage ({measured_by(arms)} of retraining)"


Paths = Run | Trajectory | Sequence[Trajectory] | Mapping[str, Trajectory | Sequence[Trajectory]]
"""A run, one trajectory, several (those of one arm are its seeds), or arms by name."""


class NotMeasuredError(ValueError):
    """What a figure shows was not measured in this run."""


def whole(run: Any) -> Run:
    """A run as it is.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(run, Run):
        return run
    if isinstance(run, str | Path):
        raise ValueError(f"a run is wanted, got a name: load_run({str(run)!r}) gives the run of a folder")
    raise ValueError(
        f"a run is wanted (rl.run, rl.load_run), got a {type(run).__name__}; of a trajectory there are "
        "recovery_curves, pruned_share, layer_map and neuron_map"
    )


def arm_of(data: Paths, arm: str | None = None) -> list[Trajectory]:
    """The trajectories of one arm, one per seed: of a run the named one, by default the concept's.

    Raises:
        ValueError: the run has no arm of that name, or there is no trajectory.
    """
    if isinstance(data, Trajectory):
        return [data]
    if isinstance(data, Run | Mapping):
        arms = _by_name(data)
        name = arm or ("concept" if "concept" in arms else next(iter(arms), ""))
        if name not in arms:
            raise ValueError(f"no arm {name!r} in this run; it has {', '.join(arms) or 'none'}{meant(name, arms)}")
        return arms[name]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise ValueError(
            f"a run, a trajectory or several are wanted, got a {type(data).__name__}; load_run(folder) gives the run "
            "of a folder, track(...) a trajectory"
        )
    if not data:
        raise ValueError("there is no trajectory to draw")
    return list(data)


def of_seed(arms: Sequence[Trajectory], seed: int | None, inside: str = "run") -> Trajectory:
    """The trajectory of a training seed, by default the first.

    Raises:
        ValueError: there is none of that seed.
    """
    path = arms[0] if seed is None else next((each for each in arms if each.seed == seed), None)
    if path is None:
        raise ValueError(f"no seed {seed} in this {inside}; it has {', '.join(str(each.seed) for each in arms)}")
    return path


def arms_of(data: Paths, arm: str | None = None) -> dict[str, list[Trajectory]]:
    """Arm name to trajectories: every arm of a run or of several trajectories, or the one that is asked for."""
    if isinstance(data, Run | Mapping) and arm is None:
        return _by_name(data)
    by_name: dict[str, list[Trajectory]] = {}
    for path in arm_of(data, arm):
        by_name.setdefault(path.arm or arm or "arm", []).append(path)
    return by_name


def _by_name(data: Run | Mapping[str, Trajectory | Sequence[Trajectory]]) -> dict[str, list[Trajectory]]:
    arms = data.arms if isinstance(data, Run) else data
    return {name: [each] if isinstance(each, Trajectory) else list(each) for name, each in arms.items()}


def colour_of(arm: str, among: Iterable[str]) -> str:
    """The colour of an arm: its own, or a free one where another arm of the figure has that."""
    taken: dict[str, str] = {}
    for name in among:
        own = ARM_COLOURS[name]
        taken[name] = next((free for free in (own, *ARM_COLOURS.others) if free not in taken.values()), own)
    return taken[arm]


def about(data: Paths, arms: Sequence[Trajectory]) -> str:
    """What a figure is of: model and text (of a run), site, neurons and seeds."""
    site = arms[0].site
    names = [data.experiment.model, data.experiment.corpus] if isinstance(data, Run) else []
    parts = [safe(short_name(name)) for name in names]
    return ", ".join([*parts, f"{safe(site.name)}, {site.n_neurons:,} neurons", seeds(len(arms))])


def short_name(name: str) -> str:
    """A model or a text by name; of a path, its last part."""
    kind, colon, path = name.rpartition(":")
    return f"{kind}{colon}{Path(path).name}" if Path(path).is_absolute() else name


def seeds(n: int) -> str:
    """How many seeds, in words."""
    return f"{n} seed{'s' if n > 1 else ''}"


def concept(arms: Sequence[Trajectory]) -> str:
    """The concept's name, safe to draw."""
    return safe(name_of(arms[0]))


def safe(text: object) -> str:
    """Text as plotly draws it: it reads some HTML tags and entities, and a word of a corpus may be one."""
    return escape(str(text), quote=False)


def clipped(text: str, width: int = 18) -> str:
    """A word that is no longer than a hover box takes."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shown(label: Label, scores: Sequence[Scores], **interval: Any) -> Estimate:
    """The number that people read (F1, or loss), with the interval of the tables: over seeds, else over sentences."""
    interval_of = estimate(np.asarray, label, scores, **interval)
    value, *ends = (scores[0].displayed(each) for each in (interval_of.value, interval_of.low, interval_of.high))
    return replace(interval_of, value=value, low=min(ends), high=max(ends))  # a loss falls where its value rises


def dressed(figure: go.Figure, title: str, note: str, *, x: str = "", y: str = "", height: int = 420) -> go.Figure:
    """Title, note and axes, dark on white."""
    figure.update_layout(
        title={"text": title, "subtitle": {"text": note}, "x": 0.01, "xanchor": "left"},
        height=height,
        paper_bgcolor=PAPER,
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"t": 84, "r": 20, "l": 60, "b": 60},
        font={"color": TEXT, "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK, "remove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d"]},
        hoverlabel={"bgcolor": "#262626", "bordercolor": "#262626", "font": {"color": "#ffffff"}},
        legend={
            "orientation": "h",
            "y": -0.25,
            "bgcolor": "rgba(0,0,0,0)",
        },  # below, so that a phone has room for the picture
    )
    lines = {
        "gridcolor": GRID, "zerolinecolor": "rgba(128,128,128,0.6)", "linecolor": GRID, "automargin": True,
        "title_font_size": 13,
    }  # fmt: skip
    figure.update_xaxes(**lines).update_yaxes(**lines)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def said(figure: go.Figure) -> tuple[str, str]:
    """Title and note of a figure, as they were given to `dressed` (escaped text)."""
    title: Any = figure.layout.title  # pyright: ignore[reportAttributeAccessIssue]
    return title.text or "", title.subtitle.text or ""


def config(name: str) -> dict[str, Any]:
    """How plotly shows a figure on a page: as wide as there is room, with a button that saves it as a PNG."""
    picture = {"format": "png", "scale": 2, "filename": f"relearn-lens-{name}"}
    return {"responsive": True, "displayModeBar": "hover", "toImageButtonOptions": picture}


def live(figure: go.Figure) -> Any:
    """The figure as a widget that Python can change while it is shown.

    Raises:
        ImportError: anywidget is missing.
    """
    return go.FigureWidget(figure)


def save_html(figure: go.Figure, path: str | Path, *, plotlyjs: bool = True) -> Path:
    """Write a figure as a page that needs no network (about 5 MB, nearly all of it plotly.js); gives the path back.

    `plotlyjs=False` leaves plotly.js out, for a page that has it.
    """
    body = figure.to_html(
        full_html=False, include_plotlyjs=plotlyjs, auto_play=False, config={"displaylogo": False, **config("figure")}
    )
    head = f'<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{said(figure)[0]}</title>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def save_png(
    figure: go.Figure, path: str | Path, *, width: int = 900, height: int = 500, scale: float | int = 2
) -> Path:
    """Write a figure as a PNG on a white background; gives the path back.

    Raises:
        ImportError: kaleido, or the Chrome or Chromium that it draws with, is missing.
    """
    Path(path).write_bytes(png_of(figure, width=width, height=height, scale=scale))
    return Path(path)


def png_of(figure: go.Figure, *, width: int, height: int, scale: float | int) -> bytes:
    """A figure as the bytes of a PNG, on white and without sliders.

    Raises:
        ImportError: as `save_png`.
    """
    try:
        picture = go.Figure(figure).update_layout(paper_bgcolor="white")
        picture.layout.sliders = ()  # pyright: ignore[reportAttributeAccessIssue]
        return picture.to_image(format="png", width=width, height=height, scale=scale)
    except Exception as error:
        # plotly raises ValueError without kaleido, kaleido errors of its own without a browser
        text = f"{type(error).__module__} {error}".lower()
        if not any(word in text for word in ("kaleido", "choreographer", "chrome", "browser")):
            raise
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ImportError(
            "a PNG needs the package kaleido and a Chrome or Chromium that it can start: pip install "
            f'"relearn-lens[png]", then a browser (or `plotly_get_chrome`); save_html needs neither ({why})'
        ) from error
