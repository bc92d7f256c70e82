"""Rotary position embedding (Su et al., 2021) and the ways of stretching it to longer sequences."""

# Shapes: B batch, T tokens, H heads, d channels that are turned (of c in a head), f = d / 2 frequencies.

import math

import torch
from torch import Tensor

from moray.model.config.parts import PositionConfig, RopeScaling


def rope_angles(
    positions_BT: Tensor, rotary_dim: int, position: PositionConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, laid out for `rotate` with the same `interleaved`.

    Shapes: positions [B, T] -> two of [B, T, 1, d], d = rotary_dim. The angles are formed in fp32 at least: a bf16
    position is exact only to 256.
    """
    accurate = torch.promote_types(dtype, torch.float32)
    frequencies_f = _frequencies(rotary_dim, position, positions_BT.device, accurate)
    angles = positions_BT.to(accurate)[..., None] * frequencies_f
    angles = angles.repeat_interleave(2, dim=-1) if position.interleaved else torch.cat((angles, angles), dim=-1)
    angles_BT1d = angles[:, :, None, :]
    cos, sin = angles_BT1d.cos(), angles_BT1d.sin()
    factor = _attention_factor(position.scaling)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def rotate(x_BTHc: Tensor, cos_BT1d: Tensor, sin_BT1d: Tensor, interleaved: bool = False) -> Tensor:
    """Turns each pair among the first d channels by its position's angle; the other channels pass through.

    Pairs are (2i, 2i + 1) when interleaved, else (i, i + d/2). Shapes: [B, T, H, c] -> the same.
    """
    d = cos_BT1d.shape[-1]
    if d < x_BTHc.shape[-1]:
        turned, passed = x_BTHc[..., :d], x_BTHc[..., d:]
        return torch.cat((rotate(turned, cos_BT1d, sin_BT1d, interleaved), passed), dim=-1)
    if interleaved:
        even, odd = x_BTHc[..., 0::2], x_BTHc[..., 1::2]
        quarter_turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = x_BTHc.chunk(2, dim=-1)
        quarter_turned = torch.cat((-second, first), dim=-1)
    return x_BTHc * cos_BT1d + quarter_turned * sin_BT1d


def yarn_scale(scaling: RopeScaling | None) -> float:
    """What latent attention's softmax scale is multiplied with: m(mscale_all_dim)^2; 1 where that is not set.

    Source: DeepSeek-V2, section 3.1.4, and its published code.
    """
    if scaling is None or scaling.kind != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _attention_factor(scaling: RopeScaling | None) -> float:
    """What cosine and sine are multiplied with. Source: YaRN, section 3.4; DeepSeek's m(mscale) / m(mscale_all_dim)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor)


def base(rotary_dim: int, position: PositionConfig) -> float:
    """RoPE's base, raised where the scaling is NTK-aware, which does nothing else."""
    if position.scaling is None or position.scaling.kind != "ntk":
        return position.theta
    # A pair alone turns by 1 whatever the base, so the exponent at d = 2 is of no consequence.
    return float(position.theta * position.scaling.factor ** (rotary_dim / max(rotary_dim - 2, 1)))


def _frequencies(rotary_dim: int, position: PositionConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Radians that each pair of channels turns per token, [f]: theta^(-2i/d), stretched as `position.scaling` says."""
    theta, scaling = base(rotary_dim, position), position.scaling
    frequencies_f = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, device=device, dtype=dtype) / rotary_dim)
    if scaling is None or scaling.kind == "ntk":
        return frequencies_f
    if scaling.kind == "linear":
        return frequencies_f / scaling.factor
    if scaling.kind == "llama3":
        kept_f = _kept_by_bands(frequencies_f, scaling)
    else:
        kept_f = _kept_by_ramp(frequencies_f, rotary_dim, theta, scaling)
    return frequencies_f / scaling.factor * (1 - kept_f) + frequencies_f * kept_f


def _kept_by_bands(frequencies_f: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of each frequency Llama 3.1 keeps: all, none, or between, by the turns it makes over the old length."""
    assert scaling.original_max_seq_len
    turns_f = scaling.original_max_seq_len * frequencies_f / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_f - low) / (high - low)).clamp(0, 1)


def _kept_by_ramp(frequencies_f: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each frequency YaRN keeps: all where it turns more than beta_fast times over the old length.

    From there to beta_slow turns it falls linearly over the channels, as in the published code; the paper's own ramp is
    linear in the turns. Source: YaRN, section 3.2.
    """
    assert scaling.original_max_seq_len
    length = scaling.original_max_seq_len

    def channel(turns: float) -> float:
        """The pair that turns this often over the old length, as a real number."""
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs_f = torch.arange(len(frequencies_f), device=frequencies_f.device, dtype=frequencies_f.dtype)
    # A ramp of no length would divide by zero; so does the published code avoid it.
    return 1 - ((pairs_f - first) / (last - first or 0.001)).clamp(0, 1)
