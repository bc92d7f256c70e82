"""What a run tells of itself: metrics.jsonl, one line a step."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray.parallel.gradients import ExpertLoad


class MetricsLog:
    """Appends to RUN/metrics.jsonl. Steps that a fault undid stay in the file, superseded.

    Where there are such, a line `{"resumed_from": STEP, "generation": G}` says that those above STEP no longer count.
    """

    def __init__(self, run: Path, step: int, generation: int) -> None:
        """Goes on after `step`, the one that this attempt resumed from."""
        run.mkdir(parents=True, exist_ok=True)
        self._path = run / "metrics.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            # A crash may have left half a line: what follows must not be glued to it.
            with open(self._path, "a") as file:
                file.write("\n")
        undone = any(row["step"] > step for row in read_metrics(run))
        self._file = open(self._path, "a")  # noqa: SIM115 - it lives as long as the log
        if undone:
            self.write({"resumed_from": step, "generation": generation})

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step; a reader sees the line at once, whole."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Before a commit: a committed step must have its line even if the machine loses power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """One row a step, in order, without those that a resume from an earlier step undid. Half a line is passed over.

    So is what a generation still wrote while a newer one was beginning.
    """
    rows: dict[int, dict[str, Any]] = {}
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    newest = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or row.get("generation", newest) < newest:
            continue
        newest = row.get("generation", newest)
        if "resumed_from" in row:
            rows = {step: kept for step, kept in rows.items() if step <= row["resumed_from"]}
        else:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product, measured here: what a model's speed is compared with (MFU).

    That of the fastest one within `seconds`: others on the machine can make a product slower, never faster.
    """
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    fastest, until = math.inf, time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def expert_balance(tokens_LE: Tensor) -> list[float]:
    """Each MoE layer's busiest expert over the mean: 1 is perfect balance, E is collapse."""
    load_LE = tokens_LE.double()
    return (load_LE.amax(1) / load_LE.mean(1).clamp(min=1)).tolist()


def expert_entropy(tokens_LE: Tensor) -> list[float]:
    """Entropy of each MoE layer's use of its experts over that of even use: 1 is perfect balance, 0 is collapse."""
    share_LE = tokens_LE.double() / tokens_LE.sum(1, keepdim=True).clamp(min=1)
    return (torch.special.entr(share_LE).sum(1) / math.log(max(tokens_LE.shape[1], 2))).tolist()


def expert_metrics(load: ExpertLoad | None) -> dict[str, Any]:
    """What a step's row says of its experts: balance and entropy a layer, the share of choices dropped."""
    if load is None:
        return {"expert_balance": [], "expert_entropy": [], "dropped": 0.0}
    dropped = load.dropped_L.sum() / load.tokens_LE.sum().clamp(min=1)
    return {
        "expert_balance": expert_balance(load.tokens_LE),
        "expert_entropy": expert_entropy(load.tokens_LE),
        "dropped": dropped.item(),
    }
