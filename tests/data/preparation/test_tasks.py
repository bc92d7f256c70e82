"""A task is done once, and what a power cut has left of its files is not taken for its result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moray.data.preparation.tasks import LEDGER, clear_partials, perform


@dataclass(frozen=True)
class Write:
    out: Path
    text: str
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        (folder / "text").write_text(self.text)
        if not self.text:
            raise RuntimeError("nothing to write")
        return {"length": len(self.text)}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = perform(Write(tmp_path / "stage" / "0", "one"))
    assert (first.found, (first.folder / "text").read_text()) == ({"length": 3}, "one")
    assert perform(Write(tmp_path / "stage" / "0", "another")) == first
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["0"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "no JSON", "no sizes"])
def test_what_is_no_longer_whole_is_done_again(tmp_path: Path, damage: str) -> None:
    out = perform(Write(tmp_path / "stage" / "0", "one")).folder
    if damage == "shorter":
        (out / "text").write_text("o")
    elif damage == "gone":
        (out / "text").unlink()
    else:
        (out / LEDGER).write_text("{" if damage == "no JSON" else json.dumps({"found": {}}))
    assert perform(Write(out, "two!")).found == {"length": 4}
    assert (out / "text").read_text() == "two!"
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["0"]


def test_what_fails_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing"):
        perform(Write(tmp_path / "stage" / "0", ""))
    assert not (tmp_path / "stage" / "0").exists()
    clear_partials(tmp_path)
    assert not list((tmp_path / "stage").iterdir())
