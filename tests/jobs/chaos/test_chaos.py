"""Every kind of fault once, one after the other, against one run; `benchmarks/chaos.py` does it a hundred times."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from disks import small_file_system

from chaos.campaign import harm, undisturbed
from chaos.check import left_behind, problems_on_disk
from chaos.faults import FAULTS, Fault
from chaos.nodes import ray_of
from chaos.run import Run

SEED = 1
STEPS = 500
# So that it does not take half a minute until a node that is cut off counts as lost.
LEASE_S = 12


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    data, disk = tmp_path_factory.mktemp("copy") / "data", tmp_path_factory.mktemp("disk")
    shutil.copytree(dataset, data)
    with small_file_system(disk, 64), ray_of(tmp_path_factory.mktemp("nodes"), [2, 2]) as nodes:
        run = Run(nodes, data, disk / "run", STEPS, "2:4", {"cluster__lease_timeout_s": LEASE_S})
        run.start()
        yield run


@pytest.mark.parametrize("fault", Random(SEED).sample(FAULTS, len(FAULTS)), ids=lambda fault: fault.name)
def test_a_run_goes_on_after(run: Run, fault: Fault) -> None:
    outcome = harm(run, fault, Random(SEED))
    assert (outcome.noticed_s is not None) == bool(fault.sign)


def test_nothing_of_all_that_shows_in_the_end(run: Run, tmp_path: Path) -> None:
    """The losses and the last state are those of one process, every position was trained on once, and nothing stays."""
    assert not run.is_ill
    run.finish()
    assert problems_on_disk(run.folder, undisturbed(run.data, tmp_path / "alone", STEPS), STEPS) == []
    assert left_behind(run) == []
