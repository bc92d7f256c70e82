"""One layer of the decoder."""

import torch
from torch import Tensor, nn

from model.attention import Attention, KVCache, Positions
from model.config import ModelConfig
from model.feedforward import SwiGLU
from model.moe import MoE
from model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm attention and feed-forward (dense or MoE), each added to the residual stream.

    Shapes: x_BTD, valid_BT -> [B, T, D] and the balance term (0 in a dense layer).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.ffn = MoE(config) if self.is_moe else SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x_BTD: Tensor, positions: Positions, valid_BT: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), positions, cache)
        normed_BTD = self.ffn_norm(x_BTD)
        if self.is_moe:
            out_BTD, balance = self.ffn(normed_BTD, valid_BT)
        else:
            out_BTD, balance = self.ffn(normed_BTD), torch.zeros((), device=x_BTD.device)
        return x_BTD + out_BTD, balance
