"""Arms of one's own: pruning beside training something out, on a next-token concept, and what grafts say of each."""

from pathlib import Path

import pytest

from relearn_lens.measure.tracking import PRUNED
from relearn_lens.runs import store
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import experiment
from relearn_lens.runs.store import load_run
from relearn_lens.runs.summary import summary as summary_of
from relearn_lens.show import report
from tests.made import tiny

TOML = """
preset = "toy-next-token"
seeds = [0]
arms = ["concept", "random"]

[arm.npo]
remove = "npo"
set = { steps = [12], lr = 3e-3, batch_size = 16 }

[arm.rmu]
remove = "rmu"
set = { layer = 2, coefficient = 20, alpha = 1, reading = "before", steps = [24], lr = 1e-2 }

[arm.patched]
where = "attribution_patching"

[data]
train_sentences = 150
validation_sentences = 40
probe_sentences = 40

[finetune]
epochs = 8

[retrain]
steps = [4, 12]

[grafts]
bands = 2

[prune]
control_draws = 1

[measure]
what = ["dprime"]
shuffles = 2
draws = 100
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stages: Path) -> Run:
    path = tmp_path_factory.mktemp("own")
    (path / "own.toml").write_text(TOML)
    return store.run(settings_of(path / "own.toml"), path / "run", shared=stages)


def test_each_arm_removes_the_concept_and_leaves_the_rest(run):
    assert list(run.arms) == ["concept", "random", "npo", "rmu", "patched"]
    base = run.arms["concept"][0]["base"].scores
    for name in ("concept", "npo", "rmu"):
        (path,) = run.arms[name]
        assert path[PRUNED].scores.shown("place") > base.shown("place") + 0.3, name
        assert path["12"].scores.shown("place") < path[PRUNED].scores.shown("place") - 0.2, name
    npo, patched = run.arms["npo"][0], run.arms["patched"][0]
    cost = {label: npo[PRUNED].scores.shown(label) - base.shown(label) for label in ("place", "overall")}
    assert cost["overall"] < cost["place"]
    assert npo.removed is None
    assert len(patched.removed) == len(run.arms["concept"][0].removed)
    assert patched.removed.site.name == "mlp_post"  # that localiser's, not the run's


def test_what_came_back_is_grafted_in_each(run):
    assert [own.arm for own in run.own] == ["npo", "rmu", "patched"]
    for own in run.own:
        (path,) = run.arms[own.arm]
        assert own.grafts.value(own.grafts.cut) == pytest.approx(own.grafts.value(own.grafts.cut))
        assert set(own.grafts.parts) == set(run.grafted[0].stages["12"].parts) - {"cut"}
        margins = [path[stage].scores.margin.value("place") for stage in (PRUNED, "12")]
        assert [own.grafts.value(each) for each in (own.grafts.cut, own.grafts.retrained)] == pytest.approx(margins)


def test_a_folder_gives_the_arms_back_and_a_page_shows_them(run, tmp_path):
    again = load_run(run.folder)
    assert list(again.arms) == list(run.arms)
    assert [own.arm for own in again.own] == [own.arm for own in run.own]
    assert again.own[0].grafts.value(again.own[0].grafts.cut) == run.own[0].grafts.value(run.own[0].grafts.cut)
    assert set(summary_of(again)["arms"]) == set(run.arms)
    page = report.write_report(again, tmp_path / "page.html").read_text()
    assert "patched" in page


def test_settings_that_are_written_are_read_again(tmp_path):
    own = experiment({"arm": {"npo": {"remove": "npo", "set": {"lr": 1e-3}}}})
    (tmp_path / "own.toml").write_text(own.to_toml())
    assert settings_of(tmp_path / "own.toml") == own
    assert experiment({}).arm == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"arm": {"random": {}}},
            r"^arm\.random: a name of small letters, digits and _ that is none of concept, other",
        ),
        ({"arm": {"N-P": {}}}, r"^arm\.N-P: a name of small letters"),
        ({"arm": {"npo": {}}, "arms": ["random"]}, r"^arm\.npo: it is compared with the arm concept"),
        ({"arm": {"npo": {}}, "retrain": {"lora_rank": 2}}, r"^arm\.npo: arms of one's own are retrained by their wei"),
    ],
)
def test_arms_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        experiment(changes)


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ({"remove": "npoo"}, r"unknown remover 'npoo'"),
        ({"remove": "npo", "set": {"beta": 0}}, r"^beta = 0: Input should be greater than 0"),
        ({"where": "here"}, r"unknown localiser 'here'"),
    ],
)
def test_unknown_methods_are_refused_before_any_training(arm, says):
    with pytest.raises(ValueError, match=says):
        store.run(tiny().model_copy(update={"arm": experiment({"arm": {"mine": arm}}).arm}))
