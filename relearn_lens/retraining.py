"""Fine-tuning and retraining as generators: training stands still wherever they yield.

Every step is seeded by (seed, step), so measuring at a pause, or pausing more often, cannot change a run. Any other
training loop plugs into `track` by yielding `Checkpoint` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.corpus import Corpus
from relearn_lens.encoding import Encoded, encode
from relearn_lens.models import Tagger, seeded


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


def finetune_(
    tagger: Tagger,
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
    tick: Callable[[int, int], object] | None = None,
) -> Iterator[Checkpoint]:
    """Train a tagger on labelled text; yields after every `every` epochs (by default each) and at the end.

    AdamW (`weight_decay` not on biases and LayerNorms), learning rate falling linearly from `lr` to 0, gradients
    clipped at norm `clip`; all sub-words of a word are in the loss, special tokens are not. With `restart` optimiser
    and learning rate begin anew after every pause. Nothing is trained until the generator is asked for its next
    checkpoint; between checkpoints the tagger is in the mode in which it came. `tick` is called with the step and
    the number of steps. Source: Lo et al. 2024, section 4; `restart` is what their released code does.

    With `prior_bias` (ours) the head's bias is first set to the log share of each tag in the text. A fresh head
    otherwise makes the body learn, as a constant part of its hidden state, that most words are `"O"`; a model that
    loses this part to pruning collapses to one hidden state for all words when it is retrained.

    Raises:
        ValueError: a setting out of range, or labels that the tagger does not know; at the call, before any step.
        FloatingPointError: the loss is no longer finite.
    """
    if epochs <= 0 or (every is not None and every <= 0) or batch_size < 1 or lr <= 0 or clip <= 0 or weight_decay < 0:
        raise ValueError(
            f"epochs, every, batch_size, lr and clip must be above 0 and weight_decay not below, got epochs={epochs}, "
            f"every={every}, batch_size={batch_size}, lr={lr}, clip={clip}, weight_decay={weight_decay}"
        )
    encoded = text if isinstance(text, Encoded) else encode(text, tagger.tokenizer, context=tagger.context)
    if encoded.corpus.label_names != tagger.label_names:
        raise ValueError(
            f"corpus {encoded.corpus.name!r} has labels {encoded.corpus.label_names}, the tagger was made for "
            f"{tagger.label_names}"
        )
    return _train(
        tagger,
        encoded,
        epochs,
        every or 1.0,
        seed,
        lr,
        batch_size,
        weight_decay,
        clip,
        restart,
        prior_bias,
        tick,
    )


def retrain_(
    tagger: Tagger, text: Corpus | Encoded, *, epochs: float | int = 8, every: float | int = 2, **settings
) -> Iterator[Checkpoint]:
    """`finetune_` after something was removed: by default 4 stages of 2 epochs, measured after each.

    Takes the settings of `finetune_`. Source: Lo et al. 2024, section 4.
    """
    return finetune_(tagger, text, epochs=epochs, every=every, **settings)


def _train(
    tagger: Tagger,
    encoded: Encoded,
    epochs: float | int,
    every: float | int,
    seed: int,
    lr: float | int,
    batch_size: int,
    weight_decay: float | int,
    clip: float | int,
    restart: bool,
    prior_bias: bool,
    tick: Callable[[int, int], object] | None,
) -> Iterator[Checkpoint]:
    accelerator = Accelerator(device_placement=False)
    per_epoch = -(-encoded.n_pieces // batch_size)
    total = max(1, round(epochs * per_epoch))
    marks = [k * every for k in range(1, math.ceil(epochs / every - 1e-9))]
    pauses = {round(mark * per_epoch): mark for mark in marks if round(mark * per_epoch)} | {total: float(epochs)}
    mode = tagger.training
    tokens = step = 0
    order: list[np.ndarray] = []
    optimizer = schedule = None
    if prior_bias:
        with torch.no_grad():
            tagger.head.bias.copy_(tag_shares(encoded, len(tagger.tags)).log())
    for end, epoch in pauses.items():
        begin = step
        if optimizer is None or schedule is None or restart:
            horizon = end - begin if restart else total
            optimizer = accelerator.prepare(_adamw(tagger, lr, weight_decay))
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda done, horizon=horizon: max(0.0, 1 - done / horizon)
            )
        loss_sum = torch.zeros((), device=tagger.device)
        n_losses = 0
        tagger.train()
        while step < end:
            if step % per_epoch == 0:
                order = encoded.shuffled(batch_size=batch_size, seed=seed, epoch=step // per_epoch)
            batch = encoded.batch(order[step % per_epoch])
            tokens, n_losses = tokens + batch.n_tokens, n_losses + len(batch.tag)
            batch = batch.to(tagger.device)
            with seeded(_seed_of(seed, step), tagger.device):
                logits = tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword]
                loss = F.cross_entropy(logits.float(), batch.tag)
                accelerator.backward(loss)
            accelerator.clip_grad_norm_(tagger.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss_sum += loss.detach() * len(batch.tag)
            step += 1
            if tick:
                tick(step, total)
        tagger.train(mode)
        mean = float(loss_sum) / n_losses
        if not np.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} between step {begin} and {end} (learning rate {lr}); the weights are lost, use a "
                "smaller learning rate"
            )
        yield Checkpoint(epoch=epoch, step=end, tokens_seen=tokens, loss=mean)


def tag_shares(encoded: Encoded, n_tags: int) -> Float[Tensor, " tag"]:
    """Share of each tag among a text's sub-words; one is added to every count, so none is 0."""
    counts = torch.ones(n_tags)
    for batch in encoded.batches():
        counts += torch.bincount(batch.tag, minlength=n_tags)
    return counts / counts.sum()


def _adamw(tagger: Tagger, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that leaves vectors (biases, LayerNorm gains) out of weight decay."""
    trained = [p for p in tagger.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=tagger.device.type in ("cpu", "cuda"))


def _seed_of(seed: int, step: int) -> int:
    """One 64-bit seed from two numbers, without the collisions of adding them."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
