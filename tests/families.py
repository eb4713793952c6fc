"""What works for which family of models, as numbers: `python -m tests.families` prints the table.

Small models with random weights, built from a configuration. A cell is a largest absolute difference of logits, but for
`effect` (what ablating a third of the neurons does to the logits) and `trained` (parameters with a gradient).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.models import toy
from relearn_lens.models.export import export
from relearn_lens.models.loading import load_language_model, load_tagger
from relearn_lens.models.model import LanguageModel, Tagger
from relearn_lens.neurons.sites import SITES, Neurons, Sever, parameter, site_of
from relearn_lens.remove.ablation import ablated, held, prune_
from tests.fixtures import CONTEXT, D_MLP, D_MODEL, LABELS, N_LAYERS, VOCAB, warmed
from tests.made import Pool
from tests.neurons.test_sites import DECODERS, IDS, MASK, decoder, save_decoder

REAL = MASK.bool()
# These two take more than they declare.
_DebertaV2Config: Any = transformers.DebertaV2Config
_ModernBertConfig: Any = transformers.ModernBertConfig
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(
        vocab_size=len(VOCAB), hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, max_position_embeddings=CONTEXT,
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=len(VOCAB), dim=D_MODEL, hidden_dim=D_MLP, n_layers=N_LAYERS, n_heads=4,
        max_position_embeddings=CONTEXT, sinusoidal_pos_embds=False,
    ),
    **{
        kind: lambda config=config: config(
            vocab_size=len(VOCAB), hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, max_position_embeddings=CONTEXT + 1, pad_token_id=0, type_vocab_size=1,
        )
        for kind, config in {
            "roberta": transformers.RobertaConfig,
            "xlm-roberta": transformers.XLMRobertaConfig,
            "camembert": transformers.CamembertConfig,
        }.items()
    },
    **{
        kind: lambda width=width: transformers.ElectraConfig(
            vocab_size=len(VOCAB), embedding_size=width, hidden_size=D_MODEL, intermediate_size=D_MLP,
            num_hidden_layers=N_LAYERS, num_attention_heads=4, max_position_embeddings=CONTEXT,
        )
        for kind, width in {"electra": D_MODEL, "electra-small": D_MODEL // 2}.items()
    },
    **{
        kind: lambda more=more: _DebertaV2Config(
            vocab_size=len(VOCAB), hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, max_position_embeddings=CONTEXT, relative_attention=True, type_vocab_size=0,
            pos_att_type=["p2c", "c2p"], position_biased_input=False,
            **({"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"} | more),
        )
        for kind, more in {"deberta-v3": {}, "deberta-v2": {"legacy": False, "share_att_key": False}}.items()
    },
    "modernbert": lambda: _ModernBertConfig(
        vocab_size=len(VOCAB), hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, max_position_embeddings=CONTEXT, local_attention=4, global_attn_every_n_layers=2,
        pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
    ),
}  # fmt: skip
KINDS = (*ENCODERS, *DECODERS, "native")
SEVERS: tuple[Sever, ...] = ("out", "both", "gain", "writes")
NO_FORM = ("no Hugging Face form", "is not one linear layer", "Hugging Face has no AutoModelForTokenClassification")
"""Why a tagger of a family cannot be exported as a model for token classification."""
CELLS = ("effect", "out", "both", "gain", "writes", "held", "trained", "export")


def small_tagger(kind: str, folder: Path) -> Tagger:
    """A small tagger of a family, in eval mode."""
    if kind == "native":
        return warmed(toy.tagger())
    if kind in DECODERS:
        return decoder(kind, folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(ENCODERS[kind]())
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    model.save_pretrained(folder)
    transformers.BertTokenizer(vocab=VOCAB, do_lower_case=True).save_pretrained(folder)
    return warmed(load_tagger(folder, LABELS, device="cpu"))


@cache
def _taggers(kind: str) -> Pool[Tagger]:
    def new() -> Tagger:
        with tempfile.TemporaryDirectory() as folder:
            return small_tagger(kind, Path(folder))

    return Pool(new)


def lent_tagger(kind: str) -> Tagger:
    """A small tagger of a family that other tests had before, as new; one at a time, for one test, without a folder."""
    return _taggers(kind).lend()()


@cache
def _language_models(kind: str) -> Pool[LanguageModel]:
    def new() -> LanguageModel:
        with tempfile.TemporaryDirectory() as folder:
            save_decoder(kind, Path(folder))
            return load_language_model(folder, device="cpu")

    return Pool(new)


def lent_language_models(kind: str) -> Callable[[], LanguageModel]:
    """What makes small decoders as language models for one test, each another one that other tests had before."""
    return _language_models(kind).lend()


def lent_language_model(kind: str) -> LanguageModel:
    """One of them alone."""
    return lent_language_models(kind)()


def some_of(tagger: Tagger, site: str, *, blocks_only: bool = False) -> Neurons:
    """A third of a site's neurons, drawn; at least one in every layer, none of the embedding if it is left out."""
    where = site_of(tagger.bridge, site)
    mask = torch.rand(len(where.layers), where.width, generator=torch.Generator().manual_seed(3)) < 1 / 3
    mask[:, 1] = True
    if blocks_only and where.layers[0] == "embed":
        mask[0] = False
    return Neurons(mask, where)


