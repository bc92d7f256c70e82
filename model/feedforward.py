"""The dense feed-forward network."""

# Shapes: B sequences, T tokens of each, D model width, F hidden width.

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from moray.model.config.parts import FeedForwardConfig
from moray.model.context import Context
from moray.model.mixffn import CausalConvolution, LowRankAdapter
from moray.model.recompute import cheap
from moray.model.sharded import Linear, RowLinear, WholeTokens


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that `ffn.activation` names.

    Source: gelu_tanh: Hendrycks and Gimpel, 2016; relu2: So et al., 2021; silu: Ramachandran et al., 2017.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu2": _squared_relu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
    }
    return functions[name]


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))). Shapes: [B, T, D] -> [B, T, D].

    A convolution along the sequence (MixFFN) or a low-rank adapter turns what `up` gives, before activation and
    product. Without a gate that is MixFFN as published; with one, the gate keeps judging each token by itself, and a
    network without convolution is the case of a last tap of 1 in both.
    Source: Shazeer, 2020; Xie et al., 2021, eq. 3.
    """

    tokens = WholeTokens()

    def __init__(self, d_model: int, width: int, config: FeedForwardConfig, layer: int | None = None) -> None:
        """`layer`: the decoder layer whose dense network this is; None for shared experts, which mix no tokens."""
        super().__init__()
        self.gate = Linear(d_model, width, bias=config.bias) if config.gated else None
        self.up = Linear(d_model, width, bias=config.bias)
        self.down = RowLinear(width, d_model, bias=config.bias)
        self.activation = activation(config.activation)
        self.conv: CausalConvolution | None = None
        self.adapter: LowRankAdapter | None = None
        if layer is not None and config.conv_width:
            self.conv = CausalConvolution(width, config.conv_width, config.bias, layer)
        elif layer is not None and config.adapter_rank:
            self.adapter = LowRankAdapter(width, config.adapter_rank)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.tokens.gather(x_BTD)
        up_BTF = self.up(x_BTD)
        if self.conv is not None:
            up_BTF = self.conv(up_BTF, context)
        elif self.adapter is not None:
            up_BTF = self.adapter(up_BTF)
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        return self.down(cheap(partial(activated, self.activation), up_BTF, gate_BTF))


def activated(function: Callable[[Tensor], Tensor], up: Tensor, gate: Tensor | None) -> Tensor:
    """act(gate) * up, or act(up) without a gate."""
    return function(up) if gate is None else function(gate) * up
