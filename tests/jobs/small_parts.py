"""A preparation of little text in many parts, runs and buckets; as a program: OUT ENGINE WORKERS SOURCE …

All sizes are decided on by the driver, so that its processes need not know of these.
"""

import gzip
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from moray.data.preparation import bucket, near, read
from moray.data.reading import pieces
from moray.jobs.datasets import stages
from moray.jobs.datasets.config import load_preparation
from moray.jobs.datasets.prepare import Summary, prepare

SIZES = [
    (pieces, "PIECE_BYTES", 1 << 14),
    (read, "PIECE_BYTES", 1 << 14),
    (stages, "RUN_BYTES", 1 << 13),
    (near, "BUCKET_BYTES", 1 << 15),
    (bucket, "BUCKET_BYTES", 1 << 15),
    (stages, "FILTER_HASHES", 1 << 7),
]
SETTINGS = {
    "rules.sets": "gopher-quality",
    "rules.bounds": "gopher_n_words=40..100000",
    "duplicates.near": 0.72,
    "duplicates.paragraphs": True,
    "vocab_size": 400,
    "validation": 0.3,
    "kind": "text",
}


def prepared(out: Path, engine: str, workers: int | None, *sources: str | Path) -> Summary:
    with pytest.MonkeyPatch.context() as patch:
        for where, name, size in SIZES:
            patch.setattr(where, name, size)
        how = {"sources": sources, "out": out, "engine": engine, "workers": workers}
        return prepare(load_preparation("none", SETTINGS | how), Console(file=io.StringIO()))


def make_corpus(folder: Path) -> list[Path]:
    """Sources of all formats: texts that are new, almost or wholly those of others, too short, or share paragraphs."""
    chance = random.Random(0)
    words = "the be to of and that have with " + " ".join(_word(chance) for _ in range(600))
    texts: list[str] = []
    shared = [_paragraph(chance, words.split()) for _ in range(12)]
    for n in range(300):
        kind = chance.random()
        if texts and kind < 0.15:
            changed = chance.choice(texts).split(" ")
            changed[chance.randrange(len(changed))] = f"changed{n}"
            texts.append(" ".join(changed))
        elif texts and kind < 0.25:
            texts.append(chance.choice(texts))
        elif kind < 0.3:
            texts.append(f"too short {n}")
        else:
            own = [_paragraph(chance, words.split()) for _ in range(chance.randint(2, 5))]
            texts.append("\n\n".join([*own, chance.choice(shared)] if kind < 0.6 else own))
    lines, rows, members, packed, files = (texts[n::5] for n in range(5))
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, None]))
    table = pyarrow.table({"id": [f"row-{n}" for n in range(len(rows))], "text": rows})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=8)
    with tarfile.open(folder / "members.tar", "w") as archive:
        for n, text in enumerate(members):
            member = tarfile.TarInfo(f"{n:03d}.txt")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    with gzip.open(folder / "packed.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(packed)))
    (folder / "files").mkdir()
    for n, text in enumerate(files):
        (folder / "files" / f"{n:03d}.md").write_text(text)
    return sorted(folder.iterdir())


def _word(chance: random.Random) -> str:
    return "".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(3, 9)))


def _paragraph(chance: random.Random, words: list[str]) -> str:
    frequent = words[:8]
    return " ".join(chance.choice(frequent if n % 4 == 0 else words) for n in range(chance.randint(30, 80))) + "."


def main() -> None:
    out, engine, workers, *sources = sys.argv[1:]
    prepared(Path(out), engine, int(workers), *sources)
