"""What a model costs, from its config alone: parameters, floating-point operations a token, bytes.

FLOPs are those of matrix products (and of a convolution along the sequence), two for each multiply-add, of what the
architecture asks for: an expert's for the tokens routed to it, a query's for the keys that it sees. Looking up an
embedding is none. What an implementation computes beside them (whole blocks of a mask, scores again in the backward
pass, places in capacity that stay empty) does not count, as is usual for MFU (PaLM, appendix B).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.lora import LoRA, adapter_shapes

PARTS = (
    "embedding",
    "positions",
    "attention",
    "dense ffn",
    "router",
    "routed experts",
    "shared experts",
    "norms",
    "head",
)
SCORES = "attention scores"
_FP32_BYTES = 4


class Count(NamedTuple):
    """Parameters. active: those that one token passes, which of each layer's routed experts are top_k."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> Count:
    """Of the whole model. Tied embeddings count once, and so does an embedding's lookup as active."""
    parts = parameters_by_part(config).values()
    return Count(sum(part.total for part in parts), sum(part.active for part in parts))


def parameters_by_part(config: ModelConfig) -> dict[str, Count]:
    """The parts of PARTS that the model has. A tied head has no parameters of its own; norms are those of all parts."""
    return {part: _count(part, tensors, config) for part, tensors in _tensors_by_part(config).items()}


def forward_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Floating-point operations a token by part, on average over a document of seq_len tokens.

    Each weight of a matrix multiplies a token once; SCORES are the products of queries, keys and values, which grow
    with the length. Latent attention is counted as in training, where keys and values are made from latent vectors.
    """
    flops: dict[str, float] = {}
    for part, tensors in _tensors_by_part(config).items():
        if part not in ("embedding", "positions", "norms"):
            flops[part] = 2 * _count(part, (tensor for tensor in tensors if tensor.ndim > 1), config).active
    pairs = sum(seen_pairs(torch.tensor([seq_len]), reach) for reach in attention_reaches(config))
    flops[SCORES] = pair_flops(config) * pairs / seq_len
    flops["head"] = 2 * config.head_width * config.d_model
    return flops


def count_adapters(config: ModelConfig, lora: LoRA) -> Count:
    """Parameters of the adapters: all, and those that a token passes."""
    shapes = adapter_shapes(config, lora).items()
    counts = [_count(_part(name), [torch.empty(shape, device="meta")], config) for name, shape in shapes]
    return Count(sum(count.total for count in counts), sum(count.active for count in counts))


class TrainingState(NamedTuple):
    """Bytes of what training keeps of every parameter that learns, over all ranks together."""

    weights: int
    gradients: int
    optimizer: int


def training_state_bytes(config: ModelConfig, lora: LoRA | None = None) -> TrainingState:
    """As the trainer keeps them: fp32 weights, fp32 gradients, AdamW's two fp32 moments; of adapters alone, where they
    are what learns.

    Beside them, a step in bf16 holds a bf16 copy of the layers at work, and AdamW a scalar for each tensor.
    """
    total = count_adapters(config, lora).total if lora else count_parameters(config).total
    return TrainingState(_FP32_BYTES * total, _FP32_BYTES * total, 2 * _FP32_BYTES * total)


def cache_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the KV cache of one sequence of so many tokens.

    A layer holds its keys and values of all tokens, of the last `window` ones if it is local, or one latent vector a
    token; a dense layer with a convolution also its last taps - 1 inputs.
    """
    attention, latent = config.attention, config.attention.latent
    width = latent.kv_rank + latent.rope_dim if latent else 2 * attention.n_kv_heads * attention.head_dim
    held = 0
    for layer, reach in enumerate(attention_reaches(config)):
        held += width * (tokens if reach is None else min(reach, tokens))
        if not config.is_moe_layer(layer):
            held += max(config.ffn.conv_width - 1, 0) * config.ffn.width
    return held * dtype.itemsize


def _tensors_by_part(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Weights on the meta device: what multiplies a token has two dimensions or more, biases and norms have one."""
    with torch.device("meta"):
        decoder = Decoder(config)
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in decoder.named_parameters():
        # Experts' biases are stacked, [E, F].
        found[_part(name)].append(parameter.flatten() if "bias" in name.rpartition(".")[2] else parameter)
    return {part: tensors for part, tensors in found.items() if tensors}


def _part(name: str) -> str:
    modules = name.split(".")
    if any("norm" in module for module in modules):
        return "norms"
    for module, part in (
        ("experts", "routed experts"),
        ("router", "router"),
        ("attention", "attention"),
        ("embedding", "embedding"),
        ("position_embedding", "positions"),
        ("head", "head"),
    ):
        if module in modules:
            return part
    return "shared experts" if any("shared" in module for module in modules) else "dense ffn"


def _count(part: str, tensors: Iterable[Tensor], config: ModelConfig) -> Count:
    total = sum(tensor.numel() for tensor in tensors)
    if part == "routed experts" and config.moe:
        return Count(total, total * config.moe.top_k // config.moe.n_experts)
    return Count(total, total)


def pair_flops(config: ModelConfig) -> int:
    """A query's product with a key that it sees, and their weight's with the value, of all heads of a layer."""
    attention, latent = config.attention, config.attention.latent
    value_dim = latent.value_dim if latent else attention.head_dim
    return 2 * attention.n_heads * (attention.head_dim + value_dim)


def attention_reaches(config: ModelConfig) -> tuple[int | None, ...]:
    """How many tokens a token sees at most in each layer, itself among them; None: all of its document before it."""
    attention = config.attention
    return tuple(attention.window if attention.is_local(layer) else None for layer in range(config.n_layers))


def seen_pairs(lengths: Tensor, reach: int | None) -> int:
    """Queries and the keys that they see in documents of these lengths: sums over t < length of min(t + 1, reach)."""
    within = lengths if reach is None else lengths.clamp(max=reach)
    return int((within * (within + 1) // 2 + (lengths - within) * within).sum())
