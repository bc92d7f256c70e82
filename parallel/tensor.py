"""Tensor and sequence parallelism: which weight is split how, and the vocabulary-parallel loss.

Between layers each rank holds a slice of every sequence's tokens; inside attention and feed-forward it holds all tokens
and a slice of the heads or the width (Korthikanti et al., 2022).
"""

import torch.distributed as dist
from torch import Tensor, nn
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

from moray.model.attention.layer import Attention
from moray.model.block import Block
from moray.model.config.parts import AttentionConfig, LatentConfig
from moray.model.decoder import Decoder
from moray.model.feedforward import FeedForward
from moray.model.loss import WholeVocabulary
from moray.model.moe.layer import MoE
from moray.parallel.styles import ChannelSharded, GatheredWidth, Replicated


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
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    top: dict[str, ParallelStyle] = {"embedding": embedding, "head": ColwiseParallel()}
    if decoder.position_embedding is not None:
        top["position_embedding"] = embedding
    parallelize_module(decoder, mesh, top | _norms_plan(decoder, "norm"))
    decoder.tie()
    decoder.vocabulary = VocabularyShard(mesh, decoder.config.vocab_size)
    for block in decoder.blocks:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, _block_plan(block, decoder.config.attention, mesh.size()))
        if isinstance(block.attention, Attention):
            block.attention.kv_heads = kv_heads_read(decoder.config.attention, mesh.size(), mesh.get_local_rank())


def kv_heads_read(config: AttentionConfig, ranks: int, rank: int) -> list[int] | None:
    """Which key and value heads a rank's query heads read, where every rank computes all of them; None where it has its
    own. One entry for each group of query heads, or for each query head where the groups are uneven.
    """
    if config.n_kv_heads % ranks == 0:
        return None
    share = config.n_heads // ranks
    read = [head * config.n_kv_heads // config.n_heads for head in range(rank * share, (rank + 1) * share)]
    groups = sorted(set(read))
    is_even = all(read.count(group) * len(groups) == share for group in groups)
    return groups if is_even else read


def _block_plan(block: Block, config: AttentionConfig, ranks: int) -> dict[str, ParallelStyle]:
    names = ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm")
    plan = _norms_plan(block, *names) | {"attention": _gather_tokens()}
    attention = _latent_plan(config.latent) if config.latent else _attention_plan(config, ranks)
    plan |= {f"attention.{name}": style for name, style in attention.items()}
    if not isinstance(block.ffn, MoE):
        return plan | _feed_forward_plan("ffn", block.ffn)
    on_slices = [name for name in ("router.linear", "router.noise", "shared_gate") if _has(block.ffn, name)]
    plan |= {f"ffn.{name}": SequenceParallel(use_local_output=True) for name in on_slices}
    return plan if block.ffn.shared is None else plan | _feed_forward_plan("ffn.shared", block.ffn.shared)


def _has(module: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in module.named_modules())


def _norms_plan(module: nn.Module, *names: str) -> dict[str, ParallelStyle]:
    """Norms of the residual stream see a slice of the tokens."""
    norms = [name for name in names if list(module.get_submodule(name).parameters())]
    return {name: SequenceParallel(use_local_output=True) for name in norms}


def _gather_tokens() -> ParallelStyle:
    return PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None))


def _attention_plan(config: AttentionConfig, ranks: int) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {"query": ColwiseParallel(), "output": RowwiseParallel(output_layouts=Shard(1))}
    # Heads are split, tokens are not: a norm of heads has a slice of dimension 2, one of all heads a slice of width.
    of_slices = GatheredWidth() if config.qk_norm == "full" else SequenceParallel(sequence_dim=2, use_local_output=True)
    norms: dict[str, ParallelStyle] = {"query_norm": of_slices, "key_norm": of_slices} if config.qk_norm else {}
    if config.n_kv_heads % ranks == 0:
        return plan | norms | {"key": ColwiseParallel(), "value": ColwiseParallel()}
    # Fewer heads than ranks: each rank computes all of them and reads some.
    plan |= {"key": Replicated(None if norms else Partial()), "value": Replicated(Partial())}
    return plan | ({**norms, "key_norm": Replicated(Partial())} if norms else {})


def _latent_plan(config: LatentConfig) -> dict[str, ParallelStyle]:
    """What is small is computed whole by every rank; heads are split. All heads read the same turned channels."""
    plan: dict[str, ParallelStyle] = {
        "kv_down": Replicated(),
        "key_rope": Replicated(Partial()),
        "kv_norm": Replicated(),
        "kv_up": ColwiseParallel(),
        "output": RowwiseParallel(output_layouts=Shard(1)),
    }
    if config.q_rank is None:
        return plan | {"query": ColwiseParallel()}
    return plan | {"query_down": Replicated(), "query_norm": Replicated(), "query_up": ColwiseParallel()}


def _feed_forward_plan(name: str, ffn: FeedForward) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        name: _gather_tokens(),
        f"{name}.up": ColwiseParallel(),
        f"{name}.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    if ffn.gate is not None:
        plan[f"{name}.gate"] = ColwiseParallel()
    if ffn.conv is not None:
        plan[f"{name}.conv"] = ChannelSharded()
    if ffn.adapter is not None:
        plan[f"{name}.adapter.a"] = RowwiseParallel(output_layouts=Replicate())
        plan[f"{name}.adapter.b"] = ColwiseParallel()
    return plan
