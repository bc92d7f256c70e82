"""`moray pretrain`: checks everything that can be wrong, then launches the workers and shows how they get on."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cluster.events import EventLog, read_events
from cluster.launch import launch
from cluster.worker import EXIT_INTERRUPTED
from data.dataset import Dataset
from jobs.config import RunConfig
from jobs.run_folder import claim
from jobs.trainer import train
from parallel.checkpoint import list_commits


class Listener:
    """Hears of everything that happens while a run goes on; `moray demo` is one that interferes."""

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """An event of the cluster, as `cluster.events` lists them."""

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        """A rank's newest heartbeat."""


def pretrain(config: RunConfig, console: Console | None = None, listener: Listener | None = None) -> int:
    """Runs to the last step, or until asked to stop; returns the exit code. Raises ValueError for a user's mistake."""
    dataset = Dataset.open(config.data.path)
    dataset.check_vocabulary(config.model.vocab_size)
    commits = list_commits(Path(config.run.dir) / "checkpoints")
    if commits:
        dataset.check_fingerprint(commits[-1].manifest.metadata["data"]["fingerprint"])
    is_first = os.environ.get("RANK", "0") == "0" or config.cluster.launcher != "torchrun"
    if is_first:
        claim(config)
    console = console or Console(stderr=True, quiet=not is_first)
    with Watcher(config, console, listener or Listener()) as watcher:
        code = launch(
            train,
            config,
            launcher=config.cluster.launcher,
            workers=config.cluster.workers,
            max_restarts=config.cluster.max_restarts,
            heartbeat_timeout_s=config.cluster.heartbeat_timeout_s,
            on_event=watcher.on_event,
            on_status=watcher.on_status,
        )
    if code == EXIT_INTERRUPTED:
        console.print("stopped on request, committed; the same command resumes")
    return code


class Watcher(Listener):
    """Writes the cluster's events to the run's log, and shows the newest step as one line.

    What the workers themselves have to say (a damaged or failed commit) comes by way of the log, too.
    """

    def __init__(self, config: RunConfig, console: Console, next_listener: Listener) -> None:
        self._console, self._next = console, next_listener
        self._events = EventLog(Path(config.run.dir) / "events.jsonl")
        self._shown = len(self._read_events())
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=config.train.steps, line="starting workers")

    def __enter__(self) -> "Watcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show_new_events()
        self._progress.stop()

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self._events.write(kind, **fields)
        self._show_new_events()
        self._next.on_event(kind, fields)

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if rank == 0 and "loss" in status:
            self._progress.update(self._task, completed=step, line=progress_line(status))
            self._show_new_events()
        self._next.on_status(rank, step, status)

    def _show_new_events(self) -> None:
        events = self._read_events()
        for event in events[self._shown :]:
            line = describe(event["kind"], event)
            if line:
                self._console.print(line, highlight=False, soft_wrap=True)
        self._shown = len(events)

    def _read_events(self) -> list[dict[str, Any]]:
        return list(read_events(self._events.path)) if self._events.path.exists() else []


def progress_line(row: dict[str, Any]) -> str:
    """A step's row of metrics.jsonl for the eye."""
    parts = [
        f"loss {row['loss']:.3f}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"MFU {row['mfu']:.0%}",
        f"norm {row['grad_norm']:.2f}",
        f"lr {row['lr']:.1e}",
    ]
    if row["expert_balance"]:
        parts.append("experts max/mean " + " ".join(f"{value:.1f}" for value in row["expert_balance"]))
    parts.append(f"{row['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)


def describe(kind: str, fields: dict[str, Any]) -> str | None:
    """A line for an event that a person watching wants to know of."""
    if kind == "fault":
        return f"fault: rank {fields.get('rank')} (pid {fields.get('pid')}): {fields.get('reason')}"
    if kind == "recovered":
        return f"recovered: generation {fields.get('generation')} at work after {fields.get('seconds', 0):.1f} s"
    if kind == "commit_refused":
        return f"refused the damaged commit of step {fields.get('step')}: {'; '.join(fields.get('problems', []))}"
    if kind == "commit_failed":
        return f"{fields.get('error')}; the next commit tries again"
    if kind == "stop":
        return "stopping: the workers finish their step and commit"
    return None
