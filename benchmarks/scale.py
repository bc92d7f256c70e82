"""What grows with a run and should not: the index of its data, its logs, the driver's work, the ranks' sockets.

    python benchmarks/scale.py index N_SHARDS
    python benchmarks/scale.py metrics STEPS
    python benchmarks/scale.py driver [--nodes 256] [--workers 8]
    python benchmarks/scale.py sockets [--worlds 4 8 16]

Everything is synthetic, and of the form and size that a run of that scale would have. Each line is measured in a
process of its own; own memory is what that process shares with no file (RssAnon), beyond its imports.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from rich.console import Console

from moray.cluster.ray import generation as generations
from moray.cluster.ray.child import _open_store
from moray.cluster.ray.generation import Watch
from moray.cluster.ray.laps import Laps
from moray.cluster.ray.messages import Assignment, WorkerState
from moray.cluster.ray.nodes import POLLS
from moray.cluster.ray.patience import Patience
from moray.cluster.worker import WorkerContext
from moray.data.dataset import Dataset
from moray.data.index import SAMPLE, SHARD, Extent, Sample, Split, sample_key, shard_name, write_index
from moray.data.stream import Stream
from moray.jobs.config.load import load_config
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.reporter import Reporter
from moray.jobs.runs.watcher import Listener, Watcher
from moray.jobs.training.metrics import MetricsLog, read_metrics
from moray.parallel.control_plane import ControlPlane
from moray.parallel.layout import Layout

SAMPLES = 256
SAMPLE_TOKENS = 1 << 16
OLDER_SHARDS = 2_500
"""More of them than this are not tried with an index of version 1: they take minutes, and GiBs."""


def measured(function: Callable[..., str], *arguments: Any) -> str:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def own_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1024


def index(n_shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        newer, older = Path(folder, "2"), Path(folder, "1")
        print("| index | shards | samples | made in s | opened in s | own MiB | ms a position | verified in s |")
        print("|---|---|---|---|---|---|---|---|")
        print(measured(index_row, newer, 2, n_shards))
        print(measured(index_row, older, 1, min(n_shards, OLDER_SHARDS)))


def index_row(folder: Path, version: int, n_shards: int) -> str:
    began = time.perf_counter()
    (make_index if version == 2 else make_older_index)(folder, n_shards)
    made = time.perf_counter()
    return measured(
        opened_row, folder, f"| version {version} | {n_shards:,} | {n_shards * SAMPLES:,} | {made - began:.1f}"
    )


def opened_row(folder: Path, row: str) -> str:
    memory, began = own_mib(), time.perf_counter()
    dataset = Dataset.open(folder)
    stream = Stream(dataset, "train", seq_len=4096, global_batch=512, seed=0, lanes=range(8))
    opened = time.perf_counter()
    # A position is found where its sample's record is; each of these in another epoch, the worst that can be.
    positions = np.arange(20) * stream.sequences_per_epoch + 12345
    for position in positions:
        places = stream._sources[0].order.locate(np.array([position]))
        shard = stream._sources[0].rows._reader._split[int(places.shards[0])]
        number = int(np.searchsorted(shard.starts, int(places.sequences[0]) * 4096, side="right")) - 1
        shard.sample(number)
    found, grown = time.perf_counter(), own_mib() - memory
    dataset.verify()
    verified = time.perf_counter()
    seconds = (
        f"{opened - began:.2f} | {grown:.0f} | {(found - opened) / len(positions) * 1e3:.1f} | {verified - found:.1f}"
    )
    return f"{row} | {seconds} |"


def make_index(folder: Path, n_shards: int) -> None:
    """As `moray prepare` would leave it, but for the shards, which are empty."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for number in range(n_shards):
        (folder / shard_name("train", number)).touch()
    shards = np.zeros(n_shards, SHARD)
    shards["sha256"], shards["n_tokens"], shards["n_documents"] = b"ab" * 32, SAMPLES * SAMPLE_TOKENS, SAMPLES * 64
    shards["end"] = np.arange(1, n_shards + 1) * SAMPLES
    np.save(folder / "train.shards.npy", shards)
    records = np.array([sample(0, number).record for number in range(SAMPLES)], SAMPLE)
    samples = np.lib.format.open_memmap(folder / "train.samples.npy", "w+", SAMPLE, (n_shards * SAMPLES,))
    for number in range(n_shards):
        samples[number * SAMPLES : (number + 1) * SAMPLES] = records
    write_index(folder, 60_000, 0, {"train": Split("train", shards, samples)})


