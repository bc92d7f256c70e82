"""Puts the parts of a dataset together in its folder."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moray.data.index import Kind, Split, joined, shard_name, write_index
from moray.data.preparation.tasks import Done
from moray.data.preparation.vocabulary import put_tokenizer

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Assembly:
    """A dataset out of its shards, which stay where they are, and its tokenizer."""

    folder: Path
    kind: Kind
    tokenizer: Done

    def splits(self, shards: Sequence[Done]) -> dict[str, Split]:
        put_tokenizer(self.tokenizer.folder, self.folder)
        splits = {}
        for split in SPLITS:
            mine = [shard.folder for shard in shards if shard.folder.name.startswith(f"{split}-")]
            # Of what a shard was to hold, the chat template may refuse all: then it has no file.
            files = [file for shard in mine for file in shard.glob("*.tar")]
            for number, file in enumerate(files):
                _link(file, self.folder / shard_name(split, number))
            splits[split] = joined(self.folder, split, self.kind, mine)
        return splits

    def write(self, splits: Mapping[str, Split], highest_id: int) -> None:
        # An embedding needs a row for what the data holds, whatever else the tokenizer knows; any token can pad.
        vocab_size, pad_id = 1 + highest_id, self.tokenizer.found["pad_id"]
        write_index(
            self.folder,
            vocab_size,
            pad_id if pad_id < vocab_size else self.tokenizer.found["eos_id"],
            splits,
            self.kind,
        )


def _link(path: Path, name: Path) -> None:
    try:
        name.hardlink_to(path)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system knows links
        shutil.copyfile(path, name)
