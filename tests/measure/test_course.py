"""Metrics of facts by place: measured once, and at every pause of a training."""

import itertools
import math

import numpy as np
import pytest

import relearn_lens as rl
from relearn_lens.analysis import recovery
from relearn_lens.analysis.intervals import over_sentences
from relearn_lens.measure.answers import answer
from relearn_lens.measure.asking import REWORDED, Reference, ask
from relearn_lens.measure.evaluation import Scores
from relearn_lens.measure.extraction import Accuracy
from relearn_lens.measure.metrics import METRICS
from relearn_lens.models import taught
from relearn_lens.models.training import train_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED
from relearn_lens.text.facts.encoded import encode_passages
from tests.made import Pool

FACTS = made.people(0, n=16, forget=8, never=2, animals=4, n_answers=8)
SMALL = taught.Recipe(n_layers=2, d_model=32, n_heads=2, d_mlp=64)
HELD_OUT = FORGET[1]


MODELS = Pool(lambda: taught.untaught(FACTS, recipe=SMALL))


@pytest.fixture
def make():
    """Untaught models, another at every call."""
    return MODELS.lend()


@pytest.fixture
def model(make):
    return make()


def text(model, role):
    return encode_passages(FACTS.passages(role, forms=TRAINED), model.tokenizer, context=model.context)


def training(model, steps=(4, 8)):
    return train_(model, text(model, FORGET[0]), steps=steps, lr=1e-2, batch_size=32, seed=0)


def test_places_are_roles_in_taught_and_in_other_wordings():
    asked = ask(FACTS, keys=3, wordings=1)
    assert asked.names == tuple(role + ending for role in (*FORGET, *RETAIN) for ending in ("", REWORDED))
    for place in asked.names:
        here = [p for p, at in zip(asked.passages, asked.places, strict=True) if at == place]
        assert len({p.key for p in here}) == 3
        assert len({(p.key, p.relation) for p in here}) == len(here)
        assert {p.form for p in here} == ({"paraphrase"} if place.endswith(REWORDED) else {"statement"})
        assert {p.key for p in here} <= set(FACTS.keys(place.removesuffix(REWORDED)))
    alone = ask(FACTS, roles=["retain_near"], keys=3, wordings=1)
    assert {p.key for p in alone.passages} == {
        p.key for p, at in zip(asked.passages, asked.places, strict=True) if at.startswith("retain_near")
    }
    everything = ask(FACTS, keys=None, wordings=None)
    assert len(everything.passages) == len(FACTS.passages(*FORGET, *RETAIN, forms=(*TRAINED, "paraphrase")))


def test_every_wording_is_asked_about_as_often():
    asked = ask(FACTS, roles=["retain_near"], wordings=1)
    taught_ones = [p.template for p, at in zip(asked.passages, asked.places, strict=True) if not at.endswith(REWORDED)]
    counts = [taught_ones.count(template) for template in set(taught_ones)]
    assert len(counts) == 16
    assert set(counts) == {2}  # 8 keys, 4 wordings of each relation


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match=r"keys and wordings must be at least 1, or None for all; got 0 and 2"):
        ask(FACTS, keys=0)
    with pytest.raises(ValueError, match=r"no role is called 'forget'; the roles are forget_attacked"):
        ask(FACTS, roles=["forget"])
    first, second, near = (FACTS.passages(role, forms="article") for role in (*FORGET, RETAIN[0]))
    without = made.Facts("bare", first, second, near)
    with pytest.raises(ValueError, match=r"facts 'bare' have no passage to ask in the roles"):
        ask(without)


