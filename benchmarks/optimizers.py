"""Validation loss on real text under AdamW, AdamW with moments in bf16, and Muon, and the picture of their curves.

    python benchmarks/optimizers.py --data DIR [--steps 150] [--picture docs/optimizers.png]

DIR is what `moray prepare` made. All runs have the same model, data, order and schedule; each has the best of a few
learning rates, which differ by factors of two.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from moray.jobs.config.load import load_config
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics

KINDS: dict[str, dict[str, str]] = {
    "AdamW": {},
    "AdamW, moments in bf16": {"optimizer.moments": "bfloat16"},
    "Muon": {"optimizer.kind": "muon"},
}
RATES = (1e-3, 2e-3, 4e-3)
EVERY = 50
SMALL_RUN = {
    "model.preset": "demo-moe",
    "model.n_layers": "4",
    "train.global_batch": "8",
    "train.micro_batch": "8",
    "train.seq_len": "256",
    "train.eval_every": str(EVERY),
    "train.dtype": "float32",
    "checkpoint.every": "100000",
    "cluster.launcher": "local",
    "run.trackers": "none",
}


def curve(data: Path, folder: Path, steps: int, settings: dict[str, str]) -> tuple[dict[int, float], float]:
    """Validation loss by step, and the median of a step's seconds."""
    plan = {**SMALL_RUN, "data.path": str(data), "run.dir": str(folder), "train.steps": str(steps)}
    assert drive(load_config(None, plan | settings), Console(quiet=True)) == 0
    rows = read_metrics(folder)
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    return losses, statistics.median(row["seconds"] for row in rows)


def picture(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), label=name, linestyle="--" if "bf16" in name else "-")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    best: dict[str, dict[int, float]] = {}
    print("| optimizer | lr | seconds a step | validation loss after a third | after two thirds | at the end |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in KINDS.items():
            for rate in options.rates:
                run = Path(folder, f"{name}-{rate:g}")
                losses, seconds = curve(options.data, run, options.steps, settings | {"optimizer.lr": str(rate)})
                third = options.steps // 3 // EVERY * EVERY
                told = " | ".join(f"{losses[step]:.3f}" for step in (third, 2 * third, max(losses)))
                print(f"| {name} | {rate:g} | {seconds:.2f} | {told} |", flush=True)
                if name not in best or losses[max(losses)] < best[name][max(best[name])]:
                    best[name] = losses
    if options.picture:
        picture(best, options.picture)


if __name__ == "__main__":
    main()
