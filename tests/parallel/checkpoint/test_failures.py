"""What breaks a checkpoint: damaged files, full disks, limits, SIGKILL. All of it is real."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from listing import names_in
from pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.parallel.checkpoint import writer
from moray.parallel.checkpoint.checkpointer import Checkpointer, CommitError
from moray.parallel.checkpoint.commits import list_commits, read_tensors, verify

Events = list[tuple[str, dict[str, Any]]]
TESTS = Path(__file__).parents[2]
KILL_TEST_BYTES = 1 << 29


def sharded(step: int, rows: int = 64) -> dict[str, Tensor]:
    """A tensor cut over all ranks and one on all of them; their values tell the step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.arange(rows * 1024, dtype=torch.float32).reshape(rows, 1024) + step
    return {"w": distribute_tensor(weight, mesh, [Shard(0)]), "step": torch.tensor(step)}


def checkpointer_and_events(folder: Path, keep: int = 9) -> tuple[Checkpointer, Events]:
    events: Events = []
    return Checkpointer(folder, keep=keep, keep_every=None, on_event=lambda *event: events.append(event)), events


def save_steps(folder: Path, steps: list[int]) -> None:
    checkpointer, _ = checkpointer_and_events(folder)
    for step in steps:
        checkpointer.save(step, sharded(step), {"position": step})
    checkpointer.finish()


def load_newest(folder: Path) -> tuple[int, Events]:
    checkpointer, events = checkpointer_and_events(folder)
    state = sharded(0)
    commit = checkpointer.load(state)
    assert commit
    assert int(state["step"]) == commit.step
    truth = sharded(commit.step)["w"].to_local()  # type: ignore[attr-defined]
    assert torch.equal(state["w"].to_local(), truth)  # type: ignore[attr-defined]
    return commit.step, events


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00003.safetensors", "manifest.json"])
def test_damage_sends_all_ranks_to_the_commit_before(pool: Pool, tmp_path: Path, file: str, how: str) -> None:
    pool.run(save_steps, 4, tmp_path, [10, 20, 30])
    damage(tmp_path / "step-000000030" / file, how)
    damage(tmp_path / "step-000000020" / file, how)
    results = pool.run(load_newest, 2, tmp_path)
    assert [step for step, _ in results] == [10, 10]
    events = results[0][1]
    assert [(name, fields["step"]) for name, fields in events] == [("commit_refused", 30), ("commit_refused", 20)]
    for name, fields in events:
        (problem,) = fields["problems"]
        assert f"step-0000000{fields['step']}/{file}" in problem, name
    assert results[1][1] == []  # one report is enough


def load_none_whole(folder: Path) -> str:
    checkpointer, _ = checkpointer_and_events(folder)
    with pytest.raises(ValueError, match="no whole commit") as refusal:
        checkpointer.load(sharded(0))
    return str(refusal.value)


def test_commits_none_of_which_is_whole_never_mean_a_fresh_start(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_steps, 2, tmp_path, [10, 20])
    damage(tmp_path / "step-000000010" / "rank-00000.safetensors", "flipped")
    damage(tmp_path / "step-000000020" / "manifest.json", "missing")
    for message in pool.run(load_none_whole, 2, tmp_path):
        assert "['step-000000010', 'step-000000020']" in message


def fall_back_and_go_on(folder: Path) -> list[int]:
    checkpointer, _ = checkpointer_and_events(folder, keep=1)
    commit = checkpointer.load(sharded(0))
    assert commit
    steps = []
    for step in (20, 30):
        checkpointer.save(step, sharded(step), {})
        checkpointer.finish()
        steps.append([commit.step for commit in list_commits(folder)])
    return steps


def test_a_run_that_fell_back_replaces_what_it_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_steps, 2, tmp_path, [10, 30])
    damage(tmp_path / "step-000000030" / "rank-00001.safetensors", "flipped")
    # keep=1 counts 20, not the damaged 30 that only looks whole; then 30 is written anew.
    assert pool.run(fall_back_and_go_on, 2, tmp_path)[0] == [[20], [30]]
    assert verify(list_commits(tmp_path)[0]) == []


def fill_the_disk(folder: Path) -> tuple[Events, list[str]]:
    """Each commit takes 1 MB; between the first and the last, the disk is full."""
    checkpointer, events = checkpointer_and_events(folder / "checkpoints")
    checkpointer.save(1, sharded(1, rows=256), {})
    checkpointer.finish()
    ballast = folder / "ballast"
    if dist.get_rank() == 0:
        ballast.write_bytes(bytes(6 * 2**20 + 2**19))
    dist.barrier()
    checkpointer.save(2, sharded(2, rows=256), {})
    with pytest.raises(CommitError, match="No space left on device"):
        checkpointer.finish()
    checkpointer.save(3, sharded(3, rows=256), {})
    left = sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))
    dist.barrier()
    checkpointer.save(4, sharded(4, rows=256), {})  # waits for 3, which failed too, and does not raise
    with pytest.raises(CommitError, match="step 4 was not committed"):
        checkpointer.finish()
    if dist.get_rank() == 0:
        ballast.unlink()
    dist.barrier()
    checkpointer.save(5, sharded(5, rows=256), {})
    checkpointer.finish()
    return events, left


