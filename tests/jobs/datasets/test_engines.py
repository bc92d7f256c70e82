"""What goes wrong where tasks are done: numbers that cannot be, processes that are killed for good, unfit nodes."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_tasks
from small_tasks import Count, Die, DieTelling, FindsNothing, Race, Touch

from moray.data.preparation.progress import tick
from moray.data.preparation.tasks import Task, clear_partials, perform
from moray.jobs.datasets import ray_task
from moray.jobs.datasets.engine import Engine, most_tasks, processes_for
from moray.jobs.datasets.ray_task import heard, home_in, perform_at, telling


@contextmanager
def on_ray(scratch: Path) -> Iterator[Any]:
    from ray import cloudpickle

    from moray.jobs.datasets.ray_engine import ray_engine

    cloudpickle.register_pickle_by_value(small_tasks)  # a Ray's workers do not search where tests do
    with ray_engine(scratch, None) as engine:
        yield engine


def done_by(engine: Any, tasks: list[Task]) -> list[int]:
    return sorted(done.found["number"] for _, done in engine.do(tasks, lambda _: None))


@pytest.mark.parametrize(
    ("workers", "memory_mb", "message"),
    [
        (0, None, "workers=0 must be at least 1"),
        (None, 100, "memory_mb=100 must be at least 700"),
        (3, 1700, "workers=3 take 2100 MB, more than memory_mb=1700; use 2"),
    ],
)
def test_numbers_that_cannot_be(workers: int | None, memory_mb: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        most_tasks(workers, memory_mb)


def test_what_numbers_mean() -> None:
    assert (most_tasks(None, None), most_tasks(5, None), most_tasks(None, 1700), most_tasks(1, 1700)) == (None, 5, 2, 1)
    assert processes_for(5, None) == 5
    assert processes_for(None, 700) == 1


def test_a_process_that_is_killed_is_said_so_and_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    with Engine(2) as engine:
        assert done_by(engine, [Touch(tmp_path / "s" / f"{n}") for n in range(9)]) == list(range(9))
    for kind in (Die, DieTelling):
        with (
            Engine(2) as engine,
            pytest.raises(ValueError, match="killed, perhaps because memory ran out; the same"),
        ):
            done_by(engine, [kind(tmp_path / "s" / "9")])
    with Engine(2) as engine:
        assert done_by(engine, [Die(tmp_path / "s" / f"{n}") for n in range(9)]) == list(range(9))


def test_of_two_that_do_a_task_one_is_believed_and_nothing_is_left(tmp_path: Path) -> None:
    assert perform(Race(tmp_path / "s" / "1")).found == {"number": 1}
    (tmp_path / "s" / "2.17-abcd.partial").mkdir()
    clear_partials(tmp_path)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["1"]


def test_a_node_that_is_not_as_its_driver_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_task, "SEEN_WITHIN_S", 0.2)
    here = socket.gethostname()
    with home_in(tmp_path) as home:
        assert perform_at(home, Touch(tmp_path / "s" / "1")).found == {"number": 1}
        elsewhere = replace(home, host="head", token=tmp_path / "elsewhere" / "seen")
        with pytest.raises(ValueError, match=f"on {here}: the folder .*elsewhere is not the one that head works in"):
            perform_at(elsewhere, Touch(tmp_path / "s" / "2"))
        other = replace(home, host="head", versions={**home.versions, "torch": "1.0"})
        with pytest.raises(ValueError, match=f"on {here}: torch is .*, but 1.0 on head; install the same on both"):
            perform_at(other, Touch(tmp_path / "s" / "3"))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["1"]
    assert not list(tmp_path.glob("seen-*"))


def test_on_ray_errors_are_the_tasks_own_and_whoever_dies_each_time_is_given_up(tmp_path: Path, two_nodes: Any) -> None:
    with on_ray(tmp_path) as engine:
        assert done_by(engine, [Touch(tmp_path / "s" / f"{n}") for n in range(20)]) == list(range(20))
        with pytest.raises(FileNotFoundError, match="s/20 on "):
            done_by(engine, [FindsNothing(tmp_path / "s" / "20")])
        with pytest.raises(ValueError, match="a process of the preparation was lost 4 times over s/21, perhaps"):
            done_by(engine, [Die(tmp_path / "s" / "21")])


def test_on_ray_it_is_told_how_many_bytes_tasks_have_gone_through(tmp_path: Path, two_nodes: Any) -> None:
    told: list[int] = []
    with on_ray(tmp_path) as engine:
        ticks = engine.do([Count(tmp_path / "s" / f"{n}") for n in range(2)], told.append)
        assert {number for number, _ in ticks} == {0, 1}
    assert sum(told) in range(60, 201), "of each most, but for the last second"
    assert not list(tmp_path.glob("seen-*"))


def test_a_task_tells_what_it_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_task, "TELL_EVERY_S", 0.0)
    before: dict[str, int] = {}
    with telling(tmp_path), telling(tmp_path):
        for total in (0, 30, 50):
            for _ in range(total // 10):
                tick(5)
            assert heard(tmp_path, before) == total
    assert heard(tmp_path, before) == 0
    assert not list(tmp_path.iterdir())
    with telling(tmp_path / "gone"):
        tick(5)


def test_a_ray_on_which_no_task_fits(tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.jobs.datasets.ray_engine.WORKER_MB", 1 << 30)
    message = f"no node of the Ray at {two_nodes.address} has a CPU and 1073741824 MB of memory for a task"
    with on_ray(tmp_path) as engine, pytest.raises(ValueError, match=message):
        done_by(engine, [Touch(tmp_path / "s" / "1")])