def said(tagger: Tagger) -> Tensor:
    """Logits of the tokens that are no padding."""
    with torch.no_grad():
        return tagger(IDS, MASK)[REAL]


def effect(tagger: Tagger, site: str) -> float:
    """What ablating by hook changes."""
    with ablated(tagger, some_of(tagger, site)):
        now = said(tagger)
    return _apart(now, said(tagger))


def weights_against_hooks(tagger: Tagger, site: str, sever: Sever) -> float | None:
    """Pruned in the weights against the hooks that say the same; None where the family has no such weights."""
    chosen = some_of(tagger, site, blocks_only=sever == "gain" and site == "resid")
    before = {name: value.clone() for name, value in tagger.weights().items()}
    try:
        with _as_severed(tagger, chosen, sever):
            wanted = said(tagger)
        prune_(tagger, chosen, sever=sever)
        return _apart(said(tagger), wanted)
    except ValueError as error:
        if not any(word in str(error) for word in ("no weights", "share", "joint")):
            raise
        return None
    finally:
        tagger.load_weights(before)


def _as_severed(tagger: Tagger, chosen: Neurons, sever: Sever) -> Any:
    """Hooks that do what severing the weights does."""
    bridge, site = tagger.bridge, chosen.site
    if sever in ("out", "both"):
        return ablated(tagger, chosen)
    blocks = [(name, mask) for name, mask in zip(site.layers, chosen.mask, strict=True) if name != "embed"]

    def hold(mask: Tensor, value: Any = 0.0) -> Callable[..., Tensor]:
        return lambda x, hook: torch.where(mask, torch.as_tensor(value, dtype=x.dtype), x)

    hooks = []
    for i, (name, mask) in enumerate(blocks):
        block = bridge.blocks[int(name)]
        if sever == "gain":
            norm = block.ln2.original_component
            bias = getattr(norm, "bias", None)
            hooks.append((f"blocks.{i}.ln2.hook_out", hold(mask, 0.0 if bias is None else bias.detach())))
            continue
        after = hasattr(block, "ln1_post")  # Gemma 2 normalises what a part writes
        parts = ("ln1_post", "ln2_post") if after else ("attn.o", "mlp.out")
        hooks += [(f"blocks.{i}.{part}.hook_out", hold(mask)) for part in parts]
    if sever == "writes" and site.layers[0] == "embed":
        last = [f"{part}.hook_out" for part in ("embed_ln", "embed", "pos_embed")]
        last = [name for name in last if name in bridge.hook_dict]
        # ModernBERT normalises its embedding before the stream begins.
        hooks += [(name, hold(chosen.mask[0])) for name in (last[:1] if last[0] == "embed_ln.hook_out" else last)]
    return bridge.hooks(fwd_hooks=hooks)


