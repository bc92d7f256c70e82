"""Reads sources into documents: find the files, try each, read them one after another, and account for every loss."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moray import UserError
from moray.data.index import Kind
from moray.data.reading.account import Account
from moray.data.reading.compression import decompressed
from moray.data.reading.formats import Format
from moray.data.reading.forms import examples, kinds_of
from moray.data.reading.json_files import read_json, read_json_lines
from moray.data.reading.parquet import read_parquet
from moray.data.reading.pieces import Piece, within
from moray.data.reading.records import BadRecord, Damage, Item, Loss, Reason, Record, damage_of
from moray.data.reading.rules import Rules
from moray.data.reading.sources import Source, SourceFile, find
from moray.data.reading.tar import read_tar
from moray.data.reading.texts import cut, read_text
from moray.data.reading.turns import Unfit

TRIED_AT_ONCE = 16  # files: opening one is waiting, the more the farther it is
BOM = b"\xef\xbb\xbf"
_NOTHING_VISIBLE = re.compile("[\\s\u200b-\u200d\u2060\ufeff]*")
_READERS = {"text": read_text, "jsonl": read_json_lines, "json": read_json, "tar": read_tar}


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the key that names it. Keys may be equal: ids are the files' own.

    Of other kinds than text, the text is JSON (`forms.Example`), and documents of a group are on one side of the split.
    """

    key: str
    text: str
    group: str | None = None


def read_documents(sources: Sequence[str | Path], account: Account) -> Iterator[Document]:
    """The documents of all sources (see `sources.find`), in a stable order, one in memory at a time.

    What is left out is noted in `account`, whose rules say what is borne. Every file is tried before any is read: its
    first record is looked at.
    Raises UserError, then, for a source that cannot be read or holds nothing that can be, and for a damaged file; and
    while reading, for what is found only there.
    Memory: the largest record that the rules allow, five times over; of parquet, three times a page and 4 MiB of rows;
    of zstd, the window that its writer chose (at most 8 MiB by default, 2 GiB with `--long=31`).
    """
    usable = [tried(source, account) for source in find(sources)]
    return (document for source in usable for document in _of_source(source, account))


def found_kind(sources: Sequence[str | Path], rules: Rules) -> Kind:
    """What kind of documents sources hold, by the fields of their first record.

    Raises UserError where those fit several kinds.
    """
    file = next((file for source in find(sources) for file in source.files), None)
    if file is None or file.format.kind == "text":
        return "text"
    try:
        items = _items(Piece(file), replace(rules, kind="chat"))
        first = next((item for item in items if isinstance(item, Record)), None)
    except Exception as error:
        if damage_of(error) is None:
            raise
        return "text"  # what is wrong with the file is said where it is read
    record: Any = first and json.loads(b"".join(first.blocks))
    kinds = kinds_of(record, rules.text_field)
    if len(kinds) > 1:
        raise UserError(
            f"{file.path} may be of kind {' or '.join(kinds)}, by its fields {sorted(record)}; say which: --kind "
            f"{kinds[0]}"
        )
    return kinds[0] if kinds else "text"


def tried(source: Source, account: Account) -> Source:
    """The source without those of its files that cannot be read at all. Raises UserError as `read_documents` does."""
    for loss in source.losses:
        account.note(loss)
    usable = []
    with ThreadPoolExecutor(TRIED_AT_ONCE) as pool:
        try:
            errors = pool.map(lambda file: _error_of(file, account.rules), source.files)
            for file, error in zip(source.files, errors, strict=True):
                if error is None:
                    usable.append(file)
                else:
                    _account_for(error, file, account)
        finally:
            pool.shutdown(cancel_futures=True)
    return replace(source, files=tuple(usable), losses=())


def _error_of(file: SourceFile, rules: Rules) -> Exception | None:
    try:
        _try(file, rules)
    except Exception as error:
        return error
    return None


def _try(file: SourceFile, rules: Rules) -> None:
    """Raises Damage, or the format's own error, for a file that cannot be opened or whose first records are all bad."""
    if rules.kind != "text" and file.format.kind == "text":
        raise Damage(f"plain text, which holds no {rules.kind}; what does is .jsonl, .json, .parquet or a .tar of JSON")
    if file.format == Format("text"):
        return
    bad = None
    for item in islice(_items(Piece(file), rules), 1 + rules.max_bad):
        if isinstance(item, Record):
            next(iter(item.blocks), None)
            return
        if item.reason is Reason.BAD and item.place:  # one of several, as it has a place
            bad = bad or item
    if bad:
        raise Damage(f"none of its first records can be read; {bad}")


