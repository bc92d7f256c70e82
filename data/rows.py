"""What a row of a batch holds: a piece of the text, cut anywhere, or whole dialogues that fill it best."""

# Shapes: N rows that are asked for at once, T tokens of a row (seq_len). Of pairs, a row is two: [2, T] for [T].

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from moray import UserError
from moray.data.blocks import BlockReader
from moray.data.dataset import Dataset
from moray.data.order import sequence_counts
from moray.data.packing import Packing, pack
from moray.data.shards import TRAINED, USER_TURN

IGNORE = -100  # torch's cross_entropy leaves such targets out

LongDialogues = Literal["cut", "drop"]
"""What becomes of a dialogue that is longer than a row: it loses its first turns, or is left out."""


class Rows(Protocol):
    """The rows of a split. counts: int64 [shards], how many each shard makes. empty: int64 [4, T], a row of padding."""

    counts: np.ndarray
    empty: np.ndarray

    def rows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Tokens, targets, positions and documents of these rows of these shards: int64 [N] and [N] -> [4, N, T]."""

    def spans(self, shard: int, number: int) -> list[tuple[int, int]]:
        """Which tokens of the shard the row holds: ranges, in the row's order, without what pads it."""


def rows_of(dataset: Dataset, split: str, seq_len: int, cache_bytes: int, long_dialogues: LongDialogues) -> Rows:
    """The rows that a model learns from. Raises UserError for a kind that is learnt from in another way."""
    reader = BlockReader(dataset, split, cache_bytes)
    if dataset.kind == "text":
        return TextRows(dataset, split, seq_len, reader)
    if dataset.kind in ("chat", "preference"):
        return DialogueRows(dataset, split, seq_len, reader, long_dialogues)
    raise UserError(f"{dataset.called}={dataset.folder} holds {dataset.kind}, which have no next token to learn from")


class TextRows:
    """T tokens after T tokens of a shard: every token after its first is a target once, but for documents' first."""

    def __init__(self, dataset: Dataset, split: str, seq_len: int, reader: BlockReader) -> None:
        self._n_tokens = dataset.splits[split].shards["n_tokens"]
        self.counts = sequence_counts(self._n_tokens, seq_len)
        self.empty = padding(seq_len, dataset.pad_id)
        self._seq_len, self._reader = seq_len, reader

    def rows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Rows are only found one by one: what is done with their tokens is done once, for a batch of them."""
        n, width = len(shards), self._seq_len
        read, flags, lengths = self._reader.rows(shards.tolist(), (numbers * width).tolist(), width + 1)
        first = flags != 0  # of text, nothing else is marked
        rows = np.empty((4, n, width), np.int64)
        rows[0], rows[1] = read[:, :-1], read[:, 1:]
        rows[1][first[:, 1:]] = IGNORE
        rows[2], rows[3] = np.arange(width), 0
        first[:, 0] = first[:, -1] = False  # the row's first document is number 0, whether or not it begins here
        several = np.flatnonzero(first.any(axis=1))
        if len(several):
            rows[2:, several] = _within(first[several, :-1])
        # The last token of a shard is nobody's to predict from; behind it, rows are padded.
        for row, length in enumerate(lengths):
            if length <= width:
                rows[:, row, length - 1 :] = self.empty[:, length - 1 :]
        return rows

    def spans(self, shard: int, number: int) -> list[tuple[int, int]]:
        # A shard's last token is only a target.
        return [(number * self._seq_len, min((number + 1) * self._seq_len, int(self._n_tokens[shard]) - 1))]


def _within(begins: np.ndarray) -> np.ndarray:
    """Positions and documents of rows, from where documents begin behind each row's first: bool [N, T] -> [2, N, T]."""
    n, width = begins.shape
    begins[:, 0] = True
    in_row, at = np.divmod(np.flatnonzero(begins), width)
    documents = np.arange(len(at)) - np.searchsorted(in_row, in_row)
    n_tokens = np.diff(in_row * width + at, append=n * width)
    both = np.repeat([at, documents], n_tokens, axis=1).reshape(2, n, width)
    np.subtract(np.arange(width), both[0], out=both[0])
    return both


@dataclass(frozen=True)
class Fill:
    """What packing a split came to: dialogues in rows, with fewer turns or left out as too long; tokens of them all.

    Of pairs, both dialogues of one share what befalls them: numbers are of pairs, rows of lanes, which are two.
    """

    called: str
    n_rows: int
    n_dialogues: int
    n_cut: int
    n_left_out: int
    n_tokens: int
    seq_len: int

    def __str__(self) -> str:
        filled = self.n_tokens / (self.n_rows * self.seq_len)
        return (
            f"{self.n_dialogues:,} {self.called} in {self.n_rows:,} rows of {self.seq_len} tokens, {filled:.1%} filled"
            f"; {self.n_cut:,} without their first turns and {self.n_left_out:,} left out as too long"
        )


