"""Our side of torch.distributed.checkpoint (DCP): its planners decide who writes and reads what; these two do it.

A save: every rank plans, rank 0 removes duplicates, every rank copies its share to host memory and writes it to a file
of its own in the staging folder, rank 0 checks that nothing is missing, writes the manifest and renames the folder.
"""

import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moray import UserError
from moray.parallel.checkpoint.commits import ChunkReader, Commit, commit_name, publish
from moray.parallel.checkpoint.generations import check_newest, generation_path, prepare_staging
from moray.parallel.checkpoint.manifest import Chunk, Manifest, StoredFile, StoredTensor, coverage_problem
from moray.parallel.checkpoint.tensor_file import DTYPE_OF_NAME, dtype_name, flush_folder, write_tensors


@dataclass(frozen=True)
class _Written:
    """What a rank tells rank 0 of a chunk: where it lies, and the file around it."""

    chunk: Chunk
    file: StoredFile


class CommitWriter(StorageWriter):
    """Writes one commit to `folder`/step-NNNNNNNNN, for one generation and as the child of another commit.

    `copied` is called on each rank once its share lies in host memory and the caller may change its tensors again,
    `before` on rank 0 before the commit appears. The writer keeps that copy and, used a second time, writes it again:
    no I/O comes before the copy, so that what I/O has spoilt can be tried again with the values of the first time.
    After a failure, `staging` (rank 0) is the folder to remove; then the commit's `size` in bytes and its `digest` are
    known, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        metadata: dict[str, Any],
        copied: Callable[[], None],
        before: Callable[[], None] | None,
        generation: int,
        parent: str | None,
    ) -> None:
        self._folder = folder
        self._step = step
        self._metadata = metadata
        self._generation = generation
        self._parent = parent
        self._copied = copied
        self._before = before
        self._copies: dict[str, Tensor] | None = None
        self.staging: Path | None = None
        self.size = 0
        self.digest = ""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves out empty shards: DCP takes chunks with equal offsets for duplicates, and might keep the empty one."""
        return replace(
            plan, items=[item for item in plan.items if _chunk(item).sizes.numel() or not _shape(item).numel()]
        )

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells each rank the file it shall write, in a new staging folder."""
        around = generation_path(self._folder, self._generation)
        self.staging = around / f"{commit_name(self._step)}-{secrets.token_hex(4)}"
        return [
            replace(plan, storage_data=self.staging / f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copies this rank's share to host memory (its only copy), then writes it to one file.

        Raises SupersededError where this generation may not write any more.
        """
        if self._copies is None:
            self._copies = {item.index.fqn: _host_copy(planner, item) for item in plan.items}
            self._copied()
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_file(plan, self._copies) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits: checks that all is there, writes the manifest, renames. Runs on rank 0 when all files are written.

        Raises UserError when the chunks don't cover a tensor exactly, or a file isn't where rank 0 can see it, and
        SupersededError when another generation has moved the staging folder away.
        """
        assert self.staging
        written = [result for of_rank in results for result in of_rank]
        manifest = Manifest(
            step=self._step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            metadata=self._metadata,
            files={result.storage_data.chunk.file: result.storage_data.file for result in written},
            tensors=_stored_tensors(metadata, written),
            generation=self._generation,
            parent=self._parent,
        )
        try:
            self._check(manifest)
            if self._before:
                self._before()
            self.size = publish(self.staging, self._folder / commit_name(self._step), manifest)
        except (FileNotFoundError, UserError):
            check_newest(self._folder, self._generation)
            raise
        self.digest = manifest.digest

    def drop_copy(self) -> None:
        """Gives the memory of the copy back."""
        self._copies = None

    def _write_file(self, plan: SavePlan, copies: dict[str, Tensor]) -> list[WriteResult]:
        path: Path = plan.storage_data
        prepare_staging(self._folder, self._generation)
        path.parent.mkdir(exist_ok=True)
        file = write_tensors(path, copies)
        flush_folder(path.parent)
        return [
            WriteResult(
                index=item.index,
                size_in_bytes=copies[item.index.fqn].nbytes,
                storage_data=_Written(
                    Chunk(path.name, item.index.fqn, tuple(_chunk(item).offsets), tuple(_chunk(item).sizes)), file
                ),
            )
            for item in plan.items
        ]

    def _check(self, manifest: Manifest) -> None:
        assert self.staging
        if not self.staging.is_dir():  # removed meanwhile: the next save makes it again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.staging))
        for name, stored in manifest.tensors.items():
            if problem := coverage_problem(stored.shape, ((chunk.offsets, chunk.sizes) for chunk in stored.chunks)):
                raise UserError(f"tensor {name!r}: {problem}")
        for name, file in manifest.files.items():
            path = self.staging / name
            if not path.exists() or path.stat().st_size != file.size:
                raise UserError(
                    f"rank 0 does not see {file.size} bytes in {path}, which another rank has written: "
                    "the checkpoint folder must lie on storage that all nodes share"
                )


class CommitReader(StorageReader):
    """Reads a commit whose digests have been checked, under any layout."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._reader = ChunkReader(commit.path)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=DTYPE_OF_NAME[stored.dtype]),
                    size=torch.Size(stored.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks],
                )
                for name, stored in self._commit.manifest.tensors.items()
            }
        )

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        tensors = self._commit.manifest.tensors
        names = {item.storage_index.fqn for item in plan.items}
        chunk_at = {(name, chunk.offsets): chunk for name in names for chunk in tensors[name].chunks}
        for item in plan.items:
            if not item.lengths.numel():
                continue
            chunk = chunk_at[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._reader.read(chunk.file, chunk.key)[box])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    if item.tensor_data is None:
        raise TypeError(f"state {item.index.fqn!r} is not a tensor; put it into the metadata")
    return item.tensor_data.chunk


def _shape(item: WriteItem) -> torch.Size:
    assert item.tensor_data
    return item.tensor_data.size


def _host_copy(planner: SavePlanner, item: WriteItem) -> Tensor:
    local = planner.resolve_data(item)
    assert isinstance(local, Tensor)
    if local.shape != _chunk(item).sizes:
        # FSDP2 splits each of several unequal tensor-parallel shards, which _StridedShard does not describe.
        raise UserError(
            f"tensor {item.index.fqn!r} of shape {tuple(_shape(item))} holds a shard of shape {tuple(local.shape)} "
            f"where its placements mean {tuple(_chunk(item).sizes)}; choose degrees that divide its sharded dimension"
        )
    return local.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _stored_tensors(metadata: Metadata, written: list[WriteResult]) -> dict[str, StoredTensor]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
    for result in written:
        chunks[result.index.fqn].append(result.storage_data.chunk)
    stored = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        dtype = dtype_name(name, entry.properties.dtype)
        stored[name] = StoredTensor(tuple(entry.size), dtype, tuple(chunks[name]))
    return stored
