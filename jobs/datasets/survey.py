"""What a prepared dataset is made of, measured on its blocks: all of them, or a sample of so many."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from moray.data.blocks import BlockReader
from moray.data.curation.scripts import SCRIPTS, shares
from moray.data.curation.words import Words
from moray.data.dataset import Dataset
from moray.data.order import derive_key, permute
from moray.data.tokenizer import Tokenizer

NAMED_BLOCKS, READ_BLOCKS = 4096, 32
"""Blocks of which the documents' names and lengths are read, a quarter of a billion tokens of usual ones; and those of
which the text is, two million.
"""


@dataclass(frozen=True)
class Sources:
    """Documents and tokens by what their keys begin with, and the length of each document in tokens, int64.

    n_inside: those that lie within one row of plain text. blocks: those that were read, of `of` in all.
    """

    documents: Counter[str]
    tokens: Counter[str]
    lengths: np.ndarray
    n_inside: int
    blocks: int
    of: int


@dataclass(frozen=True)
class Texts:
    """Tokens and UTF-8 bytes of documents by the script that most of their letters are in, and some of them.

    Tokens include those that begin and end a document, which have no bytes. samples: split, key and text.
    """

    tokens: Counter[str]
    bytes: Counter[str]
    samples: list[tuple[str, str, str]]
    blocks: int


def survey_names(dataset: Dataset, seq_len: int, seed: int) -> Sources:
    """Memory: 8 bytes a document that is read. Raises UserError for a block that is damaged."""
    readers = {split: BlockReader(dataset, split, 0) for split in dataset.splits}
    documents, tokens = Counter[str](), Counter[str]()
    lengths, n_inside, n_blocks = [], 0, 0
    for split, shard, block in islice(_blocks(dataset, seed), NAMED_BLOCKS):
        keys, ends = readers[split].documents(shard, block)
        sizes = np.diff(ends, prepend=0)
        for key, size in zip(keys, sizes.tolist(), strict=True):
            documents[source_of(key)] += 1
            tokens[source_of(key)] += size
        in_shard = int(dataset.splits[split][shard].starts[block]) + ends
        n_inside += int(((in_shard - sizes) // seq_len == (in_shard - 1) // seq_len).sum())
        lengths.append(sizes)
        n_blocks += 1
    of = sum(len(split.samples) for split in dataset.splits.values())
    return Sources(documents, tokens, np.concatenate([np.empty(0, np.int64), *lengths]), n_inside, n_blocks, of)


def survey_texts(dataset: Dataset, tokenizer: Tokenizer, n_samples: int, seed: int) -> Texts:
    """Samples are of different blocks, as far as there are so many. Memory: a few blocks.

    Raises UserError for a block that is damaged.
    """
    readers = {split: BlockReader(dataset, split, 0) for split in dataset.splits}
    tokens, n_bytes, samples, n_blocks = Counter[str](), Counter[str](), list[tuple[str, str, str]](), 0
    chosen = list(islice(_blocks(dataset, seed), READ_BLOCKS))
    for number, (split, shard, block) in enumerate(chosen):
        keys, ends = readers[split].documents(shard, block)
        starts = dataset.splits[split][shard].starts
        ids, _ = readers[split].read(shard, int(starts[block]), int(starts[block + 1]))
        documents = [part.tolist() for part in np.split(ids, ends[:-1])]
        texts = tokenizer.backend.decode_batch(documents, skip_special_tokens=True)
        for text, document, script in zip(texts, documents, _scripts_of(texts), strict=True):
            tokens[script] += len(document)
            n_bytes[script] += len(text.encode())
        wanted = n_samples // len(chosen) + (number < n_samples % len(chosen))
        places = permute(np.arange(min(wanted, len(keys))), len(keys), derive_key(seed, 1 + number)).tolist()
        samples += [(split, keys[place], texts[place]) for place in places]
        n_blocks += 1
    return Texts(tokens, n_bytes, samples, n_blocks)


def source_of(key: str) -> str:
    """The source's folder; of a lone file of records the file; of a lone text the file without the piece's number."""
    file, colon, _ = key.partition(":")
    folder, slash, _ = file.partition("/")
    return folder if slash or colon else file.partition("#")[0]


def _scripts_of(texts: list[str]) -> list[str]:
    by_script = shares(Words.of(texts))
    table = np.stack([by_script[script] for script in SCRIPTS])
    largest, names = table.argmax(0).tolist(), [*SCRIPTS]
    return [names[at] if share else "other" for at, share in zip(largest, table.max(0).tolist(), strict=True)]


def _blocks(dataset: Dataset, seed: int) -> Iterator[tuple[str, int, int]]:
    """All blocks of all splits, in an order that the seed chooses: split, shard, and which of the shard's it is."""
    bounds = [(name, split.shards["end"]) for name, split in dataset.splits.items()]
    firsts = np.cumsum([0, *(len(split.samples) for split in dataset.splits.values())]).tolist()
    total = firsts[-1]
    for number in range(total):
        at = int(permute(np.array([number]), total, derive_key(seed, 0))[0])
        place = int(np.searchsorted(firsts, at, side="right")) - 1
        name, ends = bounds[place]
        at -= firsts[place]
        shard = int(np.searchsorted(ends, at, side="right"))
        yield name, shard, at - (int(ends[shard - 1]) if shard else 0)
