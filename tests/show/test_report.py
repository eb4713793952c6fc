"""The page: one file that loads nothing, escapes what users named, and holds the numbers."""

# plotly makes the attributes of a figure as it goes
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from relearn_lens.measure.examples import Examples
from relearn_lens.measure.guesses import Guesses
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.runs import presets
from relearn_lens.runs.results import Run
from relearn_lens.show import brief, captions, plots, report, tables
from relearn_lens.text.concept import Concept
from tests.analysis.test_story import scores_of
from tests.browser import CHROMIUM, QUIET
from tests.show.test_plots import HOSTILE as WORDS
from tests.show.test_plots import layout_of, losing, margined, rich, run_of, with_all

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would load, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attrs: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img", "input", "hr"):
            self.open.append(tag)
        self.attrs.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster") and value and not value.startswith("#"):
                self.loads.append((tag, name, value))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without its beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def ids(self) -> list[str]:
        """Every id."""
        return [id for _, attrs in self.attrs if (id := attrs.get("id"))]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def told(run: Run) -> Run:
    """A run with the manifest of one."""
    run.manifest = {
        "versions": {"torch": "9.8.7"},
        "inputs": {"corpus:some/file": "ab" * 32},
        "notes": ["toy/train: 3 sentence(s) were split"],
        "text": ["Corpus(toy/train: 64 sentences)"],
        "seconds": {"prepare": 1.0, "concept-0": 2.5},
        "peak_rss_mb": 4321,
    }
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return told(rich(run_of("concept", "random", "unpruned", seeds=3, width=12)))


@pytest.fixture(scope="module")
def text(run) -> str:
    return report.render(run)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def plain() -> Page:
    """The page of a run that measured little."""
    return Page(report.render(told(run_of("concept", "random"))))


def test_report_is_one_whole_page(text, page):
    assert text.lower().startswith("<!doctype html>")
    assert page.open == []
    assert {"html", "head", "title", "body", "h1", "table"} <= set(page.tags)
    assert len(text.encode()) < 8_000_000


def test_report_loads_nothing(page, text):
    assert page.loads == []
    assert "link" not in page.tags
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text.split("</style>")[0])
    assert not re.search(r"<script[^>]*\bsrc\s*=", text)
    assert not re.search(r"<(img|iframe|link|object|embed)\b[^>]*(src|href|data)\s*=\s*['\"]?\s*(https?:)?//", text)


def test_report_brings_plotly_along_once(text):
    assert text.count("plotly.js v") == 1
    assert len(re.findall(r"Plotly\.newPlot\(", text)) >= 5


def test_report_has_a_figure_for_every_arm(page, run):
    assert page.tags.count("script") >= 2 + len(run.arms)


def test_report_holds_the_tables(page, run):
    assert tables.draws_row(run) in page.text
    for header, rows in (tables.score_rows(run), tables.layer_rows(run), tables.similarity_rows(run)):
        for row in [header, *rows]:
            assert re.search(r"\s+".join(map(re.escape, (cell for cell in row if cell))), page.text), row
    for claim in run.numbers.claims:
        assert f"{claim.id}: {claim.verdict}." in page.text
        assert claim.why in page.text


def test_report_holds_settings_versions_notes_hashes_time_and_memory(page, run):
    for line in run.experiment.to_toml().splitlines():
        assert re.sub(r"\s+", " ", line) in page.text
    for wanted in ("torch 9.8.7", "ab" * 32, "some/file", "3 sentence(s) were split", "64 sentences", "4321 MB"):
        assert wanted in page.text


