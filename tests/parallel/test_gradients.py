"""The gradient's norm, where rounding would tell one layout from another."""

import pytest
import torch

from moray.parallel.gradients import clip_gradients


def test_the_norm_of_a_large_fp32_gradient_is_exact_to_fp32() -> None:
    """Summed in fp32, the squares of millions of elements lose five digits, and fewer where ranks share them."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(6400, 256))
    parameter.grad = torch.randn(6400, 256) * 1e-3
    gradient = parameter.grad.double()
    norm = clip_gradients([parameter], 0.5)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-9)
    torch.testing.assert_close(parameter.grad.double(), gradient * (0.5 / (norm + 1e-6)), rtol=1e-6, atol=0)


def test_a_small_gradient_stays_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([0.3, 0.0, 0.4])
    assert clip_gradients([parameter], 1.0) == pytest.approx(0.5)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.0, 0.4])
