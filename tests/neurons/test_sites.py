"""Python's own sets as oracle; sites of two families by hand; binomial bounds for random controls."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.config import TransformerBridgeConfig

from relearn_lens.models import families
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger, hidden, reading, trunk
from relearn_lens.neurons.sites import (
    FAMILIES,
    SITES,
    Neuron,
    Neurons,
    Site,
    Slice,
    component_site,
    parameter,
    random_neurons,
    site_of,
    streaming,
    token_site,
    token_vectors,
)
from relearn_lens.remove.ablation import ablated, prune_
from tests.fixtures import CONTEXT, D_MLP, D_MODEL, LABELS, N_LAYERS, VOCAB, Untouched, unchecked, warmed

SITE = Site("mlp_post", ("embed", "0", "1"), ("a", "b", "c"), 4, ((), (), ()), ((), (), ()))
"""A site of 12 neurons that no model has."""
ALL = [Neuron(layer, i) for layer in SITE.layers for i in range(SITE.width)]


# --- sites


def test_site_of_bert_resid_is_the_embedding_and_every_block(bert_model):
    site = site_of(bert_model.bridge, "resid")
    assert site.layers == ("embed", "0", "1", "2")
    assert site.hooks == ("embed_ln.hook_out", "blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out")
    assert (site.width, site.n_neurons) == (D_MODEL, 4 * D_MODEL)
    assert site.writes[0] == (Slice("embed_ln", "weight", 0), Slice("embed_ln", "bias", 0))
    assert site.writes[2] == (Slice("blocks.1.ln2", "weight", 0), Slice("blocks.1.ln2", "bias", 0))
    assert site.reads == ((), (), (), ())
    assert site == site_of(bert_model.bridge) == site_of(bert_model.bridge, site)


def test_site_of_bert_mlp_post_is_every_block(bert_model):
    site = site_of(bert_model.bridge, "mlp_post")
    assert site.layers == ("0", "1", "2")
    assert site.hooks == tuple(f"blocks.{i}.mlp.out.hook_in" for i in range(N_LAYERS))
    assert (site.width, site.n_neurons) == (D_MLP, 3 * D_MLP)
    assert site.writes[1] == (Slice("blocks.1.mlp.out", "weight", 1),)
    assert site.reads[1] == (Slice("blocks.1.mlp.in", "weight", 0), Slice("blocks.1.mlp.in", "bias", 0))


def test_site_of_the_toy_resid_has_no_weights_of_its_own(toy_model):
    site = site_of(toy_model.tagger.bridge, "resid")
    assert site.layers == ("embed", "0", "1", "2", "3")
    assert site.hooks == ("blocks.0.hook_in", *(f"blocks.{i}.hook_out" for i in range(4)))
    assert site.width == 32
    assert site.writes == ((),) * 5


def test_site_of_the_toy_mlp_post_is_every_block(toy_model):
    site = site_of(toy_model.tagger.bridge, "mlp_post")
    assert (site.layers, site.width) == (("0", "1", "2", "3"), 64)
    assert site.writes[3] == (Slice("blocks.3.mlp.out", "weight", 1),)


def test_site_of_lists_the_known_names(bert_model):
    with pytest.raises(ValueError, match="unknown site 'mlp_pre'; known: resid, mlp_post"):
        site_of(bert_model.bridge, "mlp_pre")


def test_site_of_lists_the_known_families(bert, monkeypatch):
    monkeypatch.setattr(bert.bridge.cfg, "architecture", "FortuneTeller")
    said = (
        r"the family 'FortuneTeller' have no sites yet; known: BertForMaskedLM, .*"
        r"relearn_lens.neurons.sites.FAMILIES"
    )
    with pytest.raises(ValueError, match=said):
        site_of(bert.bridge, "resid")


def test_every_family_has_every_site():
    assert {tuple(plans) for plans in FAMILIES.values()} == {tuple(SITES)}


@pytest.mark.parametrize("name", list(SITES))
def test_hooks_of_a_site_see_every_layer_once_in_order(bert_model, toy_model, name, untouched: Untouched):
    for tagger in (bert_model, toy_model.tagger):
        site, seen = site_of(tagger.bridge, name), []

        def see(layer: int, activations: torch.Tensor, seen=seen) -> None:
            seen.append((layer, tuple(activations.shape)))

        ids = torch.ones(2, 3, dtype=torch.int64)
        with untouched(tagger), reading(tagger), streaming(tagger.bridge, site, see):
            hidden(tagger.bridge, ids, ids)
        assert seen == [(layer, (2, 3, site.width)) for layer in range(len(site.layers))]


@pytest.mark.parametrize("name", list(SITES))
def test_parameter_is_the_one_that_is_trained_and_fits_the_width(bert_model, toy_model, name):
    n = 0
    for tagger in (bert_model, toy_model.tagger):
        site = site_of(tagger.bridge, name)
        trained = {id(p) for p in tagger.parameters()}
        for part in (part for layer in (*site.writes, *site.reads) for part in layer):
            weight = parameter(tagger.bridge, part)
            assert id(weight) in trained
            assert weight.shape[part.axis] == site.width * site.size
            n += 1
    assert n == {"resid": 8, "mlp_post": 9 + 12, "attn_head": 3 * 7 + 4 * 7}[name]


def test_parameter_changes_when_the_optimiser_steps(bert):
    part = site_of(bert.bridge, "mlp_post").writes[2][0]
    weight = parameter(bert.bridge, part)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(bert.parameters(), lr=1.0)
    ids = torch.tensor([[2, 5, 6, 3]])
    bert(ids, torch.ones_like(ids)).square().sum().backward()
    optimizer.step()
    assert parameter(bert.bridge, part) is weight
    assert not torch.equal(weight, before)


# --- families of decoders


DECODERS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", {"n_inner": D_MLP, "n_positions": CONTEXT}),
    "neox": ("GPTNeoXConfig", {}),
    "neox-sequential": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama-with-biases": ("LlamaConfig", {"num_key_value_heads": 2, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
}
"""Class of the configuration and what it has beside the sizes."""


def decoder(kind: str, folder: Path) -> Tagger:
    """A decoder of 3 layers with random weights and the small BERT's words, saved to a folder and loaded from it."""
    save_decoder(kind, folder)
    return warmed(load_tagger(folder, LABELS, device="cpu"))


