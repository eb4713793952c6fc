"""Integrals with closed forms; captum, and a slow loop over plain Hugging Face, as oracles; the toy's answer."""

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relearn_lens.find.attribution import Attribution, Plan, attribute, attribution_plan
from relearn_lens.find.saliency import probeless
from relearn_lens.find.targets import TARGETS, Target
from relearn_lens.methods import Attributing
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger
from relearn_lens.models.toy import PERSON_NEURONS
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, Site, site_of, streaming, token_site, token_vectors
from relearn_lens.neurons.streaming import class_stats
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode
from tests.fixtures import LABELS, Untouched, ticks, unchecked
from tests.neurons.test_sites import decoder

PLACE = Concept("place", labels=("LOC",))
TOWN = Concept("place")
"""The toy's."""


def first_tag(logits: Tensor, is_concept: Tensor) -> Tensor:
    """The logit of the concept's first tag: linear in the last hidden state."""
    return logits[:, is_concept][:, 0]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    return decoder("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    return decoder("llama", tmp_path_factory.mktemp("llama"))


# --- closed forms in a model


class ByHand:
    """The sentences with a place in one batch, and the two ends of the path, made without the attribution module."""

    def __init__(self, tagger: Tagger, corpus: Corpus, reference: int, label: str = "LOC"):
        self.tagger, kind = tagger, LABELS.index(label)
        encoded = encode(corpus, tagger.tokenizer, context=tagger.context)
        held = [i for i in range(len(corpus)) if (corpus.label[corpus.start[i] : corpus.start[i + 1]] == kind).any()]
        self.batch = encoded.batch(np.array(held))
        is_word = torch.zeros(self.batch.ids.numel(), dtype=torch.bool)
        is_word[self.batch.subword] = True
        first = torch.zeros(self.batch.ids.numel(), dtype=torch.bool)
        first[self.batch.subword[self.batch.offset[self.batch.label == kind]]] = True
        self.first = first.view_as(self.batch.ids)
        with torch.no_grad():
            self.end = token_vectors(tagger.bridge, self.batch.ids.flatten()).view(*self.batch.ids.shape, -1).clone()
            vector = token_vectors(tagger.bridge, torch.tensor([reference]))
        self.start = torch.where(is_word.view(*self.batch.ids.shape, 1), vector, self.end)
        self.is_concept = torch.tensor([tag.endswith(f"-{label}") for tag in tagger.tags])

    def said(self, x: Tensor, target: Callable, visit: Callable = lambda layer, x: None, site: str = "resid") -> Tensor:
        """f of each row, from token vectors; rows may be several copies of the batch."""
        n, bridge = len(x) // len(self.batch.ids), self.tagger.bridge
        with streaming(bridge, token_site(bridge), lambda *_: x), streaming(bridge, site_of(bridge, site), visit):
            logits = self.tagger(self.batch.ids.repeat(n, 1), self.batch.mask.repeat(n, 1))
        words = target(logits.flatten(0, 1), self.is_concept).view(x.shape[:2])
        return (words * self.first.repeat(n, 1)).sum(1)

    def activations(self, x: Tensor, site: str = "resid") -> list[Tensor]:
        """Activations of every layer on the real tokens, from token vectors."""
        seen: list[Tensor] = []
        with torch.no_grad():
            self.said(x, TARGETS["logit"].of, lambda _, x: seen.append(x[self.batch.mask.bool()]), site)
        return seen


def test_a_linear_output_owes_each_neuron_its_weight_times_its_change(bert_model, corpus):
    """Last layer, f linear in it: conductance is weight times what the activation changed, whatever the path."""
    hand = ByHand(bert_model, corpus, reference=4)
    at_words = hand.first[hand.batch.mask.bool()]
    start, end = (hand.activations(x)[-1][at_words].double().sum(0) for x in (hand.start, hand.end))
    weight = bert_model.head.weight[bert_model.tags.index("B-LOC")].detach().double()
    n = int(hand.first.sum())
    expected = weight * (end - start) / n
    for how in ({"quadrature": "riemann", "steps": 5}, {"form": "layer", "steps": 2}):
        found = attribute(bert_model, corpus, PLACE, target=first_tag, baseline="mask", **how)
        torch.testing.assert_close(found.score[-1].double(), expected, atol=1e-6, rtol=1e-4)
        assert found.n_words == n
        assert found.change == pytest.approx(float(expected.sum()), rel=1e-4)
        assert abs(found.delta[-1]) < 1e-5


@pytest.mark.parametrize("name", list(TARGETS))
def test_targets_by_hand(name):
    """Tags O B-x I-x B-y I-y, concept x."""
    logits = torch.tensor([[1.0, 2.0, 0.5, 3.0, -1.0], [0.0, 5.0, 4.0, 1.0, 2.0]])
    is_concept = torch.tensor([False, True, True, False, False])
    c = [np.log(np.exp(2) + np.exp(0.5)), np.log(np.exp(5) + np.exp(4))]
    whole = [np.log(np.exp(row).sum()) for row in logits.double().numpy()]
    expected = {"logit": c, "logprob": np.subtract(c, whole), "margin": np.subtract(c, [3, 2])}[name]
    np.testing.assert_allclose(TARGETS[name].of(logits, is_concept), expected, rtol=1e-5)


# --- completeness


@pytest.mark.parametrize("form", ["conductance", "layer"])
@pytest.mark.parametrize("which", ["bert", "gpt2"])
def test_every_layer_of_the_hidden_state_accounts_for_the_whole_change(bert_model, gpt2, corpus, which, form):
    tagger = {"bert": bert_model, "gpt2": gpt2}[which]
    hand = ByHand(tagger, corpus, reference=tagger.tokenizer.mask_token_id or tagger.tokenizer.pad_token_id)
    start, end = (float(hand.said(x, TARGETS["logprob"].of).detach().sum()) for x in (hand.start, hand.end))
    missing = []
    for steps in (4, 12, 32):
        found = attribute(tagger, corpus, PLACE, target="logprob", form=form, steps=steps)
        assert found.is_cut_set
        assert found.change * found.n_words == pytest.approx(end - start, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(found.score.sum(1) - found.change, found.delta, atol=1e-5, rtol=1e-3)
        missing.append(float(found.delta.abs().max() / abs(found.change)))
    assert missing[2] < 1e-3
    assert missing[1] < missing[0] / 2
    assert missing[2] < max(missing[1], 1e-4)


def test_the_usual_number_of_steps_ranks_neurons_as_many_more_do(toy):
    """Where hidden units are ranked, a coarse path errs most: with half as many steps it is .993."""
    for _ in finetune_(toy.tagger, toy.corpus, epochs=1, lr=1e-2, seed=0):
        pass
    hows = (Attributing(), Attributing(steps=100))
    few, many = (attribute(toy.tagger, toy.corpus, TOWN, how, site="mlp_post").score for how in hows)
    assert float(spearmanr(few.abs().flatten(), many.abs().flatten())[0]) > 0.999  # pyright: ignore[reportArgumentType]


def test_hidden_units_are_no_cut_set_and_their_sum_is_no_whole(bert_model, corpus):
    found = attribute(bert_model, corpus, PLACE, site="mlp_post", target="logprob", steps=32)
    assert not found.is_cut_set
    assert (found.delta.abs() > 0.01 * abs(found.change)).all()


# --- oracles


def test_conductance_agrees_with_a_slow_loop_over_plain_hugging_face(bert_model, plain, tokenizer, corpus):
    """One sentence, one step at a time, from input embeddings, in float64."""
    plain, head = plain.double(), bert_model.head
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    steps, total, change, n = 6, torch.zeros(4, 32, dtype=torch.float64), 0.0, 0
    tags = [bert_model.tags.index(tag) for tag in ("B-LOC", "I-LOC")]
    others = [i for i in range(len(bert_model.tags)) if i not in tags]
    table = plain.embeddings.word_embeddings.weight.detach()
    for i, sentence in enumerate(corpus):
        carries = [word.label == "LOC" for word in corpus.sentence(i)]
        if not any(carries):
            continue
        inputs = tokenizer([word.text for word in sentence], is_split_into_words=True, return_tensors="pt")
        owners = inputs.word_ids()
        start = torch.stack(
            [table[k] if w is None else table[4] for k, w in zip(inputs["input_ids"][0], owners, strict=True)]
        )
        end = table[inputs["input_ids"][0]]
        firsts = [k for k, w in enumerate(owners) if w is not None and carries[w] and w not in owners[:k]]
        n += len(firsts)
        xs, slopes, values = [], [], []
        for k in range(steps + 1):
            x = (start + k / steps * (end - start)).requires_grad_()
            states = plain(inputs_embeds=x[None], output_hidden_states=True).hidden_states
            logits = states[-1][0, firsts] @ weight.T + bias
            said = (logits[:, tags].logsumexp(1) - logits[:, others].max(1).values).sum()
            slopes.append([g[0] for g in torch.autograd.grad(said, states)])
            xs.append([state[0].detach() for state in states])
            values.append(float(said.detach()))
        change += values[-1] - values[0]
        for k in range(steps):
            for layer in range(4):
                mean = (slopes[k][layer] + slopes[k + 1][layer]) / 2
                total[layer] += (mean * (xs[k + 1][layer] - xs[k][layer])).sum(0)
    found = attribute(bert_model, corpus, PLACE, steps=steps, quadrature="riemann", target="margin", baseline="mask")
    assert found.n_words == n
    assert found.change == pytest.approx(change / n, rel=1e-4)
    torch.testing.assert_close(found.score.double(), total / n, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("which", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("site", ["resid", "mlp_post"])
@pytest.mark.parametrize("name", ["captum-gauss-legendre", "captum-riemann"])
def test_conductance_agrees_with_captum_at_every_layer(request, corpus, which, site, name):
    captum = pytest.importorskip("captum.attr")
    tagger: Tagger = request.getfixturevalue({"bert": "bert_model"}.get(which, which))
    hand = ByHand(tagger, corpus, reference=tagger.tokenizer.pad_token_id)
    found = attribute(tagger, corpus, PLACE, site=site, target="logprob", baseline="pad", steps=5, quadrature=name)
    method = {"captum-gauss-legendre": "gausslegendre", "captum-riemann": "riemann_trapezoid"}[name]
    with torch.enable_grad():
        for layer, hook in enumerate(found.site.hooks):
            oracle = captum.LayerConductance(
                lambda x: hand.said(x, TARGETS["logprob"].of), tagger.bridge.hook_dict[hook]
            )
            theirs = oracle.attribute(hand.end, baselines=hand.start, n_steps=5, method=method)
            theirs = theirs[hand.batch.mask.bool()].sum(0).detach() / found.n_words
            assert (found.score[layer] - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("which", ["bert", "gpt2", "llama"])
def test_layer_integrated_gradients_agree_with_captum(request, corpus, which):
    captum = pytest.importorskip("captum.attr")
    tagger: Tagger = request.getfixturevalue({"bert": "bert_model"}.get(which, which))
    hand = ByHand(tagger, corpus, reference=tagger.tokenizer.pad_token_id)
    for site in ("resid", "mlp_post") if which == "bert" else ("mlp_post",):
        found = attribute(
            tagger, corpus, PLACE, site=site, target="margin", baseline="pad", steps=4, form="layer", max_memory=2**-2
        )
        for layer, hook in enumerate(found.site.hooks):
            oracle = captum.LayerIntegratedGradients(
                lambda x: hand.said(x, TARGETS["margin"].of), tagger.bridge.hook_dict[hook]
            )
            theirs = oracle.attribute(hand.end, baselines=hand.start, n_steps=4, method="gausslegendre")
            theirs = theirs[hand.batch.mask.bool()].sum(0).detach() / found.n_words
            assert (found.score[layer] - theirs).norm() < 1e-3 * theirs.norm()


# --- the planted answer


@pytest.mark.parametrize("form", ["conductance", "layer"])
@pytest.mark.parametrize("target", list(TARGETS))
def test_attribution_finds_what_is_used_and_not_what_only_responds(toy_model, form, target):
    tagger, corpus = toy_model.tagger, toy_model.corpus
    found = attribute(tagger, corpus, TOWN, site="mlp_post", target=target, form=form, steps=8)
    planted = Neurons.of(found.site, toy_model.planted)
    decoys = Neurons.of(found.site, toy_model.decoys)
    assert found.saliency().top(4) == planted
    assert (found.score[planted.mask] > 0).all()
    assert found.score[planted.mask].sum() > 0.5 * found.change
    assert found.score[decoys.mask].abs().max() < 1e-4 * found.score[planted.mask].min()

    classes = TOWN.classes(corpus)
    stats = class_stats(tagger, encode(corpus, tagger.tokenizer), classes, site="mlp_post")
    responds = probeless(stats, torch.from_numpy(classes.carries))
    planned = planted | decoys | Neurons.of(found.site, PERSON_NEURONS)
    assert responds[decoys.mask].min() > responds[~planned.mask].max()


# --- what comes back


def test_an_attribution_says_what_it_is(bert_model, corpus):
    found = attribute(bert_model, corpus, PLACE, steps=3)
    assert found.score.dtype == found.delta.dtype == torch.float32
    assert not found.score.requires_grad
    assert (found.n_words, found.n_pieces) == (14, 8)
    assert (found.target, found.unit, found.baseline) == ("margin", "logit per word", "mask")
    assert (found.quadrature, found.steps, found.form) == ("gauss-legendre", 3, "conductance")
    as_scores = found.saliency()
    assert torch.equal(as_scores.score, found.score.abs())
    assert (as_scores.kind, as_scores.unit, as_scores.concept) == ("conductance", "logit per word", "place")
    assert as_scores.site == found.site == site_of(bert_model.bridge)
    layered = attribute(bert_model, corpus, PLACE, steps=3, form="layer", target="logprob", site="mlp_post")
    assert (layered.saliency().kind, layered.unit) == ("layer_ig", "nat per word")


def test_an_attribution_prints_in_one_line():
    site = Site("resid", ("embed", "0"), ("a", "b"), 3, ((), ()), ((), ()))
    facts = {"n_words": 2, "n_pieces": 1, "target": "margin", "unit": "logit per word", "baseline": "mask"}
    facts |= {"quadrature": "riemann", "steps": 4, "form": "conductance", "concept": "place"}
    score = torch.tensor([[0.0, 0.5, 1], [0, -2, 3.75]])
    said = repr(Attribution(score, torch.tensor([0.125, -0.25]), 1.5, site=site, **facts))
    most = "most L0N2 at 3.75 of 1.5 logit per word; at most 0.25 of a layer missing"
    assert said == f"Attribution(place, conductance, resid; {most})"
    other = Site("mlp_post", *list(vars(site).values())[1:])
    assert "missing" not in repr(Attribution(score, torch.tensor([0.125, -0.25]), 1.5, site=other, **facts))


def test_sentences_take_a_seeded_sample_of_those_with_the_concept(bert_model, corpus):
    few = [attribute(bert_model, corpus, PLACE, steps=2, sentences=3, seed=seed) for seed in (0, 0, 1)]
    assert [one.n_pieces for one in few] == [3, 3, 3]
    assert torch.equal(few[0].score, few[1].score)
    assert not torch.equal(few[0].score, few[2].score)
    everything = attribute(bert_model, corpus, PLACE, steps=2)
    more = attribute(bert_model, corpus, PLACE, steps=2, sentences=99)
    assert torch.equal(more.score, everything.score)


def test_a_concept_may_be_of_several_labels_or_of_none(bert_model, corpus):
    both = attribute(bert_model, corpus, Concept("name", labels=("LOC", "PER")), steps=2)
    assert both.n_words == 14 + 8
    outside = attribute(bert_model, corpus, Concept("outside", labels=("O",)), steps=2, target="logit")
    assert outside.n_words == corpus.n_words - 22


def test_a_concept_by_words_needs_a_target_function(bert_model, corpus):
    def place(logits: Tensor, is_concept: Tensor) -> Tensor:
        """Nothing is the concept's."""
        assert not is_concept.any()
        return logits[:, 1]

    found = attribute(bert_model, corpus, Concept("rome", words=("Rome",)), target=place, steps=2)
    assert (found.n_words, found.target, found.unit) == (4, "place", "per word")
    same = attribute(
        bert_model, corpus, Concept("rome", words=("Rome",)), target=Target("mine", "logit", "", place), steps=2
    )
    assert (same.target, same.unit) == ("mine", "logit per word")


def test_baselines_are_where_they_say(bert_model, gpt2, toy_model, corpus):
    """The change of a linear f is what tells one start from another."""
    tagger = bert_model
    table = tagger.trunk.embeddings.word_embeddings.weight.detach()
    rows = {"mask": table[4], "pad": table[0], "end": table[3], "mean": table.mean(0), "zero": torch.zeros(32)}
    for name, row in rows.items():
        hand = ByHand(tagger, corpus, reference=0)
        start = torch.where((hand.start != hand.end).any(-1, keepdim=True), row, hand.end)
        expected = (hand.said(hand.end, first_tag) - hand.said(start, first_tag)).sum().item() / 14
        found = attribute(tagger, corpus, PLACE, target=first_tag, steps=2, baseline=unchecked(lambda x: x)(name))
        assert (found.baseline, found.change) == (name, pytest.approx(expected, rel=1e-4, abs=1e-6))
    assert attribute(tagger, corpus, PLACE, steps=2).baseline == "mask"
    assert attribute(gpt2, corpus, PLACE, steps=2).baseline == "pad"
    assert attribute(toy_model.tagger, toy_model.corpus, TOWN, steps=2, sentences=2).baseline == "pad"


def test_auto_passes_over_an_embedding_of_zeros(bert, corpus):
    with torch.no_grad():
        bert.trunk.embeddings.word_embeddings.weight[4] = 0
    assert attribute(bert, corpus, PLACE, steps=2).baseline == "pad"
    with pytest.raises(
        ValueError, match=r"embedding of the mask token is all zeros, .* ask for baseline='zero' by name"
    ):
        attribute(bert, corpus, PLACE, steps=2, baseline="mask")


# --- chunks, memory, modes


@pytest.mark.parametrize(
    ("form", "name"), [("conductance", "gauss-legendre"), ("conductance", "riemann"), ("layer", "gauss-legendre")]
)
def test_attribution_does_not_depend_on_the_chunks(bert_model, corpus, encoded, form, name):
    plans: list[Plan] = []
    whole = attribute(bert_model, corpus, PLACE, form=form, quadrature=name, steps=3, sentences=5, on_plan=plans.append)
    for max_memory in (1e-6, 0.25):
        parts = attribute(
            bert_model,
            encoded,
            PLACE,
            form=form,
            quadrature=name,
            steps=3,
            sentences=5,
            max_memory=max_memory,
            on_plan=plans.append,
        )
        torch.testing.assert_close(parts.score, whole.score, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(parts.delta, whole.delta, atol=1e-5, rtol=1e-3)
    assert [plan.chunks for plan in plans[:2]] == [1, 5]
    assert plans[1].backwards > plans[2].backwards > plans[0].backwards == {"conductance": 1, "layer": 4}[form]


def test_sentences_that_the_context_splits_count_once(bert_model, corpus):
    """Each piece stands alone, and only those with a place are run."""
    short = encode(corpus, bert_model.tokenizer, context=9)
    assert short.n_split > 2
    found = attribute(bert_model, short, PLACE, steps=2)
    assert found.n_words == 14
    assert 8 < found.n_pieces < short.n_pieces
    sampled = attribute(bert_model, short, PLACE, steps=2, sentences=1, seed=2)
    assert sampled.n_pieces >= 1


@pytest.mark.parametrize(("form", "max_memory"), [("conductance", 512), ("conductance", 0.5), ("layer", 0.5)])
def test_the_plan_counts_passes_and_tokens(bert_model, corpus, form, max_memory):
    how = {"form": form, "max_memory": max_memory, "steps": 5, "sentences": 5}
    plan = attribution_plan(bert_model, corpus, PLACE, **how)
    plans, passes = [], []
    handle = bert_model.trunk.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    try:
        with ticks() as counted:
            attribute(bert_model, corpus, PLACE, **how, on_plan=plans.append)
    finally:
        handle.remove()
    assert plans == [plan]
    assert sum(counted) == plan.tokens
    assert len(passes) == plan.forwards + 1  # the one that measures
    assert sum(passes) == plan.backwards + 1 == len(counted) + 1
    assert (plan.steps, plan.pieces) == (5, 5)


def test_the_plan_is_one_sentence():
    plan = Plan(16, 1200, 3, 500, 2**29, 2**29, 51, 48, 99)
    said = "1,200 pieces at 16 steps in 3 chunks of at most 500: 51 forward and 48 backward passes, about 512 MiB"
    assert str(plan) == said
    tight = Plan(16, 1200, 3, 500, 2**29, 2**28, 51, 48, 99)
    assert str(tight) == said + ", above the 256 asked for: one piece needs that much"


class Live(TorchDispatchMode):
    """Bytes of the tensors that live at once, those of a model left out."""

    def __init__(self, model: Tagger):
        super().__init__()
        self.now = self.top = 0
        self.known = {w.untyped_storage()._cdata for w in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.top = max(self.top, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize(
    ("which", "form", "site"),
    [
        ("bert", "conductance", "resid"),
        ("bert", "layer", "mlp_post"),
        ("llama", "conductance", "mlp_post"),
        ("llama", "layer", "resid"),
    ],
)
def test_peak_memory_is_what_the_plan_says(request, corpus, which, form, site):
    tagger: Tagger = request.getfixturevalue({"bert": "bert_model"}.get(which, which))
    for max_memory in (0.25, 2):
        plans: list[Plan] = []
        gc.collect()
        with Live(tagger) as live:
            attribute(tagger, corpus, PLACE, form=form, site=site, steps=4, max_memory=max_memory, on_plan=plans.append)
        assert live.top < max_memory * 2**20
        assert live.top == pytest.approx(plans[0].peak_bytes, rel=0.3)
        assert live.now < 10_000


def test_attribution_leaves_no_trace(bert, corpus, untouched: Untouched):
    bert.train()
    bert.trunk.encoder.layer[1].requires_grad_(False)
    for weight in bert.head.parameters():
        weight.grad = torch.ones_like(weight)
    with untouched(bert):
        attribute(bert, corpus, PLACE, steps=2)
        attribute(bert, corpus, PLACE, steps=2, form="layer", site="mlp_post", sentences=2)
        attribution_plan(bert, corpus, PLACE)
    assert all((weight.grad == 1).all() for weight in bert.head.parameters())

    with untouched(bert), pytest.raises(KeyError, match="mine"), ticks(KeyError("mine")):
        attribute(bert, corpus, PLACE, steps=2)


def test_attribution_works_without_grad_and_inside_training(bert_model, corpus):
    with torch.no_grad():
        quiet = attribute(bert_model, corpus, PLACE, steps=2)
    assert torch.equal(quiet.score, attribute(bert_model, corpus, PLACE, steps=2).score)


def test_a_bf16_model_gives_the_same_picture(bert_folder, bert_model, corpus):
    narrow = load_tagger(bert_folder, LABELS, device="cpu", dtype=torch.bfloat16)
    narrow.load_weights({name: weight.bfloat16() for name, weight in bert_model.weights().items()})
    for form in ("conductance", "layer"):
        found, exact = (attribute(t, corpus, PLACE, steps=6, form=form, target="logit") for t in (narrow, bert_model))
        assert found.score.dtype == torch.float32
        for mine, theirs in zip(found.score, exact.score, strict=True):
            assert torch.corrcoef(torch.stack([mine, theirs]))[0, 1] > 0.97


# --- what is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"site": "mlp_pre"}, "unknown site 'mlp_pre'; known: resid, mlp_post"),
        ({"target": "loss"}, "unknown target 'loss'; known: auto, logit, logprob, margin"),
        ({"baseline": "blank"}, "baseline = 'blank': Input should be 'auto', 'mask', 'pad', 'end', 'mean' or 'zero'"),
        ({"quadrature": "simpson"}, "unknown quadrature 'simpson'; known: gauss-legendre, riemann, captum-gauss"),
        ({"form": "neuron"}, "unknown form 'neuron'; known: conductance, layer"),
        ({"steps": 1}, "steps = 1: Input should be greater than or equal to 2"),
        ({"max_memory": 0}, "max_memory = 0: Input should be greater than 0"),
        ({"sentences": 0}, "sentences = 0: Input should be greater than or equal to 1"),
        ({"nodes": 3}, "Attributing has no field 'nodes'; it has target, baseline, quadrature, steps"),
        ({"target": lambda logits, _: logits.sum()}, r"target '<lambda>' must turn .* for 3 words it gave shape \(\)"),
        ({"target": lambda logits, _: logits[:, 0].detach()}, r"number per word that has a gradient; .* shape \(3,\)"),
        ({"target": lambda logits, _: 1.0}, "for 3 words it gave float"),
    ],
)
def test_attribution_refuses_before_any_forward_pass(bert_model, corpus, how, said, untouched: Untouched):
    passes: list[int] = []
    handle = bert_model.trunk.register_forward_hook(lambda *_: passes.append(1))
    try:
        with untouched(bert_model):
            for call in (attribute, attribution_plan):
                with pytest.raises(ValueError, match=said):
                    unchecked(call)(bert_model, corpus, PLACE, **how)
    finally:
        handle.remove()
    assert not passes


def test_attribution_refuses_a_concept_that_has_no_tags(bert_model, corpus):
    with pytest.raises(
        ValueError, match=r"given by words, which have no tags, so a tagger says nothing of it: .* function"
    ):
        attribute(bert_model, corpus, Concept("rome", words=("Rome",)))
    with pytest.raises(ValueError, match="corpus 'tiny' has no label 'GPE' for concept 'place'; its labels are O, LOC"):
        attribute(bert_model, corpus, Concept("place", labels=("GPE",)))
    other = build_corpus([[("Rome", "GPE", True), ("was", "O", False)]], name="other")
    with pytest.raises(
        ValueError, match="the tagger has no tags for label 'GPE' of concept 'place'; it was made for O, "
    ):
        attribute(bert_model, other, Concept("place", labels=("GPE",)))


def test_attribution_refuses_a_text_whose_concept_was_cut_off(bert_model):
    text = build_corpus([[*[("the", "O", False)] * 30, ("Rome", "LOC", True)]], name="late", label_names=LABELS)
    short = encode(text, bert_model.tokenizer, context=12, long="truncate")
    with pytest.raises(ValueError, match=r"no word that carries concept 'place' is left in 'late' .* long='split'"):
        attribute(bert_model, short, PLACE)


def test_attribution_refuses_a_baseline_that_the_tokenizer_lacks(toy_model, gpt2, corpus):
    with pytest.raises(
        ValueError, match=r"'mask' was asked for, but the tokenizer of 'toy' has no such .* it has pad: use"
    ):
        attribute(toy_model.tagger, toy_model.corpus, TOWN, baseline="mask")
    with pytest.raises(ValueError, match="it has pad, end: use one of these, or baseline='mean'"):
        attribute(gpt2, corpus, PLACE, baseline="mask")


def test_attribution_refuses_what_is_not_finite(bert, corpus, untouched: Untouched):
    with torch.no_grad():
        bert.trunk.encoder.layer[2].output.dense.weight[0] = torch.inf
    with pytest.raises(ValueError, match="attributions to resid in layer 'embed' are not finite"):
        attribute(bert, corpus, PLACE, steps=2)
