"""This process as a driver of a Ray: of a cluster, or of one of its own. Either may be lost under it."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import grpc
import ray
import ray._private.worker
from ray._raylet import Config  # type: ignore[attr-defined]

from moray import UserError
from moray.cluster.ray.address import ask, find_address
from moray.cluster.ray.local_ray import LocalRay, slots_for
from moray.cluster.ray.own_ray import OwnRay
from moray.cluster.slurm.allocation import Allocation
from moray.cluster.slurm.slurm_ray import SlurmRay
from moray.cluster.worker import WorkerError

PULSE_S = 1.0
PULSE_TIMEOUT_S = 2.0
# Ray's own code ends a driver that has missed the head for 60 s; a head that is started anew may be back before.
MISSED_PULSES = 10


class RayLostError(Exception):
    """The Ray that the workers ran on is not there any more; the message says which one, and what became of it."""


class Connection(Protocol):
    is_local: bool
    """Whether this Ray is the driver's own, on this machine alone."""

    address: str

    def check(self) -> None:
        """Raises RayLostError where this Ray is lost: what one asks it from then on, it may never answer.

        The workers of a local one are gone then.
        """

    def renew(self) -> None:
        """Connects to another Ray in place of the lost one. Raises WorkerError where there is none."""

    def close(self) -> None:
        """Disconnects, and ends a Ray of the driver's own with all workers in it."""


@contextmanager
def connected(workers: int) -> Iterator[Connection]:
    """Connects to the cluster of RAY_ADDRESS, or to a Ray of its own: on this machine, or on a Slurm job's nodes.

    Raises UserError where RAY_ADDRESS or the token for it is wrong; WorkerError where a Ray of its own does not start.
    """
    connection: Connection
    if ray.is_initialized():
        connection = _Cluster(ray.get_runtime_context().gcs_address, is_ours=False)
    elif os.environ.get("RAY_ADDRESS") == "slurm":
        connection = _Own(partial(SlurmRay, Allocation.own()), is_local=False)
    elif address := find_address():
        connection = _Cluster(address, is_ours=True)
    else:
        connection = _Own(partial(LocalRay, slots_for(workers)), is_local=True)
    try:
        yield connection
    finally:
        connection.close()


class _Own:
    def __init__(self, start: Callable[[], OwnRay], is_local: bool) -> None:
        self._start, self.is_local = start, is_local
        self.renew()

    def renew(self) -> None:
        self._ray = self._start()
        try:
            self.address = self._ray.address
            _join(self.address)
        except BaseException:
            self._ray.close()
            raise

    def check(self) -> None:
        if reason := self._ray.loss():
            self._ray.close()  # while a part of it lives, Ray waits for the others before it lets its driver go
            raise RayLostError(reason)

    def close(self) -> None:
        ray.shutdown()
        self._ray.close()


class _Cluster:
    is_local = False

    def __init__(self, address: str, is_ours: bool) -> None:
        if is_ours:
            try:
                _join(address)
            except (RuntimeError, OSError, ValueError) as error:
                raise UserError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}") from error
        self.address, self._is_ours = address, is_ours
        self._loss = f"the head of the Ray cluster at {address} does not answer any more"
        self._missed = 0
        self._is_closed = threading.Event()
        threading.Thread(target=self._feel_pulse, daemon=True).start()

    def _feel_pulse(self) -> None:
        while not self._is_closed.wait(PULSE_S):
            is_there = ask(self.address, PULSE_TIMEOUT_S) == grpc.StatusCode.OK
            self._missed = 0 if is_there else self._missed + 1

    def check(self) -> None:
        if self._missed >= MISSED_PULSES:
            raise RayLostError(self._loss)

    def renew(self) -> None:
        raise WorkerError(f"{self._loss}; the same command resumes once there is a cluster")

    def close(self) -> None:
        self._is_closed.set()
        if self._is_ours or self._missed >= MISSED_PULSES:
            ray.shutdown()


def _join(address: str) -> None:
    """Makes this process a driver of the Ray at `address`: a silent one, whose signals stay ours."""
    # Ray would wait as long as 15 s to say farewell to a head that is gone.
    os.environ.setdefault("RAY_task_events_shutdown_flush_timeout_ms", "1")
    Config.initialize("")
    # Ray prints what its nodes and workers died of, whatever log_to_driver says. Our events say it in a line.
    ray._private.worker.listen_error_messages = lambda *_: None
    with _own_signals():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Undoes that Ray takes SIGTERM over; one that comes meanwhile waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
