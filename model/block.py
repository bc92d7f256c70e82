"""One layer of the decoder."""

# Shapes: B batch, T tokens, D model width.

from torch import Tensor, nn

from moray.model.attention.layer import build_attention
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context
from moray.model.feedforward import FeedForward
from moray.model.moe.balance import Statistics
from moray.model.moe.layer import MoE
from moray.model.norm import build_norm
from moray.model.recompute import Recompute, recomputing


class Block(nn.Module):
    """Attention and feed-forward (dense or MoE), each added to the residual stream and normalised as the config says.

    With f for one of them: x + f(norm(x)) (pre), norm(x + f(x)) (post: Vaswani et al., 2017), or
    x + post_norm(f(norm(x))) (sandwich: Gemma 2). In parallel, both read the layer's input:
    x + attention(norm(x)) + ffn(norm'(x)) (GPT-NeoX).

    Shapes: x_BTD -> [B, T, D], and what a MoE layer's auxiliary losses are made of while training (else None).
    `recompute`: what it keeps for the backward pass.
    """

    def __init__(self, config: ModelConfig, layer: int, recompute: Recompute = "none") -> None:
        super().__init__()
        self.recompute: Recompute = recompute
        norm = config.norm
        self.is_post, self.is_parallel = norm.placement == "post", config.residual == "parallel"
        self.attention_norm = build_norm(config.d_model, norm)
        self.attention = build_attention(config, layer)
        self.ffn_norm = build_norm(config.d_model, norm)
        is_moe = config.is_moe_layer(layer)
        self.ffn = MoE(config, layer) if is_moe else FeedForward(config.d_model, config.ffn.width, config.ffn, layer)
        is_sandwich = norm.placement == "sandwich"
        self.attention_post_norm = build_norm(config.d_model, norm) if is_sandwich else nn.Identity()
        self.ffn_post_norm = build_norm(config.d_model, norm) if is_sandwich else nn.Identity()

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        return recomputing(self.recompute, self.compute, x_BTD, context)

    def compute(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        if self.is_post:
            x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, context))
            out_BTD, statistics = self._feed_forward(x_BTD, context)
            return self.ffn_norm(x_BTD + out_BTD), statistics
        attended_BTD = x_BTD + self.attention_post_norm(self.attention(self.attention_norm(x_BTD), context))
        read_BTD = x_BTD if self.is_parallel else attended_BTD
        out_BTD, statistics = self._feed_forward(self.ffn_norm(read_BTD), context)
        return attended_BTD + self.ffn_post_norm(out_BTD), statistics

    def _feed_forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        out = self.ffn(x_BTD, context)
        return out if isinstance(self.ffn, MoE) else (out, None)
