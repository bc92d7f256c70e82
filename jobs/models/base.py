"""The base of adapters: which weights they were trained beside, and whether these are still the same.

A commit is named by its manifest's digest, which names every file of it. A Hugging Face folder has no such name: its
weight files are read through once, ranks sharing them, and later those alone that have another size or time of change
than they had (as git does with files): of 100 GB the first start of a run reads each byte once, and a recovery none.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from moray import UserError
from moray.model.hf.reader import weight_files
from moray.parallel.checkpoint.commits import MANIFEST, read_commit
from moray.parallel.control_plane import ControlPlane


class WeightFile(NamedTuple):
    """bytes and changed (ns since 1970) are what is looked at first."""

    bytes: int
    changed: int
    sha256: str


@dataclass(frozen=True)
class Base:
    """path: of a Hugging Face folder or of a commit. files: of such a folder, by name."""

    path: str
    digest: str
    files: Mapping[str, WeightFile]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From what a commit says."""
        files = {name: WeightFile(*found) for name, found in record["files"].items()}
        return cls(record["path"], record["digest"], files)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def identify(
    path: Path, known: Base | None = None, ranks: ControlPlane | None = None, setting: str = "model.from"
) -> Base:
    """What lies at `path`, which `setting` names, now. `known` is what lay there before.

    Collective with `ranks`, which then share the reading. Raises UserError where nothing is there.
    """
    check_there(path, setting)
    if (path / MANIFEST).is_file():
        return Base(str(path), read_commit(path).manifest.digest, {})
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    known_files = known.files if known else {}
    unread: list[tuple[str, os.stat_result]] = []
    found: dict[str, WeightFile] = {}
    for name in weight_files(path):
        now, before = (path / name).stat(), known_files.get(name)
        if before and (before.bytes, before.changed) == (now.st_size, now.st_mtime_ns):
            found[name] = before
        else:
            unread.append((name, now))
    own = {
        name: WeightFile(now.st_size, now.st_mtime_ns, _sha256(path / name)) for name, now in unread[rank::world_size]
    }
    for of_rank in ranks.gather(own) if ranks else [own]:
        found |= of_rank
    digests = json.dumps({name: file.sha256 for name, file in sorted(found.items())})
    return Base(str(path), hashlib.sha256(digests.encode()).hexdigest(), found)


def check_there(path: Path, setting: str = "model.from") -> None:
    """Raises UserError where nothing is at `path`."""
    if not path.is_dir():
        raise UserError(f"{setting}={path} is not there, and this run is nothing without it: put it back")


def check_same(found: Base, recorded: Base, setting: str, whose: str) -> None:
    """Raises UserError where another model lies in the place of `whose` it was, which `setting` names."""
    if found.digest != recorded.digest:
        raise UserError(
            f"{setting}={found.path} is not {whose}: its digest is {found.digest[:12]}, that one's "
            f"{recorded.digest[:12]}; put that one back"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
