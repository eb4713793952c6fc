"""Named recipes: every one can be made, says its fields, and does what its parts do."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.training import plain
from relearn_lens.remove.losses import NPO
from relearn_lens.remove.pruning import Prune
from relearn_lens.remove.recipes import RECIPES, recipe, values_of
from relearn_lens.remove.removal import Removing
from relearn_lens.remove.removers import REMOVERS
from relearn_lens.remove.representations import RMU
from relearn_lens.remove.wrappers import SAM


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, each in RECIPES.items() for name in each])
def test_every_recipe_can_be_made(kind, name):
    made = recipe(kind, name)
    assert made.remover.name == re.split("[+@]", name)[0]
    assert (made.step is plain) == ("+" not in name)
    told = {**made.remover.model_dump(), **(made.how.model_dump() if made.how else {})}
    told |= {} if made.step is plain else made.step.model_dump()  # pyright: ignore[reportFunctionMemberAccess]
    told |= {"where": made.where, "fraction": made.fraction}
    told |= {f"where.{field}": value for field, value in made.where_fields.items()}
    for field, value in values_of(kind, name).items():
        got = told[field]
        assert value.items() <= got.items() if isinstance(value, dict) else got == value


def test_without_a_recipe_values_are_the_published():
    for name, kind in REMOVERS.items():
        made = recipe(None, name)
        assert made.remover == kind()
        assert made.how == getattr(kind, "usual", None)
    assert recipe(None, "rmu").how == RMU.usual == Removing(lr=5e-5)


def test_fields_go_where_they_belong():
    made = recipe("toy", "npo+sam", {"beta": 0.2, "rho": 0.3, "lr": 0.5, "steps": (7,)})
    assert (made.remover, made.step) == (NPO(beta=0.2), SAM(rho=0.3))
    assert made.how is not None
    assert (made.how.lr, made.how.steps) == (0.5, (7,))
    assert recipe("toy", "prune", {"sever": "both", "fraction": 0.2}).remover == Prune(sever="both")


def test_fields_of_a_localiser_are_its_own():
    usual = recipe("smollm2", "grad_diff")
    assert (usual.where, usual.where_fields) == ("layer_distance", {"layers": 3})
    assert recipe("smollm2", "grad_diff", {"where.layers": 1}).where_fields == {"layers": 1}
    assert recipe("smollm2", "grad_diff", {"where.layers": 1}).departures()["where.layers"] == 1
    assert recipe("smollm2", "grad_diff", {"where": "lookup"}).where_fields == {}
    assert recipe("smollm2", "grad_diff", {"where": "lookup", "where.first": 0.2}).where_fields == {"first": 0.2}


def test_a_remover_works_where_its_name_says():
    usual, made = recipe("toy", "npo+sam"), recipe("toy", "npo+sam@lookup")
    assert (made.remover, made.step) == (usual.remover, usual.step)
    assert made.how is not None
    assert usual.how is not None
    assert made.how.model_dump() == {**usual.how.model_dump(), "lr": 1e-3}, (
        "what differs is told, and nothing else does"
    )
    assert (made.where, made.where_fields) == ("lookup", {"first": 0.25, "last": 0.75})
    assert recipe("smollm2", "grad_diff@lookup").where_fields == {}, "those of layer_distance are not lookup's"
    assert recipe("toy", "npo@everything").how == recipe("toy", "npo").how, "without a recipe of its own"
    assert recipe("toy", "npo+sam@lookup", {"where": "all_mlps"}).where_fields == {}
    assert recipe(None, "rmu@lookup") == replace(recipe(None, "rmu"), where="lookup")


def test_a_recipe_removes_as_its_parts_do():
    ends = []
    texts = {"forget": toy.corpus(sentences=6), "retain": toy.corpus(sentences=6, seed=1)}
    made = recipe("toy", "npo+sam", {"steps": (2,)})
    each: Any = ((made, {}), (made.remover, {"how": made.how, "step": made.step}))
    for remover, more in each:
        model: Any = toy.language_model()
        list(remover(model, texts, seed=5, **more))
        ends.append({name: value.clone() for name, value in model.weights().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("kind", "name", "fields", "says"),
    [
        ("tiy", "npo", {}, r"^unknown recipes 'tiy'; did you mean 'toy'\? Known: toy"),
        ("toy", "nope", {}, r"^unknown remover 'nope'; known: prune, "),
        ("toy", "npo+sum", {}, r"^unknown wrapper 'sum'; did you mean 'sam'\? Known: sam"),
        ("toy", "prune", {"fraction": 2}, r"^fraction = 2: a share of all neurons, above 0 and at most 1"),
        ("toy", "npo", {"rho": 1}, r"^npo has no field 'rho'; it has .*beta, "),
        ("toy", "npo", {"beta": 0}, r"^beta = 0: Input should be greater than 0$"),
        ("toy", "npo", {"lr": "fast"}, r"^lr = 'fast': Input should be a valid number"),
        ("toy", "prune", {"lr": 1}, r"^Prune has no field 'lr'; it has sever$"),
        ("toy", "prune+sam", {}, r"^prune\+sam: pruning takes no steps"),
    ],
)
def test_a_wrong_recipe_is_one_line(kind, name, fields, says):
    with pytest.raises(ValueError, match=says):
        recipe(kind, name, fields)


def test_field_that_remover_and_wrapper_share_is_named_with_its_owner():
    with pytest.raises(
        ValueError, match=r"both have a field 'faithful'; say npo.faithful or gradient_penalty.faithful"
    ):
        recipe("toy", "npo+gradient_penalty", {"faithful": True})
    made = recipe("toy", "npo+gradient_penalty", {"gradient_penalty.faithful": True})
    assert made.step.model_dump()["faithful"] is True
    assert made.remover.model_dump()["faithful"] is False
