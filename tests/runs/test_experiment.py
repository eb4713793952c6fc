"""The experiment on the toy: what is checked before training, what every arm begins from, and what comes of it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from relearn_lens import progress
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.evaluation import evaluate
from relearn_lens.models import toy
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Neurons, Site
from relearn_lens.remove.ablation import prune_
from relearn_lens.runs import experiment as module
from relearn_lens.runs.events import (
    Again,
    ArmDone,
    Base,
    Blocked,
    Cuts,
    Damage,
    Event,
    Grafted,
    GraftedAt,
    Measured,
    Paused,
    Prepared,
    SeedDone,
    Sized,
    Weighed,
)
from relearn_lens.runs.experiment import first_back, perform, seed_for
from relearn_lens.runs.needs import peak_rss_mb
from relearn_lens.runs.preparation import prepare
from relearn_lens.runs.protocol import choose, control_of, placed
from relearn_lens.runs.results import Run
from relearn_lens.runs.texts import together
from tests.analysis.test_story import trajectory
from tests.made import arms_in, tiny


@pytest.fixture(scope="module")
def events(made) -> list[Event]:
    """All events of one small run."""
    return made[2]


def result_of(events: list[Event], kind: type) -> Any:
    return next(event for event in events if isinstance(event, kind))


# --- before any training


@pytest.fixture
def write(tmp_path):
    """A folder with train, dev and test files of `word label` lines."""

    def save(**parts: str):
        for name, text in parts.items():
            (tmp_path / f"{name}.conll").write_text(text)
        return f"conll:{tmp_path}"

    return save


BOTH = "in O\nTarn B-place\nwas O\nMira B-person\n\nMira B-person\nleft O\n\n"
NO_PLACE = "Mira B-person\nleft O\n\n"


@pytest.fixture
def no_training(monkeypatch):
    def train(*_, **__):
        raise AssertionError("training began")

    for name in ("train_", "retrain_"):
        monkeypatch.setattr(module, name, train)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "./no/such/folder"}, ValueError, "no model folder at './no/such/folder'"),
        ({"corpus": "nothing"}, ValueError, r"no corpus is called 'nothing'.*bsb-names.*conll:PATH.*hf:NAME"),
        ({"corpus": "conll:/no/such/file"}, FileNotFoundError, "/no/such/file does not exist"),
        ({"site": "attention"}, ValueError, "unknown site 'attention'; known: resid, mlp_post"),
        ({"score": "magic"}, ValueError, "unknown score 'magic'; known: .*probeless"),
        ({"concept": "river"}, ValueError, "no label 'river' for concept 'river'; its labels are O, person, place"),
        ({"concept": ("place", "river")}, ValueError, r"no label 'river' for concept 'place\+river'"),
    ],
)
def test_unknown_name_is_refused_before_training(no_training, changes, error, message):
    with pytest.raises(error, match=message):
        list(perform(tiny(**changes)))


def test_unknown_model_of_the_hub_is_refused_before_training(no_training, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cannot load model 'no-such-model'.*no source \(.*minilm.*no local folder"):
        list(perform(tiny(model="no-such-model")))


@pytest.mark.parametrize("part", ["train", "test"])
def test_label_without_words_is_refused_before_training(no_training, write, part):
    files = {"train": BOTH * 3, "dev": BOTH, "test": BOTH} | {part: NO_PLACE * 3}
    with pytest.raises(
        ValueError, match=r"(no word of corpus '.*' \(6 words\) carries|has no label 'place' for) concept 'place'"
    ):
        list(perform(tiny(corpus=write(**files))))  # fmt: skip


def test_label_that_the_draw_leaves_out_is_refused_before_training(no_training, write):
    # One sentence in forty has the concept, and two are drawn as they come.
    text = NO_PLACE * 20 + BOTH + NO_PLACE * 20
    changes = {
        "data__concept_share": None,
        "corpus": write(train=BOTH, dev=BOTH, test=text),
        "data__probe_sentences": 2,
    }
    sets = ["data.concept_share=none"]
    made = tiny(sets, **changes)
    with pytest.raises(ValueError, match=r"no word of corpus .* carries concept 'place'.*larger or another probe"):
        list(perform(made))


def test_site_that_cannot_be_pruned_as_asked_is_refused_before_training(no_training):
    with pytest.raises(ValueError, match=r"site 'resid' of a .* no weights to prune .*'mlp_post'"):
        list(perform(tiny(site="resid", prune__sever="out")))


def test_site_that_cannot_be_pruned_serves_where_nothing_is(no_training):
    assert len(prepare(tiny(site="resid", arms=("unpruned",))).site.layers) == toy.N_LAYERS + 1


def test_toy_model_refuses_other_labels(no_training, write):
    text = BOTH + "sea B-water\n\n"
    with pytest.raises(
        ValueError, match=r"model 'toy' knows the labels \('O', 'person', 'place'\) of corpus 'toy', not"
    ):
        list(perform(tiny(corpus=write(train=text, dev=text, test=text))))  # fmt: skip


# --- which sentences


def holding(ready: Prepared) -> list[float]:
    """Share of each part's sentences with a place in them."""
    shares = []
    for part in (ready.train, ready.validation, ready.probe):
        shares.append(np.mean([any(word.label == "place" for word in sentence) for sentence in part.corpus]))
    return [float(share) for share in shares]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_concept_share_is_the_share_of_the_sentences_drawn(share):
    ready = prepare(tiny(data__concept_share=share, data__validation_sentences=20, data__probe_sentences=32))
    assert [len(p.corpus) for p in (ready.train, ready.validation, ready.probe)] == [64, 20, 32]
    assert holding(ready) == pytest.approx([share] * 3)


