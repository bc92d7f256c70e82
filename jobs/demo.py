"""`moray demo`: the whole road in minutes, on any machine: prepare, train, lose a worker, recover, generate."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from moray.cluster.events import read_events
from moray.data.dataset import Dataset
from moray.jobs.config.run import RunConfig, load_config
from moray.jobs.datasets.prepare import prepare
from moray.jobs.generation.generate import Sampling, generate_tokens, load_run, stream_text
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.pretrain import pretrain

PROMPT = "def read("


def demo(folder: Path) -> int:
    """Runs the demo in `folder`; given again after an interruption, it goes on. Returns the training's exit code."""
    console = Console(highlight=False, soft_wrap=True)
    data, run = folder / "data", folder / "run"
    _phase(console, 1, "prepare", "the Python standard library becomes tokens in checked shards")
    if (data / "index.json").exists():
        console.print(f"{data} is already there: {Dataset.open(data).splits['train'].n_tokens:,} training tokens")
    else:
        prepare(["stdlib"], data, console=console)
    config = load_config("demo", {"data.path": str(data), "run.dir": str(run)})
    _phase(console, 2, "train", _what(config))
    code = pretrain(config, console, Saboteur(config.train.steps // 2 + 10, console))
    if code:
        return code
    _phase(console, 3, "look", "what the run's own log says")
    _report(run, console)
    _phase(console, 4, "generate", f"the newest commit continues {PROMPT!r}")
    decoder, tokenizer = load_run(run, console.print)
    prompt = tokenizer.encode(PROMPT)
    tokens = generate_tokens(decoder, [*tokenizer.prompt_start, *prompt], 120, Sampling(0.7, top_p=0.9))
    console.print(PROMPT + "".join(stream_text(tokenizer, tokens, prompt)), markup=False, style="cyan")
    console.print()
    for name, what in (
        ("data/", "tokenizer, WebDataset shards, index.json"),
        ("run/metrics.jsonl", "one line a step"),
        ("run/events.jsonl", "starts, commits, the fault and the recovery"),
        ("run/checkpoints/", f"moray checkpoints {run} --verify"),
        ("run/tensorboard/", f"tensorboard --logdir {run}"),
    ):
        console.print(f"  {folder / name!s:<32} {what}", markup=False)
    return 0


class Saboteur(Listener):
    """Kills a worker with SIGKILL once the run is half-way, unless an earlier try already went past that."""

    def __init__(self, step: int, console: Console) -> None:
        self._step, self._console = step, console
        self._victim: tuple[int, int] | None = None
        self._first_step: int | None = None

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start" and self._first_step is None:
            last = fields["ranks"][-1]
            self._victim = (last["rank"], last["pid"])

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        self._first_step = self._first_step or step
        if self._victim and step >= self._step >= self._first_step:
            (rank, pid), self._victim = self._victim, None
            self._console.print(f"[bold red]kill -9 {pid}[/]: rank {rank} dies in the middle of step {step + 1}")
            os.kill(pid, signal.SIGKILL)


def _phase(console: Console, number: int, name: str, what: str) -> None:
    console.print(f"\n[bold]{number}/4 {name}[/]  {what}")


def _what(config: RunConfig) -> str:
    from moray.model.accounting.cost import count_parameters

    total, active = count_parameters(config.model)
    model, layout = config.model, config.resolved_layout
    assert model.moe
    return (
        f"{total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active: {model.n_experts} experts, top-{model.moe.top_k}, "
        f"{model.moe.n_shared} shared; {layout.world_size} workers, expert parallel {layout.ep} x data parallel "
        f"{layout.world_size // layout.ep}"
    )


def _report(run: Path, console: Console) -> None:
    rows = read_metrics(run)
    first, last = rows[0], rows[-1]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    console.print(f"loss       {first['loss']:.3f} -> {last['loss']:.3f}, validation {validation[-1]:.3f}")
    balances = [" ".join(f"{value:.2f}" for value in row["expert_balance"]) for row in (first, last)]
    console.print(f"experts    busiest over mean, by layer: {balances[0]} -> {balances[1]}")
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    console.print(f"speed      {tokens / seconds:,.0f} tokens/s over {tokens:,} tokens")
    ledger = "; ".join(ledger_problems(run)) or "without a gap or a repeat"
    console.print(f"ledger     sequences 0 to {last['positions'][1]:,}, {ledger}")
    for event in read_events(run / "events.jsonl"):
        moment = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        if event["kind"] == "fault":
            console.print(f"fault      {moment} rank {event['rank']}: {event['reason']}", markup=False)
        elif event["kind"] == "recovered":
            console.print(f"recovery   {moment} all workers back at work after {event['seconds']:.2f} s")
        elif event["kind"] == "resume":
            console.print(f"resume     {moment} from the commit of step {event['step']}")
