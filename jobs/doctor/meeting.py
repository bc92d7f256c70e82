"""What nodes find out together, one worker on each: folders, locks, clocks, and the network between them."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moray.cluster.worker import WorkerContext
from moray.jobs.doctor.facts import Facts, FolderFacts, Meeting, Question, could_lock, look, mark_of

PATIENCE_S = 10.0
"""How long a file that another node wrote may take to appear."""
LOOK_EVERY_S = 0.05
MEETING_S = 60.0
MESSAGE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
TRIES = 3
MAX_ROUNDS = 15
"""In each round every node has one partner: with more nodes than this, not all pairs are tried."""


def examine(context: WorkerContext, question: Question) -> None:
    """A worker function: two heartbeats, with the facts of this node, and with what it found out with the others."""
    facts = look(question, context.device)
    context.heartbeat(1, facts=facts.model_dump(mode="json"))
    if context.world_size == 1:
        return
    try:
        with context.process_group(timedelta(seconds=MEETING_S)):
            meeting = meet(context.device, question, facts)
    except RuntimeError as error:  # what gloo and NCCL raise where nodes do not reach each other
        meeting = Meeting(problem=str(error).partition("\n")[0])
    context.heartbeat(2, facts=facts.model_copy(update={"meeting": meeting}).model_dump(mode="json"))


def meet(device: torch.device, question: Question, facts: Facts) -> Meeting:
    """Collective, with a process group over all nodes. Each removes its own files again."""
    unseen, seen_s, shares_lock = dict[str, list[int]](), dict[str, float](), None
    for setting, path in question.folders.items():
        own = mark_of(Path(path), question.id, dist.get_rank())
        try:
            unseen[setting], seen_s[setting] = _look_for_others(own, facts.folders[setting])
            if setting == "run.dir":
                shares_lock = _is_kept_out(mark_of(Path(path), question.id, 0))
        finally:
            dist.barrier()  # nobody looks any more
            with suppress(OSError):
                own.unlink()
    clock_s = _clock()
    pairs = dict(_speeds_of_pairs(device))
    n_bytes, size = MESSAGE_BYTES[device.type], dist.get_world_size()
    x = torch.zeros(n_bytes // 4 // size * size, device=device)
    y = torch.empty_like(x)
    # A ring sends 2 (n - 1) / n of the message on every link, an all-to-all (n - 1) / n.
    share = (size - 1) / size * x.numel() * 4
    return Meeting(
        unseen=unseen,
        seen_s=seen_s,
        shares_lock=shares_lock,
        clock_s=clock_s,
        pairs=pairs,
        all_reduce=2 * share / _fastest(lambda: dist.all_reduce(x), device),
        all_to_all=share / _fastest(lambda: dist.all_to_all_single(y, x), device),
    )


def rounds(size: int) -> list[dict[int, int]]:
    """Who is whose partner, round by round, until each has met each, but in MAX_ROUNDS at most: {rank: partner}.

    The circle method of tournaments; with an odd number one rests in each round.
    """
    even = size + size % 2
    turns = range(even - 1)
    if len(turns) > MAX_ROUNDS:
        turns = range(0, even - 1, -(-(even - 1) // MAX_ROUNDS))
    found = []
    for turn in turns:
        # The last one stays where it is, and the others go round.
        circle = [(turn + i) % (even - 1) for i in range(even - 1)]
        pairs = [(even - 1, circle[0]), *zip(circle[1 : even // 2], reversed(circle[even // 2 :]), strict=True)]
        found.append({a: b for pair in pairs for a, b in (pair, pair[::-1]) if max(pair) < size})
    return found


def _look_for_others(own: Path, folder: FolderFacts) -> tuple[list[int], float]:
    """The ranks whose files are not seen here in time, and how long it took until the last one was."""
    writes: list[bool] = [False] * dist.get_world_size()
    if folder.is_writable:
        own.touch()
    dist.all_gather_object(writes, folder.is_writable)
    began = time.monotonic()
    stem = own.name.rpartition("-")[0]
    missing = [rank for rank, has_written in enumerate(writes) if has_written]
    while missing := [rank for rank in missing if not own.with_name(f"{stem}-{rank}").exists()]:
        if not folder.is_there or time.monotonic() - began > PATIENCE_S:
            break
        time.sleep(LOOK_EVERY_S)
    return missing, time.monotonic() - began


def _is_kept_out(path: Path) -> bool | None:
    """Whether rank 0's lock on its file keeps this rank from locking it; None: nothing to be tried."""
    file = None
    with suppress(OSError):
        file = path.open()
    if file and dist.get_rank() == 0:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    dist.barrier()
    is_kept_out = None if file is None or dist.get_rank() == 0 else not could_lock(file.fileno())
    dist.barrier()
    if file:
        file.close()
    return is_kept_out


def _clock() -> float:
    """How far this node's clock is ahead of rank 0's, by the quickest of some exchanges with it."""
    rank, best, ahead = dist.get_rank(), float("inf"), 0.0
    told = torch.zeros(1, dtype=torch.float64)
    for peer in range(1, dist.get_world_size()):
        for _ in range(TRIES):
            if rank == 0:
                dist.recv(told, peer)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), peer)
            elif rank == peer:
                began, clock = time.perf_counter(), time.time()
                dist.send(told, 0)
                dist.recv(told, 0)
                if (took := time.perf_counter() - began) < best:
                    best, ahead = took, clock + took / 2 - told.item()
    return ahead


def _speeds_of_pairs(device: torch.device) -> Iterator[tuple[int, float]]:
    """Bytes a second each way, by partner: all pairs of a round at once, as in training."""
    rank, size = dist.get_rank(), dist.get_world_size()
    n = MESSAGE_BYTES[device.type] // 4
    for partner_of in rounds(size):
        partner = partner_of.get(rank)
        counts = [n if peer == partner else 0 for peer in range(size)]
        x = torch.zeros(sum(counts), device=device)
        y = torch.empty_like(x)
        exchange = _all_to_all(x, y, counts)
        seconds = _fastest(exchange, device)
        if partner is not None:
            yield partner, 4 * n / seconds


def _all_to_all(x: torch.Tensor, y: torch.Tensor, counts: list[int]) -> Callable[[], object]:
    return lambda: dist.all_to_all_single(y, x, counts, counts)


def _fastest(exchange: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some tries; the first one connects."""
    exchange()
    fastest = float("inf")
    for _ in range(TRIES):
        dist.barrier()
        _wait_for(device)
        began = time.perf_counter()
        exchange()
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
