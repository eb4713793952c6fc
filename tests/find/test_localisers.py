"""Localisers find what was planted, controls do not; all of them leave the model as it was."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from relearn_lens.find.circuits import PathPatching, faithfulness, path_patching
from relearn_lens.find.controls import RandomMLPs, RandomNeurons, equal_control
from relearn_lens.find.layers import LayerDistance, layer_distance
from relearn_lens.find.localisers import LOCALISERS, locate
from relearn_lens.find.localising import pairs_of, statements
from relearn_lens.find.lookups import Lookup, lookup_probe
from relearn_lens.find.patching import Pairs, Prompts, contrasted, subjects
from relearn_lens.find.saliency import Saliency
from relearn_lens.find.scored import AttributionPatching, ByScore, attribution_patching
from relearn_lens.find.tracing import CausalTracing, causal_tracing
from relearn_lens.models import toy
from relearn_lens.models.model import LanguageModel, hidden
from relearn_lens.models.training import train_
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.ablation import prune_
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Facts, Passage, refused
from tests.made import LOOKED_UP, MOVED, THINGS, Pool, looked_up, looked_up_facts

PLANTED_MLP = "block 1 mlp"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return looked_up()[0]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return looked_up_facts()


MODELS: Pool[LanguageModel] = Pool(lambda: looked_up()[0])


@pytest.fixture
def make() -> Callable[[], LanguageModel]:
    """That model, a test's own, another at every call."""
    return MODELS.lend()


@pytest.fixture
def own(make) -> LanguageModel:
    return make()


def blocks(model: LanguageModel) -> Any:
    return model.bridge.original_model.layers


def heads_of(model: LanguageModel, *members: tuple[str, int]) -> Neurons:
    return Neurons.of(site_of(model.bridge, "attn_head"), members)


@pytest.mark.parametrize("localiser", [CausalTracing(), PathPatching(), Lookup()], ids=lambda each: each.name)
def test_the_mlp_that_looks_facts_up_is_named(model, facts, localiser):
    assert localiser(model, facts) == WeightMask.of_parts(model, PLANTED_MLP)


def test_attribution_patching_ranks_the_planted_neurons_and_the_head_first(model, facts):
    assert set(AttributionPatching()(model, facts).top(4)) == {("1", i) for i in LOOKED_UP}
    assert set(AttributionPatching(site="attn_head")(model, facts).top(1)) == {MOVED}


def test_controls_know_nothing_of_what_was_planted(model, facts):
    planted = WeightMask.of_parts(model, PLANTED_MLP)
    drawn = [RandomMLPs()(model, facts, seed=seed) for seed in range(12)]
    assert all(mask.n_entries == planted.n_entries for mask in drawn)
    assert {mask == planted for mask in drawn} == {True, False}
    for seed in range(5):
        control = equal_control(model, planted, seed=seed)
        assert isinstance(control, WeightMask)
        assert (control & planted).n_entries == 0
        assert len(RandomNeurons()(model, facts, seed=seed).top(6) & AttributionPatching()(model, facts).top(4)) < 4


def test_pruning_what_was_found_takes_the_facts_and_an_equal_control_does_not(facts, make):
    def right(neurons: Neurons) -> float:
        own = make()
        prune_(own, neurons)
        return float((Prompts(own, statements(facts), "logit_difference").values(_all(own, facts)) > 0).float().mean())

    def _all(own, facts):
        return Prompts(own, statements(facts), "logprob").encoded.batch(np.arange(len(statements(facts))))

    own = make()
    found = AttributionPatching()(own, facts).top(fraction=4 / 96)
    assert isinstance(found, Neurons)
    control = equal_control(own, found, seed=0)
    assert isinstance(control, Neurons)
    assert control.per_layer() == found.per_layer()
    assert not len(control & found)
    assert right(found) < 0.6
    assert right(control) == 1


