"""What an audit costs: the seconds of audited steps, of those between them, and of a run that is not audited.

    python benchmarks/audits.py --out DIR [--rounds 3] [--steps 16]

The demo's model on 4 workers of this machine: in turns a run without audits, and one in which every second step has
one. What other ranks compute again is one micro-batch, which here is all that a rank has of a step.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from moray.jobs.config.load import load_config
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics

WARM = 6


def settings_of(data: Path, run: Path, steps: int, **changes: object) -> dict[str, str]:
    """Of a run of the demo's model with nothing but steps."""
    plain = {
        "data.path": data,
        "run.dir": run,
        "train.steps": steps,
        "train.eval_every": 0,
        "checkpoint.every": steps,
        "recovery.snapshot_every": 0,
        "run.trackers": "none",
        "optimizer.warmup_steps": 2,
    }
    return {name: str(value) for name, value in (plain | changes).items()}


def rows_of(data: Path, run: Path, steps: int, **changes: object) -> list[dict[str, Any]]:
    """Of each step of such a run."""
    config = load_config("demo", settings_of(data, run, steps, **changes))
    assert drive(config, Console(stderr=True)) == 0
    return read_metrics(run)


def seconds(data: Path, run: Path, steps: int, audit_every: int) -> list[float]:
    return [row["seconds"] for row in rows_of(data, run, steps, **{"train.audit_every": audit_every})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    data, run = options.out / "data", options.out / f"run-{int(time.time())}"
    if not (data / "index.json").exists():
        prepare(PrepareConfig(out=data), Console(stderr=True))
    found: dict[str, list[float]] = {"without audits": [], "between two audits": [], "audited": []}
    for turn in range(options.rounds):
        found["without audits"] += seconds(data, run / f"plain-{turn}", options.steps, 0)[WARM:]
        with_audits = seconds(data, run / f"audited-{turn}", options.steps, 2)[WARM:]
        found["between two audits"] += with_audits[::2]
        found["audited"] += with_audits[1::2]
    plain = statistics.median(found["without audits"])
    print("| step | median s | ratio |\n|---|---|---|")
    for name, of in found.items():
        print(f"| {name} | {statistics.median(of):.3f} | {statistics.median(of) / plain:.2f} |")


if __name__ == "__main__":
    main()
