"""Random numbers as a function of (seed, step, global sequence, position, name): no layout or batch split changes them.

Each number is a hash of its key, so nothing is drawn in an order and any rank can draw any of them. Integers mix alike
on every device, and the floating point that follows is made of exactly rounded operations alone (+, -, *, /), so a GPU
draws the bits that a CPU draws.
"""

# Shapes: B sequences, T tokens of each on this rank, C numbers for each token.

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# SplitMix64's increment and multipliers, as signed integers (Steele, Lea and Flood, 2014; Stafford's mix 13).
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Randomness:
    """What a forward pass draws from. sequences_B: each row's index in the global order of the data (int64)."""

    seed: int
    step: int
    sequences_B: Tensor

    def keys(self, name: str, positions_BT: Tensor) -> Tensor:
        """A key for each token of a module called `name`, [B, T] (int64); positions count within the sequence."""
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{name}".encode()).digest()
        root = int.from_bytes(digest[:8], "little", signed=True)
        return _next(_next(self.sequences_B + root)[:, None] + positions_BT * _GOLDEN)


def uniform(keys_BT: Tensor, name: str, channels: int, first: int = 0) -> Tensor:
    """Uniform numbers between 0 and 1, both excluded, [B, T, C] (fp64); each `name` draws its own.

    first: which channel the first one is, of those that other ranks draw the rest of.
    """
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    steps_C = torch.arange(first, first + channels, device=keys_BT.device) * _GOLDEN
    bits_BTC = _shift(_next(_next(keys_BT + stream)[..., None] + steps_C), 12)
    # 52 bits and a half: the largest is still below 1 in fp64.
    return (bits_BTC.to(torch.float64) + 0.5) * 2.0**-52


def normal(keys_BT: Tensor, name: str, channels: int) -> Tensor:
    """Standard normal numbers, [B, T, C] (fp64); each `name` draws its own."""
    return normal_quantile(uniform(keys_BT, name, channels))


def gumbel(keys_BT: Tensor, name: str, channels: int, first: int = 0) -> Tensor:
    """Standard Gumbel numbers, [B, T, C] (fp64), as `uniform` has channels: the argmax of logits + these is a draw from
    softmax(logits) (Maddison et al., 2014, section 2).

    The device's own logarithm will do: the last bits of what they are added to are not the same everywhere either.
    """
    return uniform(keys_BT, name, channels, first).log_().neg_().log_().neg_()


def _next(x: Tensor) -> Tensor:
    """One output of SplitMix64 for each state: a bijection of 64 bits in which every bit hangs on every other."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's is arithmetic and would copy the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


# Coefficients of P. J. Acklam's rational approximations, highest power first: relative error below 1.2e-9.
_CENTRE_ABOVE = (
    *(-39.69683028665376, 220.9460984245205, -275.9285104469687),
    *(138.357751867269, -30.66479806614716, 2.506628277459239),
)
_CENTRE_BELOW = (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572, 1.0)
_TAIL_ABOVE = (
    *(-0.007784894002430293, -0.3223964580411365, -2.400758277161838),
    *(-2.549732539343734, 4.374664141464968, 2.938163982698783),
)
_TAIL_BELOW = (0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416, 1.0)
_TAIL = 0.02425


def normal_quantile(p: Tensor) -> Tensor:
    """Where the standard normal distribution function is p, 0 < p < 1. Shapes: any (fp64) -> the same.

    Source: P. J. Acklam, An algorithm for computing the inverse normal cumulative distribution function, 2003.
    """
    centred = p - 0.5
    square = centred * centred
    centre = centred * _polynomial(_CENTRE_ABOVE, square) / _polynomial(_CENTRE_BELOW, square)
    # Of the nearer end: 1 - p is exact where p is above a half.
    depth = _root(_log(torch.minimum(p, 1 - p)) * -2)
    tail = _polynomial(_TAIL_ABOVE, depth) / _polynomial(_TAIL_BELOW, depth)
    tail = torch.where(centred > 0, -tail, tail)
    return torch.where(centred.abs() > 0.5 - _TAIL, tail, centre)


def _log(x: Tensor) -> Tensor:
    """The natural logarithm, to 1e-11, by exactly rounded operations: libraries differ in the last bit of theirs."""
    mantissa, exponent = torch.frexp(x)
    # ln m = 2 artanh((m - 1) / (m + 1)), with m between 1/2 and 1.
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = _polynomial(tuple(1 / (2 * i + 1) for i in reversed(range(11))), square)
    return 2 * ratio * series + exponent.to(x.dtype) * math.log(2)


def _root(x: Tensor) -> Tensor:
    """The square root of numbers from 1 to 100, by Heron's rule: that of torch is not exact on CUDA."""
    root = torch.full_like(x, 5.0)
    for _ in range(7):
        root = (root + x / root) * 0.5
    return root


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, a product and a sum at a time, so that no kernel fuses the two and rounds once."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x
        result = result + coefficient
    return result
