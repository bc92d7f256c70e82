"""Each rank's part of a sum, by ranks' own exchange and by the backend's."""

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from moray.parallel import summing


def parts_of(rank: int, ranks: int) -> Tensor:
    return torch.randn(ranks, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def own_part(most_peers: int) -> Tensor:
    summing.MOST_PEERS, before = most_peers, summing.MOST_PEERS
    try:
        parts_PX = parts_of(dist.get_rank(), dist.get_world_size())
        own_X = torch.empty_like(parts_PX[0])
        summing.reduce_scatter(parts_PX, own_X, dist.group.WORLD)
        return own_X
    finally:
        summing.MOST_PEERS = before


@pytest.mark.parametrize("most_peers", [1, 16], ids=["large group", "small group"])
def test_each_rank_has_its_part_of_the_sum(pool: Pool, most_peers: int) -> None:
    whole_PX = torch.stack([parts_of(rank, 3) for rank in range(3)]).sum(0)
    for rank, own_X in enumerate(pool.run(own_part, 3, most_peers)):
        torch.testing.assert_close(own_X, whole_PX[rank], rtol=0, atol=1e-14)