class DialogueRows:
    """Whole dialogues, packed shard by shard, which do not see each other; targets are the tokens that are TRAINED.

    A dialogue of more than T tokens loses whole turns from the left, to the first user's turn from which the rest fits
    behind its beginning (BOS, system prompt); or, as one that cannot, it is left out. Each row has a target.
    Of pairs a row is two, whose i-th dialogues are the chosen and the rejected one of the same pair: packed by the
    longer, and cut alike, in what both were asked.
    Memory: 16 bytes a dialogue. Opening reads of the tokens only the dialogues that are too long.
    Raises UserError where no dialogue fits.
    """

    def __init__(
        self, dataset: Dataset, split: str, seq_len: int, reader: BlockReader, long_dialogues: LongDialogues
    ) -> None:
        self._split, self._reader, self._seq_len = dataset.splits[split], reader, seq_len
        self._sides = 2 if dataset.kind == "preference" else 1
        row = padding(seq_len, dataset.pad_id)
        self.empty = row if self._sides == 1 else np.stack([row, row], axis=1)
        self._begins = lru_cache(maxsize=8)(self._begins_of)
        self._cuts: list[dict[int, tuple[int, int]]] = []
        self._packings: list[Packing] = []
        n_left_out = n_tokens = shortest = 0
        for shard in range(len(self._split)):
            lengths = self._split.lengths(shard).reshape(-1, self._sides).max(axis=1)
            too_long = np.flatnonzero(lengths > seq_len).tolist()
            tried = ((document, self._cut(shard, document)) for document in too_long if long_dialogues == "cut")
            cuts = {document: kept for document, kept in tried if kept is not None}
            self._cuts.append(cuts)
            for document, (head, turn) in cuts.items():
                lengths[document] -= turn - head
            fitting = np.flatnonzero(lengths <= seq_len)
            packing = pack(lengths[fitting], seq_len)
            self._packings.append(packing._replace(documents=fitting[packing.documents]))
            n_left_out += len(lengths) - len(fitting)
            n_tokens += int(lengths[fitting].sum())
            shortest = min(shortest or int(lengths.min()), int(lengths.min()))
        self.counts = np.array([len(packing.ends) for packing in self._packings], np.int64)
        if not self.counts.sum():
            raise UserError(
                f"train.seq_len={seq_len} is under every dialogue of the {split} split of "
                f"{dataset.called}={dataset.folder}, whose shortest has {shortest} tokens; raise it"
            )
        called = ("dialogues", "pairs of dialogues")[self._sides - 1]
        n_dialogues = sum(len(packing.documents) for packing in self._packings)
        n_cut = sum(map(len, self._cuts))
        self.fill = Fill(called, int(self.counts.sum()), n_dialogues, n_cut, n_left_out, n_tokens, seq_len)

    def rows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        each = zip(shards.tolist(), numbers.tolist(), strict=True)
        return np.stack([self.row(shard, number) for shard, number in each], axis=1)

    def row(self, shard: int, number: int) -> np.ndarray:
        """int64 [4, T], of pairs [4, 2, T]."""
        row = self.empty.copy()
        for side in range(self._sides):
            self._fill(row.reshape(4, self._sides, -1)[:, side], shard, number, side)
        return row

    def _fill(self, row: np.ndarray, shard: int, number: int, side: int) -> None:
        at = 0
        for count, document in enumerate(self._packings[shard].row(number).tolist()):
            tokens, flags = self._dialogue(shard, document, side)
            here = slice(at, at + len(tokens))
            row[0, here] = tokens
            row[1, at : here.stop - 1] = np.where(flags[1:] & TRAINED, tokens[1:], IGNORE)
            row[2, here] = np.arange(len(tokens))
            row[3, here] = count
            at = here.stop

    def spans(self, shard: int, number: int) -> list[tuple[int, int]]:
        """Two of a dialogue that is without its first turns, where anything stands before them. Of pairs, those of all
        chosen ones come first.
        """
        spans = []
        for side in range(self._sides):
            for document in self._packings[shard].row(number).tolist():
                begin, end = self._extent(shard, document, side)
                head, turn = self._cuts[shard].get(document, (0, 0))
                spans += [(begin, begin + head), (begin + turn, end)] if head else [(begin + turn, end)]
        return spans

    def _begins_of(self, shard: int) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._split.lengths(shard))])

    def _extent(self, shard: int, document: int, side: int) -> tuple[int, int]:
        """Where in its shard a dialogue lies: `document` counts pairs, where there are such."""
        first = document * self._sides + side
        start, stop = self._begins(shard)[first : first + 2].tolist()
        return start, stop

    def _dialogue(self, shard: int, document: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, flags = self._reader.read(shard, *self._extent(shard, document, side))
        head, turn = self._cuts[shard].get(document, (0, 0))
        return np.concatenate((tokens[:head], tokens[turn:])), np.concatenate((flags[:head], flags[turn:]))

    def _cut(self, shard: int, document: int) -> tuple[int, int] | None:
        """Of one that is too long stay the tokens before the first of these places, and from the second on; None: it
        cannot be cut.
        """
        both = [self._reader.read(shard, *self._extent(shard, document, side))[1] for side in range(self._sides)]
        longest = max(map(len, both))
        # Those of a pair begin alike, up to where people answered: turns behind that are nobody's.
        turns = np.flatnonzero(both[0] & USER_TURN)
        for turn in turns[1:].tolist():
            if (head := int(turns[0])) + longest - turn <= self._seq_len:
                # The first token is no target: nothing stands before it.
                has_target = all((flags[turn + (head == 0) :] & TRAINED).any() for flags in both)
                return (head, turn) if has_target else None
        return None


def padding(seq_len: int, pad_id: int) -> np.ndarray:
    """A row without a document."""
    return np.repeat(np.array([[pad_id], [IGNORE], [0], [-1]], np.int64), seq_len, axis=1)
