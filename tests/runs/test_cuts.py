"""How large a cut is and which neurons are in it: the smallest dose that takes the concept and leaves the others."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from relearn_lens.measure.evaluation import SpanScores
from relearn_lens.models import toy
from relearn_lens.neurons.sites import Neurons
from relearn_lens.runs import cuts
from relearn_lens.runs.cuts import draw_seed, sets_of, size
from relearn_lens.runs.events import Base, Dose, Prepared, Sized
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.protocol import choose
from tests.analysis.test_story import scores_of
from tests.fixtures import Untouched
from tests.made import tiny


@pytest.fixture(scope="module")
def started() -> tuple[Prepared, Base]:
    """A prepared run and its base model."""
    events = perform(tiny(measure__what=[], measure__shuffles=0))
    ready, base = next(events), next(event for event in events if isinstance(event, Base))
    assert isinstance(ready, Prepared)
    return ready, base


def asking(ready: Prepared, **prune: Any) -> Prepared:
    """The same run with other settings of the cut."""
    how = ready.experiment
    return replace(ready, experiment=how.model_copy(update={"prune": how.prune.model_copy(update=prune)}))


@pytest.fixture
def scripted(monkeypatch):
    """Let the base model and each dose of the concept in turn have these scores; all other cuts change nothing."""

    def script(*scores: SpanScores) -> None:
        left: Iterator[SpanScores] = iter(scores)
        cut: list[Neurons] = []

        def measured(ready: Prepared, *, on: object) -> SpanScores:
            assert on is ready.validation
            return next(left) if not cut or cut[-1] == concept[-1] else scores[0]

        concept: list[Neurons] = []

        def chosen(ready: Prepared, snapshot: Any, fraction: float) -> dict[str, Neurons]:
            sets = sets_of(ready, snapshot, fraction)
            concept.append(sets["concept"])
            return sets

        class Without:
            def __init__(self, ready: Prepared, base: Base, neurons: Neurons, states: object) -> None:
                cut.append(neurons)

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(cuts, "_scores", measured)
        monkeypatch.setattr(cuts, "sets_of", chosen)
        monkeypatch.setattr(cuts, "_without", Without)

    return script


BEFORE = scores_of(0.9, person=0.9)
GRID = (0.1, 0.02, 0.05)


def test_the_smallest_dose_that_takes_the_concept_is_chosen(started, scripted):
    ready, base = started
    scripted(BEFORE, scores_of(0.5), scores_of(0.05), scores_of(0.0))
    sized = size(asking(ready, fraction="auto", grid=GRID), base, whole=False)
    assert (sized.seed, sized.fraction, sized.base) == (0, 0.05, BEFORE)
    # Doses end at the first that will do.
    assert [(dose.fraction, dose.cut, dose.scores.shown("place")) for dose in sized.doses] == [
        (0.02, "concept", 0.5), (0.05, "concept", 0.05),
    ]  # fmt: skip


def test_the_first_seed_shows_the_whole_curve_beside_another_label_and_random_sets(started, scripted):
    ready, base = started
    scripted(BEFORE, scores_of(0.5), scores_of(0.05), scores_of(0.0))
    sized = size(asking(ready, fraction="auto", grid=GRID), base, whole=True)
    assert sized.fraction == 0.05
    kinds = ("concept", "other", "random")
    assert [(dose.fraction, dose.cut) for dose in sized.doses] == [(f, cut) for f in sorted(GRID) for cut in kinds]


def test_a_dose_that_takes_bystanders_too_is_passed_over(started, scripted):
    ready, base = started
    scripted(BEFORE, scores_of(0.0, person=0.5), scores_of(0.0, person=0.7), scores_of(0.0, person=0.88))
    assert size(asking(ready, fraction="auto", grid=GRID), base, whole=False).fraction == 0.1
    scripted(BEFORE, scores_of(0.0, person=0.5), scores_of(0.0, person=0.7))
    assert size(asking(ready, fraction="auto", grid=GRID, spared=0.7), base, whole=False).fraction == 0.05


def test_what_bystanders_keep_is_judged_at_the_lower_end_of_its_interval(started):
    ready, _ = started
    before, sure = scores_of(0.9, person=0.9, n=60), scores_of(0.0, person=0.8, n=60)
    noisy = scores_of(0.0, person=0.8, n=60, noise=3)  # each sentence right or wrong
    assert cuts.takes(ready, before, sure)
    share = cuts.kept_share(before, noisy, ("person",), **cuts.interval_of(ready))
    assert share.low < 0.85 < share.value
    assert not cuts.takes(ready, before, noisy)


def test_a_dose_that_leaves_some_of_the_concept_does_not_do(started):
    ready, _ = started
    assert not cuts.takes(ready, BEFORE, scores_of(0.1))
    assert cuts.takes(ready, BEFORE, scores_of(0.08))
    assert cuts.takes(asking(ready, gone=0.2), BEFORE, scores_of(0.1))


def test_labels_with_few_spans_are_no_bystanders():
    few = scores_of(0.5)
    counts = few.counts.copy()
    counts[:, few.labels.index("person")] = 1  # 20 spans
    assert cuts.bystanders(few, ("place",)) == ("person",)
    assert cuts.bystanders(replace(few, counts=counts), ("place",)) == ()


def test_no_dose_that_will_do_is_refused_with_what_each_did(started, scripted):
    ready, base = started
    scripted(BEFORE, scores_of(0.6), scores_of(0.5), scores_of(0.0, person=0.2))
    with pytest.raises(
        ValueError,
        match=re.escape(
            "prune.fraction = 'auto': no cut of seed 0 takes 'place' (below 0.1 of its 0.90, others 0.90) and leaves "
            "the other labels (0.85 of theirs, at the lower end of the interval). F1 by fraction cut: 0.02: 0.60, "
            "others 0.90; 0.05: 0.50, others 0.90; 0.1: 0.00, others 0.20. Choose a size by --set prune.fraction=0.1"
        ),
    ):
        size(asking(ready, fraction="auto", grid=GRID), base, whole=True)


def test_where_no_dose_takes_it_whole_the_one_that_takes_most_and_leaves_the_others_is_taken(started, scripted):
    ready, base = started
    scripted(BEFORE, scores_of(0.6), scores_of(0.2), scores_of(0.15, person=0.2))
    sized = size(asking(ready, fraction="auto", grid=GRID), base, whole=False)
    assert sized.fraction == 0.05
    assert len(sized.doses) == 3
    scripted(BEFORE, scores_of(0.0, person=0.2), scores_of(0.0, person=0.2), scores_of(0.0, person=0.2))
    with pytest.raises(ValueError, match="no cut of seed 0 takes"):
        size(asking(ready, fraction="auto", grid=GRID), base, whole=False)


def test_a_size_that_is_set_is_taken_as_it_is(started, monkeypatch):
    ready, base = started
    monkeypatch.setattr(cuts, "_scores", lambda *_, **__: pytest.fail("something was measured"))
    assert size(asking(ready, fraction=0.25), base, whole=True) == Sized(0, 0.25, None, ())


def test_the_toys_dose_is_its_planted_neurons(started, untouched: Untouched):
    ready, base = started
    asked = asking(ready, fraction="auto", grid=(1 / 256, 4 / 256, 0.1))
    ready.model.load_weights(base.weights)
    with untouched(ready.model):
        sized = size(asked, base, whole=True)
    assert sized.fraction == 4 / 256
    by_cut = {dose.cut: dose for dose in sized.doses if dose.fraction == 4 / 256}
    assert all(isinstance(dose, Dose) for dose in sized.doses)
    assert by_cut["concept"].scores.shown("place") < 0.1 < 0.9 < by_cut["concept"].scores.shown("person")
    assert by_cut["other"].scores.shown("person") < 0.1 < 0.9 < by_cut["other"].scores.shown("place")
    assert min(by_cut["random"].scores.shown(label) for label in ("place", "person")) > 0.9


# --- which neurons


def test_neurons_that_both_labels_want_go_to_neither(started, monkeypatch):
    ready, base = started
    own = base.snapshot.saliency
    wanted = Neurons.of(own.site, [toy.PLANTED[0], *toy.PERSON_NEURONS[:3]])  # one is the concept's too
    monkeypatch.setattr(cuts, "saliency_of", lambda *_: replace(own, score=wanted.mask.float()))
    sets = sets_of(ready, base.snapshot, 4 / 256)
    assert {(n.layer, n.index) for n in sets["concept"]} == set(toy.PLANTED[1:])
    assert {(n.layer, n.index) for n in sets["other"]} == set(toy.PERSON_NEURONS[:3])


def test_where_both_labels_want_the_same_neurons_both_have_them(started, monkeypatch):
    ready, base = started
    monkeypatch.setattr(cuts, "saliency_of", lambda *_: base.snapshot.saliency)
    sets = sets_of(ready, base.snapshot, 4 / 256)
    assert sets["concept"] == sets["other"] == choose(base.snapshot.saliency, 4 / 256)


def test_without_another_label_there_is_no_other_set(started):
    ready, base = started
    assert set(cuts.cuts_of(replace(ready, other=None), base, 0.1)) == {"concept", "random"}


def test_draws_of_one_seed_are_none_of_another():
    seeds = [draw_seed(seed, draw) for seed in range(50) for draw in range(100)]
    assert len(set(seeds)) == len(seeds)
