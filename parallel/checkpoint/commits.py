"""A folder of checkpoints: `step-000000100/` and its like. Finding whole ones, checking, reading and removing them.

What is being written or removed has a name that begins with a dot, and nobody reads it: a checkpoint appears and
disappears by one rename. Damage is what is missing, of the wrong size or of the wrong digest; any other error of
reading is tried again and then raised as the OSError it is.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moray import UserError
from moray.parallel.checkpoint.manifest import DamagedError, Manifest, StoredFile
from moray.parallel.checkpoint.patience import patiently
from moray.parallel.checkpoint.tensor_file import DTYPE_OF_NAME, flush_folder
from moray.parallel.chunks import Chunk, common, coverage_problem, whole

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_LEFTOVER = re.compile(r"\.(staging|removed)-.+")


@dataclass(frozen=True)
class Commit:
    """A checkpoint on disk, as its manifest describes it."""

    step: int
    path: Path
    manifest: Manifest


def commit_name(step: int) -> str:
    return f"step-{step:09d}"


def commit_paths(folder: Path) -> list[Path]:
    """Every folder named like a commit, whole or not, oldest step first."""
    return [path for _, path in numbered_paths(folder)]


def numbered_paths(folder: Path) -> list[tuple[int, Path]]:
    """The same, each with its step."""
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def list_commits(folder: Path) -> list[Commit]:
    """The commits in `folder` with a sound manifest and every file at its size, oldest first; no digest is checked.

    Those of a line that was given up are left out. Raises OSError for what cannot be read.
    """
    return without_given_up([commit for path in commit_paths(folder) if (commit := sound_commit(path))])


def newest_record(folder: Path) -> Manifest | None:
    """What the newest commit says of its run, even if its tensors are damaged and an older one will be gone on from."""
    found = []
    for path in commit_paths(folder):
        with suppress(DamagedError):
            found.append(read_commit(path))
    return without_given_up(found)[-1].manifest if found else None


def without_given_up(commits: Sequence[Commit]) -> list[Commit]:
    """Those, oldest first, after which no newer generation began anew from an older step."""
    kept: list[Commit] = []
    for commit in commits:
        if not kept or commit.manifest.generation >= kept[-1].manifest.generation:
            kept.append(commit)
    return kept


def sound_commit(path: Path) -> Commit | None:
    """The commit in `path` if its manifest is sound and every file has its size."""
    try:
        commit = read_commit(path)
    except DamagedError:
        return None
    files = commit.manifest.files.items()
    return None if any(_size_problem(path / name, file) for name, file in files) else commit


def read_commit(path: Path) -> Commit:
    """Reads the manifest in `path`.

    Raises DamagedError naming it when it is missing, damaged or of another step, OSError when it cannot be read.
    """
    file = path / MANIFEST
    try:
        manifest = Manifest.from_json(patiently(file.read_bytes))
    except (FileNotFoundError, NotADirectoryError, DamagedError) as error:
        raise DamagedError(f"{file}: {error}") from error
    if path.name != commit_name(manifest.step):
        raise DamagedError(f"{file}: describes step {manifest.step}, which belongs in {commit_name(manifest.step)}")
    return Commit(manifest.step, path, manifest)


def verify(commit: Commit, share: int = 0, shares: int = 1) -> list[str]:
    """Every problem found: a file missing, of wrong size or digest, a tensor not covered exactly once.

    With `shares` > 1, this looks at one of as many equal shares of the files and tensors, so that ranks can split the
    work: together they read each file once. Raises OSError for what cannot be read.
    """
    manifest = commit.manifest
    problems = _file_problems(commit, sorted(manifest.files)[share::shares])
    # Of tensors that are cut alike, one tells for all.
    distinct = {(stored.shape, id(stored.grid), id(stored.files)): name for name, stored in manifest.tensors.items()}
    for name in sorted(distinct.values())[share::shares]:
        stored = manifest.tensors[name]
        if unknown := set(stored.files) - manifest.files.keys():
            problems.append(f"{commit.path}: tensor {name!r} lies in files the manifest does not list: {unknown}")
        if gap := coverage_problem(stored.shape, stored.grid.chunks):
            problems.append(f"{commit.path}: tensor {name!r}: {gap}")
    return problems


def read_tensors(commit: Commit, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Full tensors on CPU, one at a time, whatever layout wrote them; all of them, or those in `names` in that order.

    The digests of all files needed are checked first. Raises UserError naming missing tensors, DamagedError files.
    """
    stored = commit.manifest.tensors
    wanted = list(stored if names is None else names)
    if missing := [name for name in wanted if name not in stored]:
        raise UserError(f"{commit.path} holds no tensors named {missing}")
    files = {file for name in wanted for file in stored[name].files}
    if problems := _file_problems(commit, sorted(files)):
        raise DamagedError("; ".join(problems))
    reader = ChunkReader(commit)
    return ((name, reader.read(name, whole(stored[name].shape))) for name in wanted)


