"""Commits the state of a run while it trains on, and brings it back under any layout.

    checkpointer = Checkpointer(run / "checkpoints", keep=3, keep_every=None, on_event=log)
    commit = checkpointer.load(state)          # None: nothing to resume from
    checkpointer.save(step, state, metadata)   # returns once the state is copied; a thread writes it
    checkpointer.finish()

The state is a flat dict of tensors and DTensors; what they mean is the caller's business. A checkpoint is whole or it
does not exist: see storage.py for how one is written, commits.py for what lies in the folder, generations.py for who
may write.
"""

import errno
import json
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from moray import UserError
from moray.parallel.checkpoint.commits import (
    Commit,
    clean,
    commit_name,
    discard,
    give_up_between,
    numbered_paths,
    prune,
    read_commit,
    verify,
    without_given_up,
)
from moray.parallel.checkpoint.generations import SupersededError, check_newest, take_generation
from moray.parallel.checkpoint.manifest import DamagedError
from moray.parallel.checkpoint.storage import CommitReader, CommitWriter
from moray.parallel.control_plane import ControlPlane

Event = Callable[[str, dict[str, Any]], None]

WAIT_S = 1.0


class CommitError(RuntimeError):
    """A save that left no commit behind; the message names the step, the ranks and what went wrong on each."""


class DiskFullError(CommitError):
    """A save for which only room was missing."""


@dataclass
class _Save:
    """A save under way: once it has `ended`, `failure` counts.

    After a failure of I/O, which is worth a retry, `writer` still holds the copied state; else it is None.
    """

    step: int
    state: dict[str, Tensor]
    copied: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    failure: CommitError | SupersededError | None = None
    writer: CommitWriter | None = None


@dataclass(frozen=True)
class _Head:
    """The commit that the next one goes on from; step 0 and no digest before the first."""

    step: int = 0
    digest: str | None = None


