"""Normalisation of the residual stream."""

# Shapes: D width.

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.model.config.parts import NormConfig
from moray.model.recompute import cheap


class _Norm(nn.Module, ABC):
    """A weight, a bias where there is one, and the choice of scaling by 1 + weight (Gemma), formed in fp32."""

    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, *, unit_offset: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if unit_offset else torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return cheap(self._offset if self.unit_offset else self.normalise, x, self.weight, self.bias)

    def _offset(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        accurate = torch.promote_types(x.dtype, torch.float32)
        bias_D = None if bias_D is None else bias_D.to(accurate)
        return self.normalise(x.to(accurate), 1 + weight_D.to(accurate), bias_D).to(x.dtype)

    @abstractmethod
    def normalise(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        """What the kind of norm is. Shapes: [..., D], [D], [D] -> [..., D]."""


class RMSNorm(_Norm):
    """Divides by the root mean square of the last dimension, in fp32 whatever the input's dtype.

    Shapes: x [..., D] -> [..., D]. Source: Zhang and Sennrich, 2019.
    """

    def normalise(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        out = F.rms_norm(x, weight_D.shape, weight_D, self.eps)
        return out if bias_D is None else out + bias_D


class LayerNorm(_Norm):
    """Subtracts the mean of the last dimension and divides by its deviation, in fp32 whatever the input's dtype.

    Shapes: x [..., D] -> [..., D]. Source: Ba et al., 2016.
    """

    def normalise(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        return F.layer_norm(x, weight_D.shape, weight_D, bias_D, self.eps)


class CRMSNorm(_Norm):
    """The RMSNorm of a vector of D + 1 entries with mean 0, the last of which, minus the others' sum, is left out.

    Shapes: x [..., D] -> [..., D]. Source: Jiang et al., 2023, section 3.
    """

    def normalise(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        accurate = x.to(torch.promote_types(x.dtype, torch.float32))
        left_out = accurate.sum(-1, keepdim=True)
        mean_square = (accurate.square().sum(-1, keepdim=True) + left_out.square()) / (x.shape[-1] + 1)
        out = accurate * torch.rsqrt(mean_square + self.eps) * weight_D
        return (out if bias_D is None else out + bias_D).to(x.dtype)


_KINDS: dict[str, type[_Norm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "crmsnorm": CRMSNorm}


def build_norm(width: int, config: NormConfig) -> nn.Module:
    """The norm that the config describes, for vectors of this width."""
    return _KINDS[config.kind](width, config.eps, unit_offset=config.unit_offset, bias=config.bias)
