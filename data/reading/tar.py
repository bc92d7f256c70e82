"""Tar archives: WebDataset shards, or any folder packed up. Nothing is unpacked to disk."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import PurePath
from typing import IO, Self, cast

from moray.data.reading.compression import decompressed
from moray.data.reading.formats import Format, format_of
from moray.data.reading.json_files import read_json, read_json_lines
from moray.data.reading.records import BadRecord, Damage, Item, Loss, Reason, Record, damage_of
from moray.data.reading.rules import Rules
from moray.data.reading.texts import read_text

_READERS = {"text": read_text, "jsonl": read_json_lines, "json": read_json}


def read_tar(file: IO[bytes], rules: Rules) -> Iterator[Item]:
    """The documents of every member that holds text or JSON, compressed or not.

    In a WebDataset sample (members whose names share all before the first dot) a `json` beside a text describes it and
    is no document. A `txt` or `json` is named by its sample, any other member by its own name.
    """
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as archive:
        for sample, members in groupby(_members(archive), _sample):
            yield from _of_sample(archive, sample, members, rules)


def _of_sample(
    archive: tarfile.TarFile, sample: str, members: Iterator[tarfile.TarInfo], rules: Rules
) -> Iterator[Item]:
    has_text, descriptions = False, []
    for member in members:
        format = format_of(member.name)
        if member.name.startswith("/") or ".." in PurePath(member.name).parts:
            yield Loss(Reason.BAD, f"member {member.name}", "its path leads out of the archive")
            continue
        if format is None or format.kind not in _READERS or not member.isfile() or _is_hidden(member):
            yield Loss(Reason.UNREAD, f"member {member.name}")
            continue
        content = cast(io.BufferedReader | None, archive.extractfile(member))
        assert content, "a regular file has content"
        if format.kind == "json":  # read in any case: the stream does not come back to it
            descriptions.append((member, format, content.read(rules.max_record_bytes + 1)))
        else:
            has_text |= format.kind == "text"
            yield from _items(member, format, content, sample, rules)
    for member, format, packed in [] if has_text else descriptions:
        if len(packed) > rules.max_record_bytes:
            yield Loss(Reason.LONG, f"member {member.name}", f"of more than {rules.max_record_bytes:,} bytes")
        else:
            yield from _items(member, format, io.BufferedReader(io.BytesIO(packed)), sample, rules)


def _items(
    member: tarfile.TarInfo, format: Format, content: io.BufferedReader, sample: str, rules: Rules
) -> Iterator[Item]:
    """What a member holds. Damage that is its own costs no other member."""
    place = f"member {member.name}"
    is_sample = format.kind == "json" or ".txt" in PurePath(member.name.lower()).suffixes
    name = sample if is_sample else member.name
    try:
        for item in _READERS[format.kind](decompressed(content, format.compression), rules):
            if isinstance(item, Record) and format.compression:
                item = replace(item, blocks=_checked(item.blocks))
            yield item.within(place, name)
    except Exception as error:
        if not (format.compression or isinstance(error, Damage)):
            raise
        yield Loss(Reason.BAD, place, _damage(error))


def _checked(blocks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from blocks
    except Exception as error:
        raise BadRecord(_damage(error)) from None


def _damage(error: Exception) -> str:
    """What is wrong with a member. Raises the error again where it is not the member's."""
    why = damage_of(error)
    if why is None or isinstance(error, tarfile.TarError):
        raise error
    return why


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
        if not member.isdir():
            yield member


def _sample(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return member.name.rpartition("/")[2].startswith(".")


class _Header(tarfile.TarInfo):
    """A member's header; where it is damaged or missing, tarfile would end without a word, as if all had been read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf:
            raise tarfile.ReadError("no end-of-archive mark: it may have been cut off")
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a member's header is damaged: {error}") from None
