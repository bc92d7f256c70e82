"""What a run costs around its steps: a run of `moray pretrain` under Ray, beside the same one under torchrun.

    python benchmarks/launchers.py --out DIR [--rounds 3] [--steps 24] [--workers 2]

The demo's model, on workers of a thread each, with nothing but steps: no snapshots, trackers or commits between them.
Runs take turns. A step's seconds are those of metrics.jsonl: fetching the batch, forward, backward, clipping, update.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from audits import WARM, rows_of, settings_of
from rich.console import Console

from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.metrics import read_metrics

SETTINGS = {
    "layout.ep": 1,
    "layout.dp_shard": "none",
    "train.seq_len": 256,
    "train.global_batch": 16,
    "train.micro_batch": 4,
    "train.dtype": "float32",
}
"""As benchmarks/workers.py has them."""


def seconds_under_torchrun(data: Path, run: Path, steps: int, workers: int) -> list[float]:
    settings = settings_of(data, run, steps, **SETTINGS, **{"cluster.launcher": "torchrun"})
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    subprocess.run(
        [*torchrun, "-m", "moray", "pretrain", "--recipe", "demo", *words], check=True, stdout=subprocess.DEVNULL
    )
    return [row["seconds"] for row in read_metrics(run)[WARM:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data, out = options.out / "data", options.out / f"run-{int(time.time())}"
    if not (data / "index.json").exists():
        prepare(PrepareConfig(out=data), Console(stderr=True))
    pairs = []
    for turn in range(options.rounds):
        changes = {**SETTINGS, "cluster.workers": options.workers}
        under_ray = [row["seconds"] for row in rows_of(data, out / f"ray-{turn}", options.steps, **changes)[WARM:]]
        under_torchrun = seconds_under_torchrun(data, out / f"torchrun-{turn}", options.steps, options.workers)
        pairs.append((statistics.median(under_ray), statistics.median(under_torchrun)))
    ray, torchrun = (statistics.median(side) for side in zip(*pairs, strict=True))
    print("| workers | Ray: s a step | torchrun: s a step | ratio |\n|---|---|---|---|")
    ratio = statistics.median(ray / torchrun for ray, torchrun in pairs)
    print(f"| {options.workers} | {ray:.3f} | {torchrun:.3f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
