"""`moray checkpoints` tells of every commit, and finds each flipped byte."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moray.jobs.runs.checkpoints import show_checkpoints
from moray.parallel.checkpoint.checkpointer import Checkpointer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Commits of the steps 2 and 4, of about 4 MiB each."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=9, keep_every=None, on_event=lambda kind, fields: None)
    for step in (2, 4):
        metadata = {"loss": 1.25 * step, "layout": {"dp_replicate": 1, "dp_shard": 2, "tp": 1, "ep": 2}}
        checkpointer.save(step, {"w": torch.full((1 << 20,), float(step))}, metadata)
    checkpointer.finish()
    return tmp_path


def show(run: Path, check: bool, width: int = 500) -> tuple[int, list[str], list[str]]:
    """The exit code, the table's rows, and the lines below it."""
    console = Console(file=io.StringIO(), width=width)
    code = show_checkpoints(run, check, console)
    _, *lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    below = [line for line in lines if line.startswith(str(run))]
    return code, lines[: len(lines) - len(below)], below


@pytest.mark.parametrize(("check", "state"), [(False, "whole by its manifest"), (True, "verified")])
def test_whole_commits_are_listed_oldest_first(run: Path, check: bool, state: str) -> None:
    code, rows, below = show(run, check)
    assert (code, below) == (0, [])
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    assert [(row[0], row[2], row[3], row[4], row[5]) for row in cells] == [
        ("2", "4.0 MiB", "2.500", "dp_shard=2 ep=2", state),
        ("4", "4.0 MiB", "5.000", "dp_shard=2 ep=2", state),
    ]


@pytest.mark.parametrize("check", [False, True])
def test_a_terminal_of_80_columns_breaks_no_word_and_no_path(run: Path, check: bool) -> None:
    shard_of(run, 2).write_bytes(b"short")
    flip(shard_of(run, 4))
    wide, narrow = show(run, check), show(run, check, width=80)
    assert {word for row in narrow[1] for word in row.split()} == {word for row in wide[1] for word in row.split()}
    assert max(map(len, narrow[1])) <= 80
    assert narrow[2] == wide[2]
    assert f"{run}/checkpoints/step-000000002: " in wide[2][0]


def shard_of(run: Path, step: int) -> Path:
    (file,) = (run / "checkpoints" / f"step-{step:09d}").glob("*.safetensors")
    return file


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_is_found_by_reading_every_byte(run: Path) -> None:
    file = shard_of(run, 2)
    flip(file)
    assert show(run, check=False)[0] == 0, "the manifest alone can't tell"
    code, rows, below = show(run, check=True)
    assert (code, len(below)) == (1, 1)
    assert f"{file}: its sha256 is" in below[0]
    assert "damaged: refused on resume" in rows[0]
    assert "verified" in rows[1]


@pytest.mark.parametrize("check", [False, True])
def test_what_is_missing_or_cut_off_needs_no_reading(run: Path, check: bool) -> None:
    shard_of(run, 2).unlink()
    code, rows, below = show(run, check)
    assert code == 1
    assert below[0].startswith(f"{run}/checkpoints/step-000000002: its manifest, or a file that it names, is missing")
    assert "damaged: refused on resume" in rows[0]
    assert "4.0 MiB" in rows[1]


def test_a_run_without_checkpoints_is_told_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoints; `moray pretrain --run\.dir .*` makes them"):
        show(tmp_path, check=False)


def test_a_commit_of_a_line_that_was_given_up_is_told_as_one(run: Path) -> None:
    """Step 4 was out of reach when another attempt resumed, from 2, and committed 3."""
    manifest = run / "checkpoints" / "step-000000004" / "manifest.json"
    manifest.rename(run / "aside")
    checkpointer = Checkpointer(run / "checkpoints", keep=9, keep_every=None, on_event=lambda kind, fields: None)
    assert checkpointer.load({"w": torch.zeros(1 << 20)})
    checkpointer.save(3, {"w": torch.zeros(1 << 20)}, {})
    checkpointer.finish()
    (run / "aside").rename(manifest)
    code, rows, _ = show(run, check=False)
    assert code == 0
    assert ["given up" in row for row in rows] == [False, False, True]
