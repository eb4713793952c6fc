"""The view for notebooks, with and without what it needs, and example sentences of a neuron."""

# plotly makes the attributes of a figure as it goes
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

import importlib
import sys
from html import escape
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from relearn_lens.neurons.sites import streaming
from relearn_lens.runs.results import Run
from relearn_lens.show import explore, plots
from tests.show.test_plots import HOSTILE, layout_of, rich, run_of


@pytest.fixture
def run() -> Run:
    return rich(run_of("concept", "random", "unpruned", seeds=2, width=12))


def test_explore_without_the_extra_is_the_plain_figure(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    found = explore.explore(run)
    assert type(found) is go.Figure
    assert found.to_json() == plots.neuron_map(run).to_json()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    assert explore.explore(run, arm="random").to_json() == plots.neuron_map(run, arm="random").to_json()


def test_explore_without_a_kernel_is_the_plain_figure(run, monkeypatch):
    for name in ("anywidget", "ipywidgets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for shell in (None, SimpleNamespace(), SimpleNamespace(kernel=None)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert type(explore.explore(run)) is go.Figure


def test_explore_refuses_an_arm_that_is_not_there(run):
    with pytest.raises(ValueError, match="no arm 'never' in this run; it has concept, random, unpruned"):
        explore.explore(run, arm="never")


def test_explore_asks_colab_for_widgets(run, monkeypatch):
    asked = []
    for name in ("anywidget", "ipywidgets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    output = SimpleNamespace(enable_custom_widget_manager=lambda: asked.append(True))
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    assert explore._widgets() is sys.modules["ipywidgets"]
    assert asked == [True]


@pytest.fixture
def view(run, monkeypatch) -> explore._View:
    for name in ("anywidget", "ipywidgets"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra [notebook])")
    return explore._View(run, "concept", importlib.import_module("ipywidgets"))


def test_view_follows_its_controls(view, run):
    def z() -> list:
        return [list(row) for row in view.map.data[0].z]

    def drawn(stage: str, **how: Any) -> list:
        steps = {s.label: s.args[0] for s in layout_of(plots.neuron_map(run, **how)).sliders[0].steps}
        return steps[stage]["z"][0]

    assert z() == drawn("base")
    view.stage.value = "2"
    assert z() == drawn("2")
    view.among.value = "all"
    assert z() == drawn("2", selection="all")
    view.arm.value = "random"
    assert z() == drawn("2", arm="random", selection="all")
    assert not view.map.layout.sliders


def test_click_on_a_cell_opens_the_neurons_card(view, run):
    assert len(view.box.children) == 3
    view._clicked(SimpleNamespace(point_inds=[(1, 4)]))
    name = plots.neuron_map(run).data[0].text[1][4].split("</b>")[0].removeprefix("<b>")
    assert view.name.value == name
    assert view.box.children[-1] is view.card
    assert view.card.layout.title.text == layout_of(plots.neuron_card(run, name)).title.text
    view.name.value = HOSTILE[0]
    assert view.card is None
    assert escape(HOSTILE[0]) in view.said.value
    assert HOSTILE[0] not in view.said.value
    view.name.value = ""
    assert view.said.value == ""


def test_explore_gives_a_box_where_all_is_there(run, monkeypatch):
    for name in ("anywidget", "ipywidgets"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra [notebook])")
    ipython = importlib.import_module("IPython")
    monkeypatch.setattr(ipython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    box = explore.explore(run)
    assert type(box).__name__ == "VBox"
    assert len(box.children) == 3


def test_import_of_explore_brings_no_widgets():
    assert not [n for n in vars(explore) if n in ("ipywidgets", "anywidget", "IPython")]


# --- examples


def test_examples_are_the_sentences_where_a_neuron_is_farthest_from_its_mean(bert_model, encoded, corpus, untouched):
    site = explore.site_of(bert_model.bridge, "resid")
    with untouched(bert_model):
        found = explore.examples(bert_model, encoded, ("1", 7), k=3, around=2)
    # Slowly: sub-words of each word averaged, sentence by sentence.
    seen: dict[int, list[float]] = {}
    for batch in encoded.batches(max_tokens=64):
        kept: list[torch.Tensor] = []

        def visit(layer: int, activations: torch.Tensor, kept: list = kept) -> None:
            if layer == site.layers.index("1"):
                kept.append(activations[..., 7])

        with torch.no_grad(), streaming(bert_model.bridge, site, visit):
            bert_model(batch.ids, batch.mask)
        words = batch.words.tolist()
        values = kept[0].flatten()[batch.subword]
        ends = [*batch.offset.tolist()[1:], len(values)]
        for word, start, end in zip(words, batch.offset.tolist(), ends, strict=True):
            seen.setdefault(word, []).extend(values[start:end].tolist())
    mean_of = {word: float(np.mean(values)) for word, values in seen.items()}
    centre = np.mean(list(mean_of.values()))
    peaks = []
    for i in range(corpus.n_sentences):
        words = [w for w in range(corpus.start[i], corpus.start[i + 1]) if w in mean_of]
        peaks.append((max(abs(mean_of[w] - centre) for w in words), i))
    for (words, values), (far, i) in zip(found, sorted(peaks, reverse=True), strict=False):
        assert len(words) == len(values) <= 5
        assert max(abs(v - centre) for v in values) == pytest.approx(far, rel=1e-4)
        text = [corpus.vocab[w] for w in corpus.word[corpus.start[i] : corpus.start[i + 1]]]
        assert any(list(words) == text[k : k + len(words)] for k in range(len(text)))


def test_examples_are_what_the_card_takes(bert_model, corpus):
    found = explore.examples(bert_model, corpus, ("2", 3), k=2)
    assert len(found) == 2
    figure = plots.neuron_card(run_of("concept"), "L1N2", examples=found)
    assert [t for t in figure.data if t.type == "heatmap"]


def test_examples_refuse_a_neuron_that_is_not_there(bert_model, corpus):
    with pytest.raises(ValueError, match="resid has no neuron 99 in layer '1'"):
        explore.examples(bert_model, corpus, ("1", 99))
