"""How the gradients that ranks form of their micro-batches become those of the global batch."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moray.model.decoder import Decoder
from moray.model.sharded import local
from moray.parallel.held import sharded_over
from moray.parallel.layout import Meshes

Stage = Literal[1, 3]
"""Of ZeRO (Rajbhandari et al., 2020). 3: a layer's weights are gathered, and its gradient reduced to this rank's shard,
with every micro-batch. 1: once a step, and all weights and gradients are on every rank meanwhile."""
BUCKET_BYTES = 32 << 20
"""Of the gradients that replicas exchange at a time: so much is copied for it."""


class Reduction:
    """Sums over all ranks, under FSDP by its own means; copies of the model (HSDP) exchange theirs once a step.

    `begin` is to be called before each micro-batch, `finish` behind the last one, on all ranks alike. Collective.
    """

    def __init__(self, decoder: Decoder, meshes: Meshes, stage: Stage) -> None:
        """`stage`: the one that the decoder was built with."""
        self.tp = meshes.tp.size()
        self._decoder, self._stage, replicas = decoder, stage, meshes.dense["dp_replicate"]
        self._plain = [weight for weight in decoder.parameters() if sharded_over(weight) is None]
        self._replicas = replicas.get_group() if replicas.size() > 1 else None

    def begin(self, is_last: bool) -> None:
        if not isinstance(self._decoder, FSDPModule):
            return
        if self._stage == 1:
            self._decoder.set_requires_gradient_sync(is_last)
            self._decoder.set_reshard_after_backward(is_last)
        else:
            self._decoder.set_requires_all_reduce(is_last)

    @torch.no_grad()
    def finish(self) -> None:
        if self._replicas is None:
            return
        gradients = [local(weight.grad) for weight in self._plain if weight.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self._replicas)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(x) for piece, x in zip(pieces, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(x.nbytes for x in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
