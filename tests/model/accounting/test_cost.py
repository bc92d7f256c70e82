"""Costs against counts by hand, torch's own FLOP counter in fp64, and the bytes of real caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moray.model import Decoder, KVCache, ModelConfig
from moray.model.accounting.cost import (
    PARTS,
    SCORES,
    cache_bytes,
    count_parameters,
    forward_flops,
    parameters_by_part,
    training_state_bytes,
)
from moray.model.config.parts import merge
from moray.model.randomness import Randomness

TOKENS = 24
SMALL: dict[str, Any] = {"n_layers": 4, "d_model": 32, "vocab_size": 72, "max_seq_len": TOKENS, "ffn": {"width": 48}}
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
FEW = {"n_experts": 8, "top_k": 3, "expert_width": 16}
LATENT: dict[str, Any] = {
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 12,
    "latent": {"kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
}
NOISY = {"noisy": True, "score": "softmax", "normalise_gates": True}


def small(preset: str, **changes: Any) -> ModelConfig:
    return ModelConfig.preset(preset, **merge(SMALL | {"attention": HEADS}, changes))


CONFIGS = {
    "qk-norm, tied": small("demo-dense"),
    "untied, multi-query": small("llama2-7b", attention={"n_kv_heads": 1}),
    "biases, learned positions, no gate": small("gpt3-125m"),
    "parallel residual, partial rotary, head's bias": small("gpt-neox-20b", position={"rotary_dim": 4}, head_bias=True),
    "convolution": small("demo-dense", ffn={"conv_width": 3}),
    "convolution, no gate, biases": small("gpt3-125m", ffn={"conv_width": 4}),
    "adapter": small("demo-dense", ffn={"adapter_rank": 4}),
    "windows in every second layer": small("gpt-neo-125m", attention={"window": TOKENS}),
    "experts and shared ones": small("demo-moe", moe=FEW | {"n_shared": 2}),
    "gated shared experts": small("demo-moe", moe=FEW | {"shared_gate": True}),
    "experts in every second layer, no gate": small("switch-base-8", moe=FEW | {"capacity_factor": None}),
    "noisy router": small("demo-moe", moe=FEW | NOISY),
    "latent attention, experts": ModelConfig.preset(
        "deepseek-v3",
        **merge(SMALL, {"attention": merge(LATENT, {"latent": {"q_rank": 14}}), "moe": FEW | {"n_groups": 4}}),
    ),
    "latent attention, whole queries": ModelConfig.preset(
        "demo-dense", **merge(SMALL, {"attention": merge(LATENT, {"qk_norm": None})})
    ),
}
WINDOWS = {
    "windows": small("mistral-7b", attention={"window": 7}),
    "a window of one": small("mistral-7b", attention={"window": 1}),
    "windows in every second layer": small("gpt-neo-125m", attention={"window": 7}),
    "soft-caps, sandwich norms, windows": small("gemma2-2b", attention={"window": 7}),
}
# Experts add their biases by a product of their own, which is no part of the architecture.
BIASED = {"experts with biases": small("switch-base-8", ffn={"bias": True}, moe=FEW)}
DECODED = {name: config for name, config in CONFIGS.items() if not config.attention.latent} | WINDOWS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_flops_equal_those_that_torch_counts(config: ModelConfig) -> None:
    """Of loss and gradients, where torch multiplies whole squares of scores and values as wide as keys."""
    decoder, tokens = _decoder(config).train(), _tokens(config)
    with _counted() as counter:
        losses = decoder.loss(tokens, tokens, randomness=Randomness(0, 0, torch.arange(2)))
        (losses.cross_entropy + losses.auxiliary).backward()
    heads, latent = config.attention, config.attention.latent
    value_dim = latent.value_dim if latent else heads.head_dim
    executed = 2 * heads.head_dim * TOKENS**2
    asked_for = (heads.head_dim + value_dim) * sum(range(1, TOKENS + 1))
    hidden = 3 * 2 * heads.n_heads * config.n_layers * (executed - asked_for) / TOKENS
    # Its counter knows no addmm_, by which the head's gradient is collected, and takes the gradient of a depthwise
    # convolution's weight for that of a whole one, as if every channel met all others.
    unseen = 2 * config.vocab_size * config.d_model
    mistaken = config.n_layers * 2 * config.ffn.conv_width * config.ffn.width * (config.ffn.width - 1)
    counted = counter.get_total_flops() / tokens.numel() + unseen - mistaken
    assert 3 * sum(forward_flops(config, TOKENS).values()) + hidden == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("config", DECODED.values(), ids=DECODED)
def test_forward_flops_equal_those_of_decoding_token_by_token(config: ModelConfig) -> None:
    """There, no product is formed that a mask would hide: a rolling cache holds what a token sees and no more."""
    config = config.but(moe={"noisy": False}) if config.moe else config  # noise is for training alone
    decoder, tokens = _decoder(config).eval(), _tokens(config)
    cache = KVCache(config, 2, TOKENS, decoder.embedding.weight)
    with torch.no_grad(), _counted() as counter:
        for place in range(TOKENS):
            decoder(tokens[:, place : place + 1], cache=cache)
    assert sum(forward_flops(config, TOKENS).values()) * tokens.numel() == pytest.approx(
        counter.get_total_flops(), rel=1e-12
    )


def test_a_window_leaves_what_a_token_sees() -> None:
    """A loop over all pairs of tokens, against the closed form."""
    config = WINDOWS["windows in every second layer"]
    seen = sum(
        key <= query and (layer % 2 == 0 or query - key < 7)
        for layer in range(config.n_layers)
        for query in range(TOKENS)
        for key in range(TOKENS)
    )
    assert forward_flops(config, TOKENS)[SCORES] == 2 * 2 * 4 * 8 * seen / TOKENS


@pytest.mark.parametrize("config", (CONFIGS | WINDOWS | BIASED).values(), ids=CONFIGS | WINDOWS | BIASED)
def test_parts_add_up_to_the_model(config: ModelConfig) -> None:
    sizes = {name: parameter.numel() for name, parameter in Decoder(config).named_parameters()}
    parts = parameters_by_part(config)
    assert set(parts) <= set(PARTS)
    assert sum(part.total for part in parts.values()) == sum(sizes.values()) == count_parameters(config).total
    assert parts["norms"].total == sum(size for name, size in sizes.items() if "norm" in name)
    if config.moe:
        inactive = parts["routed experts"].total * (config.moe.n_experts - config.moe.top_k) // config.moe.n_experts
        assert count_parameters(config).active == sum(sizes.values()) - inactive


def test_demo_moe_counted_by_hand() -> None:
    d, experts, width = 256, 16, 128
    parts = parameters_by_part(ModelConfig.preset("demo-moe"))
    assert parts == {
        "embedding": (6400 * d,) * 2,
        "attention": (4 * (d * 256 + 2 * d * 128 + 256 * d),) * 2,  # queries, keys and values, output
        "dense ffn": (3 * d * 704,) * 2,
        "router": (3 * d * experts,) * 2,
        "routed experts": (3 * 16 * 3 * d * width, 3 * 4 * 3 * d * width),
        "shared experts": (3 * 3 * d * width,) * 2,
        "norms": (4 * (2 * d + 2 * 64) + d,) * 2,  # of blocks, of query and key heads, the last one
    }


def test_a_scalar_head_has_a_weight_for_each_channel_and_takes_two_operations_for_each() -> None:
    language = ModelConfig.preset("demo-moe")
    scalar = language.but(head="scalar")
    assert parameters_by_part(scalar) == {**parameters_by_part(language), "head": (256, 256)}
    assert forward_flops(scalar, TOKENS) == {**forward_flops(language, TOKENS), "head": 2 * 256}


def test_deepseek_v3_counted_by_hand() -> None:
    d, heads, q_rank, kv_rank = 7168, 128, 1536, 512
    a_layer = d * q_rank + q_rank * heads * 192 + d * (kv_rank + 64) + kv_rank * heads * 256 + heads * 128 * d
    one_expert = 3 * d * 2048
    parts = parameters_by_part(ModelConfig.preset("deepseek-v3"))
    assert parts["attention"].total == 61 * a_layer
    assert parts["dense ffn"].total == 3 * 3 * d * 18432
    assert parts["routed experts"] == (58 * 256 * one_expert, 58 * 8 * one_expert)
    assert parts["shared experts"].total == 58 * one_expert
    assert parts["router"].total == 58 * d * 256
    assert parts["norms"].total == 61 * (2 * d + q_rank + kv_rank) + d
    assert parts["embedding"] == parts["head"] == (129280 * d, 129280 * d)


@pytest.mark.parametrize("config", (CONFIGS | WINDOWS).values(), ids=CONFIGS | WINDOWS)
@pytest.mark.parametrize("tokens", [5, TOKENS])
def test_a_cache_takes_the_bytes_it_was_said_to_take(config: ModelConfig, tokens: int) -> None:
    decoder = _decoder(config).eval()
    cache = KVCache(config, 2, tokens, decoder.embedding.weight)
    with torch.no_grad():
        decoder(_tokens(config)[:, :tokens], cache=cache)
    assert cache.n_bytes == 2 * cache_bytes(config, tokens, torch.float64)


def test_latent_attention_caches_576_numbers_a_token_and_layer() -> None:
    """DeepSeek-V2, table 1: (d_c + d_h^R) l, 4.5 d_h l with d_h = 128, against 2 n_h d_h l with all heads' keys."""
    config = ModelConfig.preset("deepseek-v2")
    assert cache_bytes(config, 1) == 2 * 60 * 576 == 2 * 60 * 4.5 * 128
    assert cache_bytes(config, 1000) == 1000 * cache_bytes(config, 1)


def test_windowed_layers_bound_the_cache() -> None:
    """Gemma 2 9B: 42 layers of 8 heads of 256, every second of which forgets what is 4,096 tokens ago."""
    config = ModelConfig.preset("gemma2-9b")
    assert cache_bytes(config, 8192) == 2 * 2 * 8 * 256 * 21 * (8192 + 4096)


def test_training_keeps_sixteen_bytes_a_parameter() -> None:
    """fp32 weights, gradients and two moments (Rajbhandari et al., 2020, section 3.1: 12 beside two 2-byte copies)."""
    assert training_state_bytes(ModelConfig.preset("minimind-3")) == tuple(63_912_192 * n for n in (4, 4, 8))


def _decoder(config: ModelConfig) -> Decoder:
    decoder = Decoder(config).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder


def _tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter
