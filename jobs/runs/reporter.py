"""Keeps RUN/status.json true while a driver lives: `moray status` reads it."""

import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from moray import UserError
from moray.cluster.exit_codes import EXIT_FAILED, EXIT_KILLED_BY_KEYBOARD, EXIT_MISTAKE, EXIT_SUPERSEDED
from moray.cluster.process import Process
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.files import replace_file
from moray.jobs.runs.status import BEAT_EVERY_S, FILE, Beat, read_beat
from moray.jobs.runs.watcher import Listener
from moray.parallel.checkpoint.generations import SupersededError

JOB_VARIABLE = "MORAY_KUBERNETES_JOB"  # which a pod is given: Kubernetes itself tells it no more than its own name


class Reporter(Listener):
    """Writes the file when an attempt begins and ends, and every few seconds between.

    A thread writes: the driver itself may wait, for slots or for a step. What cannot be written (a full disk, a folder
    that was removed) costs nothing but the word, and once another attempt's word stands there this one is silent.
    """

    def __init__(self, config: RunConfig, next_listener: Listener) -> None:
        self._run, self._next = Path(config.run.dir), next_listener
        now = time.time()
        self._beat = Beat(
            attempt=secrets.token_hex(8),
            driver=Process.this(),
            launcher=config.cluster.launcher,
            job=job_ids(os.environ),
            since=now,
            time=now,
            steps=config.train.steps,
        )
        self._first: tuple[int, float] | None = None  # the first step of this generation, and when it was done
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> "Reporter":
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended.set()
        self._thread.join()
        if error is not None:
            self._change(code=_code(error), why=" ".join(str(error).partition("\n")[0].split()) or type(error).__name__)
        if not self._is_overtaken():
            self._write()

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start":
            self._first = None
            nodes = dict.fromkeys(rank["node"] for rank in fields["ranks"])
            self._change(generation=fields["generation"], workers=fields["workers"], nodes=tuple(nodes))
        elif kind == "end":
            self._change(code=fields["code"])
        self._next.on_event(kind, fields)

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if rank == 0 and "loss" in status and step != self._beat.step:
            now = time.time()
            first, then = self._first = self._first or (step, now)
            self._change(
                step=step,
                step_time=now,
                loss=status["loss"],
                tokens_per_second=status["tokens_per_second"],
                # What lies between steps (validation, commits) counts, as soon as there are two to measure by.
                seconds_per_step=(now - then) / (step - first) if step > first else status["seconds"],
            )
        self._next.on_status(rank, step, status)

    def _change(self, **fields: Any) -> None:
        self._beat = self._beat.model_copy(update=fields)

    def _keep_writing(self) -> None:
        while not self._has_ended.wait(BEAT_EVERY_S) and not self._is_overtaken():
            self._write()

    def _is_overtaken(self) -> bool:
        with suppress(OSError):
            found = read_beat(self._run)
            return found is not None and found.attempt != self._beat.attempt
        return False

    def _write(self) -> None:
        with suppress(OSError):
            beat = self._beat.model_copy(update={"time": time.time()})
            replace_file(self._run / FILE, beat.model_dump_json(indent=1) + "\n")


def _code(error: BaseException) -> int:
    if isinstance(error, SupersededError):
        return EXIT_SUPERSEDED
    if isinstance(error, UserError):
        return EXIT_MISTAKE
    return EXIT_KILLED_BY_KEYBOARD if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def job_ids(environment: Mapping[str, str]) -> dict[str, str]:
    """Under which ids the schedulers that started this process know it; Ray tells a submitted job's in its config."""
    variables = {"slurm": "SLURM_JOB_ID", "kubernetes": JOB_VARIABLE, "ray": "RAY_JOB_ID"}
    ids = {scheduler: environment.get(variable) for scheduler, variable in variables.items()}
    with suppress(ValueError, KeyError, TypeError):
        ids["ray"] = json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    return {scheduler: known for scheduler, known in ids.items() if known}
