"""Look around in a run: a view to click through, and example sentences for a neuron.

The view is a piece of page with a script of its own: it needs no widgets and no kernel, so that it is there wherever a
notebook shows HTML (JupyterLab, VS Code, Colab), and as a file.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from jinja2 import Environment, PackageLoader
from torch import Tensor

from relearn_lens.find.saliency import dprime_of_each
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.methods import MAX_TOKENS
from relearn_lens.models import processes
from relearn_lens.models.model import Model, bridge_of, encoded_for
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.streaming import stream
from relearn_lens.runs.results import Run
from relearn_lens.show import captions
from relearn_lens.show.plots.cards import neuron_of
from relearn_lens.show.plots.style import ARM_COLOURS, INK, arm_of, of_seed, shown, whole
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded

STEPS = 254
"""Steps in which a rank is drawn; the byte above them is a neuron that is not there."""
N_WORDS = 8
"""Top words of a neuron that its card shows."""


class View:
    """What `explore` gives: shown by a notebook, or saved as a page."""

    def __init__(self, html: str):
        self.html = html

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"View({len(self.html) / 1e6:.1f} MB of HTML: show it in a notebook, or .save('explore.html'))"

    def save(self, path: str | Path) -> Path:
        """Write the view as a page that needs no network; gives the path back."""
        head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>explore</title>'
        style = "<style>body{font:15px/1.5 system-ui;max-width:80rem;margin:1rem auto;padding:0 1rem}</style>"
        page = f'<!doctype html>\n<html lang="en"><head>{head}{style}</head><body>\n{self.html}\n</body></html>\n'
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)


def explore(
    run: Run, *, arm: str | None = None, beside: str | None = None, neuron: str | None = None, stage: str | None = None,
    seed: int | None = None,
) -> View:  # fmt: skip
    """The concept's curve with a slider of stages, every neuron of one or two arms as a map, the card of one neuron.

    Maps are coloured by rank saliency (dark blue the least, yellow the most salient of all neurons); grey is what is
    cut at that stage. A click on a cell opens its card: rank and top words stage by stage, what it tells apart, and
    what the model says of a few held-out sentences there. A word in the search marks the neurons that have it among
    their top words; "gained most" lists those that rose most since base. The hover of a layer says what grafting its
    part gave. One training seed is shown, by default the first.

    Raises:
        ValueError: the run has no such arm, stage, seed or neuron.
    """
    first = arm or captions.explained(whole(run))
    arms = {name: of_seed(arm_of(run, name), seed) for name in run.arms}
    for name in (first, *([beside] if beside else [])):
        arm_of(run, name)  # says what is wrong
    path = arms[first]
    stage = stage or path.stages[-1]
    path[stage]
    if beside is None:
        beside = next((name for name in ("random", "unpruned") if name in arms and name != first), "")
    chosen = neuron_of(path, neuron) if neuron else next(iter(path[stage].saliency.top(1, among=path.there(stage))))
    values = {
        **_run_values(run),
        "arms": {name: _arm_values(each) for name, each in arms.items()},
        "now": {
            "arm": first, "beside": beside, "stage": stage, "layer": path.site.layers.index(chosen.layer),
            "neuron": chosen.index,
        },
        "seed": path.seed,
    }  # fmt: skip
    pages = Environment(loader=PackageLoader("relearn_lens.show"), autoescape=True, trim_blocks=True)
    # Nothing in the data may end the script that it stands in.
    data = json.dumps(values, ensure_ascii=True).replace("<", "\\u003c")
    return View(pages.get_template("explore.html.j2").render(id=f"rl-{secrets.token_hex(6)}", data=data))


def _run_values(run: Run) -> dict[str, Any]:
    """Curve, names and grafts of a run, as the script takes them."""
    first = next(iter(run.arms.values()))
    site, scores = first[0].site, first[0][first[0].stages[0]].scores
    curves = {
        name: {
            stage: [round(float(e), 4) if np.isfinite(e) else None for e in (each.value, each.low, each.high)]
            for stage in arms[0].stages
            for each in [shown(run.label, [arm[stage].scores for arm in arms], **run.interval)]
        }
        for name, arms in run.arms.items()
    }
    return {
        "title": f"{run.experiment.model}, {run.experiment.corpus}: {'+'.join(run.label)}",
        "metric": f"{scores.metric} of {'+'.join(run.label)}", "unit": scores.unit,
        "score": first[0][first[0].stages[0]].saliency.kind,
        "site": site.name, "layers": list(site.layers), "width": site.width, "curves": curves,
        "colours": {name: ARM_COLOURS.get(name, INK) for name in run.arms}, "grafts": _graft_values(run, site.layers),
    }  # fmt: skip


def _graft_values(run: Run, layers: Sequence[str]) -> dict[str, str]:
    """By layer, what the grafts of its part gave at the last stage, in words."""
    by_layer: dict[str, str] = {}
    for grafted in run.grafted[:1]:
        for stage, made in list(grafted.stages.items())[-1:]:
            for part in made.parts:
                enough, needed = made.enough(part), made.needed(part)
                controls = [made.control(name, part).value for name in made.controls if part in made.controls[name]]
                most = max((value for value in controls if np.isfinite(value)), default=np.nan)
                beside = f", control grafts at most {most:.2f}" if np.isfinite(most) else ""
                text = f"{part} at stage {stage}: enough {enough.value:.2f}, needed {needed.value:.2f}{beside}"
                text = f"{part}: {enough.refused}" if enough.refused else text
                for layer in _layers_of(part, layers):
                    by_layer[layer] = f"{by_layer[layer]}; {text}" if layer in by_layer else text
    return by_layer


def _layers_of(part: str, layers: Sequence[str]) -> list[str]:
    """The layers of a site that lie in a part of the model, by the names of both."""
    if part.startswith("embedding"):
        return [layer for layer in layers if layer == "embed"]
    ends = re.match(r"blocks? (\d+)(?: to (\d+))?", part)
    if ends is None:
        return []
    inside = range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return [layer for layer in layers if layer.isdigit() and int(layer) in inside]


def _arm_values(path: Trajectory) -> dict[str, Any]:
    """All of an arm that the script draws: bytes in base64, `[layer neuron]` for each stage."""
    vocab: dict[str, int] = {}
    stages: dict[str, Any] = {}
    for stage in path.stages:
        snapshot, there = path[stage], path.there(stage)
        rank = snapshot.saliency.by_rank(there)
        byte = torch.where(rank.isnan(), STEPS + 1.0, (rank.nan_to_num(0.0) * STEPS).round())
        entry: dict[str, Any] = {"rank": _bytes(byte.numpy().astype(np.uint8))}
        if snapshot.words is not None:
            top, names = snapshot.words.words[..., :N_WORDS].numpy(), snapshot.words.vocab
            index = np.array([vocab.setdefault(word, len(vocab)) for word in names] + [-1], dtype=np.int32)
            entry["words"], entry["n_words"] = _bytes(index[top]), top.shape[-1]
        if stage in (path.stages[0], path.stages[-1]):
            tells = dprime_of_each(snapshot.stats).clamp(-300, 300)
            entry["classes"] = list(snapshot.stats.class_names)
            entry["tells"] = _bytes((100 * tells).round().numpy().astype(np.int16))
        if snapshot.guesses is not None:
            guesses = snapshot.guesses
            entry["said"] = [
                [[word, true, list(says)] for word, true, says in zip(*each, strict=True)]
                for each in zip(guesses.words, guesses.true, guesses.said, strict=True)
            ]
        stages[stage] = entry
    return {"stages": stages, "vocab": list(vocab)}


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


class _One:
    """Collects the activations of one neuron, word by word."""

    def __init__(self, layer: int, index: int, n_words: int):
        self.layer, self.index = layer, index
        self.activation = torch.full((n_words,), torch.nan)
        self.words: Tensor

    def begin(self, batch: Batch) -> None:
        """Which words come next."""
        self.words = batch.words.cpu()

    def add(self, layer: int, words: Float[Tensor, "word neuron"]) -> None:
        """Keep the neuron's own."""
        if layer == self.layer:
            self.activation[self.words] = words[:, self.index].float().cpu()

    def together(self) -> None:
        """Take the words that other processes read; those that nobody read stay NaN."""
        value, read = self.activation.nan_to_num(0.0), (~self.activation.isnan()).int()
        processes.sum_(value, read)
        self.activation = torch.where(read > 0, value, torch.nan)


