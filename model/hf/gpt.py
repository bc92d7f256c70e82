"""What the GPT families before Llama share: LayerNorm, plain heads, one matrix for queries, keys and values."""

# Shapes: H heads of d channels.

from typing import Any

from model.config import ModelConfig
from model.hf.family import Rule
from model.hf.fields import Fields, refused
from model.hf.places import Source
from model.hf.rules import ours, translated

_OURS = "blocks.{layer}.attention."

LAYERNORM = ours(norm={"kind": "layernorm", "bias": True})
PLAIN_FFN = ours(ffn={"gated": False, "bias": True})
LEARNED = ours(position={"kind": "learned"})

_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
_ACTIVATIONS = {
    **dict.fromkeys(_GELU_TANH, "gelu_tanh"),
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def activation(their: str, default: str) -> Rule:
    """transformers' names of activations: four of one function."""
    return translated(their, "ffn.activation", _ACTIVATIONS, default)


def width(their: str, d_model: str) -> Rule:
    """The feed-forward network's width; null is four times the model's."""

    def read(fields: Fields) -> dict[str, Any]:
        stated = fields.take(their, None)
        return {"ffn": {"width": 4 * fields.take(d_model) if stated is None else stated}}

    return Rule(read, lambda config: {their: config.ffn.width})


def heads(their: str, d_model: str) -> Rule:
    """As many key heads as query heads, which together are as wide as the model."""

    def read(fields: Fields) -> dict[str, Any]:
        count, size = fields.take(their), fields.take(d_model)
        if size % count:
            raise refused(their, count, f"it must divide {d_model}={size}")
        return {"attention": {"n_heads": count, "n_kv_heads": count, "head_dim": size // count}}

    return Rule(read, lambda config: {their: config.attention.n_heads})


def _read_scale(fields: Fields) -> dict[str, Any]:
    return {"attention": {"scale": None if fields.take("scale_attn_weights", True) else 1.0}}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    return {"scale_attn_weights": config.attention.scale != 1}


SCALE = Rule(_read_scale, _write_scale)
"""Scores are divided by sqrt(d), or not at all."""


def joined(config: ModelConfig, their: str, *, transposed: bool = False) -> dict[str, str | Source]:
    """One matrix: the rows of all queries, then of all keys, then of all values."""
    attention = config.attention
    queries, keys = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    edges = [0, queries, queries + keys, queries + 2 * keys]
    return {
        _OURS + name: Source(their, (slice(start, stop),), transposed)
        for name, start, stop in zip(("query", "key", "value"), edges, edges[1:], strict=False)
    }


def joined_by_head(config: ModelConfig, their: str) -> dict[str, str | Source]:
    """One matrix: the d rows of a head's query, of its key and of its value, head after head."""
    heads, size = config.attention.n_heads, config.attention.head_dim
    return {
        _OURS + name: Source(
            their, tuple(slice(row, row + size) for row in range(part * size, 3 * heads * size, 3 * size))
        )
        for part, name in enumerate(("query", "key", "value"))
    }