def held_drift(tagger: Tagger, site: str) -> float | None:
    """How far held weights move in three steps of AdamW with weight decay; None without a weight form."""
    sever: Sever = "out" if all(site_of(tagger.bridge, site).writes) else "writes"
    chosen = some_of(tagger, site)
    before = {name: value.clone() for name, value in tagger.weights().items()}
    prune_(tagger, chosen, sever=sever)
    parts = [
        (parameter(tagger.bridge, part), part, mask)
        for layer, mask in zip(chosen.site.parts(sever), chosen.mask, strict=True)
        for part in layer
    ]
    pruned = [_of_neurons(weight, part, mask, chosen.site.size).clone() for weight, part, mask in parts]
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=1e-2, weight_decay=0.1)
    try:
        with held(tagger, chosen, sever=sever):
            for _ in range(3):
                _loss(tagger).backward()
                optimizer.step()
                optimizer.zero_grad()
        moved = any(not torch.equal(value, before[name]) for name, value in tagger.weights().items())
        assert moved, "nothing was trained"
        now = [_of_neurons(weight, part, mask, chosen.site.size) for weight, part, mask in parts]
        return max(_apart(a, b) for a, b in zip(now, pruned, strict=True))
    finally:
        tagger.load_weights(before)


def _of_neurons(weight: Tensor, part: Any, mask: Tensor, size: int) -> Tensor:
    """What of a weight belongs to the neurons."""
    rows = weight.detach().movedim(part.axis, 0)
    units = size if rows.shape[0] == len(mask) * size else 1
    return rows.unflatten(0, (len(mask), units))[mask]


def trained(tagger: Tagger) -> tuple[int, int]:
    """Parameters that a loss reaches, of all that make up the model. Queries, keys and values that a bridge trains in
    three parts are not counted again as the joint matrix that they came from."""
    tagger.zero_grad()
    _loss(tagger).backward()
    joint = ("c_attn", "query_key_value", ".qkv.")
    named = [(n, p) for n, p in tagger.named_parameters() if not any(j in n for j in joint)]
    if tagger.bridge.cfg.architecture == "TransformerLensNative":  # the vocabulary head is not part of a tagger
        named = [(n, p) for n, p in named if not n.startswith("trunk.head.")]
    reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for _, p in named)
    tagger.zero_grad()
    return reached, len(named)


def export_difference(tagger: Tagger, folder: Path) -> float | None:
    """Logits of an exported and loaded model against ours, after pruning and training; None where there is no form."""
    from transformers import AutoModelForTokenClassification

    prune_(tagger, some_of(tagger, "mlp_post"))
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=1e-2)
    _loss(tagger).backward()
    optimizer.step()
    try:
        path = export(tagger, folder / "exported")
    except ValueError as error:
        if not any(reason in str(error) for reason in NO_FORM):
            raise
        return None
    plain = AutoModelForTokenClassification.from_pretrained(path, attn_implementation="eager").eval()
    assert tuple(plain.config.id2label[i] for i in range(len(tagger.tags))) == tagger.tags
    with torch.no_grad():
        return _apart(plain(input_ids=IDS, attention_mask=MASK).logits[REAL], said(tagger))


def _loss(tagger: Tagger) -> Tensor:
    logits = tagger(IDS, MASK)[REAL]
    return F.cross_entropy(logits, torch.arange(len(logits)) % len(tagger.tags))


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


def rows(tagger: Tagger, folder: Path) -> dict[str, dict[str, Any]]:
    """All cells of one family, by site; the model is pruned and trained at the end."""
    table: dict[str, dict[str, Any]] = {}
    for site in SITES:
        cells = table[site] = {"effect": effect(tagger, site)}
        for sever in SEVERS:
            fits = site == "resid" or sever in ("out", "both")
            cells[sever] = weights_against_hooks(tagger, site, sever) if fits else None
        cells["held"] = held_drift(tagger, site)
    of_all = {"trained": trained(tagger), "export": export_difference(tagger, folder)}  # whatever the site
    return {site: cells | of_all for site, cells in table.items()}


def main() -> None:
    """Print the table."""
    transformers.utils.logging.disable_progress_bar()
    print(f"{'family':18}{'site':10}" + "".join(f"{cell:>10}" for cell in CELLS))
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            table = rows(small_tagger(kind, Path(folder)), Path(folder))
        for site, found in table.items():
            shown = [_shown(found[cell]) for cell in CELLS]
            print(f"{kind:18}{site:10}" + "".join(f"{cell:>10}" for cell in shown), flush=True)


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell[0]}/{cell[1]}" if isinstance(cell, tuple) else f"{cell:.1e}" if cell else "0"


if __name__ == "__main__":
    main()
