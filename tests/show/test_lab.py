"""The view of a run in JupyterLab itself: a person opens a notebook, runs it, and looks, types and points at what is
shown."""

# what a run may lack, this one has
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from relearn_lens.neurons.sites import Neuron
from relearn_lens.runs import store
from relearn_lens.runs.results import Run
from tests.browser import CHROMIUM, browsing, ended, there
from tests.made import tiny
from tests.spare import ours

LAB = shutil.which("jupyter-lab", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or ""
pytestmark = [
    pytest.mark.skipif(not LAB, reason="no JupyterLab (pip install jupyterlab)"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH"),
]
NOTEBOOK = """import relearn_lens as rl

run = rl.load_run("run")
rl.explore(run, beside="random")"""
TOKEN, ARMS = "a-test", ("concept", "random")
READY = """(() => {
  const here = window.jupyterapp?.shell.currentWidget;
  return here?.sessionContext?.session?.kernel?.status == "idle" && here.content?.widgets?.length > 0;
})()"""
LOOK = """(() => {
  const view = document.querySelector(".rl-explore"), all = name => [...view.querySelectorAll(name)];
  const ground = e => { while (!getComputedStyle(e).backgroundColor.startsWith("rgb(")) e = e.parentElement;
                        return getComputedStyle(e).backgroundColor; };
  const covered = e => { e.scrollIntoView({block: "center"}); const r = e.getBoundingClientRect();
                         return !e.contains(document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2)); };
  return {
    room: view.parentElement.clientWidth, plot: view.querySelector(".curve svg").getBoundingClientRect().width,
    curve: view.querySelector(".curve").innerText, stage: view.querySelector(".stage b").innerText,
    chips: view.querySelector(".chips").innerText, tip: view.querySelector(".tip").innerText,
    card: view.querySelector(".card").innerText,
    words: all(".card td, .card p span").filter(e => e.innerText.trim()).map(e => ({
      text: e.innerText, covered: covered(e), ink: getComputedStyle(e).color, ground: ground(e)})),
    maps: all(".map").map(map => ({
      head: map.querySelector("h4").innerText, box: map.getBoundingClientRect().toJSON(),
      cell: Math.min(...[...map.querySelectorAll("canvas")].map(c => c.getBoundingClientRect().width / c.width)),
      drawn: [...map.querySelectorAll("canvas")].map(c =>
        [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])})),
    cells: jupyterapp.shell.currentWidget.content.widgets.length,
  };
})()"""
CUT, MOST = (128, 128, 128, 90), (254, 232, 56, 255)
"""Colours of the map: a neuron that is cut, and the most salient one."""


def chosen(run: Run) -> Neuron:
    """The neuron that the view opens at: the most salient one of those that are there."""
    path = run.arms["concept"][0]
    return next(iter(path["16"].saliency.top(1, among=path.there("16"))))


def word_of(run: Run) -> str:
    """A top word of that neuron, with letters that are keys of a notebook."""
    words = run.arms["concept"][0]["16"].words
    assert words is not None
    return next(word for word in words.of((chosen(run).layer, chosen(run).index)) if {"a", "d"} <= set(word))


def rgb(colour: str) -> tuple[float, ...]:
    """Red, green, blue and, where it is not whole, opacity of a colour as a browser writes it."""
    return tuple(map(float, re.findall(r"[\d.]+", colour)))


def light(colour: tuple[float, ...]) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    channels = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def contrast(ink: str, ground: str) -> float:
    """Contrast of a text with what it stands on, 1 to 21 (WCAG 2)."""
    below, (*above, opacity) = rgb(ground), (*rgb(ink), 1)[:4]
    mixed = tuple(opacity * a + (1 - opacity) * b for a, b in zip(above, below, strict=True))
    darker, lighter = sorted(map(light, (mixed, below)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and a notebook that shows it."""
    folder = tmp_path_factory.mktemp("room")
    store.run(tiny(retrain__steps=[8, 16], arms=ARMS, rounds=0), folder / "run")
    cell = nbformat.v4.new_code_cell(NOTEBOOK, id="view")
    kernel = {"kernelspec": {"name": "spare", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "view.ipynb")
    return folder


@pytest.fixture(scope="module")
def run(room: Path) -> Run:
    return store.load_run(room / "run")


@pytest.fixture(scope="module")
def seen(room: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page shows, by what was done last."""
    own = tmp_path_factory.mktemp("jupyter")
    kernel = own / "data" / "kernels" / "spare" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    env = os.environ | {f"JUPYTER_{name}_DIR": str(own / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env["PATH"] = str(Path(LAB).parent)  # without node, which it would ask for what builds extensions
    options = [
        "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.port=0", "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={room}", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    argv = [*ours().python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}), encoding="utf-8")
    with (
        (own / "log").open("w", encoding="utf-8") as log,
        ended(subprocess.Popen([LAB, *options], env=env, stdout=log, stderr=log)) as server,
    ):
        return asyncio.run(visit(server, own, word_of(run)))


async def visit(server: subprocess.Popen, own: Path, word: str) -> dict[str, Any]:
    """What a person does in front of it."""
    info = await there(server, lambda: json.loads(next((own / "runtime").glob("jpserver-*.json")).read_text()))
    async with browsing(own / "browser") as tab:
        await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page = f"http://127.0.0.1:{info['port']}/lab/tree/view.ipynb?token={TOKEN}&reset"
        await tab.call("Page.navigate", url=page)
        await tab.until(READY)
        await tab.js("jupyterapp.commands.execute('notebook:run-all-cells')")
        await tab.until("document.querySelectorAll('.rl-explore canvas').length")
        shown = {"opened": await tab.js(LOOK)}
        await tab.point(*await tab.middle(".rl-explore .gained"), click=True)
        shown["gained"] = await tab.js(LOOK)
        # By the keyboard: a notebook has keys of its own, and a and d would change its cells.
        await tab.point(*await tab.middle(".rl-explore .word"), click=True)
        for letter in word:
            await tab.press(letter)
        shown["searched"] = await tab.js(LOOK)
        await tab.js("document.querySelector('.rl-explore .stage input').focus()")
        await tab.press("Home", 36)
        shown["base"] = await tab.js(LOOK)
        await tab.press("ArrowRight", 39)
        shown["pruned"] = await tab.js(LOOK)
        await tab.point(*await tab.middle(".rl-explore .row:last-child > b"))
        shown["pointed"] = await tab.js(LOOK)
        x, y = await tab.middle(".rl-explore .map canvas")
        await tab.point(x + 2, y, click=True)  # just right of the middle of 64 neurons
        shown["clicked"] = await tab.js(LOOK)
        await tab.js("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        await tab.until(
            "document.body.dataset.jpThemeLight == 'false' && !document.querySelector('#jupyterlab-splash')"
        )
        shown["dark"] = await tab.js(LOOK)
        return shown


# --- what is shown


def test_the_card_is_read_as_text(seen, run):
    path, neuron = run.arms["concept"][0], chosen(run)
    card, layer = seen["opened"]["card"], path.site.layers.index(neuron.layer)
    assert f"{neuron} in the concept arm" in card
    for stage in path.stages:
        rank = float(path[stage].saliency.by_rank(path.there(stage))[layer, neuron.index])
        top = path[stage].words
        words = "" if top is None else ", ".join(top.of((neuron.layer, neuron.index)))
        assert re.search(rf"^{stage}\s+{rank:.2f}\s+\S+\s+{re.escape(words)}$", card, re.M), (stage, words, card)
    guesses = path["16"].guesses
    assert "What the model says at stage 16" in card
    for sentence, true, said in zip(guesses.words, guesses.true, guesses.said, strict=True):
        told = (w if s == (t,) else f"{w} (says {', '.join(s)})" for w, t, s in zip(sentence, true, said, strict=True))
        assert " ".join(told) in card


@pytest.mark.parametrize("theme", ["opened", "dark"])
def test_what_the_card_says_is_legible_and_covered_by_nothing(seen, theme):
    words = seen[theme]["words"]
    assert len(words) > 20
    assert [word["text"] for word in words if word["covered"]] == []
    assert min(contrast(word["ink"], word["ground"]) for word in words) > 7
    assert (light(rgb(words[0]["ground"])) < 0.1) == (theme == "dark")


def test_plot_and_maps_fill_the_room_that_there_is(seen):
    look = seen["opened"]
    assert look["plot"] > 0.95 * look["room"] > 700
    assert min(each["cell"] for each in look["maps"]) > 3  # pixels across, of a neuron
    assert "F1 of place" in look["curve"]


def test_two_arms_stand_side_by_side(seen):
    for look in (seen["opened"], seen["pruned"]):
        assert [each["head"] for each in look["maps"]] == [f"{arm} arm, stage {look['stage']}" for arm in ARMS]
        one, two = (each["box"] for each in look["maps"])
        assert one["y"] == two["y"]
        assert one["right"] < two["left"]
        assert look["maps"][0]["drawn"] != look["maps"][1]["drawn"]


def test_map_shows_the_most_salient_and_greys_what_is_cut_at_the_stage(seen, run):
    for stage, look in (("16", seen["opened"]), ("base", seen["base"]), ("pruned", seen["pruned"])):
        for arm, each in zip(ARMS, look["maps"], strict=True):
            path = run.arms[arm][0]
            there = path.there(stage).mask.numpy()
            drawn = np.array(each["drawn"]).reshape(*there.shape, 4)
            assert np.array_equal((drawn == CUT).all(-1), ~there)
            if stage == "16":
                rank = path[stage].saliency.by_rank(path.there(stage)).numpy()
                assert np.array_equal((drawn == MOST).all(-1), np.round(254 * rank) == 254)
    assert [len(run.arms["concept"][0].there(stage)) for stage in ("base", "pruned", "16")] == [256, 252, 252]


def test_the_slider_changes_map_card_and_what_is_listed(seen):
    base, pruned = seen["base"], seen["pruned"]
    assert (base["stage"], pruned["stage"]) == ("base", "pruned")
    assert base["maps"][0]["drawn"] != pruned["maps"][0]["drawn"]
    assert "What the model says at stage base" in base["card"]
    assert "What the model says at stage pruned" in pruned["card"]
    assert "at stage 16:" in seen["searched"]["chips"]
    assert "at stage base:" in base["chips"]


def test_gained_most_lists_who_rose_in_rank(seen, run):
    path = run.arms["concept"][0]
    before, after = (path[stage].saliency.by_rank(path.there(stage)) for stage in ("base", "16"))
    rise = (after - before).nan_to_num(-1).flatten()
    layer, index = divmod(int(rise.argmax()), path.site.width)
    title, first = seen["gained"]["chips"].split("L", 1)
    assert title == "Rose most from base to 16, in rank: "
    assert first.startswith(f"{path.site.layers[layer]}N{index} +{float(rise.max()):.2f}")


def test_a_word_that_is_typed_marks_who_has_it(seen, run):
    path, word = run.arms["concept"][0], word_of(run)
    words = path["16"].words
    n = sum(
        word.lower() in map(str.lower, words.of((layer, i)))
        for layer in path.site.layers
        for i in range(path.site.width)
    )
    assert f"{n} neurons have “{word.lower()}” among their top words at stage 16:" in seen["searched"]["chips"]
    assert str(chosen(run)) in seen["searched"]["chips"]
    assert seen["searched"]["cells"] == 1  # the notebook took none of it


def test_a_layer_that_is_pointed_at_says_what_its_graft_gave(seen, run):
    grafts = run.grafted[0].stages["16"]
    part = next(part for part in grafts.parts if part.endswith("to 3"))
    wanted = f"Grafts of {part} at stage 16: enough {grafts.enough(part).value:.2f}, needed"
    assert wanted in seen["pointed"]["tip"]


def test_a_click_on_the_map_opens_that_neurons_card(seen, run):
    assert f"L{run.arms['concept'][0].site.layers[0]}N32 in the concept arm" in seen["clicked"]["card"]
