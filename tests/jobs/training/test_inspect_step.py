"""`moray inspect RUN --step N`: the texts are those of the stream's batches, and their documents those of the tars.

The truth: batches of a plain Stream, decoded, and the shards as webdataset reads them.
"""

import io
import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from poison import poisoned
from rich.console import Console
from tiny import tiny

from moray.data.dataset import Dataset
from moray.data.rows import IGNORE
from moray.data.sources import Sources
from moray.data.stream import Stream
from moray.data.tokenizer import load_tokenizer
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.batches import stream_of
from moray.jobs.training.drive import drive
from moray.jobs.training.inspect_step import Lookup
from moray.jobs.training.metrics import read_metrics

Moray = Callable[..., Any]
BATCH, T = 4, 64


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def config_of(data: Path, run: Path, **changes: object) -> RunConfig:
    plan = {"train__steps": 8, "train__eval_every": 0, "checkpoint__every": 4, **changes}
    return load_config(*parse_settings(tiny(data, run, **plan)))


@pytest.fixture(scope="module")
def skipping(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that skipped batches 2 and 3: its step 3 is batch 4."""
    config = config_of(
        dataset, tmp_path_factory.mktemp("runs") / "run", train__on_bad_step="skip", train__max_skipped=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with poisoned(config, nan=(2, 3)):
            assert drive(config, Console(quiet=True)) == 0
    return config


def documents_of(folder: Path) -> dict[str, list[int]]:
    """The tokens of each document of the training split, by its key, as webdataset finds them."""
    shards = sorted(map(str, folder.glob("train-*.tar")))
    found = {}
    for sample in wds.WebDataset(shards, shardshuffle=False):
        tokens, ends = (np.load(io.BytesIO(sample[name])) for name in ("tokens.npy", "ends.npy"))
        for key, document in zip(json.loads(sample["json"])["documents"], np.split(tokens, ends[:-1]), strict=True):
            found[key] = document.tolist()
    return found


def shown(moray: Moray, *arguments: object) -> list[dict[str, Any]]:
    outcome = moray("inspect", *arguments, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return [json.loads(line) for line in outcome.out.splitlines()]


def check_documents(told: dict[str, Any], row: np.ndarray, folder: Path) -> None:
    """What is told of a sequence, against the row [4, T] that a rank would train on."""
    tokenizer, documents = load_tokenizer(folder), documents_of(folder)
    tokens, _, _, numbers = row
    held = [tokens[numbers == number].tolist() for number in range(numbers.max() + 1)]
    assert held == [documents[of["key"]][slice(*of["tokens"])] for of in told["documents"]]
    assert [of["text"] for of in told["documents"]] == [tokenizer.decode(part) for part in held]
    assert [of["of"] for of in told["documents"]] == [len(documents[of["key"]]) for of in told["documents"]]
    shard = (folder / told["shard"]).read_bytes()
    assert all(shard[of["byte"] :].startswith(b"\x93NUMPY") for of in told["documents"])


def rows_of_batch(stream: Stream, n: int) -> np.ndarray:
    """int64 [B, 4, T]."""
    batch = stream.batch(n)
    return np.stack([batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT], axis=1)


def test_each_step_shows_what_it_was_taken_on(moray: Moray, skipping: RunConfig) -> None:
    """Also behind skipped batches, where the position is ahead of the step."""
    run, folder = skipping.run.dir, Path(skipping.data.path)
    stream = stream_of(Sources.open(skipping.data.folders), skipping, range(BATCH))
    for step, n in {1: 0, 2: 1, 3: 4, 8: 9}.items():
        told = shown(moray, run, "--step", step)
        assert [(one["step"], one["lane"], one["position"]) for one in told] == [
            (step, lane, n * BATCH + lane) for lane in range(BATCH)
        ]
        for one, row in zip(told, rows_of_batch(stream, n), strict=True):
            check_documents(one, row, folder)


def test_every_sequence_of_an_epoch_and_the_next_is_found(skipping: RunConfig) -> None:
    """Also those at the ends of shards, which are shorter, and batches that straddle the epochs."""
    folder = Path(skipping.data.path)
    documents, lookup = documents_of(folder), Lookup(Path(skipping.run.dir))
    stream = stream_of(Sources.open(skipping.data.folders), skipping, range(BATCH))
    n_held = 0
    for n in range(stream.sequences_per_epoch // BATCH + 2):
        for lane, row in enumerate(rows_of_batch(stream, n)):
            found, _, _, parts = lookup.find(n * BATCH + lane)
            assert found.epoch == (n * BATCH + lane) // stream.sequences_per_epoch
            held = [documents[part.passage.key][part.passage.start : part.passage.stop] for part in parts]
            numbers = row[3]
            assert held == [row[0, numbers == number].tolist() for number in range(numbers.max() + 1)]
            n_held += sum(map(len, held)) if not found.epoch else 0
    n_shards = len(list(folder.glob("train-*.tar")))
    assert n_held == sum(map(len, documents.values())) - n_shards, "but for the last token of each shard"


def test_a_position_says_whose_it_is(moray: Moray, skipping: RunConfig) -> None:
    run, folder = skipping.run.dir, Path(skipping.data.path)
    stream = stream_of(Sources.open(skipping.data.folders), skipping, range(BATCH))
    (of_step,) = shown(moray, run, "--position", 17)
    (skipped,) = shown(moray, run, "--position", 9)
    assert of_step["taken"] == "lane 1 of step 3"
    assert skipped["taken"] == "skipped before step 3: loss nan, gradient norm nan"
    check_documents(of_step, rows_of_batch(stream, 4)[1], folder)
    check_documents(skipped, rows_of_batch(stream, 2)[1], folder)


def test_the_words_have_loss_place_and_text(moray: Moray, skipping: RunConfig) -> None:
    run = skipping.run.dir
    (row,) = [row for row in read_metrics(Path(run)) if row["step"] == 3]
    outcome = moray("inspect", run, "--step", 3, "--lane", 2)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"step 3 of {run}: positions 16 to 20, loss {row['loss']:.4g}"
    assert lines[1].startswith("before it, positions 8 to 12 were skipped: loss nan")
    assert lines[2].startswith("before it, positions 12 to 16 were skipped: loss nan")
    (told,) = shown(moray, run, "--step", 3, "--lane", 2)
    assert f"position 18, lane 2: {skipping.data.path}/train-00000.tar, sequence {told['sequence']}" in outcome.out
    document = told["documents"][0]
    assert f"  {document['key']}: tokens {document['tokens'][0]:,} to" in outcome.out
    assert all(f"    {line}".rstrip() in lines for line in document["text"].split("\n"))
    assert len(shown(moray, run, "--step", 3, "--limit", 2)) == 2


def test_a_step_that_is_to_come_is_told_as_such(moray: Moray, skipping: RunConfig, tmp_path: Path) -> None:
    """With six lines of metrics left: positions go on from the last one."""
    run = tmp_path / "run"
    shutil.copytree(skipping.run.dir, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= 6))
    outcome = moray("inspect", run, "--step", 8, "--lane", 0)
    assert outcome.out.splitlines()[:2] == [
        f"step 8 of {run}: positions 36 to 40",
        "metrics.jsonl does not record it: these are its positions unless batches are skipped before it",
    ]
    (told,) = shown(moray, run, "--position", 36)
    assert told["taken"] == "of no step that metrics.jsonl records"


def test_dialogues_show_what_is_trained_on_and_lines(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """One is too long for a row, and is shown without its first turns; controls in a text are escaped."""
    turns = [[("user", f"question {n}"), ("assistant", f"answer {n} \x1b[31m")] for n in range(6)]
    turns.append([("user", "first " * 4), ("assistant", "old " * 4), ("user", "second " * 3), ("assistant", "new")])
    lines = [{"messages": [{"role": role, "content": text} for role, text in dialogue]} for dialogue in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = tmp_path / "chats"
    words = ("--kind", "chat", "--tokenizer", dataset, "--validation", 0.2, "--out", data)
    assert moray("prepare", tmp_path / "chats.jsonl", *words).code == 0
    config = config_of(data, tmp_path / "run", train__objective="sft", train__steps=2)
    assert drive(config, Console(quiet=True)) == 0
    stream, tokenizer = stream_of(Sources.open(config.data.folders), config, range(BATCH)), load_tokenizer(data)
    documents, cut = documents_of(data), 0
    for step in (1, 2):
        for told, row in zip(
            shown(moray, config.run.dir, "--step", step), rows_of_batch(stream, step - 1), strict=True
        ):
            tokens, targets, _, numbers = row
            held = [tokens[numbers == n].tolist() for n in range(numbers.max() + 1)]
            parts = [documents[of["key"]][slice(*of["tokens"])] for of in told["documents"]]
            assert [*chain(*parts)] == [*chain(*held)]
            cut += len(parts) - len(held)
            trained = [text for of in told["documents"] for text, is_trained in of["runs"] if is_trained]
            assert "".join(trained) == tokenizer.decode(targets[targets != IGNORE].tolist())
            for of in told["documents"]:
                assert of["key"] == f"{of['file']}:{of['line_or_id']}"
                assert of["text"].count("question") in (0, 1)
    assert cut > 0, "its beginning and its last turns, with a gap between them"
    outcome = moray("inspect", config.run.dir, "--step", 1)
    assert "⟦…⟧ is trained on" in outcome.out
    assert "\\x1b[31m" in outcome.out
    assert "\x1b" not in outcome.out
    assert "chats.jsonl, line " in outcome.out


def test_a_mixture_names_the_source_of_each_sequence(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    other, quiet = tmp_path / "other", Console(file=io.StringIO())
    (tmp_path / "notes.txt").write_text("Nothing but notes. " * 300)
    (tmp_path / "more.txt").write_text("And some more. " * 300)
    sources = tmp_path / "notes.txt", tmp_path / "more.txt"
    prepare(PrepareConfig(sources=sources, out=other, tokenizer=dataset, validation=0.5), quiet)
    mix = f"code=1:{dataset},notes=1:{other}"
    config = config_of(Path(), tmp_path / "run", data__path="", data__mix=mix, train__steps=2)
    assert drive(config, Console(quiet=True)) == 0
    stream = stream_of(Sources.open(config.data.folders), config, range(BATCH))
    seen = set()
    for step in (1, 2):
        for told, row in zip(
            shown(moray, config.run.dir, "--step", step), rows_of_batch(stream, step - 1), strict=True
        ):
            assert told["folder"] == config.data.folders[told["source"]]
            check_documents(told, row, Path(told["folder"]))
            seen.add(told["source"])
    assert seen == {"code", "notes"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "--step", 9], "--step 9 must lie between 1 and 8, the steps of {run} (train.steps)"),
        (["{run}", "--step", 0], "--step 0 must lie between 1 and 8, the steps of {run} (train.steps)"),
        (["{run}", "--step", 1, "--lane", 4], "--lane 4 must lie between 0 and 3: train.global_batch=4"),
        (["{run}", "--step", 1, "--lane", -1], "--lane -1 must lie between 0 and 3: train.global_batch=4"),
        (["{run}", "--step", 1, "--limit", 0], "--limit 0 must be at least 1"),
        (["{run}", "--position", 40], "--position 40 must lie between 0 and 39, the last one of {run}"),
        (["{run}", "--position", -1], "--position -1 must lie between 0 and 39, the last one of {run}"),
        (["{run}", "--step", 1, "--position", 1], "--step 1 and --position 1 both say which sequences; leave one out"),
        (["{run}", "--step", 1, "--ep", 2], "--ep says nothing of {run}: a step's text has no such"),
        (["{run}", "--position", 1, "--lane", 1], "--lane and --limit are of --step; --position is one sequence"),
        (["{run}", "--lane", 1], "--lane says nothing of {run}: it is of a run with --step"),
        (["{run}-2", "--step", 1], "{run}-2 does not exist; --step and --position are of a run's folder (run.dir)"),
        (["{data}", "--step", 1], "{data} is not a run: it has no config.toml; --step and --position are of a run's"),
    ],
)
def test_what_a_run_has_not_is_refused(moray: Moray, skipping: RunConfig, words: list[object], says: str) -> None:
    names = {"run": skipping.run.dir, "data": skipping.data.path}
    outcome = moray("inspect", *(str(word).format(**names) for word in words))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"moray: {says.format(**names)}")
    assert len(outcome.err.splitlines()) == 1


def test_other_data_in_the_same_place_are_refused(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """Both fingerprints are named; and data that are gone, by their setting."""
    data, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(dataset, data)
    config = config_of(data, tmp_path / "run", train__steps=2, checkpoint__every=1)
    assert drive(config, Console(quiet=True)) == 0
    before = Dataset.open(data).fingerprint
    (tmp_path / "text.txt").write_text("Something else. " * 200)
    (tmp_path / "text-2.txt").write_text("And another. " * 200)
    sources = tmp_path / "text.txt", tmp_path / "text-2.txt"
    prepare(PrepareConfig(sources=sources, out=other, tokenizer=dataset, validation=0.5), Console(quiet=True))
    shutil.rmtree(data)
    gone = moray("inspect", config.run.dir, "--step", 1)
    assert gone.code == 2
    assert f"data.path={data} does not exist" in gone.err
    other.rename(data)
    changed = moray("inspect", config.run.dir, "--step", 1)
    assert (changed.code, changed.out) == (2, "")
    assert f"has fingerprint {Dataset.open(data).fingerprint}, but this run was trained on {before}" in changed.err
