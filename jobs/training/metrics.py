"""What a run tells of itself: metrics.jsonl, one line a step."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.json_lines import JsonLines, read_lines
from moray.parallel.gradients import ExpertLoad


class MetricsLog:
    """Appends to RUN/metrics.jsonl. Steps that a fault undid stay in the file, superseded.

    Where there are such, a line `{"resumed_from": STEP, "generation": G}` says that those above STEP no longer count.
    """

    def __init__(self, run: Path, step: int, generation: int) -> None:
        """Goes on after `step`, the one that this attempt resumed from."""
        self._run = run
        self._rows = JsonLines(run / "metrics.jsonl")
        if any(row["step"] > step for row in read_metrics(run)):
            self._undo(step, generation)
        self._step = step

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step; a reader sees the line at once, whole, or when a full disk has room again.

        Where it goes back behind the last one, those in between are undone. Raises UserError where the run's folder is
        gone.
        """
        try:
            if row["step"] <= self._step:
                self._undo(row["step"] - 1, row["generation"])
            self._rows.append(row)
            self._step = row["step"]
        except FileNotFoundError:
            raise UserError(
                f"run.dir={self._run} was removed, or its disk unmounted, while the run was writing to it: with its "
                "commits back in place the same command goes on from the newest, else it begins anew"
            ) from None

    def _undo(self, step: int, generation: int) -> None:
        self._rows.append({"resumed_from": step, "generation": generation})

    def flush_to_disk(self) -> None:
        """Before a commit appears: its steps must have their lines even if the machine loses power.

        Raises OSError while the disk has no room for them.
        """
        self._rows.flush_to_disk()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """One row a step, in order, without those that a resume from an earlier step undid.

    A line that is no row, cut short or edited, is passed over. So is what a generation still wrote while a newer one
    was beginning.
    """
    rows: dict[int, dict[str, Any]] = {}
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    newest = 0
    for row in read_lines(path):
        generation = row.get("generation", newest)
        if not isinstance(generation, int) or generation < newest:
            continue
        if isinstance(step := row.get("resumed_from"), int):
            rows = {kept: before for kept, before in rows.items() if kept <= step}
        elif isinstance(step := row.get("step"), int):
            rows[step] = row
        else:
            continue
        newest = generation
    return [rows[step] for step in sorted(rows)]


def worker_peak(device: torch.device, dtype: torch.dtype, local_workers: int) -> float:
    """A worker's part of its node's peak: of a CPU, less than `matmul_peak` where workers share cores."""
    peak = matmul_peak(device, dtype)
    if device.type == "cuda":
        return peak
    return peak * min(1.0, usable_cores() / (local_workers * torch.get_num_threads()))


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
