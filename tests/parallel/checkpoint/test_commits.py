from pathlib import Path

import pytest
import torch
from listing import names_in
from torch import Tensor

from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import clean, list_commits, prune, read_commit, read_tensors, verify


def state(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((3, 2), float(step)), "count": torch.tensor(step), "b": torch.arange(4)}


def commit(folder: Path, *steps: int, keep: int = 99, keep_every: int | None = None) -> None:
    checkpointer = Checkpointer(folder, keep=keep, keep_every=keep_every, on_event=lambda name, fields: None)
    for step in steps:
        checkpointer.save(step, state(step), {"position": step * 10})
    checkpointer.finish()


def steps_of(folder: Path) -> list[int]:
    return [commit.step for commit in list_commits(folder)]


def test_lists_whole_commits_oldest_first(tmp_path: Path) -> None:
    commit(tmp_path, 5, 200, 1_000_000_000)
    (tmp_path / ".staging-step-000000300-0a1b2c3d").mkdir()
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "step-000000301").mkdir()
    (tmp_path / "notes.txt").write_text("not a commit")
    assert steps_of(tmp_path) == [5, 200, 1_000_000_000]
    newest = list_commits(tmp_path)[-1]
    assert newest.path == tmp_path / "step-1000000000"
    assert newest.manifest.metadata == {"position": 10_000_000_000}
    assert verify(newest) == []


def test_no_folder_holds_no_commits(tmp_path: Path) -> None:
    assert list_commits(tmp_path / "absent") == []


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_commit_lacking_bytes_is_not_listed(tmp_path: Path, damage: str) -> None:
    commit(tmp_path, 1, 2)
    shard = tmp_path / "step-000000002" / "rank-00000.safetensors"
    found = read_commit(shard.parent)
    if damage == "missing":
        shard.unlink()
        expected = "No such file"
    else:
        with open(shard, "r+b") as file:
            file.truncate(shard.stat().st_size - 1)
        expected = f"has {shard.stat().st_size} bytes instead of {shard.stat().st_size + 1}"
    assert steps_of(tmp_path) == [1]
    (problem,) = verify(found)
    assert str(shard) in problem
    assert expected in problem


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    shard = tmp_path / "step-000000001" / "rank-00000.safetensors"
    flip_last_byte(shard)
    (found,) = list_commits(tmp_path)  # sizes agree
    (problem,) = verify(found)
    assert str(shard) in problem
    assert "sha256" in problem
    with pytest.raises(ValueError, match="sha256"):
        read_tensors(found)


def test_a_manifest_under_another_step_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000007")
    assert list_commits(tmp_path) == []
    with pytest.raises(ValueError, match=r"describes step 1, which belongs in step-000000001"):
        read_commit(tmp_path / "step-000000007")


def test_reads_tensors_by_name_in_the_order_asked(tmp_path: Path) -> None:
    commit(tmp_path, 3)
    (found,) = list_commits(tmp_path)
    read = list(read_tensors(found, ["count", "w"]))
    assert [name for name, _ in read] == ["count", "w"]
    assert all(torch.equal(tensor, state(3)[name]) for name, tensor in read)
    with pytest.raises(ValueError, match=r"no tensors named \['x', 'y'\]"):
        read_tensors(found, ["w", "x", "y"])


def test_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    commit(tmp_path, 10, 20, 30, 40, 50, 60, 70, keep=2, keep_every=30)
    assert steps_of(tmp_path) == [30, 60, 70]
    assert names_in(tmp_path) == ["step-000000030", "step-000000060", "step-000000070"]


def test_nothing_is_removed_before_its_successor_is_whole(tmp_path: Path) -> None:
    commit(tmp_path, 1, 2, 3)
    (tmp_path / "step-000000003" / "rank-00000.safetensors").unlink()
    assert prune(tmp_path, 3, keep=1, keep_every=None) == []
    assert steps_of(tmp_path) == [1, 2]


def test_commits_after_the_new_one_neither_count_nor_go(tmp_path: Path) -> None:
    commit(tmp_path, 1, 2, 9)
    assert prune(tmp_path, 2, keep=1, keep_every=None) == [1]
    assert steps_of(tmp_path) == [2, 9]


def test_clean_removes_leftovers_alone(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    for leftover in (".staging-step-000000002-00aa11bb", ".removed-step-000000000-00aa11bb"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".nfs0001").write_text("someone else's")
    clean(tmp_path)
    assert names_in(tmp_path) == [".nfs0001", "step-000000001"]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
