"""Masks of weights: what neurons and parts are made of, as sets, for every family; tied and joint weights once."""

from pathlib import Path

import pytest
import torch
import transformers

from relearn_lens.models import toy as toy_module
from relearn_lens.models.loading import load_language_model
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import Model
from relearn_lens.neurons.sites import Neurons, Site, site_of
from relearn_lens.neurons.weights import WeightMask, entries, parts, severed
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import held, prune_
from tests.families import ENCODERS, KINDS, SEVERS, small_tagger, some_of
from tests.fixtures import Untouched, unchecked


def copies(model: Model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.weights().items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    """A small tagger of a family, made once."""
    made = {}

    def of(kind: str) -> Model:
        if kind not in made:
            made[kind] = small_tagger(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def tied(folder: Path) -> Model:
    """A language model whose head is its embedding."""
    words = toy_module.tokenizer(opening=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=True,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return load_language_model(folder, device="cpu")


# --- what neurons are made of


@pytest.mark.parametrize("sever", SEVERS)
@pytest.mark.parametrize("site", ["resid", "mlp_post", "attn_head"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma", "native"])
def test_mask_of_neurons_is_what_pruning_changes(family, kind, site, sever, untouched: Untouched):
    model = family(kind)
    chosen = some_of(model, site, blocks_only=sever == "gain" and site == "resid")
    before = copies(model)
    try:
        with untouched(model):
            mask = WeightMask.of(model, chosen, sever=sever)
    except ValueError:
        with pytest.raises(ValueError, match="no weights to prune"):
            prune_(model, chosen, sever=sever)
        return
    prune_(model, chosen, sever=sever)
    by_neurons = copies(model)
    model.load_weights(before)
    prune_(model, mask)
    assert all(torch.equal(value, by_neurons[name]) for name, value in model.weights().items())
    model.load_weights(before)
    for name, value in by_neurons.items():
        assert not (value != before[name])[~mask[name]].any()
        assert (value[mask[name]] == mask.nothing.get(name, 0)).all()
    assert 0 < mask.n_entries == sum(int(m.sum()) for m in mask.values())


def test_mask_of_the_toys_planted_neurons_by_hand(toy_model):
    mask = WeightMask.of(toy_model.tagger, Neurons.of(site_of(toy_model.tagger.bridge, "mlp_post"), toy_model.planted))
    assert mask.weights() == ["trunk.layers.1.mlp.fc_out.weight"]
    expected = torch.zeros(32, 64, dtype=torch.bool)
    expected[:, [7, 19, 32, 58]] = True
    assert torch.equal(mask["trunk.layers.1.mlp.fc_out.weight"], expected)
    total = sum(weight.numel() for weight in toy_model.tagger.weights().values())
    assert (mask.n_entries, mask.share) == (128, 128 / total)
    assert repr(mask) == f"WeightMask(128 entries in 1 of {len(mask)} weights, {128 / total:.2%})"


def test_mask_takes_no_memory_where_it_says_the_same(toy_model):
    mask = WeightMask.of(toy_model.tagger, Neurons.of(site_of(toy_model.tagger.bridge, "mlp_post"), toy_model.planted))
    for one in (mask, ~mask, mask | WeightMask.of_parts(toy_model.tagger, "block 0")):
        assert sum(m.untyped_storage().nbytes() for m in one.values()) <= 4 * 64 + len(mask)


# --- sets


def test_masks_are_sets(bert_model):
    site, generator = site_of(bert_model.bridge), torch.Generator().manual_seed(0)
    drawn = [Neurons(torch.rand(4, 32, generator=generator) < 0.5, site) for _ in range(2)]
    one, two = (WeightMask.of(bert_model, neurons) for neurons in drawn)
    head, none = WeightMask.of_parts(bert_model, "head"), WeightMask.none(bert_model)
    assert one | two == WeightMask.of(bert_model, drawn[0] | drawn[1])
    assert one & two == WeightMask.of(bert_model, drawn[0] & drawn[1])
    assert one - two == WeightMask.of(bert_model, drawn[0] - drawn[1])
    assert (one - head, one & head, (one | head) - one, ~~one, one & ~one) == (one, none, head, one, none)
    assert one not in (two, none, ~one)
    assert ~none == WeightMask.of_parts(bert_model, parts(bert_model))
    assert ((~none).share, none.share, (~one).n_entries + one.n_entries) == (1, 0, (~none).n_entries)


def test_masks_of_two_models_do_not_mix(bert_model, toy_model, untouched: Untouched):
    mine, theirs = WeightMask.none(bert_model), ~WeightMask.none(toy_model.tagger)
    with pytest.raises(ValueError, match=r"masks of the weights of two models .*: \d+ names differ, such as \['trunk"):
        _ = mine | theirs
    with untouched(bert_model):
        for setting in (prune_, lambda *given: held(*given).__enter__()):
            with pytest.raises(ValueError, match=r"this mask is of the weights of another model: \d+ names differ"):
                setting(bert_model, theirs)
    assert mine != theirs
    masks = {name: mask if mask.ndim < 2 else mask.T for name, mask in mine.items()}
    with pytest.raises(
        ValueError, match=r"another model: trunk.embed.*word.* has shape \(32, 36\) in one and \(36, 32"
    ):
        WeightMask(masks).check(bert_model)


def test_mask_of_a_bare_bridge_is_refused(bert_model, untouched: Untouched):
    with untouched(bert_model), pytest.raises(ValueError, match="names the weights of a Tagger or LanguageModel"):
        prune_(bert_model.bridge, WeightMask.none(bert_model))


def test_mask_of_another_models_neurons_is_refused(bert_model):
    site = Site("mlp_post", ("0",), ("blocks.0.mlp.out.hook_in",), 4, ((),), ((),))
    with pytest.raises(ValueError, match="these neurons are of another model: their site 'mlp_post' has 1 layers of 4"):
        WeightMask.of(bert_model, Neurons(torch.ones(1, 4, dtype=torch.bool), site))
    with pytest.raises(ValueError, match="unknown sever 'in'; known: out"):
        unchecked(WeightMask.of.__func__)(WeightMask, bert_model, some_of(bert_model, "resid"), sever="in")


# --- parts


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_in_one_part(family, kind):
    model = family(kind)
    n = len(model.bridge.blocks)
    blocks = [f"block {i}" for i in range(n)]
    norm = [] if kind in ENCODERS and kind != "modernbert" else ["final norm"]
    found = parts(model)
    assert list(found) == ["embedding", *blocks, *norm, "head"]
    halves = parts(model, within=range(n))
    assert list(halves) == [
        "embedding",
        *(f"{b} {half}" for b in blocks for half in ("attention", "mlp")),
        *norm,
        "head",
    ]
    for one in (found, halves, parts(model, bands=2)):
        trained = [name for name, weight in model.plain().items() if isinstance(weight, torch.nn.Parameter)]
        assert sorted(name for names in one.values() for name in names) == sorted(trained)
    for i in range(n):
        assert {*halves[f"block {i} attention"], *halves[f"block {i} mlp"]} == {*found[f"block {i}"]}
        assert all(f".{i}." in name for name in found[f"block {i}"])


def test_parts_of_the_toy_by_hand(toy_model):
    found = parts(toy_model.tagger, within=[2])
    assert found["embedding"] == ("trunk.tok_embed.weight", "trunk.pos.weight")
    layer = "trunk.layers.2"
    assert found["block 2 attention"] == tuple(
        f"{layer}.{part}.{kind}"
        for part in ("ln1", "attn.q", "attn.k", "attn.v", "attn.o")
        for kind in ("weight", "bias")
    )
    assert found["block 2 mlp"] == tuple(
        f"{layer}.{part}.{kind}" for part in ("ln2", "mlp.fc_in", "mlp.fc_out") for kind in ("weight", "bias")
    )
    assert found["final norm"] == ("trunk.ln_out.weight", "trunk.ln_out.bias")
    assert list(parts(toy_model.tagger, bands=2)) == [
        "embedding",
        "blocks 0 to 1",
        "blocks 2 to 3",
        "final norm",
        "head",
    ]
    assert list(parts(toy_model.tagger, bands=3))[1:4] == ["blocks 0 to 1", "block 2", "block 3"]


def test_parts_refuse_what_is_not_there(toy_model):
    for bands, within in ((0, []), (5, []), (2, [1])):
        with pytest.raises(ValueError, match="bands must be 1 to 4, the number of blocks, and goes without `within`"):
            parts(toy_model.tagger, bands=bands, within=within)
    with pytest.raises(ValueError, match="no block 4; it has blocks 0 to 3"):
        parts(toy_model.tagger, within=[4])
    with pytest.raises(ValueError, match=r"no part 'block 7'; it has embedding, .*block 0 attention.*head"):
        WeightMask.of_parts(toy_model.tagger, "block 7")


def test_tied_weights_are_one_part_and_one_entry(tmp_path):
    model = tied(tmp_path)
    found = parts(model)
    n = len(model.bridge.blocks)
    assert list(found) == ["embedding and head", *(f"block {i}" for i in range(n)), "final norm"]
    assert found["embedding and head"] == ("trunk.embed_tokens.weight",)
    mask = WeightMask.of_parts(model, "embedding and head")
    assert mask.n_entries == model.weights()["trunk.embed_tokens.weight"].numel()
    assert WeightMask.of_parts(model, found).n_entries == sum(p.numel() for p in model.parameters())


def test_weights_that_share_memory_say_the_same_and_count_once(family):
    model = family("gpt2")
    joint = "trunk.h.0.attn.c_attn.weight"
    mask = WeightMask.of_parts(model, "queries", among={"queries": ("trunk.h.0.attn.q.weight",)})
    assert joint in mask.joint
    assert "trunk.h.0.attn.q.weight" not in mask.joint
    assert (int(mask[joint].sum()), mask.n_entries) == (32 * 32, 32 * 32)
    before = copies(model)
    prune_(model, mask)
    assert torch.equal(model.weights()[joint] == 0, mask[joint])
    model.load_weights(before)
    everything = ~WeightMask.none(model)
    assert everything.n_entries == sum(w.numel() for n, w in before.items() if "c_attn" not in n)
    assert (~mask)[joint].logical_not().sum() == 32 * 32


# --- holding


@pytest.mark.parametrize("kind", ["bert", "gpt2", "native"])
def test_only_the_block_that_is_not_held_trains(family, kind, corpus, untouched: Untouched):
    model = family(kind)
    text = toy_module.corpus(sentences=12) if kind == "native" else corpus
    before, free = copies(model), WeightMask.of_parts(model, "block 1")
    with untouched(model, weights=False), held(model, ~free):
        list(retrain_(model, text, epochs=1, every=1, lr=1e-2))
    moved = {name: value != before[name] for name, value in model.weights().items()}
    model.load_weights(before)
    assert [name for name, m in moved.items() if m.any()] == [n for n in free.weights() if moved[n].any()]
    assert sum(m.float().mean() > 0.5 for m in moved.values()) >= 8


def test_masks_know_the_plain_weights_under_adapters(bert, corpus):
    chosen = some_of(bert, "resid")
    mask = WeightMask.of(bert, chosen)
    with adapted(bert, rank=2):
        assert WeightMask.of(bert, chosen) == mask
        mask.check(bert)
        with held(bert, mask):
            before = copies(bert)
            list(retrain_(bert, corpus, epochs=1, every=1, lr=1e-2))
        assert not any((before[n] != w)[mask[n]].any() for n, w in bert.weights().items())
        with pytest.raises(
            ValueError, match=r"trunk.encoder.layer.0.attention.self.query.weight has a low-rank adapter now"
        ):
            prune_(bert, WeightMask.of_parts(bert, "block 0"))


# --- what is still cut


def test_pruned_neurons_are_severed_until_training_moves_what_reads_them(toy, untouched: Untouched):
    model, chosen = toy.tagger, Neurons.of(site_of(toy.tagger.bridge, "mlp_post"), toy.planted)
    everything = chosen | ~chosen
    idle = severed(model, everything)  # the decoys, which nothing reads
    assert not len(idle & chosen)
    before = copies(model)
    prune_(model, chosen)
    with untouched(model):
        assert severed(model, everything) == chosen | idle
        assert severed(model, ~chosen) == idle
    one = next(iter(chosen))
    layer, index = int(one[0]), one[1]
    ((weight, mask, _),) = entries(model, Neurons.of(chosen.site, [one]))
    with torch.no_grad():
        weight[mask] = 1e-9  # lost beside the others
        assert severed(model, chosen) == chosen
        weight[mask] = 1e-3
    assert severed(model, chosen) == chosen - Neurons.of(chosen.site, [(str(layer), index)])
    model.load_weights(before)


def test_neurons_without_the_weights_that_would_be_cut_are_not_severed(bert):
    everything = some_of(bert, "resid")
    everything = everything | ~everything
    assert not len(severed(bert, everything, sever="writes"))  # the family has none of that kind
    cut = some_of(bert, "mlp_post")
    prune_(bert, cut)
    assert severed(bert, cut | ~cut) == cut
    with adapted(bert, rank=2):
        assert not len(severed(bert, cut))


def test_a_mask_of_entries_says_the_same_of_weights_that_share_memory(tmp_path):
    model = small_tagger("gpt2", tmp_path)
    plain = model.plain()
    shared: dict[int, list[str]] = {}
    for name, weight in plain.items():
        shared.setdefault(weight.untyped_storage().data_ptr(), []).append(name)
    names = max(shared.values(), key=len)
    part = min(names, key=lambda name: plain[name].numel())
    given = torch.zeros(plain[part].shape, dtype=torch.bool)
    given.view(-1)[::3] = True
    mask = WeightMask.of_entries(model, {part: given})
    assert set(mask.weights()) == {name for name in names if bool(mask[name].any())}
    assert len(mask.weights()) > 1
    assert torch.equal(mask[part], given)
    assert mask.n_entries == int(given.sum())
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for 'nothing': this model has no such weight"):
        WeightMask.of_entries(model, {"nothing": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for .*: this model has shape"):
        WeightMask.of_entries(model, {part: torch.ones(3, dtype=torch.bool)})
