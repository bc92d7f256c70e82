"""What a killed worker costs: moray's own recovery, and where its time goes.

    python benchmarks/recovery.py --out DIR [--kills 10] [--set recovery.snapshot_every=0]

The demo's model (8M parameters) on 4 workers of this machine. In turn each rank is killed by SIGKILL, at a random
moment of a step; the table has the seconds of each phase from the signal until all workers compute again, and those of
the first step beside them.
"""

import argparse
import json
import os
import random
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.drive import drive

STEPS_BETWEEN = 6


class Killer(Listener):
    """Kills a rank some steps after each start, and writes down what came of it."""

    def __init__(self, kills: int) -> None:
        self.killed: list[float] = []
        self.found: list[dict[str, Any]] = []
        self._left = kills
        self._pids: list[int] = []
        self._began = 0
        self._is_armed = False

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        now = time.monotonic()
        if kind == "start":
            self._pids = [rank["pid"] for rank in fields["ranks"]]
        elif kind in ("ready", "recovered"):
            self._is_armed, self._began = True, -1
            if kind == "recovered":
                self.found[-1] |= {"recovered": now - self.killed[-1], **fields}
        elif kind == "fault":
            self.found.append({"noticed": now - self.killed[-1], "reason": fields["reason"]})

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if rank or not self._is_armed:
            return
        self._began = step if self._began < 0 else self._began
        if step >= self._began + STEPS_BETWEEN and self._left:
            self._is_armed, self._left = False, self._left - 1
            victim = self._pids[self._left % len(self._pids)]
            threading.Timer(random.Random(step).random() * status["seconds"], self._kill, [victim]).start()
        elif step >= self._began + STEPS_BETWEEN:
            os.kill(os.getpid(), signal.SIGTERM)
            self._is_armed = False

    def _kill(self, pid: int) -> None:
        self.killed.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)


def config_of(data: Path, run: Path, changes: dict[str, str]) -> RunConfig:
    settings = {"data.path": str(data), "run.dir": str(run), "run.trackers": "none", "train.eval_every": "0"}
    return load_config("demo", settings | {"cluster.max_restarts": "1000", "checkpoint.every": "4"} | changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    console = Console(stderr=True)
    data, run = options.out / "data", options.out / f"run-{int(time.time())}"
    if not (data / "index.json").exists():
        prepare(PrepareConfig(out=data), console)
    killer = Killer(options.kills)
    changes = dict(word.split("=", 1) for word in options.set)
    drive(config_of(data, run, {"train.steps": "100000", **changes}), console, killer)
    print(table(killer.found))
    (run / "recoveries.json").write_text(json.dumps(killer.found, indent=1))


def table(found: list[dict[str, Any]]) -> str:
    """Medians and extremes of each phase, in seconds."""
    whole = [one for one in found if "recovered" in one]
    names = list(dict.fromkeys(name for one in whole for name in one["phases"]))
    columns = {"noticed": [one["noticed"] for one in whole]}
    columns |= {name: [one["phases"].get(name, 0.0) for one in whole] for name in names}
    computing = [one["recovered"] - one["phases"].get("step", 0.0) for one in whole]
    columns |= {"**all compute again**": computing, "first step done": [one["recovered"] for one in whole]}
    lines = [f"| phase | median s | least | most |   ({len(whole)} kills)", "|---|---|---|---|"]
    for name, values in columns.items():
        lines.append(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
