"""Many products on a CPU: small ones by one thread each, several at a time, for all threads on one would be idle."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor, Tensor]
"""Two matrices, and where what they make goes."""
LARGE = 2**27
"""Multiplications a thread from which all threads together are as fast as each alone."""


def multiply(products: Iterable[Product]) -> None:
    """torch.mm(a, b, out=out) of each. Large ones, and those that are as much as a thread's share, have all threads.

    No matrix is part of a graph.
    """
    found, threads = list(products), torch.get_num_threads()
    # Modes, of inference or of fake tensors, are a thread's own.
    is_plain = all(type(out) is Tensor and out.device.type == "cpu" for *_, out in found)
    if threads == 1 or not found or not is_plain or torch.is_inference_mode_enabled():
        _work(found)
        return
    work = [a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in found]
    least = min(LARGE * threads, sum(work) / threads)
    _work([product for product, size in zip(found, work, strict=True) if size >= least])
    # The largest first; a list's iterator hands out each of its elements once, whoever asks.
    order = sorted((i for i, size in enumerate(work) if size < least), key=lambda i: -work[i])
    rest = iter([found[i] for i in order])
    list(_pool(threads, os.getpid()).map(_work, [rest] * threads))


@torch.no_grad()
def _work(products: Iterable[Product]) -> None:
    for a, b, out in products:
        torch.mm(a, b, out=out)


@cache
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """Of a process, for a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "expert", initializer=torch.set_num_threads, initargs=(1,))
