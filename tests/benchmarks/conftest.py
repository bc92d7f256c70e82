"""Benchmarks as programs, on little text."""

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FREQUENT = ["the", "be", "to", "of", "and", "that", "have", "with"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark by its name, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Runs a benchmark with words of a command line; returns the rows of the table that it puts into a page."""

    def run(module: Any, table: str, *words: object) -> list[list[str]]:
        page = tmp_path / "page.md"
        page.write_text(f"<!-- {table}: begin -->\n<!-- {table}: end -->\n")
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words), "--into", str(page)])
        module.main()
        lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

    return run


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that keep all rules, 200 of 2 kB each, no two of which share much."""
    chance = random.Random(0)
    rare = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(4, 9))) for _ in range(3000)]

    def sentence() -> str:
        words = [chance.choice(FREQUENT if n % 3 == 0 else rare) for n in range(14)]
        return f"{' '.join([*words, 'café']).capitalize()}."

    texts = ["\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(5)) for _ in range(200)]
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
