"""The grouped matrix product: each expert's linear map over its own run of rows."""

# Shapes: M rows ordered by expert, E experts, I inputs, O outputs.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from moray.model.moe.threads import multiply


def grouped_linear(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """x w^T of each expert and its rows. Shapes: [M, I], [E, O, I], counts [E] (int64) -> [M, O]. What is behind their
    sum is anything.

    An expert without rows still takes part: its gradient is zero, not missing. Of frozen weights none is formed.
    """
    # Torch's kernel has no fp64. On the CPU it is a loop, too, whose products leave threads idle; its backward in fp32
    # builds the weights' gradient twice.
    if x_MI.dtype == torch.float64 or x_MI.device.type == "cpu":
        return _Loop.apply(x_MI, w_EOI, counts_E)
    return grouped_mm_linear(x_MI, w_EOI, counts_E)


def grouped_mm_linear(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The same by torch's grouped kernel, one launch for all experts. Needs rows of a multiple of 16 bytes."""
    return F.grouped_mm(x_MI, w_EOI.transpose(-2, -1), offs=counts_E.cumsum(0).to(torch.int32))


def grouped_bias(bias_EO: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """Each expert's bias for each of its rows, [M, O].

    A bias is the weight of an input that is always 1, so its gradient is a grouped product too: a sum over rows in
    fp32, where the scatter of an indexing would add up thousands of rows in bf16, in any order.
    """
    # Eight inputs, of which seven weigh nothing, are 16 bytes in bf16.
    return grouped_linear(bias_EO.new_ones(rows, 8), F.pad(bias_EO[..., None], (0, 7)), counts_E)


class _Loop(torch.autograd.Function):
    """The same by one product an expert, each written straight to its place in the output or the gradient."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, w_EOI, counts_E)
        out_MO = x_MI.new_empty(x_MI.shape[0], w_EOI.shape[1])
        multiply((x, w.t(), out) for x, w, out in _runs(counts_E, x_MI, w_EOI, out_MO))
        return out_MO

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x_MI, w_EOI, counts_E = ctx.saved_tensors
        grad_x_MI = torch.empty_like(x_MI)
        multiply(_runs(counts_E, grad_MO, w_EOI, grad_x_MI))
        if not ctx.needs_input_grad[1]:
            return grad_x_MI, None, None
        grad_w_EOI = torch.empty_like(w_EOI)
        # Without rows this is a product over nothing, which is zero.
        multiply((grad.t(), x, grad_w) for grad, grad_w, x in _runs(counts_E, grad_MO, grad_w_EOI, x_MI))
        return grad_x_MI, grad_w_EOI, None


def _runs(counts_E: Tensor, a_MX: Tensor, b_EXY: Tensor, c_MY: Tensor) -> Any:
    """Each expert's rows of the first, its matrix of the second, its rows of the third."""
    # What nobody knows of fake tensors is taken to be even. Rows behind the last expert's are no one's.
    even, rest = divmod(len(a_MX), len(counts_E))
    counts = [even + rest, *[even] * (len(counts_E) - 1)] if is_fake(counts_E) else counts_E.tolist()
    counts.append(len(a_MX) - sum(counts))
    return zip(a_MX.split(counts)[:-1], b_EXY.unbind(), c_MY.split(counts)[:-1], strict=True)
