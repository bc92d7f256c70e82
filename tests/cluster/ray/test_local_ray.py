import pytest

from moray.cluster.cores import usable_cores
from moray.cluster.ray.keeper import temp_dir
from moray.cluster.ray.local_ray import LocalRay, slots_for
from moray.cluster.worker import WorkerError


def test_workers_may_share_cores_within_reason() -> None:
    cores = usable_cores()
    assert cores
    assert slots_for(1) == cores
    assert slots_for(4 * cores) == 4 * cores
    with pytest.raises(ValueError, match=rf"cluster.workers=100000 .* {cores} cores.*at most {8 * cores}"):
        slots_for(100000)


def test_a_local_ray_that_cannot_start_says_why_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null")
    with pytest.raises(WorkerError, match=r"^a local Ray did not start: NotADirectoryError: .*/dev/null/ray'$"):
        LocalRay(1)


@pytest.mark.parametrize(("length", "is_kept"), [(30, True), (39, True), (40, False), (200, False)])
def test_a_folder_too_long_for_sockets_is_not_used(length: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel's 107 characters, Ray takes 4 for its folder and 64 for a session's sockets."""
    folder = "/tmp/" + (length - 5) * "x"
    monkeypatch.setenv("RAY_TMPDIR", folder)
    assert temp_dir() == (f"{folder}/ray" if is_kept else "/tmp/ray")
