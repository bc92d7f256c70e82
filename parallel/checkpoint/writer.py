"""How a commit is written: each rank one file in the staging folder, then rank 0 the manifest, and one rename."""

import errno
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from moray import UserError
from moray.parallel.checkpoint.commits import commit_name, publish
from moray.parallel.checkpoint.generations import check_newest, generation_path, prepare_staging
from moray.parallel.checkpoint.manifest import Manifest, StoredFile, StoredTensor
from moray.parallel.checkpoint.plan import file_name
from moray.parallel.checkpoint.tensor_file import flush_folder, write_tensors


class CommitWriter:
    """Writes commits to `folder` for one generation."""

    def __init__(self, folder: Path, generation: int) -> None:
        self._folder, self._generation = folder, generation

    def new_staging(self, step: int) -> Path:
        """Where a commit of that step is to be put together; rank 0 decides."""
        return generation_path(self._folder, self._generation) / f"{commit_name(step)}-{secrets.token_hex(4)}"

    def write(self, staging: Path, rank: int, share: Mapping[str, Tensor]) -> StoredFile | None:
        """Writes a rank's share, if it has one. Raises SupersededError where this generation may not write any more."""
        if not share:
            return None
        prepare_staging(self._folder, self._generation)
        staging.mkdir(exist_ok=True)
        file = write_tensors(staging / file_name(rank), share)
        flush_folder(staging)
        return file

    def publish(
        self,
        staging: Path,
        step: int,
        metadata: dict[str, Any],
        files: Sequence[StoredFile | None],
        tensors: dict[str, StoredTensor],
        parent: str | None,
        before: Callable[[], None],
    ) -> tuple[Manifest, int]:
        """Makes a commit of what all ranks have written, one of `files` a rank; returns its size in bytes, too.

        `before` is called as the last thing before it appears. Raises UserError where a file isn't where rank 0 can see
        it, SupersededError where another generation has moved the staging folder away.
        """
        manifest = Manifest(
            step=step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            metadata=metadata,
            files={file_name(rank): file for rank, file in enumerate(files) if file},
            tensors=tensors,
            generation=self._generation,
            parent=parent,
        )
        try:
            _check(staging, manifest.files)
            before()
            return manifest, publish(staging, self._folder / commit_name(step), manifest)
        except (FileNotFoundError, UserError):
            check_newest(self._folder, self._generation)
            raise


def _check(staging: Path, files: Mapping[str, StoredFile]) -> None:
    if not staging.is_dir():  # removed meanwhile: the next save makes it again
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(staging))
    for name, file in files.items():
        path = staging / name
        if not path.exists() or path.stat().st_size != file.size:
            raise UserError(
                f"rank 0 does not see {file.size} bytes in {path}, which another rank has written: "
                "the checkpoint folder must lie on storage that all nodes share"
            )
