"""Host memory that holds a copy of a rank's part of a state, the same memory for one copy after the other."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moray.model.sharded import local


class HostCopy:
    """`tensors` are the copies, by name; pinned where an accelerator has to reach them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Copies this rank's part of these tensors."""
        parts = {name: local(state[name].detach()) for name in names}
        if {name: (part.shape, part.dtype) for name, part in parts.items()} != {
            name: (copy.shape, copy.dtype) for name, copy in self.tensors.items()
        }:
            self.tensors = {}  # before there are others
            pinned = torch.accelerator.is_available()
            self.tensors = {
                name: torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned) for name, part in parts.items()
            }
        copy_all(parts, self.tensors)


def copy_all(parts: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    """Copies tensors into host memory, all on their way at once where they come from an accelerator."""
    for name, part in parts.items():
        copies[name].copy_(part, non_blocking=True)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