@pytest.mark.parametrize("name", LOCALISERS)
def test_every_localiser_is_described_and_leaves_the_model_as_it_was(facts, own, name, untouched):
    kind = LOCALISERS[name]
    assert kind.name == name
    assert kind.formula
    assert kind.source
    assert all(field.description for field in kind.model_fields.values())
    fewer: Any = {"steps": 20} if "steps" in kind.model_fields else {}
    locate(own, facts, name, **fewer)  # a bridge hooks up its norms at the first pass
    own.train()
    with untouched(own):
        where, again = (locate(own, facts, name, seed=1, **fewer) for _ in range(2))
    assert isinstance(where, Saliency if kind.gives == "neurons" else WeightMask)
    if isinstance(where, Saliency):
        assert isinstance(again, Saliency)
        assert torch.equal(where.score, again.score)
        assert where.score.isfinite().all()
        assert len(where.top(fraction=0.1)) > 0
    else:
        assert where == again
        where.check(own)
        next(train_(own, facts_text(own, facts), steps=(1,), only=where))


def facts_text(own: LanguageModel, facts: Facts):
    return Prompts(own, statements(facts), "logprob").encoded


def test_an_unknown_name_or_field_is_refused(model, facts):
    with pytest.raises(ValueError, match="unknown localiser 'magic'; known: score, attribution_patching"):
        locate(model, facts, "magic")
    with pytest.raises(ValueError, match="Lookup has no field 'size'; it has first, last"):
        locate(model, facts, "lookup", size=3)
    with pytest.raises(ValueError, match="unknown score 'magic'; known: probeless"):
        locate(model, facts, "score", score="magic")


@pytest.mark.parametrize("name", [name for name, kind in LOCALISERS.items() if kind.source != "control"])
def test_what_cannot_be_asked_is_refused(toy_model, model, name):
    with pytest.raises(ValueError, match=f"{name} reads facts, or a labelled text with concept=, and got"):
        locate(model, None, name)
    with pytest.raises(ValueError, match=f"{name} reads facts, or .* got a text without a concept"):
        locate(model, toy_model.corpus, name)
    facts = looked_up_facts()
    with pytest.raises(ValueError, match=f"{name}: facts 'looked up' say themselves what is to be found"):
        locate(model, facts, name, concept=Concept("place"))
    with pytest.raises(ValueError, match=f"{name} asks a language model for answers, and this is a Tagger"):
        locate(toy_model.tagger, facts, name)
    one, two, three = ((Passage("", f"text {i}", f"key {i}"),) for i in range(3))
    plain = Facts("plain", one, two, three)
    with pytest.raises(ValueError, match="facts 'plain' have no statement with a prompt and an answer"):
        locate(model, plain, name)


def test_a_concept_of_a_text_is_found_in_a_tagger_by_score(toy_model):
    found = ByScore(score="dprime")(toy_model.tagger, toy_model.corpus, concept=Concept("place"))
    assert {("1", i) for i in (7, 19, 32, 58)} <= set(found.top(8))


def test_a_concept_of_a_text_is_found_in_a_language_model(untouched):
    model = toy.language_model()
    corpus = toy.corpus(sentences=40)
    found = locate(model, corpus, "attribution_patching", concept=Concept("place"))
    assert isinstance(found, Saliency)
    assert found.concept == "toy/place"


# --- attribution patching


def test_attribution_patching_of_heads_agrees_with_transformer_lens(model, facts):
    pairs = pairs_of(model, facts, "swap", "logprob", 0)
    site = site_of(model.bridge, "attn_head")
    mine = attribution_patching(pairs, site)
    total = torch.zeros_like(mine)
    for i, passage in enumerate(pairs.clean.passages):
        clean, corrupt = (each.batch(np.array([i])).ids for each in (pairs.clean, pairs.corrupt))
        word = int(clean[0, -1])
        assert passage.answer in THINGS

        def metric(logits: torch.Tensor, word: int = word) -> torch.Tensor:
            return logits[0, -2].log_softmax(-1)[word]

        for node, value in attribution_patch(model.bridge, clean, corrupt, metric).node_scores.items():
            if node.kind == "attn_head_out":
                total[node.layer, node.head] += value / len(pairs.clean.passages)
    assert mine.abs().max() > 0.1
    torch.testing.assert_close(mine, total, rtol=1e-4, atol=1e-5)


def test_attribution_patching_needs_no_gradient_of_weights(facts, own):
    before = AttributionPatching()(own, facts).score
    own.requires_grad_(False)
    assert torch.equal(AttributionPatching()(own, facts).score, before)


