"""Figures of made-up runs: what is drawn equals what was measured."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from relearn_lens import analysis, plots
from relearn_lens.experiment import Damage, Run
from relearn_lens.settings import Experiment
from relearn_lens.tracking import Trajectory
from tests.test_analysis import scores_of, site_of, trajectory

STAGES = ("base", "pruned", "1", "2")
F1 = {"concept": (0.9, 0.1, 0.6, 0.8), "random": (0.9, 0.7, 0.8, 0.88), "unpruned": (0.9, 0.9, 0.9, 0.9)}


def arm_of(name: str, seed: int, *, layers: int = 3, width: int = 4, noise: bool = True) -> Trajectory:
    """One arm; the whole last layer is pruned in the concept arm, one neuron of each layer in the random arm."""
    generator = torch.Generator().manual_seed(seed)
    pruned = torch.zeros(layers, width, dtype=torch.bool)
    if name == "concept":
        pruned[-1] = True
    if name == "random":
        pruned[:, 0] = True
    f1 = {
        stage: scores_of(value, n=30, noise=seed if noise else None)
        for stage, value in zip(STAGES, F1[name], strict=True)
    }
    score = {stage: torch.rand(layers, width, generator=generator) for stage in STAGES}
    return trajectory(f1, score, pruned=None if name == "unpruned" else pruned, arm=name, seed=seed)


def run_of(*arms: str, seeds: int = 1, draws: int = 3, **size) -> Run:
    """A finished run without a model."""
    experiment = Experiment.model_validate({"arms": arms, "seeds": range(seeds), "measure": {"draws": 200}})
    made = {name: [arm_of(name, seed, **size) for seed in range(seeds)] for name in arms}
    random = tuple(scores_of(0.5 + k / 10) for k in range(draws))
    return Run(experiment, made, [Damage(seed, scores_of(0.1), random) for seed in range(seeds)])


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
    assert found["layout"]["xaxis"]["title"]["text"]
    assert found["layout"]["yaxis"]["title"]["text"]
    assert found["layout"]["title"]["text"]
    return found


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
            analysis.estimate(np.asarray, run.label, [arm[stage].scores for arm in arms], **run.interval)
            for stage in STAGES
        ]
        assert tuple(band["x"]) == STAGES + STAGES[::-1]
        assert band["y"] == pytest.approx([e.high for e in found] + [e.low for e in found][::-1])


def test_recovery_curves_say_over_what_the_interval_is():
    one, three = (drawn(plots.recovery_curves(run_of("concept", seeds=n)))["layout"]["title"]["text"] for n in (1, 3))
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
        tables = [analysis.saliency_by_layer(arm) for arm in arms]
        for k, stage in enumerate(STAGES):
            want = np.mean([table[stage] for table in tables], axis=0)
            got = [np.nan if row[k] is None else row[k] for row in heat_rows(heat)]
            assert got == pytest.approx(list(want), nan_ok=True)


def heat_rows(heat: dict) -> list[list[float | None]]:
    """The cells of a heat map, whether plotly wrote lists or packed numbers."""
    if isinstance(heat["z"], list):
        return heat["z"]
    import base64

    shape = [int(n) for n in heat["z"]["shape"].split(",")]
    return np.frombuffer(base64.b64decode(heat["z"]["bdata"]), heat["z"]["dtype"]).reshape(shape).tolist()


def test_layer_map_leaves_a_layer_without_survivors_blank():
    run = run_of("concept", "random")
    (heat,) = drawn(plots.layer_map(run.arms["concept"]))["data"]
    assert all(value is None or np.isnan(value) for value in heat_rows(heat)[2])
    assert [row[0] for row in heat["text"]][2] == ""
    (whole,) = drawn(plots.layer_map(run.arms["concept"], selection="all"))["data"]
    assert np.isfinite(np.array(heat_rows(whole), dtype=float)).all()


def test_layer_map_takes_one_trajectory_or_several():
    arms = run_of("random", seeds=2).arms["random"]
    one, alone = plots.layer_map(arms[0]), plots.layer_map(arms[:1])
    assert one.to_json() == alone.to_json()
    assert "2 seed(s)" in drawn(plots.layer_map(arms))["layout"]["title"]["text"]


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
    figure = drawn(plots.pruned_share(run_of("concept", "random").arms))
    (bars,) = figure["data"]
    assert bars["x"] == ["embed", "0", "1"]
    assert [float(v) for v in np.array(as_list(bars["y"]))] == pytest.approx([0, 0, 1])
    assert bars["marker"]["color"] == plots.ARM_COLOURS["concept"]
    assert "resid" in figure["layout"]["title"]["text"]


def as_list(values) -> list[float]:
    if isinstance(values, list):
        return values
    import base64

    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


def test_pruned_share_takes_any_arms(run):
    drawn(plots.pruned_share(run.arms))


def test_pruned_share_of_a_random_arm_alone_has_its_colour():
    (bars,) = drawn(plots.pruned_share(run_of("random").arms))["data"]
    assert bars["marker"]["color"] == plots.ARM_COLOURS["random"]


# --- all of them


def test_colours_of_the_arms_are_fixed_and_differ():
    assert list(plots.ARM_COLOURS) == ["concept", "random", "unpruned"]
    assert len(set(plots.ARM_COLOURS.values())) == 3
    alone = lines(drawn(plots.recovery_curves(run_of("unpruned", draws=0))))["unpruned"]["line"]["color"]
    beside = lines(drawn(plots.recovery_curves(run_of("concept", "unpruned"))))["unpruned"]["line"]["color"]
    assert alone == beside == plots.ARM_COLOURS["unpruned"]


def test_figures_of_a_wide_model_stay_small():
    run = run_of("concept", "random", "unpruned", seeds=5, layers=33, width=4096)
    assert site_of(33, 4096).n_neurons == run.arms["concept"][0].site.n_neurons
    drawn(plots.recovery_curves(run))
    drawn(plots.layer_map(run.arms["random"]))
    drawn(plots.pruned_share(run.arms))


def test_figures_are_never_shown_and_set_no_default(monkeypatch, run):
    import plotly.io as pio

    monkeypatch.setattr(pio, "show", lambda *_, **__: pytest.fail("shown"))
    before = pio.templates.default, pio.renderers.default
    plots.recovery_curves(run)
    plots.layer_map(next(iter(run.arms.values())))
    plots.pruned_share(run.arms)
    assert (pio.templates.default, pio.renderers.default) == before
