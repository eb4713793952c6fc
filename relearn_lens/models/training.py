"""Fine-tuning and retraining as generators: training stands still wherever they yield.

Every step is seeded by (seed, step), so measuring at a pause, or pausing more often, cannot change a run. Any other
training loop plugs into `track` by yielding `Checkpoint` too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from relearn_lens.models import processes
from relearn_lens.models.model import Model, Tagger, checkpointed, seeded
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded


@dataclass(frozen=True)
class Checkpoint:
    """Training stands still here."""

    epoch: float
    """Passes over the training corpus so far."""
    step: int
    """Optimiser steps so far."""
    tokens_seen: int
    """Tokens in all batches so far, special tokens included, padding not."""
    loss: float
    """Nats per sub-word since the last pause, summed over sub-words before dividing."""


class Training(Iterator[Checkpoint]):
    """A training under way: asks for its next `Checkpoint` train on to there.

    Between two checkpoints nothing moves. `state()` and the model's weights, kept at a checkpoint, are all that is
    needed to go on from it in another process, with the same result to the bit on the same machine.
    """

    def __init__(self, checkpoints: Generator[Checkpoint, None, None], optimizers: list[torch.optim.Optimizer]):
        self._checkpoints, self._optimizers = checkpoints, optimizers

    def __next__(self) -> Checkpoint:
        return next(self._checkpoints)

    def close(self) -> None:
        """Stop here; the model is put back into its mode."""
        self._checkpoints.close()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts of the optimiser, no copies: what `resume` takes beside the checkpoint. Empty before
        the first step."""
        if not self._optimizers:
            return {}
        state = self._optimizers[-1].state_dict()["state"]
        return {f"{i}.{key}": value for i, kept in state.items() for key, value in kept.items()}


