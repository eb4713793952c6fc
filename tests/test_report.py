"""The page: one file that loads nothing, escapes what users named, and holds the numbers."""

import re
from html.parser import HTMLParser

import pytest

from relearn_lens import report, tables
from relearn_lens.concept import Concept
from relearn_lens.experiment import Run
from relearn_lens.tracking import Trajectory
from tests.test_plots import run_of

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would load, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img", "input", "hr"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster") and value:
                self.loads.append((tag, name, value))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without its beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

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
    return told(run_of("concept", "random", "unpruned", seeds=2))


@pytest.fixture(scope="module")
def text(run) -> str:
    return report.render(run)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


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


def test_report_holds_the_story_and_the_tables(page, run):
    summary = tables.summary(run)
    assert re.sub(r"\s+", " ", summary["what_happened"]) in page.text
    assert tables.draws_row(run) in page.text
    for header, rows in (tables.f1_rows(run), tables.layer_rows(run)):
        for row in [header, *rows]:
            assert re.search(r"\s+".join(map(re.escape, (cell for cell in row if cell))), page.text), row
    assert f"{summary['arms']['concept'][0]['f1']['base']['place']:.1f}" in page.text


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


def test_report_escapes_names():
    run = told(run_of("concept", "random"))
    run.experiment = run.experiment.model_copy(update={"model": HOSTILE, "corpus": f"conll:{HOSTILE}", "site": HOSTILE})
    run.arms = {
        name: [Trajectory(arm.snapshots, arm.pruned, arm.arm, arm.seed, Concept(HOSTILE, ("place",))) for arm in arms]
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
