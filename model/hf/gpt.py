"""What the GPT families before Llama share: LayerNorm, plain heads, one matrix for queries, keys and values."""

# Shapes: H heads of d channels.

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.places import Source
from moray.model.hf.rules import ours, same, translated, unused

_OURS = "blocks.{layer}.attention."

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
        return {"ffn": {"width": 4 * fields.count(d_model) if stated is None else stated}}

    return Rule(read, lambda config: {their: config.ffn.width})


def heads(their: str, d_model: str) -> Rule:
    """As many key heads as query heads, which together are as wide as the model."""

    def read(fields: Fields) -> dict[str, Any]:
        count, size = fields.count(their), fields.count(d_model)
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


def sizes(
    *,
    n_layers: str,
    n_heads: str,
    eps: str,
    d_model: str = "hidden_size",
    ffn_width: str = "intermediate_size",
    max_seq_len: str = "max_position_embeddings",
    tied: bool = True,
) -> tuple[Rule, ...]:
    """Their names of what each of them states, and what all of them have. tied: the family's default."""
    return (
        same("vocab_size", "vocab_size"),
        same(d_model, "d_model"),
        same(n_layers, "n_layers"),
        same(max_seq_len, "max_seq_len"),
        same(eps, "norm.eps", 1e-5),
        same("initializer_range", "init.std", 0.02),
        same("tie_word_embeddings", "tied_embeddings", tied),
        heads(n_heads, d_model),
        width(ffn_width, d_model),
        ours(norm={"kind": "layernorm", "bias": True}, ffn={"gated": False, "bias": True}),
        # Of models with other heads than the language model's.
        unused("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        unused("summary_first_dropout"),
    )


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
