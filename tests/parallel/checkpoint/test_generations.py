"""One writer ever: the newest generation, whatever an older one was just about to do; and the commits are one chain."""

import errno
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from moray.parallel.checkpoint import commits
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import list_commits, publish, read_commit, verify
from moray.parallel.checkpoint.generations import (
    SupersededError,
    check_newest,
    generation_path,
    newest_generation,
    prepare_staging,
    take_generation,
)
from moray.parallel.checkpoint.manifest import Manifest

Events = list[tuple[str, dict[str, Any]]]


def checkpointer_for(folder: Path, generation: int | None = None, events: Events | None = None) -> Checkpointer:
    noted: Events = [] if events is None else events
    return Checkpointer(
        folder, keep=9, keep_every=None, on_event=lambda *event: noted.append(event), generation=generation
    )


def save(checkpointer: Checkpointer, *steps: int, value: float = 0.0) -> None:
    for step in steps:
        checkpointer.save(step, {"w": torch.full((4,), value + step)}, {})
    checkpointer.finish()


def steps_of(folder: Path) -> list[int]:
    return [commit.step for commit in list_commits(folder)]


def test_generations_count_up_and_each_puts_an_end_to_those_before(tmp_path: Path) -> None:
    assert newest_generation(tmp_path / "absent") == 0
    assert [take_generation(tmp_path / "new"), take_generation(tmp_path / "new")] == [1, 2]
    assert take_generation(tmp_path / "new", at_least=7) == 7
    assert take_generation(tmp_path / "new", previous=7) == 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".generation-000008"]


def test_whoever_was_taken_over_cannot_go_on_and_is_told_by_whom(tmp_path: Path) -> None:
    mine = take_generation(tmp_path)
    theirs = take_generation(tmp_path)
    owner = json.loads((generation_path(tmp_path, theirs) / "owner.json").read_text())
    expected = rf"generation 1 was taken over by generation 2 \(pid {owner['pid']} on {owner['host']}, since 2"
    for attempt in (
        lambda: check_newest(tmp_path, mine),
        lambda: prepare_staging(tmp_path, mine),
        lambda: take_generation(tmp_path, previous=mine),
        lambda: checkpointer_for(tmp_path, generation=mine),
    ):
        with pytest.raises(SupersededError, match=expected):
            attempt()
    check_newest(tmp_path, theirs)


def take_many(folder: Path, times: int) -> list[int]:
    dist.barrier()
    return [take_generation(folder) for _ in range(times)]


def test_no_two_ever_take_the_same(pool: Pool, tmp_path: Path) -> None:
    taken = pool.run(take_many, 4, tmp_path, 25)
    assert all(numbers == sorted(numbers) for numbers in taken)
    everyones = [number for numbers in taken for number in numbers]
    assert len(set(everyones)) == 100
    assert newest_generation(tmp_path) == max(everyones)


def saves_of_an_old_generation(folder: Path) -> tuple[list[str], Events]:
    """Takes generation 1; another process's generation 2 comes while the second save is being written."""
    events: Events = []
    checkpointer = Checkpointer(folder, keep=9, keep_every=None, on_event=lambda *event: events.append(event))
    rank, said = dist.get_rank(), []
    checkpointer.save(1, {"w": torch.zeros(4)}, {})
    checkpointer.finish()
    dist.barrier()
    if rank == 0:
        take_generation(folder)
    dist.barrier()
    checkpointer.save(2, {"w": torch.zeros(4)}, {})
    for again in (checkpointer.finish, lambda: checkpointer.save(3, {"w": torch.zeros(4)}, {})):
        try:
            again()
            checkpointer.finish()
        except SupersededError as error:
            said.append(str(error))
    return said, events


def test_a_save_of_an_old_generation_fails_on_all_ranks_and_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    (said, events), (said_by_1, _) = pool.run(saves_of_an_old_generation, 2, tmp_path)
    assert said == said_by_1
    assert len(said) == 2
    assert "generation 1 was taken over by generation 2" in said[0]
    assert [name for name, _ in events] == ["commit"]
    assert steps_of(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".generation-000002"]


