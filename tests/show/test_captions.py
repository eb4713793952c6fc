"""What is said of a run: the numbers are those of the run, and a control that shows the same is said to."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from relearn_lens.analysis import story
from relearn_lens.analysis.claims import Claim
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.runs.results import Run
from relearn_lens.show import captions
from tests.show.test_plots import losing, rich, run_of

ALL = [
    captions.pruned_share,
    captions.recovery,
    captions.layer_map,
    captions.neuron_map,
    captions.migrated,
    captions.attribution,
    captions.flow,
    captions.saliency_against_similarity,
]


@pytest.fixture(scope="module")
def run() -> Run:
    return rich(run_of("concept", "random", "unpruned", seeds=3, width=12))


@pytest.mark.parametrize("say", ALL, ids=lambda say: say.__name__)
@pytest.mark.parametrize("arms", [("concept", "random", "unpruned"), ("concept",), ("concept", "random")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_captions_are_two_sentences_of_any_run(say, arms, seeds):
    text = say(rich(run_of(*arms, seeds=seeds, width=12)))
    assert len(re.findall(r"[.!](?= [A-Z]|$)", text)) >= 2
    assert text.endswith(".")
    assert "nan" not in text
    if len(arms) == 1:
        assert re.search(r"no (random|control) arm|no control|without a control", text)


def test_recovery_gives_the_numbers_and_the_gap(run):
    text = captions.recovery(run)
    for arm in ("concept", "random", "unpruned"):
        for stage in ("pruned", "2"):
            assert f"{np.mean([a[stage].scores.value('place') for a in run.arms[arm]]):.2f}" in text
    gap = story.gap_at(run.arms["concept"], run.arms["random"], run.label, "2", **run.interval)
    assert f"({gap}, over {gap.over})" in text
    assert ("do not differ beyond noise" in text) == (not gap.excludes(0))


def test_recovery_of_one_seed_says_what_that_cannot_tell():
    text = captions.recovery(run_of("concept", "random"))
    assert "over 30 sentences; another training seed may differ as much" in text


def test_recovery_of_a_loss_speaks_of_loss():
    run = losing(run_of("concept", "random"))
    text = captions.recovery(run)
    assert "the loss of 'place' was" in text
    assert f"{run.arms['concept'][0]['pruned'].scores.shown('place'):.2f} after pruning" in text
    assert "F1" not in text


def test_pruned_share_compares_the_cuts(run):
    text = captions.pruned_share(run)
    assert text.startswith("33% of all neurons were pruned, from 0% of layer embed to 100% of layer 1.")
    assert "took other numbers from the layers" in text
    shared = np.mean(
        [
            len(c.removed & r.removed) / len(r.removed)
            for c, r in zip(run.arms["concept"], run.arms["random"], strict=True)
        ]
    )
    assert f"shares {shared:.0%} of its neurons" in text
    assert captions.pruned_share(run_of("unpruned")).startswith("The unpruned arm pruned nothing.")


def moved(size: float) -> list[torch.Tensor]:
    """Scores before and after: the first layer's neurons are lowest, then rise by a share of the ranking."""
    before = torch.arange(12.0).view(3, 4)
    after = before.clone()
    after[0] += size
    return [before, after]


@pytest.mark.parametrize(
    ("random", "said"),
    [(100.0, "at least half as much in the random arm, so it is not specific"), (0.0, "so it is a description")],
)
def test_layer_map_says_whether_a_control_shows_the_same(random, said):
    run = run_of("concept", "random")
    for name, size in (("concept", 100.0), ("random", random)):
        (arm,) = run.arms[name]
        scores: dict[str, torch.Tensor] = dict(zip(("base", "2"), moved(size), strict=True))
        run.arms[name] = [
            replace(
                arm,
                removed=None,
                snapshots={
                    k: replace(s, saliency=replace(s.saliency, score=scores.get(k, scores["base"])))
                    for k, s in arm.snapshots.items()
                },
            )
        ]
    text = captions.layer_map(run)
    assert "changed most in layer embed, by +0.73" in text
    assert said in text


def test_neuron_map_counts_who_left_the_top(run):
    text = captions.neuron_map(run)
    left = []
    for arm in run.arms["concept"]:
        kept = arm.survivors().mask
        k = round(0.1 * int(kept.sum()))
        tops = [
            set(arm[s].saliency.score.masked_fill(~kept, -1).flatten().topk(k).indices.tolist()) for s in ("base", "2")
        ]
        left.append(1 - len(tops[0] & tops[1]) / k)
    assert f"{np.mean(left):.0%} are no longer in it at the last stage of the concept arm" in text
    assert "in the random arm and" in text


def test_migrated_tells_the_matched_comparison_first(run):
    moved = run.numbers.migrations
    text = captions.migrated(run)
    assert text == f"{moved['matched']} {moved['published']}"
    assert "pruning alone makes such a move" in text


def test_flow_gives_the_share_that_stayed(run):
    text = captions.flow(run)
    for name, arms in run.arms.items():
        flow = np.mean([arm.similarity["all"].flow.numpy() for arm in arms], axis=0)
        assert f"{np.nanmean(np.diag(flow)):.0%}" in text, name


def claim(id: str, verdict, control: float | None = None, bar: float = 0.5) -> Claim:
    return Claim(id, "says", Estimate(1.0, 0.9, 1.1, "3 seeds"), "share", bar, verdict, "why", 1.0, control)


def test_verdicts_count_and_say_where_the_control_shows_the_same():
    found = [claim("C1", "supported", 0.9), claim("C2", "not supported"), claim("C4", "supported", 0.1, 0.05)]
    text = captions.verdicts(found, 3)
    assert text.startswith("Of 3 claims in this run: 2 supported, 1 not supported.")
    assert "C1 is supported as published, and its control shows the same." in text
    few = captions.verdicts([claim("C1", "supported", 0.1), claim("C3b", "inconclusive")], 1)
    assert "With 1 training seed nothing that compares trained arms has an interval" in few
    assert "its control shows the same" not in few
