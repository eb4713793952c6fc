"""Calls as a person writes them before having read much: what works, and what the others say."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import relearn_lens
import relearn_lens as rl
import relearn_lens.reproduce
from relearn_lens import methods
from relearn_lens.measure.tracking import track_text
from relearn_lens.models.model import bridge_of, encoded_for
from relearn_lens.names import explained, nearest
from relearn_lens.neurons.weights import set_of
from relearn_lens.show.plots.style import arm_of
from relearn_lens.text.concept import concept_of
from relearn_lens.text.corpus import Splits
from tests.fixtures import unchecked
from tests.made import small_people


@pytest.fixture(scope="module")
def splits() -> Splits:
    return rl.toy.corpus(sentences=60).split(seed=0)


@pytest.fixture(scope="module")
def before(toy_model) -> rl.Snapshot:
    return rl.measure(toy_model.tagger, toy_model.corpus, "place", site="mlp_post", what="dprime")


def test_nearest_name_in_any_case_and_by_its_last_part():
    assert nearest("MiniLM", ["minilm", "smollm2"]) == "minilm"
    assert nearest("fraction", ["data.parts", "prune.fraction"]) == "prune.fraction"
    assert nearest("magic", ["minilm", "smollm2"]) is None


def test_a_name_that_the_package_lacks_suggests_one():
    with pytest.raises(AttributeError, match="relearn_lens has no attribute 'prune'; did you mean 'prune_'"):
        _ = rl.prune  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("part", "wrong", "near"),
    [
        ("remove", "NOP", "NPO"), ("relearn", "Finetune", "FineTune"), ("find", "lookup", "Lookup"),
        ("plots", "recovry_curves", "recovery_curves"), ("facts", "peple", "people"), ("sources", "fetsh", "fetch"),
        ("bench", "Bensh", "Bench"), ("sweeps", "Swepd", "Swept"), ("taught", "lod", "load"),
    ],
)  # fmt: skip
def test_a_name_that_a_part_of_the_package_lacks_suggests_one(part, wrong, near):
    with pytest.raises(AttributeError, match=f"has no attribute '{wrong}'; did you mean '{near}'"):
        getattr(getattr(rl, part), wrong)


def test_every_module_of_the_package_tells_what_it_has():
    for name in dir(rl):
        if isinstance(part := getattr(rl, name), ModuleType):
            with pytest.raises(
                AttributeError, match=f"^{re.escape(part.__name__)} has no attribute 'qqqq'(; it has|$)"
            ):
                _ = part.qqqq
    assert not hasattr(rl.facts, "__wrapped__")  # what Python itself asks for is no mistake of a name
    for package in (relearn_lens.text, relearn_lens.models, relearn_lens.reproduce):
        with pytest.raises(AttributeError, match="has no attribute 'qqqq'; it has "):
            _ = package.qqqq


def test_a_function_stays_one_where_a_package_has_its_name():
    module = importlib.import_module("relearn_lens.measure")
    assert callable(rl.measure)
    relearn_lens.measure = module  # as Python does when it is imported
    assert callable(rl.measure)


def test_why_a_public_name_cannot_be_imported_is_said(monkeypatch):
    def broken(name: str) -> object:
        raise AttributeError(f"{name} needs what is not there")

    monkeypatch.delitem(vars(rl.find), "Lookup", raising=False)
    monkeypatch.setitem(vars(rl.find), "__getattr__", broken)
    with pytest.raises(AttributeError, match="Lookup needs what is not there"):
        _ = rl.find.Lookup


def test_a_table_by_name_says_what_it_has(toy_model, before):
    scores = rl.evaluate(toy_model.tagger, toy_model.corpus)
    run = rl.Run(rl.preset("toy"), {"concept": []})
    for table, wrong, near in (
        (before.f1, "plase", "place"),
        (scores.recall, "persn", "person"),
        (run.arms, "concep", "concept"),
    ):
        with pytest.raises(KeyError, match=f"unknown name '{wrong}'; did you mean '{near}'\\? Known: "):
            table[wrong]
        assert wrong not in table
        assert table.get(wrong) is None


def test_a_preset_of_nearly_its_name_is_suggested():
    with pytest.raises(ValueError, match="unknown preset 'toi'; did you mean 'toy'"):
        rl.run("toi")


def test_a_concept_is_said_by_its_name(toy_model, before):
    by_object = rl.measure(toy_model.tagger, toy_model.corpus, rl.Concept("place"), site="mlp_post")
    assert before.saliency.concept == "place"
    assert bool((before.saliency.score == by_object.saliency.score).all())
    with pytest.raises(ValueError, match="its labels are O, person, place; did you mean 'place'"):
        rl.measure(toy_model.tagger, toy_model.corpus, "places")


def test_what_takes_one_name(toy_model, before):
    assert list(before.also) == ["dprime"]
    with pytest.raises(ValueError, match="unknown measurement 'dprim'; did you mean 'dprime'\\? Known: probeless"):
        rl.measure(toy_model.tagger, toy_model.corpus, "place", what="dprim")


def test_top_of_a_share_says_fraction(before):
    with pytest.raises(ValueError, match=r"k is a number of neurons, got 0.5; .* top\(fraction=0.5\)"):
        unchecked(type(before.saliency).top)(before.saliency, 0.5)


def test_a_split_where_one_part_is_wanted_names_the_parts(toy_model, splits):
    with pytest.raises(ValueError, match=r"one text is wanted, got the three parts of 'toy': give \.train"):
        unchecked(rl.encode)(splits, toy_model.tagger.tokenizer)


def test_a_split_says_which_of_its_parts_has_what_it_lacks(splits):
    with pytest.raises(AttributeError, match=r"a split has no 'label_names', its parts have: take \.train"):
        _ = splits.label_names
    assert splits._replace(train=splits.probe).train is splits.probe


def test_prune_takes_pairs_of_layer_and_index(toy, untouched):
    chosen = rl.Neurons.of(rl.site_of(toy.tagger.bridge, "mlp_post"), toy.planted)
    with rl.ablated(toy.tagger, toy.planted, site="mlp_post"):
        ablated = rl.evaluate(toy.tagger, toy.corpus).f1
    rl.prune_(toy.tagger, toy.planted, site="mlp_post")
    mask = rl.WeightMask.of(toy.tagger, chosen)
    weights = toy.tagger.plain()
    assert all(bool((weights[name][mask[name]] == 0).all()) for name in mask.weights())
    assert rl.evaluate(toy.tagger, toy.corpus).f1 == pytest.approx(ablated)
    assert ablated["place"] < 0.1


def test_neurons_are_told_by_name_or_pair_alone_or_together(toy_model):
    site = rl.site_of(toy_model.tagger.bridge, "mlp_post")
    one = rl.Neurons.of(site, [("1", 7)])
    for same in ("L1N7", (1, 7), ["L1N7"], [(1, 7)], next(iter(one))):
        assert rl.Neurons.of(site, same) == one
    assert rl.Neurons.of(site, ("L1N7", "L2N3")) == rl.Neurons.of(site, [(1, 7), (2, 3)])
    assert set_of(toy_model.tagger, "L1N7", "mlp_post") == one
    with pytest.raises(ValueError, match=r"7 is no neuron; give \(layer, index\), or its name, such as 'L1N0'"):
        unchecked(rl.Neurons.of.__func__)(rl.Neurons, site, [7])
    with pytest.raises(ValueError, match="'1:7' is no name of a neuron; write L<layer>N<index>"):
        rl.Neurons.of(site, "1:7")


def test_what_stands_in_the_wrong_place_is_named(toy_model, before):
    tagger, text = toy_model.tagger, toy_model.corpus
    path = rl.Trajectory({"base": before, "pruned": before, "8": before}, arm="mine")
    for function, arguments, says in (
        (encoded_for, (text, text), r"the first argument is a model \(load_tagger, .* got a Corpus"),
        (concept_of, (["place"],), "a concept is wanted, by name or as a Concept, got a list"),
        (
            rl.Concept.__post_init__,
            (SimpleNamespace(name=["place", "person"]),),
            r"a concept has one name, got \['place', 'person'\]",
        ),
        (track_text, (tagger, text, "place", rl.Training()), "track goes through a training .* got a Training"),
        (methods.of, (rl.Training, "place", {}), r"how is a Training\(\.\.\.\), or left out, got 'place'"),
        (rl.encode, ("a.conll", tagger.tokenizer), r"a labelled text is wanted, got a str: .*read_conll"),
        (rl.explore, ("runs/toy",), r"a run is wanted, got a name: load_run\('runs/toy'\)"),
        (rl.plots.grafts, (path,), r"a run is wanted \(rl\.run, rl\.load_run\), got a Trajectory; .* recovery_curves"),
    ):
        with pytest.raises(ValueError, match=says):
            unchecked(function)(*arguments)
    with pytest.raises(ValueError, match="a set of neurons is wanted as like=, got a list"):
        unchecked(rl.random_neurons)(like=[(1, 7)], seed=0)


def test_prune_refuses_what_is_no_set(toy_model, before, untouched):
    with untouched(toy_model.tagger):
        with pytest.raises(ValueError, match=r"a set of neurons is wanted, got a Saliency, .* \.top\(fraction=0.05\)"):
            unchecked(set_of)(toy_model.tagger, before.saliency)
        with pytest.raises(ValueError, match="mlp_post has no neuron 999 in layer 0; layers 0, 1, 2, 3, neurons 0 to"):
            rl.prune_(toy_model.tagger, [(0, 999)], site="mlp_post")
        mask = rl.WeightMask.none(toy_model.tagger)
        with (
            pytest.raises(ValueError, match=r"ablated\(\) holds activations, so it takes neurons"),
            unchecked(rl.ablated)(toy_model.tagger, mask),
        ):
            pass


def test_a_stage_that_is_not_there_lists_those_that_are(before):
    path = rl.Trajectory({"base": before, "pruned": before, "8": before})
    assert path[8] is path["8"] is before
    with pytest.raises(KeyError, match="no stage '2'; the stages are base, pruned, 8"):
        path["2"]


def test_a_training_that_was_never_begun_says_so(toy, splits):
    training = rl.retrain_(toy.tagger, splits.train, epochs=1)
    assert "not begun: it trains while it is gone through" in repr(training)
    with pytest.warns(RuntimeWarning, match="this retraining was made and never begun, so nothing was trained"):
        del training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training = rl.retrain_(toy.tagger, splits.train, epochs=1)
        next(training)
        assert repr(training).endswith("steps, under way)")
        del training
        stopped = rl.retrain_(toy.tagger, splits.train, epochs=1)
        stopped.close()
        del stopped


def test_run_takes_a_preset_and_changes():
    run = rl.run(
        "toy", seeds=[3], arms=["concept"], data={"train_sentences": 32, "probe_sentences": 40},
        finetune={"epochs": 0.5}, retrain={"steps": [1]}, prune={"control_draws": 0}, grafts={"skip": True}, rounds=0,
    )  # fmt: skip
    assert (run.experiment.seeds, list(run.arms), run.arms["concept"][0].stages) == (
        (3,), ["concept"], ("base", "pruned", "1"),
    )  # fmt: skip
    assert run.experiment.prune.fraction == rl.preset("toy").prune.fraction


@pytest.mark.parametrize(
    "call",
    [
        lambda: rl.Experiment(fraction=0.1),  # pyright: ignore[reportCallIssue]
        lambda: rl.run("toy", fraction=0.1),
        lambda: rl.settings_of(rl.preset("toy"), {"fraction": 0.1}),
    ],
)
def test_settings_suggest_the_dotted_key(call):
    with pytest.raises(ValueError, match=r"unknown setting 'fraction'; did you mean 'prune\.fraction'\? Known: model"):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: rl.settings_of({"prune.fractoin": 0.1}),
            r"unknown setting 'prune.fractoin'; did you mean 'prune.frac",
        ),
        (lambda: rl.run({"modl": "toy"}), "unknown setting 'modl'; did you mean 'model'"),
        (lambda: rl.settings_of({"preset": "tou"}), "unknown preset 'tou'; did you mean 'toy'"),
        (
            lambda: unchecked(rl.settings_of)(3),
            "a preset's name, a TOML file's path, a mapping or other settings is wanted, got a int",
        ),
        (
            lambda: unchecked(rl.settings_of)("toy", ["rounds=2"]),
            r"changes are a mapping, .* got a list; texts of key=value are",
        ),
        (
            lambda: unchecked(rl.preset)(rl.Experiment()),
            r"a preset is told by its name, got a Experiment; settings_of\(\) takes more",
        ),
        (lambda: rl.settings_of("toy", {"prune.which": "mosst"}), "'least' or 'by_family'; did you mean 'most'"),
    ],
)
def test_what_is_no_settings_is_told_what_is(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("method", "given", "fields", "says"),
    [
        (
            rl.Training,
            (),
            {"schedule": "linea"},
            "schedule = 'linea': .* 'linear' or 'constant'; did you mean 'linear'",
        ),
        (
            rl.remove.NPO,
            (),
            {"beta": 0, "bet": 1},
            r"beta = 0: .*greater than 0; NPO has no field 'bet'; .*mean 'beta'",
        ),
        (rl.relearn.FineTune, (), {"lorra": 8}, "FineTune has no field 'lorra'; it has .*; did you mean 'lora'"),
        (rl.Training, (3,), {}, r"the fields of a Training are given by name: Training\(epochs=\.\.\.\)"),
    ],
)
def test_a_method_that_is_made_wrong_is_told_in_one_line(method, given, fields, says):
    with pytest.raises(ValueError, match=says) as caught:
        method(*given, **fields)
    assert "\n" not in str(caught.value)


def test_settings_of_a_mapping_and_of_one_text():
    changed = rl.settings_of({"preset": "toy", "prune": {"fraction": 0.5}, "rounds": 2})
    assert changed == rl.settings_of("toy", {"prune.fraction": 0.5}, sets="rounds=2")
    assert rl.settings_of({"seeds": [3]}, {"seeds": [4]}) == rl.settings_of("names", {"seeds": [4]})


def test_settings_of_settings_change_what_is_said():
    toy = rl.preset("toy")
    assert rl.settings_of(toy) == toy
    assert rl.settings_of(toy, {"prune.fraction": 0.5, "retrain": {"epochs": 2}}) == rl.settings_of(
        "toy", {"prune.fraction": 0.5, "retrain.epochs": 2}
    )


def test_recovery_curves_take_a_trajectory_or_several(before):
    def path(arm: str, seed: int) -> rl.Trajectory:
        return rl.Trajectory({"base": before, "pruned": before, "8": before}, arm=arm, seed=seed)

    one: Any = rl.plots.recovery_curves(path("mine", 0))
    assert [trace.name for trace in one.data if trace.name] == ["mine"]
    both: Any = rl.plots.recovery_curves([path("mine", 0), path("mine", 1), path("theirs", 0)])
    lines = {trace.name: trace for trace in both.data if trace.name}
    assert list(lines) == ["mine", "theirs"]
    assert lines["mine"].line.color != lines["theirs"].line.color
    named: Any = rl.plots.recovery_curves({"first": path("mine", 0), "second": [path("mine", 0), path("mine", 1)]})
    assert [trace.name for trace in named.data if trace.name] == ["first", "second"]
    with pytest.raises(ValueError, match="no arm 'third' in this run; it has first, second"):
        rl.plots.pruned_share({"first": path("mine", 0), "second": path("mine", 1)}, arm="third")
    assert "over 2 seeds" in str(both.layout.title.subtitle.text) or "sentences" in str(both.layout.title.subtitle.text)


def test_sample_with_a_share_that_holds_the_concept(splits):
    place = rl.Concept("place")
    for concept in (place, "place"):
        drawn = splits.train.sample(10, seed=0, concept=concept, share=0.3)
        assert (drawn.n_sentences, int(place.held_by(drawn).sum())) == (10, 3)
    own = [any(word.label == "place" for word in sentence) for sentence in splits.train]
    assert np.array_equal(place.held_by(splits.train), own)
    every = splits.train.sample(10_000, seed=0, concept="place", share=1)
    assert every.n_sentences == splits.train.n_sentences
    for wrong, says in (
        ({"share": 0.5}, r"share = 0.5 of the sentences hold what\? Give concept="),
        ({"concept": "place", "share": 0}, "share = 0: above 0 and at most 1"),
        ({"concept": "plac"}, "unknown label 'plac'; did you mean 'place'"),
    ):
        with pytest.raises(ValueError, match=says):
            splits.train.sample(5, seed=0, **wrong)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("MiniLM", r"no model 'MiniLM': no folder, and no source \(minilm, smollm2\); did you mean 'minilm'\?"),
        ("toy", r"the planted toy is made by rl\.toy\.tagger\(\)"),
    ],
)
def test_a_model_by_nearly_its_name_is_said_at_once(monkeypatch, splits, name, says):
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=says):
        rl.load_tagger(name, labels=splits.train.label_names)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_there_is_not_is_said_before_a_model_is_read(device):
    wanted = "cpu, cuda, cuda:1 and so on, or mps is wanted" if device == "gpu" else "this machine has .* CUDA device"
    with pytest.raises(ValueError, match=f"device = '{device}': {wanted}"):
        rl.load_language_model("smollm2", device=device)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_a_dtype_that_is_none_of_weights_is_said_before_a_model_is_read(dtype):
    with pytest.raises(ValueError, match=r"dtype = .*: weights are torch\.float32, torch\.bfloat16 or torch\.float16"):
        unchecked(rl.load_bridge)("smollm2", dtype=dtype)


def test_what_is_no_path_or_another_one_is_told(tmp_path, toy_model):
    for call, value, wanted in (
        (rl.load_run, 3, "the path of a run's folder is wanted, got a int"),
        (rl.read_conll, ["a.conll", "b.conll"], "the path of one file is wanted, got a list"),
        (partial(unchecked(rl.read_splits), seed=0), None, "the path of one file or folder is wanted, got a NoneType"),
        (rl.vectors_from_file, {}, "the path of one file is wanted, got a dict"),
    ):
        with pytest.raises(ValueError, match=wanted):
            (call if isinstance(call, partial) else unchecked(call))(value)
    with pytest.raises(ValueError, match="the path of a new folder is wanted, got a list"):
        unchecked(rl.export)(toy_model.tagger, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"no run folder: there is no manifest\.json; these in it are: '.*mine'"
    ):
        rl.load_run(tmp_path)


def test_what_is_given_in_another_order_is_told(toy_model, before, untouched):
    tagger, text, top = toy_model.tagger, toy_model.corpus, before.saliency.top(2)
    calls: Any = (
        (bridge_of, (text,)), (encoded_for, (text, tagger)), (set_of, (top, tagger)), (rl.prune_, (top, tagger)),
        (rl.retrain_, (text, tagger)), (rl.attribute, (text, tagger, "place")), (rl.top_words, (text, tagger)),
        (rl.examples, (text, tagger, "L1N7")), (rl.find.locate, ("score", tagger, text)),
    )  # fmt: skip
    with untouched(tagger):
        for function, arguments in calls:
            # Some have a function within, whose types the test run checks first.
            says = r"the first argument is a model \(load_tagger|violates type| takes model: Model.*, got a "
            with pytest.raises((ValueError, TypeError), match=says):
                unchecked(function)(*arguments)
        with pytest.raises(
            ValueError, match=r"a tokenizer is wanted, got a Tagger, which has one: give its \.tokenizer"
        ):
            unchecked(rl.encode)(text, tagger)


def test_examples_take_a_neuron_by_its_name(toy_model):
    every = [
        rl.examples(toy_model.tagger, toy_model.corpus, n, site="mlp_post", k=2) for n in ("L1N7", ("1", 7), (1, 7))
    ]
    assert every[0] == every[1] == every[2]


def test_what_is_wrong_is_told_with_what_is_wanted(splits, before):
    text, path = splits.train, rl.Trajectory({"base": before, "pruned": before}, arm="mine")
    pair = "no list of (word, label, opens a span), such as [('Rome', 'place', True)]: "
    for function, arguments, keywords, says in (
        (rl.build_corpus, ([[("Rome", "place")]],), {"name": "x"}, f"sentence 0 of corpus 'x' is {pair}[('Rome', 'pl"),
        (rl.build_corpus, (["Rome"],), {"name": "x"}, f"sentence 0 of corpus 'x' is {pair}'Rome'"),
        (
            type(text).sample,
            (text, 0.5),
            {"seed": 0},
            "sentences = 0.5: how many are drawn at most, a whole number from",
        ),
        (
            type(text).split,
            (text,),
            {"seed": 0, "parts": (0.5, 0.5)},
            "split parts are three, of train, validation and probe, got (0.5, 0.5)",
        ),
        (arm_of, (before,), {}, "a run, a trajectory or several are wanted, got a Snapshot; load_run(folder) gives"),
        (arm_of, ("runs/toy",), {}, "a run, a trajectory or several are wanted, got a str; load_run(folder) gives the"),
        (rl.plots.verdicts, (path,), {}, "a run is wanted (rl.run, rl.load_run), got a Trajectory"),
        (rl.write_report, ("runs/toy", "x.html"), {}, "a run is wanted, got a name: load_run('runs/toy')"),
        (rl.write_report, ("x.html", path), {}, "a run is wanted, got a name: load_run('x.html')"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            unchecked(function)(*arguments, **keywords)


def test_a_mask_is_no_list_of_neurons(toy_model):
    site = rl.site_of(toy_model.tagger.bridge, "mlp_post")
    with pytest.raises(
        ValueError, match=r"a mask is made a set by Neurons\(mask, site\), of a bool tensor; got one of"
    ):
        unchecked(rl.Neurons.of.__func__)(rl.Neurons, site, torch.ones(4, 64))


class Wrong:
    """What wrong calls are made with."""

    tagger, lm = rl.toy.tagger(), rl.toy.language_model()
    text, facts = rl.toy.corpus(sentences=40), small_people()
    asked = facts.passages("forget_held_out", forms="statement")
    neurons = rl.Neurons.of(rl.site_of(tagger.bridge, "mlp_post"), [(1, 7)])
    weights = tagger.weights()


W: Any = Wrong
R: Any = rl


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: R.grafts("x"), r"grafts\(\) takes model: Model \| Trajectory .*, got 'x'; Model: load_tagger"),
        (lambda: R.battery(W.facts, W.lm), "battery() takes model: LanguageModel, got a Facts; LanguageModel: load_l"),
        (lambda: R.battery(W.lm, W.asked), "battery() takes facts: Facts, got a tuple; Facts: facts.people() or"),
        (lambda: R.choose(W.lm, "x"), "choose() takes passages: Sequence[Passage], got 'x'; Passage: facts.passages("),
        (lambda: R.answer(W.lm, W.facts), "answer() takes passages: Sequence[Passage] | EncodedPassages, got a Facts"),
        (lambda: R.answer(W.tagger, W.asked), "answer() takes model: LanguageModel, got a Tagger"),
        (lambda: R.known(W.lm, W.facts), "known() takes passages: Sequence[Passage], got a Facts"),
        (lambda: R.ask(W.lm), "ask() takes facts: Facts, got a LanguageModel"),
        (lambda: R.audit(W.tagger, W.facts), "audit() takes model: LanguageModel, got a Tagger"),
        (lambda: R.audit(W.lm, W.text), "audit() takes facts: Facts, got a Corpus"),
        (lambda: R.audit(W.lm, W.facts, original="base"), "audit() takes original: LanguageModel | None, got 'base'"),
        (lambda: R.measure(W.tagger, W.facts), "measure_facts() takes model: LanguageModel, got a Tagger"),
        (
            lambda: R.measure(W.lm, W.facts, reference=W.lm),
            "takes reference: Reference | None, got a LanguageModel; Reference: Reference(base=..., never=...)",
        ),
        (lambda: R.measure(W.tagger.bridge, W.text, "place"), "measure_text() takes model: Model, got a Transformer"),
        (lambda: R.track(W.lm, W.facts, 3), "track_facts() takes checkpoints: Iterable[Checkpoint], got 3"),
        (lambda: R.edited(W.facts, W.lm, W.lm, W.asked), "edited() takes model: LanguageModel, got a Facts"),
        (lambda: R.cross_patch(W.lm, W.lm, W.lm, W.asked), "cross_patch() takes into: Weights, got a LanguageModel; W"),
        (lambda: R.grafts(W.tagger, W.weights, W.weights, "f1"), "grafts_between() takes evaluate: Evaluate, got 'f1'"),
        (lambda: R.concept_words(W.tagger, "place"), "concept_words() takes corpus: Corpus, got a Tagger; Corpus: rea"),
        (lambda: R.top_words(W.tagger, W.text, k="x"), "top_words() takes k: int, got 'x'"),
        (lambda: R.class_stats(W.tagger, W.text, "place"), "class_stats() takes encoded: Encoded, got a Corpus"),
        (lambda: R.load_tagger("minilm", labels=3), "load_tagger() takes labels: Sequence[str], got 3"),
        (lambda: R.export("x", W.tagger), "export() takes model: Model, got 'x'"),
        (lambda: R.taught.load("x"), "load() takes facts: Facts | None, got 'x'"),
        (lambda: R.facts.people("x"), "people() takes seed: int, got 'x'"),
        (lambda: R.build_corpus(3, name="x"), "build_corpus() takes sentences: Iterable[Sequence[tuple[str, str, bo"),
        (lambda: R.Concept("x", labels=3), "Concept() takes labels: "),
        (lambda: R.Neurons([1, 2], W.neurons.site), "Neurons() takes mask: Bool[Tensor, 'layer neuron'], got [1, 2]"),
        (lambda: R.Neurons.of("mlp_post", "L1N7"), "Neurons.of() takes site: Site, got 'mlp_post'; Site: site_of(mod"),
        (lambda: R.WeightMask.of(W.tagger, [(1, 7)]), "WeightMask.of() takes neurons: Neurons, got [(1, 7)]"),
        (lambda: R.random_neurons(like=W.neurons, seed="x"), "random_neurons() takes seed: int, got 'x'"),
        (lambda: W.text.split(seed="x"), "Corpus.split() takes seed: int, got 'x'"),
        (lambda: R.encode(W.text, "minilm"), "a tokenizer is wanted, got a str; give a model's .tokenizer"),
        (lambda: R.remove.NPO()(W.facts, W.lm), "NPO() takes model: Model, got a Facts"),
        (lambda: R.remove.NPO()(W.lm, W.asked), "NPO() takes texts: Texts, got a tuple; Texts: facts, or {'forget'"),
        (lambda: R.METRICS["accuracy"]()(W.facts, W.lm), "Accuracy() takes model: LanguageModel, got a Facts"),
        (lambda: next(R.relearn.Quantised()(W.facts, W.lm)), "Quantised() takes facts: Material, got a LanguageModel"),
        (lambda: R.recovery.recovery(W.text, "place", "1"), "recovery() takes arms: Sequence[Arm], got a Corpus; Arm"),
        (lambda: R.migration.migration(W.text), "migration() takes arms: Mapping[str, Sequence[Trajectory]], got"),
        (lambda: R.published.compare(W.text), "compare() takes run: Run, got a Corpus; Run: run(...) or load_run("),
        (lambda: R.run("toy", out=3), "run() takes out: str | Path | None, got 3"),
        (lambda: R.bench.run("facts-toy", "x"), "run() takes bench: Bench, got 'facts-toy'; Bench: bench.bench_of("),
        (lambda: R.sweeps.run("x"), "run() takes sweep: Sweep, got 'x'; Sweep: sweeps.read(file)"),
        (lambda: R.battery(W.lm, W.facts, jailbreak=[]), "battery() has no argument 'jailbreak'; it has model, facts,"),
        (lambda: R.prune_(W.tagger, W.neurons, severed="out"), "did you mean 'sever'?"),
        *(
            (
                lambda call=call: call(),
                "is an empty set, so there is nothing to take or to hold; name a neuron at least",
            )
            for call in (
                lambda: R.prune_(W.tagger, []),
                lambda: R.prune_(W.tagger, W.neurons - W.neurons),
                lambda: R.held(W.tagger, []).__enter__(),
            )
        ),
    ],
)
def test_a_wrong_call_says_what_is_wanted_and_where_it_comes_from(call, says):
    with pytest.raises(ValueError, match=says if "\\" in says else re.escape(says)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_would_fail_later_or_not_at_all_is_told_at_the_call():
    removed = "removed= is the set that was pruned, Neurons.of(site, ...), got a list"
    for call, arguments, keywords, says in (
        (track_text, (W.tagger, W.text, "place", []), {"removed": [(1, 7)]}, removed),
        (R.train_, (W.tagger, W.text), {"objective": "loss"}, "objective is a function, or an object that is called"),
        (R.train_, (W.tagger, W.text), {"step": "sam"}, "step is a function, or an object that is called as one (see"),
        (R.Neurons.__or__, (W.neurons, W.tagger), {}, "neurons of mlp_post and of a Tagger cannot be combined"),
        (R.ReturnAlarm.__init__, (SimpleNamespace(), W.text), {}, "an alarm watches facts, or a text and a concept in"),
        (R.adapted, ("x",), {}, "the first argument is a model (load_tagger, load_bridge), got a str"),
        (R.computing, ("x", torch.bfloat16), {}, "the first argument is a model (load_tagger, load_bridge), got a str"),
    ):
        # Some have a function within, whose types the test run checks first.
        with (
            pytest.raises((ValueError, TypeError), match=f"{re.escape(says)}|violates type"),
            unchecked(call)(*arguments, **keywords),
        ):
            pass


def test_an_error_of_a_call_that_is_right_is_left_as_it_is():
    error = KeyError("mine")

    @explained
    def fails(seed: int, *args: str, evaluate: Callable[[], object] | None = None, **fields: int) -> None:
        raise error

    for arguments, keywords in (((1,), {}), ((1, "x"), {"of": 3}), ((1,), {"evaluate": print})):
        with pytest.raises(KeyError) as caught:
            fails(*arguments, **keywords)  # pyright: ignore[reportArgumentType]
        assert caught.value is error
    with pytest.raises(ValueError, match=r"fails\(\) takes seed: int, got 'x'") as wrong:
        fails("x")  # pyright: ignore[reportArgumentType]
    assert wrong.value.__cause__ is error


@pytest.mark.parametrize(
    ("module", "table", "wrong", "near"),
    [
        ("measure.metrics", "METRICS", "acuracy", "accuracy"), ("relearn.attacks", "ATTACKS", "latnt", "latent"),
        ("remove.removers", "REMOVERS", "nop", "npo"),
        ("remove.removers", "WRAPPERS", "sma", "sam"), ("remove.recipes", "RECIPES", "tou", "toy"),
        ("find.localisers", "LOCALISERS", "lokup", "lookup"), ("find.saliency", "SCORES", "dprim", "dprime"),
        ("find.targets", "TARGETS", "logt", "logit"), ("find.quadrature", "QUADRATURES", "rieman", "riemann"),
        ("neurons.sites", "SITES", "mlppost", "mlp_post"), ("sources", "SOURCES", "minlm", "minilm"),
        ("runs.presets", "PRESETS", "tou", "toy"), ("runs.arms", "ARMS", "concpt", "concept"),
        ("bench.plan", "PRESETS", "fact-toy", "facts-toy"), ("bench.sweeps", "ENGINES", "rya", "ray"),
    ],
)  # fmt: skip
def test_a_table_that_lacks_a_name_suggests_one(module, table, wrong, near):
    names = getattr(importlib.import_module(f"relearn_lens.{module}"), table)
    with pytest.raises(KeyError, match=f"unknown name '{wrong}'; did you mean '{near}'"):
        names[wrong]


def test_a_course_by_stages_says_which_it_has():
    course = rl.FactsTrajectory({"base": rl.FactsSnapshot({})}, rl.ask(W.facts))
    assert course["base"] is course.snapshots["base"]
    with pytest.raises(KeyError, match="unknown name 'bas'; did you mean 'base'"):
        course["bas"]


# --- what they print


def test_objects_print_in_a_line_with_their_units(toy_model, before):
    tagger = toy_model.tagger
    assert repr(tagger) == (
        "Tagger(TransformerLensNative: 4 blocks of 32, 37,286 weights, labels O, person, place; on cpu)"
    )
    top = before.saliency.top(20)
    counts = ", ".join(f"{layer}: {n}" for layer, n in top.per_layer().items() if n)
    assert repr(top) == f"Neurons(mlp_post, 20 of 256; by layer {counts})"
    assert repr(before).startswith("Snapshot(F1 person 1.000, place 1.000, overall 1.000; probeless highest L1N")
    pause = rl.Checkpoint(epoch=1 / 3, step=12, tokens_seen=1728, loss=0.464912345, parts={"loss": 0.464912345})
    assert repr(pause) == "Checkpoint(step 12, epoch 0.333, 1,728 tokens, loss 0.4649 nats per sub-word)"
    assert repr(rl.Checkpoint(1.0, 3, 9, 2.0, {"forget": 1.5, "retain": 0.5})).endswith(
        "loss 2, forget 1.5, retain 0.5)"
    )
    assert repr(rl.preset("toy")) == (
        "Experiment(toy, toy, concept place, site mlp_post; arms concept, other, random, unpruned, never; 3 seeds; "
        "10 more changed)"
    )
    assert repr(rl.preset("names")).endswith("never; 3 seeds)")


def test_objects_show_the_same_in_a_notebook(toy_model, before):
    owes = rl.attribute(toy_model.tagger, toy_model.corpus, "place", site="mlp_post", sentences=8, steps=4)
    best = next(iter(owes.saliency().top(1)))
    layer = owes.site.layers.index(best.layer)
    alone, without = ({"block 0": {"margin": a}, "block 1": {"margin": b}} for a, b in ((2.0, -1.0), (0.0, 3.0)))
    grafted = rl.Grafts(
        tuple(alone), {"margin": -1.0}, {"margin": 3.0}, alone, without, {"random": {"block 0": {"margin": -0.92}}},
        noise=0.1,
    )  # fmt: skip
    for shown, parts in (
        (before, ("strict span F1, 0 to 1", "1.000 to 1.000", "place")),
        (before.saliency.top(4), ("layer", "neurons", "L1N")),
        (owes, (str(best), f"{owes.score[layer, best.index]:+.4g}", "logit per word")),
        (rl.settings_of("toy", {"seeds": [7, 9]}), ("seeds", "7, 9", "0, 1, 2", "retrain.lr")),
        (before.scores, ("strict span F1, 0 to 1", "person", "1.000 to 1.000")),
        (grafted, ("margin: -1 cut, 3 retrained", "most of its controls", "block 0", "75 %", "2 %")),
        (replace(grafted, retrained={"margin": -0.95}), ("block 0", "refused", "noise")),
    ):
        html = shown._repr_html_()
        assert all(part in html for part in parts), html


def test_corpus_shows_each_span_once_in_its_labels_colour():
    corpus = rl.build_corpus(
        [[("Simon", "person", True), ("Peter", "person", False), ("Paul", "person", True), ("in", "O", False),
          ("Rome", "place", True)]], name="tiny",
    )  # fmt: skip
    spans = [("Simon Peter", "person"), ("Paul", "person"), ("in", "O"), ("Rome", "place")]
    assert corpus.spans(0) == spans
    html = corpus._repr_html_()
    assert html.count("border-bottom:2px solid #D55E00") == 2
    assert html.count("border-bottom:2px solid #0072B2") == 1


@pytest.mark.parametrize("members", [3, [(1, 2, 3)], [[3]], [None]])
def test_neurons_say_what_is_none(toy_model, members):
    with pytest.raises(ValueError, match=r"is no neuron; give \(layer, index\), or its name, such as 'L1N0'"):
        unchecked(rl.Neurons.of)(rl.Neurons, rl.site_of(toy_model.tagger.bridge, "resid"), members)
