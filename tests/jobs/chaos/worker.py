"""The worker function of a run that is to be harmed: `train`, with traps that spring at a certain line of the code.

A trap is armed by a file RUN/trap-NAME; whichever process gets there first removes the file, and dies of SIGKILL (or
computes a NaN). A pause follows every step until RUN/hurry exists: `PAUSE_S` at first, and the longer the fewer steps
are left, so that on a slow machine, too, some are left for the last fault.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from poison import pausing
from torch import Tensor, nn

from moray.cluster.worker import WorkerContext
from moray.jobs.config.run import RunConfig
from moray.jobs.training import trainer
from moray.parallel.checkpoint import commits, writer
from moray.parallel.checkpoint.commits import MANIFEST
from moray.parallel.checkpoint.memory_file import MemoryFile

PAUSE_S = 0.15
TRAPS = ("shard", "manifest", "rename", "renamed", "snapshot", "nan")


def train(context: WorkerContext, config: RunConfig) -> int:
    run, steps = Path(config.run.dir), config.train.steps

    def pause_s(step: int) -> float:
        return PAUSE_S * steps / max(1, steps - step)

    context = replace(context, report=pausing(context.report, pause_s, run / "hurry"))
    with _trapped(run):
        return trainer.train(context, config)


@contextmanager
def _trapped(run: Path) -> Iterator[None]:
    real = {"write": writer.write_tensors, "publish": writer.publish, "flush": commits.flush_folder}
    seal = MemoryFile.seal

    def write_tensors(path: Path, *rest: Any) -> Any:
        found = real["write"](path, *rest)
        if _springs(run, "shard"):
            os.truncate(path, path.stat().st_size // 2)
            _die()
        return found

    def publish(staging: Path, target: Path, manifest: Any) -> int:
        if _springs(run, "manifest"):
            (staging / MANIFEST).write_text(manifest.to_json()[:100])
            _die()
        size: int = real["publish"](staging, target, manifest)
        if _springs(run, "renamed"):
            _die()
        return size

    def flush_folder(folder: Path) -> None:
        real["flush"](folder)
        if (folder / MANIFEST).exists() and _springs(run, "rename"):
            _die()

    def seal_or_die(file: MemoryFile, record: Any) -> None:
        if _springs(run, "snapshot"):
            _die()
        seal(file, record)

    def spoil(module: nn.Module, arguments: tuple[Any, ...], x_BTD: Tensor) -> Tensor | None:
        if isinstance(module, nn.Embedding) and x_BTD.requires_grad and _springs(run, "nan"):
            return x_BTD * torch.nan
        return None

    hook = nn.modules.module.register_module_forward_hook(spoil)
    try:
        with (
            patch.object(writer, "write_tensors", write_tensors),
            patch.object(writer, "publish", publish),
            patch.object(commits, "flush_folder", flush_folder),
            patch.object(MemoryFile, "seal", seal_or_die),
        ):
            yield
    finally:
        hook.remove()


def _springs(run: Path, name: str) -> bool:
    try:
        (run / f"trap-{name}").unlink()
    except FileNotFoundError:
        return False
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
