"""Every family and site: hooks and weights say the same, held neurons stay, all is trained, and it loads elsewhere.

The numbers are those that `python -m tests.families` prints.
"""

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relearn_lens.find.attribution import attribute
from relearn_lens.models.export import export
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger, computing, reading
from relearn_lens.neurons.sites import FAMILIES, SITES, Neurons, site_of
from relearn_lens.neurons.weights import check_prunable
from relearn_lens.remove.ablation import ablated, prune_
from relearn_lens.text.concept import Concept
from tests.families import (
    ENCODERS,
    IDS,
    KINDS,
    MASK,
    REAL,
    lent_language_model,
    lent_tagger,
    rows,
    said,
    small_tagger,
    some_of,
)
from tests.fixtures import D_MLP, D_MODEL, LABELS, N_LAYERS
from tests.spare import PLAIN

NO_EXPORT = ("native", "modernbert", "gemma3")
"""No class of Hugging Face, or one whose head is more than a linear layer."""
PRE_NORM = tuple(kind for kind in KINDS if kind not in ENCODERS or kind == "modernbert")


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], tuple[Tagger, dict[str, dict[str, Any]]]]:
    """By its name, a model of a family and its cells by site; each made once."""

    @cache
    def made(kind: str) -> tuple[Tagger, dict[str, dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(kind)
        tagger = small_tagger(kind, folder)
        return tagger, rows(tagger, folder)

    return made


@pytest.mark.parametrize("site", list(SITES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_at_a_site(kind, site, families):
    cells = families(kind)[1][site]
    assert cells["effect"] > 1e-3
    has = {
        "out": site != "resid" or kind not in PRE_NORM,
        "both": (site == "mlp_post" and kind != "modernbert")
        or kind not in PRE_NORM
        or (kind == "native" and site == "attn_head"),
        "gain": site == "resid",
        "writes": site == "resid" and kind in PRE_NORM,
    }
    for sever, there in has.items():
        assert (cells[sever] is not None) == there, sever
        assert cells[sever] is None or cells[sever] < 1e-5, sever
    assert cells["held"] == 0
    reached, of = cells["trained"]
    assert reached == of > 20
    assert cells["export"] is None if kind in NO_EXPORT else cells["export"] < 1e-5


def test_every_family_is_in_the_table(families):
    tried = {families(kind)[0].bridge.cfg.architecture for kind in KINDS}
    assert tried == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_and_layers(kind, families):
    tagger, _ = families(kind)
    blocks = tuple(map(str, range(4 if kind == "native" else N_LAYERS)))
    resid, mlp, heads = (site_of(tagger.bridge, site) for site in ("resid", "mlp_post", "attn_head"))
    assert (resid.layers, mlp.layers, heads.layers) == (("embed", *blocks), blocks, blocks)
    sizes = (32, 64, 2) if kind == "native" else (D_MODEL, D_MLP, 4)
    assert (resid.width, mlp.width, heads.width) == sizes


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "native"])
def test_attribution_of_heads_sums_their_units(kind, corpus):
    tagger = lent_tagger(kind)
    if kind == "native":
        from relearn_lens.models import toy

        corpus, concept = toy.corpus(sentences=10), Concept("place")
    else:
        concept = Concept("place", labels=["LOC"])
    found = attribute(tagger, corpus, concept, site="attn_head", steps=4)
    assert found.score.shape == (len(found.site.layers), found.site.width)
    assert bool(found.score.abs().sum() > 0)
    assert not found.is_cut_set


def test_a_form_that_a_family_lacks_is_refused():
    gpt2 = lent_tagger("gpt2")
    resid, heads = some_of(gpt2, "resid"), some_of(gpt2, "attn_head")
    with pytest.raises(ValueError, match="no weights"):
        prune_(gpt2, resid)
    with pytest.raises(ValueError, match="no weights"):
        prune_(gpt2, resid, sever="gain")  # the embedding has no such LayerNorm
    check_prunable(gpt2, some_of(gpt2, "resid", blocks_only=True), sever="gain")
    with pytest.raises(ValueError, match=r"share|joint|no weights"):
        prune_(gpt2, heads, sever="both")


def test_gain_alone_keeps_the_bias(bert):
    """As published: the coordinate is the bias of the LayerNorm on every token, not 0."""
    chosen = Neurons.of(site_of(bert.bridge, "resid"), [("2", 5)])
    prune_(bert, chosen, sever="gain")
    bias = float(bert.bridge.blocks[2].ln2.original_component.bias[5].detach())
    assert bias != 0
    now = said(bert)
    with ablated(bert, chosen, value=bias):
        torch.testing.assert_close(said(bert), now)
    with ablated(bert, chosen):
        assert not torch.equal(said(bert), now)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "deberta-v3", "modernbert", "mistral", "gemma2", "gemma3"])
