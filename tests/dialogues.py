"""Datasets of dialogues made by hand: tokens and flags of each, in blocks and shards of a chosen size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moray.data.dataset import Dataset
from moray.data.index import Kind, write_index
from moray.data.shards import TRAINED, USER_TURN, SplitWriter

FLAGS = {".": 0, "t": TRAINED, "u": USER_TURN}
"""A letter a token: `u` begins a user's turn, `t` is trained on."""


def make_dialogues(
    folder: Path,
    train: Sequence[tuple[list[int], str]],
    validation: Sequence[tuple[list[int], str]] = (([1, 2, 3], ".ut"),),
    *,
    kind: Kind = "chat",
    vocab_size: int = 60_000,
    block_tokens: int = 1 << 16,
    shard_tokens: int = 16 << 20,
) -> Dataset:
    """Of (tokens, letters) each; of preferences, two of them after each other are a pair."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    splits = {}
    for name, dialogues in (("train", train), ("validation", validation)):
        writer = SplitWriter(folder, name, block_tokens, shard_tokens, kind)
        for number, (tokens, letters) in enumerate(dialogues):
            flags = np.array([FLAGS[letter] for letter in letters], np.uint8)
            together = kind == "preference" and number % 2 > 0
            reference = {"number": number} if kind == "prompts" else None
            writer.add(f"dialogue-{number}", np.array(tokens, "<u2"), flags, together=together, reference=reference)
        splits[name] = writer.finish()
    write_index(folder, vocab_size, 0, splits, kind)
    return Dataset.open(folder)
