"""Tar archives, as webdataset and tarfile write them; members of every kind, and archives that break off."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from moray import UserError

Read = Callable[..., Any]


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_webdataset_shard(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "set.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "d/0", "txt": "a text", "json": {"caption": "beside it"}})
        writer.write({"__key__": "d/1", "json": {"id": "x", "text": "from json"}, "jpg": b"\xff\xd8"})
        writer.write({"__key__": "d/2", "jpg": b"\xff\xd8"})
    outcome = read(path)
    assert outcome.texts == {"set.tar:d/0": "a text", "set.tar:d/1": "from json"}
    assert outcome.lost("not read") == [f"{path}, member d/{n}.jpg".rpartition("/")[2] for n in (1, 2)]


def test_suffixes_in_capitals_are_read_as_webdataset_reads_them(tmp_path: Path, read: Read) -> None:
    names = [f"{n:03}.{'txt' if n % 2 else 'TXT'}" for n in range(30)]
    path = packed(tmp_path / "upper.tar", {name: name.encode() for name in names})
    theirs = {
        sample["__key__"]: sample["txt"].decode() for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert {key.removeprefix("upper.tar:"): text for key, text in read(path).texts.items()} == theirs
    assert len(theirs) == 30


def test_members_of_every_kind(tmp_path: Path, read: Read) -> None:
    row = json.dumps({"text": "row"}).encode()
    members = {
        "a.txt.gz": gzip.compress(b"packed"),
        "b/rows.jsonl": row + b"\n" + b"{\n" + row,
        "c.json": b"[" + row + b", 7]",
        "c2.json": b"[" + row,
        "d.json": json.dumps({"text": "page"}, indent=1).encode(),
        "pkg/e.py": b"code",
        "pkg/e.md": b"about it",
        "f.txt.gz": gzip.compress(b"x" * 9999)[:20],
        "g.parquet": b"PAR1",
        ".h.txt": b"hidden",
        "../../etc/i.txt": b"outside",
        "/etc/i2.txt": b"outside",
        "j.tar": b"",
        "k": b"",
        "z.jsonl": b"",
    }
    path = packed(tmp_path / "all.tar", members)
    outcome = read(path)
    assert {key.removeprefix("all.tar:"): text for key, text in outcome.texts.items()} == {
        "a": "packed",
        "b/rows.jsonl:1": "row",
        "b/rows.jsonl:3": "row",
        "c:1": "row",
        "d": "page",
        "pkg/e.py": "code",
        "pkg/e.md": "about it",
    }
    bad = [loss.place.removeprefix(f"{path}, member ") for loss in outcome.account.named["bad records"]]
    assert bad == ["b/rows.jsonl, line 2", "c.json, element 2", "c2.json", "f.txt.gz", "../../etc/i.txt", "/etc/i2.txt"]
    unread = [loss.place.removeprefix(f"{path}, member ") for loss in outcome.account.named["not read"]]
    assert unread == ["g.parquet", ".h.txt", "j.tar", "k"]


def test_links_are_named_and_not_followed(tmp_path: Path, read: Read) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind in [("folder", tarfile.DIRTYPE), ("a.txt", tarfile.REGTYPE), ("b.txt", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"text"))
    outcome = read(tmp_path / "set.tar")
    assert outcome.texts == {"set.tar:a": "text"}
    assert outcome.lost("not read") == ["set.tar, member b.txt"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tar: tar[:9000], r"after 1 documents \(unexpected end of data\)"),
        (lambda tar: tar[:5900], r"after 1 documents \(a member's header is damaged: truncated header\)"),
        (lambda tar: tar[:5632], r"after 1 documents \(no end-of-archive mark: it may have been cut off\)"),
        (lambda tar: tar[:5700] + b"\xff" * 50 + tar[5750:], r"after 1 documents \(a member's header is damaged: bad"),
    ],
)
def test_an_archive_that_breaks_off_is_not_a_shorter_one(
    tmp_path: Path, read: Read, change: Callable[[bytes], bytes], why: str
) -> None:
    """tarfile alone ends the last three of them without a word, after one document of three."""
    path = packed(tmp_path / "set.tar", {f"{n}.txt": b"x" * 5000 for n in range(3)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"set.tar: damaged or unreadable {why}"):
        read(path)
    assert len(read(path, on_damage="skip").texts) == 1


def test_nothing_in_it_to_be_read(tmp_path: Path, read: Read) -> None:
    path = packed(tmp_path / "set.tar", {"a.jpg": b"", "b.jpg": b""})
    with pytest.raises(UserError, match=r"set.tar' holds no documents; not read: .*set.tar, member a.jpg"):
        read(path)
