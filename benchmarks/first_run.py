"""A run on real text, computed by three layouts and killed in two ways; writes the figures and the plot of its report.

    python benchmarks/first_run.py SOURCE --out DIR [--report docs/first-run.md] [--steps 300]

Runs under DIR that are finished are not computed again. Every run is a `python -m moray pretrain` of its own.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moray.cluster.events import read_events
from moray.jobs.config.load import load_config
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics
from moray.model.accounting.cost import count_parameters

Rows = list[dict[str, Any]]

# minimind-3-moe narrowed in proportion, with Switch's balance factor, as there are only hundreds of steps.
MODEL = {
    "model.preset": "minimind-3-moe",
    "model.n_layers": "4",
    "model.d_model": "256",
    "model.attention.n_heads": "4",
    "model.attention.n_kv_heads": "2",
    "model.attention.head_dim": "64",
    "model.ffn.width": "768",
    "model.moe.expert_width": "768",
    "model.moe.balance_loss": "0.01",
}
TRAIN = {
    "train.global_batch": "8",
    "train.micro_batch": "4",
    "train.seq_len": "256",
    "train.dtype": "float32",
    "train.eval_every": "50",
    "optimizer.lr": "5e-4",
    "optimizer.warmup_steps": "40",
    "checkpoint.every": "25",
}
RAY = {"cluster.launcher": "ray", "cluster.workers": "4"}
RUNS = {
    "4 workers, ep=2": {**RAY, "layout.ep": "2"},
    "one process": {"cluster.launcher": "local"},
    "4 workers, tp=2 x dp=2 x ep=4": {**RAY, "layout.tp": "2", "layout.ep": "4"},
    "ep=2, a worker killed": {**RAY, "layout.ep": "2"},
    "ep=2, the driver killed": {**RAY, "layout.ep": "2"},
}
PROMPTS = ("The old man", "It was a", "She looked")


def command(settings: dict[str, str]) -> list[str]:
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "moray", "pretrain", *words]


def compute(settings: dict[str, str], kill: str | None) -> None:
    """Runs to the end; on the way, kills a worker (rank 2) or the driver with SIGKILL at two fifths of the steps."""
    run, steps = Path(settings["run.dir"]), int(settings["train.steps"])
    if len(read_metrics(run)) == steps:
        return
    driver = subprocess.Popen(command(settings))
    while driver.poll() is None:
        time.sleep(0.05)
        if kill and len(read_metrics(run)) >= steps * 2 // 5:
            start = next(event for event in read_events(run / "events.jsonl") if event["kind"] == "start")
            pid = start["ranks"][2]["pid"] if kill == "worker" else driver.pid
            os.kill(pid, signal.SIGKILL)
            kill = None
            if pid == driver.pid:
                driver.wait()
                driver = subprocess.Popen(command(settings))
    if driver.returncode:
        raise SystemExit(f"{run} ended with code {driver.returncode}")


def largest_difference(rows: Rows, others: Rows) -> float:
    return max(abs(row["loss"] - other["loss"]) for row, other in zip(rows, others, strict=True))


def ledger(run: Path) -> str:
    """Whether the committed history holds each position once; and how many steps were computed twice."""
    written = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"positions"' in line]
    again = len(written) - len(read_metrics(run))
    return f"{', '.join(ledger_problems(run)) or 'no gap, no repeat'}; {again} steps computed again"


def faults(run: Path) -> str:
    events = list(read_events(run / "events.jsonl"))
    found = [f"{event['reason']}" for event in events if event["kind"] == "fault"]
    found += [f"back after {event['seconds']:.2f} s" for event in events if event["kind"] == "recovered"]
    found += [f"resumed at step {event['step']}" for event in events if event["kind"] == "resume"]
    return ", ".join(found) or "none"


def plot(runs: dict[str, Rows], path: Path) -> None:
    figure, (loss, balance) = plt.subplots(1, 2, figsize=(11, 4))
    styles = ("-", "--", ":", "-.", (0, (1, 6)))
    for (name, rows), style in zip(runs.items(), styles, strict=True):
        loss.plot([row["step"] for row in rows], [row["loss"] for row in rows], linestyle=style, label=name)
    main = next(iter(runs.values()))
    checked = [row for row in main if "validation_loss" in row]
    loss.plot(
        [row["step"] for row in checked], [row["validation_loss"] for row in checked], "ko", label="validation (ep=2)"
    )
    loss.set(xlabel="step", ylabel="cross-entropy a token", title="loss")
    loss.legend(fontsize=8)
    for layer in range(len(main[0]["expert_balance"])):
        balance.plot([row["step"] for row in main], [row["expert_balance"][layer] for row in main], label=f"{layer}")
    balance.set(xlabel="step", ylabel="busiest expert / mean", title="expert balance by layer (ep=2)", ylim=(1, None))
    balance.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(settings: dict[str, str], runs: dict[str, Rows], folders: dict[str, Path], source: str) -> str:
    main_name, main = next(iter(runs.items()))
    total, active = count_parameters(load_config(None, settings).model)
    changed = (name for name in MODEL if name != "model.preset")
    narrowed = ", ".join(f"{name.removeprefix('model.')}={MODEL[name]}" for name in changed)
    last = main[-1]
    lines = [
        f"`minimind-3-moe` narrowed to {narrowed}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active, "
        "4 experts, top-1. "
        f"{len(main)} steps of {settings['train.global_batch']} x {settings['train.seq_len']} tokens, "
        f"{settings['train.dtype']}, on `{Path(source).name}`.",
        "",
        "| step | loss | validation loss | busiest expert / mean, by layer | gradient norm |",
        "|---|---|---|---|---|",
    ]
    for row in [main[0], *(row for row in main if "validation_loss" in row)]:
        validation = f"{row['validation_loss']:.3f}" if "validation_loss" in row else ""
        balance = " ".join(f"{value:.2f}" for value in row["expert_balance"])
        lines.append(f"| {row['step']} | {row['loss']:.3f} | {validation} | {balance} | {row['grad_norm']:.2f} |")
    lines += [
        "",
        "| run | last loss | largest difference of any step's loss | tokens/s | faults | ledger |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
        difference = "" if rows is main else f"{largest_difference(rows, main):.2g}"
        lines.append(
            f"| {name} | {rows[-1]['loss']:.6f} | {difference} | {speed:,.0f} | {faults(folders[name])} "
            f"| {ledger(folders[name])} |"
        )
    lines += ["", f"Differences are from the first run. Validation loss at the end: {last['validation_loss']:.4f}.", ""]
    for prompt in PROMPTS:
        words = [sys.executable, "-m", "moray", "generate", str(folders[main_name]), "--prompt", prompt]
        words += ["--max-new-tokens", "60", "--temperature", "0.7", "--top-p", "0.9"]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        lines += [f"    {line}" for line in text.splitlines()] + [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, default=Path("docs/first-run.md"))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    data = arguments.out / "data"
    if not (data / "index.json").exists():
        subprocess.run([sys.executable, "-m", "moray", "prepare", arguments.source, "--out", str(data)], check=True)
    runs, folders, settings = {}, {}, {}
    for number, (name, extra) in enumerate(RUNS.items()):
        folders[name] = arguments.out / f"run-{number}"
        settings = {**MODEL, **TRAIN, **extra, "data.path": str(data), "run.dir": str(folders[name])}
        settings["train.steps"] = str(arguments.steps)
        compute(settings, "worker" if "worker killed" in name else "driver" if "driver killed" in name else None)
        runs[name] = read_metrics(folders[name])
    plot(runs, arguments.report.with_suffix(".png"))
    marker = "<!-- made by benchmarks/first_run.py -->\n"
    head = arguments.report.read_text().split(marker)[0] if arguments.report.exists() else ""
    arguments.report.write_text(head + marker + "\n" + report(settings, runs, folders, arguments.source))


if __name__ == "__main__":
    main()
