"""Grouped products, by torch's kernel and by the loop that stands in for it, against one product an expert in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moray.model.moe.grouped import grouped_bias, grouped_linear, grouped_mm_linear
from moray.model.moe.threads import multiply

COUNTS = {"empty first, middle and last": [0, 5, 0, 1, 26, 0], "even": [4] * 6, "all on one": [0, 0, 40, 0, 0, 0]}
# On the CPU, grouped_linear takes the loop.
WAYS = {
    "kernel fp32": (grouped_mm_linear, torch.float32, 1e-5),
    "kernel bf16": (grouped_mm_linear, torch.bfloat16, 2e-2),
    "fp32": (grouped_linear, torch.float32, 1e-5),
    "bf16": (grouped_linear, torch.bfloat16, 2e-2),
    "fp64": (grouped_linear, torch.float64, 1e-13),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("linear", "dtype", "tolerance"), WAYS.values(), ids=WAYS)
def test_forward_and_backward_equal_a_product_for_each_expert(
    linear: Callable[..., Tensor], dtype: torch.dtype, tolerance: float, counts: list[int]
) -> None:
    """An expert without rows has a gradient, and it is zero."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
    w = torch.randn(6, 24, 16).to(dtype).requires_grad_()
    direction = torch.randn(sum(counts), 24).to(dtype)
    out = linear(x, w, torch.tensor(counts))
    grad_x, grad_w = torch.autograd.grad((out * direction).sum(), [x, w])

    exact_x, exact_w, exact_direction = (t.detach().double() for t in (x, w, direction))
    for e, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        for ours, truth in (
            (out[rows], exact_x[rows] @ exact_w[e].T),
            (grad_x[rows], exact_direction[rows] @ exact_w[e]),
            (grad_w[e], exact_direction[rows].T @ exact_x[rows]),
        ):
            scale = truth.abs().max() if truth.any() else 1.0
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double() / scale, truth / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("linear", [grouped_linear, grouped_mm_linear])
def test_no_rows_at_all(linear: Callable[..., Tensor]) -> None:
    """A rank whose experts no token chose."""
    x, w = torch.empty(0, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    out = linear(x, w, torch.zeros(3, dtype=torch.int64))
    assert out.shape == (0, 8)
    (out * 1.0).sum().backward()
    assert w.grad is not None
    assert not w.grad.any()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_biases(dtype: torch.dtype, tolerance: float, counts: list[int]) -> None:
    """Against indexing by each row's expert, in fp64."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(6, 24, generator=generator).to(dtype).requires_grad_()
    direction = torch.randn(sum(counts), 24, generator=generator).to(dtype)
    out = grouped_bias(bias, torch.tensor(counts), sum(counts))
    (grad,) = torch.autograd.grad((out * direction).sum(), [bias])
    exact = bias.detach().double().requires_grad_()
    expected = exact[torch.arange(6).repeat_interleave(torch.tensor(counts))]
    (truth,) = torch.autograd.grad((expected * direction.double()).sum(), [exact])
    assert torch.equal(out.double(), expected)
    torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [[5, 0, 3, 900, 1, 40], [0, 0, 0], [7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads_computes_the_same_products(rows: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(n, 32, generator=generator).to(dtype), torch.randn(32, 48, generator=generator).to(dtype))
        for n in rows
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            products = [(a, b, torch.empty(len(a), 48, dtype=dtype)) for a, b in factors]
            multiply(products)
            for a, b, out in products:
                torch.testing.assert_close(out, a @ b)
        assert torch.get_num_threads() == 3, "those who multiply have one each, and this one still its own"
    finally:
        torch.set_num_threads(before)


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            multiply([(torch.ones(2, 3), torch.ones(4, 5), torch.empty(2, 5)) for _ in range(4)])
    finally:
        torch.set_num_threads(before)
