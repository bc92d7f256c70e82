"""Rows of dialogues, by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dialogues import make_dialogues

from moray import UserError
from moray.data.dataset import Dataset
from moray.data.rows import DialogueRows, rows_of
from moray.data.stream import Stream, evaluation_batches

CACHE = 1 << 20


def dialogue_rows(dataset: Dataset, seq_len: int, long_dialogues: str = "cut") -> DialogueRows:
    rows = rows_of(dataset, "train", seq_len, CACHE, long_dialogues)  # type: ignore[arg-type]
    assert isinstance(rows, DialogueRows)
    return rows


def test_a_row_by_hand(tmp_path: Path) -> None:
    """The first answer token and the closing one are targets; headers, what follows a turn and neighbours are not."""
    dataset = make_dialogues(tmp_path / "data", [([1, 11, 12, 13, 14], ".u.tt"), ([1, 21, 22], ".ut")])
    tokens, targets, positions, documents = dialogue_rows(dataset, 10).row(0, 0).tolist()
    assert tokens == [1, 11, 12, 13, 14, 1, 21, 22, 0, 0]
    assert targets == [-100, -100, 13, 14, -100, -100, 22, -100, -100, -100]
    assert positions == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert documents == [0, 0, 0, 0, 0, 1, 1, 1, -1, -1]


def test_turns_are_dropped_from_the_left_and_the_beginning_stays(tmp_path: Path) -> None:
    """What stands before the first user's turn (BOS and system prompt) stays; what then fits from a user's turn on."""
    long = [1, 90, 11, 12, 13, 14, 15, 16], "..ut.ut."
    dataset = make_dialogues(tmp_path / "data", [long, ([1, 21, 22], ".ut")])
    rows = dialogue_rows(dataset, 6)
    assert rows.row(0, 0)[:3].tolist() == [
        [1, 90, 14, 15, 16, 0],
        [-100, -100, 15, -100, -100, -100],
        [0, 1, 2, 3, 4, 0],
    ]
    assert (rows.fill.n_cut, rows.fill.n_left_out, rows.fill.n_dialogues) == (1, 0, 2)
    left = dialogue_rows(dataset, 6, "drop")
    assert left.counts.tolist() == [1]
    assert (left.fill.n_cut, left.fill.n_left_out, left.fill.n_dialogues) == (0, 1, 1)


def test_a_row_without_a_target_does_not_exist(tmp_path: Path) -> None:
    """TRL 6668, 3927: prompts that fill a row, losses of 0. Where only a user's last turn would fit, none is left."""
    only_prompt = [1, 11, 12, 13, 14, 15, 16], ".u...t."
    asks_last = [1, 11, 12, 13, 14, 15, 16, 17], ".ut...u."
    dataset = make_dialogues(tmp_path / "data", [only_prompt, asks_last, ([1, 21, 22], ".ut")])
    rows = dialogue_rows(dataset, 4)
    assert rows.counts.tolist() == [1]
    assert rows.row(0, 0)[0].tolist() == [1, 21, 22, 0]
    assert rows.fill.n_left_out == 2
    assert str(rows.fill) == (
        "1 dialogues in 1 rows of 4 tokens, 75.0% filled; 0 without their first turns and 2 left out as too long"
    )


def test_no_dialogue_fits(tmp_path: Path) -> None:
    dataset = make_dialogues(tmp_path / "data", [([1, 11, 12, 13, 14], ".u.tt"), ([1, 11, 12, 13], ".u.t")])
    with pytest.raises(UserError, match=r"train.seq_len=3 is under every dialogue .* whose shortest has 4 tokens"):
        dialogue_rows(dataset, 3)


def test_prompts_are_no_dialogues(tmp_path: Path) -> None:
    dataset = make_dialogues(tmp_path / "data", [([1, 2, 3], ".ut")], kind="prompts")
    with pytest.raises(UserError, match=r"holds prompts"):
        rows_of(dataset, "train", 4, CACHE, "cut")


def random_dialogues(count: int) -> list[tuple[list[int], str]]:
    draw = np.random.default_rng(0)
    each = []
    for number in range(count):
        n = int(draw.integers(3, 40))
        turn = int(draw.integers(2, n))
        tokens = [1, *(100 + 50 * number + i for i in range(1, n))]
        each.append((tokens, ".u" + "." * (turn - 2) + "t" * (n - turn)))
    return each


def test_an_epoch_has_every_dialogue_once_whatever_the_shards_and_ranks(tmp_path: Path) -> None:
    dialogues = random_dialogues(100)
    dataset = make_dialogues(tmp_path / "data", dialogues, block_tokens=64, shard_tokens=500)
    assert len(dataset.splits["train"]) > 2
    dataset.verify()
    streams = [
        Stream(dataset, "train", seq_len=64, global_batch=2, seed=3, lanes=lanes, cache_bytes=300)
        for lanes in (range(2), [0], [1])
    ]
    found = []
    for n in range(streams[0].sequences_per_epoch // 2):
        whole, *parts = (stream.batch(n) for stream in streams)
        assert torch.equal(whole.tokens_BT, torch.cat([part.tokens_BT for part in parts]))
        for tokens, targets, documents in zip(whole.tokens_BT, whole.targets_BT, whole.documents_BT, strict=True):
            assert (targets != -100).any()
            for document in range(int(documents.max()) + 1):
                found.append(tokens[documents == document].tolist())
    missing = [tokens for tokens, _ in dialogues if tokens not in found]
    # An odd row is in the next batch, with the next epoch's first one.
    rest = streams[0].batch(streams[0].sequences_per_epoch // 2) if streams[0].sequences_per_epoch % 2 else None
    if rest is not None:
        documents = rest.documents_BT[0]
        found += [rest.tokens_BT[0][documents == i].tolist() for i in range(int(documents.max()) + 1)]
        missing = [tokens for tokens, _ in dialogues if tokens not in found]
    assert not missing
    assert len(found) == 100


def test_validation_reads_each_row_once(tmp_path: Path) -> None:
    dataset = make_dialogues(tmp_path / "data", [([1, 2, 3], ".ut")], random_dialogues(30), shard_tokens=300)
    batches = list(evaluation_batches(dataset, "validation", seq_len=64, global_batch=4, lanes=range(4)))
    tokens = sum(int((batch.documents_BT >= 0).sum()) for batch in batches)
    assert tokens == sum(len(tokens) for tokens, _ in random_dialogues(30))
    targets = sum(int((batch.targets_BT != -100).sum()) for batch in batches)
    assert targets == sum(letters.count("t") for _, letters in random_dialogues(30))


def test_a_mask_that_was_damaged(tmp_path: Path) -> None:
    dataset = make_dialogues(tmp_path / "data", [([1, 11, 12], ".ut")])
    shard = dataset.splits["train"][0]
    mask = shard.sample(0).mask
    assert mask is not None
    path = Path(dataset.folder, shard.name)
    content = bytearray(path.read_bytes())
    content[mask.offset + mask.length - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the checksum differs from the index"):
        dialogue_rows(dataset, 4).row(0, 0)
