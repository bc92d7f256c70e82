"""What a person sees of a run while it goes on: the newest step, and every event that matters."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moray.cluster.events import EventLog, is_event
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.files import Tail
from moray.jobs.runs.words import describe

PLAIN_EVERY_S = 10.0  # between two lines where no terminal can show one that changes
LOOK_EVERY_S = 0.2  # for events that others wrote, however many ranks tell of their steps meanwhile


class Listener:
    """Hears of everything that happens while a run goes on; `moray demo` is one that interferes."""

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """An event of the cluster, as `cluster.events` lists them."""

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        """A rank's newest heartbeat; it may come again."""


class Watcher(Listener):
    """Writes the cluster's events to the run's log, and shows the newest step: in place, or now and then as a line.

    What the workers themselves have to say (a damaged or failed commit) comes by way of the log, too, or as `told` with
    a heartbeat.
    """

    def __init__(self, config: RunConfig, console: Console, next_listener: Listener) -> None:
        self._console, self._next = console, next_listener
        self._events = EventLog(Path(config.run.dir) / "events.jsonl")
        self._tail = Tail(self._events.path)
        self._steps = config.train.steps
        self._display = StepDisplay(self._steps, console) if console.is_terminal else None
        self._row: dict[str, Any] | None = None  # until it is printed
        self._step = 0
        self._told: set[str] = set()
        self._printed_at = self._looked_at = time.monotonic()

    def __enter__(self) -> "Watcher":
        if self._display:
            self._display.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show_new_events()
        if self._display:
            self._display.live.stop()
        elif self._row:
            self._print_row()

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self._events.write(kind, **fields)
        self._show_new_events()
        self._next.on_event(kind, fields)

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        now = time.monotonic()
        if rank == 0 and "loss" in status and step != self._step:
            self._row, self._step = {**status, "step": step}, step
            if self._display:
                self._display.show(self._row)
            elif now - self._printed_at >= PLAIN_EVERY_S:
                self._printed_at = now
                self._print_row()
        if (line := status.get("told")) and line not in self._told:
            self._told.add(line)
            self._print(line)
        if rank == 0 or now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._show_new_events()
        self._next.on_status(rank, step, status)

    def _print_row(self) -> None:
        assert self._row
        self._print(f"step {self._row['step']}/{self._steps}  " + "  ".join(numbers(self._row)))
        self._row = None

    def _show_new_events(self) -> None:
        for event in self._tail.read():
            # What came by heartbeat, as the log had no room for it then, is not told again.
            if is_event(event) and (line := describe(event["kind"], event)) and line not in self._told:
                self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class StepDisplay:
    """A bar, and below it the numbers of the newest step, whole whatever the terminal's width."""

    def __init__(self, steps: int, console: Console) -> None:
        self._bar = Progress(
            TextColumn("training"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=steps)
        self.live = Live(Group(self._bar, Text("starting workers")), console=console)

    def show(self, row: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=row["step"])
        self.live.update(Group(self._bar, *map(Text, numbers(row))))


def numbers(row: dict[str, Any]) -> list[str]:
    """A step's row of metrics.jsonl for the eye: a line that fits 80 columns, and one of the experts' balance."""
    parts = [
        f"reward {row['reward']:.3f}" if "reward" in row else f"loss {row['loss']:.3f}",
        f"{_short(row['tokens_per_second'])} of {_short(row['processed_tokens_per_second'])} tokens/s",
        f"MFU {row['mfu']:.0%}",
        f"norm {row['grad_norm']:.2f}",
        f"lr {row['lr']:.1e}",
        f"{row['memory_bytes'] / 2**30:.1f} GiB",
    ]
    lines = ["  ".join(parts)]
    if row["expert_balance"]:
        lines.append("experts max/mean " + " ".join(f"{value:.1f}" for value in row["expert_balance"]))
    return lines


def _short(count: float) -> str:
    """Three digits of a large number."""
    if count < 100_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.0f}k" if count < 1e6 else f"{count / 1e6:.2f}M"
