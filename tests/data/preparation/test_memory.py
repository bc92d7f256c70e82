"""What the stages hold in memory, whatever they are given: a process of its own each, which measures itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import sys
from pathlib import Path
import numpy as np
from moray.data.preparation.bucket import SortBucket, read_bucket
from moray.data.preparation.curate import Curation
from moray.data.preparation.near import FindNear
from moray.data.preparation.read import ReadPart, parts_of
from moray.data.preparation.runs import runs_in
from moray.data.preparation.selection import Selection
from moray.data.preparation.tasks import perform
from moray.data.reading.rules import Rules
from moray.data.reading.sources import find

def peak():
    # Of this process alone: getrusage would give the one of the process that began it, where that was higher.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

path, folder, run_mb, n_buckets = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
(source,) = find([path])
pieces = tuple(piece for part in parts_of(source) for piece in part)
curation, selection = Curation(bands=(14, 8)), Selection()
# What a batch takes, and what is imported or made once, is there before: a small part of the same kind.
small = path.with_name("small.jsonl")
(other,) = find([small])
perform(ReadPart(folder / "small", next(parts_of(other)), other.label, Rules(), curation, 0, run_mb << 20, False))
before = peak()
part = perform(ReadPart(folder / "part", pieces, source.label, Rules(), curation, 0, run_mb << 20, False))
runs = tuple(runs_in(part.folder, 0))
near = tuple(
    perform(FindNear(folder / f"near-{n}", runs, selection, n, n_buckets)).folder for n in range(n_buckets)
)
for n in range(n_buckets):
    out = folder / f"bucket-{n}"
    done = perform(SortBucket(out, runs, ("x",), near, selection, False, n, n_buckets, False))
    assert sum(1 for _ in read_bucket(np.load(out / "order.npy"), runs)) == done.found["n_documents"]
print(len(runs), peak() - before)
"""


@pytest.mark.parametrize("length", [60, 3000, 1_000_000])
def test_stages_hold_a_run_or_a_bucket_and_no_more(tmp_path: Path, length: int) -> None:
    """Of documents of any size, many times as much as a run of 2 MiB or a bucket holds."""
    n_bytes = 24 << 20 if length > 100 else 6 << 20  # small ones take several times their text
    with open(tmp_path / "rows.jsonl", "w") as file, open(tmp_path / "small.jsonl", "w") as small:
        for number in range(n_bytes // length):
            words = " ".join(f"w{(number * 7919 + n * (number % 97 + 1)) % 50021}" for n in range(length // 7))
            line = json.dumps({"text": f"{number} {words}"}) + "\n"
            file.write(line)
            if small.tell() < 3 << 20:
                small.write(line)
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "rows.jsonl"), str(folder), "2", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    n_runs, grown = done.stdout.split()
    assert int(n_runs) > 8
    assert float(grown) < 16, f"{grown} MiB"


LONG = """
import random
from dataclasses import replace
from pathlib import Path
from moray.data.curation.cleaning import Cleaning
from moray.data.curation.rules import RULE_SETS
from moray.data.preparation.curate import Curation, curate
from moray.data.preparation.ledger import Ledger
from moray.data.reading.documents import Document

cleaning = Cleaning(lines=True, mask=("email", "ip"))
rules = tuple(replace(rule, low=None, high=None) for each in RULE_SETS.values() for rule in each)  # none is broken
chance = random.Random(0)
words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 7))) for _ in range(1 << 16)]
text = "\\n".join(" ".join(chance.choices(words, k=12)) + "." for _ in range((16 << 20) // 66))
assert curate([Document("long", text)], Curation(cleaning, rules, bands=(14, 8)), 0, "all", Ledger())
print(len(text) >> 20, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10)
"""


def test_a_document_of_16_mib_takes_a_few_times_its_size() -> None:
    """Through all that the web recipe does to it: 3 million words."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert size >= 15
    assert peak < 400, f"{peak} MiB"