def finetune_(
    model: Model,
    text: Corpus | Encoded,
    *,
    epochs: float | int = 3,
    every: float | int | None = None,
    seed: int = 0,
    lr: float | int = 2e-5,
    batch_size: int = 8,
    weight_decay: float | int = 0.01,
    clip: float | int = 1.0,
    restart: bool = False,
    prior_bias: bool = False,
    accumulate: int = 1,
    checkpointing: bool = False,
    resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
    tick: Callable[[int, int], object] | None = None,
) -> Training:
    """Train a tagger on labelled text, or a language model on any; yields after every `every` epochs (by default each)
    and at the end.

    AdamW (`weight_decay` not on biases and LayerNorms), learning rate falling linearly from `lr` to 0, gradients
    clipped at norm `clip`; all sub-words of a word are in the loss (a tag, or the sub-word itself given all before it),
    special tokens are not. With `restart` optimiser and learning rate begin anew after every pause. Nothing is trained
    until the iterator is asked for its next checkpoint; between checkpoints the model is in the mode in which it came.
    `tick` is called with the step and the number of steps. Source: Lo et al. 2024, section 4; `restart` is what their
    released code does.

    With `accumulate` every batch goes through the model in so many parts, and with `checkpointing` every block is
    computed again in the backward pass: both need less memory for the same gradient. Where several processes share the
    run, the parts are dealt out to them (a batch is cut into at least one part each), and the gradients summed; dropout
    is drawn anew for each part, so that n processes do what one does with `accumulate=n`, up to float rounding.

    With `prior_bias` (ours) the head's bias is first set to the log share of each tag in the text. A fresh head
    otherwise makes the body learn, as a constant part of its hidden state, that most words are `"O"`; a model that
    loses this part to pruning collapses to one hidden state for all words when it is retrained.

    `resume` goes on from a checkpoint of a training with the same settings: the checkpoint and what `Training.state`
    gave there. The weights of that moment must be in the model already.

    Raises:
        ValueError: a setting out of range, labels that the tagger does not know, or a `resume` that is none of this
            training's pauses or of another model; at the call, before any step.
        FloatingPointError: the loss is no longer finite.
    """
    positive = (epochs, batch_size, accumulate, lr, clip, *(() if every is None else (every,)))
    if min(positive) <= 0 or weight_decay < 0:
        raise ValueError(
            "epochs, every, batch_size, accumulate, lr and clip must be above 0 and weight_decay not below, got "
            f"epochs={epochs}, every={every}, batch_size={batch_size}, accumulate={accumulate}, lr={lr}, clip={clip}, "
            f"weight_decay={weight_decay}"
        )
    encoded = text if isinstance(text, Encoded) else model.encode(text)
    model.check_text(encoded.corpus)
    if prior_bias and not isinstance(model, Tagger):
        raise ValueError("prior_bias is for the head of a tagger; a language model keeps its own head")
    pauses = _pauses(epochs, every or 1.0, -(-encoded.n_pieces // batch_size))
    if resume is not None and resume[0].step not in pauses:
        raise ValueError(
            f"this training pauses at steps {', '.join(map(str, pauses))}, so it cannot go on from step "
            f"{resume[0].step}; resume with the settings, the text and the seed that it began with"
        )
    optimizers: list[torch.optim.Optimizer] = []
    if resume is not None and resume[1] and not restart:
        optimizers.append(_with_state(_adamw(model, lr, weight_decay), resume[1]))
    checkpoints = _train(
        model, encoded, pauses, optimizers, seed=seed, lr=lr, batch_size=batch_size, weight_decay=weight_decay,
        clip=clip, restart=restart, prior_bias=prior_bias and resume is None, accumulate=accumulate,
        checkpointing=checkpointing, after=resume[0] if resume else None, tick=tick,
    )  # fmt: skip
    return Training(checkpoints, optimizers)


def retrain_(
    model: Model, text: Corpus | Encoded, *, epochs: float | int = 8, every: float | int = 2, **settings
) -> Training:
    """`finetune_` after something was removed: by default 4 stages of 2 epochs, measured after each.

    Takes the settings of `finetune_`. Source: Lo et al. 2024, section 4.
    """
    return finetune_(model, text, epochs=epochs, every=every, **settings)


def _pauses(epochs: float | int, every: float | int, per_epoch: int) -> dict[int, float]:
    """Step to epoch of every pause, the last one at the end."""
    total = max(1, round(epochs * per_epoch))
    marks = [k * every for k in range(1, math.ceil(epochs / every - 1e-9))]
    return {round(mark * per_epoch): float(mark) for mark in marks if round(mark * per_epoch)} | {total: float(epochs)}


def _train(
    model: Model,
    encoded: Encoded,
    pauses: Mapping[int, float],
    optimizers: list[torch.optim.Optimizer],
    *,
    seed: int,
    lr: float | int,
    batch_size: int,
    weight_decay: float | int,
    clip: float | int,
    restart: bool,
    prior_bias: bool,
    accumulate: int,
    checkpointing: bool,
    after: Checkpoint | None,
    tick: Callable[[int, int], object] | None,
) -> Generator[Checkpoint, None, None]:
    accelerator = Accelerator(device_placement=False)
    per_epoch, total = -(-encoded.n_pieces // batch_size), max(pauses)
    step, tokens = (after.step, after.tokens_seen) if after else (0, 0)
    order: tuple[int, list[np.ndarray]] = (-1, [])
    if prior_bias and isinstance(model, Tagger):
        with torch.no_grad():
            model.head.bias.copy_(tag_shares(encoded, len(model.tags)).log())
    for end, epoch in pauses.items():
        if end <= step:
            continue
        begin = step
        if not optimizers or restart:
            optimizers[:] = [_adamw(model, lr, weight_decay)]
        optimizer = accelerator.prepare(optimizers[-1])
        since, horizon = (begin, end - begin) if restart else (0, total)
        losses, n_losses = [], 0
        with _learning(model), checkpointed(model) if checkpointing else contextlib.nullcontext():
            while step < end:
                if order[0] != step // per_epoch:
                    at = step // per_epoch
                    order = at, encoded.shuffled(batch_size=batch_size, seed=seed, epoch=at)
                whole = order[1][step % per_epoch]
                n_here = encoded.n_subwords(whole)
                tokens += int(encoded.lengths[whole].sum())
                for group in optimizer.param_groups:
                    group["lr"] = lr * max(0.0, 1 - (step - since) / horizon)
                loss = torch.zeros((), device=model.device)
                # Each process takes whole parts, and each part has a seed: who computes it changes nothing.
                parts = list(enumerate(_parts(whole, max(accumulate, processes.size()))))
                for number, part in parts[processes.rank() :: processes.size()]:
                    batch = encoded.batch(part)
                    with seeded(_seed_of(seed, step, number), model.device):
                        nats = model.losses(batch.to(model.device))
                        accelerator.backward(nats.sum() / n_here)
                        loss += nats.detach().sum()
                _sum_gradients(model)
                losses.append(loss)
                n_losses += n_here
                accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if tick:
                    tick(step, total)
        # Looked at once per stage: to look at every step would make a GPU wait for it.
        each = torch.stack(losses)
        processes.sum_(each)
        each = each.cpu().to(torch.float64)
        if not each.isfinite().all():
            bad = int((~each.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the loss is {float(each[bad])} at step {begin + bad} (batch {(begin + bad) % per_epoch} of epoch "
                f"{(begin + bad) // per_epoch}, learning rate {lr}), between step {begin} and {end}; what was kept "
                "before is still there, the weights since are lost: use a smaller learning rate"
            )
        yield Checkpoint(epoch=epoch, step=end, tokens_seen=tokens, loss=float(each.sum()) / n_losses)


@contextlib.contextmanager
def _learning(model: Model) -> Iterator[None]:
    """Training mode for a while; a step that fails (out of memory, say) leaves neither it nor gradients behind."""
    mode = model.training
    try:
        model.train()
        yield
    except BaseException:
        for parameter in model.parameters():
            parameter.grad = None
        raise
    finally:
        model.train(mode)


def _with_state(optimizer: torch.optim.AdamW, state: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """An optimiser with the state that `Training.state` gave."""
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


def _parts(pieces: np.ndarray, n: int) -> list[np.ndarray]:
    """A batch's pieces in at most `n` groups, none empty."""
    return [part for part in np.array_split(pieces, n) if len(part)]


def tag_shares(encoded: Encoded, n_tags: int) -> Float[Tensor, " tag"]:
    """Share of each tag among a text's sub-words; one is added to every count, so none is 0."""
    counts = torch.ones(n_tags)
    for batch in encoded.batches():
        counts += torch.bincount(batch.tag, minlength=n_tags)
    return counts / counts.sum()


def _adamw(model: Model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that leaves vectors (biases, LayerNorm gains) out of weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=model.device.type in ("cpu", "cuda"))


def _sum_gradients(model: Model) -> None:
    """Every process gets the gradient of the whole batch.

    Not DistributedDataParallel: it wants the same number of parts in every process, each reaching every parameter (a
    bridge's joint QKV matrix and an encoder's pooler get no gradient at all), and averages.
    """
    if processes.size() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
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
