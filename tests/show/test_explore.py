"""The view of a run: what its script is given, what a browser shows of it, and example sentences of a neuron."""

# plotly makes the attributes of a figure as it goes
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

import base64
import json
import re
import subprocess
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.measure.tracking import Trajectory
from relearn_lens.neurons.sites import streaming
from relearn_lens.runs.results import Run
from relearn_lens.show import explore, plots
from tests.browser import CHROMIUM, QUIET
from tests.fixtures import unchecked
from tests.show.test_plots import HOSTILE, rich, run_of


@pytest.fixture(scope="module")
def run() -> Run:
    return rich(run_of("concept", "random", "unpruned", seeds=2, width=12))


def values_of(view: explore.View) -> dict[str, Any]:
    """What the script reads."""
    found = re.search(r'class="data">(.*?)</script>', view.html, re.S)
    assert found
    return json.loads(found[1])


def test_view_holds_the_ranks_of_every_neuron_that_is_there(run):
    values = values_of(explore.explore(run))
    for name, arms in run.arms.items():
        path: Trajectory = arms[0]
        for stage in path.stages:
            byte = np.frombuffer(base64.b64decode(values["arms"][name]["stages"][stage]["rank"]), dtype=np.uint8)
            rank = path[stage].saliency.by_rank(path.there(stage)).flatten().numpy()
            assert np.array_equal(byte == explore.STEPS + 1, np.isnan(rank))
            assert np.allclose((byte / explore.STEPS)[~np.isnan(rank)], rank[~np.isnan(rank)], atol=0.5 / explore.STEPS)
    # At base nothing is cut yet, so nothing is grey there.
    base = np.frombuffer(base64.b64decode(values["arms"]["concept"]["stages"]["base"]["rank"]), dtype=np.uint8)
    assert base.max() <= explore.STEPS


def test_view_holds_top_words_as_they_were_measured(run):
    values = values_of(explore.explore(run))["arms"]["concept"]
    path = run.arms["concept"][0]
    for stage, entry in values["stages"].items():
        top = path[stage].words
        if top is None:
            assert "words" not in entry
            continue
        index = np.frombuffer(base64.b64decode(entry["words"]), dtype=np.int32).reshape(-1, entry["n_words"])
        width = path.site.width
        for i in (0, 1, width + 3):
            words = [values["vocab"][k] for k in index[i] if k >= 0]
            assert tuple(words) == top.of((path.site.layers[i // width], i % width))[: explore.N_WORDS]


def test_view_draws_the_curves_of_the_run(run):
    values = values_of(explore.explore(run))
    for name, arms in run.arms.items():
        for stage, (value, low, high) in values["curves"][name].items():
            scores = [arm[stage].scores for arm in arms]
            estimate = plots.shown(run.label, scores, **run.interval)
            assert (value, low, high) == pytest.approx((estimate.value, estimate.low, estimate.high), abs=1e-4)


def test_view_opens_where_it_is_asked_to(run):
    now = values_of(explore.explore(run, arm="random", beside="unpruned", stage="1", neuron="L1N4", seed=1))
    assert now["now"] == {"arm": "random", "beside": "unpruned", "stage": "1", "layer": 2, "neuron": 4}
    assert now["seed"] == 1


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"arm": "never"}, "no arm 'never' in this run; it has concept, random, unpruned"),
        ({"beside": "never"}, "no arm 'never' in this run"),
        ({"seed": 7}, "no seed 7 in this run; it has 0, 1"),
        ({"neuron": "L9N1"}, "has no neuron 1 in layer '9'"),
    ],
)
def test_view_refuses_what_the_run_lacks(run, how, says):
    with pytest.raises(ValueError, match=says):
        explore.explore(run, **how)
    with pytest.raises(KeyError, match="no stage '9'; the stages are base, pruned, 1, 2"):
        explore.explore(run, stage="9")


