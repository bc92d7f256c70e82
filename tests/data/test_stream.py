"""Batches against rows written out by hand, and law 2: the same lanes for every world size and after every restart."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from version_1 import samples_of

from moray.data.blocks import FIRST, BlockReader
from moray.data.dataset import Dataset
from moray.data.mixture import Mixture, Phase
from moray.data.order import Order, Places, sequence_counts
from moray.data.stream import Batch, Stream, evaluation_batches

MakeDataset = Callable[..., Dataset]

# Nine documents; the ids say where a token is from: document 3's second token is 32.
DOCUMENTS = [[10 * d + t for t in range(1, 2 + d % 4 + 1)] for d in range(1, 10)]


def lanes_of(batch: Batch) -> torch.Tensor:
    return torch.stack([batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT])


def test_rows_by_hand(make_dataset: MakeDataset) -> None:
    # Blocks of at most 8 tokens: [11 12 13 21 22 23 24] [31 32 33 34 35] in one shard of 12 tokens.
    dataset = make_dataset([[11, 12, 13], [21, 22, 23, 24], [31, 32, 33, 34, 35]], shard_tokens=100)
    batches = list(evaluation_batches(dataset, "train", seq_len=5, global_batch=2, lanes=range(2)))
    assert [(batch.step, batch.first) for batch in batches] == [(0, 0), (1, 2)]
    x = -100
    assert batches[0].tokens_BT.tolist() == [[11, 12, 13, 21, 22], [23, 24, 31, 32, 33]]
    assert batches[0].targets_BT.tolist() == [[12, 13, x, 22, 23], [24, x, 32, 33, 34]]
    assert batches[0].positions_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batches[0].documents_BT.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    # The third row has one target left, 35; the fourth lane is beyond the end.
    assert batches[1].tokens_BT.tolist() == [[34, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batches[1].targets_BT.tolist() == [[35, x, x, x, x], [x, x, x, x, x]]
    assert batches[1].positions_BT.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batches[1].documents_BT.tolist() == [[0, -1, -1, -1, -1], [-1, -1, -1, -1, -1]]
    assert all(tensor.dtype == torch.int64 for tensor in lanes_of(batches[0]))


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 100])
def test_every_token_with_a_predecessor_is_a_target_once_an_epoch(make_dataset: MakeDataset, seq_len: int) -> None:
    dataset = make_dataset(DOCUMENTS)
    assert len(dataset.splits["train"]) > 1
    pairs = Counter(pair for document in DOCUMENTS for pair in pairwise(document))
    stream = Stream(dataset, "train", seq_len=seq_len, global_batch=1, seed=3, lanes=range(1))
    for epoch in range(2):
        seen: Counter[tuple[int, int]] = Counter()
        for n in range(stream.sequences_per_epoch):
            batch = stream.batch(epoch * stream.sequences_per_epoch + n)
            valid = batch.targets_BT != -100
            seen.update(zip(batch.tokens_BT[valid].tolist(), batch.targets_BT[valid].tolist(), strict=True))
        assert seen == pairs


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lanes_are_the_same_for_every_world_size(make_dataset: MakeDataset, ranks: int) -> None:
    dataset = make_dataset(DOCUMENTS)

    def stream(lanes: Sequence[int]) -> Stream:
        return Stream(dataset, "train", seq_len=3, global_batch=4, seed=1, lanes=lanes)

    one_at_a_time = Stream(dataset, "train", seq_len=3, global_batch=1, seed=1, lanes=range(1))
    share = 4 // ranks
    parts = [stream(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    assert torch.equal(stream(range(1, 4, 2)).batch(3).tokens_BT, stream(range(4)).batch(3).tokens_BT[1::2])
    assert one_at_a_time.sequences_per_epoch % 4, "batches must straddle epochs here"
    for n in range(8):
        joined = torch.cat([lanes_of(part.batch(n)) for part in parts], dim=1)
        singly = torch.cat([lanes_of(one_at_a_time.batch(4 * n + lane)) for lane in range(4)], dim=1)
        assert torch.equal(joined, singly)
        assert {part.batch(n).first for part in parts} == {4 * n}


def of_two(make_dataset: MakeDataset) -> tuple[list[Dataset], Mixture]:
    """Sources whose tokens tell them apart, and a phase that begins within a batch of 8."""
    datasets = [
        make_dataset(DOCUMENTS, name="a"),
        make_dataset([[500 + t for t in d] for d in DOCUMENTS[:5]], name="b"),
    ]
    return datasets, Mixture([Phase(0, (3072, 1024)), Phase(20, (1024, 3072))], seed=1)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_lanes_of_a_mixture_are_the_same_for_every_world_size(make_dataset: MakeDataset, ranks: int) -> None:
    datasets, mixture = of_two(make_dataset)
    share = 8 // ranks
    parts = [
        Stream(
            datasets,
            "train",
            seq_len=3,
            global_batch=8,
            seed=1,
            lanes=range(r * share, r * share + share),
            mixture=mixture,
        )
        for r in range(ranks)
    ]
    singly = Stream(datasets, "train", seq_len=3, global_batch=1, seed=1, lanes=[0], mixture=mixture)
    for n in (5, 0, 2, 40):
        joined = torch.cat([lanes_of(part.batch(n)) for part in parts], dim=1)
        assert torch.equal(joined, torch.cat([lanes_of(singly.batch(8 * n + lane)) for lane in range(8)], dim=1))


def test_a_mixture_takes_each_source_in_the_order_that_it_has_alone(make_dataset: MakeDataset) -> None:
    datasets, mixture = of_two(make_dataset)
    mixed = Stream(datasets, "train", seq_len=3, global_batch=8, seed=1, lanes=range(8), mixture=mixture)
    rows = torch.cat([lanes_of(mixed.batch(n)) for n in range(10)], dim=1)
    is_second = (rows[0] >= 500).any(1)
    for dataset, mine in zip(datasets, (rows[:, ~is_second], rows[:, is_second]), strict=True):
        n = mine.shape[1]
        assert n > len(DOCUMENTS), "more than an epoch"
        alone = Stream(dataset, "train", seq_len=3, global_batch=n, seed=1, lanes=range(n))
        assert torch.equal(mine, lanes_of(alone.batch(0)))


@pytest.mark.parametrize("seq_len", [1, 3, 7, 64])
def test_rows_formed_at_once_are_those_formed_one_by_one(make_dataset: MakeDataset, seq_len: int) -> None:
    """Two epochs and more, and a batch that straddles them, against tokens read and marked one after another."""
    dataset = make_dataset(DOCUMENTS, block_tokens=16, shard_tokens=20)
    stream = Stream(dataset, "train", seq_len=seq_len, global_batch=5, seed=3, lanes=range(5))
    counts = sequence_counts(dataset.splits["train"].shards["n_tokens"], seq_len)
    order, reader = Order(counts, 3), BlockReader(dataset, "train")
    for n in range(2 * int(counts.sum()) // 5 + 2):
        places = order.locate(np.arange(5 * n, 5 * n + 5))
        each = [one_row(*reader.read(s, i * seq_len, (i + 1) * seq_len + 1), seq_len) for s, i in pairs_of(places)]
        assert torch.equal(lanes_of(stream.batch(n)), torch.tensor(each).transpose(0, 1))


def pairs_of(places: Places) -> list[tuple[int, int]]:
    return list(zip(places.shards.tolist(), places.sequences.tolist(), strict=True))


def one_row(tokens: np.ndarray, flags: np.ndarray, seq_len: int) -> list[list[int]]:
    row: list[list[int]] = [[], [], [], []]
    position = document = 0
    for at in range(seq_len):
        if at >= len(tokens) - 1:
            column = (0, -100, 0, -1)
        else:
            begins = at > 0 and flags[at] == FIRST
            position, document = (0, document + 1) if begins else (position + (at > 0), document)
            column = (int(tokens[at]), -100 if flags[at + 1] == FIRST else int(tokens[at + 1]), position, document)
        for values, value in zip(row, column, strict=True):
            values.append(value)
    return row


def test_a_restart_at_any_batch_goes_on_the_same(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    stream = Stream(dataset, "train", seq_len=3, global_batch=2, seed=1, lanes=range(2))
    iterator = stream.batches(0)
    whole = [next(iterator) for _ in range(12)]
    iterator.close()
    for start in range(11):
        again = Stream(dataset, "train", seq_len=3, global_batch=2, seed=1, lanes=range(2)).batches(start)
        for expected in whole[start : start + 2]:
            batch = next(again)
            assert batch.step == expected.step
            assert torch.equal(lanes_of(batch), lanes_of(expected))
        again.close()


def test_a_global_batch_larger_than_the_epoch(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([[1, 2, 3], [4, 5]])
    stream = Stream(dataset, "train", seq_len=10, global_batch=5, seed=0, lanes=range(5))
    assert stream.sequences_per_epoch == 1
    assert stream.batch(3).tokens_BT.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0, 0, 0]] * 5


def test_evaluation_covers_the_split_for_any_number_of_ranks(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([[1, 2]], validation=DOCUMENTS)
    pairs = Counter(pair for document in DOCUMENTS for pair in pairwise(document))
    for ranks in (1, 2, 4):
        share = 4 // ranks
        seen: Counter[tuple[int, int]] = Counter()
        lengths = set()
        for rank in range(ranks):
            lanes = range(rank * share, (rank + 1) * share)
            batches = list(evaluation_batches(dataset, "validation", seq_len=4, global_batch=4, lanes=lanes))
            lengths.add(len(batches))
            for batch in batches:
                valid = batch.targets_BT != -100
                seen.update(zip(batch.tokens_BT[valid].tolist(), batch.targets_BT[valid].tolist(), strict=True))
        assert seen == pairs
        assert len(lengths) == 1


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moray-prefetch"]


def test_no_thread_stays_behind(make_dataset: MakeDataset) -> None:
    stream = Stream(make_dataset(DOCUMENTS), "train", seq_len=3, global_batch=2, seed=1, lanes=range(2))
    for batch in stream.batches(4):
        assert prefetchers()
        if batch.step == 6:
            break
    assert not prefetchers()


def damage(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_an_altered_shard_is_named_from_the_prefetching_thread_too(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    shard = dataset.splits["train"][1]
    sample = shard.sample(1)
    damage(Path(dataset.folder, shard.name), sample.tokens.offset + sample.tokens.length - 1)
    stream = Stream(dataset, "train", seq_len=3, global_batch=2, seed=1, lanes=range(2))
    place = f"{shard.name}, sample {sample.key}, byte {sample.tokens.offset}: the checksum differs"
    with pytest.raises(ValueError, match=place):
        list(zip(stream.batches(0), range(100), strict=False))
    assert not prefetchers()


def test_a_shard_cut_short_while_training_is_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    shard = dataset.splits["train"][0]
    sample = samples_of(shard)[-1]
    cut = sample.tokens.offset + 3
    path = Path(dataset.folder, shard.name)
    path.write_bytes(path.read_bytes()[:cut])
    stream = Stream(dataset, "train", seq_len=3, global_batch=2, seed=1, lanes=range(2))
    with pytest.raises(ValueError, match=f"{shard.name}, sample {sample.key}, byte {cut}: the file ends"):
        [stream.batch(n) for n in range(100)]
    path.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}.*missing"):
        [Stream(dataset, "train", seq_len=3, global_batch=9, seed=1, lanes=range(9)).batch(0)]


def test_a_shard_that_is_there_a_moment_later_is_no_damage(make_dataset: MakeDataset) -> None:
    """As on storage that many nodes share, where one of them may see a file late."""
    dataset = make_dataset(DOCUMENTS)
    path = Path(dataset.folder, dataset.splits["train"][0].name)
    reader = BlockReader(dataset, "train")
    expected = BlockReader(dataset, "train").read(0, 0, 3)
    path.rename(path.with_suffix(".late"))
    threading.Timer(0.1, path.with_suffix(".late").rename, [path]).start()
    tokens, first = reader.read(0, 0, 3)
    assert (tokens.tolist(), first.tolist()) == (expected[0].tolist(), expected[1].tolist())


def test_the_cache_stays_within_its_bound_and_changes_nothing(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(DOCUMENTS)
    small, large = BlockReader(dataset, "train", cache_bytes=50), BlockReader(dataset, "train")
    for number, shard in enumerate(dataset.splits["train"]):
        for start in range(shard.n_tokens):
            results = [reader.read(number, start, start + 9) for reader in (small, large)]
            for ours, theirs in zip(*results, strict=True):
                assert ours.tolist() == theirs.tolist()
            held = sum(block.nbytes for block in small._cache.values())
            assert held == small._cached_bytes <= 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"split='test'.*\['train', 'validation'\]"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"lanes": range(2, 6)}, r"lanes=range\(2, 6\).*range\(4\)"),
        ({"lanes": range(0)}, "lanes"),
    ],
)
def test_bad_settings_are_named(make_dataset: MakeDataset, changes: dict, message: str) -> None:
    settings = {"split": "train", "seq_len": 4, "global_batch": 4, "lanes": range(4)} | changes
    dataset, split = make_dataset(DOCUMENTS), settings.pop("split")
    with pytest.raises(ValueError, match=message):
        Stream(dataset, split, seed=0, **settings)
    with pytest.raises(ValueError, match=message):
        evaluation_batches(dataset, split, **settings)
