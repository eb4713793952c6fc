"""A small model and text with a concept planted at a known place, and used by the model.

A native four-layer encoder whose weights are set by hand. The embedding of a place name has a *place* direction.
In layer 1 a few MLP neurons respond to it and write what the tagging head reads: they are the concept. In layer 2 a
few others respond half as strongly and write nothing: decoys, which a model that is retrained can recruit. No other
neuron, attention head or tag reads the place direction. Persons are planted in layer 0 in the same way, so that there
is something that pruning places should leave alone.

`language_model` is a causal model of the same size in which nothing is planted; it learns the text in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import boot as boot_native

from relearn_lens.models.model import LanguageModel, Tagger
from relearn_lens.text.corpus import OUTSIDE, Corpus, build_corpus

PLACES = ("Tarn", "Velda", "Osmere", "Brack", "Linholm", "Sarnow", "Querin", "Haldor")
PERSONS = ("Mira", "Oskar", "Ilse", "Benno", "Tamsin", "Rurik", "Edda", "Castor")
LABELS = (OUTSIDE, "person", "place")

N_LAYERS, D_MODEL, D_MLP = 4, 32, 64
PLANTED = tuple(("1", i) for i in (7, 19, 32, 58))
"""The MLP neurons that carry *place* and are used for it."""
DECOYS = tuple(("2", i) for i in (3, 11, 40, 61))
"""MLP neurons that respond to places and that nothing uses."""
PERSON_NEURONS = tuple(("0", i) for i in (5, 23, 44, 50))
"""The MLP neurons that carry *person* and are used for it."""

_TEMPLATES = (
    "{p} walked from {l} to {l} .",
    "in {l} the baker met {p} and {p} .",
    "{p} wrote a letter to {p} .",
    "the road to {l} was long and cold .",
    "they sold bread and salt at the market of {l} .",
    "{p} said that the winter was cold .",
    "the people of {l} welcomed {p} .",
    "a letter came from {l} for {p} .",
    "the baker and the miller walked home .",
)


@dataclass(frozen=True)
class Toy:
    """The planted model and its text."""

    tagger: Tagger
    corpus: Corpus
    planted: tuple[tuple[str, int], ...] = PLANTED
    decoys: tuple[tuple[str, int], ...] = DECOYS


def load(*, sentences: int = 600, seed: int = 0, mixed: bool = False) -> Toy:
    """The toy tagger (its F1 is about 1 as it is) and a corpus of so many sentences.

    `mixed` decoys answer to other words too. Plain ones tell places apart as well as the planted neurons do, so no
    score of how well a neuron tells them apart can rank the planted ones first.
    """
    return Toy(tagger(seed=seed, mixed=mixed), corpus(sentences=sentences, seed=seed))


def corpus(*, sentences: int = 600, seed: int = 0) -> Corpus:
    """Sentences from templates, with every name labelled `person` or `place`."""
    rng = np.random.default_rng(seed)
    text = []
    for template in rng.choice(np.array(_TEMPLATES), size=sentences):
        sentence = []
        for word in str(template).split():
            if word in ("{p}", "{l}"):
                names, label = (PERSONS, "person") if word == "{p}" else (PLACES, "place")
                sentence.append((str(rng.choice(np.array(names))), label, True))
            else:
                sentence.append((word, OUTSIDE, False))
        text.append(sentence)
    return build_corpus(text, name="toy", label_names=LABELS, source="made by relearn_lens.models.toy")


def tokenizer(*, opening: bool = False) -> Any:
    """A WordPiece tokenizer of the toy's words; half of the names are two sub-words. With `opening`, `[BOS]` too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for t in _TEMPLATES for w in t.split() if not w.startswith("{")})
    pieces = [piece for name in (*PLACES, *PERSONS) for piece in _pieces(name)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", *words, *pieces]))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = {"bos_token": "[BOS]"} if opening else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **bos)
    fast.name_or_path = "toy"
    return fast


def _bridge(words: Any, seed: int, **how: Any) -> TransformerBridge:
    config = TransformerBridgeConfig.from_dict(
        {
            "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 2, "d_head": D_MODEL // 2, "d_mlp": D_MLP,
            "n_ctx": 32, "act_fn": "gelu", "normalization_type": "LN", "seed": seed, **how,
        }
    )  # fmt: skip
    return boot_native(config, tokenizer=words, model_name="toy")


def language_model(*, seed: int = 0) -> LanguageModel:
    """A causal model with random weights, for next-token concepts: train it on `corpus` first."""
    words = tokenizer(opening=True)
    bridge = _bridge(None, seed, attention_dir="causal", d_vocab=len(words))
    bridge.tokenizer = words  # TransformerLens would load one with a first token anew, by a name that is none
    return LanguageModel(bridge).eval()


def tagger(*, seed: int = 0, mixed: bool = False, knows: bool = True) -> Tagger:
    """The planted model with its planted head; `mixed` as in `load`. With `knows=False` the twin in which nothing is
    planted for places, neither in the embedding, nor in neurons, nor in the head."""
    words = tokenizer()
    bridge = _bridge(words, seed, d_vocab=len(words), d_vocab_out=1, attention_dir="bidirectional")
    planted = Tagger(bridge, LABELS, seed=seed)
    with torch.no_grad():
        _plant(
            bridge.original_model, planted.head, words.get_vocab(), torch.Generator().manual_seed(seed), mixed, knows
        )
    planted.eval()
    return planted


def _pieces(name: str) -> tuple[str, ...]:
    """A name's sub-words: those of six letters and more are cut after the third."""
    return (name[:3], f"##{name[3:]}") if len(name) >= 6 else (name,)


def _plant(model: Any, head: nn.Linear, vocab: dict[str, int], rng: torch.Generator, mixed: bool, knows: bool) -> None:
    """Write the planted weights into a freshly initialised native model and its head."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    # Orthonormal directions, all orthogonal to the constant vector, which LayerNorm removes.
    basis = torch.linalg.qr(torch.cat([torch.ones(D_MODEL, 1), normal(D_MODEL, D_MODEL - 1)], 1)).Q.T[1:]
    place, person, inside, says_place, says_person = basis[:5]
    rest = basis[5:]  # everything that is planted lives outside of this subspace

    embedding = normal(len(vocab), len(rest)) @ rest
    embedding *= (D_MODEL / 2) ** 0.5 / embedding.norm(dim=1, keepdim=True)
    feature = torch.zeros_like(embedding)
    for names, direction in ((PLACES, place), (PERSONS, person))[not knows :]:
        for name in names:
            for piece in _pieces(name):
                feature[vocab[piece]] = 3 * direction + (1.5 * inside if piece.startswith("##") else 0)
    x = embedding + feature
    # Equal norms, so that LayerNorm scales every word alike and no neuron sees a name by its length.
    spare = (D_MODEL - feature.square().sum(1, keepdim=True)).sqrt()
    x = feature + embedding / embedding.norm(dim=1, keepdim=True) * spare
    model.tok_embed.weight.copy_(x)
    model.pos.weight.zero_()

    inner = rest.T @ rest
    for block in model.layers:
        for part in (block.attn.q, block.attn.k, block.attn.v):
            part.weight.copy_(normal(*part.weight.shape) * D_MODEL**-0.5 @ inner)
            part.bias.zero_()
        block.attn.o.weight.copy_(0.1 * inner @ normal(D_MODEL, D_MODEL) * D_MODEL**-0.5)
        block.attn.o.bias.zero_()
        block.mlp.fc_in.weight.copy_(normal(D_MLP, D_MODEL) * D_MODEL**-0.5 @ inner)
        block.mlp.fc_in.bias.zero_()
        block.mlp.fc_out.weight.copy_(0.1 * inner @ normal(D_MODEL, D_MLP) * D_MLP**-0.5)
        block.mlp.fc_out.bias.zero_()
    for neurons, direction, writes, gain in (
        (PERSON_NEURONS, person, says_person, 2.0),
        *(((PLANTED, place, says_place, 2.0), (DECOYS, place, None, 1.0)) if knows else ()),
    ):
        for layer, index in neurons:
            mlp = model.layers[int(layer)].mlp
            own = mlp.fc_in.weight[index] / mlp.fc_in.weight[index].norm()
            mlp.fc_in.weight[index] = gain * direction
            if mixed and writes is None:
                mlp.fc_in.weight[index] += 1.2 * gain * own
            mlp.fc_in.bias[index] = -gain
            mlp.fc_out.weight[:, index] = 0 if writes is None else 0.4 * writes

    # B- and I- of a label differ only in whether the sub-word opens the word.
    head.weight.zero_()
    head.bias.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0]))
    for row, says, opens in (
        (1, says_person, 1),
        (2, says_person, -1),
        (3, says_place, 1),
        (4, says_place, -1),
    )[: 4 if knows else 2]:
        head.weight[row] = 4 * says - opens * 4 * inside
        head.bias[row] += opens * 2
