"""Every routing option trains: 100 steps each on real text at the demo's width, one table.

    moray prepare SOURCE --out DATA
    python benchmarks/routing.py DATA [--steps 100] [--into docs/models.md]

Each row is `moray pretrain` of the preset demo-moe with the settings that the row names, on one process in fp32; all
begin from the same weights where their shapes agree, and see the same batches. Loss is the mean of the last ten
steps; max/mean, of experts and of groups where there are some, and entropy (1: even) are means over the MoE layers at
the last step, where 16, 4 and 0 would be collapse; dropped is the share of the assignments that found an expert full,
over the last ten steps.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from parity_table import replaced

from moray.jobs.cli import dispatch
from moray.jobs.training.metrics import read_metrics

PLAIN = {
    "n_experts": 16,
    "top_k": 2,
    "n_shared": 0,
    "n_dense_layers": 0,
    "score": "softmax",
    "gate_scale": 1,
    "n_groups": 1,
    "top_k_groups": 1,
    "balance_loss": 0,
    "bias_update_rate": 0,
}
V2 = {"n_groups": 4, "top_k_groups": 2, "group_score": "max", "n_shared": 1, "normalise_gates": "false", "top_k": 4}
ROUTERS: dict[str, dict[str, Any]] = {
    "top-2, no balancing": {},
    "noisy top-2, importance and load losses (2017)": {"noisy": "true", "importance_loss": 0.1, "load_loss": 0.1},
    "GShard: random second expert, capacity 1, balance of first choices": {
        "second_expert": "random",
        "capacity_factor": 1,
        "balance_loss": 0.01,
        "balance_counts": "first",
    },
    "Switch: top-1, jitter, capacity 1.25, balance": {
        "top_k": 1,
        "normalise_gates": "false",
        "jitter": 0.01,
        "capacity_factor": 1.25,
        "balance_loss": 0.01,
    },
    "Switch, dropping by gate": {
        "top_k": 1,
        "normalise_gates": "false",
        "capacity_factor": 1.25,
        "drop_by": "gate",
        "balance_loss": 0.01,
    },
    "top-2, capacity over groups of 4 sequences": {"capacity_factor": 1.25, "group_size": 4, "balance_loss": 0.01},
    "Mixtral: top-2, balance over the model": {"balance_loss": 0.02, "balance_over": "model"},
    "top-2, balance and router z-loss (ST-MoE)": {"balance_loss": 0.01, "router_z_loss": 0.001},
    "GLaM: every second layer": {"every": 2, "balance_loss": 0.01},
    "Qwen2-MoE: gated shared expert": {"n_shared": 1, "shared_gate": "true", "top_k": 4, "balance_loss": 0.001},
    "DeepSeek-V2: 2 of 4 groups, three balance losses": {
        **V2,
        "balance_loss": 0.003,
        "device_loss": 0.05,
        "communication_loss": 0.02,
    },
    "DeepSeek-V3: sigmoid, 2 of 4 groups, bias": {
        **V2,
        "score": "sigmoid",
        "normalise_gates": "true",
        "group_score": "top2",
        "n_dense_layers": 1,
        "gate_scale": 1.5,
        "balance_loss": 1e-4,
        "bias_update_rate": 0.01,
    },
}
V3 = ROUTERS["DeepSeek-V3: sigmoid, 2 of 4 groups, bias"]
ROUTERS["the same, at the paper's rate of 0.001"] = {**V3, "bias_update_rate": 0.001}
ROUTERS["the same, and groups' own step of 0.003"] = {
    **V3,
    "bias_update_rate": 0.001,
    "device_bias_update_rate": 0.003,
}


def train(data: Path, run: Path, steps: int, router: dict[str, Any]) -> list[dict[str, Any]]:
    settings = {
        "data.path": data,
        "run.dir": run,
        "cluster.launcher": "local",
        "model.preset": "demo-moe",
        "train.steps": steps,
        "train.global_batch": 8,
        "train.seq_len": 256,
        "train.dtype": "float32",
        "train.eval_every": 0,
        "checkpoint.every": steps,
        "optimizer.lr": 3e-3,
        "optimizer.warmup_steps": steps // 10,
        **{f"model.moe.{name}": value for name, value in {**PLAIN, **router}.items()},
    }
    code = dispatch(["pretrain", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])
    if code:
        raise SystemExit(code)
    return read_metrics(run)


def row(name: str, rows: list[dict[str, Any]]) -> str:
    last, end = rows[-1], rows[-10:]
    groups = f"{statistics.mean(last['group_balance']):.2f}" if "group_balance" in last else ""
    return (
        f"| {name} | {statistics.mean(step['loss'] for step in end):.3f} "
        f"| {statistics.mean(last['expert_balance']):.2f} | {groups} | {statistics.mean(last['expert_entropy']):.3f} "
        f"| {statistics.mean(step['dropped'] for step in end):.1%} "
        f"| {statistics.median(step['tokens_per_second'] for step in rows):,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    table = ["| router | loss | max/mean | of groups | entropy | dropped | tokens/s |", "|---|---|---|---|---|---|---|"]
    for name, router in ROUTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            table.append(row(name, train(arguments.data, Path(folder) / "run", arguments.steps, router)))
    if arguments.into:
        arguments.into.write_text(replaced(arguments.into.read_text(), "routing table", "\n".join(table)))
    else:
        print("\n".join(table))


if __name__ == "__main__":
    main()
