"""Weights and tokens that parallelism has split, or has not."""

# Shapes: B sequences, T tokens of each, t of them on this rank, X any width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a weight: where tensor or expert parallelism has split it, it is a DTensor."""
    if torch.compiler.is_compiling():  # a compiler sees the type, and no attribute
        return parameter if type(parameter) in (Tensor, nn.Parameter) else parameter.to_local()  # type: ignore
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class WholeTokens:
    """This rank has all tokens of its sequences, and all heads and channels. `parallel.tensor.TokenSlices` is the case
    of ranks that have a slice of the tokens between layers, and a part of heads and channels within them.
    """

    size = 1

    def project(self, x_BTX: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
        """A linear map by this rank's inputs of it, and what else they have `added` to it, summed over the ranks, for
        this rank's tokens.
        """
        out_BTX = F.linear(x_BTX, weight, bias)
        return out_BTX if added is None else out_BTX + added

    def gather(self, x_BtX: Tensor) -> Tensor:
        """All tokens, [B, T, X]."""
        return x_BtX

    def gather_alike(self, x_BtX: Tensor) -> Tensor:
        """All tokens, [B, T, X], of which each rank makes the same: their gradient is whole on each."""
        return x_BtX

    def gather_each(self, *parts_BtX: Tensor) -> tuple[Tensor, ...]:
        """All tokens of each, [B, T, X], in one exchange."""
        return parts_BtX

    def reduce(self, x_BTX: Tensor) -> Tensor:
        """The sum of all ranks' parts, for this rank's tokens, [B, t, X]."""
        return x_BTX

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        return x

    def own(self, x_BT: Tensor) -> Tensor:
        """What belongs to this rank's tokens, [B, t]."""
        return x_BT


class Embedding(nn.Embedding):
    """A table by the rows of it that this rank holds."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, local(self.weight))


class Linear(nn.Linear):
    """A linear map by the outputs of it that this rank holds."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))

    def matrix(self) -> Tensor:
        """This rank's rows of what it multiplies with: for those who need the matrix itself."""
        return local(self.weight)


class RowLinear(nn.Linear):
    """A linear map by the inputs of it that this rank holds: the parts of the result are summed over ranks."""

    tokens = WholeTokens()

    def forward(self, x_BTX: Tensor) -> Tensor:
        return self.tokens.project(x_BTX, local(self.weight), self.bias)
