"""The nodes of the Ray that a run would use, before anything runs on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from moray.cluster.ray.address import is_open
from moray.cluster.ray.connection import connected


@dataclass(frozen=True)
class Census:
    """The addresses of the nodes that have slots: GPUs where there are any, else CPUs. free: those with a slot left."""

    address: str
    is_open: bool
    free: tuple[str, ...]
    busy: tuple[str, ...]


@contextmanager
def census() -> Iterator[Census]:
    """Joins the Ray of RAY_ADDRESS, or starts one; what is launched inside runs there. Raises as `connected` does."""
    with connected(1) as connection:
        resource = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        available = available_resources_per_node()
        found: dict[bool, list[str]] = {True: [], False: []}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get(resource, 0) >= 1:
                is_free = available.get(node["NodeID"], {}).get(resource, 0) >= 1
                found[is_free].append(node["NodeManagerAddress"])
        yield Census(connection.address, is_open(connection.address), tuple(found[True]), tuple(found[False]))
