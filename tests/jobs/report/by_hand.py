"""What the rows of a run with experts on several devices hold, made by hand: this machine trains on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

KEPT_EVERY = 2
BYTES_A_ROW = 128


def add_devices(run: Path, layers: int, experts: int, devices: int) -> dict[int, dict[str, Any]]:
    """Gives every row of a run's metrics.jsonl the keys of expert parallelism; returns what it has written, by step.

    Expert 0 of layer 0 gets ever more tokens, expert 1 of layer 1 none. A tenth of them come from the device itself.
    """
    draw = np.random.default_rng(0)
    path, written = run / "metrics.jsonl", {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max((row["step"] for row in rows if "step" in row), default=1)
    for row in rows:
        if "step" not in row:
            continue
        load = draw.poisson(400, (layers, experts))
        load[0, 0] += int(1200 * row["step"] / last)
        load[1 % layers, 1] = 0
        of_devices = load.reshape(layers, devices, -1).sum(2)
        made = {
            "expert_balance": (load.max(1) / load.mean(1)).tolist(),
            "expert_cv": (load.std(1) / load.mean(1)).tolist(),
            "expert_entropy": entropy(load),
            "device_balance": (of_devices.max(1) / of_devices.mean(1)).tolist(),
            "device_cv": (of_devices.std(1) / of_devices.mean(1)).tolist(),
            "device_entropy": entropy(of_devices),
            "dropped_by_layer": (np.maximum(load - 700, 0).sum(1) / load.sum(1)).tolist(),
            "router_z": draw.gamma(9, 0.5, layers).tolist(),
            "rows_sent": (of_devices * 9 // 10).tolist(),
            "bytes_sent": (of_devices.sum(0) * 9 // 10 * BYTES_A_ROW).tolist(),
        }
        if row["step"] % KEPT_EVERY == 0:
            made |= {"expert_load": load.tolist(), "device_load": of_devices.tolist()}
        for name in ("expert_load", "device_load"):
            row.pop(name, None)  # a short run has them in every row
        row |= made
        written[row["step"]] = made
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return written


def entropy(load: np.ndarray) -> list[float]:
    """Over that of even use, a number for each row of counts."""
    share = load / load.sum(1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return (-(share * logs).sum(1) / np.log(load.shape[1])).tolist()
