"""Figures of made-up runs: what is drawn equals what was measured."""

# plotly makes the attributes of a figure as it goes
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

import base64
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html import unescape
from itertools import pairwise
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from relearn_lens.analysis import story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.find.attribution import Attribution
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.evaluation import Margin, SpanScores, TokenLoss
from relearn_lens.measure.grafting import Grafts
from relearn_lens.measure.similarity import ActivationSimilarity
from relearn_lens.measure.topwords import TopWords
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.neurons.sites import Neurons, Site
from relearn_lens.neurons.streaming import ClassStats
from relearn_lens.runs.events import Again, Blocked, Damage, Dose, Grafted, Round, Sized
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.show import plots
from relearn_lens.show.plots.style import VERDICT_COLOURS
from tests.analysis.test_story import scores_of, site_of, trajectory

STAGES = ("base", "pruned", "1", "2")
F1 = {"concept": (0.9, 0.1, 0.6, 0.8), "random": (0.9, 0.7, 0.8, 0.88), "unpruned": (0.9, 0.9, 0.9, 0.9)}


def margined(scores: SpanScores) -> SpanScores:
    """The scores with margins that go with their F1, from -3 to 7."""
    names = (*scores.labels, "overall")
    total = np.tile([10 * scores.value(name) - 3 for name in names], (len(scores.counts), 1))
    return replace(scores, margin=Margin(total, np.ones(total.shape, dtype=np.int64), scores.labels))


def arm_of(name: str, seed: int, *, layers: int = 3, width: int = 4, noise: bool = True) -> Trajectory:
    """One arm; the whole last layer is pruned in the concept arm, one neuron of each layer in the random arm."""
    generator = torch.Generator().manual_seed(seed)
    pruned = torch.zeros(layers, width, dtype=torch.bool)
    if name == "concept":
        pruned[-1] = True
    if name == "random":
        pruned[:, 0] = True
    f1 = {
        stage: margined(scores_of(value, n=30, noise=seed if noise else None))
        for stage, value in zip(STAGES, F1[name], strict=True)
    }
    score = {stage: torch.rand(layers, width, generator=generator) for stage in STAGES}
    return trajectory(f1, score, removed=None if name == "unpruned" else pruned, arm=name, seed=seed)


def run_of(*arms: str, seeds: int = 1, draws: int = 3, **size) -> Run:
    """A finished run without a model."""
    experiment = Experiment.model_validate({"arms": arms, "seeds": range(seeds), "measure": {"draws": 200}})
    made = {name: [arm_of(name, seed, **size) for seed in range(seeds)] for name in arms}
    random = {"layers": tuple(margined(scores_of(0.5 + k / 10)) for k in range(draws))}
    damage = [Damage(seed, margined(scores_of(0.1)), random=random) for seed in range(seeds)]
    return Run(experiment, made, damage=damage)


RUNS = [
    (("concept", "random", "unpruned"), 1),
    (("concept", "random", "unpruned"), 3),
    (("concept",), 1),
    (("unpruned",), 2),
]


@pytest.fixture(params=RUNS, ids=lambda param: f"{'+'.join(param[0])}-{param[1]}")
def run(request) -> Run:
    return run_of(*request.param[0], seeds=request.param[1])


def drawn(figure: go.Figure) -> dict:
    """A figure as it is written, after the checks that hold for every figure."""
    assert isinstance(figure, go.Figure)
    text = figure.to_json()
    assert text is not None
    assert len(text) < 1_000_000
    found = json.loads(text)
    layout = found["layout"]
    title, note = plots.said(figure)
    assert title
    assert "seed" in note
    assert "neurons" in note
    # Dark on white, which a page of ours draws in its own ink and paper.
    assert (layout["paper_bgcolor"], layout["font"]["color"]) == ("#ffffff", "#1f2328")
    assert layout["plot_bgcolor"].startswith("rgba(")
    for axis in (layout[k] for k in layout if re.match(r"[xy]axis", k)):
        assert axis["gridcolor"].startswith("rgba(128,128,128")
    return found


def layout_of(figure: Any) -> Any:
    """A figure's layout, whose entries plotly makes as it goes."""
    return figure.layout


def axis_titles(figure: dict) -> dict[str, str]:
    """Axis name to its title."""
    axes = {k: v for k, v in figure["layout"].items() if re.match(r"[xy]axis", k)}
    return {name: axis.get("title", {}).get("text", "") for name, axis in axes.items()}


def lines(figure: dict) -> dict[str, dict]:
    """The traces that have a name."""
    return {trace["name"]: trace for trace in figure["data"] if trace.get("name")}


# --- recovery curves


def test_recovery_curves_draw_the_mean_of_each_arm(run):
    figure = drawn(plots.recovery_curves(run))
    for name, arms in run.arms.items():
        line = lines(figure)[name]
        assert tuple(line["x"]) == STAGES
        want = [np.mean([arm[stage].scores.value(("place",)) for arm in arms]) for stage in STAGES]
        assert line["y"] == pytest.approx(want)
        assert line["line"]["color"] == plots.ARM_COLOURS[name]
    assert figure["layout"]["xaxis"]["type"] == "category"


def test_recovery_curves_band_is_the_interval(run):
    figure = drawn(plots.recovery_curves(run))
    for name, arms in run.arms.items():
        (band,) = (t for t in figure["data"] if t.get("fill") == "toself" and t["legendgroup"] == name)
        found = [
            story.estimate(np.asarray, run.label, [arm[stage].scores for arm in arms], **run.interval)
            for stage in STAGES
        ]
        assert tuple(band["x"]) == STAGES + STAGES[::-1]
        assert band["y"] == pytest.approx([e.high for e in found] + [e.low for e in found][::-1])


def test_recovery_curves_say_over_what_the_interval_is():
    one, three = (plots.said(plots.recovery_curves(run_of("concept", seeds=n)))[1] for n in (1, 3))
    assert "95 % interval over 30 sentences" in one
    assert "95 % interval over 3 seeds" in three


def test_recovery_curves_show_the_random_draws():
    figure = lines(drawn(plots.recovery_curves(run_of("concept", "random", draws=3))))
    (name,) = (name for name in figure if "random sets" in name)
    assert name.startswith("3 ")
    assert figure[name]["x"] == ["pruned", "pruned"]
    assert figure[name]["y"] == pytest.approx([0.5, 0.7])
    bare = lines(drawn(plots.recovery_curves(run_of("concept", draws=0))))
    assert list(bare) == ["concept"]


# --- layer maps


def test_layer_map_draws_the_matched_saliency(run):
    for arms in run.arms.values():
        (heat,) = drawn(plots.layer_map(arms))["data"]
        assert tuple(heat["x"]) == STAGES
        assert heat["y"] == ["embed", "0", "1"]
        tables = [story.saliency_by_layer(arm) for arm in arms]
        for k, stage in enumerate(STAGES):
            want = np.mean([table[stage] for table in tables], axis=0)
            got = [np.nan if row[k] is None else row[k] for row in heat_rows(heat)]
            assert got == pytest.approx(list(want), nan_ok=True)


