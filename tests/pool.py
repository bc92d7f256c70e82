"""Real worker processes over gloo, each forked for one call from a process that has imported everything already.

    results = pool.run(function, 4, arguments...)     # function(*arguments) on 4 ranks, results in rank order

The function is a module-level function of a test file. A rank has no past and leaves nothing behind: a process that ran
one call after the other would keep the gloo groups of all of them alive (DTensor caches their meshes), and their
threads and connections would slow down every later call.
"""

import gc
import importlib.util
import multiprocessing as mp
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CALL_S = 50.0
"""How long a call may take, and a collective wait."""
ECHO_S = 2.0
"""How long peers may go on once a rank has failed: what they raise of it is told as well."""
IMPORTED_ONCE = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "moray.jobs.training.trainer",
    "moray.parallel.checkpoint.checkpointer",
    "pytest",
]


def _load(path: str) -> Any:
    """Imports a test file by its path (test folders are not packages)."""
    name = "pooled_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _work(
    rank: int, world_size: int, rendezvous: str, path: str, name: str, arguments: bytes, pipe: Connection
) -> None:
    import torch
    import torch.distributed as dist

    from moray.cluster.worker import WorkerContext

    torch.set_num_threads(1)
    gc.freeze()
    try:
        context = WorkerContext(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            generation=1,
            device=torch.device("cpu"),
            open_store=lambda: dist.FileStore(rendezvous, world_size),
            report=lambda step, status: None,
            should_stop=lambda: False,
        )
        group = context.process_group(timedelta(seconds=CALL_S))
        group.__enter__()  # for good: this process does not end by itself
        torch.manual_seed(0)
        reply = (True, getattr(_load(path), name)(*pickle.loads(arguments)))
    except BaseException:
        reply = (False, traceback.format_exc())
    # Bytes: multiprocessing would share tensors through memory of this process, which is about to end.
    pipe.send_bytes(pickle.dumps(reply))
    # A peer may still be in the last collective, and must not see a closed connection: the pool ends all together.
    time.sleep(CALL_S)


class Pool:
    """Runs functions as the ranks of a process group."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED_ONCE)

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """function(*arguments) on ranks 0 … world_size-1; raises AssertionError with every failed rank's traceback."""
        with tempfile.TemporaryDirectory() as folder:
            call = (f"{folder}/rendezvous", function.__code__.co_filename, function.__name__, pickle.dumps(arguments))
            pipes: dict[Connection, int] = {}
            ranks: list[ForkServerProcess] = []
            try:
                for rank in range(world_size):
                    ours, theirs = self._context.Pipe(duplex=False)
                    process = self._context.Process(target=_work, args=(rank, world_size, *call, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    pipes[ours] = rank
                    ranks.append(process)
                replies = _replies(pipes)
            finally:
                for process in ranks:
                    process.kill()  # what it had to say it has said
                    process.join()
                    process.close()
                for pipe in pipes:
                    pipe.close()
        failures = [f"rank {rank}:\n{value}" for rank, (is_done, value) in sorted(replies.items()) if not is_done]
        assert not failures, "\n".join(failures)
        return [replies[rank][1] for rank in range(world_size)]


def _replies(pipes: dict[Connection, int]) -> dict[int, tuple[bool, Any]]:
    """What each rank returned, or (False, why not)."""
    replies: dict[int, tuple[bool, Any]] = {}
    waiting, until = dict(pipes), time.monotonic() + CALL_S
    while waiting and (left := until - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                replies[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                replies[rank] = (False, "ended without a word")
            if not replies[rank][0]:
                until = min(until, time.monotonic() + ECHO_S)
    return {**dict.fromkeys(waiting.values(), (False, "gave no answer in time")), **replies}