def test_every_metric_answers_to_one_protocol(model, make, untouched):
    asked = ask(FACTS, keys=2, wordings=1)
    never, base = make(), make()
    for _ in training(base, (8,)):
        pass
    removed = {name: value.clone() for name, value in model.weights().items()}
    reference = Reference(base, never, removed)
    with untouched(model), untouched(base):
        snapshot = rl.measure(model, asked, metrics=list(METRICS), reference=reference)
    assert list(snapshot.metrics) == list(METRICS)
    for name, scores in snapshot.metrics.items():
        kind = METRICS[name]
        assert isinstance(scores, Scores)
        assert scores.metric == name
        assert scores.unit == kind.unit
        assert kind.formula
        assert kind.source
        assert kind.__doc__
        for place in scores.labels:
            low, high = scores.interval(place)
            value = scores.shown(place)
            assert math.isnan(value) or low - 1e-9 <= value <= high + 1e-9 or low == high
            assert isinstance(scores.chance(place), float)
    rows = snapshot.to_dataframe()
    assert len(rows) == sum(len(s.labels) for s in snapshot.metrics.values())
    assert "forget_held_out, reworded" in repr(snapshot)


def test_metrics_are_there_at_every_checkpoint_and_by_place(model):
    before = rl.measure(model, FACTS)
    path = rl.track(model, FACTS, training(model), before=before, arm="relearn", seed=3)
    assert path.stages == ("base", "removed", "4", "8")
    assert path.metrics == ("accuracy", "loss", "extraction")
    for place in path["8"].scores.labels:
        role = place.removesuffix(REWORDED)
        passages = [p for p, at in zip(ask(FACTS).passages, ask(FACTS).places, strict=True) if at == place]
        by_hand = answer(model, passages, closed=FACTS.answers())
        assert path["8"].metrics["accuracy"].shown(place) == by_hand.accuracy.shown("overall")
        assert path["8"].metrics["loss"].shown(place) == pytest.approx(by_hand.loss.shown("overall"), rel=1e-5)
        assert path["8"].metrics["accuracy"].chance(place) == pytest.approx(by_hand.accuracy.chance("overall"))
        assert len(path["8"].metrics["loss"].sums(place)) == len(FACTS.keys(role))
    table = path.to_dataframe()
    assert list(table.columns[:6]) == ["arm", "seed", "stage", "epoch", "step", "tokens_seen"]
    assert len(table) == 4 * 3 * 8
    assert set(table["over"]) == {"4 keys", "8 keys"}
    assert path.course("loss")["8"] == path["8"].metrics["loss"].shown(HELD_OUT)
    assert path["8"].metrics["loss"].shown(FORGET[0]) < path["removed"].metrics["loss"].shown(FORGET[0])


def test_the_printed_table_says_stage_interval_and_chance(model):
    path = rl.track(model, FACTS, training(model, (2,)), arm="relearn")
    lines = repr(path).splitlines()
    assert lines[0] == "relearn, seed 0: accuracy (share answered right, 0 to 1), intervals over keys"
    assert [line.split()[0] for line in lines[2:5]] == ["removed", "2", "chance"]
    shown = path["2"].metrics["loss"]
    low, high = shown.interval(HELD_OUT)
    assert f"{shown.shown(HELD_OUT):.2f} [{low:.2f}, {high:.2f}]" in path.table()
    other = rl.track(model, FACTS, [])
    assert "loss (relearn)" in path.table(beside={"twin": other})
    assert "loss (twin)" in path.table(beside={"twin": other})
    assert "forget_held_out" in path._repr_html_()


def test_a_difference_between_two_models_is_paired_over_keys(model):
    first = rl.measure(model, FACTS).metrics["loss"]
    for _ in training(model):
        pass
    second = rl.measure(model, FACTS).metrics["loss"]
    gap = over_sentences(np.subtract, HELD_OUT, second, first)
    assert gap.n == 4
    assert gap.over.startswith("4 keys")
    assert gap.value == pytest.approx(first.shown(HELD_OUT) - second.shown(HELD_OUT))


def test_recovery_reads_facts_as_it_reads_labelled_text(model):
    for _ in train_(model, text(model, FORGET[0]), steps=(30,), lr=1e-2, batch_size=64, seed=1):
        pass
    before = rl.measure(model, FACTS)
    kept = {name: value.clone() for name, value in model.weights().items()}
    with rl.taught.torch.no_grad():
        for value in model.weights().values():
            value.mul_(0.5) if value.is_floating_point() else None
    path = rl.track(model, FACTS, training(model), before=before)
    model.load_weights(kept)
    share = recovery.recovery([path.by("loss")], FORGET[0], "8")
    base, start, end = (path[s].metrics["loss"].value(FORGET[0]) for s in ("base", "removed", "8"))
    assert share.share is not None
    assert share.share.value == pytest.approx((end - start) / (base - start))
    assert "keys" in share.share.over
    with pytest.raises(ValueError, match=r"'depth' was not measured at this stage; measured: accuracy, loss"):
        path.by("depth")


