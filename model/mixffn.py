"""Between the projections of a dense feed-forward network: a convolution along the sequence, or an adapter."""

# Shapes: B sequences, T tokens of each, F hidden width (under tensor parallelism this rank's slice of it), k taps,
# r rank of an adapter, P tokens of one document.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.model.context import Context
from moray.model.sharded import Linear, WholeTokens, local


def causal_convolution(x_BTF: Tensor, weight_Fk: Tensor, bias_F: Tensor | None, padding: int) -> Tensor:
    """Each channel's own weighted sum over its last k tokens; the last tap weighs the token itself.

    `padding` zeros stand before the first token. Shapes: [B, T, F] -> [B, padding + T - (k - 1), F].
    """
    x_BFT = F.pad(x_BTF.transpose(1, 2), (padding, 0))
    return F.conv1d(x_BFT, weight_Fk[:, None], bias_F, groups=len(weight_Fk)).transpose(1, 2)


class CausalConvolution(nn.Module):
    """A causal depthwise convolution along the sequence that never reaches into another document, nor into padding.

    Shapes: [B, T, F] -> [B, T, F]; weight [F, k], bias [F]. With a cache, a row is one document and the padding
    before it.
    Source: MixFFN of SegFormer (Xie et al., 2021, eq. 3), over the past of a sequence in place of an image.
    """

    def __init__(self, width: int, taps: int, bias: bool, layer: int) -> None:
        super().__init__()
        self.taps, self.layer = taps, layer
        self.weight = nn.Parameter(torch.empty(width, taps))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x_BTF: Tensor, context: Context) -> Tensor:
        weight_Fk, bias_F = local(self.weight), None if self.bias is None else local(self.bias)
        before = self.taps - 1
        if context.cache is not None:
            cache, x_BTF = context.cache, x_BTF.masked_fill(~context.documents.valid_BT[..., None], 0.0)
            reach_BSF = cache.convolution(self.layer, cache.turned(x_BTF), self.taps)
            return cache.turned(causal_convolution(reach_BSF, weight_Fk, bias_F, padding=0))
        lengths = context.documents.lengths
        if lengths is None:
            return causal_convolution(x_BTF, weight_Fk, bias_F, before)
        # Padding is a piece of its own (`document_lengths`).
        pieces = x_BTF.flatten(0, 1).split(lengths)
        return torch.cat([causal_convolution(x[None], weight_Fk, bias_F, before)[0] for x in pieces]).view_as(x_BTF)


class LowRankAdapter(nn.Module):
    """h + B A h, which starts as h: B is zero (LoRA; Hu et al., 2021). Shapes: [B, T, F] -> [B, T, F].

    The weights are A [r, F] and B [F, r]. Under tensor parallelism A h is summed over the slices of F.
    """

    tokens = WholeTokens()

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.a = Linear(width, rank, bias=False)
        self.b = Linear(rank, width, bias=False)

    def forward(self, x_BTF: Tensor) -> Tensor:
        return x_BTF + self.b(self.tokens.total(self.a(x_BTF)))
