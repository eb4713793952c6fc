"""Models: load a TransformerBridge, and put a tagging head on it.

Everything here works on the unprocessed weights of the model, so that what is trained is what Hugging Face would
train. The vocabulary head is never computed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens import sources
from relearn_lens.corpus import OUTSIDE

_TOKENIZER_FILES = {"tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"}

_WRAPPED = "_original_component."
"""What the bridge adds to a parameter's name for each component it wraps."""


class Tagger(nn.Module):
    """A transformer with a linear head on its last hidden state that gives every sub-word a BIO tag.

    The head's classes are `O, B-x, I-x, B-y, ...` for the labels `O, x, y, ...`. Source: Lo et al. 2024, section 4
    (dropout 0.1 and a linear layer).
    """

    bridge: TransformerBridge

    def __init__(self, bridge: TransformerBridge, labels: Sequence[str], *, seed: int = 0, dropout: float = 0.1):
        super().__init__()
        if len(labels) < 2 or labels[0] != OUTSIDE or len(set(labels)) != len(labels):
            raise ValueError(f"labels must be 'O' and at least one more, each once; got {list(labels)}")
        self.__dict__["bridge"] = bridge  # its wrapped components are already in the trunk: registered once
        self.trunk = trunk(bridge)
        self.dropout = nn.Dropout(dropout)
        self.label_names = tuple(labels)
        d_model = int(bridge.cfg.d_model)
        parameter = next(self.trunk.parameters())
        with seeded(seed):
            head = nn.Linear(d_model, len(self.tags))
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=parameter.device, dtype=parameter.dtype)

    @property
    def tags(self) -> tuple[str, ...]:
        """The head's classes."""
        return tags_of(self.label_names)

    @property
    def tokenizer(self) -> Any:
        """The bridge's tokenizer."""
        return self.bridge.tokenizer

    @property
    def context(self) -> int:
        """Largest number of tokens in one forward pass."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where the work happens."""
        return self.head.weight.device

    def train(self, mode: bool = True) -> Tagger:
        """Set training mode, in the bridge's own components too."""
        super().train(mode)
        self.bridge.train(mode)
        return self

    def forward(
        self, ids: Int[Tensor, "sentence token"], mask: Int[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence token tag"]:
        """Tag logits of every token."""
        return self.head(self.dropout(hidden(self.bridge, ids, mask)))

    def weights(self) -> dict[str, Tensor]:
        """The trained weights under the names that the plain Hugging Face model uses (with `trunk.` before them), plus
        `head.*`; no copies."""
        names: dict[int, str] = {}
        state = self.state_dict(keep_vars=True)
        for name, value in state.items():
            # A bridge reaches a tensor by several names; the one through every wrapper is Hugging Face's.
            best = names.get(id(value))
            if best is None or name.count(_WRAPPED) > best.count(_WRAPPED):
                names[id(value)] = name
        return {name.replace(_WRAPPED, ""): state[name].detach() for name in names.values()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights from `weights()` back, in place.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        mine = self.weights()
        if missing := sorted(set(mine) ^ set(weights)):
            raise ValueError(f"these weights are of another model: {len(missing)} names differ, such as {missing[:3]}")
        for name, value in weights.items():
            if mine[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the model has {tuple(mine[name].shape)}")
        with torch.no_grad():
            for name, value in weights.items():
                mine[name].copy_(value)


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """BIO tags of some labels, in the order in which `Batch.tag` numbers them."""
    return (OUTSIDE, *(f"{prefix}-{name}" for name in labels[1:] for prefix in "BI"))


def load_tagger(
    model: str | Path | TransformerBridge,
    labels: Sequence[str],
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tagger:
    """A model with a fresh tagging head for the given labels (`corpus.label_names`).

    `model` is a source name (`"minilm"`), a local Hugging Face folder, a name on the hub, or a bridge. `seed` draws the
    head.

    Raises:
        ValueError: labels without `"O"` first; a folder that holds no model, or only a pickled one.
        OSError: the name is neither a folder nor to be had from the hub.
    """
    bridge = (
        model if isinstance(model, TransformerBridge) else load_bridge(model, device=device, dtype=dtype, seed=seed)
    )
    return Tagger(bridge, labels, seed=seed).eval()


def load_bridge(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TransformerBridge:
    """A TransformerBridge of a source, a local Hugging Face folder, or a model on the hub; in eval mode.

    Only safetensors are read. Parts that the checkpoint lacks are drawn with `seed` (the language-model head that the
    bridge asks for and this package never computes). Without `device`: CUDA if there is one, else the CPU.

    Raises:
        ValueError: a folder that holds no model, or only a pickled one.
        OSError: the name is neither a folder nor to be had from the hub.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
    )
    from transformers.utils import logging as hf_logging

    where = str(sources.fetch(str(model))) if str(model) in sources.SOURCES else str(model)
    folder = Path(where)
    if folder.is_dir():
        _check_folder(folder)
    elif where.count("/") > 1 or where.startswith((".", "/", "~")):
        raise ValueError(f"no model folder at {where!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    quiet, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            auto = AutoModelForMaskedLM
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = AutoModelForCausalLM
        else:
            kind = config.model_type
            raise ValueError(f"{where!r} is a {kind!r} model; only masked and causal language models work")
        if folder.is_dir() and not {path.name for path in folder.iterdir()} & _TOKENIZER_FILES:
            raise ValueError(
                f"{where!r} holds no tokenizer (none of {', '.join(sorted(_TOKENIZER_FILES))}); save it there with "
                "tokenizer.save_pretrained(folder)"
            )
        tokenizer = AutoTokenizer.from_pretrained(where, add_prefix_space=True)
        with seeded(seed):
            hf_model = auto.from_pretrained(where, dtype=dtype, attn_implementation="eager", use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(
            f"the *.safetensors weights in {where!r} are damaged ({error}); fetch or save the model again"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise OSError(f"cannot load the model in {where!r}: {reason}") from error
        raise OSError(
            f"cannot load model {where!r}: it is no source ({', '.join(sources.SOURCES)}), no local folder, and the "
            f"hub did not give it ({reason}). Download it once where there is a network "
            "(`hf download NAME --local-dir DIR`) and pass the folder"
        ) from error
    finally:
        hf_logging.set_verbosity(quiet)
        if bars:
            hf_logging.enable_progress_bar()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.nn.Module.to(hf_model, device)
    bridge = TransformerBridge.boot_transformers(
        where, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    )
    bridge.eval()
    return bridge


def trunk(bridge: TransformerBridge) -> nn.Module:
    """The part of a bridge's model below its vocabulary head: what is trained and saved."""
    model = bridge.original_model
    return getattr(model, "base_model", model)


def hidden(
    bridge: TransformerBridge, ids: Int[Tensor, "sentence token"], mask: Int[Tensor, "sentence token"]
) -> Float[Tensor, "sentence token d_model"]:
    """Last hidden state, with the bridge's hooks firing and the vocabulary head skipped."""
    model: Any = bridge.original_model
    if hasattr(model, "base_model"):
        return model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    # A native bridge has no body of its own to call: its forward ends in the unembedding.
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    x = model.tok_embed(ids)
    if model.pos is not None:
        x = x + model.pos(position)
    for block in model.layers:
        (x,) = block(x, attention_mask=mask, position_ids=position)
    return model.ln_out(x)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """For a while, random numbers from a seed, on the CPU and on one CUDA device; the global generators do not move."""
    cuda = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a while; each module's own mode is back afterwards."""
    bridge = model.bridge if isinstance(model, Tagger) else model
    # A bridge does not list all of the modules that it wraps, nor the model all that the bridge adds.
    parts = [model, bridge, *([bridge.original_model] if isinstance(bridge, TransformerBridge) else [])]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_folder(folder: Path) -> None:
    """Say what is wrong with a model folder before anything is loaded from it."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        raise ValueError(f"{str(folder)!r} holds no Hugging Face model: there is no config.json")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(folder / 'config.json')!r} is damaged: {error}") from error
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        raise ValueError(
            f"{str(folder)!r} holds only pickled weights ({pickled[0]}), which can run code when loaded; save it again "
            "with model.save_pretrained(folder), which writes safetensors"
        )
    raise ValueError(f"{str(folder)!r} holds no *.safetensors file")
