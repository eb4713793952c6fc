"""Whatever a run holds is the same after it was written and read, and nothing else is ever made from a file."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens import files
from relearn_lens.find.probes import AtK, Quality
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.evaluation import SpanScores, TokenLoss
from relearn_lens.measure.topwords import TopWords
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site, Slice
from relearn_lens.runs.archive import TYPES, _check_fields, pack, unpack
from relearn_lens.runs.events import Again, ArmDone, Base, Blocked, Cuts, Damage, Grafted, Sized
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.folder import RunFolder
from relearn_lens.runs.presets import settings_of
from relearn_lens.text.concept import Concept
from tests.made import TINY, same

EVERYTHING = {
    "measure.what": ["dprime", "elastic_net", "layer_ig", "top_words", "similarity"],
    "measure.shuffles": 19, "measure.sample_words": 60, "measure.sentences": 4, "measure.steps": 2,
    "arms": ["concept", "random"], "retrain.steps": [4], "prune.fraction": "auto", "prune.grid": [4 / 256],
    "block.held": ["random"], "data.train_sentences": 16, "data.validation_sentences": 60,
    "data.probe_sentences": 24, "finetune.epochs": 0.5, "prune.control_draws": 1, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """A base snapshot, an arm and all results of a real run, with everything measured that can be."""
    found: dict[str, Any] = {}
    for event in perform(settings_of("toy", {**TINY, **EVERYTHING})):
        match event:
            case Base():
                found["base"] = event.snapshot
            case ArmDone(trajectory=path) if path.arm == "concept":
                found["arm"] = path
            case Sized() | Cuts() | Damage() | Grafted() | Again() | Blocked():
                found[type(event).__name__.lower()] = event
    return found


def written(value: Any) -> Any:
    """A value after it was JSON and tensors."""
    tensors, meta = pack(value)
    return unpack(tensors, json.loads(json.dumps(meta, allow_nan=False)))


def types_in(value: Any) -> set[str]:
    """Names of all of our types somewhere in a value."""
    inner: list[Any] = []
    if isinstance(value, Mapping):
        inner = [*value.keys(), *value.values()]
    elif is_dataclass(value):
        inner = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, tuple | list):
        inner = list(value)
    own = {type(value).__name__} & set(TYPES)
    return own.union(*map(types_in, inner))


def test_every_type_comes_back_from_a_real_run(results):
    """Also a test that the run above holds every type that a file may hold, but for four of other runs."""
    assert set().union(*map(types_in, results.values())) == set(TYPES) - {"AtK", "LogProbability", "Own", "TokenLoss"}
    for name, value in results.items():
        assert same(value, written(value)), name


def test_what_comes_back_is_written_as_before(results):
    for name, value in results.items():
        (tensors, meta), (again, meta_again) = pack(value), pack(written(value))
        assert tensors.keys() == again.keys(), name
        assert json.dumps(meta) == json.dumps(meta_again), name


def test_what_comes_back_answers_as_before(results):
    path = written(results["arm"])
    assert isinstance(path, Trajectory)
    assert path.to_dataframe().equals(results["arm"].to_dataframe())
    assert path.survivors() == results["arm"].survivors()
    assert path["base"].by("attribution").kind == "layer_ig"
    assert repr(path) == repr(results["arm"])


SITE = Site("resid", ("embed", "0"), ("a", "b"), 2, (((Slice("x", "weight", 1)),), ()), ((), ()))
SMALL: list[Any] = [
    None, True, 3, -0.5, "text", "", float("nan"), float("inf"), -float("inf"), 1e-300, (), (1, (2.0, "x")), {},
    {"a": {"b": None}}, {1: "one", "1": "other", 0.5: "half", ("place", "person"): "both"}, Slice("c", "weight", 0),
    AtK(4, 0.9, math.nan, 0.5),
    Checkpoint(0.5, 3, 40, math.nan), Concept("place", ("place",)), SITE, Neurons(torch.eye(2, dtype=torch.bool), SITE),
    Quality(0.9, 0.5, 0.8, 0.2, 10, 4, "fit", None, (AtK(1, 0.5, 0.5, 0.5),)), torch.tensor([1.5, math.nan, math.inf]),
    torch.arange(4, dtype=torch.int32), torch.tensor(True), torch.zeros(0, 3), torch.tensor([1.0, 2.0]).bfloat16(),
    np.arange(6).reshape(2, 3), np.zeros((0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("value", SMALL, ids=lambda v: f"{type(v).__name__}")
def test_small_values_come_back(value):
    if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
        assert torch.equal(written(value), value)
        assert written(value).dtype is torch.bfloat16
    else:
        assert same(value, written(value))


def test_numbers_of_numpy_become_plain():
    assert written((np.int64(3), np.float32(0.5), np.float64("nan")))[:2] == (3, 0.5)
    assert written([1, 2]) == (1, 2)  # a list comes back as a tuple


def test_scores_with_labels_that_nothing_has():
    scores = SpanScores({"a": math.nan}, {"a": math.nan}, {"a": 0.0}, np.zeros((2, 1, 3), dtype=np.int64), ("a",))
    assert same(scores, written(scores))


def test_tensors_that_are_one_are_kept_once(results):
    arm = results["arm"]
    tensors, _ = pack(arm)
    again = {**arm.snapshots, "again": arm["base"]}
    more, _ = pack(replace(arm, snapshots=again))
    assert more.keys() == tensors.keys()
    back = written({"a": arm["base"], "b": arm["base"]})
    assert back["a"].saliency.score is back["b"].saliency.score
    # Equal is not the same: two tensors that may part ways later stay two.
    one = torch.ones(2)
    assert len(pack((one, one))[0]) == 1
    assert len(pack((one, one.clone()))[0]) == 2


def test_sites_are_kept_once(results):
    _, meta = pack(results["arm"])
    assert len(meta["sites"]) == 1
    assert json.dumps(meta).count("mlp.out.hook_in") == len(results["arm"].site.layers)


def test_tensors_of_keys_that_look_alike_do_not_get_mixed_up():
    value = {1: torch.zeros(2), "1": torch.ones(2), "a/b": torch.full((2,), 2.0), "a": {"b": torch.full((2,), 3.0)}}
    assert same(value, written(value))
    assert same((torch.zeros(1), {"0": torch.ones(1)}), written((torch.zeros(1), {"0": torch.ones(1)})))


@dataclass(frozen=True)
class Stranger:
    number: int


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Stranger(1), "the result is a Stranger"),
        ({"a": {"b": Stranger(1)}}, "a/b is a Stranger"),
        ((1, {2, 3}), "1 is a set"),
        (b"bytes", "the result is a bytes"),
        (print, "cannot be written"),
    ],
)
def test_what_is_not_listed_is_not_written(value, where):
    with pytest.raises(TypeError, match=where):
        pack(value)


def test_a_kind_of_a_listed_type_is_not_written():
    class Sub(Snapshot):
        pass

    with pytest.raises(TypeError, match="Sub, which cannot be written"):
        pack(object.__new__(Sub))


def broken(change: Any) -> Any:
    """The meta of a set of neurons, damaged."""
    tensors, meta = pack({"chosen": Neurons(torch.eye(2, dtype=torch.bool), SITE), "at": Checkpoint(1.0, 2, 3, 0.5)})
    meta = json.loads(json.dumps(meta))
    change(meta, tensors)
    return tensors, meta


def chosen(meta: Any) -> Any:
    return meta["body"]["map"][0][1]


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, tensors: meta.clear(),
        lambda meta, tensors: meta.pop("sites"),
        lambda meta, tensors: meta.update(sites=None),
        lambda meta, tensors: meta.update(sites=[]),
        lambda meta, tensors: meta.update(sites=["x"]),
        lambda meta, tensors: meta.update(body={}),
        lambda meta, tensors: meta.update(body={"map": 3}),
        lambda meta, tensors: meta.update(body={"map": [[1]]}),
        lambda meta, tensors: meta.update(body={"list": None}),
        lambda meta, tensors: meta.update(body={"float": "three"}),
        lambda meta, tensors: meta.update(body={"type": "Popen", "fields": {"args": "ls"}}),
        lambda meta, tensors: meta.update(body={"type": ["Neurons"], "fields": {}}),
        lambda meta, tensors: meta.update(body={"type": "Neurons"}),
        lambda meta, tensors: meta.update(body={"type": "Neurons", "items": 3}),
        lambda meta, tensors: chosen(meta)["fields"].update(shape=3),
        lambda meta, tensors: chosen(meta)["fields"].pop("mask"),
        lambda meta, tensors: chosen(meta).update(fields=[]),
        lambda meta, tensors: tensors.clear(),
        lambda meta, tensors: tensors.update({"chosen/mask": torch.eye(3, dtype=torch.bool)}),
        lambda meta, tensors: tensors.update({"chosen/mask": torch.eye(2)}),
        lambda meta, tensors: meta.update(body={"array": "chosen/mask"}) or tensors.clear(),
    ],
)
def test_damaged_meta_is_refused(change):
    tensors, meta = broken(change)
    with pytest.raises(ValueError):  # noqa: PT011  (what it says is the reader's, who knows the file)
        unpack(tensors, meta)


def test_undamaged_meta_is_not():
    tensors, meta = broken(lambda *_: None)
    assert unpack(copy.deepcopy(tensors), meta)["at"] == Checkpoint(1.0, 2, 3, 0.5)


def test_results_come_back_from_files(results, tmp_path: Path):
    for name, value in results.items():
        path = tmp_path / f"{name}.safetensors"
        files.write_tensors(path, *pack(value))
        assert same(value, unpack(*files.read_tensors(path))), name


def test_run_folder_gives_back_what_it_kept(results, tmp_path: Path):
    folder = RunFolder(tmp_path, {})
    arm = results["arm"]
    for name in ("sized", "cuts", "damage", "grafted", "again", "blocked"):
        folder.keep(results[name])
        held = results[name].held if name == "blocked" else ""
        assert same(folder.result(type(results[name]), arm.seed, held), results[name]), name
    assert folder.result(Damage, arm.seed + 1) is None
    folder.keep_arm(ArmDone(arm, None))
    assert same(folder.arm("concept", arm.seed), arm)
    assert folder.arm("random", arm.seed) is None


def test_an_arm_of_an_earlier_version_is_read(results):
    arm = results["arm"]
    tensors, meta = pack(arm)
    fields = meta["body"]["fields"]
    assert fields.pop("by") == arm.by
    fields["pruned"] = fields.pop("removed")
    back = unpack(tensors, meta)
    assert back.removed == arm.removed
    assert back.by == ""


def test_run_folder_says_which_file_is_damaged(results, tmp_path: Path):
    folder = RunFolder(tmp_path, {})
    folder.keep(results["damage"])
    tensors, _ = files.read_tensors(folder._tensors("damage-0"))
    files.write_tensors(folder._tensors("damage-0"), tensors, {"body": {"type": "Unknown"}, "sites": []})
    with pytest.raises(ValueError, match=r"damage-0.safetensors.*damaged or of another version: .*Unknown.*--fresh"):
        folder.result(Damage, 0)


def test_scores_of_a_language_model_come_back():
    scores = TokenLoss(np.array([[1.5, 2.0]]), np.array([[1, 3]]), ("others",), 50)
    back = unpack(*pack(scores))
    assert isinstance(back, TokenLoss)
    assert (back.nats == scores.nats).all()
    assert (back.tokens == scores.tokens).all()
    assert (back.labels, back.vocabulary) == (("others",), 50)


# --- what a file says is checked whole


@pytest.fixture
def site() -> Site:
    """Two layers of three neurons."""
    return Site("mlp_post", ("0", "1"), ("a", "b"), 3, ((), ()), ((), ()))


def packed(site: Site) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A saliency as a file holds it."""
    return pack(Saliency(torch.ones(len(site.layers), site.width), "probeless", "activation", "place", site))


