"""What tests of losses over a vocabulary share: one in parts, and an eye on the size of tensors."""

import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moray.model.loss import WholeVocabulary


class Shard(WholeVocabulary):
    """The entries from `start` on, in a thread of its own: sums over all parts wait for each other."""

    def __init__(self, rank: int, start: int, peers: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.start, self.peers, self.barrier = rank, start, peers, barrier

    def _gathered(self, x: Tensor) -> Tensor:
        self.peers[self.rank] = x
        self.barrier.wait()
        gathered = torch.stack([peer for peer in self.peers if peer is not None])
        self.barrier.wait()
        return gathered

    def total(self, x: Tensor) -> Tensor:
        return self._gathered(x).sum(0)

    def highest(self, x: Tensor) -> Tensor:
        return self._gathered(x).amax(0)


class LargestTensor(TorchDispatchMode):
    """Watches every operation of the block, forward and backward, for the most elements of a tensor it made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result
