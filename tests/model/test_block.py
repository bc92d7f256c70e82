"""Where a block normalises: against torch's Transformer layer, and each placement's equation written out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moray.model import Documents, ModelConfig
from moray.model.block import Block
from moray.model.context import Context
from moray.model.norm import CRMSNorm, LayerNorm

D, HEADS, WIDTH, EPS = 24, 3, 40, 1e-5
PLAIN: dict[str, Any] = {
    "d_model": D,
    "n_layers": 2,
    "vocab_size": 32,
    "position": {"kind": "learned"},  # so no block turns anything
    "attention": {"n_heads": HEADS, "n_kv_heads": HEADS, "head_dim": D // HEADS},
    "ffn": {"width": WIDTH, "activation": "relu", "gated": False},
}
MOE = {"n_experts": 4, "top_k": 2, "expert_width": 16, "balance_loss": 0.1}


def block_of(config: ModelConfig) -> Block:
    block = Block(config, layer=0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            # Norm weights away from 1.
            mean, deviation = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.3)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    return block


def inputs() -> tuple[Tensor, Context]:
    x_BTD = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x_BTD, Context(None, Documents(None, torch.ones(2, 9, dtype=torch.bool)))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_pre_and_post_norm_equal_torchs_transformer_layer(placement: str) -> None:
    config = ModelConfig(**PLAIN, norm={"kind": "layernorm", "placement": placement, "eps": EPS})
    ours, (x, context) = block_of(config), inputs()
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, WIDTH, dropout=0.0, layer_norm_eps=EPS, batch_first=True, norm_first=placement == "pre", bias=False,
        dtype=torch.float64,
    )  # fmt: skip
    attention = ours.attention
    projections = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": projections,
            "self_attn.out_proj.weight": attention.output.weight,
            "linear1.weight": ours.ffn.up.weight,
            "linear2.weight": ours.ffn.down.weight,
            "norm1.weight": ours.attention_norm.weight,
            "norm2.weight": ours.ffn_norm.weight,
        }
    )
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    out, statistics = ours(x, context)
    assert statistics is None
    torch.testing.assert_close(out, theirs(x, src_mask=hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "crmsnorm"])
def test_sandwich_and_parallel_are_their_equations(kind: str, moe: dict[str, Any] | None) -> None:
    norm = {"kind": kind, "placement": "sandwich", "bias": True}
    block, (x, context) = block_of(ModelConfig(**PLAIN, norm=norm, moe=moe)), inputs()

    def ffn(x_BTD: Tensor) -> Tensor:
        out = block.ffn(x_BTD, context)
        return out[0] if moe else out

    middle = x + block.attention_post_norm(block.attention(block.attention_norm(x), context))
    expected = middle + block.ffn_post_norm(ffn(block.ffn_norm(middle)))
    out, statistics = block(x, context)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (statistics is not None) == (moe is not None)

    norm = {"kind": kind, "bias": True}
    block = block_of(ModelConfig(**PLAIN, norm=norm, moe=moe, residual="parallel"))
    expected = x + block.attention(block.attention_norm(x), context) + ffn(block.ffn_norm(x))
    torch.testing.assert_close(block(x, context)[0], expected, rtol=1e-12, atol=1e-12)


def test_norms_exist_where_the_placement_has_them() -> None:
    def norms(**norm: Any) -> dict[str, type]:
        block = Block(ModelConfig(**PLAIN, norm=norm), layer=0)
        return {name: type(child) for name, child in block.named_children() if isinstance(child, LayerNorm | CRMSNorm)}

    outer = {"attention_norm", "ffn_norm"}
    assert norms(kind="layernorm").keys() == norms(kind="layernorm", placement="post").keys() == outer
    sandwich = norms(kind="crmsnorm", placement="sandwich")
    assert sandwich.keys() == outer | {"attention_post_norm", "ffn_post_norm"}
    assert set(sandwich.values()) == {CRMSNorm}