def test_concept_share_of_none_takes_sentences_as_they_come():
    ready = prepare(tiny(["data.concept_share=none", "data.train_sentences=300"]))
    every = toy.corpus().labelled()
    usual = np.mean([any(word.label == "place" for word in sentence) for sentence in every])
    assert holding(ready)[0] == pytest.approx(usual, abs=0.06)


def test_concept_share_is_met_as_far_as_the_text_goes():
    ready = prepare(tiny(data__concept_share=1))
    assert holding(ready) == [1, 1, 1]
    few = prepare(tiny(data__concept_share=0.9, data__probe_sentences=10_000))
    assert len(few.probe.corpus) < 200


def test_only_labelled_sentences_are_drawn_unless_said():
    def bare(ready: Prepared) -> int:
        return sum(all(word.label == "O" for word in sentence) for sentence in ready.train.corpus)

    assert bare(prepare(tiny())) == 0
    assert bare(prepare(tiny(data__labelled_only=False, data__train_sentences=300))) > 0


def test_no_sentence_is_in_two_parts():
    ready = prepare(tiny(data__train_sentences=300, data__validation_sentences=150, data__probe_sentences=150))
    drawn = [part.corpus.group.tolist() for part in (ready.train, ready.validation, ready.probe)]
    assert len({group for part in drawn for group in part}) == sum(map(len, drawn)) > 400


def test_draw_depends_on_split_seed_alone():
    one, same, other = prepare(tiny()), prepare(tiny(seeds=(5,))), prepare(tiny(data__split_seed=1))
    assert one.inputs == same.inputs
    assert one.inputs["sentences:train"] != other.inputs["sentences:train"]


def test_inputs_hash_the_files_of_a_corpus(write, tmp_path):
    def hashes() -> dict[str, str]:
        return dict(prepare(tiny(corpus=corpus)).inputs)

    corpus = write(train=BOTH * 9, dev=BOTH * 9, test=BOTH * 9)
    before = hashes()
    assert {key.partition(":")[0] for key in before} == {"sentences", "corpus"}
    assert len([key for key in before if key.startswith("corpus:")]) == 3
    (tmp_path / "test.conll").write_text(BOTH * 9 + "\n")
    after = hashes()
    assert [key for key in before if before[key] != after[key]] == [k for k in before if k.endswith("test.conll")]


def test_inputs_of_the_toy_are_its_sentences_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("nothing to do with it")
    (tmp_path / "toy").write_text("nor this")
    assert set(prepare(tiny()).inputs) == {"sentences:train", "sentences:validation", "sentences:probe"}


