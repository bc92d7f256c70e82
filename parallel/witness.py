"""Checksums of the gradients that a rank computes itself, taken before they are reduced with those of its peers."""

import torch
from torch import Tensor, nn

from moray.model.decoder import Decoder
from moray.model.sharded import local
from moray.parallel.shard import on_own_gradients

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EXACT_IN_FP64 = 2**53


class Witness:
    """Adds up the bits of every gradient that this rank's backward passes make, as integers.

    Sums of integers do not depend on their order, and a bit that is flipped always changes one. Collective.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._sum = torch.zeros((), dtype=torch.int64, device=local(next(decoder.parameters())).device)
        on_own_gradients(decoder, self._add)

    def _add(self, _: nn.Parameter, whole: Tensor) -> None:
        assert whole.grad is not None
        gradient = local(whole.grad)
        self._sum += gradient.view(INTEGERS[gradient.itemsize]).sum(dtype=torch.int64)

    def take(self) -> Tensor:
        """The sum since the last call (fp64, which holds its lower 53 bits exactly), on the gradients' device."""
        found = (self._sum % EXACT_IN_FP64).double()
        self._sum.zero_()
        return found