def test_view_says_of_a_layer_what_grafting_its_part_gave(run):
    share = {"blocks 0 to 1": 0.25, "block 2": 0.5, "embedding": 0.125, "head": 0.0}
    made = SimpleNamespace(
        parts=tuple(share), controls={"unpruned": dict.fromkeys(share)},
        enough=lambda part: SimpleNamespace(value=share[part], refused="" if part != "head" else "within noise"),
        needed=lambda part: SimpleNamespace(value=2 * share[part]),
        control=lambda name, part: SimpleNamespace(value=0.05),
    )  # fmt: skip
    grafted = [SimpleNamespace(stages={"2": made})]
    told = unchecked(explore._graft_values)(SimpleNamespace(grafted=grafted), ["embed", "0", "1", "2"])
    both = "blocks 0 to 1 at stage 2: enough 0.25, needed 0.50, control grafts at most 0.05"
    assert told == {
        "embed": "embedding at stage 2: enough 0.12, needed 0.25, control grafts at most 0.05",
        "0": both,
        "1": both,
        "2": "block 2 at stage 2: enough 0.50, needed 1.00, control grafts at most 0.05",
    }


def test_nothing_in_a_run_ends_the_script_that_holds_it(run):
    view = explore.explore(run)
    assert view.html.count("</script>") == 2
    assert HOSTILE[0] not in view.html
    assert HOSTILE[0] in json.dumps(values_of(view))
    assert len(repr(view)) < 100


def shown_by_browser(page: Path, width: int = 1100) -> str:
    """The page as a browser has it once its script has run."""
    words = [
        CHROMIUM, *QUIET, f"--window-size={width},900", f"--user-data-dir={page.parent / 'browser'}",
        "--virtual-time-budget=4000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


USING = """<script>
const at = name => document.querySelector(".rl-explore ." + name), seen = [];
const put = (name, value) => { at(name).value = value; at(name).dispatchEvent(new Event("input")); };
at("gained").click(); seen.push(at("chips").textContent);
put("word", WORD.toUpperCase()); seen.push(at("chips").textContent);
put("stage input", 0); seen.push(at("chips").textContent);
seen.push([...document.querySelectorAll(".rl-explore .map h4")].map(h => h.textContent).join("; "));
put("stage input", at("stage input").max);
document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: seen.join("|")}));
</script>"""
"""What a person does: asks who gained most, searches a word, goes back to base, and on to the end."""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH")
def test_a_browser_shows_curve_maps_and_card(run, tmp_path):
    path = run.arms["concept"][0]
    page = explore.explore(run, neuron="L0N4", stage="2").save(tmp_path / "view.html")
    assert path["2"].words is not None
    word = path["2"].words.of(("0", 4))[0]
    page.write_text(page.read_text(encoding="utf-8") + USING.replace("WORD", json.dumps(word)), encoding="utf-8")
    dom = shown_by_browser(page)
    seen = re.search('<pre id="seen">(.*?)</pre>', dom, re.S)
    assert seen
    gained, searched, earlier, heads = unescape(seen[1]).split("|")
    assert gained.startswith("Rose most from base to 2, in rank: L")
    assert f"neurons have “{word}” among their top words at stage 2: L" in searched
    assert "among their top words at stage base" in earlier  # what is listed follows the slider
    assert heads == "concept arm, stage base; random arm, stage base"
    assert dom.count('<polyline fill="none" stroke="#') == 3
    assert dom.count("<canvas") == 2 * len(path.site.layers)
    card = dom[dom.index('class="card"') : dom.index('class="data"')]
    text = unescape(re.sub(r"<[^>]+>", " ", card))
    assert "L0N4 in the concept arm" in text
    rank = path["2"].saliency.by_rank(path.there("2"))[path.site.layers.index("0"), 4]
    assert f" 2  {rank:.2f} " in re.sub(r"\s\s+", "  ", text)
    assert path["2"].words is not None
    for word in path["2"].words.of(("0", 4)):
        assert word in text
    assert "place" in text[text.index("Tells apart") :]


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
