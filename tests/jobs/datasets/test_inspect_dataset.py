"""`moray inspect DATASET`: counts as webdataset finds them, bytes as the sources have them, samples that stay.

The truth: the shards read by webdataset, and the texts that the dataset was made of.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as wds

from moray.data.dataset import Dataset
from moray.data.index import write_index
from moray.data.shards import SplitWriter
from moray.data.tokenizer import load_tokenizer
from moray.jobs.datasets import survey
from moray.jobs.datasets.survey import source_of, survey_names
from moray.jobs.datasets.visible import line_of, visible

Moray = Callable[..., Any]


def documents_of(folder: Path, split: str) -> Iterator[tuple[str, np.ndarray, int, int]]:
    """Key, tokens, shard, and where in the shard it begins."""
    for number, shard in enumerate(sorted(folder.glob(f"{split}-*.tar"))):
        at = 0
        for sample in wds.WebDataset([str(shard)], shardshuffle=False):
            tokens, ends = (np.load(io.BytesIO(sample[name])) for name in ("tokens.npy", "ends.npy"))
            for key, document in zip(json.loads(sample["json"])["documents"], np.split(tokens, ends[:-1]), strict=True):
                yield key, document, number, at
                at += len(document)


def shown(moray: Moray, *arguments: object) -> dict[str, Any]:
    outcome = moray("inspect", *arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_what_is_counted_is_what_the_shards_hold(moray: Moray, dataset: Path) -> None:
    told = shown(moray, dataset, "--seq-len", 2048)
    found = {split: list(documents_of(dataset, split)) for split in ("train", "validation")}
    for split, documents in found.items():
        assert told["splits"][split] == {
            "documents": len(documents),
            "tokens": sum(len(tokens) for _, tokens, *_ in documents),
            "shards": len(list(dataset.glob(f"{split}-*.tar"))),
            "bytes": sum(shard.stat().st_size for shard in dataset.glob(f"{split}-*.tar")),
        }
    both = [document for documents in found.values() for document in documents]
    counts, tokens = Counter[str](), Counter[str]()
    for key, document, *_ in both:
        counts[key.split("/")[0]] += 1
        tokens[key.split("/")[0]] += len(document)
    assert told["sources"] == {name: [counts[name], tokens[name]] for name in ("json", "wsgiref")}
    lengths = sorted(len(document) for _, document, *_ in both)
    assert told["lengths"]["longest"] == lengths[-1]
    assert told["lengths"]["median"] == lengths[(len(lengths) - 1) // 2]
    inside = sum(begin // 2048 == (begin + len(document) - 1) // 2048 for _, document, _, begin in both)
    assert told["fill"]["documents"].startswith(f"{inside / len(both):.1%} of the documents")
    assert told["measured_on"] == {"names": 2, "texts": 2, "of": 2}
    assert told["report"]["documents"], "the ledger of its preparation"


def test_bytes_a_token_are_those_of_the_texts_by_their_script(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    texts = {"latin": "Plain words, nothing else. " * 40, "han": "学而时习之不亦说乎有朋自远方来" * 40}
    texts |= {"cyrillic": "Мороз и солнце, день чудесный. " * 40, "other": "12345 67890 " * 40}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text.strip())
    words = ("--tokenizer", dataset, "--validation", 0.3, "--out", tmp_path / "data")
    assert moray("prepare", *(tmp_path / f"{name}.txt" for name in texts), *words).code == 0
    told, tokenizer = shown(moray, tmp_path / "data", "--samples", 4)["bytes_per_token"], load_tokenizer(dataset)
    extra = len(tokenizer.document_start) + 1
    n_bytes = {name: len(text.strip().encode()) for name, text in texts.items()}
    n_tokens = {name: len(tokenizer.encode(text.strip())) + extra for name, text in texts.items()}
    assert told == {
        "all": pytest.approx(sum(n_bytes.values()) / sum(n_tokens.values())),
        **{name: pytest.approx(n_bytes[name] / n_tokens[name]) for name in texts},
    }


def test_samples_are_whole_documents_and_stay(moray: Moray, dataset: Path) -> None:
    texts = {
        key: load_tokenizer(dataset).backend.decode(tokens.tolist(), skip_special_tokens=True)
        for split in ("train", "validation")
        for key, tokens, *_ in documents_of(dataset, split)
    }
    drawn = {seed: shown(moray, dataset, "--samples", 4, "--seed", seed)["samples"] for seed in range(4)}
    assert drawn[0] == shown(moray, dataset, "--samples", 4)["samples"]
    for samples in drawn.values():
        assert len({sample["key"] for sample in samples}) == 4
        assert all(texts[sample["key"]] == sample["text"] for sample in samples)
    assert len({samples[0]["key"] for samples in drawn.values()}) > 1
    assert len(shown(moray, dataset, "--samples", 1000)["samples"]) == len(texts)
    assert shown(moray, dataset, "--samples", 0)["samples"] == []


def make_blocks(folder: Path, tokenizer: Path, n: int) -> Dataset:
    """So many blocks of a document each, of 1, 2, 3, ... tokens, in several shards."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    splits = {}
    for split, count in (("train", n), ("validation", 1)):
        writer = SplitWriter(folder, split, block_tokens=1, shard_tokens=50)
        for number in range(count):
            writer.add(f"made/{split}-{number}.txt", np.full(number + 2, 65, "<u2"))
        splits[split] = writer.finish()
    write_index(folder, 400, 0, splits)
    return Dataset.open(folder)


