"""Snapshots of the planted model, and trajectories from any training loop."""

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from relearn_lens.find.attribution import attribute
from relearn_lens.measure import tracking
from relearn_lens.measure.tracking import Snapshot, Trajectory, measure, track
from relearn_lens.methods import Measuring
from relearn_lens.models import toy as toy_module
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, random_neurons, site_of
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import prune_
from relearn_lens.text.concept import Concept
from tests.analysis.test_story import scores_of, snapshot_of, trajectory
from tests.fixtures import unchecked

PLACE = Concept("place")

# Several tests here pause without training in between, which is what the warning is for.
pytestmark = pytest.mark.filterwarnings("ignore:stages .* measure the same")


# --- one snapshot


def test_measure_finds_what_is_planted(toy_model):
    found = measure(toy_model.tagger, toy_model.corpus, PLACE, site="mlp_post")
    top = {(neuron.layer, neuron.index) for neuron in found.saliency.top(4)}
    assert top == set(toy_model.planted)
    # Against each other class in turn, what tells places from persons alone counts too; against the rest it does not.
    rest = measure(toy_model.tagger, toy_model.corpus, PLACE, site="mlp_post", contrast="rest").saliency.top(8)
    assert {(n.layer, n.index) for n in rest} == {*toy_model.planted, *toy_model.decoys}
    assert found.f1 == {"person": 1, "place": 1, "overall": 1}
    assert found.at is None
    assert found.stats.count.tolist() == list(toy_model.corpus.words_per_label().values())


def test_measure_finds_it_for_another_concept_and_not_in_a_control(toy_model):
    persons = measure(toy_model.tagger, toy_model.corpus, Concept("person"), site="mlp_post").saliency.top(4)
    assert {(n.layer, n.index) for n in persons} == set(toy_module.PERSON_NEURONS)
    places = measure(toy_model.tagger, toy_model.corpus, PLACE, site="mlp_post").saliency.top(4)
    assert len(persons & places) == 0
    assert len(random_neurons(like=places, seed=0) & places) <= 1


def test_measure_scores_f1_on_the_validation_text_if_there_is_one(toy_model):
    probe, validation = toy_model.corpus.take(range(40)), toy_model.corpus.take(range(40, 60))
    found = measure(toy_model.tagger, probe, PLACE, validation=validation)
    assert len(found.scores.counts) == 20
    assert int(found.stats.count.sum()) == probe.n_words
    assert len(measure(toy_model.tagger, probe, PLACE).scores.counts) == 40


def test_measure_leaves_the_model_as_it_was(toy, untouched):
    measure(toy.tagger, toy.corpus, PLACE)  # TransformerLens hooks up its norms at the first forward pass
    toy.tagger.train()
    with untouched(toy.tagger):
        measure(toy.tagger, toy.corpus, PLACE, site="mlp_post")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "nowhere"}, r"unknown site 'nowhere'; known: resid, mlp_post"),
        ({"what": ["similarity"]}, r"similarity compares two models.*activation_similarity"),
        ({"score": "magic"}, r"unknown score 'magic'; known: .*probeless"),
        ({"contrast": "none"}, r"unknown contrast 'none'; known: classes, rest"),
        ({"concept": Concept("river")}, r"no label 'river' .*its labels are O, person, place"),
        ({"concept": Concept("sea", words=("sea",))}, r"no word of corpus 'toy' .* carries concept 'sea'"),
    ],
)
def test_measure_refuses_what_it_does_not_know(toy_model, settings, message, monkeypatch):
    monkeypatch.setattr(tracking, "saliency", unchecked(tracking.saliency))
    arguments = {"concept": PLACE} | settings
    with pytest.raises(ValueError, match=message):
        unchecked(tracking.measure_text)(toy_model.tagger, toy_model.corpus, arguments.pop("concept"), **arguments)


