"""Costs against published parameter counts, counts by hand, and torch's own FLOP counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Decoder, ModelConfig, initialise
from model.cost import count_parameters, train_flops_per_token


def test_published_counts() -> None:
    """MiniMind's own numbers; of the MoE's experts (4, top-1), a token passes a quarter."""
    assert count_parameters(ModelConfig.preset("minimind-3")) == (63_912_192, 63_912_192)
    total, active = count_parameters(ModelConfig.preset("minimind-3-moe"))
    assert total == 198_416_640
    assert round(active / 1e6, 2) == 63.94
    assert active == total - 3 * 8 * 3 * 768 * 2432  # three experts of three matrices in eight layers


def test_demo_moe_counted_by_hand() -> None:
    d, experts, width = 256, 16, 128
    attention = d * 256 + 2 * d * 128 + 256 * d + 2 * 64  # queries, keys and values, output, two norms of heads
    dense = attention + 3 * d * 704 + 2 * d
    moe_without_experts = attention + d * experts + 3 * d * width + 2 * d  # router and one shared expert
    rest = 6400 * d + d + dense + 3 * moe_without_experts
    one_of_each = 3 * 3 * d * width
    assert count_parameters(ModelConfig.preset("demo-moe")) == (rest + 16 * one_of_each, rest + 4 * one_of_each)


SMALL = {"n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
CONFIGS = {
    "dense": ModelConfig.preset("minimind-3", **SMALL),
    "untied, no qk-norm": ModelConfig.preset("demo-dense", **SMALL, tied_embeddings=False, qk_norm=False),
    "moe": ModelConfig.preset("demo-moe", **SMALL, n_experts=8, top_k=3, d_expert=16),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flops_equal_those_that_torch_counts(config: ModelConfig) -> None:
    """Of forward and backward in fp64, where experts are a loop of products that torch can count."""
    decoder = Decoder(config).double()
    initialise(decoder, 0)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(decoder(tokens).flatten(0, 1), tokens.flatten()).backward()
    # torch counts the whole square of scores, of which a causal kernel computes half.
    hidden_half = 12 * config.n_layers * config.n_heads * config.head_dim * 24 / 2
    counted = counter.get_total_flops() / tokens.numel()
    assert train_flops_per_token(config, 24) + hidden_half == pytest.approx(counted, rel=1e-9)
