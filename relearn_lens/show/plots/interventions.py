"""Figures of what was changed on purpose: how much was cut, and which part of the model brought it back."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from relearn_lens.analysis.intervals import FEWEST_SEEDS, over_seeds
from relearn_lens.measure.grafting import Grafts
from relearn_lens.measure.tracking import BASE, PRUNED
from relearn_lens.runs.cuts import bystanders
from relearn_lens.runs.events import Sized
from relearn_lens.runs.results import Run
from relearn_lens.show.plots.style import (
    ARM_COLOURS,
    INK,
    TEXT,
    NotMeasuredError,
    about,
    arm_of,
    concept,
    dressed,
    measured_by,
    safe,
    whole,
)

FREE = "free"
HELD = {"part": "held: the part that brings most", "heirs": "held: the heirs", "random": "held: as many others"}
"""What was held while it was retrained once more, as it is called."""


def dose(run: Run) -> go.Figure:
    """How large must the cut be, and is there a size that takes the concept and leaves the others?

    From left to right more neurons are ablated, without any training, on sentences that are used for nothing else. A
    specific cut is where the concept's line is down and that of the other labels is still up; where all fall together
    there is none. Beside them the same number of the other label's neurons, and of random ones, which should leave the
    concept alone. The dotted line is the size that was taken. Of several seeds the first is drawn, in which all sets
    were ablated.

    Raises:
        ValueError: the size of the cut was set, so no doses were measured.
    """
    measured = [sized for sized in whole(run).sized if sized.doses and sized.base is not None]
    if not measured:
        raise NotMeasuredError("the size of the cut was set, not found; prune.fraction = 'auto' finds it")
    sized, base = measured[0], measured[0].base
    arms = arm_of(run)
    name, others = concept(arms), bystanders(base, run.experiment.labels)
    other = run.manifest.get("other") or "another label"
    lines = [
        (f"{name}: its own neurons cut", "concept", run.label, ARM_COLOURS["concept"], "solid"),
        (f"{safe(', '.join(others))}: {name}'s neurons cut", "concept", others, "#56B4E9", "solid"),
        (f"{name}: {safe(other)}'s neurons cut", "other", run.label, ARM_COLOURS["other"], "longdash"),
        (f"{name}: random neurons cut", "random", run.label, ARM_COLOURS["random"], "dash"),
    ]
    figure = go.Figure()
    for title, cut, label, colour, dash in lines:
        doses = [each for each in sized.doses if each.cut == cut]
        if not doses or not label:
            continue
        figure.add_scatter(
            x=["0", *(_percent(each.fraction) for each in doses)],
            y=[base.shown(label), *(each.scores.shown(label) for each in doses)],
            name=title, mode="lines+markers", line={"color": colour, "width": 2.5, "dash": dash}, marker={"size": 7},
            hovertemplate="%{x} % cut: %{y:.3f}<extra>" + title + "</extra>",
        )  # fmt: skip
    every = ["0", *dict.fromkeys(_percent(each.fraction) for each in sized.doses)]
    if (taken := _percent(sized.fraction)) in every:
        figure.add_vline(x=every.index(taken), line={"color": INK, "width": 2, "dash": "dot"})  # pyright: ignore[reportArgumentType]
    dressed(
        figure,
        f"How much to cut: {base.metric} by share of neurons ablated",
        f"{about(run, arms)}; {_taken(run.sized)}",
        x="neurons cut, % of all",
        y=f"{base.metric} ({safe(base.unit)})",
    )
    figure.update_xaxes(type="category", categoryarray=every, categoryorder="array")
    return figure.update_yaxes(range=[-0.04, 1.04]) if base.metric == "F1" else figure


def blocked(run: Run) -> go.Figure:
    """Does it come back by another way where the first one is closed?

    The concept's arm retrained once more, as often as something was held where the cut had left it: the part that
    alone brings back most, the heirs, or as many other neurons, which is the control. Each stops where 90 % is back. A
    line to the right of the free arm's is a detour; one that lies on it says that nothing depended on what was held.
    Thin lines are seeds.

    Raises:
        NotMeasuredError: nothing was held in this run.
    """
    if not any(each.course for each in run.blocked):
        raise NotMeasuredError("nothing was held in this run; block.held = ['part', 'heirs', 'random'] does it")
    paths, label = {path.seed: path for path in run.arms["concept"]}, run.label
    colours = dict(zip(HELD.values(), ("#009E73", "#CC79A7", ARM_COLOURS["random"]), strict=True))
    figure, shown = go.Figure(), set[str]()
    for seed, path in paths.items():
        free = {at.step: path[stage].scores for stage in path.stages if (at := path[stage].at) and stage != BASE}
        each = {FREE: free} | {HELD[one.held]: one.course for one in run.blocked if one.seed == seed and one.course}
        start = path[PRUNED].scores
        for name, course in each.items():
            at = {0: start} | dict(course)
            figure.add_scatter(
                x=list(at), y=[scores.shown(label) for scores in at.values()], name=name, legendgroup=name,
                showlegend=name not in shown, mode="lines+markers", marker={"size": 7},
                line={"color": colours.get(name, ARM_COLOURS["concept"]), "width": 2.5 if len(paths) == 1 else 1.5},
                hovertemplate=f"{safe(name)}, seed {seed}, step %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
            shown.add(name)
    arms = list(paths.values())
    return dressed(
        figure, f"The return with something held: {start.metric} of {concept(arms)}", about(run, arms), x="steps",
        y=f"{start.metric} ({safe(start.unit)})",
    )  # fmt: skip


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}"


def _taken(sized: list[Sized]) -> str:
    """The size that each seed took."""
    by_size: dict[str, list[str]] = {}
    for each in sized:
        by_size.setdefault(_percent(each.fraction), []).append(str(each.seed))
    if len(by_size) == 1:
        return f"taken: {next(iter(by_size))} %"
    return "taken: " + ", ".join(f"{size} % (seed {', '.join(which)})" for size, which in by_size.items())


def grafts(run: Run) -> go.Figure:
    """Which part of the model brings the concept back: is it enough alone, and is it needed?

    Every row is a part of the model. The filled dot says how much of what came back is there when this part alone is
    taken from the retrained model and put into the cut one (`enough`), the open diamond how much is lost when this part
    alone is put back as it was after the cut (`needed`); 1 is all of it. Crosses are control grafts: the change of the
    same part in another arm, which should bring back nothing. Left: the first stage with nine tenths back; right: the
    last. Means over seeds, with intervals from three seeds on. `cut` are the weights that were cut, where they grew
    back. A row without a dot was refused: what came back is within noise.

    Raises:
        ValueError: no grafts were made.
    """
    stages = _by_stage(whole(run))
    if not stages:
        raise NotMeasuredError("no grafts were made in this run; they need a concept arm and grafts.skip = false")
    arms = arm_of(run)
    titles = [f"{title}<br>{measured_by(arms)[:-1]} {' or '.join(names)}" for title, names, _ in stages]
    figure = make_subplots(1, len(stages), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles)
    low, high = 0.0, 1.0
    for k, (_, _, made) in enumerate(stages, 1):
        parts = list(made[0].parts)
        rows = [
            (name, symbol, ARM_COLOURS["concept"], [[getattr(each, name)(p).value for each in made] for p in parts])
            for name, symbol in (("enough", "circle"), ("needed", "diamond-open"))
        ]
        rows += [
            (
                f"control: {safe(name)} arm's change", "x-thin", ARM_COLOURS.get(name, INK),
                [[each.control(name, p).value if p in each.controls[name] else np.nan for each in made] for p in parts],
            )
            for name in made[0].controls
        ]  # fmt: skip
        for title, symbol, colour, values in rows:
            estimates = [over_seeds(each) if np.isfinite(each).all() else None for each in values]
            centre = [None if each is None else each.value for each in estimates]
            reach = [
                0.0 if each is None or len(made) < FEWEST_SEEDS or each.interval is None else each.high - each.value
                for each in estimates
            ]
            is_control = title.startswith("control")
            figure.add_scatter(
                x=centre, y=[safe(part) for part in parts], mode="markers", name=title, legendgroup=title,
                showlegend=k == 1, marker={"symbol": symbol, "size": 9 if is_control else 12, "color": colour,
                                           "line": {"width": 2, "color": colour}},
                error_x={"type": "data", "array": reach, "thickness": 1.2, "width": 4, "color": colour,
                         "visible": any(reach) and not is_control},
                hovertemplate="%{y}: %{x:.2f}<extra>" + title + "</extra>", row=1, col=k,
            )  # fmt: skip
            ends = [(c - r, c + r) for c, r in zip(centre, reach, strict=True) if c is not None]
            low, high = min([low, *(a for a, _ in ends)]), max([high, *(b for _, b in ends)])
    for k in range(1, len(stages) + 1):
        for x in (0, 1):
            figure.add_vline(x=x, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=k)  # pyright: ignore[reportArgumentType]
    dressed(
        figure,
        f"Which part brings {concept(arms)} back",
        f"shares of the {safe(stages[0][2][0].outcomes[0])} that came back{', means' * (len(run.grafted) > 1)}; "
        f"{about(run, arms)}",
        x="share back",
        height=158 + 34 * len(stages[0][2][0].parts),
    )
    figure.update_xaxes(range=[max(low, -0.6) - 0.06, min(high, 1.6) + 0.06], zeroline=False)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title_text="part of the model", col=1)
    return figure.update_annotations(font={"size": 13, "color": TEXT}).update_layout(
        margin={"t": 140}, legend={"y": -0.38}
    )


def _by_stage(run: Run) -> list[tuple[str, list[str], list[Grafts]]]:
    """Title, stages by name, and the grafts of every seed, where it is first back and at the end."""
    whole = [grafted for grafted in run.grafted if grafted.stages]
    rows = []
    for title, which in (("first back", 0), ("at the end", -1)):
        if not whole or (which == 0 and all(len(grafted.stages) < 2 for grafted in whole)):
            continue
        names = [list(grafted.stages)[which] for grafted in whole]
        made = [grafted.stages[name] for grafted, name in zip(whole, names, strict=True)]
        rows.append((title, list(dict.fromkeys(names)), made))
    return rows
