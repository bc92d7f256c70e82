"""What a process group of many ranks costs each of them."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moray.parallel.control_plane import ControlPlane
from moray.parallel.layout import Layout


def sockets() -> int:
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


def sockets_of_groups() -> tuple[int, int]:
    groups = Layout(dp_replicate=1, dp_shard=4, tp=2, ep=2).resolve(8).meshes("cpu"), ControlPlane()
    before = sockets()
    for _ in range(3):
        dist.barrier()
        groups[1].gather(dist.get_rank())
    return before, sockets()


def test_a_rank_has_no_connection_to_each_other_one_in_each_group(pool: Any) -> None:
    """Full meshes: 7 connections in the default group, 7 in the control plane's, and 8 in those of the meshes."""
    for before, after in pool.run(sockets_of_groups, 8):
        assert before <= 14, "a listener a group, and hardly a connection"
        assert after <= before + 5 + 2, "a barrier reaches the neighbours at 1, 2 and 4; a ring has two"
