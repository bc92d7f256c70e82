"""RoPE against its definition: pair i of channels, as a complex number, is turned by position * theta^(-2i/d)."""

import cmath

import pytest
import torch

from model.parts import PositionConfig
from model.rope import rope_angles, rotate


def test_rotation_is_a_complex_product_in_float64() -> None:
    torch.manual_seed(0)
    head_dim, theta = 10, 1e4
    positions = torch.tensor([[0, 1, 2, 700], [0, 1, 0, 31999]])
    x = torch.randn(2, 4, 3, head_dim, dtype=torch.float64)
    rotated = rotate(x, *rope_angles(positions, head_dim, PositionConfig(theta=theta), torch.float64))
    pairs, turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)), torch.empty(2, 4, 3, 5, dtype=torch.cdouble)
    for row, place, head, i in torch.cartesian_prod(*map(torch.arange, (2, 4, 3, 5))).tolist():
        angle = positions[row, place].item() * theta ** (-2 * i / head_dim)
        turned[row, place, head, i] = pairs[row, place, head, i].item() * cmath.exp(1j * angle)
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-11)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> float:
        turned_q, turned_k = (
            rotate(x, *rope_angles(torch.tensor([[at]]), 16, PositionConfig(), torch.float64))
            for x, at in ((q, at_q), (k, at_k))
        )
        return (turned_q * turned_k).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-12)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_in_bf16_distant_positions_stay_apart() -> None:
    # 1000 and 1001 are the same number in bf16: the angles must be formed before the rounding.
    cos, sin = rope_angles(torch.tensor([[1000, 1001]]), 8, PositionConfig(theta=1e4), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    expected = torch.tensor([1000.0, 1001.0], dtype=torch.float64).cos()
    torch.testing.assert_close(cos[0, :, 0, 0].double(), expected, rtol=0, atol=2**-8)
