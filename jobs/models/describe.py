"""A model's architecture in a few lines that a person can read."""

from moray.model import ModelConfig
from moray.model.config.moe import MoEConfig

_GATED = {
    "silu": "SwiGLU",
    "gelu": "GeGLU",
    "gelu_tanh": "GeGLU (tanh)",
    "relu": "ReGLU",
    "relu2": "gated squared ReLU",
}
_PLAIN = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "relu2": "squared ReLU"}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "crmsnorm": "CRMSNorm"}


def describe(config: ModelConfig) -> list[str]:
    """What distinguishes it, a line each for the whole, attention, positions, feed-forward and experts."""
    lines = [_whole(config), _attention(config), _positions(config), _feed_forward(config)]
    return [*lines, _experts(config, config.moe)] if config.moe else lines


def _whole(config: ModelConfig) -> str:
    head = "scalar head" if config.head == "scalar" else "tied" if config.tied_embeddings else "untied"
    cap = config.final_softcap if config.head == "vocabulary" else None
    facts = [
        f"{config.n_layers} layers of width {config.d_model:,}",
        f"vocabulary {config.vocab_size:,} ({head})",
        f"{_NORMS[config.norm.kind]} ({config.norm.placement})",
        *(["parallel residual"] if config.residual == "parallel" else []),
        *([f"logits soft-capped at {cap:g}"] if cap else []),
    ]
    return ", ".join(facts)


def _attention(config: ModelConfig) -> str:
    attention = config.attention
    local = sum(attention.is_local(layer) for layer in range(config.n_layers))
    if latent := attention.latent:
        queries = f"queries through {latent.q_rank:,}" if latent.q_rank else "whole queries"
        kind = f"latent of {latent.kv_rank} + {latent.rope_dim}, {queries}"
    elif attention.n_kv_heads == attention.n_heads:
        kind = "multi-head"
    elif attention.n_kv_heads == 1:
        kind = "multi-query"
    else:
        kind = f"grouped-query with {attention.n_kv_heads} key heads"
    facts = [
        f"{attention.n_heads} heads of {attention.head_dim}, {kind}",
        *([f"QK-norm by {attention.qk_norm}"] if attention.qk_norm else []),
        *([f"scores soft-capped at {attention.softcap:g}"] if attention.softcap else []),
        *([f"a window of {attention.window:,} in {local} layers"] if attention.window and local else []),
    ]
    return "attention: " + ", ".join(facts)


def _positions(config: ModelConfig) -> str:
    position, scaling = config.position, config.position.scaling
    facts: list[str] = [f"RoPE of base {position.theta:,.0f}" if position.kind == "rope" else position.kind or "none"]
    if position.kind == "rope" and config.rotary_dim < config.attention.head_dim:
        facts.append(f"on {config.rotary_dim} of {config.attention.head_dim} channels")
    if scaling:
        facts.append(f"stretched {scaling.factor:g} times ({scaling.kind})")
    return f"positions: {', '.join(facts)}, sequences of up to {config.max_seq_len:,}"


def _feed_forward(config: ModelConfig) -> str:
    ffn = config.ffn
    facts = [(_GATED if ffn.gated else _PLAIN)[ffn.activation]]
    dense = config.n_layers - config.n_moe_layers
    if dense:
        facts.append(f"{ffn.width:,} wide in {dense} dense layers")
    if ffn.bias:
        facts.append("with biases")
    if dense and ffn.conv_width:
        facts.append(f"a convolution of {ffn.conv_width} tokens")
    if dense and ffn.adapter_rank:
        facts.append(f"an adapter of rank {ffn.adapter_rank}")
    return "feed-forward: " + ", ".join(facts)


def _experts(config: ModelConfig, moe: MoEConfig) -> str:
    expert = config.expert_ffn
    facts = [
        *([(_GATED if expert.gated else _PLAIN)[expert.activation]] if expert != config.ffn else []),
        f"{moe.n_experts:,} of width {moe.expert_width:,} in {config.n_moe_layers} layers",
        f"top-{moe.top_k} by {'noisy ' if moe.noisy else ''}{moe.score}",
        *([f"from {moe.top_k_groups} of {moe.n_groups} groups"] if moe.top_k_groups < moe.n_groups else []),
        *([f"{moe.n_shared} shared{' with a gate' if moe.shared_gate else ''}"] if moe.n_shared else []),
        *([f"capacity factor {moe.capacity_factor:g}"] if moe.capacity_factor else []),
    ]
    return "experts: " + ", ".join(facts)
