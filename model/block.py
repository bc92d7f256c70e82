"""One layer of the decoder."""

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.balance import Statistics
from model.config import ModelConfig
from model.context import Context
from model.feedforward import FeedForward
from model.moe import MoE
from model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm attention and feed-forward (dense or MoE), each added to the residual stream.

    Shapes: x_BTD -> [B, T, D], and what a MoE layer's auxiliary losses are made of while training (else None).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm.eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm.eps)
        is_moe = config.is_moe_layer(layer)
        self.ffn = MoE(config) if is_moe else FeedForward(config.d_model, config.ffn.width, config.ffn, layer)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        out = self.ffn(self.ffn_norm(x_BTD), context)
        out_BTD, statistics = out if isinstance(self.ffn, MoE) else (out, None)
        return x_BTD + out_BTD, statistics