class ChunkReader:
    """Chunks of a commit's tensors, whatever layout wrote it; of the files, only the pages that hold them are read."""

    def __init__(self, commit: Commit) -> None:
        self._path, self._tensors = commit.path, commit.manifest.tensors
        self._open: dict[str, safe_open] = {}

    def read(self, name: str, chunk: Chunk) -> Tensor:
        """Mapped from its file where one holds just that, and not to be written to."""
        stored = self._tensors[name]
        keys = stored.keys or (name,) * len(stored.files)
        meeting = stored.grid.meeting(chunk)
        if len(meeting) == 1 and stored.grid.chunks[meeting[0]] == chunk:
            return self._get(stored.files[meeting[0]], keys[meeting[0]])
        out = torch.empty(chunk[1], dtype=DTYPE_OF_NAME[stored.dtype])
        for i in meeting:
            here, there = common(chunk, stored.grid.chunks[i])
            out[here] = self._get(stored.files[i], keys[i])[there]
        return out

    def _get(self, file: str, key: str) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._path / file, framework="pt")
            return self._open[file].get_tensor(key)
        except SafetensorError as error:
            raise DamagedError(f"{self._path / file}: is not the safetensors file that it should be: {error}") from None


def prune(folder: Path, step: int, keep: int, keep_every: int | None) -> list[int]:
    """Removes commits older than the `keep` newest up to `step`, but for every `keep_every`-th; returns their steps.

    Nothing is removed unless the commit of `step`, just made, can be read back: its manifest, and its files' sizes.
    Commits after `step` are neither counted nor removed: a run that fell back to an older commit has refused them.
    """
    sound = [commit for path in commit_paths(folder) if (commit := sound_commit(path))]
    commits = [commit for commit in sound if commit.step <= step]
    if not commits or commits[-1].step != step:
        return []
    removed = [commit for commit in commits[:-keep] if not keep_every or commit.step % keep_every]
    for commit in removed:
        discard(commit.path)
    return [commit.step for commit in removed]


def give_up_between(folder: Path, after: int, before: int) -> list[int]:
    """Removes the commits of the steps between these two, which are of another line; returns their steps."""
    paths = {step: path for step, path in numbered_paths(folder) if after < step < before}
    for path in paths.values():
        discard(path)
    return list(paths)


def publish(staging: Path, target: Path, manifest: Manifest) -> int:
    """Makes a commit of a folder whose files are all written: the manifest last, then one rename; returns its size.

    Raises FileNotFoundError, and leaves `target` alone, once somebody has moved the folder around `staging` away.
    """
    with open(staging / MANIFEST, "x") as file:
        size = file.write(manifest.to_json()) + sum(file.size for file in manifest.files.values())
        file.flush()
        os.fsync(file.fileno())
    flush_folder(staging)
    replaced = staging.with_name(f".removed-{target.name}-{secrets.token_hex(4)}")
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return size


def discard(path: Path) -> None:
    """Removes a folder: out of sight in one rename, then file by file."""
    hidden = path.parent / f".removed-{path.name.lstrip('.')}-{secrets.token_hex(4)}"
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean(folder: Path) -> None:
    """Makes `folder` and removes what an interrupted save or removal left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            # By way of a rename, so that a writer that outlived its group can't make a half-removed folder visible.
            with suppress(FileNotFoundError):  # another attempt does the same
                discard(path)


def _file_problems(commit: Commit, names: Iterable[str]) -> list[str]:
    entries = ((commit.path / name, commit.manifest.files[name]) for name in names)
    return [problem for path, file in entries if (problem := _size_problem(path, file) or _digest_problem(path, file))]


def _size_problem(path: Path, file: StoredFile) -> str | None:
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        return f"{path}: is a link out of its folder, to {path.readlink()}"
    try:
        size = patiently(lambda: path.stat().st_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{path}: {error.strerror}"
    return None if size == file.size else f"{path}: has {size} bytes instead of {file.size}"


def _digest_problem(path: Path, file: StoredFile) -> str | None:
    digest = patiently(lambda: _digest(path))
    return None if digest == file.sha256 else f"{path}: its sha256 is {digest} instead of {file.sha256}"


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
