"""What an audit costs: the seconds of audited steps, of those between them, and of a run that is not audited.

    python benchmarks/audits.py --out DIR [--steps 40]

The demo's model on 4 workers of this machine, dp_shard=4 ep=2, and a process each: a run without audits, then one in
which every second step has one.
"""

import argparse
import statistics
import time
from pathlib import Path

from rich.console import Console

from moray.jobs.config.run import load_config
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.pretrain import pretrain

WARM = 6


def seconds(data: Path, run: Path, steps: int, audit_every: int) -> list[float]:
    """Of each step."""
    settings = {"data.path": data, "run.dir": run, "train.steps": steps, "train.audit_every": audit_every}
    plain = {"train.eval_every": 0, "checkpoint.every": steps, "recovery.snapshot_every": 0, "run.trackers": "none"}
    config = load_config("demo", {name: str(value) for name, value in (settings | plain).items()})
    assert pretrain(config, Console(stderr=True)) == 0
    return [row["seconds"] for row in read_metrics(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    data, run = options.out / "data", options.out / f"run-{int(time.time())}"
    if not (data / "index.json").exists():
        prepare(["stdlib"], data, console=Console(stderr=True))
    plain = statistics.median(seconds(data, run / "plain", options.steps, 0)[WARM:])
    audited = seconds(data, run / "audited", options.steps, 2)[WARM:]
    print("| step | median s | ratio |\n|---|---|---|")
    for name, of in (("without audits", [plain]), ("between two audits", audited[::2]), ("audited", audited[1::2])):
        print(f"| {name} | {statistics.median(of):.3f} | {statistics.median(of) / plain:.2f} |")


if __name__ == "__main__":
    main()
