"""Commits the state of a run while it trains on, and brings it back under any layout.

    checkpointer = Checkpointer(run / "checkpoints", keep=3, keep_every=None, on_event=log)
    commit = checkpointer.load(state)          # None: nothing to resume from
    checkpointer.save(step, state, metadata)   # returns once the state is copied; a thread writes it
    checkpointer.finish()

The state is a flat dict of tensors and DTensors; what they mean is the caller's business. A checkpoint is whole or it
does not exist: see plan.py for who writes what, writer.py for how, commits.py for what is in the folder, generations.py
for who may write.
"""

import errno
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moray import UserError
from moray.model.sharded import local
from moray.parallel.checkpoint.commits import (
    ChunkReader,
    Commit,
    clean,
    commit_name,
    commit_paths,
    discard,
    give_up_between,
    numbered_paths,
    prune,
    read_commit,
    verify,
    without_given_up,
)
from moray.parallel.checkpoint.generations import SupersededError, check_newest, take_generation
from moray.parallel.checkpoint.host_copy import HostCopy
from moray.parallel.checkpoint.manifest import DamagedError, StoredFile, StoredTensor
from moray.parallel.checkpoint.plan import assign, describe
from moray.parallel.checkpoint.writer import CommitWriter
from moray.parallel.control_plane import ControlPlane, RanksError
from moray.parallel.held import held_chunks

Event = Callable[[str, dict[str, Any]], None]

WAIT_S = 1.0
_SIGNATURE = ("shape", "dtype", "device_mesh", "placements")


class CommitError(RuntimeError):
    """A save that left no commit behind; the message names the step, the ranks and what went wrong on each."""


class DiskFullError(CommitError):
    """A save for which only room was missing."""


@dataclass
class _Save:
    """A save under way: once it has `ended`, `failure` counts.

    After a failure of I/O alone (`is_transient`) the copied state is worth a retry.
    """

    step: int
    metadata: dict[str, Any]
    before: Callable[[], None] | None
    ended: threading.Event = field(default_factory=threading.Event)
    failure: CommitError | SupersededError | None = None
    is_transient: bool = False
    staging: Path | None = None