def test_long_sentences_are_told(write):
    long = "the O\n" * 40 + "Tarn B-place\n\n"
    corpus = write(train=BOTH * 9 + long, dev=BOTH * 9, test=BOTH * 9)
    assert any(re.search("train.*: 1 sentence.*longer.*split", note) for note in prepare(tiny(corpus=corpus)).notes)
    cut = prepare(tiny(corpus=corpus, data__long="truncate")).notes
    assert any(re.search("1 sentence.*truncated", note) for note in cut)
    assert any(re.search("9 word.*cut off", note) for note in cut)
    with pytest.raises(ValueError, match="longer than the model's context"):
        prepare(tiny(corpus=corpus, data__long="error"))


# --- the order of things


def test_events_come_in_order(events):
    stages = ("base", "pruned", "6", "10")
    arm = [*((Measured, stage) for stage in stages), (ArmDone, None)]
    cut_alone = [each for each in arm if each[1] not in stages[2:]]
    want = [(Prepared, None), (Base, None), (Sized, None), (Cuts, None), *arm, (Damage, None), *cut_alone, *arm * 3]
    want += [(GraftedAt, None), (GraftedAt, None), (Grafted, None), (Again, None), (SeedDone, None)]
    told = [event for event in events if not isinstance(event, Paused | Weighed)]
    assert [(type(e), e.stage if isinstance(e, Measured) else None) for e in told] == want
    arms = [e.arm if isinstance(e, Measured) else e.trajectory.arm for e in events if isinstance(e, Measured | ArmDone)]
    assert arms == [
        name for name in ("concept", "other", "random", "unpruned", "never") for _ in range(3 if name == "other" else 5)
    ]


def test_trainings_pause_where_they_can_be_taken_up(events):
    pauses = [(event.training, event.at.stage) for event in events if isinstance(event, Paused)]
    retrained = {name: [(name, "6"), (name, "10")] for name in ("concept", "random", "unpruned", "never")}
    never = retrained.pop("never")
    assert pauses == [
        ("base", "0.5"),
        *(each for name in retrained.values() for each in name),
        ("never-fine", "0.5"),
        *never,
    ]


def test_weights_are_given_where_grafts_are_made_from_them(events):
    back = first_back(arms_in(events)["concept"])
    stages = list(dict.fromkeys([back, "10"]))
    assert back == "6"
    weighed = [(event.arm, event.stage) for event in events if isinstance(event, Weighed)]
    compared = [(arm, stage) for arm in ("concept", "random", "unpruned") for stage in stages]
    assert weighed == [*compared, ("never", "base")]
    assert list(result_of(events, Grafted).stages) == stages


def test_progress_says_what_and_how_far():
    heard: list[tuple[str, int, int]] = []
    with progress.reported(lambda *how_far: heard.append(how_far)):
        list(perform(tiny(arms=("concept",), grafts__skip=True)))
    kinds = list(dict.fromkeys(what for what, _, _ in heard))
    assert kinds[:3] == ["reading the text", "loading the model", "fine-tuning"]
    assert any("retraining (concept)" in what for what in kinds)
    assert all(0 <= done <= total for _, done, total in heard)
    for what in kinds[2:4]:
        done = [d for w, d, _ in heard if w == what]
        assert done == sorted(done)
        assert done[-1] == next(t for w, _, t in heard if w == what)


def test_concept_arm_prunes_the_planted_neurons(events):
    base, sets = result_of(events, Base), result_of(events, Cuts).sets
    assert {(n.layer, n.index) for n in sets["concept"]} == set(toy.PLANTED)
    assert {(n.layer, n.index) for n in sets["other"]} == set(toy.PERSON_NEURONS)
    assert base.snapshot.saliency.top(4) == sets["concept"]
    arms = arms_in(events)
    assert arms["concept"].removed == arms["never"].removed == sets["concept"]
    assert arms["other"].removed == sets["other"]
    assert arms["random"].removed == sets["random"]


def test_random_arm_has_as_many_in_every_layer_and_none_of_the_concepts(events):
    arms = arms_in(events)
    assert arms["random"].removed.per_layer() == arms["concept"].removed.per_layer()
    assert not arms["random"].removed & arms["concept"].removed
    assert arms["unpruned"].removed is None


