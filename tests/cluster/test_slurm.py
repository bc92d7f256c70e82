"""What a task of srun reads in its environment. tests/jobs/submission/test_slurm_jobs.py has real ones."""

import pytest
from counting import Plan, count

from moray.cluster.group import Group
from moray.cluster.launch import launch
from moray.cluster.launchers import is_another_rank, own_rank
from moray.cluster.ranks import Place
from moray.cluster.slurm.tasks import place_of, port_of


def test_a_place_among_uneven_nodes() -> None:
    environment = {
        "SLURM_PROCID": "8",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1,2",
    }
    assert place_of(environment, "n1") == Place(8, 11, local_rank=0, local_world_size=1, host="n1")


def test_jobs_and_steps_meet_at_ports_of_their_own() -> None:
    ports = {port_of(str(job), str(step)) for job in range(4711, 4811) for step in range(7)}
    assert len(ports) == 700
    assert all(1024 < port < 32768 for port in ports)


def test_who_is_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert (own_rank("slurm"), own_rank("ray"), is_another_rank()) == (0, None, False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (own_rank("slurm"), own_rank("ray"), is_another_rank()) == (3, None, True)


def test_without_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    with pytest.raises(ValueError, match=r"cluster.launcher=slurm needs tasks that srun started: srun --ntasks N"):
        launch(count, Plan("", 1), "slurm", Group(workers=2))


def test_no_ray_of_a_job_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=r"this process is in no job of Slurm \(SLURM_JOB_ID is not set\); submit one"):
        launch(count, Plan("", 1), "ray", Group(workers=1))