def _items(piece: Piece, rules: Rules, on_bytes: Callable[[int], None] = lambda n_bytes: None) -> Iterator[Item]:
    file, told = piece.file, 0
    with file.open() as packed:
        if file.format.kind != "text" and not file.size:
            raise Damage("holds no documents: it is empty (0 bytes)")
        begin = piece.range[0] if piece.range and file.format.kind != "parquet" else 0
        for item in _read(piece, packed, rules):
            yield item
            if (at := min(packed.tell() - begin, piece.size)) > told:
                on_bytes(at - told)
                told = at
    on_bytes(piece.size - told)


def _read(piece: Piece, packed: io.BufferedReader, rules: Rules) -> Iterator[Item]:
    file = piece.file
    if file.format.kind == "parquet":  # which is read from its end
        return read_parquet(packed, rules, piece.n_before, piece.range)
    if piece.range:
        return read_json_lines(within(packed, *piece.range), rules, piece.n_before)
    return _READERS[file.format.kind](decompressed(packed, file.format.compression), rules)


def _of_source(source: Source, account: Account) -> Iterator[Document]:
    before = account.n_records
    for file in source.files:
        yield from read_piece(Piece(file), account)
    check_any(source, account.n_records - before, account)


def read_piece(
    piece: Piece, account: Account, on_bytes: Callable[[int], None] = lambda n_bytes: None
) -> Iterator[Document]:
    """The documents of a file, or of a range of it, one in memory at a time. Raises UserError as `read_documents`.

    on_bytes: hears of bytes of the file that were gone through, `piece.size` in all.
    """
    file, n_documents = piece.file, 0
    try:
        for item in _items(piece, account.rules, on_bytes):
            account.n_records += isinstance(item, Record)
            for document in _documents(item.within(str(file.path), file.key), account):
                yield document
                n_documents += 1
    except Exception as error:
        _account_for(error, file, account, f"after {n_documents:,} documents ")


def check_any(source: Source, n_records: int, account: Account) -> None:
    """Raises UserError for a source in which there is no record, with what there is instead."""
    if not n_records:
        paths = {str(file.path) for file in source.files}
        losses = (loss for named in account.named.values() for loss in named)
        mine = (loss for loss in losses if loss.place.partition(", ")[0] in paths)
        first = next((f"; {loss.reason}: {loss}" for loss in mine), "")
        raise UserError(f"source {source.given!r} holds no documents{first}")


def _account_for(error: Exception, file: SourceFile, account: Account, progress: str = "") -> None:
    """Notes a damaged file. Raises any error again that is not of a file."""
    why = damage_of(error)
    if why is None:
        raise error
    account.damaged(file.path, why if isinstance(error, Damage) else f"damaged or unreadable {progress}({why})")


def _documents(item: Item, account: Account) -> Iterator[Document]:
    if isinstance(item, Loss):
        account.note(item)
        return
    if account.rules.kind != "text":
        yield from _examples(item, account)
        return
    limit = account.rules.max_document_bytes
    pieces = cut(item.blocks, limit)
    try:
        first, second = next(pieces), next(pieces, None)
        if second is None:
            yield from _document(item.name, item.place, first, account)
        elif account.rules.long_documents == "drop":
            account.note(Loss(Reason.LONG, item.place, f"more than max_document_bytes={limit:,}"))
        else:
            account.note(Loss(Reason.CUT, item.place, f"into pieces of at most max_document_bytes={limit:,}"))
            for number, piece in enumerate(chain((first, second), pieces), 1):
                yield from _document(f"{item.name}#{number}", f"{item.place}, piece {number}", piece, account)
    except BadRecord as error:
        account.note(Loss(Reason.BAD, item.place, str(error)))


def _examples(record: Record, account: Account) -> Iterator[Document]:
    """The dialogues, pairs or prompts of a record; from the second on, their number is in their keys."""
    value = json.loads(b"".join(record.blocks))
    for number, example in enumerate(examples(value, account.rules.kind, account.rules), 1):
        if isinstance(example, Unfit):
            account.note(Loss(example.reason, record.place, example.why))
            continue
        text = json.dumps(example.content, ensure_ascii=False, sort_keys=True)
        if _is_utf8(text):
            yield Document(record.name if number == 1 else f"{record.name}/{number}", text, example.group)
        else:
            account.note(Loss(Reason.BAD, record.place, "not UTF-8 (half of a surrogate pair)"))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _document(key: str, place: str, raw: bytes, account: Account) -> Iterator[Document]:
    """The text of some bytes, without BOM and without what a crash leaves behind a file's end; none if it is empty."""
    if raw.endswith(b"\0"):
        raw = raw.rstrip(b"\0")
        account.note(Loss(Reason.CUT, place, "NUL bytes at its end, as a crash leaves them"))
    try:
        text = raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        account.note(Loss(Reason.BAD, place, f"not UTF-8 ({error.reason}, byte {error.start + 1})"))
        return
    if _NOTHING_VISIBLE.fullmatch(text):
        account.note(Loss(Reason.EMPTY, place))
    else:
        yield Document(key, text)
