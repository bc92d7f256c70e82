"""What the workers of a generation leave to those of the next: notes, and memory that an agent holds for them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SLOTS = 2


class Vault:
    """Files in memory, SLOTS for each rank, empty at first; the workers that an agent forks have them open, too.

    They have no name: once the agent and its workers are gone, however they ended, so is the memory.
    """

    def __init__(self) -> None:
        self.files: dict[int, tuple[int, ...]] = {}
        """Descriptors by rank."""

    def open(self, ranks: Iterable[int]) -> None:
        """Has files for these ranks; those that are there already keep what they hold."""
        for rank in ranks:
            if rank not in self.files:
                self.files[rank] = tuple(os.memfd_create(f"moray-rank-{rank}-{slot}") for slot in range(SLOTS))


@dataclass(frozen=True)
class Left:
    """What a worker finds: notes by name, and the descriptors of the vault's files by rank."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
