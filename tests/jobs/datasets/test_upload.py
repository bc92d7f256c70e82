"""A dataset at a URL: the same as in a folder, there as a whole or not at all, and nothing else replaced."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from moray.data.dataset import Dataset
from moray.data.preparation.read import ReadPart
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import Summary, prepare
from moray.jobs.datasets.stages import Stages

URL = "memory://bucket/data"
FS = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    yield
    if FS.exists("/bucket"):
        FS.rm("/bucket", recursive=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {n} of some"}}\n' for n in range(100)))
    return path


def prepared(source: Path, out: str | Path, **settings: Any) -> Summary:
    return prepare(PrepareConfig(sources=(source,), out=out, vocab_size=300, **settings), Console(file=io.StringIO()))


def test_it_is_that_of_a_folder_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    there = prepared(source, URL, scratch=tmp_path / "scratch").dataset
    here = prepared(source, tmp_path / "out").dataset
    assert there.fingerprint == here.fingerprint
    there.verify()
    for path in (tmp_path / "out").iterdir():
        assert FS.cat_file(f"/bucket/data/{path.name}") == path.read_bytes(), path.name
    assert len(FS.ls("/bucket/data")) == len(list((tmp_path / "out").iterdir()))
    assert FS.ls("/bucket", detail=False) == ["/bucket/data"]
    assert not list((tmp_path / "scratch").iterdir())
    assert prepared(source, f"file://{tmp_path}/url").dataset.fingerprint == here.fingerprint


def test_what_breaks_off_is_no_dataset_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(source, URL, scratch=tmp_path / "scratch", seed=1)
    put = MemoryFileSystem.put_file

    def broken(fs: MemoryFileSystem, local: str, path: str, **settings: Any) -> None:
        if path.endswith("validation-00000.tar"):
            raise ConnectionError("gone away")
        put(fs, local, path, **settings)

    again = {"scratch": tmp_path / "scratch", "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", broken)
        with pytest.raises(ValueError, match=r"memory://bucket/data cannot be written \(gone away\); the same"):
            prepared(source, URL, **again)
    with pytest.raises(ValueError, match="memory://bucket/data is unfinished: its preparation was interrupted"):
        Dataset.open(URL)
    found = prepared(source, URL, scratch=tmp_path / "scratch").dataset
    assert found.fingerprint == prepared(source, tmp_path / "out").dataset.fingerprint
    found.verify()
    assert not list((tmp_path / "scratch").iterdir())


def test_of_a_source_without_time_or_tag_the_content_says_whether_it_is_read_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moray.data.reading.urls.VERSIONS", ())
    read: list[str] = []
    run = ReadPart.run
    monkeypatch.setattr(ReadPart, "run", lambda task, folder: (read.append(task.label), run(task, folder))[1])
    for name in ("a.jsonl", "b.jsonl"):
        FS.pipe(f"/bucket/{name}", source.read_bytes().replace(b"row", name[:1].encode()))
    config = PrepareConfig(sources=("memory://bucket/a.jsonl", "memory://bucket/b.jsonl"), out=tmp_path / "out")

    def interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Stages, "encode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(config, Console(file=io.StringIO()))

    interrupted()
    assert read == ["a.jsonl", "b.jsonl"]
    interrupted()
    assert read == ["a.jsonl", "b.jsonl"], "what is the same stays read"
    FS.pipe("/bucket/b.jsonl", FS.cat_file("/bucket/b.jsonl").replace(b"b 7 of", b"b 7 to"))
    prepare(config, Console(file=io.StringIO()))
    assert read == ["a.jsonl", "b.jsonl", "b.jsonl"]


def test_what_is_there_is_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    scratch = {"scratch": tmp_path / "scratch"}
    first = prepared(source, URL, **scratch).dataset
    with pytest.raises(ValueError, match="out=memory://bucket/data already holds a finished dataset"):
        prepared(source, URL, seed=1, **scratch)
    assert prepared(source, URL, seed=1, overwrite=True, **scratch).dataset.fingerprint != first.fingerprint
    FS.pipe("/bucket/mine/thesis.txt", b"mine")
    with pytest.raises(ValueError, match="out=memory://bucket/mine is not empty"):
        prepared(source, "memory://bucket/mine", overwrite=True, **scratch)


def test_a_url_needs_a_scratch_and_a_path_has_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out=memory://bucket/data is a URL: say by --scratch FOLDER where to work"):
        prepared(source, URL)
    with pytest.raises(ValueError, match=r"scratch=.* is for an --out that is a URL"):
        prepared(source, tmp_path / "out", scratch=tmp_path / "scratch")