def make_older_index(folder: Path, n_shards: int) -> None:
    make_index(folder, n_shards)
    newer = json.loads((folder / "index.json").read_text())
    with open(folder / "index.json", "w") as file:
        kept = {name: newer[name] for name in ("fingerprint", "vocab_size", "pad_id", "tokenizer_sha256")}
        json.dump({"version": 1, **kept, "splits": {"train": [older_shard(n) for n in range(n_shards)]}}, file)


def older_shard(number: int) -> dict[str, Any]:
    samples = [sample(number, n) for n in range(SAMPLES)]
    return {
        "name": shard_name("train", number),
        "size": 0,
        "sha256": "ab" * 32,
        "n_tokens": SAMPLES * SAMPLE_TOKENS,
        "n_documents": SAMPLES * 64,
        "samples": [asdict(sample) for sample in samples],
    }


def sample(shard: int, number: int) -> Sample:
    size = 2 * SAMPLE_TOKENS
    offset = number * (size + 8192)
    return Sample(
        key=sample_key(shard_name("train", shard), number),
        n_tokens=SAMPLE_TOKENS,
        n_documents=64,
        tokens=Extent(offset + 4096, size + 128),
        ends=Extent(offset + 512, 640),
        json=Extent(offset + 2048, 1500),
        crc32=number * 2654435761 % 2**32,
    )


