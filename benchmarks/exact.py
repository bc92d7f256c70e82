"""What train.exact costs: seconds of a step and memory of a worker, with and without, on 1, 2 and 4 workers.

    python benchmarks/exact.py --out DIR [--rounds 2] [--steps 12]

The demo's model with 16 micro-batches of a sequence, in turns. All exact runs must end with the same bits in losses and
weights: it says so, or fails.
"""

import argparse
import hashlib
import statistics
import time
from collections import defaultdict
from pathlib import Path

from audits import rows_of
from rich.console import Console

from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.parallel.checkpoint.commits import list_commits, read_tensors

WARM = 4
WORKERS = (1, 2, 4)


def digest_of(run: Path, losses: list[float]) -> str:
    """Of the losses, and of weights and optimizer of the last commit, whatever layout wrote it."""
    commit = list_commits(run / "checkpoints")[-1]
    digest = hashlib.sha256(repr(losses).encode())
    for name, tensor in read_tensors(commit, sorted(commit.manifest.tensors)):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    data, out = options.out / "data", options.out / f"run-{int(time.time())}"
    if not (data / "index.json").exists():
        prepare(PrepareConfig(out=data), Console(stderr=True))
    seconds, memory, digests = defaultdict(list), defaultdict(list), {}
    for turn in range(options.rounds):
        for workers in WORKERS:
            for exact in (False, True):
                run = out / f"{turn}-{workers}-{exact}"
                settings = {"train.exact": exact, "cluster.workers": workers, "layout.dp_shard": "none", "layout.ep": 1}
                rows = rows_of(data, run, options.steps, **settings, **{"train.micro_batch": 1})
                seconds[workers, exact] += [row["seconds"] for row in rows[WARM:]]
                memory[workers, exact].append(rows[-1]["memory_bytes"])
                if exact:
                    digests[f"{workers} workers, round {turn}"] = digest_of(run, [row["loss"] for row in rows])
    print("| workers | s | exact s | ratio | MiB a worker | exact MiB |\n|---|---|---|---|---|---|")
    for workers in WORKERS:
        plain, exact = (statistics.median(seconds[workers, is_exact]) for is_exact in (False, True))
        most = [max(memory[workers, is_exact]) / 2**20 for is_exact in (False, True)]
        print(f"| {workers} | {plain:.3f} | {exact:.3f} | {exact / plain:.2f} | {most[0]:.0f} | {most[1]:.0f} |")
    for name, digest in digests.items():
        print(f"{digest[:16]}  exact, {name}")
    assert len(set(digests.values())) == 1


if __name__ == "__main__":
    main()
