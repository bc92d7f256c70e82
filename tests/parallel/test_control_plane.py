from pathlib import Path

import pytest
import torch.distributed as dist
from pool import Pool

from moray.parallel.control_plane import ControlPlane


def agree() -> tuple[int, list[str], str]:
    ranks = ControlPlane()
    value = ranks.from_rank_0(lambda: 10 + ranks.rank)
    names = ranks.gather(f"rank {dist.get_rank()} of {ranks.world_size}")
    with pytest.raises(FileNotFoundError) as error:
        ranks.from_rank_0(Path("/absent/file").read_text)
    return value, names, str(error.value.filename)


def test_all_ranks_get_rank_0s_value_or_its_error(pool: Pool) -> None:
    names = [f"rank {rank} of 3" for rank in range(3)]
    assert pool.run(agree, 3) == [(10, names, "/absent/file")] * 3


def test_without_a_group_it_is_alone() -> None:
    ranks = ControlPlane()
    assert (ranks.rank, ranks.world_size, ranks.gather("me"), ranks.from_rank_0(lambda: 3)) == (0, 1, ["me"], 3)
