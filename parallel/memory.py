"""What a rank holds of a model, from its config and the layout alone."""

from typing import NamedTuple

from moray.model.accounting.cost import parameters_by_part
from moray.model.config.architecture import ModelConfig
from moray.parallel.layout import Layout

STATE_BYTES = 16
"""Of a parameter: fp32 weight, gradient, and AdamW's two moments."""


class RankBytes(NamedTuple):
    """state: of this rank's shards, always. whole: of the weights and gradients that ZeRO's stage 1 has in a step."""

    state: float
    whole: float


def rank_bytes(config: ModelConfig, layout: Layout, itemsize: int) -> RankBytes:
    """Of a resolved layout; `itemsize` is that of the products' dtype. Gradients are added up in fp32."""
    parts = {part: count.total for part, count in parameters_by_part(config).items()}
    experts = parts.pop("routed experts", 0)
    dense = sum(parts.values()) / layout.tp
    shard = dense / layout.shard + experts / (layout.shard * layout.tp)
    return RankBytes(STATE_BYTES * shard, (itemsize + 4) * (dense + experts / layout.ep))
