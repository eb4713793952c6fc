"""Models: a TransformerBridge with a tagging head on it, or with its own vocabulary head.

Everything here works on the unprocessed weights of the model, so that what is trained is what Hugging Face would
train. Under a tagger the vocabulary head is never computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from relearn_lens.models.heads import tags_of
from relearn_lens.text.corpus import OUTSIDE, Corpus
from relearn_lens.text.encoding import Batch, Encoded, LongSentences, Reading, encode

_WRAPPER = "_original_component"
"""What the bridge puts into a name for each component that it wraps."""


def plain_name(name: str) -> str:
    """The name of a module or parameter without the bridge's wrappers: where each is wrapped, Hugging Face's own."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER)


def n_wrappers(name: str) -> int:
    """How many wrappers of the bridge the name of a module or parameter goes through."""
    return name.split(".").count(_WRAPPER)


class Model(nn.Module):
    """A transformer with a head on its last hidden state: a `Tagger` or a `LanguageModel`."""

    bridge: TransformerBridge
    head: Any
    usual_reading: ClassVar[Reading] = "word"
    """Where the activations of a word are read unless another reading is asked for."""
    opening: ClassVar[bool] = False
    """Whether every piece of a text begins with a special token, from which its first word is predicted."""

    def __init__(self, bridge: TransformerBridge):
        super().__init__()
        self.__dict__["bridge"] = bridge  # its wrapped components are already in the trunk: registered once
        self.trunk = trunk(bridge)

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
        return next(self.trunk.parameters()).device

    def encode(
        self,
        corpus: Corpus,
        *,
        long: LongSentences = "split",
        reading: Reading | None = None,
        context: int | None = None,
    ) -> Encoded:
        """A corpus in this model's sub-words. Unless another `reading` is asked for, words are read on their own
        tokens; in a language model, which opens every piece with a special token, where they are predicted.

        Raises:
            ValueError: as `encoding.encode`.
        """
        return encode(
            corpus,
            self.tokenizer,
            context=context or self.context,
            long=long,
            reading=reading or self.usual_reading,
            opening=self.opening,
        )

    def predictions(
        self, batch: Batch, states: Float[Tensor, "sentence token d_model"] | None = None
    ) -> tuple[Float[Tensor, "subword class"], Int[Tensor, " subword"]]:
        """Of each sub-word of a batch, float32 logits of what training predicts there, and what it is; from its last
        hidden `states` where they are known already."""
        raise NotImplementedError

    def losses(
        self, batch: Batch, states: Float[Tensor, "sentence token d_model"] | None = None
    ) -> Float[Tensor, " subword"]:
        """What training lowers: cross-entropy at each sub-word of a batch, in nats, float32."""
        logits, target = self.predictions(batch, states)
        return F.cross_entropy(logits, target, reduction="none")

    def check_text(self, corpus: Corpus) -> None:
        """Refuse a text that this model cannot be trained on."""

    def __repr__(self) -> str:
        config, size = self.bridge.cfg, sum(value.numel() for value in self.plain().values())
        return (
            f"{type(self).__name__}({config.architecture}: {config.n_layers} blocks of {config.d_model}, "
            f"{size:,} weights, {self._says()}; on {self.device})"
        )

    def _says(self) -> str:
        """What the head gives."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Model:
        """Set training mode, in the bridge's own components too."""
        for module in _modules(self):  # nn.Module.train would go through shared parts many times over
            if module.training != mode:
                module.training = mode
        return self

    def weights(self) -> dict[str, Tensor]:
        """The trained weights under the names that the plain Hugging Face model uses (with `trunk.` before them), plus
        `head.*` where the head has weights of its own; no copies."""
        if (adapted := _ADAPTED.get(self.bridge)) is not None:
            return adapted.merged()
        return {name: value.detach() for name, value in self.plain().items()}

    def copied(self) -> dict[str, Tensor]:
        """Copies of `weights()`."""
        return {name: value.detach().clone() for name, value in self.weights().items()}

    def plain(self) -> dict[str, Tensor]:
        """`weights()` as the parameters and buffers themselves; without low-rank adapters, where there are any now."""
        if (adapted := _ADAPTED.get(self.bridge)) is not None:
            return dict(adapted.plain)
        modules = [part for part in _modules(self) if part is not self]
        now = [*modules, *(t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))]
        before, named = self.__dict__.get("_named", ([], {}))
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            named = self._by_plain_name()
            self.__dict__["_named"] = now, named  # to look for them anew takes as long as a small forward pass
        return dict(named)

    def _by_plain_name(self) -> dict[str, Tensor]:
        names: dict[int, str] = {}
        state = self.state_dict(keep_vars=True)
        for name, value in state.items():
            # A bridge reaches a tensor by several names; the one through every wrapper is Hugging Face's.
            best = names.get(id(value))
            if best is None or (n_wrappers(name) > n_wrappers(best) and name.split(".")[0] == best.split(".")[0]):
                names[id(value)] = name
        return {plain_name(name): state[name] for name in names.values()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights from `weights()` back, in place.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs; or the model has low-rank adapters now.
        """
        if wearing(self.bridge):
            raise ValueError("this model has low-rank adapters now; load weights when the block of `adapted` has ended")
        mine = self.weights()
        if missing := sorted(set(mine) ^ set(weights)):
            raise ValueError(f"these weights are of another model: {len(missing)} names differ, such as {missing[:3]}")
        for name, value in weights.items():
            if mine[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the model has {tuple(mine[name].shape)}")
        with torch.no_grad():
            for name, value in weights.items():
                mine[name].copy_(value)


class Tagger(Model):
    """A transformer with a linear head on its last hidden state that gives every sub-word a BIO tag.

    The head's classes are `O, B-x, I-x, B-y, ...` for the labels `O, x, y, ...`. Source: Lo et al. 2024, section 4
    (dropout 0.1 and a linear layer).
    """

    head: nn.Linear

    def __init__(self, bridge: TransformerBridge, labels: Sequence[str], *, seed: int = 0):
        if len(labels) < 2 or labels[0] != OUTSIDE or len(set(labels)) != len(labels):
            raise ValueError(f"labels must be 'O' and at least one more, each once; got {list(labels)}")
        super().__init__(bridge)
        self.dropout = nn.Dropout(0.1)
        self.label_names = tuple(labels)
        d_model = int(bridge.cfg.d_model)
        parameter = next(self.trunk.parameters())
        with seeded(seed):
            head = nn.Linear(d_model, len(self.tags))
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=parameter.device, dtype=parameter.dtype)

    def _says(self) -> str:
        return f"labels {', '.join(self.label_names)}"

    @property
    def tags(self) -> tuple[str, ...]:
        """The head's classes."""
        return tags_of(self.label_names)

    def forward(
        self, ids: Int[Tensor, "sentence token"], mask: Int[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence token tag"]:
        """Tag logits of every token."""
        return self.head(self.dropout(hidden(self.bridge, ids, mask)))

    def predictions(
        self, batch: Batch, states: Float[Tensor, "sentence token d_model"] | None = None
    ) -> tuple[Float[Tensor, "subword class"], Int[Tensor, " subword"]]:
        """Logits of each sub-word's tag, float32, and the tag."""
        states = hidden(self.bridge, batch.ids, batch.mask) if states is None else states
        return self.head(self.dropout(states)).flatten(0, 1)[batch.subword].float(), batch.tag

    def check_text(self, corpus: Corpus) -> None:
        """Refuse a text to train on whose labels are not the tagger's.

        Raises:
            ValueError: other labels, or in another order.
        """
        if corpus.label_names != self.label_names:
            raise ValueError(
                f"corpus {corpus.name!r} has labels {corpus.label_names}, the tagger was made for {self.label_names}"
            )


class LanguageModel(Model):
    """A causal language model with its own vocabulary head: every sub-word is predicted from all before it.

    Each sentence is read by itself, after one special token.
    """

    usual_reading = "before"
    opening = True

    def __init__(self, bridge: TransformerBridge):
        super().__init__(bridge)
        direction = getattr(bridge.cfg, "attention_dir", "causal")
        if direction != "causal":
            raise ValueError(
                f"a {bridge.cfg.architecture} model sees the words after a token ({direction} attention), so it does "
                "not predict the next one; use a causal model such as smollm2, or task 'tag', which labels words"
            )
        self.head = bridge.unembed
        self._check_head()

    def _check_head(self) -> None:
        """Compare logits made here with the model's own, on one token: families scale them in ways of their own."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with reading(self):
            mine, own = self(ids, torch.ones_like(ids)), self.bridge(ids, return_type="logits")
        if not torch.allclose(mine.float(), own.float(), rtol=1e-2, atol=1e-3 * float(own.abs().max())):
            raise ValueError(
                f"the logits of a {self.bridge.cfg.architecture} model are not its unembedding of the last hidden "
                "state, so next-token concepts cannot be followed in it; task 'tag' can be"
            )

    def _says(self) -> str:
        return f"{self.vocabulary:,} tokens to choose from"

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head chooses from."""
        return int(self.bridge.cfg.d_vocab)

    def forward(
        self, ids: Int[Tensor, "sentence token"], mask: Int[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence token vocabulary"]:
        """Next-token logits of every token."""
        return self.logits(hidden(self.bridge, ids, mask))

    def logits(
        self, states: Float[Tensor, "*token d_model"], head: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "*token vocabulary"]:
        """Next-token logits of last hidden states; by another head in the place of the model's, if one is given."""
        logits = (head or self.head)(states)
        config = getattr(self.bridge.original_model, "config", self.bridge.cfg)
        for name in ("final_logit_softcapping", "output_logits_soft_cap"):
            cap = getattr(config, name, None)
            if cap is not None and cap > 0:
                return cap * torch.tanh(logits / cap)
        return logits

    def predictions(
        self, batch: Batch, states: Float[Tensor, "sentence token d_model"] | None = None
    ) -> tuple[Float[Tensor, "subword class"], Int[Tensor, " subword"]]:
        """Logits of each sub-word given all before it, float32, and the token that it is."""
        states = hidden(self.bridge, batch.ids, batch.mask) if states is None else states
        # Only what predicts a sub-word goes through the vocabulary, which is most of a small model's work.
        before = states.flatten(0, 1)[batch.subword - 1]
        return self.logits(before).float(), batch.ids.flatten()[batch.subword]


def trunk(bridge: TransformerBridge) -> nn.Module:
    """The part of a bridge's model below its vocabulary head: what is trained and saved."""
    model = bridge.original_model
    return getattr(model, "base_model", model)


def hidden(
    bridge: TransformerBridge, ids: Int[Tensor, "sentence token"], mask: Int[Tensor, "sentence token"]
) -> Float[Tensor, "sentence token d_model"]:
    """Last hidden state in the dtype of the weights, with the bridge's hooks firing and the vocabulary head skipped."""
    dtype = _COMPUTING.get(bridge)
    if dtype is None:
        return _hidden(bridge, ids, mask)
    with torch.autocast(ids.device.type, dtype):
        states = _hidden(bridge, ids, mask)
    return states.to(next(trunk(bridge).parameters()).dtype)


def _hidden(bridge: TransformerBridge, ids: Tensor, mask: Tensor) -> Tensor:
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


def bridge_of(model: Any) -> TransformerBridge:
    """The bridge of a model (a tagger, a language model), or the bridge that it is.

    Raises:
        ValueError: it is neither.
    """
    if not hasattr(model, "tokenizer"):
        raise ValueError(f"the first argument is a model (load_tagger, load_bridge), got a {type(model).__name__}")
    return model.bridge if isinstance(model, Model) else model


def encoded_for(model: Model | TransformerBridge, text: Corpus | Encoded, *, context: int | None = None) -> Encoded:
    """A text in a model's sub-words; one that is encoded already is given back as it is.

    Raises:
        ValueError: it is no model; or as `encoding.encode`.
    """
    if isinstance(text, Encoded):
        return text
    if isinstance(model, Model):
        return model.encode(text, context=context)
    bridge = bridge_of(model)
    return encode(text, bridge.tokenizer, context=context or int(bridge.cfg.n_ctx))


_COMPUTING: WeakKeyDictionary[TransformerBridge, torch.dtype] = WeakKeyDictionary()
"""The bridges whose bodies run in another dtype than their weights have."""


@contextlib.contextmanager
def computing(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """For a while, run the body of a model in bfloat16 or float16 by autocast; its weights and its head stay as they
    are.

    Weights that themselves are bfloat16 would lose the small steps of training; these do not. `torch.float32` changes
    nothing.

    Raises:
        ValueError: a dtype that autocast does not take.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a model computes in float32, bfloat16 or float16, not in {dtype}")
    before = _COMPUTING.get(bridge_of(model))
    handles: list[Any] = []
    try:
        if dtype == torch.float32:
            _COMPUTING.pop(model.bridge, None)
        else:
            _COMPUTING[model.bridge] = dtype
            handles = _finite_masks(model.bridge, torch.finfo(dtype).min)
        yield
    finally:
        for handle in handles:
            handle.remove()
        _COMPUTING.pop(model.bridge, None)
        if before is not None:
            _COMPUTING[model.bridge] = before


def _finite_masks(bridge: TransformerBridge, least: float) -> list[Any]:
    """Keep attention's masks within the dtype that scores are computed in; handles of the hooks that do.

    A mask is made in the dtype of the weights, and the lowest float32 is -inf in bfloat16: a token of padding that sees
    nothing but padding, as beyond a sliding window, would be NaN, and with it all that follows.
    """

    def within(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            kwargs = kwargs | {"attention_mask": mask.clamp(min=least)}
        return args, kwargs

    attentions = [block.attn for block in bridge.blocks if hasattr(block, "attn")]
    return [attention.register_forward_pre_hook(within, with_kwargs=True) for attention in attentions]


@dataclass(frozen=True)
class Adapted:
    """A model's plain weights while adapters stand beside some of them."""

    plain: Mapping[str, Tensor]
    """As `Model.plain()` gave them before."""
    changes: Mapping[str, Callable[[], Tensor]]
    """What an adapter adds to a weight at the moment."""

    def merged(self) -> dict[str, Tensor]:
        """The weights that the model computes by; copies where there is an adapter."""
        own = {name: value.detach() for name, value in self.plain.items()}
        storages = {name: value.untyped_storage() for name, value in own.items()}
        copied = {storages[name].data_ptr(): storages[name] for name in self.changes}
        copied = {at: storage.clone() for at, storage in copied.items()}
        for name, value in own.items():
            # A GPT-2's queries, keys and values are views of one matrix, which must say what they say.
            if (storage := copied.get(storages[name].data_ptr())) is not None:
                where = value.storage_offset(), value.shape, value.stride()
                own[name] = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage, *where)
        for name, change in self.changes.items():
            own[name] += change()
        return own

    @contextlib.contextmanager
    def on(self, bridge: TransformerBridge) -> Iterator[None]:
        """For a while, `Model.weights()` gives these."""
        _ADAPTED[bridge] = self
        try:
            yield
        finally:
            del _ADAPTED[bridge]


_ADAPTED: WeakKeyDictionary[TransformerBridge, Adapted] = WeakKeyDictionary()
"""The bridges that have adapters now."""


def wearing(bridge: TransformerBridge, weight: Tensor | None = None) -> bool:
    """Whether a model has adapters now, or one of its weights has."""
    adapted = _ADAPTED.get(bridge)
    if adapted is None or weight is None:
        return adapted is not None
    return any(adapted.plain[name] is weight for name in adapted.changes)


@contextlib.contextmanager
def checkpointed(model: Model) -> Iterator[None]:
    """For a while, training keeps only each block's input and computes the block again in the backward pass: less
    memory, about a third more time, the same gradients.

    Raises:
        ValueError: a model that cannot (a native bridge).
    """
    inner: Any = model.bridge.original_model
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"a {model.bridge.cfg.architecture} model cannot checkpoint its blocks; use accumulate to save memory"
        )
    # transformers 5.23 calls it activation checkpointing, earlier ones know the other name alone.
    kind = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    off = getattr(inner, f"{kind}_checkpointing_disable")
    getattr(inner, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        off()
        if hasattr(inner, "disable_input_require_grads"):
            inner.disable_input_require_grads()  # a hook on the embedding that switching it off leaves behind


_NARROW = {"mps"}
"""Kinds of devices without float64."""


def widest(device: torch.device) -> torch.dtype:
    """The widest float that a device has for sums."""
    return torch.float32 if device.type in _NARROW else torch.float64


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """For a while, random numbers from a seed, on the CPU and on one CUDA or MPS device; the global generators do not
    move."""
    kind = device.type if device is not None and device.type in ("cuda", "mps") else ""
    index = (device.index or 0) if device is not None else 0
    with torch.random.fork_rng(devices=[index] if kind else [], device_type=kind or "cuda"):
        torch.default_generator.manual_seed(seed)
        if kind == "cuda":
            torch.cuda.default_generators[index].manual_seed(seed)
        elif kind == "mps":
            torch.mps.manual_seed(seed)
        yield


@contextlib.contextmanager
def lent(model: Model) -> Iterator[dict[str, Tensor]]:
    """For a while, weights that may be replaced or trained; then those of now, which it gives, are back to the bit."""
    own = model.copied()
    try:
        yield own
    finally:
        model.load_weights(own)


@contextlib.contextmanager
def only_training(those: Iterable[nn.Parameter], among: Iterable[nn.Parameter]) -> Iterator[None]:
    """For a while, of some parameters only those need a gradient."""
    flags, trains = [(p, p.requires_grad) for p in among], {id(p) for p in those}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in trains)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a while; each module's own mode is back afterwards.

    Attention is computed by torch's fused kernel meanwhile, where the bridge leaves it to Hugging Face (BERT and its
    kin) and nobody hooks the patterns, which that kernel never makes.
    """
    bridge = model.bridge if isinstance(model, Model) else model
    modes = {module: module.training for module in _modules(model)}
    try:
        for module, mode in modes.items():
            if mode:
                module.training = False
        with torch.no_grad(), _fused_attention(bridge):
            yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:  # to set it is slow, and most are as they were
                module.training = mode


def _modules(model: nn.Module) -> dict[nn.Module, None]:
    """All parts of a model, each once."""
    bridge = model.bridge if isinstance(model, Model) else model
    # A bridge does not list all of the modules that it wraps, nor the model all that the bridge adds.
    todo = [model, bridge, *([bridge.original_model] if isinstance(bridge, TransformerBridge) else [])]
    parts: dict[nn.Module, None] = {}
    while todo:
        if (part := todo.pop()) not in parts:
            parts[part] = None
            todo += [inner for inner in part._modules.values() if inner is not None]
    return parts


@contextlib.contextmanager
def _fused_attention(bridge: nn.Module) -> Iterator[None]:
    inner: Any = getattr(bridge, "original_model", None)
    now = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    if now != "eager" or not getattr(inner, "_supports_sdpa", False) or _patterns_are_hooked(bridge):
        yield
        return
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(now)


def _patterns_are_hooked(bridge: Any) -> bool:
    """Whether somebody looks at attention scores or patterns."""
    points = [p for name, p in bridge.hook_dict.items() if name.endswith(("pattern", "attn_scores"))]
    return any(point.fwd_hooks or point.bwd_hooks for point in points)
