"""Through which groups tokens travel to their experts, and how ranks find that out."""

import pytest
from pool import Pool

from moray.parallel.layout import Layout
from moray.parallel.nodes import evenly_spread, hops, nodes_spanned


def test_over_two_nodes_the_first_hop_is_to_the_same_place_of_each() -> None:
    assert hops(8, 4, 1) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    between, within = hops(8, 4, 2)
    assert sorted(between) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert within == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert hops(4, 4, 4) == [[[0, 1, 2, 3]]], "one rank a node: there is no link within"


@pytest.mark.parametrize(
    ("hosts", "ep", "nodes"),
    [
        ("aabb", 4, 2),
        ("aabb", 2, 1),
        ("aaabbb", 6, 2),
        ("aabbccdd", 4, 2),
        ("abcd", 4, 4),
        ("aaab", 4, 1),
        ("abab", 4, 1),
        ("aabbcccc", 4, 1),
        ("aabbaabb", 4, 2),
    ],
)
def test_nodes_count_where_each_has_as_many_neighbours(hosts: str, ep: int, nodes: int) -> None:
    assert evenly_spread([ord(host) for host in hosts], ep) == nodes


def found() -> tuple[int, list[int]]:
    meshes = Layout(dp_shard=4, ep=4).meshes("cpu")
    return nodes_spanned(4), [group.size() for group in meshes.hops]


def test_ranks_of_one_machine_find_one_node(pool: Pool) -> None:
    assert pool.run(found, 4) == [(1, [4])] * 4


def sizes(layout: Layout) -> list[int]:
    return [group.size() for group in layout.meshes("cpu").hops]


def test_the_layout_may_say_it(pool: Pool) -> None:
    assert pool.run(sizes, 4, Layout(dp_shard=4, ep=4, ep_nodes=2)) == [[2, 2]] * 4
