"""A dataset opens as it was written, from anywhere, or says what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from version_1 import make_version_1, samples_of, write_version_1

from moray.data.dataset import Dataset
from moray.data.index import SAMPLE, SHARD, GrowingArray
from moray.data.stream import Stream

MakeDataset = Callable[..., Dataset]
DOCUMENTS = [[n, n + 1, n + 2] for n in range(20)]


def edit(dataset: Dataset, **changes: object) -> None:
    path = Path(dataset.folder, "index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(DOCUMENTS)
    expected = [samples_of(shard) for shard in dataset.splits["train"]]
    shutil.move(dataset.folder, tmp_path / "elsewhere")
    moved = Dataset.open(tmp_path / "elsewhere")
    assert moved.fingerprint == dataset.fingerprint
    assert [samples_of(shard) for shard in moved.splits["train"]] == expected
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


def test_an_older_index_is_the_same_data(make_dataset: MakeDataset) -> None:
    """A run that was trained with it goes on with data prepared anew, and the other way round."""
    dataset = make_dataset(DOCUMENTS)
    index = make_version_1(Path(dataset.folder))
    older = Dataset.open(dataset.folder)
    older.verify()
    assert older.fingerprint == dataset.fingerprint == index["fingerprint"]
    assert list(older.splits) == list(dataset.splits)
    for name, split in older.splits.items():
        assert len(split) == len(dataset.splits[name]) == len(index["splits"][name])
        assert [samples_of(shard) for shard in split] == [samples_of(shard) for shard in dataset.splits[name]]
        assert [(s.name, s.size, s.sha256) for s in split] == [(s.name, s.size, s.sha256) for s in dataset.splits[name]]
    batches = [
        Stream(data, "train", seq_len=4, global_batch=3, seed=0, lanes=range(3)).batch(5) for data in (older, dataset)
    ]
    assert batches[0].tokens_BT.tolist() == batches[1].tokens_BT.tolist()


def test_an_index_that_was_changed(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    edit(dataset, vocab_size=7)
    with pytest.raises(ValueError, match=r"index.json is damaged: its content does not match its digest"):
        Dataset.open(dataset.folder)
    edit(dataset, version=4)
    with pytest.raises(ValueError, match=r"has version 4, this moray reads versions up to 3; use the moray that"):
        Dataset.open(dataset.folder)
    index = Path(dataset.folder, "index.json")
    index.write_text(index.read_text()[:100])
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        Dataset.open(dataset.folder)


def test_an_older_index_that_was_changed(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    index = make_version_1(Path(dataset.folder))
    edit(dataset, vocab_size=7)
    with pytest.raises(ValueError, match=r"index.json is damaged: its content does not match its fingerprint"):
        Dataset.open(dataset.folder)
    del index["splits"]["train"][0]["sha256"]
    write_version_1(Path(dataset.folder), index)
    with pytest.raises(ValueError, match=r"index.json is no index of version 1"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize("name", ["train.shards.npy", "train.samples.npy"])
def test_arrays_that_were_changed(make_dataset: MakeDataset, name: str) -> None:
    """What is missing or has another form is told by every worker, and a single byte by the one that verifies."""
    dataset = make_dataset(DOCUMENTS)
    path = Path(dataset.folder, name)
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ValueError, match=rf"{name} is damaged: its content does not match index.json"):
        Dataset.open(dataset.folder).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Dataset.open(dataset.folder)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=f"{name} is damaged: it holds float64"):
        Dataset.open(dataset.folder)
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Dataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Dataset.open(dataset.folder)


def test_opening_does_not_grow_with_the_data(make_dataset: MakeDataset) -> None:
    """25 million samples, 1.6 GiB of records, open without being read: so no page of them belongs to the process."""
    folder = Path(make_dataset(DOCUMENTS).folder)
    shards = np.zeros(100_000, SHARD)
    shards["n_tokens"], shards["end"] = 1 << 24, np.arange(1, 100_001) * 256
    np.save(folder / "train.shards.npy", shards)
    with open(folder / "train.samples.npy", "wb") as file:  # with a hole where the records are
        header = {"descr": SAMPLE.descr, "fortran_order": False, "shape": (25_600_000,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 25_600_000 * SAMPLE.itemsize)
    before = own_memory()
    stream = Stream(Dataset.open(folder), "train", seq_len=4096, global_batch=64, seed=0, lanes=range(64))
    assert stream.sequences_per_epoch == 100_000 * 4096
    assert len(stream._sources[0].rows._reader._split[99_999].starts) == 257
    for n in range(0, stream.sequences_per_epoch // 64, 1 << 16):
        stream._sources[0].order.locate(np.arange(64 * n, 64 * (n + 1)))
    assert own_memory() - before < 100e6


def own_memory() -> int:
    """Bytes of this process that it shares with no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def test_an_array_grows_in_its_file(tmp_path: Path) -> None:
    array = GrowingArray(tmp_path / "a.npy", np.dtype([("a", "<i8"), ("b", "S4")]))
    assert len(array.finish()) == 0
    array = GrowingArray(tmp_path / "a.npy", np.dtype([("a", "<i8"), ("b", "S4")]))
    for number in range(1000):
        array.append((number, b"%d" % number))
    array.finish()
    records = np.load(tmp_path / "a.npy")
    assert records["a"].tolist() == list(range(1000))
    assert records["b"].tolist() == [b"%d" % number for number in range(1000)]


def test_shards_of_another_size(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    shard = dataset.splits["train"][1]
    path, data = Path(dataset.folder, shard.name), Path(dataset.folder, shard.name).read_bytes()
    path.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=f"{shard.name} ends at byte 1000 of {len(data)}"):
        Dataset.open(dataset.folder).verify()
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=f"{shard.name} goes on after its end, byte {len(data)}"):
        Dataset.open(dataset.folder).verify()
    path.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        Dataset.open(dataset.folder).verify()


def test_a_model_or_a_run_that_does_not_fit(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    dataset.check_vocabulary(60000)
    with pytest.raises(ValueError, match=r"holds token 59999, beyond the model's vocab_size=6400; set .*=60000,"):
        dataset.check_vocabulary(6400)
    dataset.check_fingerprint(dataset.fingerprint)
    with pytest.raises(ValueError, match=f"has fingerprint {dataset.fingerprint}, but this run was trained on abc"):
        dataset.check_fingerprint("abc")
