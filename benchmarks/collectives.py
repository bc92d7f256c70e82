"""Where a step's time goes on several workers, and how many bytes travel: used by `workers.py --split`."""

import time
from collections.abc import Callable
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.model import ModelConfig
from moray.model.accounting.cost import parameters_by_part
from moray.parallel.layout import Layout

# Of what a rank has at the end of one, or at the start for those that scatter, the part that it must send (ring).
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather_into_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_gather_single": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter_single": lambda ranks: (ranks - 1) / ranks,
    "all_to_all_single": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
}


class Split:
    """Stands before each collective of this process: waits there until its peers have come, and counts.

    idle_s: waiting for peers. exchanging_s: in collectives, once all are there. sent: bytes. It makes steps slower.
    """

    def __init__(self) -> None:
        self.idle_s = self.exchanging_s = self.sent = 0.0
        self.is_counting = False
        self._barrier = dist.barrier
        for name, share in SENT.items():
            if function := getattr(dist, name, None):
                setattr(dist, name, self._watched(function, share))

    def _watched(self, function: Callable[..., Any], share: Callable[[int], float]) -> Callable[..., Any]:
        def collective(*arguments: Any, **named: Any) -> Any:
            group = named.get("group") or next((x for x in arguments if isinstance(x, dist.ProcessGroup)), None)
            ranks = dist.get_world_size(group)
            if not self.is_counting or ranks == 1:
                return function(*arguments, **named)
            began = time.perf_counter()
            self._barrier(group)
            here = time.perf_counter()
            work = function(*arguments, **named)
            if work is not None:
                work.wait()  # what would be hidden behind products is shown, too
            self.idle_s += here - began
            self.exchanging_s += time.perf_counter() - here
            self.sent += share(ranks) * max(_bytes(x) for x in (*arguments, *named.values()))
            return work

        return collective


def _bytes(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.nbytes
    return sum(map(_bytes, x)) if isinstance(x, list) and x and isinstance(x[0], Tensor) else 0


def least_bytes(config: ModelConfig, layout: Layout, sequences: int, seq_len: int) -> float:
    """What a rank must send in a step of so many sequences of its own (of its peers' too, under tensor parallelism), in
    fp32: each shared weight once there and its gradient once back; each token once to each rank elsewhere that has an
    expert of it, and a sum back, in both passes, where choices are even; each token's slice four times a layer, both
    ways, to tensor-parallel peers.
    """
    size, parts = torch.float32.itemsize, {name: part.total for name, part in parameters_by_part(config).items()}
    experts = parts.pop("routed experts", 0)
    tokens, dp = sequences * seq_len, layout.dp
    shared = sum(parts.values()) / layout.tp + (0 if layout.ep > 1 else experts)
    found = 2 * (dp - 1) / dp * shared * size
    if layout.ep > 1 and config.moe:
        elsewhere = (layout.ep - 1) * reached(config.n_experts, config.n_experts // layout.ep, config.moe.top_k)
        found += 4 * elsewhere * tokens * config.n_moe_layers * config.d_model * size
    if layout.tp > 1:
        exchanges = 8 * config.n_layers + 2 * 2  # and behind the embedding, and before the head
        found += exchanges * (layout.tp - 1) / layout.tp * tokens * config.d_model * size
    return found


def reached(experts: int, held: int, top_k: int) -> float:
    """The probability that a rank that holds so many experts has one of the k that a token draws evenly."""
    return 1 - comb(experts - held, top_k) / comb(experts, top_k)
