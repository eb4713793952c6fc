"""What is found again in a retrained model: never a neuron that the cut still holds off, and those that grew back."""

from typing import Any

import pytest

from relearn_lens.runs.events import Again, Blocked, Cuts, Measured
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.presets import settings_of
from tests.runs.test_damage import first

TINY = {
    "data.train_sentences": 64, "data.validation_sentences": 40, "data.probe_sentences": 40, "seeds": (0,),
    "prune.control_draws": 2, "prune.fraction": 4 / 256, "finetune.epochs": 0.5, "finetune.lr": 1e-5,
    "finetune.batch_size": 8, "retrain.steps": (1, 4, 10), "retrain.batch_size": 8, "measure.draws": 100,
    "measure.what": (), "measure.shuffles": 0, "arms": ("concept",), "block.held": ("heirs",), "grafts.bands": 1,
    "grafts.within": "none",
}  # fmt: skip


def found_again(lr: float) -> tuple[Any, ...]:
    """The first cut, what was found after retraining so fast, the last snapshot, and the retraining with heirs held."""
    events = list(perform(settings_of("toy", TINY | {"retrain.lr": lr})))
    cuts, again = first(Cuts, events), first(Again, events)
    last = [event for event in events if isinstance(event, Measured)][-1].snapshot
    return cuts.sets["concept"], again.rounds[0], last, [event for event in events if isinstance(event, Blocked)]


def test_what_is_still_cut_off_is_not_found_again_though_it_is_as_salient_as_before():
    old, again, last, blocked = found_again(1e-9)
    assert last.saliency.top(len(old)) == old  # hidden units: nothing reads them, and they answer as they did
    assert not len(again.neurons & old)
    assert len(again.neurons) == len(old)
    assert (again.share_old, again.share_by_chance) == (0, 0)
    assert [each.held for each in blocked] == ["heirs"]


def test_what_has_grown_back_is_found_again():
    old, again, _, blocked = found_again(3e-3)
    assert again.neurons == old
    assert again.share_old == 1
    assert again.share_by_chance == pytest.approx(len(old) / 64 / 1, abs=0.1)
    assert [each.held for each in blocked] == ["heirs"]  # others than those of the cut