def heat_rows(heat: dict) -> list[list[float | None]]:
    """The cells of a heat map, whether plotly wrote lists or packed numbers."""
    if isinstance(heat["z"], list):
        return heat["z"]
    shape = [int(n) for n in heat["z"]["shape"].split(",")]
    return np.frombuffer(base64.b64decode(heat["z"]["bdata"]), heat["z"]["dtype"]).reshape(shape).tolist()


def cells(heat: dict) -> np.ndarray:
    """The same as numbers; blank cells are NaN."""
    return np.array(heat_rows(heat), dtype=float)


def test_layer_map_leaves_a_layer_without_survivors_blank():
    run = run_of("concept", "random")
    (heat,) = drawn(plots.layer_map(run.arms["concept"]))["data"]
    assert all(value is None or np.isnan(value) for value in heat_rows(heat)[2])
    assert [row[0] for row in heat["text"]][2] == ""
    (whole,) = drawn(plots.layer_map(run.arms["concept"], selection="all"))["data"]
    assert np.isfinite(cells(whole)).all()


def test_layer_map_takes_one_trajectory_or_several():
    arms = run_of("random", seeds=2).arms["random"]
    one, alone = plots.layer_map(arms[0]), plots.layer_map(arms[:1])
    assert one.to_json() == alone.to_json()
    assert "2 seeds" in plots.said(plots.layer_map(arms))[1]
    with pytest.raises(ValueError, match="there is no trajectory to draw"):
        plots.layer_map([])


def test_layer_map_of_a_run_has_a_panel_for_every_arm():
    run = run_of("concept", "random", "unpruned", seeds=2)
    figure = drawn(plots.layer_map(run))
    assert len(figure["data"]) == 3
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["concept arm", "random arm", "unpruned arm"]
    for heat, arms in zip(figure["data"], run.arms.values(), strict=True):
        (alone,) = drawn(plots.layer_map(arms))["data"]
        assert np.array_equal(cells(heat), cells(alone), equal_nan=True)
    assert [heat["showscale"] for heat in figure["data"]] == [False, False, True]
    (one,) = drawn(plots.layer_map(run, arm="random"))["data"]
    assert np.array_equal(cells(one), cells(figure["data"][1]), equal_nan=True)
    with pytest.raises(ValueError, match=r"no arm 'never' in this run; it has concept, random, unpruned"):
        plots.layer_map(run, arm="never")


def test_layer_map_has_one_scale_for_all_arms():
    heats = [drawn(plots.layer_map(arms))["data"][0] for arms in run_of("concept", "random").arms.values()]
    assert all((heat["zmin"], heat["zmid"], heat["zmax"]) == (0, 0.5, 1) for heat in heats)
    assert heats[0]["colorscale"] == heats[1]["colorscale"]


def test_layer_map_names_concept_and_arm():
    title = drawn(plots.layer_map(run_of("random").arms["random"]))["layout"]["title"]["text"]
    assert "place" in title
    assert "random" in title
    bare = Trajectory(run_of("random").arms["random"][0].snapshots)
    assert drawn(plots.layer_map(bare))["layout"]["title"]["text"]


# --- shares


def test_pruned_share_draws_the_share_of_each_layer():
    figure = drawn(plots.pruned_share(run_of("concept", "random")))
    bars, even = figure["data"]
    assert bars["x"] == ["embed", "0", "1"]
    assert even["y"] == pytest.approx([1 / 3] * 3)
    assert [float(v) for v in np.array(as_list(bars["y"]))] == pytest.approx([0, 0, 1])
    assert bars["marker"]["color"] == plots.ARM_COLOURS["concept"]
    assert "resid" in plots.said(plots.pruned_share(run_of("concept", "random")))[1]


def as_list(values) -> list[float]:
    if isinstance(values, list):
        return values
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


def test_pruned_share_takes_any_arms(run):
    drawn(plots.pruned_share(run))


def test_pruned_share_of_a_random_arm_alone_has_its_colour():
    bars, _ = drawn(plots.pruned_share(run_of("random")))["data"]
    assert bars["marker"]["color"] == plots.ARM_COLOURS["random"]


# --- all of them


def test_colours_of_the_arms_are_fixed_and_differ():
    assert list(plots.ARM_COLOURS) == ["concept", "other", "random", "unpruned", "never"]
    assert len(set(plots.ARM_COLOURS.values())) == 5
    alone = lines(drawn(plots.recovery_curves(run_of("unpruned", draws=0))))["unpruned"]["line"]["color"]
    beside = lines(drawn(plots.recovery_curves(run_of("concept", "unpruned"))))["unpruned"]["line"]["color"]
    assert alone == beside == plots.ARM_COLOURS["unpruned"]


def test_figures_of_a_wide_model_stay_small():
    run = run_of("concept", "random", "unpruned", seeds=5, layers=33, width=4096)
    assert site_of(33, 4096).n_neurons == run.arms["concept"][0].site.n_neurons
    drawn(plots.recovery_curves(run))
    drawn(plots.layer_map(run.arms["random"]))
    drawn(plots.neuron_map(run, arm="random"))
    drawn(plots.pruned_share(run))


def test_figures_are_never_shown_and_set_no_default(monkeypatch, run):
    import plotly.io as pio

    monkeypatch.setattr(pio, "show", lambda *_, **__: pytest.fail("shown"))
    before = pio.templates.default, pio.renderers.default
    plots.recovery_curves(run)
    plots.layer_map(next(iter(run.arms.values())))
    plots.pruned_share(run)
    assert (pio.templates.default, pio.renderers.default) == before


# --- a run in which everything was measured

HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "<b>Rome</b> & Paul")


def rich(run: Run, *, words: bool = True) -> Run:
    """The run with class statistics, top words (some of them HTML), attributions and activation similarity."""
    for arms in run.arms.values():
        for i, arm in enumerate(arms):
            arms[i] = _measured(arm, words)
    return run