@pytest.mark.parametrize("arms", [("concept",), ("unpruned",), ("concept", "random")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_report_is_written_for_any_arms(arms, seeds):
    page = Page(report.render(told(run_of(*arms, seeds=seeds))))
    assert page.open == []
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.split()


def test_report_escapes_names():
    run = told(run_of("concept", "random"))
    run.experiment = run.experiment.model_copy(update={"model": HOSTILE, "corpus": f"conll:{HOSTILE}", "site": HOSTILE})
    run.arms = {
        name: [Trajectory(arm.snapshots, arm.removed, arm.arm, arm.seed, Concept(HOSTILE, ("place",))) for arm in arms]
        for name, arms in run.arms.items()
    }
    run.manifest |= {"text": [HOSTILE], "notes": [HOSTILE], "inputs": {HOSTILE: HOSTILE}, "versions": {HOSTILE: "1"}}
    run.experiment = run.experiment.model_copy(update={"concept": "place"})
    text = report.render(run)
    assert HOSTILE not in text
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    page = Page(text)
    assert page.open == []
    assert HOSTILE in page.text


def test_write_report_writes_one_file(run, tmp_path):
    path = report.write_report(run, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert report.write_report(run, str(path)) == path
    Page(path.read_text(encoding="utf-8"))


# --- figures and what is said of them


def test_report_says_of_every_figure_what_it_shows_in_this_run(page, run):
    for say in (
        captions.pruned_share, lambda run: captions.layer_map(run, "unpruned"), captions.neuron_map, captions.migrated,
        captions.attribution, captions.flow, captions.saliency_against_similarity,
    ):  # fmt: skip
        assert re.sub(r"\s+", " ", say(run)) in page.text, say(run)
    assert captions.verdicts(run.numbers.claims, 3) in page.text
    assert "It was chosen for that after the fact, so it is an example and no evidence." in page.text


def test_report_has_every_figure_with_how_to_read_it(text, page):
    assert len(re.findall(r"Plotly\.newPlot\(", text)) == 13  # two layer maps and three flows among them
    for plot in (plots.recovery_curves, plots.layer_map, plots.neuron_map, plots.migration, plots.verdicts):
        question = (plot.__doc__ or "").split("\n")[0]
        assert f"How to read it: {question}" in page.text
    assert "Raises:" not in page.text


def test_report_leaves_out_what_was_not_measured(plain):
    assert "What the output owes to each layer" not in plain.text
    assert "Are they still the same neurons?" not in plain.text
    assert "Did its saliency move between layers?" in plain.text
    for missing in ("How much to cut", "As the model reads", "Which part brings"):
        assert missing not in plain.text
    assert [v for _, a in plain.attrs if (v := a.get("href"))] == [f"#{id}" for id in linked(plain)]


def test_report_says_so_where_a_score_cannot_be_shared_out():
    run = told(run_of("concept", "random", width=12))
    run.arms = {
        name: [
            replace(
                arm,
                snapshots={
                    k: replace(s, saliency=replace(s.saliency, score=s.saliency.score - 0.5))
                    for k, s in arm.snapshots.items()
                },
            )
            for arm in arms
        ]
        for name, arms in run.arms.items()
    }
    page = Page(report.render(run))
    assert "This score cannot be shared out over layers" in page.text


def test_report_of_a_language_model_speaks_of_its_loss():
    page = Page(report.render(told(losing(rich(run_of("concept", "random"))))))
    assert "loss of place by stage" in page.text
    assert "Nats per token; means over seeds" in page.text
    assert page.text.count("F1") == 1  # in how to read the curves


def test_report_draws_no_word_of_the_text_as_html(text):
    assert not any(word in text for word in WORDS)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert len(scripts) > 10
    for script in scripts[2:]:  # the first two are plotly's own
        for tag in ("script\\u003ealert", "img src", "b\\u003eRome"):
            assert f"<{tag}" not in script
            assert f"\\u003c{tag}" not in script
    assert "\\u0026lt;img src" in text or "&lt;img src" in text


def reading(run: Run, *, said: Sequence[tuple[str, ...]], task: str = "tag") -> Run:
    """The run with what its concept arm says of a sentence, `Paul saw Rome`: of each word, by stage."""
    path = run.arms["concept"][0]
    sentence, true = ("Paul", "saw", HOSTILE), ("person", "O", "place")
    snapshots = {
        stage: replace(snapshot, guesses=Guesses((sentence,), (true,), (tuple((w,) if w else () for w in words),)))
        for (stage, snapshot), words in zip(path.snapshots.items(), said, strict=True)
    }
    run.arms["concept"][0] = replace(path, snapshots=snapshots)
    run.experiment = run.experiment.model_copy(update={"task": task})
    return run


def test_report_shows_what_the_model_says_of_a_sentence_at_every_stage():
    known, lost = ("person", "O", "place"), ("person", "O", "O")
    text = report.render(told(reading(run_of("concept", "random"), said=(known, lost, lost, known))))
    page = Page(text)
    assert "As the model reads" in page.text
    assert HOSTILE not in text
    words = [attrs for tag, attrs in page.attrs if tag == "span" and (attrs.get("class") or "").startswith("word")]
    assert [attrs["class"] for attrs in words] == ["word word-other", "word", "word word-concept"]
    assert words[2]["title"] == "base: place; cut: O; 1: O; 2: place"
    assert "title" not in words[1]
    squares = [attrs.get("class") == "on" for tag, attrs in page.attrs if tag == "i"]
    assert squares == [True] * 4 + [True, False, False, True]


def test_report_shows_a_language_models_likeliest_tokens_at_the_concept():
    said = (("", "", "<scr"), ("", "", "the"), ("", "", "a"), ("", "", "<scr"))
    run = reading(losing(told(run_of("concept", "random"))), said=said, task="next_token")
    text = report.render(run)
    assert "<scr<" not in text
    assert "Paul saw [" + HOSTILE + "]" in Page(text).text
    assert re.findall(r"<td>(?:<b class=\"word-concept\">)?([^<]*)", text.partition('id="text"')[2])[:4] == [
        "&lt;scr", "the", "a", "&lt;scr",
    ]  # fmt: skip
    assert text.count('<b class="word-concept">&lt;scr</b>') == 2


def test_report_answers_every_question_in_a_table(run):
    whole = with_all(told(rich(run_of("concept", "random", "unpruned", seeds=3, width=12))))
    page = Page(report.render(whole))
    for answer in brief.answered(whole):
        assert f"{answer.question.asks} {answer.question.verdict}" in page.text
        assert answer.says in page.text.replace("\N{NO-BREAK SPACE}", " ")
        assert answer.number in page.text
    pictures = [attrs for tag, attrs in page.attrs if tag == "svg"]
    decided = [answer for answer in brief.answered(whole) if answer.number]
    assert [p["aria-label"].partition(";")[0] for p in pictures if p["aria-label"]] == [a.number for a in decided]
    for title in ("How much to cut", "Which part brings place back"):
        assert title in page.text
    assert "word by word" not in page.text
    assert page.text.startswith(" Where does place come back") or brief.sentence(whole) in page.text


def test_report_shows_neurons_that_took_over_beside_the_random_arms(page, run):
    after = page.text.partition("Those that gained most come first")[2]
    for name in ("concept", "random"):
        for row in run.numbers.heirs[name][:2]:
            words = " , ".join(row.now)
            assert str(row.neuron) in after
            assert all(word in after for word in row.now if word not in WORDS), words


def test_report_shows_neurons_word_by_word_as_text():
    run = told(with_all(run_of("concept", "random")))
    path = run.arms["concept"][0]
    cut, there = next(iter(path.removed or ())), next(iter(path.survivors()))
    sentences = (("In", HOSTILE, "."), ("Rome",))
    values = torch.tensor([[0.0, 1.0], [4.0, 1.0], [0.0, 1.0], [math.nan, 3.0]])
    kept = Examples((str(cut), str(there)), sentences, values)
    run.arms["concept"] = [replace(path, examples=kept), *run.arms["concept"][1:]]
    html = report.render(run)
    page = Page(html)
    for name, was in ((cut, "was cut"), (there, "carries it now")):
        assert re.search(rf"{was} (\S+ )*{name}", page.text), was
    read = re.findall(r'<p class="read">(.*?)</p>', html)
    assert len(read) == 4
    # Means 4/3 and 1.5: what is far above is orange, far below purple, what is not a number bare.
    assert re.findall(r"rgba\((212|94),\d+,\d+,(0\.\d+)\)", read[2]) == [
        ("94", "0.30"),
        ("212", "0.60"),
        ("94", "0.30"),
    ]
    assert "rgba" not in read[3]
    assert "&lt;script&gt;" in read[2]


def test_report_says_which_label_does_not_come_back(plain):
    run = told(run_of("concept", "random"))
    path = run.arms["concept"][0]
    low = replace(path["2"], scores=margined(scores_of(0.8, person=0.1, n=30)))
    run.arms["concept"][0] = replace(path, snapshots={**path.snapshots, "2": low})
    assert f"What does not come back: {brief.never_back(run)}." in Page(report.render(run)).text
    assert "What does not come back" not in plain.text


# --- for the keyboard and for screen readers


def linked(page: Page) -> list[str]:
    """The ids that links go to."""
    return [href[1:] for tag, attrs in page.attrs if tag == "a" and (href := attrs.get("href")) and href[0] == "#"]


def test_report_has_a_table_of_contents_whose_links_lead_somewhere(page):
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = linked(page)
    assert targets[0] == "main"
    assert targets[1:] == ["back", "parts", "questions", "new", "more", "repeat"]
    assert set(targets) <= set(ids)


def test_report_is_used_by_keyboard(page, text):
    (slider,) = (attrs for tag, attrs in page.attrs if tag == "input")
    assert slider["type"] == "range"
    assert (slider["min"], slider["max"]) == ("0", "3")
    assert [a for tag, a in page.attrs if tag == "label" and a.get("for") == slider["id"]]
    boxes = [attrs for _, attrs in page.attrs if attrs.get("class") == "scroll"]
    assert boxes
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert ":focus-visible" in text
    assert all(attrs.get("aria-label") for tag, attrs in page.attrs if tag == "figure")


def test_report_has_a_dark_page(text):
    assert "@media (prefers-color-scheme: dark)" in text
    assert '<meta name="color-scheme" content="light dark">' in text


def test_report_says_the_command_that_repeats_it(run, text):
    assert "<code>relearn-lens run settings.toml</code>" in text
    same = replace(run, experiment=presets.preset("names-quick"))
    same.arms = {name: arms[:1] for name, arms in run.arms.items()}
    same.damage = run.damage[:1]
    assert "<code>relearn-lens run names-quick</code>" in report.render(same)


# --- runs side by side


def test_comparison_shows_settings_that_differ_and_scores_side_by_side(run):
    other = told(run_of("concept", "random"))
    other.experiment = other.experiment.model_copy(update={"score": "probeless"})
    run.folder, other.folder = "runs/first", "runs/second"
    text = report.render_comparison([run, other])
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert text.count("plotly.js v") == 1
    assert len(text.encode()) < 8_000_000
    assert "score dprime probeless" in page.text
    assert "seeds 0, 1, 2 0" in page.text
    assert "arms concept, random, unpruned concept, random" in page.text
    assert "site resid" not in page.text
    for arm in ("concept", "random"):
        one = plots.shown(run.label, [a["2"].scores for a in run.arms[arm]], **run.interval)
        two = plots.shown(other.label, [a["2"].scores for a in other.arms[arm]], **other.interval)
        assert f"{arm} last stage {one} {two}" in page.text
    claims = [{c.id: c for c in each.numbers.claims} for each in (run, other)]
    assert f"{claims[0]['C1'].verdict} {claims[0]['C1'].effect} {claims[1]['C1'].verdict}" in page.text
    assert set(linked(page)) <= set(page.ids())


def test_comparison_warns_of_what_is_not_on_one_scale(run):
    other = losing(told(run_of("concept", "random")))
    other.manifest["inputs"] = {"sentences:validation": "cd" * 32}
    page = Page(report.render_comparison([run, other]))
    assert "The runs are scored on different scores (nats per token, strict span F1, 0 to 1)" in page.text
    assert "The runs are scored on different texts; their scores are not on one scale." in page.text
    assert "different concepts" not in page.text
    assert "different" not in Page(report.render_comparison([run, run])).text


def test_comparison_needs_two_runs_and_is_written_whole(run, tmp_path):
    with pytest.raises(ValueError, match="a comparison needs at least two runs, got 1"):
        report.render_comparison([run])
    path = report.write_comparison([run, run], tmp_path / "both.html")
    assert [p.name for p in tmp_path.iterdir()] == ["both.html"]
    assert "(1)" in Page(path.read_text(encoding="utf-8")).text


# --- in a browser

LISTEN = """<script>
var wrong = [];
addEventListener('error', function (e) { wrong.push(String(e.message)); });
['error', 'warn'].forEach(function (k) { console[k] = function () { wrong.push([].join.call(arguments, ' ')); }; });
var alert = function (text) { wrong.push('alert ' + text); };
</script>"""

TRY = """<script>
addEventListener('load', function () { setTimeout(function () {
  document.querySelectorAll('details').forEach(function (part) { part.open = true; });
  var said = {}, input = document.querySelector('input[type=range]');
  var plot = document.getElementById(input.dataset.plot);
  said.before = plot.data[0].z[0].slice(0, 12);
  input.focus(); said.focused = document.activeElement === input;
  input.value = input.max; input.dispatchEvent(new Event('input'));
  setTimeout(function () {
    said.after = plot.data[0].z[0].slice(0, 12);
    said.stage = input.nextElementSibling.textContent;
    plot.scrollIntoView();
    var area = plot.querySelector('.nsewdrag'), room = area.getBoundingClientRect();
    var at = {clientX: room.left + 0.6 * room.width, clientY: room.top + 0.9 * room.height, bubbles: true};
    ['mouseover', 'mousemove'].forEach(function (kind) { area.dispatchEvent(new MouseEvent(kind, at)); });
    setTimeout(function () {
      said.hover = plot.querySelector('.hoverlayer').textContent;
      said.tags = plot.querySelectorAll('.hoverlayer script, .hoverlayer img').length;
      said.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      said.width = innerWidth;
      said.plots = [].map.call(document.querySelectorAll('.js-plotly-plot'), function (p) {
        return [p.querySelector('svg').clientWidth, p.parentNode.clientWidth]; });
      said.ink = getComputedStyle(document.body).color;
      said.tick = getComputedStyle(document.querySelector('.xtick text')).fill;
      said.page = getComputedStyle(document.body).backgroundColor;
      said.wrong = wrong;
      parent.postMessage(JSON.stringify(said), '*');
    }, 300);
  }, 300);
}, 1500); });
</script>"""


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, text, tmp_path_factory) -> dict:
    """The page in headless Chromium in a frame as wide as a phone (its windows cannot be), tried out by a script."""
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH")
    folder: Path = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(text.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{TRY}</body>"))
    (folder / "phone.html").write_text(
        "<!doctype html><meta name='color-scheme' content='light dark'>"
        "<script>addEventListener('message', function (e) { document.body.dataset.said = e.data; });</script>"
        "<body><iframe src='page.html' style='width:390px;height:800px;border:0'></iframe></body>"
    )
    options = [
        *QUIET, f"--blink-settings=preferredColorScheme={int(request.param == 'light')}",
        "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", (folder / "phone.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    found = re.search(r'data-said="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return {"mode": request.param, **json.loads(unescape(found[1]))}


def test_page_makes_no_error_in_a_browser(seen):
    assert seen["wrong"] == []


def test_slider_changes_the_map_in_a_browser(seen, run):
    steps = layout_of(plots.neuron_map(run)).sliders[0].steps
    assert seen["focused"]
    assert seen["before"] == steps[0].args[0]["z"][0][0]
    assert seen["after"] == steps[-1].args[0]["z"][0][0]
    assert seen["before"] != seen["after"]
    assert seen["stage"] == "2"


def test_hover_shows_the_neurons_text_in_a_browser(seen, run):
    lowest = plots.neuron_map(run).data[0].text[0]
    hovered = next(
        text for text in lowest if seen["hover"].startswith(re.findall(r"^<b>(L\w+N\d+)</b>", text)[0] + "base")
    )
    for line in hovered.split("<br>")[1:]:
        for word in line.partition(": ")[2].split(", "):
            assert unescape(word) in seen["hover"]
    assert "rank saliency" in seen["hover"]
    assert seen["tags"] == 0


def test_page_fits_a_phone_in_a_browser(seen):
    assert seen["width"] == 390
    assert seen["wide"] <= 0
    assert all(drawn <= room <= 390 for drawn, room in seen["plots"])


def test_page_is_legible_in_light_and_dark_in_a_browser(seen):
    def light(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    dark = seen["mode"] == "dark"
    assert (light(seen["page"]) < 60) == dark
    for text in (seen["ink"], seen["tick"]):
        assert abs(light(text) - light(seen["page"])) > 150
