"""Which sentences are drawn, and those as they come beside them."""

from dataclasses import replace

import numpy as np
import pytest

from relearn_lens.measure.evaluation import evaluate
from relearn_lens.measure.tracking import BASE
from relearn_lens.runs.events import Base, Damage, Prepared
from relearn_lens.runs.preparation import prepare
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.summary import summary
from tests.runs.test_damage import TINY, first, run_of


@pytest.mark.parametrize("on", ["probe", "validation"])
def test_natural_sentences_come_from_the_part_that_is_scored_as_they_come(on):
    ready = prepare(settings_of("toy", TINY | {"measure.on": on, "data.concept_share": 0.75}))
    assert ready.natural is not None
    corpus, trained = ready.natural.corpus, set(ready.train.corpus.group.tolist())
    assert len(corpus) == len(ready.scored.corpus) == 40
    assert not set(corpus.group.tolist()) & trained

    def holding(text) -> float:
        return float(np.mean([any(word.label == "place" for word in sentence) for sentence in text]))

    assert holding(ready.scored.corpus) == 0.75
    assert holding(corpus) < 0.7
    assert any(all(word.label == "O" for word in sentence) for sentence in corpus)


def test_natural_sentences_are_none_where_those_scored_come_so_themselves():
    plain = ["data.concept_share=none", "data.labelled_only=false"]
    assert prepare(settings_of("toy", TINY, plain)).natural is None


def test_f1_on_natural_sentences_stands_beside_that_on_drawn_ones():
    events, run = run_of()
    ready, base, damage = first(Prepared, events), first(Base, events), first(Damage, events)
    assert ready.natural is not None
    ready.model.load_weights(base.weights)
    expected = evaluate(ready.model, ready.natural)
    assert (damage.natural.counts == expected.counts).all()
    (row,) = summary(run)["natural"]
    drawn = run.arms["concept"][0][BASE].scores
    assert row == {"seed": 0, "natural": expected.f1, "drawn": drawn.f1}
    (line,) = [note for note in run.numbers.notes if "as they come" in note]
    assert f"{drawn.value('place'):.3f} on the sentences that are scored" in line
    assert f"{expected.value('place'):.3f} on as many as they come" in line


def test_label_that_the_base_model_hardly_knows_is_told():
    _, run = run_of(data__probe_sentences=150, arms=("unpruned",))
    assert not [note for note in run.numbers.notes if "hardly knows" in note]
    path = run.arms["unpruned"][0]
    counts = path[BASE].scores.counts
    counts[:, list(path[BASE].scores.labels).index("person"), 0] = 0  # not one is right
    run = replace(run)  # numbers are computed once
    (line,) = [note for note in run.numbers.notes if "hardly knows" in note]
    assert line.startswith("the base model hardly knows 'person' (F1 0.00): it has nothing to lose")
    assert line in summary(run)["notes"]