# --- contrasting prompts


def test_contrasting_prompts_are_of_another_key_with_another_answer(facts):
    passages = statements(facts)
    clean, corrupt = contrasted(passages, ())
    assert len(clean) == len(passages)
    of_prompt = {p.prompt: p for p in passages}
    for p, q in zip(clean, corrupt, strict=True):
        other = of_prompt[q.prompt]
        assert q.answer == p.answer != other.answer
        assert other.template == p.template
    assert contrasted(passages, (), seed=1) != contrasted(passages, (), seed=2)


def test_what_has_no_contrast_is_refused(model, facts):
    alone = statements(facts)[:1]
    with pytest.raises(ValueError, match="none of 1 passages has another with the same template and another answer"):
        contrasted(alone, ())
    with pytest.raises(ValueError, match="contrast = 'abc': facts 'looked up' have no such form; they have statement"):
        PathPatching(contrast="abc")(model, facts)
    longer = replace(alone[0], prompt=f"now {alone[0].prompt}")
    with pytest.raises(ValueError, match="none of 1 passages has as many tokens as its contrasting one"):
        Pairs(model, alone, [longer])
    with pytest.raises(ValueError, match="there are 1 passages and 0 contrasting ones"):
        Pairs(model, alone, [])


def test_a_metric_says_what_it_needs(model, facts):
    p = statements(facts)[0]
    with pytest.raises(ValueError, match="unknown metric 'magic'; known: auto, logprob, logit_difference"):
        Prompts(model, [p], "magic")
    with pytest.raises(ValueError, match="logit_difference compares the answer with another choice"):
        Prompts(model, [replace(p, choices=())], "logit_difference")
    with pytest.raises(ValueError, match="begin with the same token, so logits cannot tell them apart"):
        Prompts(model, [replace(p, choices=(p.answer, f"{p.answer} moss"))])
    with pytest.raises(ValueError, match="1 of 1 passages have no prompt"):
        Prompts(model, [Passage("", "fish", "fish")])
    assert Prompts(model, [replace(p, choices=())]).name == "logprob"


def test_metrics_are_those_of_the_logits(model, facts):
    passages = statements(facts)
    difference, logprob = (Prompts(model, passages, name) for name in ("logit_difference", "logprob"))
    for group in difference.groups():
        batch = difference.batch(group)
        with torch.no_grad():
            logits = model.logits(hidden(model.bridge, batch.ids, batch.mask))[:, -2]
            values, nats = difference.values(batch), logprob.values(batch)
        vocabulary = model.tokenizer.get_vocab()
        for row, i in enumerate(group):
            p = passages[i]
            own, other = vocabulary[p.answer], vocabulary[p.choices[1]]
            assert float(values[row]) == pytest.approx(float(logits[row, own] - logits[row, other]), rel=1e-5)
            assert float(nats[row]) == pytest.approx(float(logits[row].log_softmax(-1)[own]), abs=1e-5)


def test_the_subject_is_where_the_key_stands(model, facts):
    asked = Prompts(model, [p for p in statements(facts) if p.prompt.startswith("now")])
    assert {int(tokens[-1]) for tokens in subjects(asked)} == {2}  # after the opening token and `now`
    inside = replace(asked.passages[0], prompt="nown now likes", key="now")
    assert {int(tokens[-1]) for tokens in subjects(Prompts(model, [inside]))} == {2}
    lost = replace(asked.passages[0], key="nobody")
    with pytest.raises(ValueError, match="1 of 1 prompts do not name their key"):
        subjects(Prompts(model, [lost]))


# --- causal tracing


def test_traces_are_shares_of_what_noise_took(model, facts, untouched):
    with untouched(model):
        traces = causal_tracing(model, statements(facts), draws=2)
    assert traces.clean > 0.9 > 0.5 > traces.corrupt
    mlp, attn, resid = traces.effect
    assert mlp.argmax() == 1
    assert mlp[[0, 2]].abs().max() < 0.01
    assert resid[0] > 0.9  # nothing but the subject's state was corrupted
    assert attn[:2].abs().max() < 0.01
    whole = causal_tracing(model, statements(facts), at="every", draws=1)
    assert whole.effect[2].tolist() == pytest.approx([1.0] * 3, abs=0.05)
    assert whole.effect[1, 2] > 0.9
    every = causal_tracing(model, statements(facts), components=("mlp",), window=3, draws=1)
    assert every.effect[0, 1] >= every.effect[0, 0]


