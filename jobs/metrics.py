"""What a run tells of itself: metrics.jsonl and TensorBoard, one entry a step."""

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard/. Steps that a fault undid stay in the file, superseded.

    `generation` tells the attempts at a step apart: `read_metrics` keeps the last.
    """

    def __init__(self, run: Path, next_step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._path = run / "metrics.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            # A crash may have left half a line: what follows must not be glued to it.
            with open(self._path, "a") as file:
                file.write("\n")
        self._file = open(self._path, "a")  # noqa: SIM115 - it lives as long as the log
        self._board = SummaryWriter(run / "tensorboard", purge_step=next_step)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step; a reader sees the line at once, whole."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def flush_to_disk(self) -> None:
        """Before a commit: a committed step must have its line even if the machine loses power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """One row a step, in order: of steps that were computed twice, the later one. Half a last line is passed over."""
    rows: dict[int, dict[str, Any]] = {}
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def ledger_is_whole(rows: list[dict[str, Any]]) -> bool:
    """Whether these steps, a run's from its first, trained on every stream position from 0 on, each once, in order."""
    spans = [row["positions"] for row in rows]
    return not spans or (spans[0][0] == 0 and all(left[1] == right[0] for left, right in pairwise(spans)))


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product, measured here: what a model's speed is compared with (MFU)."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    (a @ b).sum().item()
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - began)


def expert_balance(tokens_LE: Tensor | None) -> list[float]:
    """Each MoE layer's busiest expert over the mean: 1 is perfect balance, E is collapse."""
    if tokens_LE is None:
        return []
    load_LE = tokens_LE.double()
    return (load_LE.amax(1) / load_LE.mean(1).clamp(min=1)).tolist()