def test_unpruned_arm_has_its_base_as_pruned(events):
    unpruned = arms_in(events)["unpruned"]
    assert unpruned["pruned"] is unpruned["base"]


def test_arms_share_the_base(events):
    base, arms = result_of(events, Base), arms_in(events)
    assert all(arm["base"] is base.snapshot for name, arm in arms.items() if name != "never")
    assert arms["never"]["base"] is not base.snapshot


def test_concept_arm_collapses_and_comes_back_and_the_others_do_not(events):
    arms = arms_in(events)
    f1 = {name: {stage: arm[stage].f1 for stage in arm.stages} for name, arm in arms.items()}
    assert f1["concept"]["base"]["place"] > 0.95
    assert f1["concept"]["pruned"]["place"] < 0.2
    assert f1["concept"]["pruned"]["person"] > 0.95
    assert f1["concept"]["10"]["place"] > 0.9
    assert f1["other"]["pruned"]["person"] < 0.2
    for name in ("other", "random", "unpruned"):
        assert min(stage["place"] for stage in f1[name].values()) > 0.95
    assert f1["never"]["base"]["person"] > 0.95
    assert f1["never"]["base"]["place"] == 0  # it has no such neurons, and its tags are given to no word


def test_damage_equals_pruning_in_the_weights(events):
    damage, arms = result_of(events, Damage), arms_in(events)
    for name in ("concept", "other"):
        assert (getattr(damage, name).counts == arms[name]["pruned"].scores.counts).all()
    assert {kind: len(each) for kind, each in damage.random.items()} == {"layers": 1, "disjoint": 1, "scale": 1}
    assert all(scores.f1["place"] > 0.95 for each in damage.random.values() for scores in each)
    assert damage.overlap["disjoint"] == (0.0,)
    # Of a layer's 64 neurons the four planted ones are among the 6 that vary most, so two of them must be drawn.
    assert damage.overlap["scale"] == (0.5,)


def test_every_arm_begins_from_the_same_weights(monkeypatch):
    """Training is left out; what each arm would train is kept."""
    begun: list[dict[str, torch.Tensor]] = []

    class Retrained(Iterator):
        last_step = 10

        def __init__(self):
            self.left = [Checkpoint(1.0, 10, 1, 1.0, by="step")]

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

        def state(self):
            return {}

    def retrain(tagger, *_, **__):
        begun.append({name: value.detach().clone() for name, value in tagger.weights().items()})
        with torch.no_grad():
            tagger.head.weight.add_(1)  # an arm that leaves its weights changed
        return Retrained()

    monkeypatch.setattr(module, "retrain_", retrain)
    base, pruned = None, {}
    names = ("concept", "random", "unpruned")
    for event in perform(tiny(prune__control_draws=0, arms=names, grafts__skip=True, measure__what=[])):
        if isinstance(event, Base):
            base = event
        if isinstance(event, ArmDone):
            pruned[event.trajectory.arm] = event.trajectory.removed
    assert base is not None
    for arm, weights in zip(names, begun, strict=True):
        for name, value in weights.items():
            want = base.weights[name].clone()
            layer = re.search(r"layers\.(\d)\.mlp\.(?:fc_)?out\.weight", name)
            if layer and pruned[arm]:
                want[:, pruned[arm].mask[int(layer[1])]] = 0
            assert torch.equal(value, want), (arm, name)


# --- what a protocol decides

SITE = Site("resid", ("embed", "0", "1"), ("embed", "0", "1"), 3, ((),) * 3, ((),) * 3)
SCORE = Saliency(torch.tensor([[9.0, 1, 2], [3, 8, 4], [5, 6, 7]]), "probeless", "activation", "place", SITE)


def those(neurons: Neurons) -> list[str]:
    return [str(neuron) for neuron in neurons]


