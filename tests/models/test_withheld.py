"""Twins that never had a concept: nothing of it is in the loss, and nothing in the head learns that it is rare."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from relearn_lens.models import toy as toy_module
from relearn_lens.models.model import Tagger
from relearn_lens.models.training import cross_entropy, train_
from relearn_lens.models.withheld import as_outside, withheld
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import Batch
from tests.fixtures import Untouched

PLACE = Concept("place", ["place"])


def batch_of(tagger: Tagger, n: int = 12) -> tuple[Any, Batch]:
    text = tagger.encode(toy_module.corpus(sentences=n))
    return text, text.batch(np.arange(text.n_pieces))


def of_places(text: Any, batch: Batch) -> torch.Tensor:
    """Which sub-words of a batch are of a place."""
    labels = torch.from_numpy(text.corpus.label == text.corpus.label_names.index("place"))
    return labels[batch.word_of]


def test_the_loss_is_over_the_other_words_and_the_other_tags(toy, untouched: Untouched):
    text, batch = batch_of(toy.tagger)
    with untouched(toy.tagger), torch.no_grad():
        total, n = withheld(text, PLACE)(toy.tagger, {"train": batch}, None)["loss"]
        places = of_places(text, batch)
        logits = toy.tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword]
    others = [i for i, tag in enumerate(toy.tagger.tags) if not tag.endswith("place")]
    assert len(others) == 3
    taught = batch.tag[~places]
    assert n == len(taught) < len(batch.tag)
    index = torch.tensor([others.index(int(tag)) for tag in taught])
    want = F.cross_entropy(logits[~places][:, others], index, reduction="sum")
    torch.testing.assert_close(total, want)
    assert withheld(text, PLACE).counts({"train": text}, {"train": np.arange(text.n_pieces)}) == {"loss": n}  # pyright: ignore[reportFunctionMemberAccess]


def test_the_heads_rows_of_the_concept_do_not_move(toy):
    text, _ = batch_of(toy.tagger, 40)
    before = {name: value.detach().clone() for name, value in toy.tagger.weights().items()}
    list(train_(toy.tagger, text, objective=withheld(text, PLACE), steps=[4], lr=1e-2, weight_decay=0))
    places = torch.tensor([tag.endswith("place") for tag in toy.tagger.tags])
    for name in ("head.weight", "head.bias"):
        now = toy.tagger.weights()[name]
        assert torch.equal(now[places], before[name][places])
        assert not torch.equal(now[~places], before[name][~places])


def test_plain_training_does_move_them(toy):
    text, _ = batch_of(toy.tagger, 40)
    before = toy.tagger.head.weight.detach().clone()
    list(train_(toy.tagger, text, objective=cross_entropy, steps=[4], lr=1e-2, weight_decay=0))
    assert (toy.tagger.head.weight != before).any(1).all()


def test_words_of_the_concept_may_be_labelled_as_anything(toy):
    """What their labels are cannot be learnt."""
    text, batch = batch_of(toy.tagger)
    with torch.no_grad():
        first = withheld(text, PLACE)(toy.tagger, {"train": batch}, None)["loss"][0]
        tags = batch.tag.clone()
        tags[of_places(text, batch)] = 0
        other = withheld(text, PLACE)(toy.tagger, {"train": replace(batch, tag=tags)}, None)["loss"][0]
    assert torch.equal(first, other)


def test_in_parts_it_is_the_same():
    losses = []
    for accumulate in (1, 3):
        tagger = toy_module.tagger()
        tagger.dropout.p = 0.0  # is drawn anew for each part
        text, _ = batch_of(tagger, 24)
        how = {"steps": [1, 2], "batch_size": 12, "accumulate": accumulate}
        losses.append([at.loss for at in train_(tagger, text, objective=withheld(text, PLACE), **how)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_language_model_is_not_taught_the_concepts_words():
    model = toy_module.language_model()
    text = model.encode(toy_module.corpus(sentences=12))
    batch = text.batch(np.arange(text.n_pieces))
    with torch.no_grad():
        total, n = withheld(text, PLACE)(model, {"train": batch}, None)["loss"]
        nats = model.losses(batch)
    places = of_places(text, batch)
    assert n == int((~places).sum()) < len(nats)
    torch.testing.assert_close(total, nats[~places].sum())


def test_as_outside_relabels_the_concept_and_nothing_else(toy):
    text, _ = batch_of(toy.tagger, 40)
    relabelled = as_outside(text, PLACE)
    place, person = (text.corpus.label_names.index(name) for name in ("place", "person"))
    was, now = text.corpus, relabelled.corpus
    assert (now.label[was.label == place] == 0).all()
    assert not now.begins[was.label == place].any()
    assert ((now.label == was.label) | (was.label == place)).all()
    assert (now.label == person).sum() == (was.label == person).sum() > 0
    assert (was.label == place).any()  # the text itself is as it was
    assert relabelled.n_subwords(np.arange(text.n_pieces)) == text.n_subwords(np.arange(text.n_pieces))


@pytest.mark.parametrize("twin", [withheld, as_outside])
def test_a_text_without_the_concept_is_refused(toy, twin):
    text, _ = batch_of(toy.tagger)
    with pytest.raises(ValueError, match="no label 'river'"):
        twin(text, Concept("river", ["river"]))
