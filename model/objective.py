"""What is learnt from a global batch: sums over it, each divided by a count over it. An objective knows of no ranks.

`parallel/gradients.py` has the rule: counts are added up over all ranks before the first backward pass, sums after the
last one, so that a loss does not depend on how a batch is spread.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from moray.model.attention.documents import Documents
from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.loss import IGNORED
from moray.model.randomness import Randomness


class Piece(Protocol):
    """What any objective's micro-batch tells. n_targets: tokens that teach. flops: what it asks of the model, where
    somebody wants to know of the global batch's.
    """

    @property
    def n_targets(self) -> int: ...

    @property
    def flops(self) -> float: ...


P = TypeVar("P", bound=Piece)


class Objective(ABC, Generic[P]):
    """The loss of a global batch is the sum, over `names`, of a sum over its micro-batches by a count over them.

    names: the first is the loss proper, which is reported as such and watched for spikes; a sum without a gradient is
    only reported. held_out: what is told of the validation split, too.
    """

    names: tuple[str, ...]
    held_out: tuple[str, ...] = ("loss",)

    @abstractmethod
    def counts(self, piece: P) -> Sequence[float]:
        """What a micro-batch adds to each sum's count; the host knows it without waiting for a device."""

    @abstractmethod
    def sums(self, decoder: Decoder, piece: P) -> Sequence[Tensor]:
        """What it adds to each sum: scalars, whose gradients are the objective's."""


@dataclass(frozen=True)
class MicroBatch:
    """Tensors [B, T] of one forward pass on the model's device, and what the host must know of them."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    documents: Documents
    n_targets: int
    randomness: Randomness | None = None
    flops: float = 0.0

    @classmethod
    def of(
        cls,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor,
        device: torch.device,
        randomness: Randomness | None = None,
        flops: float = 0.0,
    ) -> Self:
        """From tensors on the CPU: what is counted here costs no wait for the device later."""
        return cls(
            tokens_BT.to(device, non_blocking=True),
            targets_BT.to(device, non_blocking=True),
            positions_BT.to(device, non_blocking=True),
            Documents.of(documents_BT, device),
            int((targets_BT != IGNORED).sum()),
            randomness,
            flops,
        )


@dataclass(frozen=True)
class NextToken(Objective[MicroBatch]):
    """Cross-entropy and output z-loss per token that has a target, auxiliary loss per routing group of `group_size`.

    Pretraining and supervised fine-tuning alike: which tokens have a target is the data's to say.
    """

    group_size: int = 1
    names = ("loss", "z_loss", "auxiliary_loss")

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        return cls(config.moe.group_size if config.moe else 1)

    def counts(self, piece: MicroBatch) -> tuple[float, float, float]:
        return piece.n_targets, piece.n_targets, len(piece.tokens_BT) / self.group_size

    def sums(self, decoder: Decoder, piece: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        return decoder.loss(piece.tokens_BT, piece.targets_BT, piece.positions_BT, piece.documents, piece.randomness)