def test_choose_takes_the_first_or_the_last_of_the_ranking():
    assert those(choose(SCORE, 1 / 3)) == ["LembedN0", "L0N1", "L1N2"]
    assert those(choose(SCORE, 1 / 3, "least")) == ["LembedN1", "LembedN2", "L0N0"]
    assert choose(SCORE, 1.0, "least") == choose(SCORE, 1.0)
    with pytest.raises(ValueError, match=r"unknown which 'by_family'; known: most, least"):
        choose(SCORE, 0.5, "by_family")


def test_placed_moves_the_embeddings_indices_to_the_last_block_as_published():
    chosen = Neurons.of(SITE, [("embed", 0), ("embed", 2), ("0", 1), ("1", 2)])
    assert placed(chosen, "own") is chosen
    assert those(placed(chosen, "last_block")) == ["L0N1", "L1N0", "L1N2"]
    blocks = Site("mlp_post", ("0", "1"), ("0", "1"), 3, ((),) * 2, ((),) * 2)
    alone = Neurons.of(blocks, [("0", 0)])
    assert placed(alone, "last_block") is alone


def test_control_of_is_as_many_neurons_each_way():
    chosen = Neurons.of(SITE, [("embed", 0), ("0", 1), ("1", 1), ("1", 2)])
    assert those(control_of(chosen, "first", seed=5)) == ["LembedN0", "LembedN1", "LembedN2", "L0N0"]
    assert control_of(chosen, "layers", seed=5).per_layer() == chosen.per_layer()
    drawn = [control_of(chosen, "uniform", seed=seed) for seed in range(200)]
    assert {len(d) for d in drawn} == {4}
    assert control_of(chosen, "uniform", seed=3) == drawn[3]
    assert torch.stack([d.mask for d in drawn]).double().mean(0).sub(4 / 9).abs().max() < 0.15


def gpt2_folder(path):
    """A GPT-2 of 2 layers with random weights, and a tokenizer of the toy's words."""
    words = ["<|endoftext|>", *sorted({word.text for sentence in toy.corpus() for word in sentence})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                       eos_token_id=0)
        ).save_pretrained(path)  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(path)
    return str(path)


def weights_of(run: list[Event], arm: str) -> Any:
    return next(event for event in run if isinstance(event, ArmDone) and event.trajectory.arm == arm)


