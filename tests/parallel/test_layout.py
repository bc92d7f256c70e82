"""Which lanes of a global batch a data-parallel rank computes, and with whom it exchanges."""

import pytest
import torch.distributed as dist
from pool import Pool

from moray.parallel.layout import Layout, hops


@pytest.mark.parametrize(
    ("layout", "run", "lanes"),
    [
        (Layout(dp_shard=2), None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Layout(dp_shard=2), 1, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (Layout(dp_shard=2), 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (Layout(dp_replicate=2, dp_shard=2), None, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (Layout(dp_replicate=2, dp_shard=2), 1, [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_lanes_are_shared_out_in_runs(layout: Layout, run: int | None, lanes: list[list[int]]) -> None:
    assert [layout.lanes(rank, 8, run) for rank in range(layout.dp)] == lanes


def groups(layout: Layout) -> dict[str, tuple[str, list[int]]]:
    """Of each dimension of the meshes: the name of this rank's process group, and its ranks."""
    meshes, found = layout.meshes("cpu"), {}
    for mesh in (meshes.dense, meshes.sparse, meshes.flat):
        for name in mesh.mesh_dim_names or () if mesh else ():
            group = mesh[name].get_group()
            found[name] = (group.group_name, dist.get_process_group_ranks(group))
    return found


def test_dimensions_of_the_same_ranks_share_a_process_group(pool: Pool) -> None:
    of_0, of_1, of_2, of_3 = pool.run(groups, 4, Layout(dp_shard=2, tp=2, ep=2))
    own = {"dp_replicate": [0], "dp_shard": [0, 2], "tp": [0, 1], "efsdp": [0, 2], "ep": [0, 1]}
    assert {name: ranks for name, (_, ranks) in of_0.items()} == own | {"dp_shard_tp": [0, 1, 2, 3]}
    assert of_0["ep"] == of_0["tp"] == of_1["tp"] != of_2["tp"] == of_3["ep"]
    assert of_0["efsdp"] == of_0["dp_shard"] == of_2["dp_shard"] != of_1["dp_shard"]
    assert len({name for found in (of_0, of_1, of_2, of_3) for name, _ in found.values()}) <= 9, "4 of one rank each"
    lone = pool.run(groups, 2, Layout(dp_shard=2, tp=1))[0]
    assert lone["tp"] == lone["ep"] == lone["dp_replicate"]
    assert lone["tp"][1] == [0]


def test_over_two_nodes_the_first_hop_is_to_the_same_place_of_each() -> None:
    assert hops(8, 4, 1) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    between, within = hops(8, 4, 2)
    assert sorted(between) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert within == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert hops(4, 4, 4) == [[[0, 1, 2, 3]]], "one rank a node: there is no link within"


def sizes(layout: Layout) -> list[int]:
    return [group.size() for group in layout.meshes("cpu").hops]


def test_the_layout_may_say_it(pool: Pool) -> None:
    assert pool.run(sizes, 4, Layout(dp_shard=4, ep=4, ep_nodes=2)) == [[2, 2]] * 4
