"""The one training loop: fine-tuning, removing and relearning are objectives that it lowers.

Training stands still wherever it yields. Every step is seeded by (seed, step), so measuring at a pause, or pausing more
often, cannot change a run. Any other training loop plugs into `track` by yielding `Checkpoint` too.

1. Batches: the first text gives the steps; the others are gone through beside it, each in an order of its own, and
   give no more pieces than it does.
2. An objective says what each part of the loss sums to on these batches, and over how many sub-words or pieces.
3. A step turns gradients of those parts into the gradient that the optimiser takes.
4. `only` says which entries of the weights may move: all others are the same to the bit.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn

from relearn_lens import methods, progress
from relearn_lens.methods import Finetuning, Training
from relearn_lens.models import processes
from relearn_lens.models.dropout import quick_dropout
from relearn_lens.models.model import Model, Tagger, bridge_of, checkpointed, only_training, reading, seeded
from relearn_lens.names import explained, meant
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded

Parts = Mapping[str, tuple[Tensor, int]]
"""Of a loss: for each part its sum, and over how many (sub-words, pieces) it is a mean; the loss is their sum."""
Objective = Callable[[Model, Mapping[str, Batch], Any], Parts]
"""What is lowered: `(model, batches by role, reference) -> parts`.

It may have attributes. `reference(model, texts)` is called once, before the first step, on a model that it leaves as it
was, and what it gives is the third argument (else None). `counts(texts, pieces)` says over how many each part is for a
whole batch, by part; it is needed where batches go through the model in several parts. `memory`, a dict of tensors, is
what it knows from one step to the next, and is part of the training's state. `begin(model, moving, reference)` is
called before the first step, and may set the weights that train, given by plain name. `after` is called as a `Step`'s
is. `of_texts` says that it reads nothing but the texts that are trained on.
"""
Gradient = Callable[..., tuple[str, ...]]
"""`gradient(*parts)` adds the gradient of these parts of the loss (all, if none is named) to what the parameters
have, 0 where an entry may not move; gives the names of all parts."""
Step = Callable[[Model, Gradient], object]
"""Leaves in the parameters the gradient that the optimiser takes. With an attribute `after(model, stepped)`, it is
called when the optimiser has taken its step, and may set weights then."""


@dataclass(frozen=True)
class Stepped:
    """The optimiser has just taken a step."""

    step: int
    """Steps so far."""
    last: int
    """Steps at the end."""
    epoch: float
    """Passes over the first text so far."""
    parts: Mapping[str, Tensor]
    """Each part of the loss on this step's batches, before the step."""
    moving: Mapping[str, Tensor]
    """The weights that train, by plain name; no copies."""
    memory: dict[str, Tensor]
    """What is known from one step to the next, of objective and step together: part of the training's state."""
    reference: Any
    """What the objective compares with."""


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """Training stands still here."""

    epoch: float
    """Passes over the training corpus so far."""
    step: int
    """Optimiser steps so far."""
    tokens_seen: int
    """Tokens in all batches so far, special tokens included, padding not."""
    loss: float
    """Since the last pause, each part summed before dividing; nats per sub-word where the objective is
    `cross_entropy`."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of the loss, which sum to it."""
    by: Literal["epoch", "step"] = "epoch"
    """What this training is measured in, and so what its stages are named by."""

    def __repr__(self) -> str:
        unit = " nats per sub-word" if self.parts.keys() <= {"loss"} else ""
        parts = "".join(f", {name} {value:.4g}" for name, value in self.parts.items() if name != "loss")
        return (
            f"Checkpoint(step {self.step:,}, epoch {self.epoch:.3g}, {self.tokens_seen:,} tokens, "
            f"loss {self.loss:.4g}{unit}{parts})"
        )

    @property
    def stage(self) -> str:
        """Name of the stage: `"2"` after two epochs, or after two steps."""
        return str(self.step) if self.by == "step" else f"{round(self.epoch, 3):.10g}"


