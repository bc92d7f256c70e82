"""A dataset opens as it was written, from anywhere, or says what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from moray.data.dataset import Dataset, fingerprint_of
from moray.data.stream import Stream

MakeDataset = Callable[..., Dataset]
DOCUMENTS = [[n, n + 1, n + 2] for n in range(20)]


def edit(dataset: Dataset, **changes: object) -> None:
    path = Path(dataset.folder, "index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(DOCUMENTS)
    shutil.move(dataset.folder, tmp_path / "elsewhere")
    moved = Dataset.open(tmp_path / "elsewhere")
    assert moved.fingerprint == dataset.fingerprint
    assert moved.splits == dataset.splits
    shutil.rmtree(tmp_path / "elsewhere")
    assert make_dataset([*DOCUMENTS[:-1], [9, 9, 9]]).fingerprint != dataset.fingerprint


def test_a_dataset_behind_a_url(make_dataset: MakeDataset) -> None:
    local = make_dataset(DOCUMENTS)
    memory = fsspec.filesystem("memory")
    memory.put(local.folder, "/remote-dataset", recursive=True)
    try:
        remote = Dataset.open("memory://remote-dataset")
        ours, theirs = (
            Stream(dataset, "train", seq_len=4, global_batch=3, seed=0, lanes=range(3)).batch(5)
            for dataset in (local, remote)
        )
        assert ours.targets_BT.tolist() == theirs.targets_BT.tolist()
    finally:
        memory.rm("/remote-dataset", recursive=True)


def test_missing_and_unfinished_folders(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; make it with `moray prepare SOURCE --out"):
        Dataset.open(tmp_path / "nowhere")
    (tmp_path / "killed.moray-unfinished").mkdir()
    with pytest.raises(ValueError, match=r"killed is unfinished.*run `moray prepare` again"):
        Dataset.open(tmp_path / "killed")
    dataset = make_dataset(DOCUMENTS)
    Path(dataset.folder, "index.json").unlink()
    with pytest.raises(ValueError, match="not a finished dataset; run `moray prepare` again"):
        Dataset.open(dataset.folder)


def test_an_index_that_was_changed(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    edit(dataset, vocab_size=7)
    with pytest.raises(ValueError, match=r"index.json is damaged: its content does not match its fingerprint"):
        Dataset.open(dataset.folder)
    edit(dataset, version=2)
    with pytest.raises(ValueError, match="has version 2, this moray reads version 1"):
        Dataset.open(dataset.folder)
    index = Path(dataset.folder, "index.json")
    index.write_text(index.read_text()[:100])
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        Dataset.open(dataset.folder)


def test_shards_of_another_size(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    shard = dataset.splits["train"].shards[1]
    path, data = Path(dataset.folder, shard.name), Path(dataset.folder, shard.name).read_bytes()
    path.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=f"{shard.name} ends at byte 1000 of {len(data)}"):
        Dataset.open(dataset.folder)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=f"{shard.name} goes on after its end, byte {len(data)}"):
        Dataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        Dataset.open(dataset.folder)


def test_a_model_or_a_run_that_does_not_fit(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    dataset.check_vocabulary(60000)
    with pytest.raises(ValueError, match=r"holds token 59999, beyond the model's vocab_size=6400; set .*=60000,"):
        dataset.check_vocabulary(6400)
    dataset.check_fingerprint(dataset.fingerprint)
    with pytest.raises(ValueError, match=f"has fingerprint {dataset.fingerprint}, but this run was trained on abc"):
        dataset.check_fingerprint("abc")


def test_the_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1}) != fingerprint_of({"a": 1, "b": 3})
