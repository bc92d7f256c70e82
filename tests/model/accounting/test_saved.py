"""Bytes that autograd saves, against those of real tensors in a real forward pass, and by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moray.model import Decoder, ModelConfig
from moray.model.accounting.saved import activation_bytes
from moray.model.moe.router import Router
from moray.model.randomness import Randomness

TOKENS = 48
SMALL: dict[str, Any] = {"n_layers": 4, "d_model": 64, "vocab_size": 104, "max_seq_len": TOKENS, "ffn": {"width": 88}}
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
FEW = {"n_experts": 8, "expert_width": 16}
LATENT = {
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 24,
    "latent": {"kv_rank": 16, "q_rank": 24, "nope_dim": 16, "rope_dim": 8, "value_dim": 16},
}
NOISY = {"noisy": True, "load_loss": 0.1, "importance_loss": 0.1, "router_z_loss": 0.1}

CONFIGS = {
    "dense": ModelConfig.preset("demo-dense", **SMALL, attention=HEADS),
    "windows": ModelConfig.preset("mistral-7b", **SMALL, attention=HEADS | {"window": 10}),
    "alternating windows": ModelConfig.preset("gpt-neo-125m", **SMALL, attention=HEADS | {"window": 10}),
    "parallel residual, partial rotary": ModelConfig.preset(
        "gpt-neox-20b", **SMALL, attention=HEADS, position={"rotary_dim": 4}
    ),
    "post-norm": ModelConfig.preset("gpt3-125m", **SMALL, attention=HEADS, norm={"placement": "post"}),
    "convolution": ModelConfig.preset("demo-dense", **SMALL, attention=HEADS).but(ffn={"conv_width": 3}),
    "adapter": ModelConfig.preset("demo-dense", **SMALL, attention=HEADS).but(ffn={"adapter_rank": 4}),
    "latent attention, experts, one dense layer": ModelConfig.preset(
        "deepseek-v3", **SMALL, attention=LATENT, moe=FEW | {"top_k": 3, "n_groups": 4, "n_dense_layers": 1}
    ),
    "routing groups of two": ModelConfig.preset(
        "qwen3-30b-a3b", **SMALL, attention=HEADS, moe=FEW | {"top_k": 2, "group_size": 2}
    ),
    "experts in every second layer, jitter": ModelConfig.preset(
        "switch-base-8", **SMALL, attention=HEADS, moe=FEW | {"capacity_factor": None}
    ),
    "noise": ModelConfig.preset("minimind-3-moe", **SMALL, attention=HEADS, moe=FEW | NOISY),
    "scalar head": ModelConfig.preset("demo-dense", **SMALL, attention=HEADS, head="scalar"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_bytes_are_those_of_a_real_forward_pass(config: ModelConfig) -> None:
    batch = config.moe.group_size if config.moe else 1
    missed = _really_saved(config, batch) - activation_bytes(config, TOKENS).total * batch
    # What a routing group's statistics become in its losses: a few numbers an expert, however long the sequences.
    assert 0 <= missed <= config.n_moe_layers * config.n_experts * 64
    assert config.moe or not missed


def test_a_soft_capped_block_is_computed_again_from_its_queries() -> None:
    """Only what checkpointing keeps counts; the keys and values that its closure holds are no saved tensors."""
    config = ModelConfig.preset("gemma2-2b", **SMALL, attention=HEADS | {"window": 10})
    assert activation_bytes(config, TOKENS).total == _really_saved(config, 1)


def test_a_layer_counted_by_hand() -> None:
    """A GPT-2 layer saves, in bf16, what each of its operations needs to go back."""
    config = ModelConfig.preset("gpt3-125m", **SMALL, attention=HEADS | {"n_kv_heads": 4})
    d, width, heads = 64, 88, 4
    # Inputs of: two norms and their mean and deviation, queries with keys and values, SDPA's q, k, v, output and (fp32)
    # log-sum-exp, which the output projection reads too, the up projection, GELU, the down projection.
    norms = 2 * (d * 2 + 2 * 2)
    attention = d * 2 + 4 * d * 2 + heads * 4
    feed_forward = d * 2 + width * 2 + width * 2
    layers = activation_bytes(config, TOKENS).layers
    assert layers == [TOKENS * (norms + attention + feed_forward)] * 4


def test_what_capacity_would_drop_is_counted_as_kept() -> None:
    free = CONFIGS["experts in every second layer, jitter"]
    assert activation_bytes(free.but(moe={"capacity_factor": 1.0}), TOKENS) == activation_bytes(free, TOKENS)


def _really_saved(config: ModelConfig, batch: int) -> int:
    """By the loss of a batch, or its values, as training computes it, but for what is as large as the weights."""
    decoder = Decoder(config).bfloat16()
    for module in decoder.modules():
        if isinstance(module, Router):
            module.float()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, TOKENS), generator=generator)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        if config.head == "scalar":
            decoder.values(tokens)
        else:
            decoder.loss(tokens, tokens, randomness=Randomness(0, 0, torch.arange(batch)))
    weights = {x.untyped_storage().data_ptr() for x in (*decoder.parameters(), *decoder.buffers())}
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in kept
        if tuple(x.shape) != (config.vocab_size, config.d_model)
    }
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_it_is_found_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    config = CONFIGS["routing groups of two"]
    expected = activation_bytes(config, TOKENS, dtype=torch.float32)
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            assert activation_bytes(config, TOKENS, dtype=torch.float32) == expected
    finally:
        torch.set_num_threads(before)
