"""Look around in a run from a notebook: a view to click through, and example sentences for a neuron.

The view needs the extra `[notebook]` and a kernel (Jupyter, VS Code, Colab); without them there is the plain figure.
"""

from __future__ import annotations

import html
import importlib
import re
import sys
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from relearn_lens.models import processes
from relearn_lens.models.model import Model, encoded_for
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import stream
from relearn_lens.runs.results import Run
from relearn_lens.show import captions, plots
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded


def explore(run: Run, *, arm: str | None = None) -> Any:
    """Every neuron of a run as a map with controls for arm, stage and neurons; a click on a cell opens its card.

    Gives back an ipywidgets box. Without ipywidgets and anywidget (`pip install "relearn-lens[notebook]"`) or without
    a kernel it is the plain figure `plots.neuron_map`, whose slider and hover work anywhere.

    Raises:
        ValueError: the run has no such arm.
    """
    plain = plots.neuron_map(run, arm=arm)
    widgets = _widgets()
    return plain if widgets is None else _View(run, arm or captions.told(run), widgets).box


def _widgets() -> Any:
    """The module ipywidgets, if it, anywidget and a kernel are here; None otherwise."""
    try:
        importlib.import_module("anywidget")
        widgets = importlib.import_module("ipywidgets")
        shell = importlib.import_module("IPython").get_ipython()
    except ImportError:
        return None
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    if "google.colab" in sys.modules:  # Colab draws other people's widgets only when asked
        importlib.import_module("google.colab.output").enable_custom_widget_manager()
    return widgets


class _View:
    """The state of one view: what is chosen, and the figures that follow."""

    def __init__(self, run: Run, arm: str, widgets: Any):
        self.run = run
        self.arm = widgets.Dropdown(options=list(run.arms), value=arm, description="arm")
        self.among = widgets.Dropdown(options=["matched", "published", "all"], description="neurons")
        stages = list(run.arms[arm][0].stages)
        self.stage = widgets.SelectionSlider(options=stages, value=stages[0], description="stage")
        self.name = widgets.Text(placeholder="such as L1N17", description="card of", continuous_update=False)
        self.said = widgets.HTML()
        self.box = widgets.VBox()
        self.head = widgets.HBox([self.arm, self.among, self.stage, self.name], layout={"flex_flow": "row wrap"})
        self.map: Any = None
        self.card: Any = None
        self.steps: dict[str, dict[str, Any]] = {}
        self.arm.observe(lambda _: self._draw(), "value")
        self.among.observe(lambda _: self._draw(), "value")
        self.stage.observe(lambda _: self._turn(), "value")
        self.name.observe(lambda _: self._show(self.name.value), "value")
        self._draw()

    def _draw(self) -> None:
        """Another arm or selection: the map anew."""
        figure: Any = plots.neuron_map(self.run, arm=self.arm.value, selection=self.among.value)
        self.steps = {step.label: step.args[0] for step in figure.layout.sliders[0].steps}
        figure.layout.sliders = ()
        self.map = plots.live(figure)
        self.map.data[0].on_click(lambda trace, points, _: self._clicked(points))
        if list(self.stage.options) != list(self.steps):
            self.stage.options = list(self.steps)
        self._turn()
        self._show(self.name.value)

    def _turn(self) -> None:
        """Another stage: the same map with other values."""
        args = self.steps[self.stage.value]
        with self.map.batch_update():
            self.map.data[0].z, self.map.data[0].customdata = args["z"][0], args["customdata"][0]

    def _clicked(self, points: Any) -> None:
        """The neuron of the cell that was clicked."""
        for row, column in points.point_inds[:1]:
            found = re.match(r"<b>(.*?)</b>", self.map.data[0].text[row][column])
            if found:
                self.name.value = html.unescape(found[1])

    def _show(self, name: str) -> None:
        """The card of a neuron below the map; what is wrong with its name, if anything is."""
        self.card, self.said.value = None, ""
        if name:
            try:
                self.card = plots.live(plots.neuron_card(self.run, name, arm=self.arm.value))
            except ValueError as error:
                self.said.value = html.escape(str(error))
        self.box.children = [self.head, self.map, self.said, *([self.card] if self.card else [])]


class _One:
    """Collects the activations of one neuron, word by word."""

    def __init__(self, layer: int, index: int, n_words: int):
        self.layer, self.index = layer, index
        self.found = torch.full((n_words,), torch.nan)
        self.words: Tensor

    def begin(self, batch: Batch) -> None:
        """Which words come next."""
        self.words = batch.words.cpu()

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Keep the neuron's own."""
        if layer == self.layer:
            self.found[self.words] = words[:, self.index].float().cpu()

    def together(self) -> None:
        """Take the words that other processes read; those that nobody read stay NaN."""
        value, read = self.found.nan_to_num(0.0), (~self.found.isnan()).int()
        processes.sum_(value, read)
        self.found = torch.where(read > 0, value, torch.nan)


def examples(
    model: Model,
    text: Corpus | Encoded,
    neuron: tuple[str, int],
    *,
    site: str | Site = "resid",
    k: int = 6,
    around: int = 5,
    max_tokens: int = 4096,
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """The `k` sentences in which a neuron is farthest from its mean, as `plots.neuron_card(examples=...)` takes them.

    Of each, the words `around` the one that drives it most, and the neuron's activation on each of them, in the model's
    units. Sentences come with the farthest first. One pass over the text; the model is read only.

    Raises:
        ValueError: an unknown site, or a neuron that it does not have.
    """
    place = site_of(model.bridge, site)
    Neurons.of(place, [neuron])  # says what is wrong
    encoded = encoded_for(model, text)
    corpus = encoded.corpus
    one = _One(place.layers.index(str(neuron[0])), neuron[1], corpus.n_words)
    stream(model, encoded, [one], site=place, max_tokens=max_tokens)
    values = one.found.numpy()
    far = np.nan_to_num(np.abs(values - np.nanmean(values)), nan=-1.0)
    peak = [int(a + far[a:b].argmax()) for a, b in zip(corpus.start[:-1], corpus.start[1:], strict=True)]
    order = sorted(range(len(peak)), key=lambda i: -far[peak[i]])[:k]
    found = []
    for i in order:
        span = slice(max(corpus.start[i], peak[i] - around), min(corpus.start[i + 1], peak[i] + around + 1))
        found.append((tuple(corpus.vocab[w] for w in corpus.word[span]), tuple(map(float, values[span]))))
    return found