class Checkpointer:
    """Saves to and loads from a folder that all ranks share. Every method, the constructor too, is collective.

    It writes for one generation: once a newer one is taken, nothing is committed any more, and save() and finish()
    raise SupersededError. Each commit names the one that it goes on from, the last one loaded or saved.

    Events, on rank 0 only and partly from the writing thread:
    `commit` (step, seconds since save() was called, bytes, its digest and its parent's), `commit_failed` (step, error),
    `commit_refused` (step, problems), `commit_given_up` (steps of another line removed), `prune` (steps removed),
    `prune_failed` (error).
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None,
        on_event: Event,
        on_wait: Callable[[], None] = lambda: None,
        generation: int | None = None,
    ) -> None:
        """Keeps the `keep` newest commits and every one whose step `keep_every` divides.

        `on_wait` is called about once a second while save() or finish() waits for the writing thread.
        `generation` is one that was taken; by default this takes the next one, and so puts an end to all before.
        Removes what an interrupted save left in the folder. Raises SupersededError for a generation that is not the
        newest, UserError for a `keep` or `keep_every` below 1, OSError when the folder can't be made.
        """
        if keep < 1:
            raise UserError(f"checkpoint keep={keep} must be at least 1, or there would be nothing to resume from")
        if keep_every is not None and keep_every < 1:
            raise UserError(f"checkpoint keep_every={keep_every} must be at least 1 step, or None for no such commits")
        self._folder = folder
        self._keep = keep
        self._keep_every = keep_every
        self._on_event = on_event
        self._on_wait = on_wait
        self._ranks = ControlPlane()
        self._pending: tuple[_Save, threading.Thread] | None = None
        self._head = _Head()
        if not self._ranks.group:
            # DCP warns when torch.distributed is not in use, which is no mistake here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._generation = self._ranks.from_rank_0(lambda: self._begin(generation))

    def _begin(self, generation: int | None) -> int:
        if generation is None:
            generation = take_generation(self._folder)
        check_newest(self._folder, generation)
        clean(self._folder)
        return generation

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        metadata: dict[str, Any],
        before: Callable[[], None] | None = None,
    ) -> None:
        """Waits for the last save, copies this rank's share of `state` to host memory, and returns; a thread writes it.

        `metadata` is a JSON object; rank 0's is stored. Where this step is what was loaded or saved last, its commit
        stays as it is; a commit of the same step that another line left is replaced. `before`, of rank 0, is called in
        that thread when all is written and before the commit appears; what it raises fails the save. An I/O error (a
        full disk) of the last save has been reported, and this save is the retry; any other raises CommitError, and a
        newer generation SupersededError.
        """
        last = self._settle()
        if last and last.failure:
            if not last.writer:
                raise last.failure
            last.writer.drop_copy()  # before the next one is made
        snapshot = json.loads(json.dumps(metadata, allow_nan=False))
        if torch.accelerator.is_available():
            # The thread copies on another stream than the one that may still be computing the state.
            torch.accelerator.synchronize()
        save = _Save(step, state)
        line = self._generation, self._head.digest
        writer = CommitWriter(self._folder, step, snapshot, save.copied.set, before, *line)
        self._start(save, writer)
        self._wait_for(save.copied)

    def finish(self) -> None:
        """Waits for the pending save. Raises CommitError or SupersededError, on all ranks, if it failed.

        An I/O error other than a full disk is worth one more try first, with the state as save() has copied it.
        """
        last = self._settle()
        if last and last.writer and not isinstance(last.failure, DiskFullError):
            self._start(_Save(last.step, last.state), last.writer)
            last = self._settle()
        if last and last.failure:
            raise last.failure

    def load(self, state: dict[str, Tensor], among: Callable[[int], bool] = lambda step: True) -> Commit | None:
        """Reads the newest whole commit into the tensors of `state`, in place; None when there is no commit at all.

        Only steps for which `among` holds are looked at.

        Before a tensor is touched, the ranks check all digests, each file being read by one of them. A damaged commit
        is refused (`commit_refused`) by all, and the one before it tried. Values take the dtype of their target.
        Raises UserError when no commit is whole, and when `state` has names or shapes that the commit has not; OSError,
        on all ranks, when one could not read a commit that may well be whole.
        """
        self._settle()
        paths = self._ranks.from_rank_0(lambda: [path for step, path in self._candidates() if among(step)])
        for path in reversed(paths):
            commit = self._examine(path)
            if commit:
                _check_names_and_shapes(commit, state)
                self._read(commit, state)
                self._head = _Head(commit.step, commit.manifest.digest)
                return commit
        if paths:
            names = [path.name for path in paths]
            raise UserError(f"{self._folder} holds no whole commit, but damaged ones: {names}; move them away to start")
        return None

    def give_up_later(self) -> None:
        """Removes the commits after the one that was loaded: what comes now is another line. Collective."""
        given_up = self._ranks.from_rank_0(lambda: give_up_between(self._folder, self._head.step, sys.maxsize))
        if given_up and self._ranks.rank == 0:
            self._on_event("commit_given_up", {"steps": given_up})

    def _start(self, save: _Save, writer: CommitWriter) -> None:
        # A daemon, so that a process whose peers have died can still exit.
        thread = threading.Thread(target=self._run, args=(save, writer), name="commit", daemon=True)
        thread.start()
        self._pending = save, thread

    def _settle(self) -> _Save | None:
        """Waits for the pending save and returns it."""
        if not self._pending:
            return None
        (save, thread), self._pending = self._pending, None
        self._wait_for(save.ended)
        # It may still be freeing tensors, and in the middle of that no process may exit: C++ would abort it.
        thread.join()
        return save

    def _wait_for(self, event: threading.Event) -> None:
        while not event.wait(WAIT_S):
            self._on_wait()

    def _run(self, save: _Save, writer: CommitWriter) -> None:
        """The writing thread."""
        began = time.perf_counter()
        try:
            if self._ranks.from_rank_0(lambda: self._is_whole(save.step)):
                return
            self._write(writer, save.state)
        except BaseException as error:  # as DCP's CheckpointException is, and nobody is above us to see it
            save.failure, is_transient = _explain(save.step, self._ranks.rank, error)
            save.writer = writer if is_transient else None
            self._after_failure(writer, save)
        else:
            self._after_commit(writer, save.step, time.perf_counter() - began)
        finally:
            save.copied.set()
            save.ended.set()

    def _write(self, writer: CommitWriter, state: dict[str, Tensor]) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(state, storage_writer=writer, planner=planner, process_group=self._ranks.group)

    def _read(self, commit: Commit, state: dict[str, Tensor]) -> None:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(state, storage_reader=CommitReader(commit), planner=planner, process_group=self._ranks.group)
        except CheckpointException as error:
            raise RuntimeError(f"{commit.path} could not be read: {error}") from error

    def _after_commit(self, writer: CommitWriter, step: int, seconds: float) -> None:
        if self._ranks.rank != 0:
            return
        before, self._head = self._head, _Head(step, writer.digest)
        line = {"digest": writer.digest, "parent": before.digest}
        self._on_event("commit", {"step": step, "seconds": seconds, "bytes": writer.size, **line})
        try:
            given_up = give_up_between(self._folder, before.step, step)
            removed = prune(self._folder, step, self._keep, self._keep_every)
        except OSError as error:
            self._on_event("prune_failed", {"error": str(error)})
        else:
            if given_up:
                self._on_event("commit_given_up", {"steps": given_up})
            if removed:
                self._on_event("prune", {"steps": removed})

    def _after_failure(self, writer: CommitWriter, save: _Save) -> None:
        if self._ranks.rank != 0:
            return
        with suppress(OSError):  # what made the save fail may be in the way of this, too: the next run cleans up
            if writer.staging and writer.staging.exists():
                discard(writer.staging)
        if not isinstance(save.failure, SupersededError):
            self._on_event("commit_failed", {"step": save.step, "error": str(save.failure)})

    def _is_whole(self, step: int) -> bool:
        """Whether the last commit of this very line is of this step, and whole in every byte."""
        if step != self._head.step:
            return False
        try:
            commit = read_commit(self._folder / commit_name(step))
            return commit.manifest.digest == self._head.digest and not verify(commit)
        except DamagedError:
            return False

    def _candidates(self) -> list[tuple[int, Path]]:
        """What may be resumed from, oldest step first: lines that were given up are not, damage is named when tried."""
        found: dict[Path, Commit | None] = {}
        paths = numbered_paths(self._folder)
        for _, path in paths:
            try:
                found[path] = read_commit(path)
            except DamagedError:
                found[path] = None
        kept = {commit.path for commit in without_given_up([commit for commit in found.values() if commit])}
        return [(step, path) for step, path in paths if found[path] is None or path in kept]

    def _examine(self, path: Path) -> Commit | None:
        """The commit if it is whole in the eyes of all ranks, each of which checks its share of the files."""
        commit, found, unread = None, [], ""
        try:
            commit = read_commit(path)
            found = verify(commit, self._ranks.rank, self._ranks.world_size)
        except DamagedError as error:
            found = [str(error)]
        except OSError as error:
            unread = f"rank {self._ranks.rank}: {error}"
        answers = self._ranks.gather((found, unread))
        if reasons := [unread for _, unread in answers if unread]:
            raise OSError(f"{path} may be whole, but cannot be read: {'; '.join(reasons)}")
        problems = list(dict.fromkeys(problem for found, _ in answers for problem in found))
        if problems and self._ranks.rank == 0:
            self._on_event("commit_refused", {"step": int(path.name.removeprefix("step-")), "problems": problems})
        return None if problems else commit


def _check_names_and_shapes(commit: Commit, state: dict[str, Tensor]) -> None:
    stored = commit.manifest.tensors
    wrong = [f"{name} is missing" for name in state if name not in stored]
    wrong += [
        f"{name} has shape {stored[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    if wrong:
        raise UserError(f"{commit.path} is of another model: " + "; ".join(wrong))


def _explain(step: int, rank: int, error: BaseException) -> tuple[CommitError | SupersededError, bool]:
    """The failure in words, and whether it was I/O alone."""
    causes = {rank: error}
    if isinstance(error, CheckpointException):
        causes = {failed_rank: cause for failed_rank, (cause, _) in error.failures.items()}
    for cause in causes.values():
        traceback.clear_frames(cause.__traceback__)  # they hold the tensors that were being written
    if superseded := next((cause for cause in causes.values() if isinstance(cause, SupersededError)), None):
        return SupersededError(str(superseded)), False
    text = "; ".join(f"rank {of}: {type(cause).__name__}: {cause}" for of, cause in sorted(causes.items()))
    numbers = [cause.errno if isinstance(cause, OSError) else None for cause in causes.values()]
    kind = DiskFullError if all(number in (errno.ENOSPC, errno.EDQUOT) for number in numbers) else CommitError
    failure = kind(f"step {step} was not committed: {text}")
    failure.__cause__ = error
    return failure, all(isinstance(cause, OSError) for cause in causes.values())
