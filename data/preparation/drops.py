"""Each document that was dropped, in the folder of the task that dropped it: only where somebody asks for the list."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moray.data.preparation.ledger import Ledger, Sample
from moray.data.preparation.runs import whole

DROPS = "drops.jsonl"
NAMES, KEYS = "names.npy", "names"
NAMED = np.dtype([("digest", "S16"), ("end", "<u8")])
"""Of a file of keys, one after another, where that of each digest ends; by digest."""


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


def save_names(folder: Path, rows: np.ndarray, keys: Sequence[bytes]) -> None:
    """Keeps the key of each text of some rows of INDEX: of equal ones, that of the one that stays."""
    found: dict[bytes, tuple[int, bytes]] = {}
    for digest, side, key in zip(rows["digest"].tolist(), rows["side"].tolist(), keys, strict=True):
        found[digest] = min(found.get(digest, (side, key)), (side, key))
    in_order = sorted(found)
    named = np.empty(len(in_order), NAMED)
    named["digest"], named["end"] = in_order, np.cumsum([len(found[digest][1]) for digest in in_order])
    np.save(folder / NAMES, named)
    (folder / KEYS).write_bytes(b"".join(found[digest][1] for digest in in_order))


def names_of(digests: Collection[str], folders: Sequence[Path]) -> dict[str, str]:
    """The keys that tasks have kept in these folders, by digests in hexadecimal. Memory: those that are asked for."""
    wanted = np.sort(np.array([bytes.fromhex(digest) for digest in digests], "S16"))
    found: dict[str, str] = {}
    for folder in folders if len(wanted) else ():
        if not (folder / NAMES).exists():
            continue
        named = np.load(folder / NAMES, mmap_mode="r")
        at = np.searchsorted(named["digest"], wanted)
        here = np.flatnonzero(at < len(named))
        here = here[named["digest"][at[here]] == wanted[here]]
        with open(folder / KEYS, "rb") as file:
            for digest, place in zip(wanted[here].tolist(), at[here].tolist(), strict=True):
                begin = int(named["end"][place - 1]) if place else 0
                file.seek(begin)
                found[whole(digest).hex()] = file.read(int(named["end"][place]) - begin).decode()
    return found
