"""A whole run on next-token concepts: a toy language model, a run folder, its tables and its page."""

import json
import math

import numpy as np
import pytest

from relearn_lens.files import plain
from relearn_lens.measure.evaluation import OTHERS, TokenLoss
from relearn_lens.models import toy
from relearn_lens.runs import store
from relearn_lens.runs.events import Base, Prepared
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.store import load_run
from relearn_lens.runs.summary import summary as summary_of
from relearn_lens.show import report, tables

SMALL = (
    "seeds=[0]", "data.train_sentences=150", "data.validation_sentences=40", "data.probe_sentences=40",
    "finetune.epochs=8", "retrain.steps=[4, 8]", "grafts.bands=1", "prune.control_draws=1", "measure.draws=100",
    "measure.sentences=4", "measure.steps=2", "measure.shuffles=2",
)  # fmt: skip


def small(*sets: str) -> Experiment:
    return settings_of("toy-next-token", {}, [*SMALL, *sets])


@pytest.fixture(scope="module")
def run(tmp_path_factory, stages) -> Run:
    return store.run(small(), tmp_path_factory.mktemp("run") / "run", shared=stages)


def test_the_concepts_tokens_suffer_and_recover(run):
    concept, random = run.arms["concept"][0], run.arms["random"][0]
    loss = {stage: snapshot.scores for stage, snapshot in concept.snapshots.items()}
    assert all(isinstance(scores, TokenLoss) for scores in loss.values())
    assert loss["pruned"].shown("place") > loss["base"].shown("place") + 0.3
    cost = {label: loss["pruned"].shown(label) - loss["base"].shown(label) for label in ("place", OTHERS)}
    assert abs(cost[OTHERS]) < cost["place"] / 4  # what is not a place is left alone
    assert loss["8"].shown("place") < loss["pruned"].shown("place") - 0.2
    assert random["pruned"].scores.shown("place") < loss["base"].shown("place") + 0.2


def test_a_folder_gives_the_run_back(run):
    again = load_run(run.folder)
    for name, (arm,) in run.arms.items():
        for stage in arm.stages:
            one, other = arm[stage].scores, again.arms[name][0][stage].scores
            assert (one.nats == other.nats).all()
            assert (one.tokens == other.tokens).all()


def test_numbers_are_losses_in_nats(run):
    summary = summary_of(run)
    assert summary["units"]["loss"] == "nats per token"
    (arm,) = summary["arms"]["concept"]
    assert set(arm["loss"]["base"]) == {"person", "place", OTHERS, "overall"}
    low, high = arm["loss_interval"]["pruned"]
    assert low < arm["loss"]["pruned"]["place"] < high
    json.dumps(plain(summary), allow_nan=False)
    header, rows = tables.score_rows(run)
    assert header == ["arm", "stage", "person", "place", OTHERS, "overall", "place interval"]
    shown = float(rows[1][3])
    low, high = map(float, rows[1][-1].split(" to "))
    assert low <= shown <= high
    assert tables.score_title(run) == "loss, nats per token"
    assert "took its loss from" in summary["what_happened"]
    assert "nats per token" in summary["what_happened"]
    assert "nats worse than it right after pruning" in summary["what_happened"]
    assert "F1" not in summary["what_happened"]
    assert "loss" in tables.draws_row(run)


def test_claims_of_a_language_model_are_in_nats_or_in_shares_of_the_gain_over_a_guess(run):
    found = {claim.id: claim for claim in run.numbers.claims}
    scores = {stage: run.arms["concept"][0][stage].scores for stage in ("base", "pruned")}
    base, pruned = (scores[stage].shown("place") for stage in ("base", "pruned"))
    assert found["C1"].concept == pytest.approx(pruned - base)
    assert found["C1"].measures.startswith("nats per token on the concept that pruning costs")
    assert found["C3a"].concept == pytest.approx((pruned - base) / (math.log(scores["base"].vocabulary) - base))
    assert found["C3a"].measures.startswith("share of base gain over a uniform guess")


def test_the_page_speaks_of_loss(run):
    page = report.render(run)
    assert "nats per token" in page
    assert "strict span F1" not in page


def test_words_carry_a_concept(tmp_path):
    words = small(
        'words=["Tarn", "velda"]', "concept=two", 'arms=["concept"]', "measure.what=[]", "finetune.epochs=1",
        "grafts.skip=true",
    )  # fmt: skip
    run = store.run(words, tmp_path / "run")
    scores = run.arms["concept"][0]["base"].scores
    assert scores.labels == ("two", OTHERS)
    text = toy.corpus()
    wanted = {"Tarn", "Velda"}
    assert 0 < scores.support()["two"] < sum(text.vocab[w] in wanted for w in text.word)
    assert summary_of(run)["concept"] == "two"


def test_words_are_read_where_the_settings_say():
    for reading, count in (("auto", None), ("word", None), ("before", None)):
        ready = next(iter(perform(small(f"measure.reading={reading}"))))
        assert isinstance(ready, Prepared)
        read = len(ready.probe.read_words)
        assert (read == ready.probe.corpus.n_words) == (reading == "word"), count


def test_training_takes_none_of_it_as_it_comes():
    events = perform(small("finetune.epochs=0", 'arms=["unpruned"]', "measure.what=[]"))
    ready, base = next(events), next(events)
    assert isinstance(ready, Prepared)
    untrained = toy.language_model(seed=0)
    assert isinstance(base, Base)
    for name, weight in untrained.weights().items():
        assert np.array_equal(base.weights[name].numpy(), weight.numpy())


def test_precision_changes_how_the_model_computes():
    bases = []
    for precision in ("float32", "bfloat16"):
        sets = (f"precision={precision}", "finetune.epochs=1", 'arms=["unpruned"]', "measure.what=[]")
        bases.append(next(event for event in perform(small(*sets)) if isinstance(event, Base)))
    assert {str(value.dtype) for base in bases for value in base.weights.values()} == {"torch.float32"}
    wide, narrow = (base.snapshot.scores.shown("overall") for base in bases)
    assert narrow == pytest.approx(wide, abs=0.1)
    assert narrow != wide


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["task=tag", 'words=["a"]'], "a tagger needs a label for the concept"),
        (['words=["a"]', 'concept=["x", "y"]'], "a concept that is given by words has one name"),
        (["never=outside"], "never = 'outside': a language model has no label O; use never = 'absent'"),
        (["prune.fraction=auto"], "prune.fraction = 'auto': the size of a cut is found by F1.* give a number"),
        (["measure.reading=after"], "measure.reading = 'after'"),
    ],
)
def test_settings_that_do_not_go_together(sets, said):
    with pytest.raises(ValueError, match=said):
        small(*sets)


def test_an_encoder_is_refused_before_any_training(bert_folder):
    with pytest.raises(ValueError, match="sees the words after a token"):
        list(perform(small(f"model={bert_folder}")))


def test_the_twin_that_never_had_the_concept_can_be_the_only_arm(run, stages, tmp_path):
    """No token of the concept was in its loss, so it is worse than a model that had it, and only there."""
    alone = store.run(small('arms=["never"]', "measure.what=[]", "grafts.skip=true"), tmp_path / "run", shared=stages)
    assert list(alone.arms) == ["never"]
    never, base = (each.arms[name][0]["base"].scores for each, name in ((alone, "never"), (run, "concept")))
    assert never.shown("place") > base.shown("place") + 0.5
    assert abs(never.shown(OTHERS) - base.shown(OTHERS)) < 0.3