def metrics(steps: int) -> None:
    """What rank 0 does as it resumes, and a driver as it starts, after so many steps of 26 MoE layers."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        with open(run / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(metrics_row(step)) + "\n" for step in range(1, steps + 1))
        commits = [{"kind": "commit", "step": step, "digest": "ab" * 32} for step in range(100, steps + 1, 100)]
        events = [{"kind": "begin", "step": 0, "position": 0}, *commits]
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        print(f"metrics.jsonl: {steps:,} steps, {(run / 'metrics.jsonl').stat().st_size / 2**20:.0f} MiB")
        print("| what | CPU s | own MiB |")
        print("|---|---|---|")
        print(measured(cpu_row, "rank 0 resumes", resume, run, steps))
        print(measured(cpu_row, "a driver's start checks the ledger", ledger_problems, run))
        print(measured(cpu_row, "all rows read, as a resume once did", read_metrics, run))


def resume(run: Path, step: int) -> None:
    MetricsLog(run, step, generation=2)


def cpu_row(name: str, function: Callable[..., Any], *arguments: Any) -> str:
    memory, began = own_mib(), time.process_time()
    kept = function(*arguments)
    seconds, grown = time.process_time() - began, own_mib() - memory
    del kept
    return f"| {name} | {seconds:.2f} | {grown:.0f} |"


def metrics_row(step: int) -> dict[str, Any]:
    numbers = [1 + step % 97 / 89 + layer / 7 for layer in range(26)]
    return {
        "step": step,
        "generation": 1,
        "loss": 3 + 1 / step,
        "tokens_per_second": 1e6 + 1 / step,
        "grad_norm": 1 / step,
        "positions": [(step - 1) * 512, step * 512],
        "expert_balance": numbers,
        "expert_entropy": numbers,
    }


def driver(nodes: int, workers: int, seconds: float = 30.0) -> None:
    """The driver's share of a core while every worker takes a step a second.

    The generation, the watcher and the reporter are real, the nodes are not: they answer as agents do, without Ray.
    What Ray itself costs a driver is measured on a few real actors, a poll, and added for as many as there were.
    """
    with tempfile.TemporaryDirectory() as folder:
        share, synthetic = driver_share(Path(folder), nodes, workers, seconds)
    answers, waits = synthetic.answers / seconds, synthetic.waits / seconds
    an_answer, a_wait = seconds_of_ray(nodes, workers)
    of_ray = answers * an_answer + waits * a_wait
    print(f"{nodes * workers:,} workers on {nodes:,} nodes: {answers:.0f} answers/s, {waits:.0f} calls of ray.wait/s")
    print(f"Ray's work {of_ray:.1%} of a core ({an_answer * 1e3:.2f} ms an answer, {a_wait * 1e3:.2f} ms a wait)")
    print(f"the driver's own {share:.1%}")
    print(f"together {of_ray + share:.1%}")


def working(rank: int, step: int) -> WorkerState:
    entered = dict.fromkeys(("joining", "building", "reading", "computing"), 0.5)
    return WorkerState(rank, 1000 + rank, step, {"step": step}, "step", False, entered, 0.5, 0.9, 1.0, 0.0, None, None)


class SyntheticRay:
    """`wait` and `get` over answers that are due at a time."""

    def __init__(self) -> None:
        self.answers = self.waits = 0

    def wait(self, answers: list["Due"], num_returns: int = 1, timeout: float = 0.0) -> tuple[list["Due"], None]:
        self.waits += 1
        first = min(answer.at for answer in answers)
        if num_returns == 1:
            time.sleep(max(0.0, min(first - time.monotonic(), timeout)))
        now = time.monotonic()
        return [answer for answer in answers if answer.at <= now][:num_returns], None

    def get(self, answer: "Due") -> list[WorkerState]:
        self.answers += 1
        return [working(rank, int(time.monotonic())) for rank in answer.ranks]


@dataclass(frozen=True, eq=False)
class Due:
    at: float
    ranks: range


@dataclass(frozen=True, eq=False)
class SyntheticNode:
    host: str
    slots: int
    first: int

    def poll(self, wait_s: float) -> Due:
        return Due(time.monotonic() + wait_s, range(self.first, self.first + self.slots))


def driver_share(run: Path, nodes: int, workers: int, seconds: float) -> tuple[float, SyntheticRay]:
    """The share of a core that a generation without Ray takes, and what it asked of Ray."""
    config = load_config(None, {"data.path": "data", "run.dir": str(run), "model.preset": "demo-moe"})
    group = [SyntheticNode(f"node-{n}", workers, n * workers) for n in range(nodes)]
    began, cpu = time.monotonic(), time.process_time()

    def leave() -> None:
        if time.monotonic() - began > seconds:
            raise TimeoutError

    with Reporter(config, Listener()) as reporter, Watcher(config, Console(quiet=True), reporter) as watcher:
        patience = Patience(startup_s=600, heartbeat_s=60, lease_s=20)
        watch = Watch(patience, watcher.on_event, watcher.on_status, lambda: False, leave, lambda: False)
        generations.ray = synthetic = SyntheticRay()
        followed = generations.Generation(1, [(node, node.slots) for node in group], watch, "ready")
        for node in group:
            followed._poll(node)
        with suppress(TimeoutError):
            followed._follow(Laps(began))
    return (time.process_time() - cpu) / (time.monotonic() - began), synthetic


def seconds_of_ray(nodes: int, workers: int, actors: int = 4, polls: int = 500) -> tuple[float, float]:
    """CPU seconds that a driver's process spends on a poll (to ask an actor, to fetch and unpack its answer), and on a
    look at whether any of as many as there are nodes has been answered."""
    ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    agents = [ray.remote(concurrency_groups={POLLS: 1})(Answering).remote(workers) for _ in range(actors)]
    asked = [agent.call.options(concurrency_group=POLLS) for agent in agents]
    ray.get([ask.remote(0.0) for ask in asked])
    cpu = time.process_time()
    for _ in range(polls // actors):
        waiting = [ask.remote(0.05) for ask in asked]
        ray.wait(waiting, num_returns=actors, timeout=10)
        for answer in waiting:
            ray.get(answer)
    a_poll = (time.process_time() - cpu) / polls
    waiting = [asked[node % actors].remote(60.0) for node in range(nodes)]
    cpu = time.process_time()
    for _ in range(100):
        ray.wait(waiting, num_returns=nodes, timeout=0)
    a_wait = (time.process_time() - cpu) / 100
    ray.shutdown()
    return a_poll, a_wait


class Answering:
    def __init__(self, workers: int) -> None:
        self.states = [working(rank, step=1) for rank in range(workers)]

    def call(self, wait_s: float) -> list[WorkerState]:
        time.sleep(wait_s)
        return self.states


def sockets(worlds: list[int]) -> None:
    """The sockets of ranks whose groups have had every kind of collective that a run has, on the CPU."""
    print("| ranks | rank 0, full meshes | others, full meshes | rank 0, as needed | others, as needed |")
    print("|---|---|---|---|---|")
    for world in worlds:
        counts = [count for is_lazy in (False, True) for count in sockets_of(world, is_lazy)]
        print("| " + " | ".join(map(str, [world, *counts])) + " |", flush=True)


def sockets_of(world: int, is_lazy: bool) -> tuple[int, int]:
    """Those of rank 0, and the most that another rank has."""
    context = get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        counts = context.SimpleQueue()
        ranks = [
            context.Process(target=count_sockets, args=(rank, world, listener, is_lazy, counts))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        of_rank = dict(counts.get() for _ in ranks)
        for process in ranks:
            process.join()
    return of_rank.pop(0), max(of_rank.values())


def count_sockets(rank: int, world: int, listener: socket.socket, is_lazy: bool, counts: Any) -> None:
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(is_lazy))
    at = Assignment(1, world, 0, world, "127.0.0.1", listener.getsockname()[1], 60.0, "cpu")
    context = WorkerContext(
        rank=rank,
        world_size=world,
        local_rank=rank,
        local_world_size=world,
        generation=1,
        device=torch.device("cpu"),
        open_store=lambda: _open_store(at, None if rank else listener),
        report=lambda step, status: None,
        should_stop=lambda: False,
    )
    with context.process_group():
        meshes = Layout(dp_replicate=1, dp_shard=world // 2, tp=2, ep=4).resolve(world).meshes("cpu")
        ranks = ControlPlane()
        for numbers in (4, 400_000):  # gloo sums few numbers otherwise than many
            dist.all_reduce(torch.zeros(numbers))
        ranks.from_rank_0(lambda: 1)
        ranks.gather(1)
        told = [None] * world if rank == 0 else None
        dist.gather_object(rank, told, group=ranks.group)  # a commit's plans, and what becomes of them
        dist.scatter_object_list([None], told, group=ranks.group)
        for group in (
            mesh.get_group(name) for mesh in (meshes.dense, meshes.sparse) for name in mesh.mesh_dim_names or ()
        ):
            n = dist.get_world_size(group)
            dist.all_gather_into_tensor(torch.zeros(n * 1000), torch.zeros(1000), group=group)
            dist.reduce_scatter_tensor(torch.zeros(1000), torch.zeros(n * 1000), group=group)
            dist.all_reduce(torch.zeros(1000), group=group)
        ep = meshes.sparse.get_group("ep")
        dist.all_to_all_single(torch.zeros(4000), torch.zeros(4000), group=ep)
        dist.barrier()
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        counts.put((rank, sum(os.path.islink(link) and os.readlink(link).startswith("socket") for link in links)))
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("index").add_argument("n_shards", type=int)
    commands.add_parser("metrics").add_argument("steps", type=int)
    of_driver = commands.add_parser("driver")
    of_driver.add_argument("--nodes", type=int, default=256)
    of_driver.add_argument("--workers", type=int, default=8)
    commands.add_parser("sockets").add_argument("--worlds", type=int, nargs="+", default=[4, 8, 16])
    arguments = vars(parser.parse_args())
    {"index": index, "metrics": metrics, "driver": driver, "sockets": sockets}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
