"""`moray quality train`, as a person gives it."""

import json
import random
import re
from pathlib import Path

import pytest

from moray.data.curation.classifier import ZERO_BIN, Classifier
from moray.data.curation.words import Words
from moray.data.reading.rules import Rules
from moray.jobs import cli
from moray.jobs.datasets.quality import train_quality


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


def texts(own: str, n: int) -> list[str]:
    chance = random.Random(own)
    return [" ".join(chance.choices([f"w{number}" for number in range(200)], k=60) + [own] * 3) for _ in range(n)]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return lines(tmp_path / "good.jsonl", texts("good", 100)), lines(tmp_path / "bad.jsonl", texts("bad", 60))


def command(sources: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    good, bad = map(str, sources)
    return ["quality", "train", "--good", good, "--bad", bad, "--out", str(out), "--text-field", "body", *more]


def refusal(words: list[str]) -> str:
    with pytest.raises(cli.UserError) as error:
        cli.dispatch(words)
    return str(error.value)


def test_a_classifier_is_written_and_told_of(
    tmp_path: Path, sources: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.safetensors"
    assert cli.dispatch(command(sources, out)) == 0
    told = capsys.readouterr().out
    classifier = Classifier.load(out)
    good, bad = classifier.score(Words.of([texts("good", 3)[0], texts("bad", 3)[0]])).tolist()
    assert good > ZERO_BIN > bad
    assert re.search(r"good +90 documents learnt, 10 held out\nbad +54 documents learnt, 6 held out\n", told)
    assert re.search(r"AUC +1\.0000 of those held out.*\nwhere .*q\.safetensors .* MB/s\)\n", told)
    assert classifier.fingerprint in told
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl", "bad.jsonl", "q.safetensors"}


def test_the_same_command_gives_the_same_bytes_and_replaces_a_classifier_alone(
    tmp_path: Path, sources: tuple[Path, Path]
) -> None:
    out = tmp_path / "q.safetensors"
    cli.dispatch(command(sources, out))
    first = out.read_bytes()
    assert refusal(command(sources, out)).startswith(f"out={out} already holds a classifier; ")
    cli.dispatch(command(sources, out, "--seed", "1", "--overwrite"))
    assert out.read_bytes() != first
    cli.dispatch(command(sources, out, "--overwrite"))
    assert out.read_bytes() == first
    assert "is no quality classifier" in refusal(command(sources, sources[0], "--overwrite"))
    assert sources[0].read_text().startswith("{")


def test_sources_with_too_little_are_named(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    good, bad = sources
    empty, one = lines(tmp_path / "empty.jsonl", []), lines(tmp_path / "one.jsonl", ["a"])
    out = tmp_path / "q.safetensors"
    assert "empty.jsonl: holds no documents" in refusal(command((good, empty), out))
    assert "bad holds 1 documents that differ" in refusal(command((good, one), out))
    assert "good holds 1 documents that differ" in refusal(command((one, bad), out))
    assert "held_out=1.0 must lie between 0 and 1" in refusal(command(sources, out, "--held-out", "1"))
    assert not out.exists()


def test_out_and_sources_must_be_there(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    for out in (tmp_path, tmp_path / "none" / "q"):
        assert refusal(command(sources, out)) == f"out={out} must be a file in a folder that exists"
    words = ["quality", "train", "--good", "--bad", str(sources[1]), "--out", str(tmp_path / "q")]
    assert refusal(words)
    assert "eval" in refusal(["quality", "eval", *command(sources, tmp_path / "q")[2:]])


def test_what_reading_left_out_is_told(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    with open(sources[1], "a") as file:
        file.write("no JSON\n")
    found = train_quality(
        [sources[0]], [sources[1]], tmp_path / "q", held_out=0.1, seed=0, overwrite=False, reading=Rules("body")
    )
    assert "bad.jsonl, line 61" in str(found)
