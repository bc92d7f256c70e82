"""The shards as others see them: tarfile, webdataset and hashlib against the index."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from version_1 import samples_of

from moray.data.dataset import Dataset
from moray.data.shards import SplitWriter

DOCUMENTS = [[10 * d + t for t in range(1, 2 + d % 4 + 1)] for d in range(1, 10)]


def test_blocks_and_shards_by_hand(make_dataset: Callable[..., Dataset]) -> None:
    # Blocks of at most 8 tokens, shards of at most 16; 9 stand alone in a block, 20 in a shard.
    lengths = [3, 5, 1, 9, 4, 4, 20, 2]
    train = make_dataset([[7] * n for n in lengths], block_tokens=8, shard_tokens=16).splits["train"]
    assert [[sample.n_tokens for sample in samples_of(shard)] for shard in train] == [[8, 1], [9], [8], [20], [2]]
    assert [[sample.n_documents for sample in samples_of(shard)] for shard in train] == [[2, 1], [1], [2], [1], [1]]
    assert (train.n_tokens, train.n_documents) == (48, 8)


def test_webdataset_reads_the_shards(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset(DOCUMENTS)
    urls = [str(Path(dataset.folder, shard.name)) for shard in dataset.splits["train"]]
    documents, names = [], []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        assert sample["tokens.npy"].dtype == np.uint16
        assert sample["ends.npy"].dtype == np.int64
        documents += [part.tolist() for part in np.split(sample["tokens.npy"], sample["ends.npy"][:-1])]
        names += sample["json"]["documents"]
    assert documents == DOCUMENTS
    assert names == [f"document-{n}" for n in range(9)]


def test_the_index_says_where_every_byte_is(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset(DOCUMENTS)
    for shard in dataset.splits["train"]:
        data = Path(dataset.folder, shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = {member.name: member for member in archive}
        assert len(members) == 3 * len(samples_of(shard))
        assert {(member.mtime, member.uid, member.uname) for member in members.values()} == {(0, 0, "")}
        for sample in samples_of(shard):
            for suffix, extent in (("tokens.npy", sample.tokens), ("ends.npy", sample.ends), ("json", sample.json)):
                member = members[f"{sample.key}.{suffix}"]
                assert (member.offset_data, member.size) == (extent.offset, extent.length)
            tokens, ends = (data[extent.offset :][: extent.length] for extent in (sample.tokens, sample.ends))
            assert sample.crc32 == zlib.crc32(tokens + ends)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        writer = SplitWriter(tmp_path / name, "train", 8, 16)
        for document in DOCUMENTS:
            writer.add(str(document[0]), np.array(document, "<u4"))
        writer.finish()
    shards = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(shards) > 1
    for shard in shards:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_document_keys_of_any_script_are_kept(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train")
    writer.add('三/"x".py', np.array([1, 2], "<u2"))
    sample = writer.finish()[0].sample(0)
    data = (tmp_path / "train-00000.tar").read_bytes()[sample.json.offset :][: sample.json.length]
    assert json.loads(data) == {"documents": ['三/"x".py']}