def examples(
    model: Model,
    text: Corpus | Encoded,
    neuron: str | tuple[str | int, int],
    *,
    site: str | Site = "resid",
    k: int = 6,
    around: int = 5,
    max_tokens: int = MAX_TOKENS,
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """The `k` sentences in which a neuron is farthest from its mean, as `plots.neuron_card(examples=...)` takes them.

    Of each, the words `around` the one that drives it most, and the neuron's activation on each of them, in the model's
    units. Sentences come with the farthest first. One pass over the text; the model is read only.

    Raises:
        ValueError: an unknown site, or a neuron that it does not have.
    """
    place = site_of(bridge_of(model), site)
    (chosen,) = Neurons.of(place, [neuron])  # says what is wrong
    encoded = encoded_for(model, text)
    corpus = encoded.corpus
    one = _One(place.layers.index(chosen.layer), chosen.index, corpus.n_words)
    stream(model, encoded, [one], site=place, max_tokens=max_tokens)
    values = one.activation.numpy()
    far = np.nan_to_num(np.abs(values - np.nanmean(values)), nan=-1.0)
    peak = [int(a + far[a:b].argmax()) for a, b in zip(corpus.start[:-1], corpus.start[1:], strict=True)]
    order = sorted(range(len(peak)), key=lambda i: -far[peak[i]])[:k]
    ends = ((max(corpus.start[i], peak[i] - around), min(corpus.start[i + 1], peak[i] + around + 1)) for i in order)
    return [(tuple(corpus.vocab[w] for w in corpus.word[a:b]), tuple(map(float, values[a:b]))) for a, b in ends]
