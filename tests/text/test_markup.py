"""What notebooks show of our objects: every text escaped, and the numbers of the objects."""

import re
from dataclasses import replace

import pytest

from relearn_lens.text import markup
from relearn_lens.text.corpus import build_corpus
from tests.show.test_plots import run_of
from tests.show.test_report import Page

HOSTILE = "<script>alert(1)</script>"


def test_table_escapes_every_cell():
    text = markup.table([HOSTILE, "b"], [[HOSTILE, 1.5], ["x", HOSTILE]])
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") == 3
    page = Page(text)
    assert page.open == []
    assert page.text.split()[-3:] == ["1.5", "x", HOSTILE]


def test_bars_are_as_long_as_their_values():
    text = markup.bars(["layer", "share"], {"0": 0.5, HOSTILE: 1.0, "2": float("nan"), "3": -1.0}, most=2.0)
    assert re.findall(r"width:([\d.]+)em", text) == ["2.50", "5.00", "0.00", "0.00"]
    assert HOSTILE not in text
    assert "nan" not in text


def test_box_and_sentence_escape():
    for text in (markup.box(HOSTILE, ""), markup.sentence([(HOSTILE, "O"), ("a", HOSTILE)])):
        assert HOSTILE not in text
        assert HOSTILE in Page(text).text


def test_sentence_marks_labelled_words():
    text = markup.sentence([("Paul", "person"), ("saw", "O"), ("Rome", "place")])
    assert Page(text).text.split() == ["Paul", "person", "saw", "Rome", "place"]
    assert text.count("border-bottom") == 2


def test_corpus_shows_its_labels_and_first_sentences():
    corpus = build_corpus([[(HOSTILE, "place", True), ("is", "O", False)], [("far", "O", False)]], name=HOSTILE)
    text = corpus._repr_html_()
    assert HOSTILE not in text
    page = Page(text)
    assert page.open == []
    assert f"{HOSTILE} place is" in page.text
    assert "place 1" in page.text


def test_saliency_shows_its_highest_neurons_and_layers():
    saliency = run_of("concept").arms["concept"][0]["base"].saliency
    page = Page(replace(saliency, concept=HOSTILE)._repr_html_())
    layer, index = divmod(int(saliency.score.argmax()), saliency.site.width)
    neuron = f"L{saliency.site.layers[layer]}N{index}"
    assert f"{neuron} {saliency.score[layer, index]:.4g}" in page.text
    assert HOSTILE in page.text
    for name, mean in zip(saliency.site.layers, saliency.by_rank().mean(1).tolist(), strict=True):
        assert f"{name} {mean:.3g}" in page.text


@pytest.mark.parametrize("arm", ["concept", "unpruned"])
def test_trajectory_shows_scores_by_stage(arm):
    path = run_of(arm).arms[arm][0]
    page = Page(replace(path, arm=HOSTILE)._repr_html_())
    assert page.open == []
    for stage, snapshot in path.snapshots.items():
        numbers = " ".join(f"{snapshot.scores.shown(label):.3f}" for label in ("person", "place"))
        assert f"{stage} {numbers}" in page.text
    assert ("4 neurons pruned" if arm == "concept" else "nothing pruned") in page.text
    assert HOSTILE in page.text
