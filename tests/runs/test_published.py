"""The paper's numbers as they were released, and comparisons worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from relearn_lens.measure.tracking import Trajectory
from relearn_lens.runs.events import Sized
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.protocol import choose, placed
from relearn_lens.runs.published import RELEASE, Row, compare, comparison_tables, nearest, survivors
from relearn_lens.runs.results import Run
from tests.analysis.test_story import scores_of, trajectory

STAGES = ("base", "pruned", "2", "4", "6", "8")
F1: dict[str, float] = dict(zip(STAGES, (0.9, 0.1, 0.5, 0.6, 0.7, 0.8), strict=True))
WIDTH = 200


def run_of(
    layers: int = 7, stages: tuple[str, ...] = STAGES, embedding: str = "own", **settings: Any
) -> tuple[Run, Trajectory]:
    """A run without a model: scores that rise with depth at base and fall with it at the end."""
    rising = torch.arange(layers * WIDTH, dtype=torch.float32).view(layers, WIDTH)
    score = {stage: rising.flip(0) if stage == "8" else rising for stage in stages}
    made = settings_of(
        "lo2024", {"prune.embedding": embedding, **{key.replace("__", "."): value for key, value in settings.items()}}
    )
    arm = trajectory({stage: F1[stage] for stage in stages}, score)
    assert made.prune.fraction != "auto"
    pruned = placed(choose(arm["base"].saliency, made.prune.fraction), embedding)
    arm = replace(arm, removed=pruned)
    return Run(made, {"concept": [arm]}, sized=[Sized(0, made.prune.fraction, None)]), arm


def numbers(run: Run, what: str, stage: str) -> list[float | None]:
    return [row.run for row in compare(run).rows if (row.what, row.stage) == (what, stage)]


def test_release_is_whole_and_its_layers_add_up():
    assert RELEASE.n_neurons == 7 * 768
    for variant in RELEASE.variants:
        assert len(variant.f1) == 2 + len(RELEASE.epochs)
        assert all(0 < f1 < 1 for f1 in variant.f1)
    for values in (*RELEASE.mean_rank_saliency.values(), *RELEASE.percentile.values(), RELEASE.spearman):
        assert len(values) == len(RELEASE.layers) == 7
    for shares in (RELEASE.share_base, RELEASE.share_all, RELEASE.share_survivors):
        assert sum(shares) == pytest.approx(100, abs=0.2)
    # Ranks of all neurons average 0.5; those after retraining do not, so some neurons were left out.
    means = {stage: sum(values) / 7 for stage, values in RELEASE.mean_rank_saliency.items()}
    assert means.pop("base") == pytest.approx(0.5, abs=0.002)
    assert min(means.values()) > 0.54


@pytest.mark.parametrize(
    ("score", "fraction", "name"),
    [
        ("probeless", 0.5, "probeless, top 2,688"), ("probeless", 0.558, "probeless, top 3,000"),
        ("dprime", 0.1, "probeless, top 2,688"), ("elastic_net", 0.9, "linear probe, top 2,688"),
    ],
)  # fmt: skip
def test_nearest_is_by_kind_of_score_and_share(score, fraction, name):
    assert nearest(settings_of("lo2024", {"score": score, "prune.fraction": fraction})).name == name


@pytest.mark.parametrize(
    ("run", "release", "difference"),
    [
        (0.5, 0.4, 0.1), (None, 0.4, None), (0.5, None, None), (0.1, (-0.14, 0.19), 0.0),
        (0.29, (-0.14, 0.19), 0.1), (-0.2, (-0.14, 0.19), -0.06),
    ],
)  # fmt: skip
def test_difference_is_run_less_release_and_0_within_a_range(run, release, difference):
    found = Row("x", "base", "", run, release).difference
    assert found == (None if difference is None else pytest.approx(difference))


def test_f1_is_beside_the_nearest_run():
    run, _ = run_of()
    found = compare(run)
    f1 = [row for row in found.rows if row.what == "F1, overall"]
    assert [row.stage for row in f1] == list(STAGES)
    want = [scores_of(value).value("overall") for value in F1.values()]
    assert [row.run for row in f1] == pytest.approx(want)
    assert f1[0].release == 0.9382
    assert f1[0].difference == pytest.approx(want[0] - 0.9382)


def test_stages_and_labels_that_the_run_lacks_are_marked():
    run, _ = run_of(stages=("base", "pruned", "2"))
    f1 = [row for row in compare(run).rows if row.what == "F1, overall"]
    assert [row.run is None for row in f1] == [False, False, False, True, True, True]
    assert numbers(run, "F1 after pruning", "pruned") == [None] * 4  # its labels are person and place
    assert comparison_tables(compare(run))[0][2][0][-1] == "-"


def test_layer_numbers_by_hand():
    run, _ = run_of()
    # 1,400 neurons, 14 buckets of 100, 2 in each layer: s = 13/13, 12/13, ... from the last layer on.
    base = [(2 * layer + 0.5) / 13 for layer in range(7)]
    assert numbers(run, "mean rank saliency, all neurons", "base") == pytest.approx(base)
    assert numbers(run, "% of all s > 0.5, all neurons", "base") == pytest.approx(
        [0, 0, 0, *[100 / 7] * 1, *[200 / 7] * 3]
    )
    # Half is pruned: the embedding, 0, 1 and half of 2 survive, ranked among all as in the release; at the
    # end the layers' order is reversed.
    alone = "mean rank saliency among all, survivors"
    assert numbers(run, alone, "2") == pytest.approx([0.5 / 13, 2.5 / 13, 4.5 / 13, 6 / 13, *[None] * 3])
    assert numbers(run, alone, "8")[:4] == pytest.approx([12.5 / 13, 10.5 / 13, 8.5 / 13, 6 / 13])
    assert numbers(run, "rank correlation of survivors, base to 8", "8")[:4] == pytest.approx([1.0] * 4)
    percentile = numbers(run, "percentile of survivors", "base")
    assert percentile[0] == pytest.approx(99.5 / 699, abs=1e-4)
    # The run's own buckets change nothing.
    coarse, arm = run_of()
    for snapshot in arm.snapshots.values():
        object.__setattr__(snapshot.saliency, "bucket", 700)
    assert numbers(coarse, "percentile of survivors", "base") == percentile


def test_null_neurons_are_left_out_of_later_means():
    run, arm = run_of()
    what = "mean rank saliency, all neurons but null ones"
    assert numbers(run, what, "8") == [None] * 7  # class statistics of zeros: every neuron is dead
    stats = arm["8"].stats
    object.__setattr__(arm["8"], "stats", replace(stats, m2=torch.ones_like(stats.m2)))
    assert numbers(run, what, "8") == pytest.approx([(12.5 - 2 * layer) / 13 for layer in range(7)])


def test_survivors_are_those_that_were_not_chosen():
    run, arm = run_of(7, STAGES, "last_block", prune__fraction=1 / 14)  # half of the last layer
    assert survivors(arm, run.experiment) == ~choose(arm["base"].saliency, 1 / 14)
    least = replace(arm, removed=placed(choose(arm["base"].saliency, 1 / 14, "least"), "last_block"))
    assert survivors(least, run.experiment).per_layer()["embed"] == 100
    assert least.survivors().per_layer()["embed"] == WIDTH


def test_other_layers_leave_layer_numbers_out():
    run, _ = run_of(layers=4)
    found = compare(run)
    assert any(why.startswith("the layers are embed, 0, 1, 2, there") for why in found.differs)
    assert all(row.run is None for row in found.rows if row.at in RELEASE.layers)


def test_same_settings_are_called_comparable_and_others_not():
    run, _ = run_of(protocol="published", probe_corpus="conll:concepts")
    own = settings_of("lo2024", {"protocol": "published", "probe_corpus": "conll:concepts"})
    run.experiment = own
    assert compare(run).differs == ()
    assert "not comparable" not in str(compare(run))
    run.experiment = settings_of("lo2024", {"corpus": "conll:g.conll", "model": "x/gpt2"})
    run.sized = [Sized(0, 0.3, None)]
    said = str(compare(run))
    for why in (
        "These numbers are not comparable", "the model is gpt2, there distilbert-base-cased",
        "the corpus is conll:g.conll, there CoNLL-2003", "30.0% of the neurons are pruned, there 50.0%",
        "prune.sever is auto, there gain", "saliency is measured on the task's own text",
    ):  # fmt: skip
        assert why in said


def test_run_without_a_concept_arm_is_refused():
    run, arm = run_of()
    with pytest.raises(ValueError, match=r"has the arms random; run it with the arm concept"):
        compare(Run(run.experiment, {"random": [arm]}))


def test_run_of_a_language_model_is_refused():
    run, arm = run_of()
    object.__setattr__(arm["base"], "scores", type("Loss", (), {"metric": "loss"})())
    with pytest.raises(ValueError, match="this run measured loss; compare a run of a tagger"):
        compare(run)


def test_plain_values_hold_every_row_with_its_difference():
    run, _ = run_of()
    found = compare(run)
    plain = found.to_dict()
    assert len(plain["rows"]) == len(found.rows)
    assert plain["rows"][0]["difference"] == found.rows[0].difference
    assert "arXiv 2401.01814" in plain["source"]
    assert all(len(row) == len(header) for _, header, rows in comparison_tables(found) for row in rows)
