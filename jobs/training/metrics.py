"""What a run tells of itself: metrics.jsonl, one line a step."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.json_lines import JsonLines, read_lines
from moray.model.config.moe import MoEConfig
from moray.parallel.gradients import ExpertLoad

T = TypeVar("T")
TAIL_BYTES = 1 << 20


class MetricsLog:
    """Appends to RUN/metrics.jsonl. Steps that a fault undid stay in the file, superseded.

    Where there are such, a line `{"resumed_from": STEP, "generation": G}` says that those above STEP no longer count.
    """

    def __init__(self, run: Path, step: int, generation: int) -> None:
        """Goes on after `step`, the one that this attempt resumed from."""
        self._run = run
        self._rows = JsonLines(run / "metrics.jsonl")
        if step < _reached(self._rows.path):
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
    return list(read_steps(run, lambda row: row).values())


def read_steps(run: Path, pick: Callable[[dict[str, Any]], T]) -> dict[int, T]:
    """What `pick` takes of each step's row, by step: as `read_metrics`, with no more of a row in memory than that."""
    picked: dict[int, T] = {}
    path = run / "metrics.jsonl"
    if not path.exists():
        return picked
    for step, row in _valid(read_lines(path)):
        if row is None:
            picked = {kept: before for kept, before in picked.items() if kept <= step}
        else:
            picked[step] = pick(row)
    return dict(sorted(picked.items()))


def _valid(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Steps with their rows, and with None the steps that an attempt went on from."""
    newest = 0
    for row in rows:
        generation = row.get("generation", newest)
        if not isinstance(generation, int) or generation < newest:
            continue
        if isinstance(step := row.get("resumed_from"), int):
            yield step, None
        elif isinstance(step := row.get("step"), int):
            yield step, row
        else:
            continue
        newest = generation


def _reached(path: Path) -> float:
    """The step that the rows have reached, as the last of them says: however long the file is, its end is read.

    It may be any, where the end of a long file holds no row.
    """
    if not path.exists():
        return 0
    last = deque(_valid(read_lines(path, TAIL_BYTES)), maxlen=1)
    return last[0][0] if last else math.inf if path.stat().st_size > TAIL_BYTES else 0


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


SAMPLES = 200
"""Rows of a run, about, that have each expert's load itself: with 58 layers of 256 experts, 15,000 numbers a row."""


def balance(load_LX: Tensor) -> list[float]:
    """Each MoE layer's busiest expert, group or device over the mean: 1 is perfect balance, as many as there are is
    collapse.
    """
    load_LX = load_LX.double()
    return _rounded(load_LX.amax(1) / load_LX.mean(1).clamp(min=1))


def variation(load_LX: Tensor) -> list[float]:
    """Coefficient of variation of each MoE layer's load: 0 is perfect balance, sqrt(X - 1) is collapse."""
    load_LX = load_LX.double()
    return _rounded(load_LX.std(1, correction=0) / load_LX.mean(1).clamp(min=1))


def entropy(load_LX: Tensor) -> list[float]:
    """Entropy of each MoE layer's load over that of an even one: 1 is perfect balance, 0 is collapse."""
    share_LX = load_LX.double() / load_LX.sum(1, keepdim=True).clamp(min=1)
    return _rounded(torch.special.entr(share_LX).sum(1) / math.log(max(load_LX.shape[1], 2)))


def expert_metrics(load: ExpertLoad | None, moe: MoEConfig | None, *, sampled: bool) -> dict[str, Any]:
    """What a step's row says of its experts, a layer, and of the devices that share them, where several do.

    sampled: the loads themselves, too.
    """
    if load is None or moe is None:
        return {"expert_balance": [], "expert_entropy": [], "dropped": 0.0}
    row: dict[str, Any] = {
        "expert_balance": balance(load.tokens_LE),
        "expert_cv": variation(load.tokens_LE),
        "expert_entropy": entropy(load.tokens_LE),
        "dropped": (load.dropped_L.sum() / load.tokens_LE.sum().clamp(min=1)).item(),
        "router_z": _rounded(load.z_L),
    }
    if moe.n_groups > 1:
        row["group_balance"] = balance(load.tokens_LE.unflatten(1, (moe.n_groups, -1)).sum(2))
    if moe.capacity_factor is not None:
        row["dropped_by_layer"] = _rounded(load.dropped_L / load.tokens_LE.sum(1).clamp(min=1))
    if load.devices_LP.shape[1] > 1:
        row |= {
            "device_balance": balance(load.devices_LP),
            "device_cv": variation(load.devices_LP),
            "device_entropy": entropy(load.devices_LP),
            "rows_sent": load.rows_LP.long().tolist(),
            "bytes_sent": load.bytes_LP.sum(0).long().tolist(),
        }
    if sampled:
        row["expert_load"] = load.tokens_LE.long().tolist()
        if load.devices_LP.shape[1] > 1:
            row["device_load"] = load.devices_LP.long().tolist()
    return row


def _rounded(x_L: Tensor) -> list[float]:
    """As many digits as anybody looks at: there are many of these numbers."""
    return [float(f"{x:.6g}") for x in x_L.tolist()]
