"""What a real run of the toy is said to have found: plain values, whole tables, and nothing that was not measured."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from relearn_lens.files import plain
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.neurons.sites import Neurons
from relearn_lens.runs import store
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.results import Run
from relearn_lens.runs.summary import findings
from relearn_lens.show import tables
from tests.made import TINY

SMALL = {
    **TINY, "data.train_sentences": 32, "data.validation_sentences": 24, "data.probe_sentences": 24,
    "finetune.epochs": 0.25, "retrain.steps": [4, 8], "measure.sentences": 4, "measure.steps": 2,
    "measure.sample_words": 60, "measure.dear": "all", "measure.shuffles": 19, "grafts.skip": True,
}  # fmt: skip
ALL = ["probeless", "dprime", "elastic_net", "conductance", "top_words", "similarity"]
TABLES = ("speed_rows", "attribution_rows", "similarity_rows", "agreement_rows")


@pytest.fixture(scope="module")
def run() -> Run:
    """Two seeds of two arms, with everything measured."""
    return store.run(settings_of("toy", SMALL | {"measure.what": ALL, "arms": ["concept", "random"], "seeds": [0, 1]}))


@pytest.fixture(scope="module")
def bare() -> Run:
    """One seed, nothing measured besides the score, and a model that never had the concept."""
    return store.run(
        settings_of(
            "toy", SMALL | {"measure.what": [], "measure.shuffles": 0, "arms": ["concept", "never", "unpruned"]}
        )
    )


@pytest.fixture(scope="module")
def found(run: Run) -> dict[str, Any]:
    return findings(run)


def as_json(found: Any) -> Any:
    """Through JSON and back; fails where a value is not plain."""
    return json.loads(json.dumps(plain(found), allow_nan=False))


def test_findings_are_plain(run: Run, bare: Run, found):
    for each in (found, findings(bare)):
        back = as_json(each)
        assert list(back) == [
            "claims", "migration", "recovery_speed", "savings", "attribution", "scores_agreement", "similarity",
            "meaning", "heirs", "probe_quality",
        ]  # fmt: skip
        assert len(back["claims"]) == 12
        for claim in back["claims"]:
            assert claim["verdict"] in ("supported", "not supported", "reversed", "inconclusive")
            assert claim["why"].endswith(".")


def test_findings_tell_of_the_toy_what_is_known(run: Run):
    claims = {claim.id: claim for claim in run.numbers.claims}
    assert claims["C1"].verdict == "supported"  # the four planted neurons are all that places have
    assert claims["C3a"].verdict == "reversed"  # and no random four of 256 are
    assert claims["C4"].effect is not None


@pytest.mark.parametrize("table", TABLES)
def test_tables_have_a_cell_for_every_column(run: Run, bare: Run, table):
    for each in (run, bare):
        header, rows = getattr(tables, table)(each)
        assert all(len(row) == len(header) for row in rows)
        assert all(isinstance(cell, str) for row in [header, *rows] for cell in row)
        assert "nan" not in " ".join(cell for row in rows for cell in row)
    assert getattr(tables, table)(run)[1]


def test_claims_table_has_a_row_for_each(run: Run):
    header, rows = tables.claims_rows(run.numbers.claims)
    assert len(rows) == 12
    assert {len(row) for row in rows} == {len(header)}
    assert [row[0] for row in rows][:3] == ["C1", "C2", "C3a"]
    assert rows[0][header.index("verdict")] == "supported"
    assert "[" in rows[0][header.index("effect")]


def test_tables_of_what_was_not_measured_are_empty(bare: Run):
    assert tables.attribution_rows(bare)[1] == []
    assert tables.similarity_rows(bare)[1] == []
    assert tables.agreement_rows(bare)[1] == []


def test_findings_of_what_was_not_measured_are_empty(bare: Run):
    found = findings(bare)
    assert found["attribution"] == found["meaning"] == found["scores_agreement"] == found["probe_quality"] == {}
    assert all(each == {} for arms in found["similarity"].values() for each in arms)
    assert all(lines == [] for lines in found["heirs"].values())
    assert "attribution" not in found["migration"]
    claims = {claim["id"]: claim for claim in found["claims"]}
    assert "measure.shuffles" in claims["C4"]["why"]
    assert "no random arm" in claims["C8"]["why"]


def test_attribution_table_names_base_once(run: Run):
    header, rows = tables.attribution_rows(run)
    assert header[2:6] == list(run.arms["concept"][0].site.layers)
    assert [row[:2] for row in rows] == [["all arms", "base"], ["concept", "8"], ["random", "8"]]
    for row in rows:
        assert sum(map(float, row[2:6])) == pytest.approx(1, abs=0.002)
    assert float(rows[0][3]) > 0.8  # block 1 has the planted neurons
    assert rows[0][-1] == "no cut set"  # hidden units of MLPs are by-passed


def test_attribution_is_told_by_arm_seed_and_stage(run: Run, found):
    told = found["attribution"]
    assert set(told) == {"concept", "random"}
    assert [list(each) for each in told["concept"]] == [["base", "8"]] * 2
    entry = told["concept"][0]["base"]
    assert (entry["form"], entry["unit"], entry["n_words"] > 0) == ("conductance", "logit per word", True)
    assert sum(entry["layer_share"]) == pytest.approx(1)
    assert entry["delta_is_error"] is False


def test_agreement_is_with_every_other_score(run: Run, found):
    told = found["scores_agreement"]
    assert set(told) == {"dprime", "elastic_net", "conductance"}
    assert all(-1 <= value <= 1 for value in told.values())
    header, rows = tables.agreement_rows(run)
    assert header[1] == "Spearman with probeless"
    assert [row[0] for row in rows] == list(told)
    assert "AUROC" in dict(zip([row[0] for row in rows], [row[2] for row in rows], strict=True))["elastic_net"]
    assert found["probe_quality"]["elastic_net"]["held_out"] > 0.9


def test_agreement_with_a_score_that_is_the_same_everywhere_is_left_open(run: Run):
    def flat(arm: Trajectory) -> Trajectory:
        base = arm["base"]
        also = {"dprime": replace(base.also["dprime"], score=torch.ones_like(base.saliency.score))}
        return replace(arm, snapshots={**arm.snapshots, "base": replace(base, also=also, attributions={})})

    odd = replace(run, arms={name: [flat(arm) for arm in arms] for name, arms in run.arms.items()})
    assert math.isnan(odd.numbers.agreement["dprime"])
    assert as_json(findings(odd))["scores_agreement"] == {"dprime": None}
    assert tables.agreement_rows(odd)[1][0][1] == ""


def test_speeds_are_told_for_every_arm(run: Run, bare: Run, found):
    assert set(found["recovery_speed"]) == set(run.arms)
    reached = found["recovery_speed"]["concept"]["reached"]
    assert list(reached) == ["0.5", "0.9", "0.95", "0.99"]
    assert 0 <= reached["0.5"]["seeds"] <= 2
    header, rows = tables.speed_rows(bare)
    assert [row[0] for row in rows] == ["concept", "never"]  # from the unpruned arm nothing has to come back
    assert header[1] == "epochs to 50%"


def test_savings_need_a_model_that_never_had_the_concept(bare: Run, found):
    assert found["savings"] is None
    told = as_json(findings(bare)["savings"])
    assert list(told["saved"]) == ["0.5", "0.9", "0.95", "0.99"]
    assert math.isfinite(told["area"]["value"])


def test_similarity_is_of_base_and_last_stage(run: Run, found):
    told = found["similarity"]["concept"][0]
    assert set(told) == {"all", "concept"}
    layers = len(run.arms["concept"][0].site.layers)
    assert len(told["all"]["cka"]) == len(told["all"]["flow"]) == layers
    _, rows = tables.similarity_rows(run)
    assert len(rows) == 2 * 2 * 3  # arms, words, measures


def test_meaning_is_told_at_both_ends(found):
    told = found["meaning"]["concept"][0]
    assert list(told) == ["base", "8"]
    assert told["base"]["similarity_by_layer"] is None  # there is nothing before base to be similar to
    assert len(told["8"]["similarity_by_layer"]) == 4


def test_heirs_are_lines_of_old_and_new_words(run: Run, found):
    assert set(found["heirs"]) == set(run.arms)
    lines = [line for lines in found["heirs"].values() for line in lines]
    assert lines
    assert all(line.startswith("L") and ": " in line and " → " in line for line in lines)
    assert all(len(lines) <= 8 for lines in found["heirs"].values())


def test_migration_is_told_for_every_selection_and_for_attribution(found):
    told = found["migration"]
    assert list(told) == ["matched", "all", "published", "attribution"]
    assert all(each["says"].endswith(".") for each in told.values())
    assert "not evidence" in told["published"]["says"]
    assert told["attribution"]["score"] == "conductance"


def test_run_without_a_concept_arm_has_no_claims(run: Run):
    alone = replace(run, arms={"random": run.arms["random"]})
    told = as_json(findings(alone))
    assert (told["claims"], told["migration"], told["savings"]) == ([], {}, None)


def signed(arm: Trajectory) -> Trajectory:
    """A score with values below 0."""
    return replace(
        arm,
        snapshots={
            stage: replace(s, saliency=replace(s.saliency, kind="difference", score=s.saliency.score - 0.5))
            for stage, s in arm.snapshots.items()
        },
    )


def test_findings_of_a_score_with_a_sign(run: Run):
    odd = replace(run, arms={name: [signed(arm) for arm in arms] for name, arms in run.arms.items()})
    told = as_json(findings(odd))
    assert list(told["migration"]["matched"]) == ["says"]
    assert "Not measured: layer shares need scores of at least 0" in told["migration"]["matched"]["says"]
    assert "to" in told["migration"]["attribution"]  # has no sign any more
    assert "below 0" in {claim["id"]: claim["why"] for claim in told["claims"]}["C5 matched"]


def test_findings_of_a_real_run_by_a_score_with_a_sign():
    what = {"score": "difference", "measure.what": [], "arms": ["concept", "random"]}
    told = as_json(findings(store.run(settings_of("toy", SMALL | what))))
    assert "Not measured" in told["migration"]["matched"]["says"]


def test_findings_where_no_neuron_survived(run: Run):
    def everything(arm: Trajectory) -> Trajectory:
        return replace(arm, removed=Neurons(torch.ones_like(arm.survivors().mask), arm.site))

    odd = replace(run, arms={name: [everything(arm) for arm in arms] for name, arms in run.arms.items()})
    told = as_json(findings(odd))
    assert "no neuron survived in both arms" in told["migration"]["matched"]["says"]
    assert told["heirs"] == {"concept": [], "random": []}


def test_intervals_of_the_migration_have_the_level_of_the_run(run: Run):
    """Three seeds, made of two: only then there is an interval."""
    again = replace(run, arms={name: [*arms, replace(arms[0], seed=2)] for name, arms in run.arms.items()})
    wide, narrow = (
        replace(
            again,
            experiment=run.experiment.model_copy(
                update={"measure": run.experiment.measure.model_copy(update={"level": level})}
            ),
        )
        .numbers.migrations["matched"]
        .moved.gap  # pyright: ignore[reportAttributeAccessIssue]
        for level in (0.99, 0.6)
    )
    assert wide is not None
    assert narrow is not None
    assert wide.value == narrow.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) > 0


def test_every_attribution_that_was_measured_is_told(run: Run):
    def both(arm: Trajectory) -> Trajectory:
        snapshots = {
            stage: s
            if s.attribution is None
            else replace(s, attributions={**s.attributions, "layer_ig": replace(s.attribution, form="layer")})
            for stage, s in arm.snapshots.items()
        }
        return replace(arm, snapshots=snapshots)

    odd = replace(run, arms={name: [both(arm) for arm in arms] for name, arms in run.arms.items()})
    told = as_json(findings(odd))
    (base, *_) = told["attribution"]["concept"]
    assert [base["base"]["form"], *(each["form"] for each in base["base"]["also"])] == ["conductance", "layer"]
    assert "layer_ig" in told["scores_agreement"]
    arms = {row[0] for row in tables.attribution_rows(odd)[1]}
    assert {"all arms, conductance", "all arms, layer_ig"} <= arms
    assert not any("," in row[0] for row in tables.attribution_rows(run)[1])
