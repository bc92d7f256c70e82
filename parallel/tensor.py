"""Tensor and sequence parallelism: which weight is split how, and the vocabulary-parallel loss.

Between layers each rank holds a slice of every sequence's tokens; inside attention and feed-forward it holds all tokens
and a slice of the heads or the width (Korthikanti et al., 2022).
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model.decoder import Decoder
from model.loss import WholeVocabulary


class VocabularyShard(WholeVocabulary):
    """The rows of embedding and head that this tensor-parallel rank holds, and the sums over its peers."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.start = mesh.get_local_rank() * (vocab_size // mesh.size())

    def gather(self, x_BTD: Tensor) -> Tensor:
        whole = DTensor.from_local(x_BTD, self.mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
        # Each rank's loss gradient covers its own vocabulary rows only: the parts sum to the whole.
        return whole.to_local(grad_placements=[Partial()])

    def weight(self, weight: Tensor) -> Tensor:
        assert isinstance(weight, DTensor)
        return weight.to_local()

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def highest(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


def apply_tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Turns a decoder's weights into DTensors over the `tp` mesh and inserts the collectives between them."""
    top: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "head": ColwiseParallel(),
    }
    parallelize_module(decoder, mesh, top)
    if decoder.config.tied_embeddings:
        decoder.head.weight = decoder.embedding.weight
    decoder.vocabulary = VocabularyShard(mesh, decoder.config.vocab_size)
    for layer, block in enumerate(decoder.blocks):
        parallelize_module(block, mesh, _block_plan(decoder, layer))


def _block_plan(decoder: Decoder, layer: int) -> dict[str, ParallelStyle]:
    config = decoder.config
    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(use_local_output=True),
        "ffn_norm": SequenceParallel(use_local_output=True),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=Shard(1)),
    }
    if config.attention.qk_norm == "head":
        # Heads are split, tokens are not: the norm's weight sees a slice of dimension 2.
        plan["attention.query_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan["attention.key_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    if config.moe is None or not config.is_moe_layer(layer):
        plan |= _feed_forward_plan("ffn")
    else:
        plan["ffn.router.linear"] = SequenceParallel(use_local_output=True)
        if config.moe.noisy:
            plan["ffn.router.noise"] = SequenceParallel(use_local_output=True)
        if config.moe.shared_gate:
            plan["ffn.shared_gate"] = SequenceParallel(use_local_output=True)
        if config.moe.n_shared:
            plan |= _feed_forward_plan("ffn.shared")
    return plan


def _feed_forward_plan(name: str) -> dict[str, ParallelStyle]:
    return {
        name: PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        f"{name}.gate": ColwiseParallel(),
        f"{name}.up": ColwiseParallel(),
        f"{name}.down": RowwiseParallel(output_layouts=Shard(1)),
    }
