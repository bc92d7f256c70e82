"""A training step on several workers of this machine: moray's layouts, and transformers under DDP and FSDP2.

    python benchmarks/workers.py [--workers 2] [--rounds 3] [--steps 6] [--preset demo-moe] [--only WORDS] [--split]

What all are measured against: as many processes, at the same time, that have nothing to do with each other. Each has
its share of the global batch, in micro-batches; a step is forward, backward, clipping and AdamW, in fp32, one thread a
worker. All cases take turns, each time in processes of their own; a ratio is the median over the rounds.
"""

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from collectives import Split, least_bytes
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_step import transformers_model

from moray.cluster.host_memory import keep_freed_memory
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.decoder import Decoder
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients, clip_gradients, update_routing_bias
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards

Step = Callable[[], None]
WARM = 2


def moray_step(
    config: ModelConfig,
    layout: Layout,
    stage: Stage,
    sequences: int,
    micro_batch: int,
    seq_len: int,
    prepare: Callable[[Decoder], None] = lambda decoder: None,
    on_load: Callable[[Any], None] = lambda load: None,
) -> Step:
    """`sequences`: of the step, of this rank and its tensor-parallel peers. `prepare` may change the model, and
    `on_load` sees each step's load of experts.
    """
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.float32, stage=stage)
    reduction = Reduction(decoder, meshes, stage)
    initialise_shards(decoder, 0)
    prepare(decoder)
    optimizer = build_optimizer(decoder, OptimizerSection())
    tokens_BT = torch.randint(config.vocab_size, (sequences, seq_len))
    positions_BT, documents_BT = torch.arange(seq_len).expand_as(tokens_BT), torch.zeros_like(tokens_BT)
    batches = [
        MicroBatch.of(tokens, tokens, positions, documents, torch.device("cpu"))
        for tokens, positions, documents in zip(
            *(x.split(micro_batch) for x in (tokens_BT, positions_BT, documents_BT)), strict=True
        )
    ]

    def step() -> None:
        accumulate_gradients(decoder, batches, reduction)
        clip_gradients(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_load(update_routing_bias(decoder))

    return step


def peer_step(config: ModelConfig, wrapper: str, sequences: int, micro_batch: int, seq_len: int) -> Step:
    peer: Any = transformers_model(config)
    if wrapper == "DDP":
        peer = DistributedDataParallel(peer)
    elif wrapper == "FSDP2":
        for layer in peer.model.layers:
            fully_shard(layer)
        fully_shard(peer)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)
    pieces = torch.randint(config.vocab_size, (sequences, seq_len)).split(micro_batch)

    def step() -> None:
        for i, tokens_BT in enumerate(pieces):
            is_last = i == len(pieces) - 1
            # As their users are told to accumulate: the gradients travel once a step.
            if isinstance(peer, FSDPModule):
                peer.set_requires_gradient_sync(is_last)
            elif isinstance(peer, DistributedDataParallel):
                peer.require_backward_grad_sync = is_last
            (peer(tokens_BT, labels=tokens_BT).loss / len(pieces)).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cases(workers: int) -> dict[str, tuple[str, Layout | None]]:
    """What is compared: who computes, and with which layout; one rank alone where it is `alone`."""
    return {
        "moray alone": ("alone", Layout(dp_shard=1)),
        "moray replicated": ("moray", Layout(dp_replicate=workers, dp_shard=1)),
        "moray sharded": ("moray", Layout(dp_shard=workers)),
        "moray sharded, stage 3": ("moray", Layout(dp_shard=workers)),
        "moray ep": ("moray", Layout(dp_shard=workers, ep=workers)),
        "moray tp": ("moray", Layout(dp_shard=1, tp=workers)),
        "transformers alone": ("alone", None),
        "transformers DDP": ("DDP", None),
        "transformers FSDP2": ("FSDP2", None),
    }


def work(rank: int, name: str, options: argparse.Namespace, store: str, begin: Any, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if not options.give_back:
        keep_freed_memory()  # as moray's workers do
    how, layout = cases(options.workers)[name]
    config = ModelConfig.preset(options.preset)
    world_size = 1 if how == "alone" else options.workers
    its_store = dist.HashStore() if world_size == 1 else dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=its_store, rank=0 if world_size == 1 else rank, world_size=world_size)
    split = Split() if options.split else None
    share = options.batch // options.workers
    if layout:
        stage: Stage = 3 if name.endswith("stage 3") else 1
        step = moray_step(config, layout, stage, share * layout.tp, options.micro_batch, options.tokens)
    else:
        step = peer_step(config, how, share, options.micro_batch, options.tokens)
    for _ in range(WARM):
        step()
    begin.wait()
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    if options.split and split:
        split.is_counting = True
        began = time.perf_counter()
        for _ in range(options.steps):
            step()
        whole = time.perf_counter() - began
        of_step = [x / options.steps for x in (whole, split.exchanging_s, split.idle_s, split.sent)]
        pipe.send(of_step)
    else:
        pipe.send(statistics.median(seconds))
    begin.wait()  # nobody goes while others compute


def on_ranks(work: Callable[..., None], workers: int, *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments, store, begin, pipe)` sends, on as many processes, in the order of the ranks."""
    context = mp.get_context("fork")
    begin = context.Barrier(workers)
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, *arguments, str(Path(folder, "store")), begin, theirs))
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)
        found = [end.recv() for end in ends]
        for process in processes:
            process.join()
    return found


def measure(name: str, options: argparse.Namespace) -> list[Any]:
    """Each rank's seconds a step, or with --split where they go."""
    return on_ranks(work, options.workers, name, options)


def rate(seconds: list[float], options: argparse.Namespace) -> float:
    """Tokens a second of all workers together."""
    return sum(options.batch * options.tokens / options.workers / own for own in seconds)


def tell_split(names: list[str], options: argparse.Namespace) -> None:
    config, share = ModelConfig.preset(options.preset), options.batch // options.workers
    print("| case | s a step | computing | exchanging | waiting for peers | MB sent | least MB |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        _, layout = cases(options.workers)[name]
        if layout and layout.world_size > 1:
            step, exchanging, idle, sent = (
                statistics.mean(column) for column in zip(*measure(name, options), strict=True)
            )
            least = least_bytes(config, layout, share * layout.tp, options.tokens)
            shares = " | ".join(f"{x / step:.0%}" for x in (step - exchanging - idle, exchanging, idle))
            print(f"| {name} | {step:.2f} | {shares} | {sent / 1e6:,.0f} | {least / 1e6:,.0f} |", flush=True)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Of how many workers compute how many steps of what."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--preset", default="demo-moe")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, of all workers")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains one of these words")
    parser.add_argument("--give-back", action="store_true", help="freed memory goes back to the system, as by default")
    parser.add_argument("--split", action="store_true", help="where a step's time goes, and the bytes that travel")
    options = parser.parse_args()
    print(f"{options.workers} workers, torch {torch.__version__}, transformers {transformers.__version__}")
    names = [name for name in cases(options.workers) if not options.only or set(name.split()) & {*options.only.split()}]
    if options.split:
        tell_split(names, options)
        return
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            rates[name].append(rate(measure(name, options), options))
    print("| case | tokens/s | of moray alone | of transformers DDP | of transformers FSDP2 |\n|---|---|---|---|---|")
    for name in names:
        ratios = [ratio(rates[name], rates.get(peer)) for peer in ("moray alone", *names[-2:])]
        print(f"| {name} | {statistics.median(rates[name]):,.0f} | {' | '.join(ratios)} |")


def ratio(ours: list[float], theirs: list[float] | None) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}" if theirs else "-"


if __name__ == "__main__":
    main()
