"""Fixtures that are dear to start and therefore shared by the whole session."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from disks import small_file_system
from pool import Pool

STARTING_RAY = (
    "tests/cluster/ray/",
    "tests/cluster/test_driver.py",
    "tests/jobs/datasets/test_engines.py",
    "tests/jobs/datasets/test_same_bytes.py",
    "tests/jobs/doctor/test_two_nodes.py",
    "tests/jobs/test_cut_off.py",
    "tests/jobs/submission/test_ray_job.py",
    "tests/jobs/submission/test_kubernetes_job.py",
    "tests/jobs/submission/test_kubernetes_rayjob.py",
    "tests/jobs/submission/test_slurm_jobs.py",
    "tests/jobs/test_recovery.py",
    "tests/jobs/training/test_ppo.py",
    "tests/jobs/training/test_stops.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several pytest-xdist workers a file stays on one, and so do all that start a Ray, which come first.

    Two Rays that start at once slow each other down, and one has 15 seconds to start.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if path.startswith(STARTING_RAY) else path

    config.option.loadscopereorder = False
    return FileByFile(config, log)


@pytest.fixture(scope="session")
def pool() -> Pool:
    """Real worker processes over gloo."""
    return Pool()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A real Ray with eight CPU slots; this process and its subprocesses find it through RAY_ADDRESS."""
    from moray.cluster.ray.local_ray import LocalRay  # importing Ray takes long, and few tests need it

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")  # with a GPU in it, Ray would count GPUs for slots
        with closing(LocalRay(8)) as local_ray:
            environment.setenv("RAY_ADDRESS", local_ray.address)
            yield local_ray.address


@pytest.fixture(scope="module")
def ray_nodes(ray_cluster: str) -> Iterator[Any]:
    """A Ray of nodes with two CPU slots each, on this machine; the token is that of the session's own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def two_nodes(ray_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """It has two again, whatever the test before left of it."""
    if len(ray_nodes.worker_nodes) != 1:
        for node in list(ray_nodes.worker_nodes):
            ray_nodes.remove_node(node)
        ray_nodes.add_node(num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    return ray_nodes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path, 8):
        yield tmp_path
