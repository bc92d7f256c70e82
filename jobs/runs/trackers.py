"""Where a run's curves are shown: one small class a tracker, each imported only where it is asked for."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from moray import UserError

MLFLOW_LIMIT = 100  # parameters of one request


class Tracker(Protocol):
    """One that has nothing to flush, as its `write` waits or a process of its own writes, and that forgets nothing."""

    id: str
    """Under which a later attempt goes on with the same curves."""
    step: int
    """The last one that it has."""

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Adds a step. texts: Markdown, for those that show it."""

    def undo(self, step: int) -> None:
        """A fault undid the steps above `step`. What was sent stays where it cannot be taken back: the steps are
        computed again as they were, and are not sent twice."""

    def flush(self) -> None:
        """Returns once what was written would outlive this process. Raises OSError where the disk lacks room."""

    def close(self) -> None:
        """After the last step."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for one that is not installed, or not told where to write."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"run.trackers={name}, but {name} is not installed; pip install {name}, or leave it out")
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UserError(
                "run.trackers=mlflow needs MLFLOW_TRACKING_URI in the environment: a server (http://HOST:5000), "
                "or a file (sqlite:////path/mlflow.db)"
            )


def open_tracker(name: str, run: Path, settings: Mapping[str, Any], id: str | None, step: int) -> Tracker:
    """Goes on after `step` with the curves of that id; None: begins new ones, of a run with these settings."""
    opener: Callable[..., Tracker] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}[name]
    return opener(run, settings, id, step)


class TensorBoard(Tracker):
    """Writes RUN/tensorboard/, where a new file says from which step on it replaces the older ones."""

    id = ""

    def __init__(self, run: Path, settings: Mapping[str, Any], id: str | None, step: int) -> None:
        self._folder = run / "tensorboard"
        self._open(step)

    def _open(self, step: int) -> None:
        from moray.jobs.runs.board import Board

        self.step, self._board = step, Board(self._folder, step + 1)

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._board.write(step, numbers, texts)
        self.step = step

    def undo(self, step: int) -> None:
        self._open(step)

    def flush(self) -> None:
        self._board.flush()


class Wandb(Tracker):
    """Weights & Biases, as WANDB_PROJECT, WANDB_MODE and the like have it; its files lie in RUN/wandb/."""

    def __init__(self, run: Path, settings: Mapping[str, Any], id: str | None, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "moray"),
            name=run.name,
            dir=run,
            id=id,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id, self.step = self._run.id, step

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._run.log(dict(numbers), step=step)
        self.step = step

    def close(self) -> None:
        self._run.finish()


class Mlflow(Tracker):
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (or `moray`) at MLFLOW_TRACKING_URI."""

    def __init__(self, run: Path, settings: Mapping[str, Any], id: str | None, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        self.step = step
        if id is None:
            self.id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            params = [Param(name, str(value)) for name, value in settings.items()]
            for start in range(0, len(params), MLFLOW_LIMIT):
                self._client.log_batch(self.id, params=params[start : start + MLFLOW_LIMIT])
        else:
            self.id = id
            self._client.update_run(id, status="RUNNING")
            # What was sent just before a kill is there, though nobody noted it.
            self.step = max([step, *(point.step for point in self._client.get_metric_history(id, "loss"))])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "moray")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        points = [self._metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self.id, metrics=points)
        self.step = step

    def close(self) -> None:
        self._client.set_terminated(self.id)