def _measured(arm: Trajectory, words: bool) -> Trajectory:
    site, rng = arm.site, np.random.default_rng(arm.seed)
    shape = (len(site.layers), site.width)

    def numbers(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=size)).float()

    def full(snapshot: Snapshot, at_end: bool) -> Snapshot:
        mean, m2 = numbers(3, *shape).double(), numbers(3, *shape).double().abs()
        stats = ClassStats(torch.tensor([50, 30, 20]), mean, m2, ("O", "person", "place"), site)
        if not at_end:
            return replace(snapshot, stats=stats)
        vocab = (*HOSTILE, *(f"word{k}" for k in range(20)))
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(len(vocab)), (*shape, 1)), axis=-1)[..., :5])
        none = torch.zeros(shape, dtype=torch.bool)
        top = TopWords(order, torch.rand(*shape, 5), vocab, none, none, site, 40, 0.1)
        score = numbers(*shape)
        change = 3.0
        made = Attribution(
            score, score.sum(1) - change, change, 20, 10, "margin", "logit per word", "mask", "gauss-legendre", 8,
            "conductance", "place", site,
        )  # fmt: skip
        meaning = (numbers(*shape) / 4).clamp(-1, 1)
        meaning[0, 0] = torch.nan
        return replace(
            snapshot, stats=stats, attributions={"conductance": made}, words=top if words else None,
            meaning=meaning if words else None,
            concept_words=("word1",),
        )  # fmt: skip

    flow = torch.softmax(numbers(shape[0], shape[0]), 1)
    flow[1] = torch.nan
    layer = torch.zeros(shape, dtype=torch.int64)
    similarity = ActivationSimilarity(
        numbers(*shape), numbers(*shape), layer, layer, flow, flow.abs(), 0.2, 0.3, "all", 100, site
    )
    ends = (arm.stages[0], arm.stages[-1])
    snapshots = {stage: full(snapshot, stage in ends) for stage, snapshot in arm.snapshots.items()}
    return replace(arm, snapshots=snapshots, similarity={"all": similarity, "concept": similarity})


@pytest.fixture(scope="module")
def whole() -> Run:
    return rich(run_of("concept", "random", "unpruned", seeds=3, width=12))


