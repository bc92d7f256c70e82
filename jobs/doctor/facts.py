"""What one machine knows of itself."""

import fcntl
import hashlib
import os
import resource
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from moray.cluster.nvml import Gpu, read_gpus
from moray.cluster.versions import versions
from moray.jobs.training.metrics import matmul_peak

SHARED_MEMORY = Path("/dev/shm")
MARK = ".moray-doctor-"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Question(Frozen):
    """What to look at beside the machine: folders, by the settings that name them. `id` marks a doctor's files."""

    id: str
    folders: dict[str, str] = {}


class FolderFacts(Frozen):
    """`problem`: why it can't be read, or written; index: the digest of its index.json, if it has one."""

    is_there: bool
    problem: str | None = None
    is_writable: bool = False
    has_locks: bool = False
    free_bytes: int = 0
    index: str | None = None


class Meeting(Frozen):
    """What a node found out together with the others; by rank, who is nobody's peer.

    unseen: by setting, the ranks whose files did not appear here. seen_s: by setting, how long the last one took.
    shares_lock: whether rank 0's lock on run.dir kept this node out. clock_s: ahead of rank 0.
    pairs: bytes a second each way between this rank and another. all_reduce, all_to_all: of all ranks, bytes a second
    that each sends. problem: why they did not meet.
    """

    unseen: dict[str, list[int]] = {}
    seen_s: dict[str, float] = {}
    shares_lock: bool | None = None
    clock_s: float | None = None
    pairs: dict[int, float] = {}
    all_reduce: float | None = None
    all_to_all: float | None = None
    problem: str | None = None


class Facts(Frozen):
    """name_means: the address that this machine's own name has here; None: it has none. peak_flops: of `device`."""

    host: str
    versions: dict[str, str]
    has_token: bool
    name_means: str | None
    open_files: int
    shared_memory_bytes: int | None
    folders: dict[str, FolderFacts]
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    device: str
    peak_flops: float
    meeting: Meeting | None = None


def look(question: Question, device: torch.device) -> Facts:
    """Looks at this machine, in about a second."""
    gpus, gpu_problem = list[Gpu](), None
    try:
        gpus = read_gpus()
    except RuntimeError as error:
        gpu_problem = str(error)
    has_shared_memory = SHARED_MEMORY.is_dir()
    return Facts(
        host=socket.gethostname(),
        versions=versions(),
        has_token=os.environ.get("RAY_AUTH_MODE") == "token",
        name_means=_meaning_of(socket.gethostname()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).free if has_shared_memory else None,
        folders={setting: _look_at(Path(path), question.id) for setting, path in question.folders.items()},
        gpus=tuple(gpus),
        gpu_problem=gpu_problem,
        device=device.type,
        peak_flops=matmul_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32),
    )


def mark_of(folder: Path, question_id: str, rank: int) -> Path:
    """The file by which a rank shows that it writes here."""
    return folder / f"{MARK}{question_id}-{rank}"


def _meaning_of(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None


def _look_at(folder: Path, question_id: str) -> FolderFacts:
    if not folder.is_dir():
        return FolderFacts(is_there=False)
    probe = folder / f"{MARK}{question_id}-{socket.gethostname()}-{os.getpid()}"
    is_writable, has_locks, problem, index = False, False, None, None
    try:
        if (folder / "index.json").is_file():
            index = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
        else:
            next(folder.iterdir(), None)
        probe.write_bytes(b"moray")
        is_writable = probe.read_bytes() == b"moray"
        has_locks = _has_locks(probe)
    except OSError as error:
        problem = error.strerror or str(error)
    finally:
        with suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(folder).free
    return FolderFacts(
        is_there=True, problem=problem, is_writable=is_writable, has_locks=has_locks, free_bytes=free, index=index
    )


def _has_locks(path: Path) -> bool:
    """Whether a lock on a file keeps a second opener out."""
    with path.open() as first, path.open() as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return not could_lock(second.fileno())


def could_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
