"""Each document that was dropped, in the folder of the task that dropped it: only where somebody asks for the list."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moray.data.preparation.ledger import Ledger, Sample

DROPS = "drops.jsonl"


class Drop(NamedTuple):
    """kept: the key of the document that stayed for it; of a near-duplicate, as tasks know it, that one's digest."""

    source: str
    key: str
    stage: str
    reason: str
    value: str
    kept: str
    bytes: int


@contextmanager
def ledger_of(folder: Path, keep_drops: bool) -> Iterator[Ledger]:
    """A task's ledger, which lists what is dropped in the task's folder if that is asked for."""
    if not keep_drops:
        yield Ledger()
        return
    with open(folder / DROPS, "w") as file:

        def tell(source: str, stage: str, reason: str, n_bytes: int, sample: Sample) -> None:
            row = Drop(source, sample.key, stage, reason, sample.value, sample.kept, n_bytes)
            file.write(json.dumps(row) + "\n")

        yield Ledger(tell=tell)


def read_drops(folders: Sequence[Path]) -> Iterator[Drop]:
    """What the tasks of these folders dropped, one in memory at a time."""
    for folder in folders:
        if (folder / DROPS).exists():
            with open(folder / DROPS) as file:
                yield from (Drop(*json.loads(line)) for line in file)
