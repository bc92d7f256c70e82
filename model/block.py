"""One layer of the decoder."""

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.balance import Statistics
from model.config import ModelConfig
from model.context import Context
from model.feedforward import SwiGLU
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
        self.ffn = MoE(config) if config.is_moe_layer(layer) else SwiGLU(config.d_model, config.ffn.width)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        out_BTD, statistics = self._feed_forward(self.ffn_norm(x_BTD), context)
        return x_BTD + out_BTD, statistics

    def _feed_forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        return self.ffn(x_BTD, context) if isinstance(self.ffn, MoE) else (self.ffn(x_BTD), None)