def test_protocol_is_carried_out_on_gpt2(tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2")
    runs = {}
    for protocol in ("corrected", "published"):
        made = tiny(
            model=folder, site="resid", protocol=protocol, prune__fraction=0.5, prune__control_draws=1,
            retrain__steps=(4,), measure__what=("top_words",), arms=("concept", "random", "unpruned"),
            grafts__skip=True, measure__shuffles=2,
        )  # fmt: skip
        runs[protocol] = list(perform(made))
    for protocol, (sever, which) in {"corrected": ("writes", "most"), "published": ("gain", "least")}.items():
        ready, base = runs[protocol][0], result_of(runs[protocol], Base)
        chosen = result_of(runs[protocol], Cuts).sets["concept"]
        assert isinstance(ready, Prepared)
        assert (ready.experiment.prune.sever, ready.experiment.prune.which) == (sever, which)
        assert not chosen & ~choose(base.snapshot.saliency, 0.5, which)
        arms = arms_in(runs[protocol])
        assert arms["concept"].removed == placed(chosen, ready.experiment.prune.embedding)
        assert arms["unpruned"].matched() == arms["concept"].survivors()
        assert base.snapshot.saliency.bucket == (1 if protocol == "corrected" else 100)
    said = "\n".join(runs["corrected"][0].notes), "\n".join(runs["published"][0].notes)
    assert "prune.sever = 'auto': 'writes' is taken" in said[0]
    assert "prune.which = 'by_family': the least salient" in said[1]
    published = arms_in(runs["published"])
    assert published["concept"].removed.per_layer()["embed"] == 0
    first = published["random"].removed.mask
    # The first 24 of 48 neurons: all 16 of the embedding, which go to the last block, and 8 of the first one.
    assert first.sum(1).tolist() == [0, 8, 16]
    assert first[1, :8].all()


def test_sever_is_out_where_the_family_has_it(bert_folder, write):
    text = "the O\nRome B-place\n\nAnna B-person\nleft O\n\n" * 6
    ready = prepare(tiny(model=str(bert_folder), corpus=write(train=text, dev=text, test=text), site="resid"))
    assert ready.experiment.prune.sever == "out"
    assert any("prune.sever = 'auto': 'out' is taken" in note for note in ready.notes)
    own = tiny(
        model=str(bert_folder), corpus=write(train=text, dev=text, test=text), site="resid", protocol="published",
        prune__sever="both",
    )  # fmt: skip
    ready = prepare(own)
    assert (ready.experiment.prune.sever, ready.experiment.prune.which) == ("both", "most")
    assert any("protocol 'published', but for prune.sever = 'both'" in note for note in ready.notes)


# --- a concept corpus of its own


def test_probe_corpus_gives_the_probe_and_the_corpus_gives_f1(tmp_path):
    other = tmp_path / "concepts.conll"
    other.write_text("in O\nTarn B-spot\n\nMira B-being\nleft O\n\nthe O\nTarn B-town\n\n" * 4)
    how = {
        "probe_corpus": f"conll:{other}", "probe_concept": ("spot", "town"), "data__probe_sentences": 100,
        "other": "being",
    }  # fmt: skip
    ready = prepare(tiny(**how))
    assert ready.probe.corpus.label_names == ("O", "being", "place")
    assert ready.probe.corpus.words_per_label() == {"O": 12, "being": 4, "place": 8}
    assert ready.validation.corpus.label_names == toy.LABELS
    assert "probe_corpus:" in " ".join(ready.inputs)
    run = list(
        perform(
            tiny(
                **how, arms=("concept",), retrain__steps=(8,), grafts__skip=True,
            )
        )
    )  # fmt: skip
    arm = arms_in(run)["concept"]
    assert set(arm["8"].f1) == {"person", "place", "overall"}
    assert arm["base"].stats.class_names == ("O", "being", "place")
    assert arm["base"].attribution is not None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (None, r"probe_corpus 'concepts' has no label 'place'; its labels are being, spot: set probe_concept"),
        ("river", r"probe_corpus 'concepts' has no label 'river'"),
    ],
)
def test_probe_corpus_without_the_label_is_refused(no_training, tmp_path, named, message):
    other = tmp_path / "concepts.conll"
    other.write_text("in O\nTarn B-spot\n\nMira B-being\nleft O\n\n" * 4)
    with pytest.raises(ValueError, match=message):
        prepare(tiny(probe_corpus=f"conll:{other}", probe_concept=named))


def test_probe_corpus_that_calls_another_thing_by_the_concepts_label_is_refused(no_training, tmp_path):
    other = tmp_path / "concepts.conll"
    other.write_text("in O\nTarn B-spot\n\nMira B-place\nleft O\n\n" * 4)
    with pytest.raises(ValueError, match=r"has a label 'place' that is not among probe_concept \(spot\)"):
        prepare(tiny(probe_corpus=f"conll:{other}", probe_concept="spot"))


def test_together_undoes_a_split():
    whole = toy.corpus()
    joined = together(whole.split(seed=3))
    assert sorted(map(tuple, joined)) == sorted(map(tuple, whole))
    assert joined.n_words == whole.n_words
    assert joined.spaced is None


def test_together_keeps_blanks_and_notes():
    whole = toy.corpus(sentences=30)
    blanks = np.arange(whole.n_words) % 3 > 0
    known = replace(whole, spaced=blanks, notes=("read well",))
    order = np.argsort(np.concatenate([part.group for part in known.split(seed=3)]))
    joined = together(known.split(seed=3)).take(order)
    assert joined.spaced is not None
    assert joined.spaced.tolist() == blanks.tolist()
    assert joined.notes == ("read well",)
    one, other = known.take([0]), whole.take([1])
    mixed = together([one, other])  # what one part does not know is read after a blank
    assert mixed.after_blank.tolist() == [*one.after_blank, *[True] * other.n_words]


def test_same_settings_give_the_same_run(events):
    again = arms_in(list(perform(tiny(grafts__skip=True))))  # which come after the arms
    for name, arm in arms_in(events).items():
        for stage in arm.stages:
            assert torch.equal(arm[stage].saliency.score, again[name][stage].saliency.score)
            assert (arm[stage].scores.counts == again[name][stage].scores.counts).all()
            assert arm[stage].at == again[name][stage].at