@pytest.mark.parametrize("settings", [{"score": "magic"}, {"contrast": "none"}])
def test_measure_refuses_it_before_any_forward_pass(toy_model, settings, monkeypatch):
    def forward(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(tracking, "gather", forward)
    with pytest.raises(ValueError, match="unknown"):
        unchecked(tracking.measure_text)(toy_model.tagger, toy_model.corpus, PLACE, **settings)


def test_measure_refuses_a_validation_text_of_other_labels_before_any_forward_pass(toy_model, corpus, monkeypatch):
    def forward(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(tracking, "gather", forward)
    with pytest.raises(ValueError, match="does not know"):
        measure(toy_model.tagger, toy_model.corpus, PLACE, validation=corpus)


def test_snapshot_is_a_few_lines_when_printed(toy_model):
    assert len(repr(measure(toy_model.tagger, toy_model.corpus, PLACE))) < 1000


# --- at every pause


@pytest.fixture
def chosen(toy) -> Neurons:
    return Neurons.of(site_of(toy.tagger.bridge, "mlp_post"), toy.planted)


def test_track_warns_of_checkpoints_that_are_one(toy):
    text = toy.corpus.sample(20, seed=0)

    def loads(*moves: float) -> Iterator[Checkpoint]:
        for step, move in enumerate(moves, 1):
            with torch.no_grad():
                for weight in toy.tagger.trunk.parameters():
                    weight *= move
            yield Checkpoint(float(step), step, 0, 0.0)

    with pytest.warns(UserWarning, match=r"stages '1' and '2' measure the same to the bit.*loaded, or saved"):
        track(toy.tagger, text, PLACE, loads(1.1, 1.0), site="mlp_post")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        track(toy.tagger, text, PLACE, loads(1.1, 0.8), site="mlp_post")


def test_track_warns_of_labels_that_were_not_known_before_the_cut(toy):
    """What a model does not know, no cut takes and no training brings back."""
    base = measure(toy.tagger, toy.corpus, PLACE, site="mlp_post")
    unknown = measure(toy.tagger, toy.corpus, PLACE, site="mlp_post")
    unknown.scores.counts[:, list(base.scores.labels).index("person"), 0] = 0  # not one is right
    unknown.f1["person"] = 0.0
    with pytest.warns(UserWarning, match=r"does not know person \(0\.00 over \d+ spans\), so .* epochs=, lr="):
        track(toy.tagger, toy.corpus, PLACE, [], before=unknown, site="mlp_post")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not know")
        track(toy.tagger, toy.corpus, PLACE, [], before=base, site="mlp_post")


def test_track_follows_the_concept_down_and_back_up(toy, chosen):
    text = toy.corpus
    before = measure(toy.tagger, text, PLACE, site="mlp_post")
    prune_(toy.tagger, chosen)
    heard: list[tuple[str, Snapshot]] = []
    path = track(
        toy.tagger, text, PLACE, retrain_(toy.tagger, text, epochs=2.0, every=1.0, lr=3e-3, batch_size=16),
        before=before, removed=chosen, site="mlp_post", arm="concept", seed=7,
        on_measured=lambda stage, snapshot: heard.append((stage, snapshot)),
    )  # fmt: skip
    assert path.stages == ("base", "pruned", "1", "2")
    assert (path.arm, path.seed, path.concept, path.label) == ("concept", 7, PLACE, ("place",))
    f1 = [snapshot.f1["place"] for snapshot in path.snapshots.values()]
    assert f1[0] == 1
    assert f1[1] < 0.2
    assert f1[3] > 0.9
    assert path["pruned"].f1["person"] > 0.9
    assert path["base"] is before
    assert [stage for stage, _ in heard] == ["pruned", "1", "2"]
    assert all(path[stage] is snapshot for stage, snapshot in heard)
    pauses = [path[stage].at for stage in path.stages]
    assert pauses[:2] == [None, None]
    assert [at.epoch for at in pauses[2:] if at] == [1, 2]
    assert [at.step for at in pauses[2:] if at] == [8, 16]


def test_track_measures_before_the_loop_goes_on(toy):
    """The order of things: measured now, then a stretch of training, then measured again."""
    happened = []

    def loop():
        for k in (1, 2):
            happened.append(f"train {k}")
            yield Checkpoint(epoch=float(k), step=k, tokens_seen=0, loss=0.0)
        happened.append("the loop ends")

    track(toy.tagger, toy.corpus, PLACE, loop(), on_measured=lambda stage, _: happened.append(f"measure {stage}"))
    assert happened == ["measure pruned", "train 1", "measure 1", "train 2", "measure 2", "the loop ends"]


def test_track_takes_any_loop_that_yields_checkpoints(toy):
    """A loop written by hand in which the weights are plainly taken away, bit by bit."""

    def loop():
        for k, neuron in enumerate(toy.planted, start=1):
            prune_(toy.tagger, Neurons.of(site_of(toy.tagger.bridge, "mlp_post"), [neuron]))
            yield Checkpoint(epoch=k / 4, step=k, tokens_seen=10 * k, loss=0.5)

    path = track(toy.tagger, toy.corpus, PLACE, loop())
    assert path.stages == ("pruned", "0.25", "0.5", "0.75", "1")
    f1 = [snapshot.f1["place"] for snapshot in path.snapshots.values()]
    assert f1[0] == 1
    assert f1[-1] < 0.2
    assert f1 == sorted(f1, reverse=True)
    assert track(toy.tagger, toy.corpus, PLACE, []).stages == ("pruned",)
    ready = [Checkpoint(3.0, 1, 1, 1.0)]
    assert track(toy.tagger, toy.corpus, PLACE, ready)["3"].at is ready[0]


@pytest.mark.parametrize(
    ("epoch", "name"), [(1, "1"), (0.5, "0.5"), (2.0, "2"), (1 / 3, "0.333"), (10, "10"), (100, "100")]
)
def test_stage_name_is_the_epoch(epoch, name):  # fmt: skip
    assert Checkpoint(float(epoch), 1, 1, 1.0).stage == name
    assert Checkpoint(float(epoch), 7, 1, 1.0, by="step").stage == "7"


def test_stages_of_a_long_training_keep_their_names():
    pauses = [Checkpoint(0.25 * k, k, k, 1.0) for k in range(1, 4001)]
    assert len({pause.stage for pause in pauses}) == len(pauses)
    assert pauses[-1].stage == "1000"


def test_track_refuses_two_stages_of_one_name(toy):
    pauses = [Checkpoint(1.0, 1, 1, 1.0), Checkpoint(1.0, 2, 2, 1.0)]
    with pytest.raises(ValueError, match="two checkpoints are of epoch 1"):
        track(toy.tagger, toy.corpus, PLACE, pauses)


# --- what a trajectory gives


SCORE = torch.arange(6.0).view(2, 3)
PRUNED = torch.tensor([[True, False, False], [True, True, False]])


@pytest.fixture
def path() -> Trajectory:
    scores = {"base": SCORE, "pruned": SCORE * 2, "1": SCORE * 3, "2": SCORE * 4}
    return trajectory(dict(zip(scores, (0.9, 0.1, 0.5, 0.8), strict=True)), scores, removed=PRUNED, seed=3)


def test_trajectory_gives_its_stages_in_order(path):
    assert path.stages == ("base", "pruned", "1", "2")
    assert path["1"] is path.snapshots["1"]
    with pytest.raises(KeyError):
        path["3"]


def test_trajectory_survivors_are_those_not_pruned(path):
    assert path.survivors().mask.tolist() == [[False, True, True], [False, False, True]]
    assert len(path.survivors() & Neurons(PRUNED, path.site)) == 0
    whole = Trajectory(path.snapshots)
    assert len(whole.survivors()) == 6


def test_trajectory_without_a_concept_is_looked_up_by_overall(path):
    assert Trajectory(path.snapshots).label == "overall"
    assert Trajectory(path.snapshots, concept=Concept("water", words=("sea",))).label == "overall"
    assert Trajectory(path.snapshots, concept=Concept("x", labels=("person", "place"))).label == ("person", "place")
    assert "overall" in repr(Trajectory(path.snapshots))


def test_to_dataframe_has_a_row_for_each_stage_and_label(path):
    table = path.to_dataframe()
    assert list(table.columns) == [
        "arm", "seed", "stage", "epoch", "step", "tokens_seen", "loss", "label", "f1", "precision", "recall", "support",
    ]  # fmt: skip
    assert table[["stage", "label"]].to_numpy().tolist() == [
        [stage, label] for stage in path.stages for label in ("person", "place", "overall")
    ]
    assert table[table.label == "place"].f1.tolist() == pytest.approx([0.9, 0.1, 0.5, 0.8])
    assert table[table.label == "place"].epoch.tolist() == [0, 0, 1, 2]
    assert table[table.label == "place"].step.tolist() == [0, 0, 20, 30]
    assert table[table.label == "place"].tokens_seen.tolist() == [0, 0, 200, 300]
    assert table[table.label == "place"].loss.tolist() == pytest.approx([np.nan, np.nan, 1 / 3, 1 / 4], nan_ok=True)
    assert set(table.seed) == {3}
    assert set(table.arm) == {"concept"}
    assert table.support.tolist() == [20_000, 20_000, 40_000] * 4  # 20 sentences, 1000 spans of each label


def test_to_xarray_has_named_axes(path):
    data = path.to_xarray()
    assert data.saliency.dims == ("stage", "layer", "neuron")
    assert data.f1.dims == ("stage", "label")
    assert data.removed.dims == ("layer", "neuron")
    assert list(data.stage.values) == list(path.stages)
    assert list(data.layer.values) == ["embed", "0"]
    assert list(data.label.values) == ["person", "place", "overall"]
    assert data.saliency.sel(stage="1", layer="0").values.tolist() == [9, 12, 15]
    assert data.f1.sel(stage="2", label="place").item() == pytest.approx(0.8)
    assert data.removed.values.tolist() == PRUNED.tolist()
    assert data.saliency.attrs == {"units": "activation", "kind": "probeless"}
    assert data.attrs["seed"] == 3
    json.dumps(data.attrs)


def test_trajectory_says_its_curve(path):
    assert repr(path) == "Trajectory(concept, seed 3, F1 of place: base 0.900 → pruned 0.100 → 1 0.500 → 2 0.800)"


def test_snapshot_f1_is_that_of_its_scores():
    scores = scores_of(0.25)
    assert snapshot_of(SCORE, scores).f1 is scores.f1


def test_a_pruned_neuron_is_never_shown_as_the_most_salient(toy):
    # Cut off from what reads it alone, it is as salient as it was.
    before = measure(toy.tagger, toy.corpus, PLACE, site="mlp_post")
    cut = before.saliency.top(4)
    prune_(toy.tagger, cut)
    path = track(toy.tagger, toy.corpus, PLACE, [], before=before, removed=cut, site="mlp_post")
    after = path["pruned"].saliency
    assert after.top(4) == cut
    assert path["pruned"].f1["place"] < 0.1
    assert len(after.top(4, among=path.there("pruned")) & cut) == 0
    assert path.there("base").mask.all()
    first, last = (str(next(iter(x))) for x in (cut, after.top(1, among=path.there("pruned"))))
    base, pruned = path._repr_html_().split("<tr>")[-2:]
    assert (first in base, first in pruned, last in pruned) == (True, False, True)


def test_every_attribution_that_is_named_is_measured(toy_model):
    how = Measuring(what=("layer_ig", "conductance", "dprime"), steps=3, sentences=3)
    text = toy_model.corpus
    shot = measure(toy_model.tagger, text, PLACE, how, site="mlp_post")
    alone = {
        "conductance": attribute(toy_model.tagger, text, PLACE, how, site="mlp_post"),
        "layer_ig": attribute(toy_model.tagger, text, PLACE, site="mlp_post", form="layer", steps=3, sentences=3),
    }
    assert list(shot.attributions) == ["layer_ig", "conductance"]
    for kind, found in alone.items():
        torch.testing.assert_close(shot.attributions[kind].score, found.score)
        torch.testing.assert_close(shot.by(kind).score, found.score.abs())
    assert not torch.allclose(alone["conductance"].score, alone["layer_ig"].score)
    assert shot.attribution is shot.attributions["layer_ig"]
    assert shot.by("attribution").kind == "layer_ig"
    assert set(shot.also) == {"dprime"}


def test_measure_takes_its_settings_as_an_object_or_as_keywords(toy_model):
    how = Measuring(what=("auroc",), shuffles=2, rank_bucket=7)
    shots = [
        measure(toy_model.tagger, toy_model.corpus, PLACE, how),
        measure(toy_model.tagger, toy_model.corpus, PLACE, what=["auroc"], shuffles=2, rank_bucket=7),
        measure(toy_model.tagger, toy_model.corpus, PLACE, how.model_copy(update={"shuffles": 0}), shuffles=2),
    ]
    for shot in shots:
        assert (list(shot.also), len(shot.shuffled), shot.saliency.bucket) == (["auroc"], 2, 7)
        assert torch.equal(shot.saliency.score, shots[0].saliency.score)
    with pytest.raises(ValueError, match="Measuring has no field 'shuffels'; it has target, baseline"):
        measure(toy_model.tagger, toy_model.corpus, PLACE, shuffels=2)
