import pytest

from moray.jobs.demo import fitting_steps


@pytest.mark.parametrize(
    ("seconds", "seconds_a_step", "steps"),
    [(300, 1.0, 200), (260, 1.1, 200), (199, 1.0, 180), (250, 2.0, 120), (250, 3.0, 80), (250, 60.0, 40)],
)
def test_a_demo_is_as_long_as_the_machine_has_time_for(seconds: float, seconds_a_step: float, steps: int) -> None:
    """In twenties, so that halves and fifths are steps; 200 suffice, and with less than 40 it learns nothing."""
    assert fitting_steps(seconds, seconds_a_step) == steps