def test_leaving_an_arm_out_changes_nothing_in_the_others(events):
    alone = list(perform(tiny(arms=("random", "never"), prune__control_draws=0, measure__what=[])))
    assert [event.arm for event in alone if isinstance(event, Weighed)] == ["never"]
    assert not [event for event in alone if isinstance(event, Grafted | Again)]
    for name, there in arms_in(alone).items():
        assert there.removed == arms_in(events)[name].removed
        assert torch.equal(there["10"].saliency.score, arms_in(events)[name]["10"].saliency.score)


def test_seeds_are_runs_of_their_own(events):
    how = {"arms": ("concept", "random"), "prune__control_draws": 0, "grafts__skip": True, "measure__what": []}
    both = list(perform(tiny(seeds=(0, 3), **how)))
    assert [e.seed for e in both if isinstance(e, Base)] == [0, 3]
    arms: dict[str, list[Any]] = {"concept": [], "random": []}
    for event in both:
        if isinstance(event, ArmDone):
            arms[event.trajectory.arm].append(event.trajectory)
    assert [arm.seed for arm in arms["random"]] == [0, 3]
    for name, (first, second) in arms.items():
        assert torch.equal(first["10"].saliency.score, arms_in(events)[name]["10"].saliency.score)
        assert not torch.equal(first["base"].saliency.score, second["base"].saliency.score)
    assert arms["random"][0].removed != arms["random"][1].removed

    run = Run(tiny(seeds=(0, 3)), arms)
    data = run.to_xarray()
    assert dict(data.saliency.sizes) == {"arm": 2, "seed": 2, "stage": 4, "layer": 4, "neuron": 64}
    assert data.f1.sel(arm="random", seed=3, stage="10", label="place").item() == arms["random"][1]["10"].f1["place"]
    table = run.to_dataframe()
    assert len(table) == 2 * 2 * 4 * 3
    assert table.groupby(["arm", "seed"]).size().tolist() == [12] * 4
    assert run.label == ("place",)
    assert repr(run).count("Trajectory(") == 4


def test_run_of_one_arm_has_its_axes(events):
    data = Run(tiny(), {"unpruned": [arms_in(events)["unpruned"]]}).to_xarray()
    assert not data.removed.any()
    assert list(data.arm.values) == ["unpruned"]


def test_all_neurons_can_be_pruned():
    arms = arms_in(list(perform(tiny(prune__fraction=1, retrain__steps=(2,), grafts__skip=True, measure__shuffles=2))))
    assert len(arms["concept"].survivors()) == 0
    assert isinstance(arms["random"].removed, Neurons)
    assert arms["random"].removed == arms["concept"].removed


# --- arms, and what they are without


def test_without_the_concepts_arm_nothing_is_grafted_and_nothing_cut_again():
    events = list(perform(tiny(arms=("unpruned",), measure__what=[])))
    assert list(arms_in(events)) == ["unpruned"]
    assert not [event for event in events if isinstance(event, Weighed | Grafted | Again | Blocked)]


def test_the_concepts_arm_alone_is_grafted_without_controls():
    events = list(perform(tiny(arms=("concept",), measure__what=[], rounds=0)))
    (grafts,) = {frozenset(made.controls) for made in result_of(events, Grafted).stages.values()}
    assert grafts == set()
    again = result_of(events, Again)
    assert (again.rounds, len(again.random)) == ((), 1)


def test_a_text_without_another_label_has_no_such_arm(write, tmp_path):
    text = "in O\nTarn B-place\n\nMira O\nleft O\n\n" * 20
    made = tiny(
        model=gpt2_folder(tmp_path / "gpt2"), corpus=write(train=text, dev=text, test=text), other="auto", site="resid",
        retrain__steps=(1,), measure__what=[], grafts__skip=True, data__labelled_only=False,
    )  # fmt: skip
    events = list(perform(made))
    ready = result_of(events, Prepared)
    assert ready.other is None
    assert any("no other label of the text has 30 spans in the 40 sentences" in note for note in ready.notes)
    assert list(arms_in(events)) == ["concept", "random", "unpruned", "never"]
    assert set(result_of(events, Cuts).sets) == {"concept", "random"}
    assert result_of(events, Damage).other is None


