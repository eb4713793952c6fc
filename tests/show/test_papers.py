"""Figures of claims and of heads: what is drawn equals what was measured."""

# plotly makes the attributes of a figure as it goes
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from relearn_lens.analysis.intervals import Estimate
from relearn_lens.measure.crosspatch import HeadRoles
from relearn_lens.neurons.sites import Site
from relearn_lens.reproduce.claims import Claim, verdict_of
from relearn_lens.reproduce.protocol import Paper, Reproduction, Row
from relearn_lens.show import plots

CLAIMS = {
    "large": Claim("large", "it is <large>", "nats", 0.5),
    "within": Claim("within", "it is near 0", "share", 0.1, rule="within"),
    "positive": Claim("positive", "it is positive", "logits", 0.0),
    "unknown": Claim("unknown", "nobody knows", "share", 0.2),
}
EFFECTS = {
    "large": Estimate(5.0, 4.0, 6.0, "3 seeds", n=3),
    "within": Estimate(0.0, -0.05, 0.05, "3 seeds", n=3),
    "positive": Estimate(-0.2, -0.4, -0.1, "3 seeds", n=3),
}


def result_of(name: str, claims: tuple[str, ...] = tuple(CLAIMS)) -> Reproduction:
    rows = tuple(
        Row(CLAIMS[key], (effect := EFFECTS.get(key)), 0.1 if key == "large" else None,
            "inconclusive" if effect is None else verdict_of(CLAIMS[key], effect))
        for key in claims
    )  # fmt: skip
    paper = Paper(name, "made", "ours", "numbers", "all", lambda lab: iter(()))
    return Reproduction(paper, "toy", (0, 1, 2), rows, 1.0, 0.5, Path())


def test_effects_stand_in_their_unit_and_in_bars():
    table = plots.against_bars([result_of("one")]).set_index("claim")
    assert table.loc["large", ["effect", "low", "high", "control", "bar"]].tolist() == [5.0, 4.0, 6.0, 0.1, 0.5]
    assert table.loc["large", ["scaled", "scaled_low", "scaled_high"]].tolist() == [10.0, 8.0, 12.0]
    assert table.loc["positive", "scaled_low"] == pytest.approx(-1)
    assert table.verdict.tolist() == ["reproduced", "reproduced", "reversed", "not measured"]
    assert math.isnan(table.loc["unknown", "scaled"])


def test_one_paper_has_a_panel_with_a_bar_for_every_claim():
    figure = plots.reproductions([result_of("one")])
    drawn = {trace.xaxis: (trace.x, trace.error_x) for trace in figure.data if trace.error_x.array is not None}
    x, error = drawn["x"]
    assert (list(x), list(error.array), list(error.arrayminus)) == ([5.0], [1.0], [1.0])
    lines = [(shape.xref, shape.type, shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert lines == [
        ("x", "line", 0.5, 0.5), ("x2", "rect", -0.1, 0.1), ("x3", "line", 0.0, 0.0), ("x4", "line", 0.2, 0.2)
    ]  # fmt: skip
    assert [trace.text for trace in figure.data if trace.mode == "text"] == [("not measured",)]
    titles = [each.text for each in figure.layout.annotations]
    assert titles[0] == "reproduced: it is &lt;large&gt; (nats)"
    low, high = figure.layout.xaxis.range
    assert low < 0
    assert high > 6


def test_all_papers_stand_in_bars_and_far_ones_at_the_edge():
    figure = plots.reproductions([result_of("one"), result_of("two", ("within",))])
    reproduced = next(trace for trace in figure.data if trace.name == "reproduced")
    assert list(reproduced.y) == ["one large", "one within", "two within"]
    assert list(reproduced.x) == [3.0, 0.0, 0.0]
    assert list(figure.layout.yaxis.categoryarray)[-1] == "one large"
    assert "one unknown" in figure.layout.yaxis.categoryarray
    assert "one unknown" not in {name for trace in figure.data for name in trace.y}


def test_nothing_to_draw_is_said():
    with pytest.raises(plots.NotMeasuredError, match="there is no reproduction to draw"):
        plots.reproductions([])


def test_stages_of_heads_have_one_scale():
    effect = torch.arange(12, dtype=torch.float32).view(2, 2, 3) - 8
    site = Site("attn_head", ("0", "1"), ("here", "there"), 3, (), ())
    roles = HeadRoles(effect, ("taught", "<b>"), (3.5, -1.0), "logit_difference", "logits", site, 7)
    figure = plots.head_roles(roles)
    assert len(figure.data) == 2
    np.testing.assert_array_equal(figure.data[1].z, effect[1].numpy())
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-8, 8)
    assert [each.text for each in figure.layout.annotations] == ["taught: 3.50", "&lt;b&gt;: -1.00"]
    assert "7 passages" in plots.said(figure)[1]


def test_circuit_is_framed_in_every_panel_and_followed():
    effect = torch.tensor([[[0.1, 2.0], [-3.0, 0.0]], [[0.0, 0.1], [0.2, 1.0]]])
    site = Site("attn_head", ("0", "1"), ("here", "there"), 2, (), ())
    roles = HeadRoles(effect, ("taught", "<b>"), (3.5, -1.0), "logit_difference", "logits", site, 7)
    panels = plots.head_roles(roles, circuit=2).layout
    frames, numbers = panels.shapes, [each.text for each in panels.annotations[2:]]
    assert numbers == ["2.00", "-3.00", "0.10", "0.20"]
    assert [(s.xref, (s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in frames] == [
        ("x", 1.0, 0.0), ("x", 0.0, 1.0), ("x2", 1.0, 0.0), ("x2", 0.0, 1.0)
    ]  # fmt: skip
    figure = plots.head_courses(roles, circuit=2)
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert named == ["the other 2 heads", "head 1 of block 0: 2.00 > 0.10", "head 0 of block 1: -3.00 > 0.20"]
    np.testing.assert_allclose([trace.y for trace in figure.data][-1], [-3.0, 0.2])
    assert figure.layout.xaxis.ticktext == ("taught<br>3.50", "&lt;b&gt;<br>-1.00")
    with pytest.raises(ValueError, match="circuit = 7: at most 6 heads can be told apart by colour"):
        plots.head_courses(roles, circuit=7)
    with pytest.raises(ValueError, match="k must be 1 to 4, the number of heads, got 5"):
        plots.head_roles(roles, circuit=5)
