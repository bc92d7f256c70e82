"""What metrics.jsonl says of a run, packed: a few numbers of every step, and of some steps arrays.

Shapes: N steps, S steps that have an array, L MoE layers, E experts, P devices of an expert-parallel group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moray.jobs.training.metrics import read_steps

NUMBERS = (
    *("loss", "validation_loss", "auxiliary_loss", "z_loss", "grad_norm", "lr", "tokens", "dropped", "seconds"),
    *("tokens_per_second", "processed_tokens_per_second", "mfu", "memory_bytes", "own_seconds_slowest"),
    *("gpu_memory_bytes", "temperature_c", "power_w", "throttled"),
)
OF_LAYERS = (
    *("expert_balance", "expert_cv", "expert_entropy", "group_balance", "device_balance", "device_cv"),
    *("device_entropy", "dropped_by_layer", "router_z"),
)
"""Lists with a number for each MoE layer, of which a page shows the lowest, the mean and the highest."""
SAMPLED = {"expert_load": 2, "device_load": 2, "rows_sent": 2, "bytes_sent": 1}
"""Arrays by their number of dimensions: [L, E], [L, P], [L, P] and [P]. They count in the rows that hold a load."""
LARGEST = 3.4e38


@dataclass(frozen=True)
class Grids:
    """Arrays of one name and shape, step by step: values [S, ...]."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Record:
    """A run's steps, without those that a fault undid.

    columns: float32 [N] by name; NaN where a row says nothing, an infinity where what it says is no finite number.
    undone: by the generation that computed them again, the steps that were undone: the first and the last.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    grids: Mapping[str, Grids]
    undone: Mapping[int, tuple[int, int]]
    layout: str | None

    def known(self, name: str) -> bool:
        """Whether any row says it, and other than as zero."""
        return bool(np.any(np.nan_to_num(self.columns[name])))


def read_record(run: Path, more: Sequence[str] = ()) -> Record:
    """more: numbers that this run has beside those of every one. Memory: about 600 bytes a step, and the arrays."""
    names = (*NUMBERS, *more)
    columns = (*names, *(f"{name} {part}" for name in OF_LAYERS for part in ("low", "mean", "high")))
    undone: dict[int, tuple[int, int]] = {}
    newest, newest_generation, layout = 0, 0, None
    arrays: dict[str, dict[int, np.ndarray]] = {name: {} for name in (*SAMPLED, "own_seconds")}

    def pick(row: dict[str, Any]) -> bytes:
        nonlocal newest, newest_generation, layout
        step, generation = row["step"], row.get("generation", newest_generation)
        # What a generation undoes later on is its own doing: it rolled a bad step back.
        if step <= newest and generation > newest_generation:
            undone[generation] = step, newest
        newest, newest_generation, layout = step, generation, row.get("layout")
        is_sample = "expert_load" in row or "device_load" in row
        for name, held in arrays.items():
            held.pop(step, None)  # of a computation that was undone
            if name in row and (is_sample or name not in SAMPLED):
                array = _array(row[name])
                if array is not None and array.ndim == SAMPLED.get(name, 1):
                    held[step] = array
        numbers = [_number(row[name]) if name in row else np.nan for name in names]
        return np.array([*numbers, *(part for name in OF_LAYERS for part in _parts(row.get(name)))], "f4").tobytes()

    rows = read_steps(run, pick)
    table = np.frombuffer(b"".join(rows.values()), "f4").reshape(-1, len(columns))
    grids = {name: _grids({step: held[step] for step in sorted(held) if step in rows}) for name, held in arrays.items()}
    return Record(
        np.array([*rows], np.int64),
        dict(zip(columns, table.T, strict=True)),
        {name: grid for name, grid in grids.items() if grid},
        undone,
        layout,
    )


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and abs(value) < LARGEST
    return float(value) if is_number else np.nan if value is None else np.inf


def _parts(value: Any) -> tuple[float, float, float]:
    """The lowest, the mean and the highest of a list's finite numbers; NaN where it has none."""
    layers = _array(value)
    if layers is None or layers.ndim != 1 or not (found := layers[np.isfinite(layers)]).size:
        return np.nan, np.nan, np.nan
    return found.min(), found.mean(), found.max()


def _array(value: Any) -> np.ndarray | None:
    try:
        return np.array(value, "f4") if isinstance(value, list) and value else None
    except (ValueError, TypeError, OverflowError):  # an edited row: text, or rows of different lengths
        return None


def _grids(held: Mapping[int, np.ndarray]) -> Grids | None:
    """Those of the newest shape: another layout has another number of devices."""
    if not held:
        return None
    shape = held[max(held)].shape
    same = {step: array for step, array in held.items() if array.shape == shape}
    return Grids(np.array([*same]), np.stack([*same.values()]))
