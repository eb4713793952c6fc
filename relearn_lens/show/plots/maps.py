"""Figures with layers down one side: layer by stage, layer by neuron, layer by layer, and neurons as dots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import Tensor

from relearn_lens.analysis.migration import Selection, saliency_by_layer
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.topwords import TopWords
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.names import meant
from relearn_lens.neurons.sites import Neuron, Neurons, ordered
from relearn_lens.show.plots.style import (
    ARM_COLOURS,
    ARM_DASHES,
    BLANK,
    DIVERGING,
    INK,
    SEQUENTIAL,
    TEXT,
    NotMeasuredError,
    Paths,
    about,
    arm_of,
    arms_of,
    clipped,
    concept,
    dressed,
    of_seed,
    safe,
    stage_title,
)

BUDGET = 850_000
"""Bytes of text and numbers in the largest figure, so that with its axes it stays under 1 MB."""
DOTS = 4000
"""Neurons in a scatter; of more, so many are drawn by chance (seed 0)."""


def layer_map(
    data: Paths, *, selection: Selection = "matched", arm: str | None = None, against: str | None = None
) -> go.Figure:
    """In which layers does the concept sit, and does that change from stage to stage?

    Each cell is the mean rank saliency of a layer's neurons at a stage: 0.5, the pale middle of the scale, is what a
    layer would have if neurons were ranked at random. `matched` ranks the neurons that survived pruning, at base too,
    so that a change is not an effect of which neurons were taken; `all` ranks all of them. A grey cell without a number
    is a layer without any survivor. Of a run every arm has a panel (or `arm` alone): look at the controls before
    believing a change. For several seeds of an arm the mean is drawn. `against` names an arm of the run, such as
    `"unpruned"`: then each cell is what an arm has more than that one at the same stage, on the arm's own matched
    neurons, and 0 is what training does by itself.

    Raises:
        ValueError: no arm of that name, or an arm against itself.
    """
    arms = arms_of(data, arm)
    if against is not None:
        return _differences(data, [name for name in arms if name != against], against)
    first = next(iter(arms.values()))
    figure = _panels(list(arms))
    for k, each in enumerate(arms.values(), 1):
        stages = list(each[0].stages)
        maps = (saliency_by_layer(one, selection) for one in each)
        table = np.mean([[by_stage[stage] for stage in stages] for by_stage in maps], axis=0).T
        figure.add_heatmap(
            z=table, x=stages, y=list(each[0].site.layers), colorscale=DIVERGING, zmid=0.5, zmin=0, zmax=1,
            text=np.vectorize(lambda v: "" if np.isnan(v) else f"{v:.2f}")(table), texttemplate="%{text}",
            colorbar=_scale("rank<br>saliency"), showscale=k == len(arms),
            xgap=2, ygap=2, hoverongaps=False,
            hovertemplate="layer %{y}, stage %{x}: %{z:.3f}<extra></extra>", row=1, col=k,
        )  # fmt: skip
    who = {
        "matched": "surviving neurons on both sides"
        if first[0].compare is None
        else "the neurons that survive in the concept arm",
        "all": "all neurons",
        "published": "all neurons at base, survivors later",
    }[selection]
    note = f"mean rank saliency, {who}; 0.5 is chance; {about(data, first)}"
    return _titled(figure, f"Saliency of {concept(first)} by layer and stage", note, list(arms), first)


def _differences(data: Paths, names: Sequence[str], against: str) -> go.Figure:
    """The layer map of what arms have more than another arm at the same stage; one scale for all arms of the run."""
    twins = arm_of(data, against)
    arms = {name: each for name, each in arms_of(data).items() if name != against}
    if not names:
        raise ValueError(f"arm {against!r} cannot be set against itself; the run has {', '.join(arms) or 'no other'}")
    first = arms[names[0]]
    tables = {}
    for name, each in arms.items():
        differences = [
            [
                np.subtract(*(side[stage].saliency.by_rank(one.matched()).nanmean(1).numpy() for side in (one, twin)))
                for stage in one.stages
            ]
            for one, twin in zip(each, twins, strict=True)
        ]
        tables[name] = np.mean(differences, axis=0).T
    reach = max([0.05, *(float(np.nanmax(np.abs(t))) for t in tables.values() if np.isfinite(t).any())])
    figure = _panels(names)
    for k, name in enumerate(names, 1):
        table = tables[name]
        figure.add_heatmap(
            z=table, x=list(arms[name][0].stages), y=list(first[0].site.layers), colorscale=DIVERGING, zmid=0,
            zmin=-reach, zmax=reach, texttemplate="%{text}",
            text=np.vectorize(lambda v: "" if np.isnan(v) else f"{round(v, 2) + 0.0:+.2f}")(table),
            colorbar=_scale("difference"), showscale=k == len(names), xgap=2, ygap=2,
            hoverongaps=False, hovertemplate="layer %{y}, stage %{x}: %{z:+.3f}<extra></extra>", row=1, col=k,
        )  # fmt: skip
    note = f"difference of mean rank saliency, the same neurons on both sides; {about(data, first)}"
    return _titled(figure, f"Saliency of {concept(first)} more than in the {safe(against)} arm", note, names, first)


def _titled(figure: go.Figure, title: str, note: str, names: Sequence[str], first: Sequence[Trajectory]) -> go.Figure:
    """The titles of layers by stages, a panel for each arm."""
    arm, x = (f": {safe(names[0])} arm", stage_title(first)) if len(names) == 1 else ("", "stage")
    dressed(figure, f"{title}{arm}", note, x=x)
    figure.update_yaxes(title_text=f"layer ({safe(first[0].site.name)})", col=1)
    return _tiles(figure).update_xaxes(type="category")


def _panels(names: Sequence[str]) -> go.Figure:
    """A panel per arm, side by side."""
    titles = [f"{safe(name)} arm" for name in names] if len(names) > 1 else None
    return make_subplots(1, len(names), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)


def _scale(title: str) -> dict[str, Any]:
    """A colour bar."""
    font = {"size": 12}
    return {"title": {"text": title, "font": font}, "outlinewidth": 0, "thickness": 16, "tickfont": font}


def _tiles(figure: go.Figure) -> go.Figure:
    """The looks of a map: no grid, grey where there is no value, layers by name."""
    figure.update_layout(plot_bgcolor=BLANK).update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(type="category", showgrid=False, zeroline=False)
    if figure.layout.annotations:  # pyright: ignore[reportAttributeAccessIssue]
        figure.update_layout(margin={"t": 112})  # room for the panels' titles below the figure's
    return figure.update_annotations(font={"size": 13, "color": TEXT})


def neuron_map(
    data: Paths,
    *,
    arm: str | None = None,
    selection: Selection = "published",
    order: Literal["base", "index"] = "base",
    seed: int | None = None,
    stage: str | None = None,
) -> go.Figure:
    """Which single neurons carry the concept, and which take over? A slider goes through the stages.

    One row per layer, one cell per neuron; dark orange is the most salient neuron and dark purple the least, by rank.
    Within a layer neurons stand in the order of their saliency at base, most salient first (`order="index"`: by
    number), at every stage: the smooth row of base breaks up where other neurons take over. A grey cell is cut at that
    stage: ranks are among the neurons that are there (`matched` ranks survivors only, at base too; `all` always all).
    Hover for the neuron's name, score and top words at base and at the last stage. In a large model a cell is the mean
    of a block of neighbours; the title says of how many, and the hover text is that of its most salient neuron at base.
    Of several seeds one is drawn (`seed`, by default the first), as neurons have no counterpart in another training.
    `stage` is where the slider stands at first.

    Raises:
        ValueError: no arm of that name, no such seed or no such stage.
    """
    arms = arm_of(data, arm)
    path = of_seed(arms, seed, "arm")
    site, stages = path.site, list(path.stages)
    if stage is not None and stage not in stages:
        raise ValueError(f"no stage {stage!r} in this arm; it has {', '.join(stages)}{meant(stage, stages)}")
    shown = stages[0] if stage is None else stage
    base = path[stages[0]].saliency.score
    place = ordered(base)
    if order == "index":
        place = torch.arange(site.width).expand_as(place)
    block, text = _blocks(path, place, len(stages))
    lead = _leads(base.gather(1, place), block)
    ranks, scores = {}, {}
    for name in stages:
        saliency = path[name].saliency
        ranked = saliency.by_rank(_among(path, name, selection)).where(path.there(name).mask, torch.nan)
        # The mean of each block of neighbours without the blank ones; NaN where all are.
        ranks[name] = _rounded(_padded(ranked.gather(1, place), block, torch.nan).nanmean(2), 3)
        # Of a block, the score is that of the neuron that is named.
        scores[name] = _rounded(saliency.score.gather(1, place).gather(1, lead), 4)
    figure = go.Figure(
        go.Heatmap(
            z=ranks[shown], customdata=scores[shown], text=text, y=list(site.layers), x0=0, dx=block,
            colorscale=DIVERGING, zmin=0, zmid=0.5, zmax=1, hoverongaps=False, ygap=3,
            colorbar=_scale("rank<br>saliency"),
            hovertemplate="%{text}<br>rank saliency %{z:.3f}, score %{customdata:.3g} "
            f"{safe(path[stages[0]].saliency.unit)}<extra></extra>",
        )
    )  # fmt: skip
    slider = {
        "steps": [
            {"label": name, "method": "restyle", "args": [{"z": [ranks[name]], "customdata": [scores[name]]}, [0]]}
            for name in stages
        ],
        "active": stages.index(shown), "currentvalue": {"prefix": "stage: "}, "pad": {"t": 50},
        "len": 0.9, "tickcolor": INK, "bordercolor": INK, "bgcolor": "rgba(128,128,128,0.3)",
    }  # fmt: skip
    figure.update_layout(sliders=[slider])
    cell = f"; each cell is the mean of {block} neighbours" if block > 1 else ""
    sort = "by saliency at base within each layer" if order == "base" else "by index"
    one = f", seed {path.seed} drawn" if len(arms) > 1 else ""
    dressed(
        figure,
        f"Every neuron for {concept(arms)}, stage by stage: {path.arm or 'arm'} arm{cell}",
        f"rank saliency; grey: cut at that stage; {about(data, arms)}{one}",
        x=f"neuron, {sort}",
        y=f"layer ({safe(site.name)})",
        height=480,
    )
    return _tiles(figure)


def _among(path: Trajectory, stage: str, selection: Selection) -> Any:
    """The neurons that are ranked at a stage; None for all."""
    if selection == "matched":
        return path.matched()
    return None if selection == "all" else path.there(stage)


def _blocks(path: Trajectory, place: Tensor, stages: int) -> tuple[int, list[list[str]]]:
    """How many neighbours share a cell so that the figure stays small, and each cell's text."""
    base = path[path.stages[0]].saliency.score.gather(1, place)
    numbers = 13 * (stages + 1)  # bytes of a rank and a score, at every stage and once more at the first
    # A text is at least its neuron's name: no need to write those of a map that cannot fit.
    block = max(1, -(-base.numel() * (numbers + 20) // BUDGET))
    while True:
        lead = _leads(base, block)
        text = _hover(path, place.gather(1, lead), block)
        written = json.dumps(text)
        # plotly writes each of these characters as six
        size = len(written) + 5 * sum(map(written.count, "<>/")) + lead.numel() * numbers
        if size <= BUDGET:
            return block, text
        block = max(block + 1, int(np.ceil(block * size / BUDGET)))


def _leads(score: Tensor, block: int) -> Tensor:
    """Position of the most salient neuron of each block of neighbours, per layer."""
    padded = _padded(score.nan_to_num(-torch.inf), block, -torch.inf)
    return padded.argmax(2) + torch.arange(padded.shape[1]) * block


def _padded(values: Tensor, block: int, fill: float) -> Tensor:
    """Rows cut into blocks, the last one filled up."""
    layers, width = values.shape
    padded = values.new_full((layers, -(-width // block) * block), fill)
    padded[:, :width] = values
    return padded.view(layers, -1, block)


def _rounded(values: Tensor, digits: int) -> list[list[float | None]]:
    """As short numbers; None for NaN, which is no JSON."""
    return [[None if v != v else round(v, digits) for v in row] for row in values.tolist()]


def _hover(path: Trajectory, index: Tensor, block: int) -> list[list[str]]:
    """What each cell's neuron is and which words drive it, before and now."""
    layers = [safe(layer) for layer in path.site.layers]
    ends = dict.fromkeys((path.stages[0], path.stages[-1]))
    sides = [(safe(stage), words) for stage in ends if (words := path[stage].words) is not None]

    def text(layer: int, neuron: int) -> str:
        name = f"<b>{Neuron(layers[layer], neuron)}</b>" + (f" of {block}" if block > 1 else "")
        return "<br>".join([name, *(f"{stage}: {_words(words, layer, neuron)}" for stage, words in sides)])

    return [[text(layer, neuron) for neuron in members] for layer, members in enumerate(index.tolist())]


def _words(words: TopWords, layer: int, neuron: int) -> str:
    """Top words of a neuron, safe to draw."""
    ids = [w for w in words.words[layer, neuron].tolist() if w >= 0][:4]
    return ", ".join(safe(clipped(words.vocab[w])) for w in ids) or "no top words"


def flow(data: Paths, *, arm: str | None = None, which: Literal["all", "concept"] = "all") -> go.Figure:
    """Where is what a layer did now done? The flow of neurons between layers, base against the last stage.

    A row is a layer before, a column a layer after; a cell is the share of the row's neurons whose best match after
    (the neuron of any layer whose activations correlate with it most, over `"all"` words or the `"concept"`'s) is in
    that layer. Rows sum to 1; a bright diagonal means that neurons stayed in their layers. Of a run every arm has a
    panel: what the unpruned arm shows is what training on does by itself. A grey row has constant neurons alone.

    Raises:
        ValueError: activation similarity was not measured.
    """
    arms = {name: each for name, each in arms_of(data, arm).items() if all(which in one.similarity for one in each)}
    if not arms:
        raise NotMeasuredError("activation similarity was not measured; add 'similarity' to measure.what")
    first = next(iter(arms.values()))
    layers = list(first[0].site.layers)
    figure = _panels(list(arms))
    for k, each in enumerate(arms.values(), 1):
        table = torch.stack([one.similarity[which].flow for one in each]).mean(0).numpy()
        figure.add_heatmap(
            z=table, x=layers, y=layers, zmin=0, zmax=1, colorscale=SEQUENTIAL, hoverongaps=False, xgap=2, ygap=2,
            colorbar=_scale("share of<br>the row"), showscale=k == len(arms),
            text=np.vectorize(lambda v: "" if np.isnan(v) or v < 0.005 else f"{v:.2f}")(table),
            texttemplate="%{text}" if len(arms) == 1 else "",
            hovertemplate="from layer %{y} to layer %{x}: %{z:.3f}<extra></extra>", row=1, col=k,
        )  # fmt: skip
    over = f"{first[0].similarity[which].n_words:,} words" + (" of the concept" if which == "concept" else "")
    name = "" if len(arms) > 1 else f": {safe(next(iter(arms)))} arm"
    dressed(
        figure,
        f"Flow between layers, base to last stage, run on {concept(first)}{name}",
        f"share of a layer's neurons by the layer of their best match, over {over}; {about(data, first)}",
        x="layer after",
        height=440,
    )
    figure.update_yaxes(title_text="layer before", col=1)
    return _tiles(figure).update_xaxes(type="category")


def score_against(
    x: Saliency, y: Saliency, *, groups: Mapping[str, Neurons] | None = None, chance: Sequence[Saliency] = ()
) -> go.Figure:
    """Do two scores find the same neurons? One dot for each neuron, say what it tells apart against what is owed to it.

    Right is more by the first score, up is more by the second. `groups` are drawn as diamonds in colours of their own,
    all other neurons as grey rings. The dashed line is the highest that any neuron had under `chance`, the first score
    under shuffled labels (`Snapshot.shuffled`): what lies left of it is no find. Axes are logarithmic where nothing on
    them is below 0, and a neuron at 0 then stands at their foot.

    Raises:
        ValueError: scores of two sites.
    """
    site = x.site
    if y.site != site:
        raise ValueError(f"one score is of {site.name} and the other of {y.site.name}; give two of one site")
    groups = dict(groups or {})
    rest = ~sum((group.mask for group in groups.values()), torch.zeros_like(x.score, dtype=torch.bool))
    figure = go.Figure()
    (right, is_log), (up, up_log) = (_positions(score.score) for score in (x, y))
    looks = [("all others" if groups else "neurons", rest, "circle-open", "#8a8f98")]
    spare = [ARM_COLOURS["concept"], ARM_COLOURS["random"], ARM_COLOURS["never"], ARM_COLOURS["other"]]
    looks += [(safe(n), g.mask, "diamond", spare[i % len(spare)]) for i, (n, g) in enumerate(groups.items())]
    for name, mask, symbol, colour in looks:
        which = mask.nonzero()
        if len(which) > DOTS and symbol != "diamond":
            which = which[np.sort(np.random.default_rng(0).choice(len(which), DOTS, replace=False))]
        layer, index = which.T
        figure.add_scatter(
            x=right[layer, index], y=up[layer, index], mode="markers", name=f"{name} ({int(mask.sum()):,})",
            marker={"size": 9 if symbol == "diamond" else 7, "color": colour, "symbol": symbol, "opacity": 0.85},
            text=[safe(Neuron(site.layers[a], b)) for a, b in which.tolist()],
            customdata=torch.stack([x.score[layer, index], y.score[layer, index]], 1).numpy(),
            hovertemplate="%{text}: %{customdata[0]:.3g} and %{customdata[1]:.3g}<extra></extra>",
        )  # fmt: skip
    if chance:
        figure.add_scatter(
            x=[max(float(each.score.max()) for each in chance)] * 2, y=[float(up.min()), float(up.max())],
            mode="lines", hoverinfo="skip",
            name=f"highest under {len(chance)} shuffles of the labels", line={"color": INK, "dash": "dash", "width": 2},
        )  # fmt: skip
    dressed(
        figure,
        f"{safe(x.concept)}: {safe(x.kind)} against {safe(y.kind)}",
        f"{safe(site.name)}, {site.n_neurons:,} neurons of one seed"
        + (f"; {DOTS:,} of the others drawn" if int(rest.sum()) > DOTS else ""),
        x=f"{safe(x.kind)} ({safe(x.unit)})",
        y=f"{safe(y.kind)} ({safe(y.unit)})",
        height=480,
    )
    figure.update_xaxes(type="log" if is_log else "linear").update_yaxes(type="log" if up_log else "linear")
    return figure.update_xaxes(exponentformat="power").update_yaxes(exponentformat="power")


def _positions(score: Tensor) -> tuple[Tensor, bool]:
    """Where to draw scores, and whether on a logarithmic axis: their zeros then stand below all else."""
    above = score[score > 0]
    if (score < 0).any() or not len(above):
        return score, False
    return score.clamp(min=max(float(above.min()), float(above.max()) / 1e6) / 2), True


def saliency_against_similarity(
    data: Paths,
    *,
    arm: str | None = None,
    stage: str | None = None,
    similarity: Literal["words", "activations"] = "words",
) -> go.Figure:
    """Do the neurons that carry the concept now still mean what they meant before?

    Each dot is a surviving neuron: right, it is salient for the concept at the stage (by default the last); up, it is
    like itself at base, by the cosine of its top words' mean vectors (`"words"`) or by the correlation of its
    activations at the last stage (`"activations"`). Colour is the layer. Lines are the median of ten equal groups of
    neurons along the rank, one per arm: where the control's line falls as much, salient neurons are new in the control
    too. Neurons without top words, or constant ones, are left out.

    Raises:
        ValueError: top words or activation similarity were not measured.
    """
    arms = arm_of(data, arm)
    stage = arms[0].stages[-1] if stage is None or similarity == "activations" else stage
    points = _points(arms, stage, similarity)
    if not len(points):
        what = "'top_words'" if similarity == "words" else "'similarity'"
        raise NotMeasuredError(f"there is no similarity to base at stage {stage}; add {what} to measure.what")
    layers, some = list(arms[0].site.layers), points
    if len(points) > DOTS:
        some = points[np.sort(np.random.default_rng(0).choice(len(points), DOTS, replace=False))]
    figure = go.Figure()
    colours = sample_colorscale("viridis", np.linspace(0.2, 0.92, len(layers)).tolist())
    for i, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        here = some[some[:, 0] == i]
        figure.add_scatter(
            x=np.round(here[:, 2], 3), y=np.round(here[:, 3], 3), mode="markers", name=f"layer {safe(layer)}",
            marker={"color": colour, "size": 5, "opacity": 0.7}, customdata=here[:, 1].astype(int),
            hovertemplate=f"L{safe(layer)}N%{{customdata}}: rank saliency %{{x:.3f}}, similarity %{{y:.3f}}"
            "<extra></extra>",
        )  # fmt: skip
    for name, each in (arms_of(data) if not isinstance(data, Trajectory) else {}).items():
        mine = _points(each, stage, similarity) if all(stage in one.stages for one in each) else ()
        if len(mine) < 20:
            continue
        groups = np.array_split(mine[np.argsort(mine[:, 2])], 10)
        figure.add_scatter(
            x=[float(np.median(g[:, 2])) for g in groups], y=[float(np.median(g[:, 3])) for g in groups],
            mode="lines+markers", name=f"{safe(name)} arm, median", marker={"size": 7, "symbol": "square"},
            line={"color": ARM_COLOURS.get(name, INK), "width": 3, "dash": ARM_DASHES.get(name, "solid")},
            hovertemplate=f"{safe(name)} arm: median %{{y:.3f}} at rank saliency %{{x:.2f}}<extra></extra>",
        )  # fmt: skip
    drawn = f"{DOTS:,} of {len(points):,} dots drawn" if len(points) > DOTS else f"{len(points):,} dots"
    return dressed(
        figure,
        f"Saliency for {concept(arms)} and likeness to base, stage {safe(stage)}: {arms[0].arm or 'arm'} arm",
        f"surviving neurons, {drawn}; {about(data, arms)}",
        x="rank saliency among survivors (1 most salient)",
        y="top words' similarity to base (cosine)" if similarity == "words" else "correlation with itself at base",
        height=520,
    ).update_layout(legend_y=-0.2)


def _points(arms: Sequence[Trajectory], stage: str, similarity: str) -> np.ndarray:
    """Layer, neuron, rank saliency and similarity of every surviving neuron that has both, seeds below each other."""
    rows = []
    for arm in arms:
        like = arm[stage].meaning if similarity == "words" else getattr(arm.similarity.get("all"), "same", None)
        if like is None:
            continue
        rank = arm[stage].saliency.by_rank(arm.matched())
        layer, neuron = (~(rank.isnan() | like.isnan())).nonzero().T
        rows.append(torch.stack([layer, neuron, rank[layer, neuron], like[layer, neuron]], 1).double().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, 4))
