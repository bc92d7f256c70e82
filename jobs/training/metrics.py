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


def expert_balance(tokens_LE: Tensor) -> list[float]:
    """Each MoE layer's busiest expert over the mean: 1 is perfect balance, E is collapse."""
    load_LE = tokens_LE.double()
    return (load_LE.amax(1) / load_LE.mean(1).clamp(min=1)).tolist()


def expert_entropy(tokens_LE: Tensor) -> list[float]:
    """Entropy of each MoE layer's use of its experts over that of even use: 1 is perfect balance, 0 is collapse."""
    share_LE = tokens_LE.double() / tokens_LE.sum(1, keepdim=True).clamp(min=1)
    return (torch.special.entr(share_LE).sum(1) / math.log(max(tokens_LE.shape[1], 2))).tolist()


def group_balance(tokens_LE: Tensor, n_groups: int) -> list[float]:
    """The same of groups of neighbouring experts, which expert parallelism puts on devices."""
    return expert_balance(tokens_LE.unflatten(1, (n_groups, -1)).sum(2))


def expert_metrics(load: ExpertLoad | None, moe: MoEConfig | None) -> dict[str, Any]:
    """What a step's row says of its experts: balance and entropy a layer, that of groups where the model has several,
    the share of choices dropped.
    """
    if load is None or moe is None:
        return {"expert_balance": [], "expert_entropy": [], "dropped": 0.0}
    dropped = load.dropped_L.sum() / load.tokens_LE.sum().clamp(min=1)
    of_groups = {"group_balance": group_balance(load.tokens_LE, moe.n_groups)} if moe.n_groups > 1 else {}
    return {
        "expert_balance": expert_balance(load.tokens_LE),
        **of_groups,
        "expert_entropy": expert_entropy(load.tokens_LE),
        "dropped": dropped.item(),
    }