def test_noise_that_takes_nothing_is_refused(facts, own):
    with torch.no_grad():
        blocks(own)[1].mlp.fc_out.weight.zero_()
        assert (traces := causal_tracing(own, statements(facts))).refused
    assert traces.effect.isnan().all()
    with pytest.raises(ValueError, match=r"causal_tracing: what noise takes .* not beyond two standard errors"):
        CausalTracing()(own, facts)
    with pytest.raises(ValueError, match="blocks = 9: this model has 3"):
        CausalTracing(blocks=9)(own, facts)


# --- path patching and circuits


def test_paths_are_those_that_were_planted(model, facts, untouched):
    passages, corrupt = contrasted(statements(facts), ())
    with untouched(model):
        paths = path_patching(model, passages, corrupt)
    assert set(paths.kept_heads) == {MOVED}
    assert paths.kept_mlps == [1]
    assert float(paths.heads[2, 1]) == pytest.approx(1, abs=0.01)
    assert float(paths.mlps[1]) == pytest.approx(1, abs=0.01)
    assert paths.unit == "logits"
    assert paths.clean > 5 > paths.corrupt
    assert PathPatching(keep="heads")(model, facts) == WeightMask.of(model, heads_of(model, MOVED))
    both = PathPatching(keep="both")(model, facts)
    assert both == PathPatching(keep="heads")(model, facts) | PathPatching()(model, facts)


def test_paths_without_a_difference_or_an_effect_are_refused(model, facts, own):
    passages = statements(facts)
    paths = path_patching(model, passages, passages)
    assert "not beyond two standard errors" in str(paths.refused)
    assert paths.heads.isnan().all()
    assert not len(paths.kept_heads)
    with pytest.raises(ValueError, match=r"no mlps with an effect above 10\.0; the largest of a head is 1"):
        PathPatching(threshold=10)(model, facts)
    with torch.no_grad():
        blocks(own)[2].attn.o.weight.zero_()
    with pytest.raises(ValueError, match="path_patching: the difference of logit_difference between prompts is"):
        PathPatching()(own, facts)


def test_a_circuit_is_as_faithful_as_it_holds_what_was_planted(model, facts, untouched):
    passages, reference = statements(facts), statements(facts, "retain_near")
    with untouched(model):
        whole = faithfulness(model, passages, reference, heads_of(model, MOVED))
    assert whole.value == pytest.approx(1, abs=0.02)
    other = faithfulness(model, passages, reference, heads_of(model, ("0", 0), ("1", 1), ("2", 0)))
    assert abs(other.value) < 0.02
    assert whole.whole > whole.empty
    none = faithfulness(model, passages, reference, heads_of(model))
    assert none.value == 0
    every = faithfulness(model, passages, reference, ~heads_of(model))
    assert every.value == 1


def test_faithfulness_says_what_it_needs(model, facts):
    passages = statements(facts)
    short = [p for p in passages if p.prompt.startswith("zz")]
    with pytest.raises(ValueError, match="no reference passage has 5 tokens"):
        faithfulness(model, passages, short, heads_of(model, MOVED))
    with pytest.raises(ValueError, match=r"a circuit is a set of heads .* neurons of mlp_post"):
        faithfulness(model, passages, passages, Neurons.of(site_of(model.bridge, "mlp_post"), [("1", 3)]))


# --- lookup


def test_a_probe_of_keys_it_never_saw_rises_where_they_are_looked_up(model, facts, untouched):
    passages = statements(facts, "forget_attacked", "forget_held_out", "retain_near")
    with untouched(model):
        probe = lookup_probe(model, passages)
    assert probe.layers == ("embed", "0", "1", "2")
    assert probe.accuracy[:2].max() < 0.4
    assert probe.accuracy[2:].min() > 0.9
    assert probe.shuffled.max() < 0.5
    assert probe.blocks() == [1]


