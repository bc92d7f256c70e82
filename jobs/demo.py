"""`moray demo`: the whole road in minutes, on any machine: prepare, train, lose a worker, recover, generate."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moray.cluster.events import read_events
from moray.data.dataset import Dataset
from moray.data.stream import Stream
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.generation.generate import Sampling, generate_tokens, load_run, stream_text
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.optimizer import build_optimizer
from moray.model import Decoder, initialise
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients

PROMPT = "def read("
SECONDS = 300.0
"""How long the demo may take, on a machine that keeps the pace it has at the start."""
STARTS_S = 45.0
"""Of these, what is no training: workers that start, one that dies, text that is written."""
TRIAL_STEPS = 4
WORKERS_COST = 1.6
"""How much slower four workers are than one process with as many threads as there are cores, on two cores."""


def demo(folder: Path) -> int:
    """Runs the demo in `folder`; given again after an interruption, it goes on. Returns the training's exit code."""
    began = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    data, run = folder / "data", folder / "run"
    _phase(console, 1, "prepare", "the Python standard library becomes tokens in checked shards")
    if (data / "index.json").exists():
        console.print(f"{data} is already there: {Dataset.open(data).splits['train'].n_tokens:,} training tokens")
    else:
        prepare(PrepareConfig(out=data), console)
    config = _fitted(data, run, SECONDS - (time.monotonic() - began), console)
    _phase(console, 2, "train", _what(config))
    code = drive(config, console, Saboteur(config.train.steps // 2 + 10, console))
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


def fitting_steps(seconds: float, seconds_a_step: float) -> int:
    """The most steps, in twenties up to 200, that fit into so many seconds; 40 at least, or nothing would be learnt."""
    return max(40, min(200, int(seconds / seconds_a_step) // 20 * 20))


def _fitted(data: Path, run: Path, seconds: float, console: Console) -> RunConfig:
    """The run, as long as this machine has time for; one that has begun keeps its length."""

    def with_steps(steps: int) -> RunConfig:
        parts = {"train.eval_every": steps // 2, "checkpoint.every": steps // 5, "train.steps": steps}
        paths = {"data.path": str(data), "run.dir": str(run)}
        return load_config("demo", paths | {name: str(value) for name, value in parts.items()})

    if (run / "config.toml").exists():
        return with_steps(load_config(str(run / "config.toml"), {}).train.steps)
    seconds_a_step = WORKERS_COST * _seconds_alone(with_steps(200))
    steps = fitting_steps(seconds - STARTS_S, seconds_a_step)
    console.print(f"{steps} steps suit this machine: {(STARTS_S + steps * seconds_a_step) / 60:.1f} minutes from here")
    return with_steps(steps)


def _seconds_alone(config: RunConfig) -> float:
    """The fastest of a few steps of the run's model and batch in this process."""
    train, decoder = config.train, Decoder(config.model)
    initialise(decoder, train.seed)
    optimizer = build_optimizer(decoder, config.optimizer)
    stream = Stream(
        Dataset.open(config.data.path),
        "train",
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        seed=train.seed,
        lanes=range(train.global_batch),
    )
    fastest = math.inf
    for number in range(TRIAL_STEPS):
        batch, cpu = stream.batch(number), torch.device("cpu")
        began = time.perf_counter()
        pieces = [slice(at, at + train.micro_batch) for at in range(0, train.global_batch, train.micro_batch)]
        micro_batches = [
            MicroBatch.of(batch.tokens_BT[p], batch.targets_BT[p], batch.positions_BT[p], batch.documents_BT[p], cpu)
            for p in pieces
        ]
        accumulate_gradients(decoder, micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


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
            what = "snapshot in memory" if event["source"] == "memory" else "commit"
            console.print(f"resume     {moment} from the {what} of step {event['step']}")
