"""Stages: one recipe, one folder, complete or absent; and runs that compute a base once for all of them."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from relearn_lens.measure.tracking import BASE
from relearn_lens.runs import experiment as module
from relearn_lens.runs import stages as stages_module
from relearn_lens.runs import store
from relearn_lens.runs.stages import NUMBERS, TENSORS, StageRecipe, Stages
from tests.made import same, tiny

RECIPE = StageRecipe("base", {"model": "toy", "seed": 0, "lr": 1e-3})


def test_a_stage_is_made_once_and_read_to_the_bit(tmp_path):
    stages, made = Stages(tmp_path), []

    def make():
        made.append(1)
        return {"loss": 0.5, "n": 3}, {"w": torch.arange(4.0), "mask": torch.tensor([True, False])}

    one = stages.made(RECIPE, make)
    two = Stages(tmp_path).made(StageRecipe("base", dict(reversed(list(RECIPE.fields.items())))), make)
    assert made == [1]
    assert one.numbers == two.numbers == {"loss": 0.5, "n": 3}
    assert torch.equal(two.tensors["w"], torch.arange(4.0))
    assert two.tensors["mask"].tolist() == [True, False]


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 2e-3}, {"more": None}])
def test_every_field_is_part_of_the_recipe(other):
    assert StageRecipe("base", {**RECIPE.fields, **other}).digest != RECIPE.digest
    assert StageRecipe("never", RECIPE.fields).digest != RECIPE.digest


def test_versions_are_part_of_the_recipe(monkeypatch):
    before = RECIPE.digest
    monkeypatch.setattr(stages_module, "version", lambda name: f"{name} 999")
    assert StageRecipe(RECIPE.kind, RECIPE.fields).digest != before


def test_what_was_interrupted_is_absent(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    monkeypatch.setattr(stages_module, "write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stages.keep(RECIPE, {"n": 1}, {"w": torch.zeros(2)})
    assert stages.read(RECIPE) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    stages.keep(RECIPE, {"n": 1}, {"w": torch.zeros(2)})
    kept = stages.read(RECIPE)
    assert kept is not None
    assert kept.numbers == {"n": 1}


@pytest.mark.parametrize("name", [NUMBERS, TENSORS])
def test_a_damaged_stage_is_named(tmp_path, name):
    stages = Stages(tmp_path)
    stages.keep(RECIPE, {"n": 1}, {"w": torch.zeros(2)})
    (stages.folder(RECIPE) / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"stage in '.*base-\w+' is damaged; remove that folder"):
        stages.read(RECIPE)


def _slowly(path: str, mine: str) -> None:
    def make():
        with open(mine, "w") as file:
            file.write(str(os.getpid()))
        return {"by": os.getpid()}, None

    Stages(path).made(RECIPE, make)


def test_of_several_processes_one_computes(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_slowly, args=(str(tmp_path / "s"), str(tmp_path / f"by-{i}"))
        )
        for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("by-*"))) == 1


def test_runs_of_equal_recipe_train_their_base_and_twin_once(tmp_path, monkeypatch):
    trainings: list[str] = []
    plainly = module.train_
    monkeypatch.setattr(
        module, "train_", lambda *a, what, **how: trainings.append(what) or plainly(*a, what=what, **how)
    )
    arms = {
        "arms": ["concept", "random", "never"], "grafts__skip": True, "measure__what": [], "retrain__steps": [2],
    }  # fmt: skip
    shared = tmp_path / "shared"

    def run(name: str, share: Path | None = shared, **changes):
        return store.run(tiny(**arms, **changes), tmp_path / name, shared=share)

    alone = run("alone", None)
    assert len(trainings) == 2
    first = run("first")
    second = run("second", prune__fraction=0.05, retrain__lr=1e-3)
    assert len(trainings) == 4
    assert len(list(shared.glob("[a-z]*"))) == 2
    for arm in ("concept", "never"):
        one, two, three = (each.arms[arm][0][BASE] for each in (alone, first, second))
        assert same(one.scores, two.scores)
        assert same(two.scores, three.scores)
    assert same(alone.arms["concept"][0].snapshots["2"].scores, first.arms["concept"][0].snapshots["2"].scores)
    run("other", finetune__lr=2e-5)
    assert len(trainings) == 6