@pytest.mark.parametrize("change", [("kind", 5), ("bucket", "many"), ("quality", {"list": []}), ("site", 5)])
def test_unpack_refuses_fields_of_another_type(site, change):
    tensors, meta = packed(site)
    meta["body"]["fields"] |= dict([change])
    with pytest.raises(ValueError, match="it does not hold what this version writes"):
        unpack(tensors, meta)


def test_fields_of_another_type_are_named(site):
    odd = copy.copy(Saliency(torch.ones(2, 3), "probeless", "activation", "place", site))
    object.__setattr__(odd, "kind", 5)  # the type checks of the test run let none be made
    with pytest.raises(TypeError, match="kind of a Saliency is a int that does not fit"):
        _check_fields(odd)


def test_unpack_refuses_axes_of_another_length(site):
    tensors, meta = packed(site)
    with pytest.raises(ValueError, match="score of a Saliency has another number of neurons than its site"):
        unpack({name: value[:, 1:] for name, value in tensors.items()}, meta)


def test_unpack_refuses_another_result_than_was_asked_for(site):
    tensors, meta = packed(site)
    assert isinstance(unpack(tensors, meta, Saliency), Saliency)
    with pytest.raises(ValueError, match="a Saliency where a Site should be"):
        unpack(tensors, meta, Site)


def test_unpack_refuses_words_that_are_not_in_the_vocab(site):
    shape = (len(site.layers), site.width)
    none = torch.zeros(shape, dtype=torch.bool)
    words = torch.full((*shape, 1), 7)
    made = TopWords(words, torch.ones(*shape, 1), ("a", "b"), none, none, site, 2, 0.5)
    with pytest.raises(ValueError, match="words of a TopWords that are not in its vocab"):
        unpack(*pack(made))