def test_a_newcomer_in_the_middle_of_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is written, the rename is next, and just then the other takes over and commits the same step."""
    old = checkpointer_for(tmp_path)
    save(old, 1)
    flush, newcomers = commits.flush_folder, []

    def take_over(path: Path) -> None:
        flush(path)
        if (path / "manifest.json").exists() and not newcomers:
            newcomers.append(checkpointer_for(tmp_path))
            newcomers[0].load({"w": torch.zeros(4)})
            save(newcomers[0], 2, value=100.0)

    monkeypatch.setattr(commits, "flush_folder", take_over)
    with pytest.raises(SupersededError, match="generation 1 was taken over by generation 2"):
        save(old, 2)
    assert [(commit.step, commit.manifest.generation) for commit in list_commits(tmp_path)] == [(1, 1), (2, 2)]
    assert [verify(commit) for commit in list_commits(tmp_path)] == [[], []]
    save(newcomers[0], 3)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_publishing_from_a_folder_that_was_moved_away_touches_nothing(tmp_path: Path) -> None:
    staging, target = tmp_path / ".generation-000001" / "step", tmp_path / "step-000000001"
    for folder in (staging, target):
        folder.mkdir(parents=True)
        (folder / "data").write_text(folder.name)
    take_generation(tmp_path)
    with pytest.raises(FileNotFoundError):
        publish(staging, target, Manifest(1, "now", {}, {}, {}))
    assert (target / "data").read_text() == target.name


def test_commits_are_a_chain_over_generations(tmp_path: Path) -> None:
    events: Events = []
    save(checkpointer_for(tmp_path, events=events), 1, 2)
    again = checkpointer_for(tmp_path, events=events)
    again.load({"w": torch.zeros(4)})
    save(again, 3, 4)
    found = [commit.manifest for commit in list_commits(tmp_path)]
    assert [manifest.generation for manifest in found] == [1, 1, 2, 2]
    assert [manifest.parent for manifest in found] == [None, *(manifest.digest for manifest in found[:-1])]
    told = [(fields["digest"], fields["parent"]) for name, fields in events if name == "commit"]
    assert told == [(manifest.digest, manifest.parent) for manifest in found]


def test_a_line_that_was_given_up_is_neither_skipped_nor_continued(tmp_path: Path) -> None:
    """Generation 1 commits 1 to 4; 3 and 4 are damaged, so 2 goes on from 2; then the damage has passed."""
    save(checkpointer_for(tmp_path), 1, 2, 3, 4)
    for step in (3, 4):
        (tmp_path / f"step-00000000{step}" / "manifest.json").rename(tmp_path / f"aside-{step}")
    events: Events = []
    second = checkpointer_for(tmp_path, events=events)
    loaded = second.load({"w": torch.zeros(4)})
    assert loaded
    assert loaded.step == 2
    for step in (3, 4):
        (tmp_path / f"aside-{step}").rename(tmp_path / f"step-00000000{step}" / "manifest.json")
    save(second, 3, value=100.0)
    of_step_3 = read_commit(tmp_path / "step-000000003")
    assert (of_step_3.manifest.generation, of_step_3.manifest.parent) == (2, loaded.manifest.digest)
    assert steps_of(tmp_path) == [1, 2, 3], "4 was made by a generation before 3's"
    third = checkpointer_for(tmp_path)
    state = {"w": torch.zeros(4)}
    resumed = third.load(state)
    assert resumed
    assert (resumed.step, state["w"].tolist()) == (3, [103.0] * 4)
    save(third, 7)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-00000000{step}" for step in (1, 2, 3, 7)]
    assert ("commit_refused", 4) in [(name, fields.get("step")) for name, fields in events]


def test_a_folder_that_is_removed_while_the_run_goes_on_is_made_again(tmp_path: Path) -> None:
    checkpointer = checkpointer_for(tmp_path / "checkpoints")
    save(checkpointer, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    save(checkpointer, 2)
    assert steps_of(tmp_path / "checkpoints") == [2]


def fail_to_read(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """The newest manifest answers ESTALE, as NFS does of a file that was replaced."""
    read, left = Path.read_bytes, [times]

    def read_or_fail(path: Path) -> bytes:
        if path.match("step-000000002/manifest.json") and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)


def test_an_error_of_reading_that_passes_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpointer_for(tmp_path), 1, 2)
    events: Events = []
    again = checkpointer_for(tmp_path, events=events)
    fail_to_read(monkeypatch, times=1)
    loaded = again.load({"w": torch.zeros(4)})
    assert loaded
    assert (loaded.step, events) == (2, [])


def test_an_error_of_reading_that_stays_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a good commit passed over for an older one, nor does anybody hear that it is damaged."""
    save(checkpointer_for(tmp_path), 1, 2)
    events: Events = []
    again = checkpointer_for(tmp_path, events=events)
    fail_to_read(monkeypatch, times=float("inf"))
    with pytest.raises(OSError, match=re.escape("Stale file handle")):
        again.load({"w": torch.zeros(4)})
    assert events == []
    assert (tmp_path / "step-000000002" / "manifest.json").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_a_commit_of_an_older_format_is_read(tmp_path: Path, number: int) -> None:
    """The first had no generation and no parent, and both had chunk, file and key in each tensor."""
    save(checkpointer_for(tmp_path), 1)
    path = tmp_path / "step-000000001" / "manifest.json"
    body = json.loads(path.read_text()) | {"format": number}
    del body["grids"], body["holders"], body["sha256"]
    chunk = {"file": "rank-00000.safetensors", "key": "w", "offsets": [0], "sizes": [4]}
    body["tensors"] = {"w": {"shape": [4], "dtype": "F32", "chunks": [chunk]}}
    if number == 1:
        del body["generation"], body["parent"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, **body}))
    again = checkpointer_for(tmp_path)
    state = {"w": torch.zeros(4)}
    loaded = again.load(state)
    assert loaded
    assert torch.equal(state["w"], torch.full((4,), 1.0))
    assert loaded.manifest.digest == digest
    save(again, 2)
    assert read_commit(tmp_path / "step-000000002").manifest.parent == loaded.manifest.digest
