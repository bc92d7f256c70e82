"""Rotary position embedding (Su et al., 2021), in the half-split convention of Llama and Qwen."""

# Shapes: B batch, T tokens, H heads, d channels of a head.

import torch
from torch import Tensor


def rope_angles(positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Shapes: positions [B, T] -> two of [B, T, 1, d]. The angles are formed in fp32 at least: a bf16 position
    is exact only to 256.
    """
    accurate = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=accurate)
    angles = positions_BT.to(accurate)[..., None] * theta ** (-channels / head_dim)
    angles_BT1d = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return angles_BT1d.cos().to(dtype), angles_BT1d.sin().to(dtype)


def rotate(x_BTHd: Tensor, cos_BT1d: Tensor, sin_BT1d: Tensor) -> Tensor:
    """Turns each pair of channels (i, i + d/2) by its position's angle. Shapes: [B, T, H, d] -> the same."""
    first, second = x_BTHd.chunk(2, dim=-1)
    return x_BTHd * cos_BT1d + torch.cat((-second, first), dim=-1) * sin_BT1d
