"""One node's agent: a small process that has imported torch and the function already, and forks the workers.

A worker thus starts in milliseconds, as a process without a past: a restart keeps nothing that the failure may have
damaged, and imports nothing again. The agent's owner talks to it through one pipe; when the owner goes, the agent and
its workers go too, and when the owner is silent, the workers: a driver that the network has cut off may have been
replaced. Knows nothing of Ray.
"""

import gc
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from moray.cluster.ray.left import Left, Vault
from moray.cluster.ray.messages import Assignment, Failure, Note, Phase, WorkerState
from moray.cluster.ray.stacks import stacks
from moray.cluster.signals import hold_sigterm
from moray.cluster.versions import versions

POLL_S = 0.2
EXIT_CHECK_S = 0.05
USUAL = 0.95
NEWEST = 256
"""Silences of a worker, of which the USUAL quantile is taken."""


class AgentProcess:
    """The owner's end: starts the agent and calls its methods, which answers one after the other."""

    def __init__(self, import_path: list[str]) -> None:
        self._pipe, theirs = Pipe()
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        # One thread a process, as torchrun has it: many processes share the cores, and a fork must not lose a thread.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(import_path)}
        descriptor = theirs.fileno()
        command = [sys.executable, "-m", "moray.cluster.ray.agent", str(descriptor)]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[descriptor], start_new_session=True)
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """The agent's answer; raises RuntimeError with its traceback, or EOFError where the agent is gone.

        Any thread may call: one that does while another waits for a poll's answer ends that poll.
        """
        with self._sending:
            self._pipe.send((method, arguments))
            self._receiving.acquire()  # in the order of sending, in which the answers come
        try:
            is_answer, value = self._pipe.recv()
        finally:
            self._receiving.release()
        if not is_answer:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Ends the agent and, with it, its workers."""
        self._pipe.close()
        self._process.wait()


STARTING = Phase("starting", is_long=False)


@dataclass
class _Worker:
    rank: int
    pid: int
    pipe: Connection
    notes: dict[str, Any]
    forked: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    phase: Phase = STARTING
    entered: dict[str, float] = field(default_factory=dict)
    silences_s: deque[float] = field(default_factory=lambda: deque(maxlen=NEWEST))
    longest_silence_s: float | None = None
    runs: float = field(default_factory=time.monotonic)
    """When it was last seen not to be suspended."""
    step: int | None = None
    status: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    failure: Failure | None = None
    is_gone: bool = False

    def look(self) -> bool:
        """Takes in what is new of this worker; true where the driver should hear of it at once."""
        if self.is_gone:
            return False
        pid, wait_status = os.waitpid(self.pid, os.WNOHANG)
        is_news = bool(pid)
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                is_news |= self._take(self.pipe.recv())
                if not pid:
                    break  # one that never pauses must not keep its agent from the others
        if pid:
            self.is_gone = True
            self.pipe.close()
            with suppress(ProcessLookupError):  # helpers that the worker left behind
                os.killpg(self.pid, signal.SIGKILL)
            if self.exit_code is None and self.failure is None:
                self.failure = Failure(_cause_of_death(wait_status), time.time())
        return is_news

    def _take(self, message: Failure | Note | Phase | int | tuple[int, dict[str, Any]]) -> bool:
        if isinstance(message, Note):
            self.notes[message.name] = message.value
            return False
        silence_s, self.heard = time.monotonic() - self.heard, time.monotonic()
        if isinstance(message, Phase):
            self.phase = message
            self.entered.setdefault(message.name, self.heard - self.forked)
            return False
        if isinstance(message, Failure):
            self.failure = message
            return True
        if isinstance(message, int):
            self.exit_code = message
            return False
        before, (self.step, self.status) = self.step, message
        if not self.phase.is_long and (self.longest_silence_s is not None or before not in (None, self.step)):
            self.longest_silence_s = max(silence_s, self.longest_silence_s or 0.0)
            self.silences_s.append(silence_s)
        return before is None

    def state(self) -> WorkerState:
        now, silences_s = time.monotonic(), sorted(self.silences_s)
        if self.is_gone or not _is_suspended(self.pid):
            self.runs = now
        return WorkerState(
            rank=self.rank,
            pid=self.pid,
            step=self.step,
            status=self.status,
            phase=self.phase.name,
            is_long=self.phase.is_long,
            entered=self.entered,
            silent_s=now - self.heard,
            usual_silence_s=silences_s[int(USUAL * (len(silences_s) - 1))] if silences_s else None,
            longest_silence_s=self.longest_silence_s,
            suspended_s=now - self.runs,
            exit_code=self.exit_code if self.is_gone else None,
            failure=self.failure,
        )


class Agent:
    """Starts, watches and ends the workers of one node. Single-threaded, so that its forks are clean."""

    def __init__(self, owner: Connection) -> None:
        self._owner = owner
        self._workers: list[_Worker] = []
        self._listener: socket.socket | None = None
        self._called = time.monotonic()
        self._lease_s = math.inf
        self._has_news = False
        self._notes: dict[str, Any] = {}
        self._vault = Vault()

    def next_call(self) -> tuple[str, tuple[Any, ...]]:
        """Waits for the owner, hears the workers meanwhile, and ends them with their lease.

        Raises EOFError or OSError once the owner is gone.
        No worker ever waits for its driver: a pipe that nobody reads is soon full, and then a heartbeat blocks.
        """
        while self._living() and not self._owner.poll():
            self._hear(self._owner)
            silent_s = time.monotonic() - self._called
            # Where it was this process that was suspended, a call waits to be read.
            if silent_s > self._lease_s and not self._owner.poll():
                self._end_lease(silent_s)
        call: tuple[str, tuple[Any, ...]] = self._owner.recv()
        # Another thread of the driver's, which looks at the cluster, does not tell that anybody watches the workers.
        if call[0] != "is_told_to_end":
            self._called = time.monotonic()
        return call

    def _living(self) -> list[_Worker]:
        return [worker for worker in self._workers if not worker.is_gone]

    def _hear(self, *others: Connection, at_most_s: float = EXIT_CHECK_S) -> None:
        """Waits until a worker, or one of the other pipes, has something to say; takes in what the workers say."""
        # The end of a worker is not heard where a helper of its own keeps its pipe open: hence no longer than that.
        wait([*others, *(worker.pipe for worker in self._living())], min(at_most_s, EXIT_CHECK_S))
        news = [worker.look() for worker in self._workers]
        self._has_news |= any(news)

    def _end_lease(self, silent_s: float) -> None:
        unfinished = [worker for worker in self._living() if worker.exit_code is None]
        self.kill()
        lease = f"its lease of cluster.lease_timeout_s={self._lease_s:g} ended"
        for worker in unfinished:
            worker.failure = Failure(f"the driver was silent for {silent_s:.0f} s: {lease}", time.time())
            self._has_news = True

    def versions(self) -> dict[str, str]:
        return versions()

    def load(self, task: bytes, host: str) -> None:
        """Imports all that a worker needs, once: of the pickled (function, argument) `task`, too.

        `host` is this node's address in the cluster.
        """
        import moray.cluster.ray.child  # noqa: F401

        self._function, self._argument = pickle.loads(task)
        self._host = host
        if "torch.distributed.fsdp" in sys.modules:
            import torch._dynamo  # noqa: F401 - for which FSDP asks in each worker, a second after its start
        # A worker's garbage collector would write to, and thereby copy, every page that it shares with the agent.
        gc.collect()
        gc.freeze()

    def output(self) -> str:
        """The file that holds what this node's workers write to standard error."""
        return os.path.realpath("/proc/self/fd/2")

    def bind(self) -> int:
        """Opens the socket on which rank 0, a worker of this node, will serve the store; returns its port."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, 0), family=family)
        return self._listener.getsockname()[1]

    def start(self, assignment: Assignment) -> list[int]:
        """Forks this node's workers; returns their pids."""
        self._workers, self._lease_s = [], assignment.lease_s
        self._vault.open([*assignment.own_ranks, *assignment.mirrored_ranks])
        for local_rank in range(len(assignment.own_ranks)):
            self._workers.append(self._fork(assignment, local_rank))
        if self._listener:
            self._listener.close()
            self._listener = None
        return [worker.pid for worker in self._workers]

    def _fork(self, assignment: Assignment, local_rank: int) -> _Worker:
        from moray.cluster.ray.child import work

        rank = assignment.own_ranks[local_rank]
        ours, theirs = Pipe(duplex=False)
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)
            theirs.close()
            return _Worker(rank, pid, ours, self._notes)
        code = 1
        try:
            ours.close()
            self._owner.close()  # a helper that outlives this worker must not keep the owner waiting for the agent
            os.setpgid(0, 0)
            listener = self._listener if rank == 0 else None
            left = Left(self._notes, self._vault.files)
            work(self._function, self._argument, assignment, local_rank, self._host, theirs, listener, left)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self, wait_s: float = POLL_S) -> list[WorkerState]:
        """What became of the workers: at once where one began, failed or ended, or the owner has another call.

        Else after so long.
        """
        deadline = time.monotonic() + wait_s
        while not self._has_news and not self._owner.poll() and (left_s := deadline - time.monotonic()) > 0:
            self._hear(self._owner, at_most_s=left_s)
        self._has_news = False
        return [worker.state() for worker in self._workers]

    def stop(self) -> None:
        """Asks the workers to stop when they can."""
        for worker in self._living():
            os.kill(worker.pid, signal.SIGTERM)

    def is_told_to_end(self) -> bool:
        """Whether it has got SIGTERM, which waits."""
        return signal.SIGTERM in signal.sigpending()

    def stacks(self, within_s: float) -> dict[int, str]:
        """Where each worker is, by rank, as seen from outside."""
        return stacks({worker.rank: worker.pid for worker in self._living()}, within_s)

    def kill(self) -> None:
        """Ends every worker now, suspended ones included, and waits until they are gone."""
        living = self._living()
        for worker in living:
            os.killpg(worker.pid, signal.SIGKILL)
        for worker in living:
            os.waitpid(worker.pid, 0)
            worker.is_gone = True
            worker.pipe.close()


def _cause_of_death(wait_status: int) -> str:
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return f"exited with code {code} without a word"
    return f"was killed by {signal.Signals(-code).name}"


def _is_suspended(pid: int) -> bool:
    try:
        # The state follows the command's name, which stands in parentheses and may hold any character (proc(5)).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    agent = Agent(pipe)
    # A scheduler may send SIGTERM to every process of a node: it is for the workers, which take it when they can act
    # on it. The agent ends with its owner.
    hold_sigterm()
    while True:
        try:
            method, arguments = agent.next_call()
        except (EOFError, OSError):
            agent.kill()
            return
        try:
            answer = (True, getattr(agent, method)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        # The owner may have gone meanwhile; the next receive then says so.
        with suppress(OSError):
            pipe.send(answer)


if __name__ == "__main__":
    main()