def texts(value: Any) -> Iterator[str]:
    """Every string in a figure."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(inner)


FIGURES = {
    "recovery_curves": plots.recovery_curves,
    "pruned_share": plots.pruned_share,
    "layer_map": plots.layer_map,
    "neuron_map": plots.neuron_map,
    "flow": plots.flow,
    "migration": plots.migration,
    "saliency_against_similarity": plots.saliency_against_similarity,
    "by activations": lambda run: plots.saliency_against_similarity(run, similarity="activations"),
    "attribution": plots.attribution,
    "neuron_card": lambda run: plots.neuron_card(run, "L0N1", examples=[(HOSTILE, (0.0, 1.0, 2.0))]),
    "verdicts": plots.verdicts,
}
EACH = pytest.mark.parametrize("name", FIGURES)


@EACH
def test_figure_is_drawn_of_a_run_with_everything(name, whole):
    figure = drawn(FIGURES[name](whole))
    assert figure["data"]
    assert "minilm" in plots.said(FIGURES[name](whole))[1]
    assert "3 seeds" in plots.said(FIGURES[name](whole))[1]


@EACH
@pytest.mark.parametrize("arms", [("concept", "random", "unpruned"), ("concept",), ("concept", "random")])
def test_figure_is_drawn_of_one_seed_and_any_controls(name, arms):
    drawn(FIGURES[name](rich(run_of(*arms, width=12, draws=0))))


@EACH
def test_figure_draws_no_word_as_html(name, whole):
    """Plotly reads a few tags in text: only those that a figure writes itself may be in one."""
    whole = replace(whole, experiment=whole.experiment.model_copy(update={"model": HOSTILE[0], "corpus": HOSTILE[1]}))
    for text in texts(json.loads(FIGURES[name](whole).to_json())):
        assert set(re.findall(r"<\s*/?\s*([^>\s/]*)", text)) <= {"b", "br", "extra"}, text
        assert "<b>Rome" not in text


@EACH
def test_figure_names_every_axis(name, whole):
    figure = FIGURES[name](whole)
    titles = axis_titles(drawn(figure))
    named = [axis for axis, title in titles.items() if title]
    # The claims' rows and the words of an example have no unit; panels side by side share what stands at the left.
    assert named or name == "neuron_map"
    first = titles if len(titles) == 2 else {k: titles[k] for k in ("xaxis", "yaxis")}
    expected = {"verdicts": ["xaxis"], "neuron_card": ["yaxis"], "attribution": ["yaxis"]}
    assert [k for k, v in first.items() if v] == expected.get(name, ["xaxis", "yaxis"])


def contrast(colour: str, page: str) -> float:
    """WCAG contrast of two colours."""

    def light(hex: str) -> float:
        parts = [int(hex[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((light(colour), light(page)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#14171a"])
def test_colours_are_seen_on_light_and_dark_pages(page, whole):
    layout = layout_of(plots.recovery_curves(whole))
    assert contrast(layout.font.color, layout.paper_bgcolor) >= 7
    assert layout.legend.bgcolor == "rgba(0,0,0,0)"  # on a page its text has the page's ink
    for colour in plots.ARM_COLOURS.values():
        assert contrast(colour, page) >= 2.8
    for colour, _ in plots.VERDICTS.values():
        assert contrast(colour, page) >= 2.2


def test_verdicts_and_arms_are_told_apart_without_colour(whole):
    assert len({symbol for _, symbol in plots.VERDICTS.values()}) == len(plots.VERDICTS)
    dashes = [line["line"]["dash"] for name, line in lines(drawn(plots.recovery_curves(whole))).items() if name in F1]
    assert len(set(dashes)) == 3


def test_panels_that_are_compared_share_their_axis(whole):
    layout = layout_of(plots.migration(whole))
    assert layout.xaxis.matches == layout.xaxis2.matches == "x"


# --- two scores against each other


def saliency_by(score: list[list[float]], kind: str = "dprime", site: Site | None = None) -> Saliency:
    values = torch.tensor(score)
    return Saliency(values, kind, "standard deviations", "place", site or site_of(*values.shape))


def test_score_against_draws_each_neuron_once_in_its_group():
    x, y = saliency_by([[1.0, 2.0], [4.0, 0.0]]), saliency_by([[1.0, 3.0], [0.5, 2.0]], "conductance")
    planted = Neurons.of(x.site, [(x.site.layers[1], 0)])
    chance = [saliency_by([[0.5, 0.25], [0.5, 1.5]])]
    figure: Any = plots.score_against(x, y, groups={"<b>planted": planted}, chance=chance)
    others, group, line = figure.data
    assert (others.name, list(others.y), list(others.x)) == ("all others (3)", [1, 3, 2], [1, 2, 0.5])
    assert [list(c) for c in others.customdata] == [[1, 1], [2, 3], [0, 2]]
    assert (group.name, list(group.x), list(group.y)) == ("&lt;b&gt;planted (1)", [4], [0.5])
    assert list(group.text) == [str(next(iter(planted)))]
    assert list(line.x) == [1.5, 1.5]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    drawn(figure)


def test_score_against_draws_signed_scores_on_a_line_and_refuses_two_sites():
    x, y = saliency_by([[-1.0, 2.0]]), saliency_by([[1.0, 3.0]])
    assert layout_of(plots.score_against(x, y)).xaxis.type == "linear"
    with pytest.raises(ValueError, match=r"one score is of .* and the other of .*; give two of one site"):
        plots.score_against(x, saliency_by([[1.0], [2.0]]))


# --- neuron map


def steps_of(figure: go.Figure) -> dict[str, dict[str, list]]:
    """Stage to what the slider puts into the map."""
    return {step.label: step.args[0] for step in layout_of(figure).sliders[0].steps}


@pytest.mark.parametrize("selection", ["matched", "published", "all"])
@pytest.mark.parametrize("order", ["base", "index"])
def test_neuron_map_has_every_neuron_at_every_stage(selection, order, whole):
    figure = plots.neuron_map(whole, arm="random", selection=selection, order=order, seed=1)
    arm = whole.arms["random"][1]
    assert list(steps_of(figure)) == list(STAGES)
    seen = set()
    for stage, step in steps_of(figure).items():
        among = {"matched": arm.survivors(), "all": None, "published": None if stage == "base" else arm.survivors()}
        # A pruned neuron has no rank after base, whatever the others are ranked among.
        rank = arm[stage].saliency.by_rank(among[selection]).where(arm.there(stage).mask, torch.nan)
        for i, layer in enumerate(arm.site.layers):
            for k, text in enumerate(figure.data[0].text[i]):
                name, index = re.findall(r"^<b>(L\w+N(\d+))</b>", text)[0]
                assert name == f"L{layer}N{index}"
                seen.add(name)
                want = float(rank[i, int(index)])
                got = step["z"][0][i][k]
                assert (got is None) == np.isnan(want)
                assert got is None or got == pytest.approx(want, abs=6e-4)
                assert step["customdata"][0][i][k] == pytest.approx(
                    float(arm[stage].saliency.score[i, int(index)]), abs=6e-5
                )
    assert len(seen) == arm.site.n_neurons
    assert figure.data[0].z[0][0] == steps_of(figure)["base"]["z"][0][0][0]


def test_neuron_map_is_sorted_by_saliency_at_base(whole):
    figure = plots.neuron_map(whole, selection="all")
    rows = steps_of(figure)["base"]["z"][0]
    assert all(a >= b for row in rows for a, b in pairwise(row))
    later = steps_of(figure)["2"]["z"][0]
    assert not all(a >= b for row in later for a, b in pairwise(row))


def test_neuron_map_hovers_with_the_words_before_and_now(whole):
    figure = plots.neuron_map(whole, order="index")
    arm = whole.arms["concept"][0]
    for i, layer in enumerate(arm.site.layers):
        _, before, now = figure.data[0].text[i][3].split("<br>")
        for said, stage in ((before, "base"), (now, "2")):
            top = arm[stage].words
            assert top is not None
            label, _, listed = unescape(said).partition(": ")
            assert label == stage
            want = [w if len(w) <= 18 else w[:17] + "…" for w in top.of((layer, 3))[:4]]
            assert listed == ", ".join(want)
    assert "%{text}" in figure.data[0].hovertemplate
    bare = plots.neuron_map(run_of("concept"))
    assert bare.data[0].text[0][0].startswith("<b>Lembed")
    assert "<br>" not in bare.data[0].text[0][0]


def test_neuron_map_of_a_large_model_is_of_blocks_and_says_so():
    run = rich(run_of("concept", layers=9, width=4096))
    figure = plots.neuron_map(run, selection="all")
    drawn(figure)
    (size,) = re.findall(r"each cell is the mean of (\d+) neighbours", plots.said(figure)[0])
    size = int(size)
    assert size > 1
    arm = run.arms["concept"][0]
    base = arm["base"].saliency.score
    for layer in (0, 8):
        order = base[layer].argsort(descending=True, stable=True).tolist()
        # A pruned neuron is in no cell, however salient it stayed.
        rank = arm["1"].saliency.by_rank().where(arm.survivors().mask, torch.nan)[layer].tolist()
        want = [torch.tensor([rank[n] for n in order[k : k + size]]).nanmean() for k in range(0, 4096, size)]
        got = np.array(steps_of(figure)["1"]["z"][0][layer], dtype=float)
        np.testing.assert_allclose(got, want, atol=6e-4)
        named = [int(re.findall(r"N(\d+)</b>", text)[0]) for text in figure.data[0].text[layer]]
        assert named == order[::size]
    assert "mean of" not in plots.said(plots.neuron_map(run_of("concept")))[0]


def test_neuron_map_needs_a_seed_that_is_there(whole):
    with pytest.raises(ValueError, match=r"no seed 7 in this arm; it has 0, 1, 2"):
        plots.neuron_map(whole, seed=7)


def test_neuron_map_starts_at_a_stage(whole):
    figure = plots.neuron_map(whole, stage="1")
    assert layout_of(figure).sliders[0].active == 2
    assert [list(row) for row in figure.data[0].z] == steps_of(figure)["1"]["z"][0]
    with pytest.raises(ValueError, match=r"no stage '9' in this arm; it has base, pruned, 1, 2"):
        plots.neuron_map(whole, stage="9")


# --- flow


def test_flow_draws_the_mean_over_seeds(whole):
    figure = drawn(plots.flow(whole))
    for heat, arms in zip(figure["data"], whole.arms.values(), strict=True):
        want = np.mean([arm.similarity["all"].flow.numpy() for arm in arms], axis=0)
        assert np.allclose(cells(heat), want, equal_nan=True)
        assert (heat["zmin"], heat["zmax"]) == (0, 1)
    assert np.isnan(cells(figure["data"][0])[1]).all()
    assert len(drawn(plots.flow(whole, arm="random", which="concept"))["data"]) == 1
    assert "100 words of the concept" in plots.said(plots.flow(whole, which="concept"))[1]


# --- migration


def test_migration_draws_each_layers_change_of_share_matched_and_unmatched(whole):
    figure = plots.migration(whole)
    panels = {("concept arm", axis): t for t in figure.data if t.name == "concept arm" for axis in [t.xaxis]}
    assert len(panels) == 2
    matched, published = [], []
    for mine, other in zip(whole.arms["concept"], whole.arms["random"], strict=True):
        both = (mine.survivors() & other.survivors()).mask
        before, after = mine["base"].saliency.score.double(), mine["2"].saliency.score.double()

        def share(score, mask):
            kept = (score * mask).sum(1)
            return (kept / kept.sum()).numpy()

        matched.append(share(after, both) - share(before, both))
        published.append(share(after, mine.survivors().mask) - share(before, torch.ones_like(both)))
    for axis, want in (("x", matched), ("x2", published)):
        trace = panels["concept arm", axis]
        assert list(trace.y) == ["embed", "0", "1"]
        assert np.array(trace.x) == pytest.approx(100 * np.mean(want, axis=0))
    assert [note.text for note in layout_of(figure).annotations] == ["matched", "as published"]
    assert "mean depth moved" in plots.said(figure)[1]


def test_migration_draws_whiskers_from_three_seeds_on(whole):
    assert all(t.error_x.visible for t in plots.migration(whole).data)
    assert not any(t.error_x.visible for t in plots.migration(run_of("concept", "random", width=12)).data)


def test_migration_without_a_control_draws_none():
    assert {t.name for t in plots.migration(run_of("concept", width=12)).data} == {"concept arm"}
    with pytest.raises(ValueError, match="migration needs a concept arm, found random"):
        plots.migration(run_of("random"))


# --- saliency against similarity


def test_saliency_against_similarity_has_a_dot_for_every_neuron_with_both(whole):
    figure = plots.saliency_against_similarity(whole)
    found = {}
    for i, layer in enumerate(whole.arms["concept"][0].site.layers):
        dots = next(t for t in figure.data if t.name == f"layer {layer}")
        want = []
        for arm in whole.arms["concept"]:
            rank, like = arm["2"].saliency.by_rank(arm.survivors())[i], arm["2"].meaning
            assert like is not None
            want += [(k, float(rank[k]), float(like[i, k])) for k in range(12) if not torch.isnan(rank[k] + like[i, k])]
        got = list(zip(dots.customdata, dots.x, dots.y, strict=True))
        assert np.array(sorted(got)) == pytest.approx(np.array(sorted(want)), abs=6e-4)
        found[layer] = len(got)
    assert found == {"embed": 3 * 11, "0": 3 * 12, "1": 0}


def test_saliency_against_similarity_draws_every_arm_as_a_line(whole):
    figure = plots.saliency_against_similarity(whole)
    drawn_lines = {t.name: t for t in figure.data if t.mode == "lines+markers"}
    assert set(drawn_lines) == {"concept arm, median", "random arm, median", "unpruned arm, median"}
    assert all(list(t.x) == sorted(t.x) for t in drawn_lines.values())
    assert not [t for t in plots.saliency_against_similarity(whole.arms["concept"][0]).data if "arm" in t.name]


def test_saliency_against_similarity_draws_a_sample_of_many_and_says_so():
    run = rich(run_of("concept", layers=4, width=2000))
    figure = plots.saliency_against_similarity(run)
    drawn(figure)
    assert sum(len(t.x) for t in figure.data if t.mode == "markers") == 4000
    assert "4,000 of 5,999 dots drawn" in plots.said(figure)[1]


# --- attribution


def test_attribution_draws_shares_and_sums(whole):
    figure = plots.attribution(whole)
    upper = {t.name: t for t in figure.data if t.yaxis == "y"}
    lower = {t.name: t for t in figure.data if t.yaxis == "y2"}
    assert list(upper) == ["base", "concept arm, stage 2", "random arm, stage 2", "unpruned arm, stage 2"]
    for name, arms, stage in (("base", "concept", "base"), ("random arm, stage 2", "random", "2")):
        scores = [arm[stage].attribution.score.double() for arm in whole.arms[arms]]
        sizes = [score.abs().sum(1) for score in scores]
        assert np.array(upper[name].y) == pytest.approx(np.mean([(s / s.sum()).numpy() for s in sizes], axis=0))
        sums = np.mean([score.sum(1).numpy() / 3 for score in scores], axis=0)
        assert np.array(lower[name].y) == pytest.approx(sums, rel=1e-5)
    worst = max(
        float((a[s].attribution.delta.abs() / 3).max())
        for arms in whole.arms.values()
        for a in arms
        for s in ("base", "2")
    )
    assert f"completeness error at most {worst:.0%}" in plots.said(figure)[1]


# --- neuron card


def test_neuron_card_draws_the_rank_in_every_arm(whole):
    figure = plots.neuron_card(whole, "L0N0")
    for name, cut in (("concept", False), ("random", True), ("unpruned", False)):
        line = next(t for t in figure.data if t.name == f"{name} arm" + " (pruned)" * cut)
        arm = whole.arms[name][0]
        ranks = [float(arm[stage].saliency.by_rank(arm.there(stage))[1, 0]) for stage in STAGES]
        assert list(line.y) == pytest.approx(ranks, nan_ok=True)  # of those that are there: none where it is pruned
        assert np.isnan(ranks).tolist() == [cut and stage != "base" for stage in STAGES]
    assert "not pruned in this arm" in plots.said(figure)[1]
    assert "seed 0 drawn" in plots.said(figure)[1]
    assert plots.neuron_card(whole, ("0", 0)).to_json() == figure.to_json()


def test_neuron_card_draws_how_well_classes_are_told_apart():
    rng = np.random.default_rng(3)
    run = run_of("concept")
    arm = run.arms["concept"][0]
    words = [rng.normal(mean, 1 + mean, size) for mean, size in ((0, 40), (1, 12), (2, 9))]
    shape = (3, 4)
    stats = ClassStats(
        torch.tensor([len(w) for w in words]),
        torch.stack([torch.full(shape, w.mean(), dtype=torch.float64) for w in words]),
        torch.stack([torch.full(shape, ((w - w.mean()) ** 2).sum(), dtype=torch.float64) for w in words]),
        ("O", "person", "place"),
        arm.site,
    )
    snapshots = {stage: replace(s, stats=stats) for stage, s in arm.snapshots.items()}
    run.arms["concept"] = [replace(arm, snapshots=snapshots)]
    bars = [t for t in plots.neuron_card(run, "L0N1").data if t.type == "bar"]
    want = []
    for k in range(3):
        mine, rest = words[k], np.concatenate([w for i, w in enumerate(words) if i != k])
        pooled = np.sqrt(
            (((mine - mine.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum()) / (len(mine) + len(rest) - 2)
        )
        want.append((mine.mean() - rest.mean()) / pooled)
    assert [bar.name for bar in bars] == ["stage base", "stage 2"]
    assert list(bars[0].x) == ["O", "person", "place"]
    assert list(bars[0].y) == pytest.approx(want)


def test_neuron_card_lists_top_words_and_says_what_is_missing(whole):
    figure = plots.neuron_card(whole, "L1N7")
    (table,) = (t for t in figure.data if t.type == "table")
    top = whole.arms["concept"][0]["2"].words
    assert top is not None
    assert list(table.cells.values[0]) == ["base", "2"]
    said = unescape(table.cells.values[1][1])
    assert said == ", ".join(w if len(w) <= 18 else w[:17] + "…" for w in top.of(("1", 7)))
    assert "without example sentences: the run keeps activations of 50 neurons" in plots.said(figure)[1]
    (bare,) = (t for t in plots.neuron_card(run_of("concept"), "L1N2").data if t.type == "table")
    assert bare.cells.values[1][0] == "top words were not measured (measure.what with top_words)"


def test_neuron_card_colours_examples_around_0(whole):
    figure = plots.neuron_card(whole, "L1N7", examples=[(("Paul", "saw", "<b>Rome</b>"), (0, 1, 5)), (("he",), (2,))])
    (heat,) = (t for t in figure.data if t.type == "heatmap")
    assert [list(row) for row in heat.text] == [
        ["he", "", ""],
        ["Paul", "saw", "&lt;b&gt;Rome&lt;/b&gt;"],
    ]
    assert np.array(heat.z, dtype=float)[1] == pytest.approx([-2, -1, 3])
    assert (heat.zmin, heat.zmid, heat.zmax) == (-3, 0, 3)
    assert "without example" not in plots.said(figure)[1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("4:217", r"'4:217' is no name of a neuron; write L<layer>N<index>, such as L1N0"),
        ("L9N1", r"resid of this run has no neuron 1 in layer '9'; layers embed, 0, 1, neurons 0 to 11"),
        ("L1N12", r"resid of this run has no neuron 12 in layer '1'"),
    ],
)
def test_neuron_card_refuses_what_is_no_neuron(name, wrong, whole):
    with pytest.raises(ValueError, match=wrong):
        plots.neuron_card(whole, name)
    with pytest.raises(ValueError, match=r"no seed 5 in this run; it has 0, 1, 2"):
        plots.neuron_card(whole, "L1N1", seed=5)


# --- verdicts


def claim_of(id: str, verdict: Any, effect: Estimate | None, bar: float = 0.5) -> Claim:
    return Claim(id, f"the claim {id} says <this>", effect, "share", bar, verdict, "because")


CLAIMS = [
    claim_of("C1", "supported", Estimate(1.0, 0.75, 1.5, "3 seeds")),
    claim_of("C2", "reversed", Estimate(-2.0, -3.0, -1.0, "3 seeds")),
    claim_of("C3", "not supported", Estimate(0.1, -0.2, 0.3, "3 seeds")),
    claim_of("C4", "inconclusive", Estimate(0.4, float("nan"), float("nan"), "one seed")),
    claim_of("C5", "inconclusive", None),
]


def test_verdicts_draw_effects_in_units_of_the_bar():
    figure = plots.verdicts(CLAIMS)
    dots = {t.name: t for t in figure.data}
    for claim in CLAIMS[:3]:
        trace = dots[claim.verdict]
        assert claim.effect is not None
        at = np.sinh(trace.x[0])
        assert at == pytest.approx(claim.effect.value / claim.bar)
        assert np.sinh(trace.x[0] + trace.error_x.array[0]) == pytest.approx(claim.effect.high / claim.bar)
        assert np.sinh(trace.x[0] - trace.error_x.arrayminus[0]) == pytest.approx(claim.effect.low / claim.bar)
    numbers = [note.text for note in layout_of(figure).annotations[len(CLAIMS) :]]
    assert numbers == ["1.000 [0.750, 1.500]", "-2.000 [-3.000, -1.000]", "0.100 [-0.200, 0.300]", "0.400"]
    unsure = dots["inconclusive"]
    assert np.sinh(unsure.x[0]) == pytest.approx(0.8)
    assert np.isnan(unsure.error_x.array[0])
    assert np.isnan(unsure.x[1])
    assert [dots[c.verdict].y[0] for c in CLAIMS[:4]] == [5, 4, 3, 2]
    band, *rows = layout_of(figure).shapes
    assert [row.fillcolor for row in rows] == [VERDICT_COLOURS[claim.verdict] for claim in CLAIMS]
    assert all(row.y0 < dots[c.verdict].y[0] < row.y1 for row, c in zip(rows[:3], CLAIMS[:3], strict=True))
    assert (np.sinh(band.x0), np.sinh(band.x1)) == pytest.approx((-1, 1))
    low, high = layout_of(figure).xaxis.range
    assert low == -high
    assert low < dots["reversed"].x[0] - dots["reversed"].error_x.arrayminus[0]


def test_verdicts_lie_where_the_rule_puts_them(whole):
    """Whiskers right of the band are supported, left of it reversed, inside not supported."""
    for trace in plots.verdicts(whole).data:
        ends = np.array(trace.x) + trace.error_x.array, np.array(trace.x) - trace.error_x.arrayminus
        for high, low in zip(*(np.sinh(e) for e in ends), strict=True):
            where = (
                "inconclusive" if np.isnan(low) else "supported" if low > 1 else "reversed" if high < -1
                else "not supported" if low >= -1 and high <= 1 else "inconclusive"
            )  # fmt: skip
            assert trace.name == where


def test_verdicts_say_every_claim_and_its_verdict(whole):
    notes = [note.text.replace("<br>", " ") for note in layout_of(plots.verdicts(CLAIMS)).annotations]
    assert notes[1] == "<b>C2, reversed:</b> the claim C2 says &lt;this&gt;"
    said = [note.text.replace("<br>", " ") for note in layout_of(plots.verdicts(whole)).annotations]
    assert [f"<b>{c.id}, {c.verdict}:</b> {c.says}" for c in whole.numbers.claims] == said[: len(whole.numbers.claims)]
    with pytest.raises(plots.NotMeasuredError, match="this run has no concept arm"):
        plots.verdicts(run_of("random"))


# --- what was not measured


@pytest.mark.parametrize(
    ("plot", "wrong"),
    [
        (plots.flow, "activation similarity was not measured; add 'similarity' to measure.what"),
        (plots.attribution, "attribution was not measured in this run; add 'conductance' to measure.what"),
        (plots.saliency_against_similarity, "no similarity to base at stage 2; add 'top_words' to measure.what"),
        (FIGURES["by activations"], "no similarity to base at stage 2; add 'similarity' to measure.what"),
    ],
)
def test_figures_say_what_was_not_measured(plot, wrong):
    with pytest.raises(plots.NotMeasuredError, match=wrong):
        plot(run_of("concept", "random"))


# --- a language model


def losing(run: Run) -> Run:
    """The run with losses in place of F1: lower is better."""

    def loss(nats: float) -> TokenLoss:
        tokens = np.full((20, 3), 10)
        spread = np.random.default_rng(0).normal(1, 0.1, (20, 1))
        return TokenLoss(tokens * nats * spread, tokens, ("place", "others"), 1000)

    def each(arm: Trajectory) -> Trajectory:
        snapshots = {
            stage: replace(s, scores=loss(4 - 2 * s.scores.value("place"))) for stage, s in arm.snapshots.items()
        }
        return replace(arm, snapshots=snapshots)

    run.arms = {name: [each(arm) for arm in arms] for name, arms in run.arms.items()}
    draws = tuple(loss(3 + k / 10) for k in range(3))
    run.damage = [Damage(d.seed, loss(4), random={"layers": draws}) for d in run.damage]
    return run


@pytest.mark.parametrize("seeds", [1, 3])
def test_recovery_curves_of_a_loss_show_nats_and_turn_the_interval(seeds):
    run = losing(run_of("concept", "random", seeds=seeds))
    figure = plots.recovery_curves(run)
    found = drawn(figure)
    assert found["layout"]["yaxis"]["title"]["text"] == "loss of place (nats per token)"
    assert "range" not in found["layout"]["yaxis"]
    assert plots.said(figure)[0] == "loss of place by stage"
    line = lines(found)["concept"]
    shown = [np.mean([arm[stage].scores.shown("place") for arm in run.arms["concept"]]) for stage in STAGES]
    assert line["y"] == pytest.approx(shown)
    for value, (low, high) in zip(line["y"], line["customdata"], strict=True):
        assert low <= value <= high
    if seeds == 1:
        for (low, high), stage in zip(line["customdata"], STAGES, strict=True):
            want = run.arms["concept"][0][stage].scores.interval("place", n=200)
            assert (low, high) == pytest.approx(want, abs=0.05)
    (draws,) = (t for name, t in lines(found).items() if "random sets" in name)
    assert draws["y"] == pytest.approx([run.damage[0].random["layers"][k].shown("place") for k in (0, 2)])


# --- what was changed on purpose


def grafts_of(parts: Mapping[str, tuple[float, float]], *, control: float = 0.02) -> Grafts:
    """Grafts with these shares (enough, needed) by part, of a margin that goes from -2 after the cut to 8."""

    def at(share: float) -> dict[str, float]:
        return {"margin": -2.0 + 10.0 * share, "F1": float(share)}

    whole = {part: at(control) for part in parts if part != "cut"}
    return Grafts(
        tuple(parts), at(0.0), at(1.0), {p: at(a) for p, (a, _) in parts.items()},
        {p: at(1 - b) for p, (_, b) in parts.items()}, {"random": whole, "unpruned": whole},
    )  # fmt: skip


EARLY = {"embedding": (0.0, 0.1), "block 1": (0.3, 0.8), "cut": (0.0, 0.0)}
LATE = {"embedding": (0.0, 0.05), "block 1": (0.9, 0.2), "cut": (0.1, 0.1)}


def with_all(run: Run) -> Run:
    """The run with grafts at two stages, a second cut and doses."""
    for path in run.arms["concept"]:
        seed, neurons, last = path.seed, path.removed, path["2"].scores
        assert neurons is not None
        run.grafted.append(Grafted(seed, {"1": grafts_of(EARLY), "2": grafts_of(LATE)}))
        rounds = (Round(neurons, 0.25, 0.05, margined(scores_of(0.1)), {4: last}),)
        run.again.append(Again(seed, margined(scores_of(0.7)), (last, last), rounds))
        whole, cut, kept = (margined(scores_of(value)) for value in (0.9, 0.05, 0.88))
        doses = [
            Dose(fraction, name, scores)
            for fraction, own in ((0.01, kept), (0.05, cut))
            for name, scores in (("concept", own), ("other", kept), ("random", kept))
        ]
        run.sized.append(Sized(seed, 0.05, whole, tuple(doses)))
    run.manifest["other"] = "person"
    run.folder = "runs/names"
    return run


def holding(run: Run) -> list[Blocked]:
    """The return blocked in every seed: not back where the part is held, soon where the heirs are, or others."""
    low, back = margined(scores_of(0.2)), margined(scores_of(0.9))
    return [
        Blocked(path.seed, held, course)
        for k, path in enumerate(run.arms["concept"])
        for held, course in (
            ("part", {8: low, 64: low}), ("heirs", {4: low, 8 if k else 16: back}), ("random", {4: back}),
        )
    ]  # fmt: skip


def test_what_was_held_is_drawn_beside_the_free_arm():
    run = run_of("concept", "random", seeds=3)
    with pytest.raises(plots.NotMeasuredError, match="nothing was held"):
        plots.blocked(run)
    run.blocked += holding(run)
    figure = drawn(plots.blocked(run))["data"]
    assert len(figure) == 3 * 4
    assert [trace["name"] for trace in figure if trace["showlegend"]] == [
        "free", "held: the part that brings most", "held: the heirs", "held: as many others",
    ]  # fmt: skip
    assert len({trace["line"]["color"] for trace in figure}) == 4
    assert as_list(figure[1]["x"]) == [0, 8, 64]
    assert as_list(figure[1]["y"]) == pytest.approx([run.arms["concept"][0]["pruned"].scores.shown("place"), 0.2, 0.2])


@pytest.mark.parametrize("seeds", [1, 3])
def test_grafts_draw_every_part_beside_its_controls(seeds):
    figure = plots.grafts(with_all(run_of("concept", "random", seeds=seeds)))
    found = drawn(figure)
    titles = [a["text"] for a in found["layout"]["annotations"]]
    assert titles == ["first back<br>epoch 1", "at the end<br>epoch 2"]
    for k, parts in enumerate((EARLY, LATE)):
        enough, needed, *controls = found["data"][4 * k : 4 * k + 4]
        assert enough["y"] == list(parts)
        assert as_list(enough["x"]) == pytest.approx([a for a, _ in parts.values()])
        assert as_list(needed["x"]) == pytest.approx([b for _, b in parts.values()])
        for control in controls:
            assert control["x"][:2] == pytest.approx([0.02, 0.02])
            assert control["x"][2] is None  # nothing that is the cut is added
    assert found["layout"]["xaxis"]["range"] == found["layout"]["xaxis2"]["range"]
    with pytest.raises(plots.NotMeasuredError, match="no grafts were made in this run"):
        plots.grafts(run_of("concept"))


def test_dose_draws_the_concept_the_others_and_the_controls():
    run = with_all(run_of("concept", "random", seeds=3))
    few = replace(run.sized[0], base=margined(scores_of(0.9, n=50)))
    run.sized[0] = few
    figure = plots.dose(run)
    found = lines(drawn(figure))
    assert list(found) == [
        "place: its own neurons cut", "person: place's neurons cut", "place: person's neurons cut",
        "place: random neurons cut",
    ]  # fmt: skip
    own, bystanders, *_ = found.values()
    assert own["x"] == ["0", "1", "5"]
    assert own["y"] == pytest.approx([0.9, 0.88, 0.05])
    assert bystanders["y"] == pytest.approx([0.9, 0.9, 0.9])
    assert plots.said(figure)[1].endswith("taken: 5 %")
    run.sized[1] = replace(run.sized[1], fraction=0.01)
    assert plots.said(plots.dose(run))[1].endswith("taken: 5 % (seed 0, 2), 1 % (seed 1)")
    with pytest.raises(plots.NotMeasuredError, match=r"prune\.fraction = 'auto' finds it"):
        plots.dose(run_of("concept"))


def test_recovery_curves_name_each_arm_at_its_end_and_none_on_another():
    run = run_of("concept", "random", "unpruned", seeds=3)
    names = [t for t in drawn(plots.recovery_curves(run))["data"] if t["mode"] == "text"]
    assert sorted(t["text"][0].strip() for t in names) == ["<b>concept</b>", "<b>random</b>", "<b>unpruned</b>"]
    heights = sorted(t["y"][0] for t in names)
    assert all(b - a > 0.05 for a, b in pairwise(heights))
    assert heights[-1] <= 1


def test_recovery_curves_of_runs_side_by_side_share_their_axis():
    one, two = losing(run_of("concept", seeds=3)), losing(run_of("concept", "random"))
    ranges = [drawn(plots.recovery_curves(run, beside=(one, two)))["layout"]["yaxis"]["range"] for run in (one, two)]
    assert ranges[0] == ranges[1]


def test_axes_of_stages_say_steps_where_they_are():
    run = run_of("concept", "random")
    assert axis_titles(drawn(plots.recovery_curves(run)))["xaxis"] == "stage (epochs of retraining)"
    for arms in run.arms.values():
        last = arms[0]["2"]
        assert last.at is not None
        arms[0] = replace(arms[0], snapshots={**arms[0].snapshots, "2": replace(last, at=replace(last.at, by="step"))})
    assert axis_titles(drawn(plots.recovery_curves(run)))["xaxis"] == "stage (steps of retraining)"
    assert axis_titles(drawn(plots.layer_map(run, arm="random")))["xaxis"] == "stage (steps of retraining)"


def test_layer_map_against_another_arm_draws_the_difference_on_the_same_neurons():
    run = run_of("concept", "random", "unpruned", seeds=3)
    figure = drawn(plots.layer_map(run, against="unpruned"))
    assert [a["text"] for a in figure["layout"]["annotations"]] == ["concept arm", "random arm"]
    for heat, name in zip(figure["data"], ("concept", "random"), strict=True):
        want = np.mean([
            [
                (a[s].saliency.by_rank(a.matched()) - b[s].saliency.by_rank(a.matched())).nanmean(1).numpy()
                for s in STAGES
            ]
            for a, b in zip(run.arms[name], run.arms["unpruned"], strict=True)
        ], axis=0).T  # fmt: skip
        assert np.allclose(cells(heat), want, equal_nan=True, atol=1e-6)
    alone = drawn(plots.layer_map(run, arm="random", against="unpruned"))["data"][0]
    assert (alone["zmin"], alone["zmax"]) == (figure["data"][0]["zmin"], figure["data"][0]["zmax"])
    with pytest.raises(ValueError, match="arm 'unpruned' cannot be set against itself"):
        plots.layer_map(run, arm="unpruned", against="unpruned")


# --- files


def test_save_html_writes_a_page_of_its_own(tmp_path, whole):
    path = plots.save_html(plots.pruned_share(whole), tmp_path / "share.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1
    assert "<title>Pruned share of each layer: concept arm</title>" in text
    assert 'name="color-scheme" content="light dark"' in text
    assert not re.search(r"<script[^>]*\bsrc\s*=", text)
    small = plots.save_html(plots.pruned_share(whole), str(tmp_path / "small.html"), plotlyjs=False)
    assert small.stat().st_size < 50_000


def test_save_png_says_what_it_needs(tmp_path, whole, monkeypatch):
    def none(*_, **__):
        raise ValueError("Image export using the 'kaleido' engine requires the Kaleido package")

    monkeypatch.setattr(go.Figure, "to_image", none)
    wanted = r'a PNG needs the package kaleido and a Chrome or Chromium.*pip install "relearn-lens\[png\]"'
    with pytest.raises(ImportError, match=wanted):
        plots.save_png(plots.pruned_share(whole), tmp_path / "share.png")
    assert list(tmp_path.iterdir()) == []

    def other(*_, **__):
        raise ValueError("width must be positive")

    monkeypatch.setattr(go.Figure, "to_image", other)
    with pytest.raises(ValueError, match="width must be positive"):
        plots.save_png(plots.pruned_share(whole), tmp_path / "share.png")


def test_save_png_writes_a_picture(tmp_path, whole):
    pytest.importorskip("kaleido", reason="kaleido is not installed (extra [png])")
    figure = plots.pruned_share(whole)
    before = figure.to_json()
    try:
        path = plots.save_png(figure, tmp_path / "share.png", width=400, height=300, scale=1)
    except ImportError as error:
        pytest.skip(f"no browser for kaleido: {error}")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert figure.to_json() == before


def test_plots_bring_nothing_along_that_is_for_notebooks(whole):
    plots.neuron_map(whole)
    assert "ipywidgets" not in sys.modules or "relearn_lens.show.explore" in sys.modules


# --- film


def test_film_has_a_frame_for_each_stage_that_adds_one_point(run):
    figure: Any = plots.film(run)
    drawn(figure)
    stages = list(next(iter(run.arms.values()))[0].stages)
    assert [frame.name for frame in figure.frames] == stages
    assert [step.label for step in figure.layout.sliders[0].steps] == stages
    for k, frame in enumerate(figure.frames, 1):
        lines = [trace for trace in frame.data if trace.type == "scatter"]
        assert {trace.name for trace in lines} == set(run.arms)
        assert all(list(trace.x) == stages[:k] for trace in lines)
        assert len(frame.data) == len(figure.data)
    first, _, *after = (frame.layout.title.text for frame in figure.frames)
    known = np.mean([path[stages[0]].f1["place"] for path in next(iter(run.arms.values()))])
    assert first == f"place: before the cut, F1 {known:.2f}"
    assert all(f"{stage}, F1 " in text for stage, text in zip(stages[2:], after, strict=True))
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == min(2, len(run.arms))


def test_film_shows_scores_over_the_bases_95th_percentile_and_no_pruned_neuron():
    run = run_of("concept", "random", width=4)
    figure: Any = plots.film(run)
    arm = run.arms["concept"][0]
    base, pruned = arm["base"].saliency.score, arm["pruned"]
    order = torch.argsort(base, dim=1, descending=True, stable=True)
    top = float(np.quantile(base.double().numpy(), 0.95))
    first = next(trace for trace in figure.frames[0].data if trace.type == "heatmap")
    second = next(trace for trace in figure.frames[1].data if trace.type == "heatmap")
    assert np.asarray(first.z) == pytest.approx((base.gather(1, order).double() / top).numpy(), abs=1e-3)
    gone = (~arm.survivors().mask).gather(1, order).numpy()
    assert gone.any()
    assert (np.isnan(np.asarray(second.z, dtype=float)) == gone).all()
    left = (pruned.saliency.score.gather(1, order).double() / top).numpy()
    assert np.asarray(second.z, dtype=float)[~gone] == pytest.approx(left[~gone], abs=1e-3)


def test_save_gif_writes_every_stage(tmp_path, whole):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra [png])")
    pytest.importorskip("kaleido", reason="kaleido is not installed (extra [png])")
    film = plots.film(whole)
    try:
        path = plots.save_gif(film, tmp_path / "film.gif", width=300, height=200)
    except ImportError as error:
        pytest.skip(f"no browser for kaleido: {error}")
    with image.open(path) as picture:
        assert (picture.n_frames, picture.size) == (len(cast(Any, film).frames), (300, 200))


def test_save_gif_says_what_it_needs(tmp_path, whole, monkeypatch):
    with pytest.raises(ValueError, match=r"no frames to show.*plots\.film\(run\)"):
        plots.save_gif(plots.pruned_share(whole), tmp_path / "film.gif")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'needs the package Pillow: pip install "relearn-lens\[png\]"'):
        plots.save_gif(plots.film(whole), tmp_path / "film.gif")
