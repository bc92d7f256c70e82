"""What a model costs: parameters, and floating-point operations a token."""

import torch

from model.config import ModelConfig
from model.decoder import Decoder


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active counts, of each layer's routed experts, the top_k that one token passes."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in Decoder(config).named_parameters()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    if not config.moe:
        return total, total
    return total, total - routed + routed * config.moe.top_k // config.moe.n_experts


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token, matrix products alone.

    6 for each weight that multiplies the token (2 forward, 4 backward), so the embedding's lookup counts nothing, and
    the scores and sums of causal attention over seq_len tokens, half of which the mask hides.
    """
    _, active = count_parameters(config)
    heads = config.attention
    norms = 2 * config.n_layers * (config.d_model + heads.head_dim * (heads.qk_norm == "head")) + config.d_model
    lookup = 0 if config.tied_embeddings else config.vocab_size * config.d_model
    attention = 12 * config.n_layers * heads.n_heads * heads.head_dim * seq_len / 2
    return 6 * (active - norms - lookup) + attention
