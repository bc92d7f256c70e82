"""Sums whose bits do not depend on how many data-parallel ranks form them.

The micro-batches of a global batch are the leaves of a binary tree over its lanes, and every gradient is added up along
it: the ranks that share the weights hold neighbouring leaves (`Layout.lanes`), each of them adds what comes later, and
copies of the model hold whole branches. So all ranks add aligned subtrees of the same tree, as long as their number and
that of the leaves are powers of two. The gradient's norm is a sum of integers, whose order does not matter.
"""

# Shapes: P parameters.

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moray.model.decoder import Decoder
from moray.model.sharded import local
from moray.parallel.held import sharded_over
from moray.parallel.layout import Meshes
from moray.parallel.reduction import Reduction
from moray.parallel.shard import on_own_gradients

SUM_BITS = 62  # of a sum of integers in int64
PIECE = 1 << 20  # elements whose squares exist in fp64 at a time


class PairwiseSum:
    """Adds tensors in a fixed tree: neighbours, then neighbouring pairs, and so on. What is added is overwritten."""

    def __init__(self) -> None:
        self._branches: list[Tensor] = []
        self._count = 0

    def add(self, x: Tensor) -> None:
        self._count += 1
        for _ in range((self._count & -self._count).bit_length() - 1):  # as many branches as are full now
            x = self._branches.pop().add_(x)
        self._branches.append(x)

    def total(self) -> Tensor:
        while len(self._branches) > 1:
            last = self._branches.pop()
            self._branches[-1].add_(last)
        return self._branches[0]


class GradientTree(Reduction):
    """Takes each micro-batch's gradient from autograd before FSDP would reduce it, and adds it to the tree.

    No rank holds the whole model's gradient: one weight's at a time, and of its own part log2(micro-batches) + 1 sums.
    """

    def __init__(self, decoder: Decoder, meshes: Meshes) -> None:
        """To be made after the decoder's witness, which looks at what this takes away. Collective."""
        super().__init__(decoder, meshes, stage=3)
        self._sums: defaultdict[nn.Parameter, PairwiseSum] = defaultdict(PairwiseSum)
        self._copies = meshes.dense["dp_replicate"].get_group() if meshes.dense["dp_replicate"].size() > 1 else None
        on_own_gradients(decoder, self._take)

    def _take(self, shard: nn.Parameter, whole: Tensor) -> None:
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        if isinstance(gradient, DTensor):
            assert isinstance(whole, DTensor)
            gradient = gradient.redistribute(placements=whole.placements).to_local()
        self._sums[shard].add(_sum_over_shards(gradient, shard, self.tp))

    @torch.no_grad()
    def finish(self) -> None:
        """Gives every weight the gradient of all that was taken since the last call. Collective."""
        for shard, branches in self._sums.items():
            total = branches.total()
            if self._copies:
                of_copies = [torch.empty_like(total) for _ in range(self._copies.size())]
                dist.all_gather(of_copies, total.contiguous(), group=self._copies)
                total = _pairwise(of_copies)
            shard.grad = torch.empty_like(shard)
            local(shard.grad).copy_(total)
        self._sums.clear()


def _sum_over_shards(gradient: Tensor, shard: nn.Parameter, tp: int) -> Tensor:
    """This rank's part of the sum, over the ranks that share a weight, of their gradients of all of it."""
    name = sharded_over(shard)
    if name is None:
        return gradient
    assert isinstance(shard, DTensor)
    mesh = shard.device_mesh
    placement, ranks = shard.placements[(mesh.mesh_dim_names or ()).index(name)], mesh[name].size()
    if ranks == 1:
        return gradient.to(shard.dtype)
    assert isinstance(placement, Shard | _StridedShard)
    chunks = gradient.chunk(ranks, placement.dim)  # of a short dimension fewer than ranks
    sent = [chunk.numel() for chunk in chunks] + [0] * (ranks - len(chunks))
    mine = local(shard)
    received = gradient.new_empty(ranks, *mine.shape)
    leaving = torch.cat([chunk.reshape(-1) for chunk in chunks])
    dist.all_to_all_single(received.view(-1), leaving, [mine.numel()] * ranks, sent, group=mesh[name].get_group())
    received = received.to(shard.dtype)
    # Tensor-parallel peers have parts of the same leaves.
    return _pairwise(list(received.unflatten(0, (-1, tp)).sum(1) if name == "dp_shard_tp" else received))


def _pairwise(parts: Sequence[Tensor]) -> Tensor:
    branches = PairwiseSum()
    for part in parts:
        branches.add(part)
    return branches.total()


@torch.no_grad()
def exact_squares(gradients: Sequence[Tensor]) -> float:
    """The sum of the squares of all gradients, to fp64's precision and the same bits on every layout. Collective.

    Each is scaled by a power of two so that its squares have integers and fractions whose sums fit into int64.
    """
    held = [local(gradient) for gradient in gradients]
    highest_P = torch.stack([x.abs().amax() if x.numel() else x.new_zeros(()) for x in held]).double()
    _all_reduce(highest_P, dist.ReduceOp.MAX)
    highest = highest_P.tolist()
    if not all(map(math.isfinite, highest)):
        return math.nan if any(map(math.isnan, highest)) else math.inf
    grids = [_Grid(gradient.numel(), top) for gradient, top in zip(gradients, highest, strict=True)]
    sums_P2 = torch.stack([grid.sums(x) for grid, x in zip(grids, held, strict=True)])
    sums_P2 *= torch.tensor([[_is_first_holder(gradient)] for gradient in gradients], device=sums_P2.device)
    _all_reduce(sums_P2, dist.ReduceOp.SUM)
    return math.fsum(grid.value(*sums) for grid, sums in zip(grids, sums_P2.tolist(), strict=True))


class _Grid:
    """Where the squares of n numbers of at most this size are integers and fractions whose sums fit into int64."""

    def __init__(self, n: int, highest: float) -> None:
        room = SUM_BITS - max(n, 1).bit_length()
        self._fraction = 2.0**room
        # 2^-900 and less are as good as 0, and the scale of what is larger is a number of fp64.
        self._scale = 2.0 ** (room // 2 - max(math.frexp(highest)[1], -900))

    def sums(self, x: Tensor) -> Tensor:
        total = torch.zeros(2, dtype=torch.int64, device=x.device)
        for piece in x.reshape(-1).split(PIECE):
            squares = (piece.double() * self._scale).square_()
            whole = squares.floor()
            fraction = squares.sub_(whole).mul_(self._fraction).round_()
            total += torch.stack((whole.long().sum(), fraction.long().sum()))
        return total

    def value(self, whole: int, fraction: int) -> float:
        return (whole + fraction / self._fraction) / self._scale / self._scale


def _is_first_holder(gradient: Tensor) -> bool:
    """Whether no earlier rank holds the same part of a tensor that is spread over the world."""
    if not isinstance(gradient, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    coordinates = gradient.device_mesh.get_coordinate() or ()
    return not any(at for at, p in zip(coordinates, gradient.placements, strict=True) if p.is_replicate())


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if dist.is_initialized():
        dist.all_reduce(x, operation)
