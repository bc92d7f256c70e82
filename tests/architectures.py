"""Small models that law 1 is tried with: four whole ones, and every piece of one with the layouts that split it."""

from typing import Any

from law1 import HEADS, NARROW

from moray.model import ModelConfig
from moray.parallel.layout import Layout

BIAS = {"bias_update_rate": 0.05, "device_bias_update_rate": 0.02}
MODELS = {
    "dense": ModelConfig.preset("minimind-3", **NARROW),
    "dense-untied": ModelConfig.preset(
        "demo-dense", **{**NARROW, "attention": {**HEADS, "qk_norm": None}}, tied_embeddings=False
    ),
    "moe-deepseek": ModelConfig.preset(
        "demo-moe",
        **NARROW,
        moe={"n_experts": 8, "top_k": 3, "expert_width": 16, "balance_loss": 0.1, **BIAS},
    ),
    "moe-softmax": ModelConfig.preset(
        "minimind-3-moe", **NARROW, moe={"n_experts": 4, "top_k": 2, "expert_width": 24, "balance_loss": 0.1}
    ),
}

TP, TP_4, TP_EP, TP_FSDP = (
    Layout(dp_shard=1, tp=2),
    Layout(dp_shard=1, tp=4),
    Layout(dp_shard=1, tp=2, ep=2),
    Layout(dp_shard=2, tp=2, ep=2),
)
EP, FSDP = Layout(dp_shard=2, ep=2), Layout(dp_shard=2)


def narrow(preset: str = "demo-dense", **changes: Any) -> ModelConfig:
    return ModelConfig.preset(preset, **NARROW).but(**changes)


MLA = {"n_kv_heads": 4, "head_dim": 12, "qk_norm": None}
LATENT = {"q_rank": 16, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
EXPERTS = {"n_experts": 8, "top_k": 2, "expert_width": 16}

PIECES: dict[str, tuple[ModelConfig, list[Layout]]] = {
    "latent attention": (narrow(attention={**MLA, "latent": LATENT}, position={"interleaved": True}), [TP, TP_4]),
    "latent attention without query rank": (narrow(attention={**MLA, "latent": {**LATENT, "q_rank": None}}), [TP]),
    "multi-query": (narrow(attention={"n_kv_heads": 1, "qk_norm": None}), [TP, TP_4]),
    "fewer key heads than ranks, normed": (narrow(attention={"n_kv_heads": 2}), [TP_4]),
    "query heads that share key heads unevenly": (
        narrow(attention={"n_heads": 12, "n_kv_heads": 6, "head_dim": 4}),
        [TP_4],
    ),
    "norms over all heads": (narrow(attention={"qk_norm": "full"}), [TP, TP_4]),
    "sliding windows, soft-caps, sandwich norms, Gemma's offset": (
        narrow(
            attention={"window": 3, "pattern": ("local", "global"), "softcap": 2.0, "scale": 0.5},
            norm={"placement": "sandwich", "unit_offset": True},
            ffn={"activation": "gelu_tanh"},
            final_softcap=3.0,
            embedding_scale=5.0,
        ),
        [TP, FSDP],
    ),
    "GPT: biases, learned positions, LayerNorm, z-loss": (
        narrow(
            attention={"qk_norm": None, "qkv_bias": True, "output_bias": True},
            norm={"kind": "layernorm", "bias": True},
            ffn={"gated": False, "activation": "gelu", "bias": True},
            position={"kind": "learned"},
            max_seq_len=16,
            tied_embeddings=False,
            head_bias=True,
            z_loss=0.1,
        ),
        [TP, FSDP],
    ),
    "parallel residual, CRMSNorm, partial rotary": (
        narrow(residual="parallel", norm={"kind": "crmsnorm"}, position={"rotary_dim": 4}),
        [TP],
    ),
    "post-norm": (narrow(norm={"placement": "post", "kind": "layernorm"}), [TP]),
    "convolution": (narrow(ffn={"conv_width": 3, "bias": True}), [TP, FSDP]),
    "low-rank adapter": (narrow(ffn={"adapter_rank": 4, "gated": False, "activation": "relu2"}), [TP, FSDP]),
    "gated shared expert, three balance losses over the model": (
        narrow(
            moe={
                **EXPERTS,
                "n_shared": 1,
                "shared_gate": True,
                "n_groups": 4,
                "top_k_groups": 2,
                "group_score": "max",
                "balance_loss": 0.1,
                "balance_over": "model",
                "device_loss": 0.1,
                "communication_loss": 0.1,
                "router_z_loss": 0.1,
            }
        ),
        [TP_EP, TP_FSDP],
    ),
    "noisy top-k": (
        narrow(moe={**EXPERTS, "noisy": True, "jitter": 0.1, "importance_loss": 0.1, "load_loss": 0.1}),
        [TP_EP, EP],
    ),
    "random second expert, capacity by position": (
        narrow(
            moe={
                **EXPERTS,
                "second_expert": "random",
                "capacity_factor": 1.0,
                "group_size": 2,
                "balance_loss": 0.1,
                "balance_counts": "first",
            }
        ),
        [TP, TP_EP, EP],
    ),
    "capacity by gate, expert biases, every second layer": (
        narrow(
            moe={**EXPERTS, "capacity_factor": 1.0, "drop_by": "gate", "every": 2, "balance_loss": 0.1},
            ffn={"bias": True, "gated": False, "activation": "relu"},
        ),
        [TP, TP_EP, TP_FSDP, EP, FSDP],
    ),
}
