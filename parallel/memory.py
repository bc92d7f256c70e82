"""What a rank has in memory at once while it trains, from config and layout alone."""

from typing import NamedTuple

import torch

from moray.model.accounting.cost import count_adapters, parameters_by_part
from moray.model.accounting.saved import activation_bytes
from moray.model.config.architecture import ModelConfig
from moray.model.lora import LoRA
from moray.model.loss import CHUNK_TOKENS
from moray.model.recompute import Recompute
from moray.parallel.layout import Layout
from moray.parallel.reduction import Stage

FP32_BYTES = 4
MOMENTS = 2


class RankMemory(NamedTuple):
    """Bytes. weights, gradients, optimizer: fp32, of this rank's shards. gathered: what it has of its peers' weights
    and of gradients that are not reduced yet. activations: what a micro-batch leaves for the backward pass. transient:
    what the layer at work has beside them, or the loss, whichever is more. head: its gradient, which the loss forms.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    transient: float
    head: float

    @property
    def total(self) -> float:
        return sum(self)


def rank_memory(
    config: ModelConfig,
    layout: Layout,
    *,
    seq_len: int,
    micro_batch: int,
    dtype: torch.dtype,
    stage: Stage,
    recompute: Recompute,
    moments: torch.dtype = torch.float32,
    lora: LoRA | None = None,
) -> RankMemory:
    """At its most, of a resolved layout; `dtype` is that of the products, `moments` that of AdamW's. With `lora`,
    gradients and moments are those of adapters, and what is frozen is held in `dtype`; activations are counted as if
    all learnt.

    As if tokens were spread evenly over experts, and without what a kernel needs for itself.
    """
    ends, layers, experts = _divided(config, layout)
    shard = _shard(layout, ends, layers, experts)
    kept = activation_bytes(config, seq_len, recompute, dtype=dtype, tp=layout.tp)
    outputs = config.head_width / layout.tp
    logits = min(CHUNK_TOKENS, seq_len * micro_batch) * outputs * (2 * FP32_BYTES + dtype.itemsize)
    adapters = count_adapters(config, lora).total / (layout.shard * layout.tp) if lora else 0.0
    learns = adapters if lora else shard
    return RankMemory(
        weights=FP32_BYTES * learns + (dtype.itemsize * shard if lora else 0),
        gradients=FP32_BYTES * learns,
        optimizer=MOMENTS * moments.itemsize * learns,
        gathered=_gathered(config, layout, dtype, stage, ends, layers, experts, 0 if lora else FP32_BYTES),
        activations=kept.total * micro_batch,
        transient=max(kept.transient * micro_batch, logits),
        head=0.0 if lora else FP32_BYTES * outputs * config.d_model,
    )


def frozen_memory(config: ModelConfig, layout: Layout, dtype: torch.dtype, stage: Stage) -> float:
    """Bytes of a model beside the one that learns, which stays as it is: held and gathered in the products' dtype."""
    ends, layers, experts = _divided(config, layout)
    gathered = _gathered(config, layout, dtype, stage, ends, layers, experts, 0)
    return dtype.itemsize * _shard(layout, ends, layers, experts) + gathered


def _divided(config: ModelConfig, layout: Layout) -> tuple[float, float, float]:
    """Parameters at both ends, in layers and of routed experts, over tensor- or expert-parallel ranks."""
    parts = {part: count.total for part, count in parameters_by_part(config).items()}
    experts = parts.pop("routed experts", 0) / layout.ep
    ends = sum(parts.pop(part, 0) for part in ("embedding", "positions", "head")) / layout.tp
    return ends, sum(parts.values()) / layout.tp, experts


def _shard(layout: Layout, ends: float, layers: float, experts: float) -> float:
    return (ends + layers) / layout.shard + experts / (layout.shard * layout.tp // layout.ep)


def _gathered(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    stage: Stage,
    ends: float,
    layers: float,
    experts: float,
    gradient: int,
) -> float:
    """Stage 1 has all weights and gradients (fp32, for they are added up), 3 those outside of layers and the weights of
    one layer, whose gradients are not there yet when activations are at their most. `gradient`: bytes of a weight's, 0
    where they are frozen.

    What a rank holds whole in the products' dtype is no copy (`parallel.shard`).
    """
    is_cast = gradient > 0 and dtype.itemsize != FP32_BYTES
    is_whole = layout.shard == 1 and not is_cast
    are_experts_whole = layout.shard * layout.tp == layout.ep and not is_cast
    ends, layers = (0.0, 0.0) if is_whole else (ends, layers)
    experts = 0.0 if are_experts_whole else experts
    weight = dtype.itemsize
    if stage == 1:
        return (weight + gradient) * (ends + layers + experts)
    of_layer = layers / config.n_layers + experts / max(config.n_moe_layers, 1)
    return (weight + gradient) * ends + weight * of_layer
