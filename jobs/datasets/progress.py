"""How far each stage of a preparation is: bytes, their rate, and the time that is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclass
class StageBar:
    """A line for each stage."""

    progress: Progress

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator["Bar"]:
        if not total:
            yield Bar(self.progress, None)
            return
        task = self.progress.add_task(name, total=total)
        yield Bar(self.progress, task)
        self.progress.update(task, completed=total)


@dataclass
class Bar:
    """Bytes that were gone through, as they are told, and as tasks that are done make them sure."""

    progress: Progress
    task: TaskID | None
    sure: int = 0

    def tick(self, n_bytes: int) -> None:
        if self.task is not None and n_bytes:
            self.progress.advance(self.task, n_bytes)

    def done(self, size: int) -> None:
        """A task that was done before has told nothing of itself."""
        self.sure += size
        if self.task is not None and self.progress.tasks[self.task].completed < self.sure:
            self.progress.update(self.task, completed=self.sure)


@contextmanager
def stage_bars(console: Console) -> Iterator[StageBar]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield StageBar(progress)
