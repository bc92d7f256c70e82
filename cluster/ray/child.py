"""What a worker process does from its fork to its end."""

import signal
import socket
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.devices import check_health, pick_device
from moray.cluster.exit_codes import EXIT_DONE
from moray.cluster.network import use_interface_of
from moray.cluster.parent import be_seen_by_parent, die_with_parent
from moray.cluster.ray.left import Left
from moray.cluster.ray.messages import Assignment, Failure, Note, Phase
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import Memory, WorkerContext, WorkerFunction, WrongResultError


def work(
    function: WorkerFunction,
    argument: Any,
    assignment: Assignment,
    local_rank: int,
    own_host: str,
    pipe: Connection,
    listener: socket.socket | None,
    left: Left,
) -> None:
    """Runs the function as one rank and sends its heartbeats, then its exit code or a Failure, through `pipe`.

    `listener` is rank 0's bound and listening socket. Returns only after success: a worker that failed keeps its
    connections open until its agent kills it, so that no peer fails of a closed one before the reason is known.
    """
    die_with_parent()
    be_seen_by_parent()
    use_interface_of(own_host)
    with stop_on_signals(impatient=False) as should_stop:
        try:
            device = pick_device(local_rank, assignment.device)
            check_health(device)
            # The agent imported torch for one thread, so as to fork; the cores of this node are its workers' to share.
            torch.set_num_threads(max(1, usable_cores() // len(assignment.own_ranks)))
            context = WorkerContext(
                rank=assignment.own_ranks[local_rank],
                world_size=assignment.ranks[-1].stop,
                local_rank=local_rank,
                local_world_size=len(assignment.own_ranks),
                generation=assignment.generation,
                device=device,
                open_store=lambda: _open_store(assignment, listener),
                report=lambda step, status: pipe.send((step, status)),
                should_stop=should_stop,
                notes=left.notes,
                memory=Memory(left.files, assignment.ranks, assignment.node),
                note=lambda name, value: pipe.send(Note(name, value)),
                enter_phase=lambda name, is_long: pipe.send(Phase(name, is_long)),
            )
            pipe.send(int(function(context, argument) or EXIT_DONE))
        except BaseException as error:
            pipe.send(_describe(error))
            while True:
                signal.pause()


def _open_store(assignment: Assignment, listener: socket.socket | None) -> dist.Store:
    # Rank 0 listens on a socket that was bound before anybody heard of its port: the port cannot be lost to another.
    return dist.TCPStore(
        assignment.host,
        assignment.port,
        is_master=listener is not None,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


def _describe(error: BaseException) -> Failure:
    is_users_mistake = isinstance(error, UserError)
    reason = str(error) if is_users_mistake else f"{type(error).__name__}: {error}"
    suspects = error.ranks if isinstance(error, WrongResultError) else ()
    return Failure(reason, time.time(), "".join(traceback.format_exception(error)), is_users_mistake, suspects)
