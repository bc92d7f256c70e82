"""What a keeper keeps. Imports no Ray: whoever starts a keeper need not wait for that."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True)
class Part:
    """One node's part of a Ray: its CPU slots; the head's, or one that joins it at the address that the driver tells.

    `address` is this node's own, None on the only one. `temp_dir` is this Ray's alone, and removed after a good end;
    None: where every Ray has its files.
    """

    slots: int
    is_head: bool = True
    address: str | None = None
    temp_dir: str | None = None

    def command(self) -> list[str]:
        """A keeper's, for `of` to read."""
        return [sys.executable, "-m", "moray.cluster.ray.keeper", json.dumps(asdict(self))]

    @classmethod
    def of(cls, argument: str) -> Self:
        return cls(**json.loads(argument))
