"""What cuts do to the base model: random sets are of the kind that they are called by, whatever the random arm is."""

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from relearn_lens.measure.evaluation import evaluate
from relearn_lens.neurons.sites import random_neurons
from relearn_lens.remove.ablation import ablated
from relearn_lens.runs.cuts import KINDS, draw_seed
from relearn_lens.runs.events import Base, Cuts, Damage, Event, Prepared
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.protocol import control_of
from relearn_lens.runs.results import Run

TINY = {
    "data.train_sentences": 64, "data.validation_sentences": 40, "data.probe_sentences": 40, "seeds": (0,),
    "prune.control_draws": 3, "prune.fraction": 0.25, "finetune.epochs": 0.5, "finetune.lr": 1e-5,
    "finetune.batch_size": 8, "retrain.steps": (1, 2), "retrain.lr": 3e-3, "retrain.batch_size": 8,
    "measure.draws": 100, "measure.what": (), "measure.shuffles": 0, "arms": ("concept", "random"), "grafts.skip": True,
}  # fmt: skip


T = TypeVar("T")


def first(kind: type[T], events: Iterable[Event]) -> T:
    """The first event of a kind."""
    return next(event for event in events if isinstance(event, kind))


def run_of(**changes: Any) -> tuple[list[Event], Run]:
    """The events of a run, and the run."""
    how = settings_of("toy", TINY | {key.replace("__", "."): value for key, value in changes.items()})
    events, run = list(perform(how)), Run(how)
    for event in events:
        run.take(event)
    return events, run


@pytest.mark.parametrize("control", ["uniform", "first"])
def test_damage_sets_are_of_the_kinds_that_they_say_whatever_the_random_arms_control(control):
    events, run = run_of(prune__control=control)
    ready, base = first(Prepared, events), first(Base, events)
    cuts, damage = first(Cuts, events), first(Damage, events)
    concept, arm = cuts.sets["concept"], cuts.sets["random"]
    assert arm == control_of(concept, control, seed=draw_seed(0, 0))
    assert arm.mask.sum(1).tolist() != concept.mask.sum(1).tolist()  # so it is no set of any of the kinds
    assert tuple(damage.random) == KINDS
    assert [len(each) for each in damage.random.values()] == [3, 3, 3]
    ready.model.load_weights(base.weights)
    for kind, apart in (("layers", None), ("disjoint", concept)):
        for k, scores in enumerate(damage.random[kind]):
            drawn = random_neurons(like=concept, seed=draw_seed(0, 1 + k), apart=apart)
            assert drawn.mask.sum(1).tolist() == concept.mask.sum(1).tolist()
            with ablated(ready.model, drawn):
                again = evaluate(ready.model, ready.scored)
            assert (scores.counts == again.counts).all()
            assert damage.overlap[kind][k] == len(drawn & concept) / len(concept)
    # the claims take the exchangeable kind, and the random arm's set is not counted with it
    base_f1 = run.arms["concept"][0]["base"].scores.value("place")
    lost = [1 - scores.value("place") / base_f1 for scores in damage.random["layers"]]
    claims = {claim.id: claim for claim in run.numbers.claims}
    for id in ("C1", "C3a"):
        assert claims[id].control == pytest.approx(sum(lost) / 3)
        assert claims[id].control_is == "random sets of the same size per layer"
