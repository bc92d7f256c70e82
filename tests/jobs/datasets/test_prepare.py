"""`prepare` end to end on real text: what comes out, that it is the same every time, and what a kill leaves behind."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from rich.console import Console
from transformers import AutoTokenizer

from moray.data.dataset import Dataset
from moray.data.preparation.encode import EncodeShard
from moray.data.preparation.read import ReadPart
from moray.data.tokenizer import load_tokenizer
from moray.jobs.cli import dispatch
from moray.jobs.datasets.config import load_preparation
from moray.jobs.datasets.prepare import Summary, prepare

STDLIB = Path(sysconfig.get_path("stdlib"))
SOURCES = [STDLIB / "json", STDLIB / "asyncio", STDLIB / "email"]
QUIET = Console(file=io.StringIO())


def prepared(out: Path, *sources: Path, console: Console = QUIET, **settings: object) -> Summary:
    named = {"sources": sources or SOURCES, "out": out, "vocab_size": 400, "kind": "text", **settings}
    return prepare(load_preparation("none", named), console)


def documents_of(dataset: Dataset, split: str) -> dict[str, list[int]]:
    """The documents as webdataset reads them: key to token ids."""
    urls = [str(Path(dataset.folder, shard.name)) for shard in dataset.splits[split]]
    documents = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        parts = np.split(sample["tokens.npy"], sample["ends.npy"][:-1])
        documents |= dict(zip(sample["json"]["documents"], (part.tolist() for part in parts), strict=True))
    return documents


def test_every_document_comes_out_whole(tmp_path: Path) -> None:
    summary = prepared(tmp_path / "out", STDLIB / "json", STDLIB / "asyncio")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = {
        f"{folder.name}/{path.relative_to(folder)}": path.read_bytes().decode()
        for folder in (STDLIB / "json", STDLIB / "asyncio")
        for path in folder.rglob("*.py")
    }
    train, validation = (documents_of(summary.dataset, split) for split in ("train", "validation"))
    assert len(validation) >= 1
    assert not train.keys() & validation.keys()
    assert (train | validation).keys() == expected.keys()
    for key, ids in (train | validation).items():
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == expected[key]
    n_bytes = sum(len(text.encode()) for text in expected.values())
    n_tokens = sum(len(ids) for ids in (train | validation).values())
    assert summary.bytes_per_token == pytest.approx(n_bytes / n_tokens)
    assert summary.dataset.vocab_size == 400 == 1 + max(max(ids) for ids in (train | validation).values())


def test_the_same_documents_give_the_same_dataset_anywhere_in_any_order(tmp_path: Path) -> None:
    first = prepared(tmp_path / "a")
    second = prepared(tmp_path / "elsewhere" / "b", *SOURCES[::-1])
    assert first.dataset.fingerprint == second.dataset.fingerprint
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "elsewhere" / "b" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere"], "no scratch is left"
    assert prepared(tmp_path / "c", seed=1).dataset.fingerprint != first.dataset.fingerprint


def test_validation_does_not_move_when_documents_are_added(tmp_path: Path) -> None:
    few = prepared(tmp_path / "few", *SOURCES[:2], validation=0.2)
    many = prepared(tmp_path / "many", *SOURCES, validation=0.2, seed=3)
    few_keys, many_keys = (set(documents_of(summary.dataset, "validation")) for summary in (few, many))
    added = {key for key in many_keys if key.startswith("email/")}
    assert many_keys - added == few_keys


def test_the_summary_counts_duplicates_and_names_what_was_skipped(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in (1, 2, 3, 2, 1, 1)] + [{"text": " "}]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write("\n".join(map(json.dumps, rows)).encode() + b'\n{"text": "\xff"}')
    console = Console(file=io.StringIO(), width=200)
    summary = prepared(tmp_path / "out", tmp_path / "rows.jsonl.gz", console=console)
    assert (summary.n_duplicates, sum(split.n_documents for split in summary.dataset.splits.values())) == (3, 3)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\n  exact duplicates +3 +18 bytes +50.0%\n", printed)
    assert f"left out   empty: 1\n{'':<12}{tmp_path}/rows.jsonl.gz, line 7\n" in printed
    assert f"left out   bad records: 1\n{'':<12}{tmp_path}/rows.jsonl.gz, line 8: not UTF-8" in printed
    assert str(tmp_path / "out") in printed


def test_a_folder_as_people_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command's own options: what is read, what is told, and copies of one text known as such."""
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("a page\nabout it\n")
    (folder / "copy.txt").write_bytes(b"a page\r\nabout it\r\n")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfa page\nabout it\n")
    (folder / "[").mkdir()
    (folder / "[" / "draft].html").write_text("<p>")
    rows = [json.dumps({"id": "same", "content": f"row {n}"}) for n in range(40)] + ["{", "[" * 8000]
    (folder / "data" / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (folder / "data" / "crashed.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode())[:40])
    (folder / "long.txt").write_text(" ".join(f"word{n}" for n in range(600)))
    out = tmp_path / "out"
    words = [
        "--text-field",
        "content",
        "--max-document-bytes=2048",
        "--max_bad",
        "2",
        "--on-damage",
        "skip",
        "--vocab-size",
        "300",
    ]
    assert dispatch(["prepare", "--validation", "0.2", *words, "--overwrite", str(folder), f"--out={out}"]) == 0
    documents = [documents_of(Dataset.open(out), split) for split in ("train", "validation")]
    assert {f"corpus/long.txt#{n}" for n in (1, 2, 3)} <= documents[0].keys() | documents[1].keys()
    assert sum(split.n_documents for split in Dataset.open(out).splits.values()) == 40 + 1 + 3
    assert all("corpus/data/train.jsonl.gz:same" in split for split in documents)
    told = capsys.readouterr().err
    for line in (
        "  exact duplicates ",
        "left out   not read: 1",
        f"{folder}/[/draft].html",
        "left out   damaged files: 1",
        "left out   bad records: 2",
        f"{folder}/data/train.jsonl.gz, line 42: nested too deeply",
        f"{folder}/long.txt: into pieces of at most max_document_bytes=2,048",
    ):
        assert line in told


def test_an_existing_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    first = prepared(tmp_path / "a", vocab_size=300)
    second = prepared(tmp_path / "b", STDLIB / "json", tokenizer=tmp_path / "a")
    assert second.dataset.vocab_size == 300
    assert first.dataset.fingerprint != second.dataset.fingerprint
    text = "def f(x):\n    return {'é': x}\n"
    assert load_tokenizer(tmp_path / "b").encode(text) == AutoTokenizer.from_pretrained(tmp_path / "a")(text).input_ids


def test_a_finished_dataset_is_not_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepared(out)
    with pytest.raises(ValueError, match="already holds a finished dataset"):
        prepared(out, seed=1)
    assert Dataset.open(out).fingerprint == first.dataset.fingerprint
    second = prepared(out, seed=1, overwrite=True)
    assert Dataset.open(out).fingerprint == second.dataset.fingerprint != first.dataset.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_keeps_what_was_there_and_what_was_read(tmp_path: Path) -> None:
    first = prepared(tmp_path / "out")
    rows, again = tmp_path / "rows.jsonl", {"overwrite": True, "max_bad": 0}
    rows.write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(ValueError, match="line 2: no field 'text'"):
        prepared(tmp_path / "out", rows, *SOURCES, **again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"], "nothing had been read"
    with pytest.raises(ValueError, match="line 2: no field 'text'"):
        prepared(tmp_path / "out", *SOURCES, rows, **again)
    assert Dataset.open(tmp_path / "out").fingerprint == first.dataset.fingerprint
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.moray-unfinished/scratch/parts/*/done.json")}
    assert len(parts) == len(SOURCES)
    rows.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    n_read = []
    with pytest.MonkeyPatch.context() as patch:
        run = ReadPart.run
        patch.setattr(ReadPart, "run", lambda task, folder: (n_read.append(task), run(task, folder))[1])
        mended = prepared(tmp_path / "out", *SOURCES, rows, **again)
    assert [task.label for task in n_read] == ["rows.jsonl"], "the rest had been read"
    assert mended.dataset.fingerprint == prepared(tmp_path / "whole", rows, *SOURCES).dataset.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "whole"]


def test_an_interrupted_preparation_with_other_settings_is_not_mixed_with(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n' + 200 * '{"body": "not"}\n')
    with pytest.raises(ValueError, match="max_bad=100"):
        prepared(tmp_path / "out", *SOURCES, rows)
    with pytest.raises(ValueError, match=r"preparation there has seed=0, validation=0.01, this one seed=1, valid"):
        prepared(tmp_path / "out", *SOURCES, seed=1, validation=0.1)
    prepared(tmp_path / "out", *SOURCES)
    with pytest.raises(ValueError, match="max_bad=100"):
        prepared(tmp_path / "anew", *SOURCES, rows)
    assert prepared(tmp_path / "anew", *SOURCES, seed=1, overwrite=True)
    assert not list(tmp_path.glob("*.moray-unfinished"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.0}, "validation=0.0 must be more than 0"),
        ({"validation": 1.5}, "validation=1.5 must be less than 1"),
        ({"vocab_size": 100}, "vocab_size=100 must be at least 261"),
        ({"tokenizer": Path("nowhere")}, "nowhere.* must be a folder that holds a tokenizer.json"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        prepared(tmp_path / "file")
    with pytest.raises(ValueError, match="full is not empty"):
        prepared(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full answers every write with ENOSPC; a shard is made to land there.
    run = EncodeShard.run

    def full(task: EncodeShard, folder: Path) -> dict:
        os.symlink("/dev/full", folder / "train-00000.tar")
        return run(task, folder)

    with monkeypatch.context() as patch:
        patch.setattr(EncodeShard, "run", full)
        with pytest.raises(ValueError, match="out: the disk is full"):
            prepared(tmp_path / "out")
    assert prepared(tmp_path / "out").dataset.fingerprint == prepared(tmp_path / "whole").dataset.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


COMMAND = """
import sys
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
prepare(PrepareConfig(sources=tuple(sys.argv[2:]), out=sys.argv[1], vocab_size=400, kind="text"))
"""


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND, str(out), *map(str, SOURCES)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.parametrize("moment", ["scratch", "tokenizer.json", "train-00000.tar", "validation-00000.tar"])
def test_killed_at_any_moment_it_leaves_nothing_that_looks_finished(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    process = start(out)
    try:
        wait_for(tmp_path / "out.moray-unfinished" / moment, process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    untouched = prepared(tmp_path / "untouched").dataset.fingerprint
    if not out.exists():  # the last moments are short, and a kill that comes too late finds the whole
        with pytest.raises(ValueError, match="out is unfinished"):
            Dataset.open(out)
        prepared(out)
    assert Dataset.open(out).fingerprint == untouched
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "untouched"]


def test_two_at_once_do_not_write_the_same_folder(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    try:
        wait_for(tmp_path / "out.moray-unfinished" / "scratch", process)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ValueError, match="another process is writing it"):
            prepared(tmp_path / "out")
        process.send_signal(signal.SIGCONT)
        assert process.wait(50) == 0
    finally:
        process.kill()
        process.wait()
    Dataset.open(tmp_path / "out")


def test_a_kill_after_the_last_task_costs_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As late as that: the folder is about to get its name."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moray.data.staging._replace", die)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "out")
    n_done = []
    with monkeypatch.context() as patch:
        patch.setattr("moray.data.preparation.tasks.Path.rename", lambda *names: n_done.append(names))
        patch.setattr("moray.data.staging._replace", lambda out, staging: os.rename(staging, out))
        prepared(tmp_path / "out")
    assert not n_done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "scratch").exists()


def test_what_was_read_with_damage_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"".join(b'{"text": "row %d"}\n' % n for n in range(3000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows)[:-400])
    with monkeypatch.context() as patch:
        patch.setattr("moray.jobs.datasets.stages.Stages.encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path / "out", tmp_path / "rows.jsonl.gz", on_damage="skip")
    with pytest.raises(ValueError, match=r"damaged or unreadable after .* documents"):
        prepared(tmp_path / "out", tmp_path / "rows.jsonl.gz")


def test_a_preparation_within_its_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    with monkeypatch.context() as patch:
        patch.setattr("moray.jobs.datasets.stages.Stages.encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path / "out", tmp_path)
    summary = prepared(tmp_path / "out", tmp_path)
    assert sum(split.n_documents for split in summary.dataset.splits.values()) == 20


def test_two_preparations_in_one_process_have_benchmarks_of_their_own(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " + " ".join(f"word{number * n}" for n in range(30)))
    dropped = []
    for number in (3, 4):
        query = (tmp_path / f"{number}.txt").read_text()
        (tmp_path / f"task{number}.jsonl").write_text(json.dumps({"text": query}) + "\n")
        task = {"benchmarks.tasks": str(tmp_path / f"task{number}.jsonl")}
        sources = [tmp_path / f"{n}.txt" for n in range(20)]
        summary = prepared(tmp_path / "out", *sources, overwrite=True, **task)
        ((_, samples),) = summary.ledger.samples.items()
        dropped += [sample.key for sample in samples]
    assert dropped == ["3.txt", "4.txt"]


def test_where_all_is_dropped_it_is_said_why(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"no usable document; left out: read 1 documents.*gopher_n_words"):
        prepared(tmp_path / "out", tmp_path / "short.txt", **{"rules.sets": "gopher_n_words"})


def test_a_list_of_drops_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "drops.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"drops\.parquet is there already"):
        prepared(tmp_path / "out", drops=tmp_path / "drops.parquet")
    assert (tmp_path / "drops.parquet").read_text() == "mine"
