import os

import pytest
from moray.cluster.ray.local_ray import slots_for


def test_workers_may_share_cores_within_reason() -> None:
    cores = os.cpu_count()
    assert cores
    assert slots_for(1) == cores
    assert slots_for(4 * cores) == 4 * cores
    with pytest.raises(ValueError, match=rf"cluster.workers=100000 .* {cores} cores.*at most {8 * cores}"):
        slots_for(100000)