def test_another_label_that_the_text_lacks_is_refused(no_training):
    with pytest.raises(ValueError, match="other = 'river': the other labels of the text are person"):
        prepare(tiny(other="river"))


def test_never_can_be_taught_that_the_concept_is_nothing():
    events = list(perform(tiny(arms=("never",), never="outside", finetune__lr=1e-3, measure__what=[])))
    assert arms_in(events)["never"]["base"].f1["place"] == 0


# --- trainings and their seeds


def test_no_two_roles_and_seeds_draw_the_same():
    roles = ("base", "never", "retrain", "again", "blocked")
    seeds = {seed_for(role, seed) for role in roles for seed in range(100)}
    assert len(seeds) == len(roles) * 100
    with pytest.raises(ValueError, match="not in"):
        seed_for("arm", 0)


@pytest.mark.parametrize(
    ("f1", "stage"),
    [
        ({"1": 0.2, "2": 0.81, "4": 0.9}, "2"),  # nine tenths of what it was
        ({"1": 0.2, "2": 0.8, "4": 0.79}, None),
        ({"1": 0.9, "2": 0.1}, "1"),
    ],
)
def test_a_concept_is_back_at_nine_tenths_of_what_it_was(f1, stage):
    path = trajectory({"base": 0.9, "pruned": 0.85, **f1}, torch.zeros(2, 3))
    assert first_back(path) == stage


# --- after the arms


def test_rounds_go_on_from_each_other():
    events, end = [], {}
    for event in perform(tiny(arms=("concept",), measure__what=[], rounds=2, retrain__steps=(6, 10, 14))):
        if isinstance(event, Weighed):
            end = {name: value.detach().clone() for name, value in event.weights.items()}
        events.append(event)
    ready, again, cut = (result_of(events, kind) for kind in (Prepared, Again, Cuts))
    rounds, size = again.rounds, len(cut.sets["concept"])
    ready.model.load_weights(end)
    prune_(ready.model, cut.sets["concept"], sever="out")
    assert (evaluate(ready.model, ready.probe, concept=ready.concept).counts == again.same.counts).all()
    assert len(rounds) == 2
    for found in rounds:
        assert len(found.neurons) == size
        assert 0 <= found.share_old <= 1
        assert 0 < found.share_by_chance < 0.2
        steps = list(found.course)
        assert steps == [6, 10, 14][: len(steps)]
        back = [scores.f1["place"] >= 0.9 for scores in found.course.values()]
        assert back.index(True) == len(back) - 1 if True in back else len(back) == 3  # until it is back


def test_what_is_held_stays_where_the_cut_left_it(monkeypatch):
    whole, blocked = module.retrain_, []

    def watched(model, *args, only=None, **how):
        if only is not None:
            before = {name: value.detach().clone() for name, value in model.plain().items()}
            blocked.append((before, dict(only)))
        return whole(model, *args, only=only, **how)

    monkeypatch.setattr(module, "retrain_", watched)
    held = ("part", "heirs", "random")
    shares = {}
    made = tiny(arms=("concept",), measure__what=[], rounds=0, block__held=held)
    ready: Any = None
    for event in perform(made):
        ready = event if isinstance(event, Prepared) else ready
        if isinstance(event, Blocked):
            before, moves = blocked[-1]
            now = ready.model.plain()
            still = {name: ~moves[name] for name in moves if (~moves[name]).any()}
            assert all(torch.equal(now[name][mask], before[name][mask]) for name, mask in still.items())
            assert any(not torch.equal(now[name], before[name]) for name in moves)
            assert set(event.course) <= {6, 10}
            shares[event.held] = sum(int(mask.sum()) for mask in still.values())
    assert list(shares) == list(held)
    assert shares["heirs"] == shares["random"] > 0
    assert shares["part"] > shares["heirs"]


def test_peak_memory_is_in_megabytes():
    assert 50 < peak_rss_mb() < 100_000
