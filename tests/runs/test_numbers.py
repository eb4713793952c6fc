"""What is told of a run is computed once, and read by all that tells it."""

from collections import Counter

import pytest

from relearn_lens.analysis import recovery, story
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.runs import answers, findings, store, summary
from relearn_lens.runs.events import ArmDone
from relearn_lens.runs.presets import settings_of
from relearn_lens.show import captions, plots, tables
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
        (findings, "claims"), (answers, "answers"), (findings, "migration_of"), (findings, "agreement"),
        (findings, "heir_rows"), (story, "what_happened"), (summary, "summary"), (recovery, "speeds"),
    ):  # fmt: skip
        count(module, name)
    return counted


def test_each_number_of_a_run_is_computed_once(counts, tmp_path):
    run = store.run(settings_of("toy", SMALL), tmp_path / "run")
    captions.migrated(run)
    for table in (tables.layer_rows, findings.speed_rows, findings.agreement_rows):
        assert table(run)[1] or table is findings.agreement_rows
    plots.verdicts(run)
    assert run.numbers.summary["what_happened"] == run.numbers.what_happened
    per_arm = {"speeds": 2, "heir_rows": 2}
    assert counts == {
        name: per_arm.get(name, 1)
        for name in (
            "claims",
            "answers",
            "migration_of",
            "agreement",
            "heir_rows",
            "what_happened",
            "summary",
            "speeds",
        )
    }


def test_a_run_that_takes_more_is_told_anew():
    run = store.run(settings_of("toy", SMALL | {"arms": ["concept"]}))
    before = run.numbers
    assert run.numbers is before
    assert list(before.speeds) == ["concept"]
    (path,) = run.arms["concept"]
    run.take(ArmDone(Trajectory(path.snapshots, path.pruned, "random", path.seed, path.concept), None))
    assert list(run.numbers.speeds) == ["concept", "random"]
