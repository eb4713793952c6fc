"""Several processes at one run, as `torchrun` or `accelerate launch` start them: who does what, and how it is summed.

Every process goes through the same run. A pass over a text, and a training step, is dealt out batch by batch; what was
gathered is summed once at its end, so that every process then holds, and decides by, the same numbers. The first
process alone prints and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

BUCKET = 32 * 2**20
"""Bytes that are summed in one message: few enough to hold beside the gradients, enough to fill the wire."""


_joined = 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """For a while, share the work with the other processes that a launcher started, each of which must do the same;
    alone, nothing.

    Outside of it every function works by itself, so that a distributed program of your own may measure in one of its
    processes while the others go on.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ and not dist.is_initialized():
        from accelerate import PartialState

        PartialState()  # joins the others: NCCL where there are GPUs, each process on its own, else gloo
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    _joined += 1
    try:
        yield
    finally:
        _joined -= 1


def size() -> int:
    """How many processes share what is being done; 1 unless a launcher started them and they are `joined`."""
    return dist.get_world_size() if _joined and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def is_shared(n: int) -> bool:
    """Whether `n` batches are dealt out. With fewer batches than processes each process does them all itself."""
    return 1 < size() <= n


def share(batches: Sequence[T]) -> Sequence[T]:
    """This process's batches: every `size()`-th, or all where they are too few to share."""
    return batches[rank() :: size()] if is_shared(len(batches)) else batches


def sum_(*tensors: Tensor) -> None:
    """Sum each tensor over the processes, in place; every process then holds the same bits."""
    if size() == 1:
        return
    for tensor in tensors:
        there = _reachable(tensor)
        dist.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)


def sum_many_(tensors: Iterable[Tensor]) -> None:
    """`sum_` of many small tensors of one dtype, a few large messages in all."""
    if size() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET):
            flat = torch.cat([t.flatten() for t in bucket])
            sum_(flat)
            for there, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                there.copy_(part.view_as(there))
            bucket = []
        if tensor is not None:
            bucket.append(tensor)


def agreed(tensor: Tensor) -> Tensor:
    """The first process's tensor; the others' must have its shape and dtype."""
    if size() == 1:
        return tensor
    there = _reachable(tensor.contiguous())
    dist.broadcast(there, src=0)
    return there.to(tensor.device)


def wait() -> None:
    """Go on when every process is here."""
    if size() > 1:
        dist.barrier()


def leave() -> None:
    """Part from the other processes, at the end of the program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _reachable(tensor: Tensor) -> Tensor:
    """A tensor where the messages can get at it: NCCL knows GPUs alone, gloo the CPU."""
    if dist.get_backend() == "nccl" and tensor.device.type != "cuda":
        return tensor.to("cuda")
    return tensor.contiguous()
