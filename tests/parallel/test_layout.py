"""Which lanes of a global batch a data-parallel rank computes."""

import pytest

from moray.parallel.layout import Layout


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
