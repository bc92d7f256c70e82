"""Where ranks that share experts are: on which nodes, and so through which groups their tokens travel."""

import socket
from collections.abc import Sequence
from hashlib import sha256

import torch
import torch.distributed as dist


def hops(world_size: int, ep: int, nodes: int) -> list[list[list[int]]]:
    """How the world is cut into groups of ranks, once for each hop that a token takes to its experts' rank: straight
    there; over several nodes first to the rank at the same place of their node, and then within it.
    """
    firsts, within = range(0, world_size, ep), ep // nodes
    if nodes == 1 or within == 1:
        return [[list(range(first, first + ep)) for first in firsts]]
    between = [list(range(first + i, first + ep, within)) for first in firsts for i in range(within)]
    return [between, [list(range(first, first + within)) for first in range(0, world_size, within)]]


def nodes_spanned(ep: int) -> int:
    """Nodes over which each run of `ep` ranks is spread, 1 where that is not the same for all of them. Collective."""
    if ep == 1:
        return 1
    digest = sha256(socket.gethostname().encode()).digest()
    own = torch.tensor(int.from_bytes(digest[:7]))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return evenly_spread([host.item() for host in found], ep)


def evenly_spread(hosts: Sequence[float], ep: int) -> int:
    """Of the ranks' hosts: over how many each run of `ep` ranks is spread, as many neighbours on each; else 1."""
    runs = [hosts[first : first + ep] for first in range(0, len(hosts), ep)]
    nodes = len(set(runs[0]))
    if ep % nodes:
        return 1
    within = ep // nodes
    blocks = [[run[first : first + within] for first in range(0, ep, within)] for run in runs]
    is_even = all(
        len(set(run)) == nodes and all(len(set(block)) == 1 for block in of_run)
        for run, of_run in zip(runs, blocks, strict=True)
    )
    return nodes if is_even else 1
