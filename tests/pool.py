"""A pool of real worker processes over gloo, started once per test session (a cold `import torch` takes seconds).

    results = pool.run(function, 4, arguments...)     # function(*arguments) on 4 ranks, results in rank order

The function is a module-level function of a test file; each call gets a fresh process group over its first ranks.
"""

import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 50


def _load(path: str) -> Any:
    """Imports a test file by its path, once per process (test folders are not packages)."""
    name = "pooled_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _work(rank: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        task = pipe.recv()
        if task is None:
            return
        path, name, world_size, rendezvous, arguments = task
        try:
            store = dist.FileStore(rendezvous, world_size)
            timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            torch.manual_seed(0)
            reply = (True, getattr(_load(path), name)(*arguments))
        except BaseException:
            reply = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(reply)


class Pool:
    """`size` spawned processes, each waiting for a function to run as one rank of a process group."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """function(*arguments) on ranks 0 … world_size-1; raises AssertionError with every failed rank's traceback."""
        self._calls += 1
        rendezvous = f"{self._folder.name}/{self._calls}"
        path = function.__code__.co_filename
        for pipe in self._pipes[:world_size]:
            pipe.send((path, function.__name__, world_size, rendezvous, arguments))
        replies = [pipe.recv() for pipe in self._pipes[:world_size]]
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(replies) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in replies]

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
