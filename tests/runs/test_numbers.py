"""What is told of a run is computed once, and read by all that tells it."""

from collections import Counter

import pytest

from relearn_lens.analysis import claims, migration, questions, recovery, story
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.runs import numbers, store, summary
from relearn_lens.runs.events import ArmDone
from relearn_lens.runs.presets import settings_of
from relearn_lens.show import captions, plots, report, tables
from tests.made import TINY

SMALL = {
    **TINY, "data.train_sentences": 32, "data.validation_sentences": 24, "data.probe_sentences": 24,
    "finetune.epochs": 0.25, "retrain.steps": [4, 8], "measure.what": ["top_words"], "grafts.skip": True,
    "arms": ["concept", "random"],
}  # fmt: skip


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """How often each number was computed."""
    counted: Counter[str] = Counter()

    def count(module, name: str) -> None:
        of = getattr(module, name)

        def counting(*args, **how):
            counted[name] += 1
            return of(*args, **how)

        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (claims, "claims"), (questions, "family"), (migration, "migration"), (recovery, "speeds"),
        (numbers, "_heirs"), (story, "what_happened"),
    ):  # fmt: skip
        count(module, name)
    return counted


def test_each_number_of_a_run_is_computed_once(counts, tmp_path):
    run = store.run(settings_of("toy", SMALL), tmp_path / "run")
    captions.migrated(run)
    assert tables.layer_rows(run)[1]
    assert tables.speed_rows(run)[1]
    assert run.numbers.claims is run.numbers.claims
    plots.verdicts(run)
    report.render(run)
    assert summary.summary(run)["what_happened"] == run.numbers.what_happened
    arms, selections = 2, 3  # and the figure of the migration draws two, beside a control of its own
    assert counts == {
        "claims": 1, "family": 1, "migration": selections + 2, "speeds": arms, "_heirs": arms, "what_happened": 1,
    }  # fmt: skip


def test_a_run_that_takes_more_is_told_anew():
    run = store.run(settings_of("toy", SMALL | {"arms": ["concept"]}))
    assert list(run.numbers.speeds) == ["concept"]
    (path,) = run.arms["concept"]
    run.take(ArmDone(Trajectory(path.snapshots, path.removed, "random", path.seed, path.concept), None))
    assert list(run.numbers.speeds) == ["concept", "random"]