def save_decoder(kind: str, folder: Path) -> None:
    """Its weights and words alone, for who loads it otherwise."""
    name, special = DECODERS[kind]
    end = len(VOCAB)
    sizes = {
        "vocab_size": end + 1, "hidden_size": D_MODEL, "intermediate_size": D_MLP, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip
    if kind == "gpt2":  # its names differ, and it takes the others for nothing
        sizes |= {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}
        sizes = {k: v for k, v in sizes.items() if k.startswith("n_") or k.endswith(("_id", "_size"))}
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "intermediate_size")}
    config = getattr(transformers, name)(**sizes, **special)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordPiece({**VOCAB, "<|endoftext|>": end}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|endoftext|>")
    words.save_pretrained(folder)


IDS = torch.tensor([[5, 9, 7, 20, 22, 6], [8, 11, 30, 5, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("kind", list(DECODERS))
def test_components_of_a_block_are_what_it_adds(kind, tmp_path, untouched: Untouched):
    tagger = decoder(kind, tmp_path)
    bridge = tagger.bridge
    x: dict[str, list[torch.Tensor]] = {"attn": [], "mlp": [], "resid": [], "all": []}
    names: tuple[Any, ...] = ("attn", "mlp", "resid")
    with untouched(tagger), reading(tagger), contextlib.ExitStack() as stack:
        for name in names:
            site = component_site(bridge, name)
            assert (site.layers, site.width) == (("0", "1", "2"), D_MODEL)
            stack.enter_context(streaming(bridge, site, lambda _, each, name=name: x[name].append(each)))
        stack.enter_context(streaming(bridge, site_of(bridge, "resid"), lambda _, each: x["all"].append(each)))
        hidden(bridge, IDS, MASK)
    real = MASK.bool()
    for i in range(3):
        torch.testing.assert_close(x["resid"][i], x["all"][i + 1])
        added = x["resid"][i] - x["all"][i]
        if kind not in ("gemma2", "gemma3"):  # which normalise what a component gives before it is added
            torch.testing.assert_close(added[real], (x["attn"][i] + x["mlp"][i])[real], atol=1e-4, rtol=1e-4)
    with (
        reading(tagger),
        streaming(bridge, component_site(bridge, "mlp"), lambda layer, each: each + layer),
        streaming(bridge, site_of(bridge, "resid"), lambda layer, each: x["all"].append(each)),
    ):
        hidden(bridge, IDS, MASK)
    again = x["all"][4:]
    assert torch.equal(again[1][real], x["all"][1][real])
    assert not torch.allclose(again[2][real], x["all"][2][real])


def test_a_component_that_no_block_has_is_refused(bert_model):
    with pytest.raises(ValueError, match="no component of a block is called 'norm'; known: attn, mlp, resid"):
        unchecked(component_site)(bert_model.bridge, "norm")


@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_family_of_decoders(kind, tmp_path, untouched: Untouched):
    """Hooks see what Hugging Face's own model computes; ablated by hook equals pruned in the weights."""
    tagger = decoder(kind, tmp_path)
    bridge = tagger.bridge
    resid, mlp = site_of(bridge, "resid"), site_of(bridge, "mlp_post")
    assert resid.layers == ("embed", "0", "1", "2")
    assert (resid.width, resid.writes) == (D_MODEL, ((),) * 4)
    assert (mlp.layers, mlp.width) == (("0", "1", "2"), D_MLP)

    plain = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    seen: list[torch.Tensor] = []
    with untouched(tagger), reading(tagger), streaming(bridge, resid, lambda _, x: seen.append(x)):
        last = hidden(bridge, IDS, MASK)
    with torch.no_grad():
        states = plain(IDS, attention_mask=MASK, output_hidden_states=True)
    real = MASK.bool()
    torch.testing.assert_close(last[real], states.last_hidden_state[real], atol=1e-5, rtol=1e-5)
    # Hugging Face's last hidden state is after the final norm, the last block's own is not handed out.
    for mine, theirs in zip(seen[:-1], states.hidden_states[:-1], strict=True):
        torch.testing.assert_close(mine[real], theirs[real], atol=1e-5, rtol=1e-5)

    trained = {id(weight) for weight in tagger.parameters()}
    parts = [part for layer in (*mlp.writes, *mlp.reads) for part in layer]
    weights = [(parameter(bridge, part), part) for part in parts]
    assert all(id(weight) in trained and weight.shape[part.axis] == D_MLP for weight, part in weights)
    n_biases = sum(part.parameter == "bias" for part in parts)
    assert n_biases == {"gpt2": 3, "neox": 3, "neox-sequential": 3, "llama-with-biases": 6}.get(kind, 0)

    chosen = Neurons(torch.rand(3, D_MLP, generator=torch.Generator().manual_seed(1)) < 0.3, mlp)
    before = tagger(IDS, MASK)[real]
    saved = {name: weight.clone() for name, weight in tagger.weights().items()}
    with ablated(tagger, chosen):
        by_hook = tagger(IDS, MASK)[real]
    for sever in ("out", "both"):
        prune_(tagger, chosen, sever=sever)
        torch.testing.assert_close(tagger(IDS, MASK)[real], by_hook, atol=1e-5, rtol=0)
        pruned: list[torch.Tensor] = []
        with reading(tagger), streaming(bridge, mlp, lambda layer, x, to=pruned: to.append(x[..., chosen.mask[layer]])):
            hidden(bridge, IDS, MASK)
        assert all((x == 0).all() == (sever == "both") for x in pruned)
        tagger.load_weights(saved)
    assert (by_hook - before).abs().max() > 1e-2
    torch.testing.assert_close(tagger(IDS, MASK)[real], before)


def test_the_families_that_loading_names_are_those_that_have_sites():
    classes = {
        kinds[transformers.CONFIG_MAPPING[kind]].__name__  # pyright: ignore[reportAttributeAccessIssue]
        for kind in families.TYPES
        for kinds in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING)
        if transformers.CONFIG_MAPPING[kind] in kinds
    }
    # BERT and its like have a causal class too, which is never loaded.
    assert set(FAMILIES) - {"TransformerLensNative"} <= classes
    assert len(families.TYPES) == len(FAMILIES) - 1


@pytest.mark.parametrize("kind", ["bert", "toy", "gpt2", "gemma"])
def test_token_vectors_are_what_the_token_site_sees(kind, bert_model, toy_model, tmp_path, untouched: Untouched):
    tagger = {"bert": bert_model, "toy": toy_model.tagger}.get(kind) or decoder(kind, tmp_path)
    seen: list[torch.Tensor] = []
    with (
        untouched(tagger),
        reading(tagger),
        streaming(tagger.bridge, token_site(tagger.bridge), lambda _, x: seen.append(x)),
    ):
        hidden(tagger.bridge, IDS, MASK)
    with untouched(tagger), reading(tagger):
        again = token_vectors(tagger.bridge, IDS[0])
    (tokens,) = seen
    assert torch.equal(tokens[0], again)
    (weight,) = [weight for weight in trunk(tagger.bridge).parameters() if weight.shape[0] > int(IDS.max())][:1]
    scale = D_MODEL**0.5 if kind == "gemma" else 1
    torch.testing.assert_close(again, weight[IDS[0]] * scale)


# --- sets


def test_neuron_prints_its_layer_and_index():
    assert (str(Neuron("1", 7)), repr(Neuron("embed", 217))) == ("L1N7", "LembedN217")


def test_neurons_iterate_by_layer_and_index():
    chosen = Neurons.of(SITE, [("1", 3), ("embed", 2), ("1", 0), ("1", 3)])
    assert [str(neuron) for neuron in chosen] == ["LembedN2", "L1N0", "L1N3"]
    assert len(chosen) == 3
    assert chosen.per_layer() == {"embed": 1, "0": 0, "1": 2}
    assert chosen.share_by_layer() == [0.25, 0.0, 0.5]
    assert repr(chosen) == "Neurons(mlp_post, 3 of 12; LembedN2, L1N0, L1N3)"


def test_neurons_of_takes_numbers_as_layer_names():
    assert Neurons.of(SITE, [(1, 2)]) == Neurons.of(SITE, [("1", 2)])
    assert len(Neurons.of(SITE, [])) == 0


@pytest.mark.parametrize("member", [("7", 0), ("1", 4), ("1", -1), (-1, 0)])
def test_neurons_of_refuses_what_the_site_does_not_have(member):
    layer, index = member
    said = f"mlp_post has no neuron {index} in layer '?{layer}'?; layers embed, 0, 1, neurons 0 to 3"
    with pytest.raises(ValueError, match=said):
        Neurons.of(SITE, [("0", 0), member])


def test_neurons_refuse_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"mlp_post needs a mask of 3 layers by 4 neurons, got \(4, 3\)"):
        Neurons(torch.zeros(4, 3, dtype=torch.bool), SITE)


def test_neurons_of_two_sites_do_not_mix(toy_model):
    resid, mlp = (Neurons.of(site_of(toy_model.tagger.bridge, s), [("1", 2)]) for s in ("resid", "mlp_post"))
    for combine in (lambda: resid | mlp, lambda: resid & mlp, lambda: resid - mlp):
        with pytest.raises(ValueError, match="neurons of resid and of mlp_post cannot be combined"):
            combine()
    assert resid != mlp


def test_neurons_in_is_false_for_what_the_site_does_not_have():
    chosen = Neurons.of(SITE, [("embed", 3)])
    assert ("embed", 3) in chosen
    for member in (("embed", -1), ("embed", 4), ("embed", 99), ("7", 3)):
        assert member not in chosen


SETS = st.frozensets(st.sampled_from(ALL))


@settings(max_examples=100, deadline=None)
@given(SETS, SETS)
def test_neurons_behave_like_python_sets(a, b):
    one, two = Neurons.of(SITE, a), Neurons.of(SITE, b)
    assert set(one | two) == a | b
    assert set(one & two) == a & b
    assert set(one - two) == a - b
    assert set(~one) == set(ALL) - a
    assert len(one) == len(a)
    assert [neuron in one for neuron in ALL] == [neuron in a for neuron in ALL]
    assert (one == two) == (a == b)
    assert one == Neurons.of(SITE, list(one))
    assert hash(one) == hash(Neurons.of(SITE, sorted(a)))
    assert one != a


# --- random controls


@settings(max_examples=50, deadline=None)
@given(SETS, st.integers(0, 2**40))
def test_random_neurons_are_as_many_in_every_layer(members, seed):
    like = Neurons.of(SITE, members)
    control = random_neurons(like=like, seed=seed)
    assert control.per_layer() == like.per_layer()
    assert control == random_neurons(like=like, seed=seed)


def test_random_neurons_are_drawn_uniformly(toy_model, untouched: Untouched):
    site = site_of(toy_model.tagger.bridge, "mlp_post")
    like = Neurons.of(site, [("0", i) for i in range(16)] + [("2", i) for i in range(32)])
    n = 400
    with untouched():
        draws = torch.stack([random_neurons(like=like, seed=seed).mask for seed in range(n)]).float()
    times, share = draws.sum(0), torch.tensor([0.25, 0.0, 0.5, 0.0])[:, None]
    spread = (n * share * (1 - share)).sqrt()
    assert ((times - n * share).abs() <= 4.5 * spread).all()  # 4.5 standard deviations of a binomial
    assert (times[0] - n / 4).std() > 0.8 * spread[0]
    # independent of `like`: half of the layer overlaps with half of the layer by half
    overlap = (draws.bool() & like.mask).sum((1, 2)).float().mean()
    assert overlap == pytest.approx(16 / 4 + 32 / 2, abs=0.6)


@settings(max_examples=50, deadline=None)
@given(SETS, SETS, st.integers(0, 2**40))
def test_random_neurons_are_none_of_a_set_where_there_is_room(members, others, seed):
    like, apart = Neurons.of(SITE, members), Neurons.of(SITE, others)
    control = random_neurons(like=like, seed=seed, apart=apart)
    assert control.per_layer() == like.per_layer()
    for n, avoided, both in zip(like.mask.sum(1), apart.mask.sum(1), (control & apart).mask.sum(1), strict=True):
        assert both == max(0, n - (SITE.width - avoided))  # only as many as must be


@pytest.mark.parametrize("apart", [False, True])
def test_random_neurons_can_be_matched_by_scale(toy_model, apart):
    site = site_of(toy_model.tagger.bridge, "mlp_post")
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(len(site.layers), site.width, generator=generator)
    # The two largest of every layer, and one in the middle: no uniform draw looks like that.
    place = scale.argsort(1).argsort(1)
    like = Neurons((place >= site.width - 2) | (place == site.width // 2), site)
    tenth = place * 10 // site.width
    draws = [random_neurons(like=like, seed=k, apart=like if apart else None, scale=scale) for k in range(20)]
    for control in draws:
        for k in range(10):
            assert torch.equal((control.mask & (tenth == k)).sum(1), (like.mask & (tenth == k)).sum(1))
        assert bool(control & like) <= (not apart)
    assert len({control for control in draws}) == 20
    plain = random_neurons(like=like, seed=0)
    assert scale[draws[0].mask].mean() > scale[plain.mask].mean() + 0.1


# --- streaming


def test_streaming_replaces_what_visit_returns(bert_model, untouched: Untouched):
    ids = torch.tensor([[2, 5, 6, 3]])
    site = site_of(bert_model.bridge, "resid")
    last = len(site.layers) - 1
    with untouched(bert_model), reading(bert_model):
        before = hidden(bert_model.bridge, ids, torch.ones_like(ids))
        with streaming(bert_model.bridge, site, lambda layer, x: x + 1 if layer == last else None):
            shifted = hidden(bert_model.bridge, ids, torch.ones_like(ids))
        after = hidden(bert_model.bridge, ids, torch.ones_like(ids))
    torch.testing.assert_close(shifted, before + 1)
    assert torch.equal(after, before)


def test_streaming_leaves_no_hook_after_an_error(bert_model, untouched: Untouched):
    def fail(layer: int, activations: torch.Tensor) -> None:
        raise KeyError("mine")

    ids = torch.tensor([[2, 5, 3]])

    def body() -> None:
        with streaming(bert_model.bridge, site_of(bert_model.bridge), fail):
            hidden(bert_model.bridge, ids, ids)

    with untouched(bert_model), pytest.raises(KeyError, match="mine"):
        body()


def test_streaming_refuses_a_hook_that_the_model_lacks(bert_model, untouched: Untouched):
    site = Site("mlp_post", ("0",), ("blocks.0.mlp.nowhere",), 4, ((),), ((),))
    with (
        untouched(bert_model),
        pytest.raises(KeyError, match=r"blocks\.0\.mlp\.nowhere"),
        streaming(bert_model.bridge, site, lambda *_: None),
    ):
        pass


def test_config_of_the_toy_is_a_known_family(toy_model):
    assert isinstance(toy_model.tagger.bridge.cfg, TransformerBridgeConfig)
    assert toy_model.tagger.bridge.cfg.architecture in FAMILIES