@dataclass(frozen=True)
class Head:
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
        self._head = Head()
        self._copy = HostCopy()
        self._planned: tuple[Any, list[str]] | None = None
        self._tensors: dict[str, StoredTensor] = {}
        self._writer = CommitWriter(folder, self._ranks.from_rank_0(lambda: self._begin(generation)))

    def _begin(self, generation: int | None) -> int:
        if generation is None:
            generation = take_generation(self._folder)
        check_newest(self._folder, generation)
        clean(self._folder)
        return generation

    def save(
        self, step: int, state: dict[str, Tensor], metadata: dict[str, Any], before: Callable[[], None] | None = None
    ) -> None:
        """Waits for the last save, copies this rank's share of `state` to host memory, and returns; a thread writes it.

        `metadata` is a JSON object; rank 0's is stored. Where this step is what was loaded or saved last, its commit
        stays as it is; a commit of the same step that another line left is replaced. `before`, of rank 0, is called in
        that thread when all is written and before the commit appears; what it raises fails the save. An I/O error (a
        full disk) of the last save has been reported, and this save is the retry; any other raises CommitError, as does
        a state that cannot be stored, and a newer generation SupersededError.
        """
        last = self._settle()
        if last and last.failure and not last.is_transient:
            raise last.failure
        save = _Save(step, json.loads(json.dumps(metadata, allow_nan=False)), before)
        try:
            share = self._share_of(state)
        except RanksError as error:
            raise self._fail(save, error) from error
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # what is still computing the state may do so on another stream
        self._copy.take(state, share)
        self._start(save)

    def finish(self) -> None:
        """Waits for the pending save. Raises CommitError or SupersededError, on all ranks, if it failed.

        An I/O error other than a full disk is worth one more try first, with the state as save() has copied it.
        """
        last = self._settle()
        if last and last.is_transient and not isinstance(last.failure, DiskFullError):
            self._start(_Save(last.step, last.metadata, last.before))
            last = self._settle()
        if last and last.failure:
            raise last.failure

    def load(
        self,
        state: dict[str, Tensor],
        among: Callable[[int], bool] = lambda step: True,
        older_names: Mapping[str, str] = MappingProxyType({}),
    ) -> Commit | None:
        """Reads the newest whole commit into the tensors of `state`, in place; None when there is no commit at all.

        Only steps for which `among` holds are looked at. `older_names` are those under which an older commit may hold a
        tensor instead.
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
                self._read(commit, state, older_names)
                self._head = Head(commit.step, commit.manifest.digest)
                return commit
        if paths:
            names = [path.name for path in paths]
            raise UserError(f"{self._folder} holds no whole commit, but damaged ones: {names}; move them away to start")
        return None

    def go_on_from_newest(self) -> Head:
        """The newest commit, whose child the next one will be; its files are not looked at. Collective."""
        self._settle()
        self._head = self._ranks.from_rank_0(self._newest)
        return self._head

    def _newest(self) -> Head:
        for path in reversed(commit_paths(self._folder)):
            with suppress(DamagedError):
                commit = read_commit(path)
                return Head(commit.step, commit.manifest.digest)
        return Head()

    def give_up_later(self) -> None:
        """Removes the commits after the one that was loaded: what comes now is another line. Collective."""
        given_up = self._ranks.from_rank_0(lambda: give_up_between(self._folder, self._head.step, sys.maxsize))
        if given_up and self._ranks.rank == 0:
            self._on_event("commit_given_up", {"steps": given_up})

    def _share_of(self, state: dict[str, Tensor]) -> list[str]:
        """The tensors of which this rank writes its part: found out once for a state, for all ranks take part in it."""
        signature = [(name, *(getattr(t, part, None) for part in _SIGNATURE)) for name, t in state.items()]
        if self._planned is None or self._planned[0] != signature:
            held = self._ranks.each(lambda: describe(state))
            plan = self._ranks.each(lambda: assign(held, state) if held else None)
            self._tensors = plan[0].tensors if plan and plan[0] else {}
            [writes] = self._ranks.from_rank_0(lambda: [found.writes for found in plan if found])
            mine = [name for name, is_mine in zip(state, writes[self._ranks.rank], strict=True) if is_mine]
            self._planned = signature, mine
        return self._planned[1]

    def _start(self, save: _Save) -> None:
        # A daemon, so that a process whose peers have died can still exit.
        thread = threading.Thread(target=self._run, args=[save], name="commit", daemon=True)
        thread.start()
        self._pending = save, thread

    def _settle(self) -> _Save | None:
        """Waits for the pending save and returns it."""
        if not self._pending:
            return None
        (save, thread), self._pending = self._pending, None
        while not save.ended.wait(WAIT_S):
            self._on_wait()
        thread.join()
        return save

    def _run(self, save: _Save) -> None:
        """The writing thread."""
        began = time.perf_counter()
        try:
            save.staging = self._ranks.from_rank_0(
                lambda: None if self._is_whole(save.step) else self._writer.new_staging(save.step)
            )
            if staging := save.staging:
                files = self._ranks.each(lambda: self._writer.write(staging, self._ranks.rank, self._copy.tensors))
                self._ranks.each(lambda: self._publish(save, staging, files, began) if files else None)
        except BaseException as error:  # for nobody is above this thread to see it
            self._fail(save, error)
        finally:
            save.ended.set()

    def _publish(self, save: _Save, staging: Path, files: list[StoredFile | None], began: float) -> None:
        """Rank 0 makes the commit, tells of it, and removes those that are not kept."""
        before, step = self._head, save.step
        manifest, size = self._writer.publish(
            staging, step, save.metadata, files, self._tensors, before.digest, save.before or (lambda: None)
        )
        self._head = Head(step, manifest.digest)
        line = {"digest": manifest.digest, "parent": before.digest}
        self._on_event("commit", {"step": step, "seconds": time.perf_counter() - began, "bytes": size, **line})
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

    def _fail(self, save: _Save, error: BaseException) -> CommitError | SupersededError:
        """Notes and, on rank 0, tells why a save has failed."""
        save.failure, save.is_transient = failure = _explain(save.step, self._ranks.rank, error)
        if self._ranks.rank == 0:
            with suppress(OSError):  # what made the save fail may be in the way of this, too: the next run cleans up
                if save.staging and save.staging.exists():
                    discard(save.staging)
            if not isinstance(save.failure, SupersededError):
                self._on_event("commit_failed", {"step": save.step, "error": str(save.failure)})
        return failure[0]

    def _read(self, commit: Commit, state: dict[str, Tensor], older_names: Mapping[str, str]) -> None:
        stored = commit.manifest.tensors
        names = {name: name if name in stored else older_names.get(name, name) for name in state}
        _check_names_and_shapes(commit, {names[name]: tensor for name, tensor in state.items()})
        reader = ChunkReader(commit)
        for name, chunk in held_chunks(state).items():
            if (part := local(state[name].detach())).numel():
                part.copy_(reader.read(names[name], chunk))

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
    """The failure in words, and whether it was of I/O alone."""
    causes = error.failures if isinstance(error, RanksError) else {rank: error}
    if superseded := next((cause for cause in causes.values() if isinstance(cause, SupersededError)), None):
        return SupersededError(str(superseded)), False
    text = "; ".join(f"rank {of}: {type(cause).__name__}: {cause}" for of, cause in sorted(causes.items()))
    numbers = [cause.errno if isinstance(cause, OSError) else None for cause in causes.values()]
    kind = DiskFullError if all(number in (errno.ENOSPC, errno.EDQUOT) for number in numbers) else CommitError
    failure = kind(f"step {step} was not committed: {text}")
    failure.__cause__ = error
    return failure, all(isinstance(cause, OSError) for cause in causes.values())