def test_lookup_without_a_rise_or_a_closed_set_is_refused(facts, own):
    with torch.no_grad():
        blocks(own)[1].mlp.fc_out.weight.zero_()
    with pytest.raises(ValueError, match=r"no rise beyond noise \(.*\), so no block is seen to look them up"):
        Lookup()(own, facts)
    few = replace(facts, retain_near=facts.retain_near[:2])
    with pytest.raises(ValueError, match="has two answers that belong to 5 keys each"):
        Lookup()(own, few)


# --- layer distance


def test_layer_distance_is_that_of_a_plain_loop(model, facts):
    passages = statements(facts)
    others = refused(passages, seed=0)
    distance = layer_distance(model, passages, others)
    raw, normalised = np.zeros(3), np.zeros(3)
    for p, q in zip(passages, others, strict=True):
        ends = []
        for each in (p, q):
            batch = Prompts(model, [each], "logprob").batch(np.array([0]))
            with torch.no_grad():
                _, cache = model.bridge.run_with_cache(batch.ids)
            ends.append([cache[f"blocks.{i}.hook_out"][0, batch.subword].mean(0) for i in range(3)])
        for i, (one, other) in enumerate(zip(*ends, strict=True)):
            gap = float((one - other).norm())
            raw[i] += gap / len(passages)
            normalised[i] += gap / float((one.norm() + other.norm()) / 2) / len(passages)
    assert distance.raw.tolist() == pytest.approx(raw.tolist(), rel=1e-4)
    assert distance.normalised.tolist() == pytest.approx(normalised.tolist(), rel=1e-4)


def test_layer_distance_names_output_matrices_alone(model, facts):
    mask = LayerDistance(layers=2)(model, facts)
    assert [name.rsplit(".", 2)[-2:] for name in mask.weights()] == [["fc_out", "weight"]] * 2
    assert LayerDistance(against="choice")(model, facts).n_entries == 64 * 32
    with pytest.raises(ValueError, match="layers = 4: this model has 3 blocks"):
        LayerDistance(layers=4)(model, facts)
    bare = replace(facts, **{r: tuple(replace(p, choices=()) for p in getattr(facts, r)) for r in ("forget_attacked",)})
    with pytest.raises(ValueError, match=r"against = 'choice': .* has no other choice"):
        LayerDistance(against="choice")(model, bare)


# --- controls


def test_random_neurons_are_as_many_of_every_layer(model):
    for k in (3, 12, 96):
        per_layer = RandomNeurons()(model, None, seed=2).top(k).per_layer()
        assert set(per_layer.values()) == {k // 3}
    one, other = (RandomNeurons()(model, None, seed=seed).top(12) for seed in (0, 1))
    assert one != other


def test_a_control_of_scattered_entries_is_of_others_in_the_same_weights(model):
    mask = WeightMask.of(model, Neurons.of(site_of(model.bridge, "mlp_post"), [("1", 3), ("2", 5)]))
    control = equal_control(model, mask, seed=0)
    assert isinstance(control, WeightMask)
    assert control.weights() == mask.weights()
    assert {name: int(control[name].sum()) for name in control} == {name: int(mask[name].sum()) for name in mask}
    assert (control & mask).n_entries == 0
    assert equal_control(model, mask, seed=0) == control != equal_control(model, mask, seed=1)


def test_there_is_no_control_beside_everything(model):
    for parts in (["block 0 mlp", "block 1 mlp", "block 2 mlp"], ["embedding"]):
        with pytest.raises(ValueError, match="there is no other block to take as much from"):
            equal_control(model, WeightMask.of_parts(model, parts), seed=0)
    with pytest.raises(ValueError, match="there is nothing in this mask"):
        equal_control(model, WeightMask.none(model), seed=0)
    two = WeightMask.of_parts(model, ["block 0 mlp", "block 1 mlp"])
    control = equal_control(model, two, seed=0)
    assert isinstance(control, WeightMask)
    assert control.n_entries == two.n_entries
    with pytest.raises(ValueError, match="this mask is of the weights of another model"):
        equal_control(model, WeightMask.none(toy.language_model()), seed=0)
    with pytest.raises(ValueError, match="blocks = 4: this model has 3"):
        RandomMLPs(blocks=4)(model, None)
