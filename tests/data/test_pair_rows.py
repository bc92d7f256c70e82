"""Rows of pairs, by hand: document i of the chosen row and of the rejected one are the same pair."""

from pathlib import Path

import numpy as np
import torch
from dialogues import make_dialogues

from moray.data.dataset import Dataset
from moray.data.rows import DialogueRows, rows_of
from moray.data.stream import Stream, evaluation_batches

Dialogue = tuple[list[int], str]
LAST = ([1, 2, 3], ".ut"), ([1, 2, 4, 5], ".utt")


def pair_rows(dataset: Dataset, seq_len: int, long_dialogues: str = "cut") -> DialogueRows:
    rows = rows_of(dataset, "train", seq_len, 1 << 20, long_dialogues)  # type: ignore[arg-type]
    assert isinstance(rows, DialogueRows)
    return rows


def make_pairs(folder: Path, *dialogues: Dialogue, **sizes: int) -> Dataset:
    return make_dialogues(folder, dialogues, LAST, kind="preference", **sizes)


def test_a_lane_by_hand(tmp_path: Path) -> None:
    """Packed by the longer side; what follows the shorter one is padding, or the next pair where that one ends."""
    first = ([1, 11, 12, 13], ".u.t"), ([1, 11, 12, 14, 15, 16], ".u.ttt")
    second = ([1, 21, 22, 23], ".utt"), ([1, 21, 24], ".ut")
    row = pair_rows(make_pairs(tmp_path / "data", *first, *second), 11).row(0, 0)
    assert row.shape == (4, 2, 11)
    (chosen, rejected), targets, positions, documents = row.tolist()
    assert chosen == [1, 11, 12, 13, 1, 21, 22, 23, 0, 0, 0]
    assert rejected == [1, 11, 12, 14, 15, 16, 1, 21, 24, 0, 0]
    assert targets[0] == [-100, -100, 13, -100, -100, 22, 23, -100, -100, -100, -100]
    assert targets[1] == [-100, -100, 14, 15, 16, -100, -100, 24, -100, -100, -100]
    assert positions[1] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0]
    assert documents == [[0] * 4 + [1] * 4 + [-1] * 3, [0] * 6 + [1] * 3 + [-1] * 2]


def test_both_of_a_pair_are_cut_alike_and_no_answer_ever(tmp_path: Path) -> None:
    """TRL 6548: cutting by the longer side emptied the shorter one's answer."""
    asked, told = [1, 90, 11, 12, 13, 14, 15], "..ut.u."
    long = ([*asked, 31], told + "t"), ([*asked, 41, 42, 43], told + "ttt")
    endless = ([1, 11, 12, 13], ".u.t"), ([1, 11, 12, *range(50, 70)], ".u." + "t" * 20)
    dataset = make_pairs(tmp_path / "data", *long, *endless, *LAST)
    rows = pair_rows(dataset, 8)
    assert rows.row(0, 0)[0].tolist() == [[1, 90, 14, 15, 31, 0, 0, 0], [1, 90, 14, 15, 41, 42, 43, 0]]
    assert str(rows.fill).startswith("2 pairs of dialogues in 2 rows of 8 tokens")
    assert (rows.fill.n_cut, rows.fill.n_left_out) == (1, 1)
    # What the row is said to hold is what it holds.
    spans = rows.spans(0, 0)
    assert spans == [(0, 2), (5, 8), (8, 10), (13, 18)]
    assert pair_rows(dataset, 8, "drop").fill.n_left_out == 2


def test_an_epoch_has_each_pair_once_and_never_apart(tmp_path: Path) -> None:
    draw, dialogues = np.random.default_rng(0), []
    for number in range(60):
        asked = [1, *(5 + 100 * number + i for i in range(int(draw.integers(1, 12))))]
        for side in range(2):
            answer = [60 + 100 * number + 20 * side + i for i in range(int(draw.integers(1, 20)))]
            dialogues.append(([*asked, *answer], ".u" + "." * (len(asked) - 2) + "t" * len(answer)))
    dataset = make_pairs(tmp_path / "data", *dialogues, block_tokens=64, shard_tokens=500)
    assert len(dataset.splits["train"]) > 2
    streams = [
        Stream(dataset, "train", seq_len=64, global_batch=2, seed=3, lanes=lanes) for lanes in (range(2), [0], [1])
    ]
    found = []
    for n in range(-(-streams[0].sequences_per_epoch // 2)):
        whole, *parts = (stream.batch(n) for stream in streams)
        assert torch.equal(whole.tokens_BT, torch.cat([part.tokens_BT for part in parts]))
        for tokens, documents in zip(whole.tokens_BT, whole.documents_BT, strict=True):
            assert documents[0].max() == documents[1].max()
            for document in range(int(documents.max()) + 1):
                sides = [tokens[side][documents[side] == document].tolist() for side in range(2)]
                assert sides[0][1] // 100 == sides[1][1] // 100
                found.append(tuple(map(tuple, sides)))
    wanted = {
        (tuple(chosen), tuple(rejected))
        for (chosen, _), (rejected, _) in zip(dialogues[::2], dialogues[1::2], strict=True)
    }
    assert set(found) == wanted
    assert len(found) - len(wanted) <= 3  # of the first row of the next epoch, where the last batch reaches into it


def test_validation_pads_whole_lanes(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path / "data", *LAST)
    (batch,) = evaluation_batches(dataset, "validation", seq_len=6, global_batch=3, lanes=range(3))
    assert batch.tokens_BT.shape == (3, 2, 6)
    assert batch.documents_BT[1:].unique().tolist() == [-1]
