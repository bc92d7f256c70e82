"""Weights that parallelism has split."""

from torch import Tensor


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a weight: where tensor or expert parallelism has split it, it is a DTensor."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