def cross_entropy(model: Model, batches: Mapping[str, Batch], reference: Any = None) -> Parts:
    """Nats at each sub-word of the first text: a tag, or the sub-word itself given all before it."""
    nats = model.losses(next(iter(batches.values())))
    return {"loss": (nats.sum(), len(nats))}


def _subwords(texts: Mapping[str, Encoded], pieces: Mapping[str, np.ndarray]) -> dict[str, int]:
    role = next(iter(texts))
    return {"loss": texts[role].n_subwords(pieces[role])}


cross_entropy.counts, cross_entropy.of_texts = _subwords, True


def plain(model: Model, gradient: Gradient) -> None:
    """The gradient of the whole loss."""
    gradient()


ITERATE = "it trains while it is gone through, `for pause in ...: ...`, or by `track`"
"""What to do with a training."""


class Checkpoints(Iterator[Checkpoint]):
    """A training under way: asks for its next `Checkpoint` train on to there.

    Between two checkpoints nothing moves. `state()` and the model's weights, kept at a checkpoint, are all that is
    needed to go on from it in another process, with the same result to the bit on the same machine.
    """

    def __init__(self, loop: _Loop, how: Training):
        self.how = how
        self._loop = loop
        self._checkpoints = loop.checkpoints()
        self._begun = False

    def __next__(self) -> Checkpoint:
        self._begun = True
        return next(self._checkpoints)

    def __repr__(self) -> str:
        if self._begun:
            return f"Checkpoints({self._loop.what}, {self.last_step:,} steps, under way)"
        return f"Checkpoints({self._loop.what}, {self.last_step:,} steps, not begun: {ITERATE})"

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: `sys` may be gone by then
        if not self._begun and self._loop.pauses and not finalizing():
            warnings.warn(
                f"this {self._loop.what} was made and never begun, so nothing was trained: {ITERATE}",
                RuntimeWarning, source=self, stacklevel=2,
            )  # fmt: skip

    @property
    def reference(self) -> Any:
        """What the objective took from the model before the first step; None before that, or if it takes nothing."""
        return self._loop.reference

    @property
    def last_step(self) -> int:
        """Optimiser steps at the end."""
        return max(self._loop.pauses, default=0)

    def close(self) -> None:
        """Stop here; the model is put back into its mode."""
        self._begun = True
        self._checkpoints.close()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts of the optimiser, and what objective and step remember, no copies: what `resume`
        takes beside the checkpoint. Empty before the first step."""
        if self._loop.optimizer is None:
            return {}
        state = self._loop.optimizer.state_dict()["state"]
        moments = {f"{i}.{key}": value for i, kept in state.items() for key, value in kept.items()}
        return moments | {f"{_MEMORY}.{key}": value for key, value in self._loop.memory.items()}


@explained
def train_(
    model: Model,
    texts: Corpus | Encoded | Mapping[str, Corpus | Encoded],
    how: Training | None = None,
    *,
    objective: Objective = cross_entropy,
    step: Step = plain,
    only: Mapping[str, Bool[Tensor, ...]] | None = None,
    beside: Mapping[str, str] | None = None,
    reference: Any = None,
    seed: int = 0,
    resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
    what: str = "training",
    **fields: Any,
) -> Checkpoints:
    """Lower an objective; yields after every stage and at the end.

    `texts` are one, or several by role, of which the first gives the steps of an epoch. `how` says all about the
    optimiser; its fields can be given as keywords too. AdamW (weight decay not on biases and LayerNorms), gradients
    clipped by their norm. Nothing is trained until the iterator is asked for its next checkpoint; between checkpoints
    the model is in the mode in which it came, and without gradients.

    `only` maps plain names of weights (`Model.plain`) to which of their entries may move; weights that it does not name
    stand still. `beside` maps a role to the one whose pieces it is gone through with, number by number, where two texts
    say something of the same things. `reference` is what the objective compares with, where it is not to be taken from
    the model as it is now. `what` is the name under which progress is reported.

    Weights may be bfloat16: what moves of them is kept and stepped in float32, beside its moments, and rounded into the
    model after every step; what stands still takes two bytes.

    With `accumulate` every batch goes through the model in so many parts, and with `checkpointing` every block is
    computed again in the backward pass: both need less memory for the same gradient. Where several processes share the
    run, the parts are dealt out to them (a batch is cut into at least one part each), and the gradients summed; dropout
    is drawn anew for each part, so that n processes do what one does with `accumulate=n`, up to float rounding.

    `resume` goes on from a checkpoint of a training with the same settings: the checkpoint and what `Checkpoints.state`
    gave there. The weights of that moment must be in the model already.

    Raises:
        ValueError: a setting out of range, labels that the tagger does not know, an entry of `only` that the model does
            not have, a text with other pieces than the one that it is beside, an objective that does not count and is
            to be taken in parts, or a `resume` that is none of this training's pauses, of another model or without its
            reference; at the call.
        FloatingPointError: the loss is no longer finite.
    """
    bridge_of(model)  # says what is none
    how = methods.of(Training, how, fields)
    by_role = dict(texts) if isinstance(texts, Mapping) else {"train": texts}
    encoded = {role: text if isinstance(text, Encoded) else model.encode(text) for role, text in by_role.items()}
    for text in encoded.values():
        model.check_text(text.corpus)
    if not encoded:
        raise ValueError("no text to train on: texts is empty")
    for role, other in (beside or {}).items():
        if encoded[role].n_pieces != encoded[other].n_pieces:
            raise ValueError(
                f"the text of {role!r} goes beside that of {other!r}, piece by piece, and they have "
                f"{encoded[role].n_pieces} and {encoded[other].n_pieces} pieces"
            )
    if max(how.accumulate, processes.size()) > 1 and not hasattr(objective, "counts"):
        raise ValueError(
            f"the objective {_name(objective)!r} does not say over how many each of its parts "
            "is, so a batch cannot go through the model in several parts; give it an attribute "
            "`counts(texts, pieces) -> {part: n}`, or leave accumulate at 1 and use one process"
        )
    for name, given in (("objective", objective), ("step", step)):
        if not callable(given):
            raise ValueError(
                f"{name} is a function, or an object that is called as one (see train_), got a {type(given).__name__}"
            )
    per_epoch = -(-next(iter(encoded.values())).n_pieces // how.batch_size)
    pauses = _pauses(how, per_epoch)
    if resume is not None and reference is None and hasattr(objective, "reference"):
        raise ValueError(
            f"the objective {_name(objective)!r} compares with the model as it was before the first step, which this "
            "one is no longer; resume with reference=, which `Checkpoints.reference` gave"
        )
    if resume is not None and resume[0].step not in pauses:
        raise ValueError(
            f"this training pauses at steps {', '.join(map(str, pauses))}, so it cannot go on from step "
            f"{resume[0].step}; resume with the settings, the text and the seed that it began with"
        )
    loop = _Loop(
        model, encoded, how, objective, step, _entries(model, only), seed, pauses, per_epoch, what, reference,
        beside=dict(beside or {}), memory=getattr(objective, "memory", {}),
    )  # fmt: skip
    if resume is not None:
        loop.after = resume[0]
        state = {name: value.clone() for name, value in resume[1].items()}
        remembered = [name for name in state if name.startswith(f"{_MEMORY}.")]
        loop.memory.update({name.removeprefix(f"{_MEMORY}."): state.pop(name) for name in remembered})
        if state and not how.restart:
            loop.resume(state)
    return Checkpoints(loop, how)


@explained
def finetune_(
    model: Model,
    text: Corpus | Encoded,
    how: Training | None = None,
    *,
    seed: int = 0,
    resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
    only: Mapping[str, Bool[Tensor, ...]] | None = None,
    **fields: Any,
) -> Checkpoints:
    """Train a tagger on labelled text, or a language model on any: `train_` with the model's own cross-entropy.

    All sub-words of a word are in the loss (a tag, or the sub-word itself given all before it), special tokens are not.
    `prior_bias` is ours; `restart` is what the released code of the paper does.

    Keywords as of `train_`; other fields of `Finetuning` by name. Source: Lo et al. 2024, section 4.

    Raises:
        ValueError, FloatingPointError: as `train_`; or a `prior_bias` that is asked for by name, for no tagger.
    """
    if fields.get("prior_bias") and not isinstance(model, Tagger):
        raise ValueError("prior_bias is for the head of a tagger; a language model keeps its own head")
    how = methods.of(Finetuning, how, fields)
    return train_(model, text, how, seed=seed, resume=resume, only=only, what="fine-tuning")


_MEMORY = "memory"


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


def _pauses(how: Training, per_epoch: int) -> dict[int, float]:
    """Step to epoch of every pause, the last one at the end."""
    if how.steps is not None:
        return {step: step / per_epoch for step in how.steps}
    if how.epochs == 0:
        return {}
    total, every = max(1, round(how.epochs * per_epoch)), how.every or 1.0
    marks = [k * every for k in range(1, math.ceil(how.epochs / every - 1e-9))]
    stops = {round(mark * per_epoch): float(mark) for mark in marks if round(mark * per_epoch)}
    return stops | {total: float(how.epochs)}


def _share_of_rate(how: Training, step: int, horizon: int) -> float:
    """Share of the highest learning rate that a step is taken at."""
    rising = min(1.0, (step + 1) / (how.warmup + 1))
    return rising * (max(0.0, 1 - step / horizon) if how.schedule == "linear" else 1.0)


def _entries(
    model: Model, only: Mapping[str, Tensor] | None
) -> list[tuple[nn.Parameter, Bool[Tensor, ...] | None]] | None:
    """The parameters that may move, with their entries that may (None: all); None where nothing is held."""
    if only is None:
        return None
    weights = model.plain()
    if unknown := sorted(set(only) - set(weights)):
        raise ValueError(
            f"only: this model has no weight {unknown[0]!r}; it has {', '.join(list(weights)[:3])}, ..."
            f"{meant(unknown[0], weights)}"
        )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    entries = []
    for name, mask in only.items():
        weight = weights[name]
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"only: {name} has shape {tuple(weight.shape)}, its mask is {mask.dtype} of {tuple(mask.shape)}; a "
                "mask says True or False of every entry"
            )
        # A mask of all weights names those too that nothing trains: buffers, and what follows from others.
        if id(weight) in trained and mask.any():
            entries.append((weight, None if mask.all() else mask.to(weight.device)))
    if not entries:
        raise ValueError("only: no entry of any weight may move, so there is nothing to train")
    return entries


@dataclass
class _Loop:
    """A training under way: what is lowered, by what, and where it stands."""

    model: Model
    texts: dict[str, Encoded]
    how: Training
    objective: Objective
    step: Step
    entries: list[tuple[nn.Parameter, Tensor | None]] | None
    seed: int
    pauses: dict[int, float]
    per_epoch: int
    what: str
    reference: Any
    after: Checkpoint | None = None
    optimizer: torch.optim.Optimizer | None = None
    orders: dict[str, tuple[int, list[np.ndarray]]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    full: dict[int, nn.Parameter] = field(default_factory=dict)
    """In float32, by their id, what moves of weights in 16 bits (small steps would be lost in those), and the rows that
    are read of an embedding."""
    shrink: float = 1.0
    """What weight decay makes of the other rows; it is applied at the next pause."""
    training: list[nn.Parameter] | None = None
    """The parameters that train, while they do: to look for them takes a tenth of a small model's step."""

    def checkpoints(self) -> Generator[Checkpoint, None, None]:
        """Train on to each pause in turn."""
        model, how, total = self.model, self.how, max(self.pauses, default=0)
        step, tokens = (self.after.step, self.after.tokens_seen) if self.after else (0, 0)
        if total and getattr(how, "prior_bias", False) and self.after is None and isinstance(model, Tagger):
            text, bias = next(iter(self.texts.values())), model.head.bias
            if self.entries is None or any(weight is bias for weight, _ in self.entries):
                with torch.no_grad(), self._others_still():
                    bias.copy_(tag_shares(text, len(model.tags)).log())
        if total and self.reference is None and hasattr(self.objective, "reference"):
            with reading(model):
                self.reference = self.objective.reference(model, self.texts)  # pyright: ignore[reportFunctionMemberAccess]
        if total and self.after is None and (begin := getattr(self.objective, "begin", None)) is not None:
            with torch.no_grad(), self._others_still():
                begin(model, self._moving_by_name(), self.reference)
        accelerator = Accelerator(device_placement=False)
        for end, epoch in self.pauses.items():
            if end <= step:
                continue
            begin = step
            self._reread()
            if self.optimizer is None or how.restart:
                self.optimizer = self.adamw()
            optimizer = accelerator.prepare(self.optimizer)
            since, horizon = (begin, end - begin) if how.restart else (0, total)
            sums: dict[str, list[Tensor]] = {}
            counts: dict[str, int] = {}
            self.training = self.moving()
            with (
                progress.task(self.what, total, done=step),
                _learning(model, self.training, [module for module, _ in self.embeddings]),
                checkpointed(model) if how.checkpointing else contextlib.nullcontext(),
            ):
                while step < end:
                    pieces = self._pieces(step)
                    tokens += sum(int(self.texts[role].lengths[whole].sum()) for role, whole in pieces.items())
                    for group in optimizer.param_groups:
                        group["lr"] = how.lr * _share_of_rate(how, step - since, horizon)
                    batch = _Batch(self, accelerator, pieces, step)
                    # What a step itself draws is seeded too; inside `gradient` each part has a seed of its own.
                    with seeded(_seed_of(self.seed, step), model.device):
                        self.step(model, batch.gradient)
                    for part, (value, n) in batch.parts().items():
                        sums.setdefault(part, []).append(value)
                        counts[part] = counts.get(part, 0) + n
                    self._stepped(accelerator, optimizer)
                    self.shrink *= 1 - optimizer.param_groups[0]["lr"] * how.weight_decay
                    step += 1
                    self._after(step, total, batch)
                    progress.advance()
            self._shrink_the_rest()
            self.training = None
            # Looked at once per stage: to look at every step would make a GPU wait for it.
            means = self._means(sums, counts, begin, end)
            by = "epoch" if how.steps is None else "step"
            yield Checkpoint(epoch, end, tokens, sum(means.values()), means, by)

    def adamw(self) -> torch.optim.AdamW:
        """AdamW that leaves vectors (biases, LayerNorm gains) out of weight decay."""
        for weight in self.moving():
            if (weight.dtype in _HALF or id(weight) in self.rows) and id(weight) not in self.full:
                self.full[id(weight)] = nn.Parameter(self._read(weight).float())
        trained = [self.full.get(id(weight), weight) for weight in self.moving()]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.how.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.how.lr, fused=self.model.device.type in ("cpu", "cuda"))

    def moving(self) -> list[nn.Parameter]:
        """The parameters that train."""
        if self.training is not None:
            return self.training
        if self.entries is not None:
            return [weight for weight, _ in self.entries]
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def embeddings(self) -> list[tuple[nn.Embedding, Tensor]]:
        """Large embeddings most rows of which no text reads, with those that are read.

        Their gradient is not made in full, nor their moments: of a small model they are half of the weights. Not where
        anything but the plain gradient of the texts' own loss is taken.
        """
        alone = self.entries is None and self.step is plain and getattr(self.objective, "of_texts", False)
        if not alone or not isinstance(self.model, Tagger) or processes.size() > 1 or self.model.device.type != "cpu":
            return []
        modules, trains = list(self.model.trunk.modules()), {id(weight) for weight in self.moving()}
        owners = [id(weight) for module in modules for weight in module._parameters.values()]
        read = torch.from_numpy(np.unique(np.concatenate([text.vocabulary for text in self.texts.values()])))
        return [
            (module, read)
            for module in modules
            if isinstance(module, nn.Embedding)
            and id(module.weight) in trains
            and owners.count(id(module.weight)) == 1
            and module.weight.numel() >= LARGE
            and int(read[-1]) < len(module.weight) > 2 * len(read)
            and module.max_norm is None
            and not module.scale_grad_by_freq
        ]

    @cached_property
    def rows(self) -> dict[int, Tensor]:
        """The rows that are read of `embeddings`, by the id of their weight: no other has a gradient."""
        return {id(module.weight): rows for module, rows in self.embeddings}

    def _read(self, weight: nn.Parameter) -> Tensor:
        """A copy of what the optimiser steps of a weight."""
        rows = self.rows.get(id(weight))
        return weight.detach().clone() if rows is None else weight.detach()[rows]

    def _reread(self) -> None:
        """Go on with the rows as they are at a pause."""
        for weight in self.moving():
            if id(weight) in self.rows and (full := self.full.get(id(weight))) is not None:
                with torch.no_grad():
                    full.copy_(torch.where(full.to(weight.dtype) == self._read(weight), full, self._read(weight)))

    def _shrink_the_rest(self) -> None:
        """Weight decay of rows that no text reads, for all steps since the last pause at once."""
        for weight in self.moving():
            if (rows := self.rows.get(id(weight))) is not None:
                with torch.no_grad():
                    kept = weight[rows]
                    weight.mul_(self.shrink)
                    weight[rows] = kept
        self.shrink = 1.0

    def _gradient_of(self, weight: nn.Parameter) -> Tensor | None:
        """The gradient of what the optimiser steps of a weight, in float32."""
        gradient, rows = weight.grad, self.rows.get(id(weight))
        if gradient is None or rows is None:
            return None if gradient is None else gradient.float()
        total = torch.zeros(len(rows), weight.shape[1])
        return total.index_add_(0, torch.searchsorted(rows, gradient._indices()[0]), gradient._values().float())

    def _moving_by_name(self) -> dict[str, Tensor]:
        trains = {id(weight) for weight in self.moving()}
        return {name: weight for name, weight in self.model.plain().items() if id(weight) in trains}

    def _pieces(self, step: int) -> dict[str, np.ndarray]:
        """The pieces of every role's text that a step takes: of no role more than of the first."""
        pieces = {role: self._of_role(role, step) for role in self.texts}
        most = len(next(iter(pieces.values())))
        # From a batch, which is sorted by length, both short and long ones are taken.
        return {
            role: whole if len(whole) <= most else whole[np.arange(most) * len(whole) // most]
            for role, whole in pieces.items()
        }

    def _of_role(self, role: str, step: int) -> np.ndarray:
        role = self.beside.get(role, role)
        text, first = self.texts[role], role == next(iter(self.texts))
        n = self.per_epoch if first else -(-text.n_pieces // self.how.batch_size)
        order = self.orders.get(role)
        if order is None or order[0] != step // n:
            # Roles of one text must not go through it in step.
            seed = self.seed if first else _seed_of(self.seed, list(self.texts).index(role))
            order = step // n, text.shuffled(batch_size=self.how.batch_size, seed=seed, epoch=step // n)
            self.orders[role] = order
        return order[1][step % n]

    def _stepped(self, accelerator: Accelerator, optimizer: Any) -> None:
        """Let the optimiser take its step."""
        moving = self.moving()
        for weight in moving:
            if (full := self.full.get(id(weight))) is not None:
                full.grad, weight.grad = self._gradient_of(weight), None
        accelerator.clip_grad_norm_([self.full.get(id(weight), weight) for weight in moving], self.how.clip)
        with self._others_still():
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight in moving:
                if (full := self.full.get(id(weight))) is not None:
                    if (rows := self.rows.get(id(weight))) is None:
                        weight.copy_(full)
                    else:
                        weight.index_copy_(0, rows, full.to(weight.dtype))
                    assert self.optimizer is not None
                    self.optimizer.state[full][_FULL] = full.detach()

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on with an optimiser's state, and the weights in float32 that it holds."""
        self.optimizer = _with_state(self.adamw(), state)
        with torch.no_grad():
            for full in self.full.values():
                if (value := self.optimizer.state[full].get(_FULL)) is not None:
                    full.copy_(value)

    def _after(self, step: int, last: int, batch: _Batch) -> None:
        """Let objective and step do what they do when a step was taken."""
        hooks = [hook for of in (self.objective, self.step) if (hook := getattr(of, "after", None)) is not None]
        if not hooks:
            return
        parts = {}
        for part, (value, n) in batch.parts().items():
            processes.sum_(value)
            parts[part] = value / max(n, 1)
        moving = self._moving_by_name()
        for hook in hooks:
            with torch.no_grad(), self._others_still():
                hook(self.model, Stepped(step, last, step / self.per_epoch, parts, moving, self.memory, self.reference))
        with torch.no_grad():
            for weight in moving.values():
                # What a hook wrote is what goes on.
                if (full := self.full.get(id(weight))) is not None:
                    full.copy_(torch.where(full.to(weight.dtype) == weight, full, weight.float()))

    @contextlib.contextmanager
    def _others_still(self) -> Iterator[None]:
        """Put back, to the bit, what may not move and did (weight decay moves a weight without a gradient too)."""
        held = [
            (each, mask, each.detach().clone())
            for weight, mask in self.entries or ()
            if mask is not None
            for each in (weight, self.full.get(id(weight)))
            if each is not None
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, mask, before in held:
                    weight.copy_(torch.where(mask, weight, before))

    def _means(self, sums: dict[str, list[Tensor]], counts: dict[str, int], begin: int, end: int) -> dict[str, float]:
        """Each part of the loss over a stage; refuses what is not finite."""
        means = {}
        for part, values in sums.items():
            each = torch.stack(values)
            processes.sum_(each)
            each = each.cpu().to(torch.float64)  # no float64 on some devices
            if not each.isfinite().all():
                bad = int((~each.isfinite()).nonzero()[0])
                raise FloatingPointError(
                    f"the loss is {float(each[bad])} at step {begin + bad} (batch {(begin + bad) % self.per_epoch} of "
                    f"epoch {(begin + bad) // self.per_epoch}, learning rate {self.how.lr}), between step {begin} and "
                    f"{end}; what was kept before is still there, the weights since are lost: use a smaller learning "
                    "rate"
                )
            means[part] = float(each.sum()) / max(counts[part], 1)
        return means


_HALF = (torch.bfloat16, torch.float16)
LARGE = 2**20
"""Entries of an embedding from which on only the rows that are read are trained."""
_FULL = "full"
"""What the optimiser's state calls a weight in float32 that the model has in 16 bits."""


class _Batch:
    """The batches of one step, and gradients on them."""

    def __init__(self, loop: _Loop, accelerator: Accelerator, pieces: dict[str, np.ndarray], step: int):
        self.loop, self.accelerator, self.pieces, self.step = loop, accelerator, pieces, step
        self.n_parts = max(loop.how.accumulate, processes.size())
        counts = getattr(loop.objective, "counts", None)
        self.counts: dict[str, int] = counts(loop.texts, pieces) if counts else {}
        self.sums: dict[str, Tensor] = {}

    def gradient(self, *parts: str) -> tuple[str, ...]:
        """Add the gradient of the named parts of the loss, or of all; gives the names of all."""
        loop, model = self.loop, self.loop.model
        sums: dict[str, Tensor] = {}
        moving = loop.moving()
        # What is there already is a sum over the processes, and must not be summed again.
        earlier = [(p, p.grad) for p in moving] if processes.size() > 1 else []
        for parameter, _ in earlier:
            parameter.grad = None
        # Every part has pieces of every role.
        n_parts = min(self.n_parts, *map(len, self.pieces.values()))
        cut = {role: np.array_split(whole, n_parts) for role, whole in self.pieces.items()}
        # Each process takes whole parts, and each part has a seed: who computes it changes nothing.
        for number in range(n_parts)[processes.rank() :: processes.size()]:
            batches = {role: loop.texts[role].batch(groups[number]).to(model.device) for role, groups in cut.items()}
            with seeded(_seed_of(loop.seed, self.step, number), model.device):
                values = loop.objective(model, batches, loop.reference)
                self._check(parts, values)
                means = [values[p][0] / (self.counts.get(p) or max(values[p][1], 1)) for p in parts or values]
                loss = torch.stack(means).sum() if len(means) > 1 else means[0]
                if not loss.requires_grad:
                    raise ValueError(
                        "nothing that may move has a part in the loss; name weights in only= that the model computes "
                        "with (of joint queries, keys and values: their three parts), and do not train under no_grad"
                    )
                self.accelerator.backward(loss)
            for part, (value, n) in values.items():
                self.counts.setdefault(part, n)
                sums[part] = sums.get(part, torch.zeros((), device=model.device)) + value.detach()
        self.sums = self.sums or sums
        _sum_gradients(moving)
        for weight, mask in loop.entries or ():
            if mask is not None and weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0.0)
        for parameter, gradient in earlier:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return tuple(self.counts)

    def _check(self, parts: tuple[str, ...], values: Parts) -> None:
        """Refuse parts of the loss that the objective does not have, or does not count."""
        if unknown := set(parts) - set(values):
            first = min(unknown)
            raise ValueError(
                f"the objective has no part {first!r}; its parts are {', '.join(values)}{meant(first, values)}"
            )
        if self.n_parts > 1 and set(values) != set(self.counts):
            raise ValueError(
                f"the objective gives the parts {', '.join(values)}, but its `counts` those of {', '.join(self.counts)}"
            )

    def parts(self) -> dict[str, tuple[Tensor, int]]:
        """The parts of the loss as they were first computed, before anything was perturbed."""
        device = self.loop.model.device
        return {part: (self.sums.get(part, torch.zeros((), device=device)), n) for part, n in self.counts.items()}


@contextlib.contextmanager
def _learning(model: Model, moving: Collection[nn.Parameter], sparse: Collection[nn.Embedding] = ()) -> Iterator[None]:
    """Training mode for a while, in which nothing else needs a gradient, and that of some embeddings is sparse; a step
    that fails (out of memory, say) leaves neither mode nor gradients behind."""
    mode = model.training
    try:
        model.train()
        for embedding in sparse:
            embedding.sparse = True
        with only_training(moving, model.parameters()), quick_dropout():
            yield
    except BaseException:
        for parameter in model.parameters():
            parameter.grad = None
        raise
    finally:
        model.train(mode)
        for embedding in sparse:
            embedding.sparse = False


def _with_state(optimizer: torch.optim.AdamW, state: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """An optimiser with the state that `Checkpoints.state` gave."""
    whole, kept = optimizer.state_dict(), {}
    for name, value in state.items():
        i, _, key = name.partition(".")
        kept.setdefault(int(i), {})[key] = value
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    theirs = {i: tuple(entry["exp_avg"].shape) for i, entry in kept.items() if "exp_avg" in entry}
    if any(i >= len(shapes) or shape != shapes[i] for i, shape in theirs.items()) or len(theirs) != len(kept):
        raise ValueError("the state to resume from is of another model: its moments have other shapes")
    optimizer.load_state_dict({**whole, "state": {i: {k: v.clone() for k, v in e.items()} for i, e in kept.items()}})
    return optimizer


def tag_shares(encoded: Encoded, n_tags: int) -> Float[Tensor, " tag"]:
    """Share of each tag among a text's sub-words; one is added to every count, so none is 0."""
    counts = torch.ones(n_tags)
    for batch in encoded.batches():
        counts += torch.bincount(batch.tag, minlength=n_tags)
    return counts / counts.sum()


def _sum_gradients(trained: Collection[nn.Parameter]) -> None:
    """Every process gets the gradient of the whole batch.

    Not DistributedDataParallel: it wants the same number of parts in every process, each reaching every parameter (a
    bridge's joint QKV matrix and an encoder's pooler get no gradient at all), and averages.
    """
    if processes.size() == 1:
        return
    # Which parameters get a gradient depends on the model, not on the part; but a process may have had no part.
    reached = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
    processes.sum_(reached)
    for p, has in zip(trained, reached.tolist(), strict=True):
        if has and p.grad is None:
            p.grad = torch.zeros_like(p)
    processes.sum_many_(p.grad for p in trained if p.grad is not None)


def _seed_of(seed: int, step: int, part: int = 0) -> int:
    """One 64-bit seed from two or three numbers, without the collisions of adding them."""
    numbers = [seed, step, part] if part else [seed, step]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