def test_at_a_url_it_is_what_it_is_in_a_folder(moray: Moray, dataset: Path) -> None:
    memory, url = fsspec.filesystem("memory"), "memory://bucket/data"
    memory.put(str(dataset), "/bucket/data", recursive=True)
    try:
        here = shown(moray, dataset)
        for place in (url, f"file://{dataset}"):
            assert shown(moray, place) == {**here, "source": place}
        memory.rm("/bucket/data/tokenizer.json")
        assert "tokenizer.json" in moray("inspect", url).err
    finally:
        memory.rm("/bucket", recursive=True)
    assert moray("inspect", url).err.startswith(f"moray: source={url} does not exist; make it with `moray prepare")
    unknown = moray("inspect", "nothing://bucket/data")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err.startswith("moray: nothing://bucket/data is no URL that can be used here")


def test_of_a_large_dataset_a_sample_is_measured_and_says_so(
    moray: Moray, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_blocks(tmp_path / "[data]", dataset, 29)
    assert len(made.splits["train"]) > 2
    whole = survey_names(made, 8, seed=0)
    assert sorted(whole.lengths.tolist()) == sorted([2, *range(2, 31)]), "each block once"
    monkeypatch.setattr(survey, "NAMED_BLOCKS", 10)
    monkeypatch.setattr(survey, "READ_BLOCKS", 5)
    part = survey_names(made, 8, seed=0)
    assert part.lengths.tolist() == whole.lengths[:10].tolist()
    outcome = moray("inspect", made.folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{made.folder}\n")
    assert "(of a sample: 10 of 30 blocks)" in outcome.out
    assert "(of a sample: 5 of 30 blocks)" in outcome.out


def test_dialogues_have_their_fill(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    turns = [[("user", f"question {n}"), ("assistant", f"answer {n}")] for n in range(12)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in dialogue]} for dialogue in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--kind", "chat", "--tokenizer", dataset, "--validation", 0.2, "--out", tmp_path / "chats")
    assert moray("prepare", tmp_path / "chats.jsonl", *words).code == 0
    told = shown(moray, tmp_path / "chats", "--seq-len", 64)
    count = told["splits"]["train"]["documents"]
    assert told["fill"]["train"].startswith(f"train: {count} dialogues in ")
    assert list(told["sources"]) == ["chats.jsonl"]
    outcome = moray("inspect", tmp_path / "chats", "--seq-len", 64)
    assert told["fill"]["validation"] in outcome.out
    assert "chats.jsonl, line " in outcome.out
    short = moray("inspect", tmp_path / "chats", "--seq-len", 4)
    assert (short.code, len(short.err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samples", -1], "--samples -1 must be at least 0"),
        (["--seq-len", 0], "--seq-len 0 must be at least 1"),
        (["--tp", 2], "--tp says nothing of {data}: a dataset has no such"),
        (["--limit", 2], "--limit says nothing of {data}: it is of a run with --step"),
    ],
)
def test_what_a_dataset_has_not_is_refused(moray: Moray, dataset: Path, words: list[object], says: str) -> None:
    outcome = moray("inspect", dataset, *words)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"moray: {says.format(data=dataset)}\n")


def test_damage_and_options_of_others_are_told(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    made = make_blocks(tmp_path / "data", dataset, 3)
    sample = made.splits["train"][0].sample(1)
    with open(tmp_path / "data" / "train-00000.tar", "r+b") as file:
        file.seek(sample.json.offset)
        file.write(b"?")
    outcome = moray("inspect", tmp_path / "data")
    assert outcome.code == 2
    assert f"sample {sample.key}, byte {sample.json.offset}: no list of documents" in outcome.err
    model = moray("inspect", "mixtral-8x7b", "--samples", 2)
    assert model.err == "moray: --samples says nothing of mixtral-8x7b: it is of a dataset (a folder with index.json)\n"


@pytest.mark.parametrize(
    ("key", "line", "source"),
    [
        ("web/a.jsonl.gz:12", ("web/a.jsonl.gz", 12), "web"),
        ("a.ndjson:7#2", ("a.ndjson", 7), "a.ndjson"),
        ("a.jsonl:00ac", None, "a.jsonl"),
        ("a.jsonl:b/3", None, "a.jsonl"),
        ("a.parquet:3", None, "a.parquet"),
        ("src#2/cli.py", None, "src#2"),
        ("src/a:b.py", None, "src"),
        ("a.jsonl#2:7", None, "a.jsonl#2"),
        ("notes.txt", None, "notes.txt"),
        ("notes.txt#3", None, "notes.txt"),
    ],
)
def test_keys_say_their_line_and_source(key: str, line: tuple[str, int] | None, source: str) -> None:
    assert line_of(key) == line
    assert source_of(key) == source


def test_controls_are_made_visible() -> None:
    assert visible("a\x1b[31m\u200b\u202e\x00\r\n\tb  　学") == "a\\x1b[31m\\u200b\\u202e\\x00\\r\n\tb  　学"