def test_stages_that_are_the_same_are_warned_of_and_of_one_name_refused(model):
    with pytest.warns(UserWarning, match=r"stages 'removed' and '1' measure the same to the bit"):
        rl.track(model, FACTS, [rl.Checkpoint(1.0, 1, 0, 0.0)])
    with pytest.raises(ValueError, match=r"two checkpoints are of stage 1; each stage needs a name of its own"):
        rl.track(model, FACTS, itertools.chain(training(model, (1,)), training(model, (1,))))


def test_metrics_are_looked_up_at_the_call(model):
    with pytest.raises(ValueError, match=r"unknown metric 'rouge'; known: accuracy, loss, choice"):
        rl.measure(model, FACTS, metrics=["rouge"])
    with pytest.raises(ValueError, match=r"metrics need at least one, and each name once; got \['accuracy', 'ac"):
        rl.track(model, FACTS, iter(()), metrics=["accuracy", Accuracy()])
    with pytest.raises(ValueError, match=r"the reference is the model itself, which changes while it is trained"):
        rl.measure(model, FACTS, reference=Reference(base=model))


def test_grafts_of_a_path_are_those_between_its_ends(model, make, untouched):
    start = {name: value.clone() for name, value in model.weights().items()}
    other = make()
    twin = rl.track(other, FACTS, training(other, (2,)), keep_weights=True)
    path = rl.track(model, FACTS, training(model, (8,)), keep_weights=True)
    with untouched(model):
        grafts = rl.grafts(path, controls={"twin": twin})
    asked = ask(FACTS, roles=[HELD_OUT])
    asked = asked.where([place == HELD_OUT for place in asked.places])
    by_hand = rl.grafts(
        model, start, model.weights(), lambda _: rl.measure(model, asked, metrics=["loss"]).metrics, label=HELD_OUT
    )
    assert grafts.label == HELD_OUT
    assert grafts.outcomes == ("loss", "accuracy", "extraction")
    assert grafts.parts == by_hand.parts
    for part in grafts.parts:
        assert grafts.value(grafts.alone[part]) == by_hand.value(by_hand.alone[part])
    assert set(grafts.controls["twin"]) == set(grafts.parts)


def test_a_path_without_weights_has_no_grafts(model):
    with pytest.raises(ValueError, match=r"the path kept no weights to graft; track it with keep_weights=True"):
        rl.grafts(rl.track(model, FACTS, []))


def test_grafts_of_labelled_text_need_the_path_alone(toy_model):
    tagger = toy_model.tagger
    kept = {name: value.clone() for name, value in tagger.weights().items()}
    place = rl.Concept("place")
    cut = rl.measure(tagger, toy_model.corpus, place, site="mlp_post").saliency.top(4)
    rl.prune_(tagger, cut)
    as_cut = {name: value.clone() for name, value in tagger.weights().items()}
    path = rl.track(
        tagger, toy_model.corpus, place, rl.retrain_(tagger, toy_model.corpus, steps=[2], seed=0), removed=cut,
        site="mlp_post", keep_weights=True,
    )  # fmt: skip
    grafts = rl.grafts(path)
    by_hand = rl.grafts(
        tagger, as_cut, tagger.weights(), lambda m: rl.evaluate(m, toy_model.corpus).margin, label=("place",),
        cut=rl.WeightMask.of(tagger, cut),
    )  # fmt: skip
    tagger.load_weights(kept)
    assert grafts.parts == by_hand.parts
    assert grafts.parts[-1] == "cut"
    assert [grafts.value(grafts.alone[p]) for p in grafts.parts] == [
        by_hand.value(by_hand.alone[p]) for p in grafts.parts
    ]
