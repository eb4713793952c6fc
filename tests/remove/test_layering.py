"""Forgetting fold by fold: what each stage forgets and keeps, and that a stage is a training of the remover itself."""

from typing import Any

import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.taught import Recipe, untaught
from relearn_lens.models.training import train_
from relearn_lens.remove.layering import LATER, Layered
from relearn_lens.remove.losses import NPO, GradDiff
from relearn_lens.remove.removal import FORGET, RETAIN, weighted
from relearn_lens.text.facts import FORGET as GOING
from relearn_lens.text.facts import TRAINED, people


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def test_folds_are_cut_by_key_and_grow():
    facts = people(0, n=12, forget=6, never=2, animals=2, n_answers=8)
    model = untaught(facts, recipe=Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=16))
    remover = Layered(folds=3)
    stages: Any = remover.stages(model, remover.texts(model, facts, (FORGET, RETAIN), 0)[FORGET], 0)
    whole, earlier = set(facts.passages(*GOING, forms=TRAINED)), set()
    for i, stage in enumerate(stages):
        forgotten = set(stage[FORGET].passages)
        later = set(stage[LATER].passages) if LATER in stage else set()
        assert forgotten | later == whole
        assert not {p.key for p in forgotten} & {p.key for p in later}
        assert earlier < forgotten
        assert len({p.key for p in forgotten}) == 2 * (i + 1)
        earlier = forgotten
    assert LATER not in stages[-1]


def test_every_stage_is_the_remover_with_the_later_folds_kept():
    texts = {"forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1)}
    how: dict[str, Any] = {"steps": (1, 2), "lr": 1e-3, "batch_size": 4}
    model, other, base = (toy.language_model() for _ in range(3))
    pauses = list(Layered(over=NPO(alpha=2), folds=2)(model, texts, seed=5, **how))
    assert [pause.step for pause in pauses] == [1, 2, 3, 4]
    for i, stage in enumerate(Layered(folds=2).stages(base, texts["forget"], 5)):
        terms = NPO(alpha=2).terms(other, 5)
        terms |= {LATER: terms[RETAIN]} if LATER in stage else {}
        given: Any = {role: base.encode(text) for role, text in ({**texts, **stage}).items()}  # pyright: ignore[reportArgumentType]
        objective = weighted("npo", terms)
        # What it compares with is the model before the first stage.
        kept = objective.reference(base, given)  # pyright: ignore[reportFunctionMemberAccess]
        list(train_(other, given, objective=objective, reference=kept, seed=5 + i, **how))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_one_fold_is_the_remover_itself():
    texts = {"forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1)}
    how: dict[str, Any] = {"steps": (2,), "lr": 1e-3, "batch_size": 4, "seed": 3}
    model, other = toy.language_model(), toy.language_model()
    pauses = list(Layered(over=GradDiff(alpha=2), folds=1)(model, texts, **how))
    keys = Layered(folds=1).stages(other, texts["forget"], 3)[0][FORGET]
    assert pauses == list(GradDiff(alpha=2)(other, {**texts, "forget": keys}, **how))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_what_cannot_be_is_said():
    model, texts = toy.language_model(), {"forget": toy.corpus(sentences=2), "retain": toy.corpus(sentences=6, seed=1)}
    with pytest.raises(ValueError, match="folds = 3: there are 2 keys to forget; take fewer folds"):
        Layered()(model, texts)
    with pytest.raises(ValueError, match="layered trains several times, and does not resume"):
        Layered()(model, texts, resume=(None, {}))
    with pytest.raises(ValueError, match="layered keeps folds as npo keeps the retained text; give alpha above 0"):
        Layered(over=NPO(alpha=0))(model, texts)
