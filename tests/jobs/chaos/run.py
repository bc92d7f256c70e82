"""One run on the nodes: started, watched, harmed, and started again by the same command where its driver has gone."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import tiny
from without_locks import NO_LOCKS

from chaos.nodes import Nodes, kill
from moray.cluster.events import read_events
from moray.cluster.json_lines import read_lines
from moray.jobs.training.metrics import read_metrics

TESTS = Path(__file__).parents[1]
# The command `moray`, whose workers have traps.
MORAY = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from chaos import worker
from moray.jobs.training import drive
drive.train = worker.train
from moray.jobs.cli import main
main()
"""
EVERY, LANES = 8, 4
BACK_S = 150.0
# Whatever number of workers there is computes the same bits; one run has more faults than anybody would put up with.
SETTINGS: dict[str, object] = {
    "cluster__launcher": "ray",
    "cluster__max_restarts": 1000,
    "cluster__device": "cpu",
    "train__exact": "true",
    "train__global_batch": LANES,
    "train__micro_batch": 1,
    "train__eval_every": 0,
    "checkpoint__every": EVERY,
    "run__trackers": "none",
}
AT_WORK = ("ready", "recovered")


def words(data: Path, folder: Path, steps: int, **changes: object) -> list[str]:
    return tiny(data, folder, **{**SETTINGS, "train__steps": steps, **changes})


@dataclass
class Run:
    nodes: Nodes
    data: Path
    folder: Path
    steps_in_all: int
    workers: str
    changes: dict[str, object] = field(default_factory=dict)
    driver: subprocess.Popen[str] | None = None
    codes: list[int] = field(default_factory=list)
    is_ill: str = ""

    def command(self, *, without_locks: bool = False, **changes: object) -> tuple[str, ...]:
        script = NO_LOCKS * without_locks + MORAY
        settings = {"cluster__workers": self.workers, **self.changes, **changes}
        return (sys.executable, "-c", script, "pretrain", *words(self.data, self.folder, self.steps_in_all, **settings))

    def start(self) -> None:
        self.driver = self.nodes.begin(*self.command())

    @property
    def driver_pid(self) -> int | None:
        """As this machine numbers it."""
        found = [pid for pid in self.nodes.head.named(b"pretrain\0") if self.driver and self.driver.poll() is None]
        return min(found, default=None)

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return list(read_events(path)) if path.exists() else []

    def steps(self) -> int:
        """The last that is done and not undone."""
        rows = read_metrics(self.folder)
        return rows[-1]["step"] if rows else 0

    def rows(self) -> list[int]:
        """The step of every row that was ever written."""
        path = self.folder / "metrics.jsonl"
        return [row["step"] for row in read_lines(path) if "step" in row] if path.exists() else []

    def generation(self) -> int:
        """Of the newest group that is at work; 0: none is."""
        newest = 0
        for event in self.events():
            if event["kind"] in AT_WORK:
                newest = event["generation"]
            elif event["kind"] in ("start", "fault"):
                newest = 0
        return newest

    def newest_generation(self) -> int:
        """Whether it is at work or not."""
        return max(event.get("generation") or 0 for event in self.events())

    def wait_until(self, holds: Callable[[], Any], what: str, seconds: float = BACK_S) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s. {self.told()}"
            time.sleep(0.05)

    def told(self) -> str:
        kinds = [{k: v for k, v in event.items() if k not in ("ranks", "time", "layout")} for event in self.events()]
        return "\n".join(map(repr, kinds[-12:]))

    def ended(self) -> str | None:
        """What the driver has said, once it has ended."""
        if not self.driver or self.driver.poll() is None:
            return None
        said, _ = self.driver.communicate()
        self.codes.append(self.driver.returncode)
        self.driver = None
        return said

    def finish(self) -> None:
        """Lets the steps that are left run on, without pauses."""
        (self.folder / "hurry").touch()
        self.wait_until(lambda: self.driver and self.driver.poll() is not None, "the end")
        said = self.ended()
        assert self.codes[-1] == 0, f"{self.codes[-1]}: {said}"

    def kill_driver(self) -> None:
        if pid := self.driver_pid:
            kill(pid)
