import pytest

from moray.cluster.ray.patience import Patience

PATIENCE = Patience(startup_s=600.0, heartbeat_s=60.0, lease_s=20.0)


@pytest.mark.parametrize(
    ("longest_s", "limit_s"),
    [
        (None, 600.0),  # loading, and the first step, whose pace nobody knows
        (0.1, 60.0),
        (6.0, 60.0),
        (20.0, 200.0),
        (360.0, 3600.0),  # steps of six minutes
    ],
)
def test_the_limit_follows_the_steps(longest_s: float | None, limit_s: float) -> None:
    assert PATIENCE.with_worker(longest_s) == limit_s


def test_words_name_what_to_change() -> None:
    assert PATIENCE.why(None) == "longer than cluster.startup_timeout_s=600"
    assert PATIENCE.why(3.0) == "longer than cluster.heartbeat_timeout_s=60 and 10 of its slowest steps"


def test_a_node_is_given_up_only_after_its_workers_have_ended() -> None:
    assert PATIENCE.with_node == 30.0
    assert PATIENCE.with_node > PATIENCE.lease_s
