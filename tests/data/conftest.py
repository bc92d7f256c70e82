"""A dataset made by hand: documents given as lists of token ids, split into blocks and shards of a chosen size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moray.data.dataset import Dataset
from moray.data.index import write_index
from moray.data.shards import SplitWriter

Documents = list[list[int]]


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    def make(
        train: Documents,
        validation: Documents | None = None,
        block_tokens: int = 8,
        shard_tokens: int = 24,
        name: str = "dataset",
    ) -> Dataset:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        splits = {}
        for name, documents in (("train", train), ("validation", validation or [[1, 2]])):
            writer = SplitWriter(folder, name, block_tokens, shard_tokens)
            for number, document in enumerate(documents):
                writer.add(f"document-{number}", np.array(document, "<u2"))
            splits[name] = writer.finish()
        write_index(folder, vocab_size=60000, pad_id=0, splits=splits)
        return Dataset.open(folder)

    return make