def test_padding_beyond_a_window_is_finite_in_half_precision(kind, dtype, monkeypatch):
    tagger = lent_tagger(kind)
    config: Any = tagger.bridge.original_model.config
    if kind in ("mistral", "gemma2"):
        monkeypatch.setattr(config, "sliding_window", 4)
    ids = torch.arange(5, 21)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    hooks = sum(len(module._forward_pre_hooks) for module in tagger.bridge.modules())
    with reading(tagger):
        exact = tagger(ids, mask)
        with computing(tagger, dtype):
            near = tagger(ids, mask)
    assert near.isfinite().all()
    assert (near - exact)[mask.bool()].abs().max() < 0.1 * exact.abs().max()
    assert sum(len(module._forward_pre_hooks) for module in tagger.bridge.modules()) == hooks


# --- checkpoints


LOADS = """
import json, sys, torch, transformers
ids, mask = torch.tensor({ids}), torch.tensor({mask})
for folder in sys.argv[1:]:
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids, attention_mask=mask).logits.tolist()))
    transformers.AutoTokenizer.from_pretrained(folder)
assert "relearn_lens" not in sys.modules and "transformer_lens" not in sys.modules
"""


def elsewhere(*folders: Path) -> list[torch.Tensor]:
    """Logits of some folders in a fresh process with transformers alone."""
    script = LOADS.format(ids=IDS.tolist(), mask=MASK.tolist())
    done = subprocess.run([*PLAIN.python, "-c", script, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()[-len(folders) :]]


def test_exported_taggers_load_in_a_fresh_process(tmp_path):
    taggers = {}
    for kind in ("distilbert", "gpt2"):
        tagger = small_tagger(kind, tmp_path / kind)
        prune_(tagger, some_of(tagger, "mlp_post"))
        path = export(tagger, tmp_path / f"{kind}-out")
        assert {p.suffix for p in path.iterdir()} <= {".json", ".safetensors", ".txt"}
        again = load_tagger(path, LABELS, device="cpu")
        torch.testing.assert_close(said(again), said(tagger), atol=1e-6, rtol=1e-6)
        taggers[path] = tagger
    for there, tagger in zip(elsewhere(*taggers), taggers.values(), strict=True):
        torch.testing.assert_close(there[REAL], said(tagger), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_an_exported_language_model_loads(kind, tmp_path):
    model = lent_language_model(kind)
    prune_(model, some_of(model, "mlp_post"))  # pyright: ignore[reportArgumentType]
    path = export(model, tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS, attention_mask=MASK).logits[REAL], model(IDS, MASK)[REAL])


def test_export_refuses_what_is_there(bert_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already; choose a folder that is empty"):
        export(bert_model, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_export_refuses_a_native_model(toy_model, tmp_path):
    with pytest.raises(ValueError, match=r"TransformerLensNative model has no Hugging Face form; keep its weights"):
        export(toy_model.tagger, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trained_bert(tmp_path, bert_folder, names: list[str]):
    """A BERT whose head was trained elsewhere for these tags, in a folder."""
    config: Any = transformers.AutoConfig.from_pretrained(bert_folder)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    tokenizer.save_pretrained(tmp_path)
    return model, tokenizer


ORDER = ["B-PER", "I-LOC", "O", "I-PER", "B-LOC"]


@pytest.mark.parametrize("loaded", [True, False])
def test_a_trained_head_is_kept_whatever_its_order(loaded, tmp_path, bert_folder):
    with torch.random.fork_rng(devices=[]):
        model, tokenizer = trained_bert(tmp_path, bert_folder, ORDER)
    with torch.no_grad():
        wanted = model(input_ids=IDS, attention_mask=MASK).logits[REAL]
    tagger = load_tagger(model if loaded else tmp_path, LABELS, tokenizer=tokenizer, device="cpu")
    rows = [ORDER.index(tag) for tag in tagger.tags]
    torch.testing.assert_close(said(tagger), wanted[:, rows], atol=1e-5, rtol=1e-5)


def test_a_head_for_other_labels_is_refused(tmp_path, bert_folder):
    with torch.random.fork_rng(devices=[]):
        trained_bert(tmp_path, bert_folder, ["O", "B-MISC", "I-MISC"])
    with pytest.raises(ValueError, match=r"trained for O, B-MISC, I-MISC, and the labels O, LOC, PER need O, B-LOC"):
        load_tagger(tmp_path, LABELS, device="cpu")


def test_a_loaded_model_needs_its_tokenizer(bert_folder):
    plain = transformers.BertForMaskedLM.from_pretrained(bert_folder)
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        load_tagger(plain, LABELS)
    with pytest.raises(ValueError, match="a Linear is no Hugging Face model"):
        load_tagger(torch.nn.Linear(2, 2), LABELS, tokenizer=object())
