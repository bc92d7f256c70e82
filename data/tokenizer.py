"""Byte-level BPE, trained here or taken from a Hugging Face folder, and saved so that transformers agrees with it."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers
from fsspec.implementations.local import LocalFileSystem
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moray import UserError
from moray.data.pieces import PIECE_CHARS, Cutter
from moray.data.reading.urls import file_system
from moray.data.special_tokens import (
    BOS,
    EOS,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    copy_stops,
    default_start,
    named_stops,
    special_id,
)

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
BATCH_BYTES = 1 << 20
# Training takes time in proportion to the length of words: 20,000 characters without a space or a stop are one.
MAX_TRAINING_WORD = 256  # bytes
MAX_TRAINING_PIECE = 2 * PIECE_CHARS

# Everything that transformers.AutoTokenizer may look for beside tokenizer.json.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; special tokens written in a text (`<|im_end|>`) are read as such by `encode`.

    bos_id: None where there is none (Qwen). prompt_start: the ids before a text that a model shall continue. stop_ids:
    those that end the text it writes, EOS first.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    prompt_start: tuple[int, ...]
    stop_ids: tuple[int, ...]

    @cached_property
    def vocab_size(self) -> int:
        """The highest token id plus one: what an embedding needs, even if an imported vocabulary has holes."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def document_start(self) -> tuple[int, ...]:
        """What a document begins with: what the tokenizer puts before any text, or else its BOS, or else nothing."""
        return self.prompt_start or (() if self.bos_id is None else (self.bos_id,))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, without BOS and EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens written out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Start + ids + EOS of each text, on all cores.

        A special token written in a *document* is plain text: a page about `<|eos|>` must not end there.
        Memory: about 260 bytes a token of 1 MiB of text, or of a longer text that cannot be cut (see `pieces`).
        """
        parts = [np.array(self.document_start, self.dtype)]
        for batch in _batches((piece, last) for text in texts for piece, last in _marked(self._cutter.pieces(text))):
            for ids, (_, last) in zip(self.encode_plain([piece for piece, _ in batch]), batch, strict=True):
                parts.append(np.array(ids, self.dtype))
                if last:
                    yield np.concatenate([*parts, np.array([self.eos_id], self.dtype)])
                    del parts[1:]

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.backend)

    def encode_plain(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text, special tokens in it being plain text, on all cores."""
        self.backend.encode_special_tokens = True
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        return (encoding.ids for encoding in encodings)


def _marked(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether it is the last."""
    piece = next(pieces)
    for following in pieces:
        yield piece, False
        piece = following
    yield piece, True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0].encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError if there is no room for the 256 bytes and the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        parts = f"256 bytes + {len(SPECIAL_TOKENS)} special tokens"
        raise UserError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE} ({parts})")


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` entries and saves it in `folder`, with transformers' config.

    Deterministic in the texts and their order, whatever the number of threads. A small corpus gives fewer entries.
    A word of more than 256 bytes counts as several while training.
    Raises UserError as `check_vocab_size` does.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = _training_pieces(Cutter(backend), texts)
    short = pre_tokenizers.Split(Regex(f".{{{MAX_TRAINING_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, short])
    backend.train_from_iterator(pieces, trainer)
    backend.pre_tokenizer = words
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
    }
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return load_tokenizer(folder)


def _training_pieces(cutter: Cutter, texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of the same words, but for a text that is one endless word, which is cut anywhere."""
    for piece in (piece for text in texts for piece in cutter.pieces(text)):
        yield from (piece[start : start + MAX_TRAINING_PIECE] for start in range(0, len(piece), MAX_TRAINING_PIECE))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a prepared dataset or of any Hugging Face folder with a `tokenizer.json`.

    Raises UserError naming what is missing or cannot be read: a file, or the EOS token. Without a PAD token, EOS pads.
    """
    folder = Path(folder)
    backend = _backend(folder)
    backend.no_truncation()
    backend.no_padding()
    bos_id, eos_id, pad_id = (special_id(backend, folder, name) for name in ("bos_token", "eos_token", "pad_token"))
    stops = named_stops(folder)
    if eos_id is None:  # GPT-2's folder names its tokens by id alone
        eos_id = next((token for token in stops if backend.id_to_token(token)), None)
    if eos_id is None:
        raise UserError(f"tokenizer={str(folder)!r} has no eos_token; name one of its tokens in tokenizer_config.json")
    turn_id = backend.token_to_id(IM_END)
    if not stops and turn_id is not None:
        stops = (turn_id,)
    return Tokenizer(
        backend,
        bos_id,
        eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        prompt_start=default_start(backend),
        stop_ids=tuple(dict.fromkeys([eos_id, *stops])),
    )


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Copies the files of an existing tokenizer into `folder` and loads it from there."""
    load_tokenizer(source)
    copy_tokenizer_files(source, folder)
    return load_tokenizer(folder)


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copies what `source` has of a tokenizer, be it complete or not, and what it says of where a text ends."""
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    copy_stops(source, folder)


def tokenizer_digest(folder: Path) -> str:
    """Of all files in a folder that a tokenizer and its template are made of."""
    sha256 = hashlib.sha256()
    for name in (*_FILES, "generation_config.json", "config.json"):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            sha256.update(f"{name} {len(content)}\n".encode() + content)
    return sha256.hexdigest()


@contextmanager
def tokenizer_in(place: str | Path) -> Iterator[Path]:
    """A folder of this machine that holds the tokenizer of a dataset, which may be at an fsspec URL."""
    fs, root = file_system(str(place))
    if isinstance(fs, LocalFileSystem):
        yield Path(root)
        return
    with TemporaryDirectory() as name:
        for file in (*_FILES, "generation_config.json"):
            if fs.exists(f"{root}/{file}"):
                fs.get_file(f"{root}/{file}", f"{name}/{file}")
        yield Path(name)


def same_vocabulary(one: Path, other: Path, vocab_size: int) -> bool:
    """Whether two folders' tokenizers mean the same by every id below `vocab_size`; a model knows no other."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    first, second = (
        {token for token in _backend(folder).get_vocab(with_added_tokens=True).items() if token[1] < vocab_size}
        for folder in (one, other)
    )
    return first == second


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer={str(folder)!r} must be a folder that holds a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer that the tokenizers library reads: {error}") from None
