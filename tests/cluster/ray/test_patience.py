import pytest

from moray.cluster.ray.patience import Patience

PATIENCE = Patience(startup_s=600.0, heartbeat_s=60.0, lease_s=20.0)


@pytest.mark.parametrize(
    ("usual_s", "longest_s", "limit_s"),
    [
        (None, None, 600.0),  # loading, and the first step, whose pace nobody knows
        (0.1, 0.2, 15.0),
        (2.0, 2.5, 20.0),
        (2.0, 30.0, 90.0),  # one that was slow
        (20.0, 20.0, 60.0),
        (360.0, 360.0, 1080.0),  # steps of six minutes
    ],
)
def test_the_limit_follows_the_steps(usual_s: float | None, longest_s: float | None, limit_s: float) -> None:
    assert PATIENCE.with_worker(usual_s, longest_s) == limit_s


def test_the_setting_is_the_ceiling_of_short_steps() -> None:
    assert Patience(600.0, 5.0, 20.0).with_worker(0.1, 0.1) == 5.0
    assert Patience(600.0, 5.0, 20.0).with_suspended == 5.0
    assert Patience(600.0, 0.5, 20.0).with_suspended == 0.5


def test_a_long_phase_has_all_of_the_setting() -> None:
    assert PATIENCE.with_worker(0.1, 0.2, is_long=True) == 60.0
    assert PATIENCE.with_worker(2.0, 30.0, is_long=True) == 90.0
    assert PATIENCE.why(0.1, 0.2, is_long=True) == "longer than cluster.heartbeat_timeout_s=60"


def test_words_name_what_to_change() -> None:
    assert PATIENCE.why(None, None) == "longer than cluster.startup_timeout_s=600"
    assert PATIENCE.why(20.0, 20.0) == "longer than cluster.heartbeat_timeout_s=60"
    assert PATIENCE.why(2.0, 2.5) == "longer than the 20 s that steps of 2 s, the slowest of 2.5 s, allow"


def test_a_node_is_given_up_only_after_its_workers_have_ended() -> None:
    assert PATIENCE.with_node == 30.0
    assert PATIENCE.with_node > PATIENCE.lease_s