def test_a_full_disk_is_reported_and_the_next_save_is_the_retry(pool: Pool, small_disk: Path) -> None:
    (events, left), (events_of_1, _) = pool.run(fill_the_disk, 2, small_disk)
    assert left == ["step-000000001"]
    assert [(name, fields["step"]) for name, fields in events] == [
        ("commit", 1),
        ("commit_failed", 2),
        ("commit_failed", 3),
        ("commit_failed", 4),
        ("commit", 5),
    ]
    assert "rank-0000" in events[1][1]["error"]
    assert events_of_1 == []
    assert names_in(small_disk / "checkpoints") == ["step-000000001", "step-000000005"]
    assert [verify(commit) for commit in list_commits(small_disk / "checkpoints")] == [[], []]


def one_rank_may_not_write(folder: Path) -> tuple[Events, str]:
    checkpointer, events = checkpointer_and_events(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        checkpointer.save(1, sharded(1, rows=256), {})
        with pytest.raises(CommitError) as failure:
            checkpointer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    leftovers = names_in(folder) if dist.get_rank() == 0 else []
    assert leftovers == []
    dist.barrier()
    checkpointer.save(2, sharded(2, rows=256), {})
    checkpointer.finish()
    return events, str(failure.value)


def test_all_ranks_hear_that_one_could_not_write(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(one_rank_may_not_write, 3, tmp_path)
    for _, message in results:
        assert message.startswith("step 1 was not committed: rank 1: OSError: [Errno 27] File too large:")
        assert "rank-00001.safetensors" in message
        assert "rank 0:" not in message
    # finish() tries once more before it raises.
    assert [(name, fields["step"]) for name, fields in results[0][0]] == [
        ("commit_failed", 1),
        ("commit_failed", 1),
        ("commit", 2),
    ]


def last_commit_meets_a_gap(folder: Path, gap: Path) -> list[str]:
    """The folder is out of reach until rank 0 has been told of the failure; training goes on meanwhile."""
    names: list[str] = []

    def on_event(name: str, fields: dict[str, Any]) -> None:
        names.append(name)
        if name == "commit_failed":
            gap.rename(folder.parent)

    checkpointer = Checkpointer(folder, keep=9, keep_every=None, on_event=on_event)
    if dist.get_rank() == 0:
        folder.parent.rename(gap)
    dist.barrier()
    state = sharded(1)
    checkpointer.save(1, state, {"position": 1})
    for tensor in state.values():
        tensor.fill_(-1)
    checkpointer.finish()
    return names


def test_finish_tries_the_last_commit_again_as_it_was_saved(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    names, names_of_1 = pool.run(last_commit_meets_a_gap, 2, folder, tmp_path / "gap")
    assert (names, names_of_1) == (["commit_failed", "commit"], [])
    (commit,) = list_commits(folder)
    assert verify(commit) == []
    assert pool.run(load_newest, 2, folder)[0] == (1, [])


def test_a_failed_write_is_tried_again_by_finish(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    names: list[str] = []

    def lift_limit(name: str, fields: dict[str, Any]) -> None:
        names.append(name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpointer = Checkpointer(tmp_path, keep=9, keep_every=None, on_event=lift_limit)
    state = {"w": torch.arange(2.0**18)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        checkpointer.save(1, state, {})
        state["w"].zero_()
        checkpointer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names == ["commit_failed", "commit"]
    assert names_in(tmp_path) == ["step-000000001"]
    assert torch.equal(dict(read_tensors(list_commits(tmp_path)[0]))["w"], torch.arange(2.0**18))


def test_a_commit_appears_after_what_must_come_before_it_or_not_at_all(tmp_path: Path) -> None:
    checkpointer, events = checkpointer_and_events(tmp_path)
    seen: list[list[str]] = []

    def before() -> None:
        seen.append(names_in(tmp_path))
        if len(seen) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "rows.jsonl")
        if len(seen) == 2:
            shutil.rmtree(tmp_path)  # just before the rename

    for step in (1, 2, 3):
        checkpointer.save(step, {"w": torch.tensor([float(step)])}, {}, before)
    checkpointer.finish()
    assert [(name, fields["step"]) for name, fields in events] == [
        ("commit_failed", 1),
        ("commit_failed", 2),
        ("commit", 3),
    ]
    assert "rows.jsonl" in events[0][1]["error"]
    assert not any(name.startswith("step-") for names in seen for name in names)
    (commit,) = list_commits(tmp_path)
    assert (commit.step, verify(commit)) == (3, [])


def test_what_is_removed_while_it_is_written_is_no_loss_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole folder goes between the last byte of the commit and its manifest."""
    checkpointer, events = checkpointer_and_events(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "flush_folder", lambda path: shutil.rmtree(tmp_path / "checkpoints"))
        checkpointer.save(1, {"w": torch.zeros(4)}, {})
        checkpointer.save(2, {"w": torch.zeros(4)}, {})
    checkpointer.finish()
    assert [name for name, _ in events] in (["commit_failed", "commit"], ["commit_failed", "commit_failed", "commit"])
    assert "No such file or directory" in events[0][1]["error"]
    (commit,) = list_commits(tmp_path / "checkpoints")
    assert (commit.step, verify(commit)) == (2, [])


def test_whoever_waits_for_the_writing_thread_says_so(tmp_path: Path) -> None:
    waits = threading.Semaphore(0)
    # The writing thread goes on only once it has been waited for twice.
    checkpointer = Checkpointer(
        tmp_path,
        keep=1,
        keep_every=None,
        on_event=lambda name, fields: [waits.acquire(timeout=20) for _ in range(2)],
        on_wait=waits.release,
    )
    checkpointer.save(1, {"w": torch.zeros(1)}, {})
    checkpointer.save(2, {"w": torch.zeros(1)}, {})
    assert not waits.acquire(blocking=False)
    checkpointer.finish()
    assert not waits.acquire(blocking=False)
    assert [commit.step for commit in list_commits(tmp_path)] == [2]


def test_a_folder_that_cannot_be_made_stops_every_rank(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    pool.run(cannot_be_made, 2, tmp_path / "file" / "checkpoints")


def cannot_be_made(folder: Path) -> None:
    with pytest.raises(NotADirectoryError):
        Checkpointer(folder, keep=1, keep_every=None, on_event=lambda name, fields: None)


def start_saver(folder: Path, rank: int, world_size: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(folder), str(rank), str(world_size)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_bytes(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 50
    while not any(path.stat().st_size for path in folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"nothing was written to {pattern}"
        time.sleep(0.0005)


def test_sigkill_while_writing_leaves_nothing_but_staging(tmp_path: Path) -> None:
    process = start_saver(tmp_path / "checkpoints", 0, 1)
    try:
        wait_for_bytes(tmp_path / "checkpoints", ".generation-*/step-000000002-*/rank-00000.safetensors", process)
    finally:
        process.kill()
        process.communicate()
    names = names_in(tmp_path / "checkpoints")
    assert [name[:21] for name in names] == ["staged/step-000000002", "step-000000001"]
    (commit,) = list_commits(tmp_path / "checkpoints")
    assert commit.step == 1
    checkpointer, _ = checkpointer_and_events(tmp_path / "checkpoints")
    assert names_in(tmp_path / "checkpoints") == ["step-000000001"]
    state = {"w": torch.zeros(4)}
    loaded = checkpointer.load(state)
    assert loaded
    assert loaded.step == 1
    assert state["w"].tolist() == [0, 1, 2, 3]


def test_a_rank_killed_while_writing_fails_the_save_and_hangs_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    processes = [start_saver(folder, rank, 2) for rank in range(2)]
    try:
        wait_for_bytes(folder, ".generation-*/step-000000002-*/rank-00001.safetensors", processes[1])
        processes[1].send_signal(signal.SIGKILL)
        output, _ = processes[0].communicate(timeout=50)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert "commit_failed 2" in output
    assert "finish raised: step 2 was not committed: rank 0: RuntimeError" in output
    assert names_in(folder) == ["step-000000001"]


def save_much(folder: Path, rank: int, world_size: int) -> None:
    """A process of its own: commits step 1, then begins to write step 2, half a gigabyte a rank."""
    if world_size > 1:
        store = dist.FileStore(str(folder.parent / "rendezvous"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=50))

    def report(name: str, fields: dict[str, Any]) -> None:
        print(name, fields["step"], flush=True)

    checkpointer = Checkpointer(folder, keep=9, keep_every=None, on_event=report)
    checkpointer.save(1, {"w": torch.arange(4.0)}, {})
    checkpointer.finish()
    much = torch.zeros(KILL_TEST_BYTES, dtype=torch.uint8)
    if world_size > 1:
        much = DTensor.from_local(much, init_device_mesh("cpu", (world_size,)), [Shard(0)], run_check=False)
    checkpointer.save(2, {"w": much}, {})
    try:
        checkpointer.finish()
    except CommitError as error:
        print("finish raised:", error, flush=True)
    os._exit(0)  # the group can't be destroyed in good order without its peer


if __name__ == "__main__":
    save_much(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
