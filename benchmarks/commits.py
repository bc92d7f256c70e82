"""What a commit costs: its plan and its manifest at thousands of ranks, and the stall of a run that trains on.

    python benchmarks/commits.py plan [--preset deepseek-v3 --ranks 2048 --tp 8 --ep 64]

    python benchmarks/commits.py stall --out DIR [--saves 7]

`plan` builds one rank's part of the model with torch's fake process group (no peer exists), and from its placements
what every other rank would hold. Rank 0's work on it is then the real one: read what 2,048 ranks say, decide who writes
what, write the manifest, read it back, and find the chunks that one rank needs.

`stall` trains the demo's model on 4 processes, and in turn commits it, snapshots it, and saves it by
torch.distributed.checkpoint (waiting, and in the background) and by torch.save: how long the step that follows has to
wait, and how much longer it takes than others.
"""

import argparse
import itertools
import os
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from demo_model import WORKERS, DemoModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import ModelConfig
from moray.model.sharded import local
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.manifest import Manifest, StoredFile
from moray.parallel.checkpoint.plan import Held, assign, describe, file_name
from moray.parallel.checkpoint.snapshots import Snapshots
from moray.parallel.chunks import Chunk
from moray.parallel.held import held_chunk, held_chunks
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder


def timed(what: str, function: Callable[[], Any]) -> Any:
    began, cpu = time.perf_counter(), time.process_time()
    result = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {what} | {time.perf_counter() - began:.2f} | {time.process_time() - cpu:.2f} | {peak:.2f} |", flush=True)
    return result


def one_rank(preset: str, layout: Layout) -> dict[str, Tensor]:
    """Rank 0's state; its tensors have no memory."""
    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    config = ModelConfig.preset(preset)
    # On the meta device throughout: only shapes and placements matter here.
    empty, torch.nn.Module.to_empty = torch.nn.Module.to_empty, lambda self, **_: self  # type: ignore[method-assign]
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.bfloat16)
    torch.nn.Module.to_empty = empty  # type: ignore[method-assign]
    return training_state(decoder, build_optimizer(decoder, OptimizerSection()))


def all_ranks(state: dict[str, Tensor], world_size: int) -> list[Held]:
    """What every rank would say, from the placements of one."""
    mine = describe(state)
    cuts: dict[Any, np.ndarray] = {}
    kinds = []
    for tensor in state.values():
        key = (tensor.shape, tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else (tensor.shape,)
        kinds.append(key)
        if key not in cuts:
            cuts[key] = chunks_of(tensor, world_size)
            assert cuts[key][0] == held_chunk(tensor)
    held = []
    for rank in range(world_size):
        known: dict[Chunk, int] = {}
        which = [known.setdefault(cuts[key][rank], len(known)) if np.prod(cuts[key][rank][1]) else -1 for key in kinds]
        held.append(Held(mine.digest, tuple(known), np.array(which, np.int32)))
    return held


def chunks_of(tensor: Tensor, world_size: int) -> list[Chunk]:
    """The chunk that each rank holds of a tensor that is cut as this one is."""
    if not isinstance(tensor, DTensor):
        return [held_chunk(tensor)] * world_size
    mesh = tensor.device_mesh
    found: list[Chunk] = [((), ())] * world_size
    for coordinate in np.ndindex(*mesh.shape):
        place = dict(enumerate(coordinate))
        sizes, offsets = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, lambda dimension, place=place: place[dimension], tensor.placements
        )
        found[int(mesh.mesh[coordinate])] = (tuple(offsets), tuple(sizes))
    return found


def plan(options: argparse.Namespace) -> None:
    layout = Layout(tp=options.tp, ep=options.ep, dp_replicate=options.dp_replicate).resolve(options.ranks)
    state = one_rank(options.preset, layout)
    bytes_of = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    print(f"{options.preset}, {layout}: {len(state):,} tensors, {bytes_of / 2**40:.2f} TiB\n")
    print("| work | seconds | CPU seconds | peak GiB |\n|---|---|---|---|")
    timed("a rank tells what it holds", lambda: describe(state))
    said = [pickle.dumps(held) for held in all_ranks(state, options.ranks)]
    held = timed(
        f"rank 0 reads {sum(map(len, said)) / 2**20:.0f} MiB of answers", lambda: list(map(pickle.loads, said))
    )
    decided = timed("and decides", lambda: assign(held, state))
    files = {file_name(rank): StoredFile(2**30, f"{rank:064x}") for rank in range(options.ranks)}
    text = timed(
        "writes a manifest", lambda: Manifest(100, "2026-01-01", {}, files, decided.tensors, 1, None).to_json()
    )
    read = timed(f"of {len(text) / 2**20:.1f} MiB, and reads it", lambda: Manifest.from_json(text))
    timed(
        "a rank finds its chunks",
        lambda: [read.tensors[name].grid.meeting(chunk) for name, chunk in held_chunks(state).items()],
    )


def stall(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    files = [[os.memfd_create("snapshot") for _ in range(2)] for _ in range(WORKERS)]
    # Forked, so that the files in memory are open there, too, as an agent's are.
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=stalled, args=(rank, files, options)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def stalled(rank: int, files: list[list[int]], options: argparse.Namespace) -> None:
    store = dist.FileStore(str(options.out / f"store-{os.getppid()}"), WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    model = DemoModel()
    model.initialise()
    state = model.state
    folder, saves = options.out / f"saves-{os.getppid()}", itertools.count(1)
    checkpointer = Checkpointer(folder / "ours", keep=1, keep_every=None, on_event=lambda kind, fields: None)
    snapshots = Snapshots(
        dict(enumerate(files)), [range(WORKERS)], 0, state,
        generation=1, every=1, on_event=lambda kind, fields: None,
    )  # fmt: skip
    snapshots.reserve(lambda: None)
    pending: list[Any] = []
    apart = dist.new_group(backend="gloo")  # whose collectives the training's do not meet

    def step() -> float:
        dist.barrier()
        began = time.perf_counter()
        model.step(0)
        dist.barrier()
        return time.perf_counter() - began

    later = partial(dcp.async_save, state, process_group=apart)
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "a commit": (lambda: checkpointer.save(next(saves), state, {}), checkpointer.finish),
        "a snapshot": (lambda: snapshots.take(next(saves), state, {}, 1.0), snapshots.finish),
        "dcp.save": (lambda: dcp.save(state, checkpoint_id=folder / f"dcp-{next(saves)}"), lambda: None),
        "dcp.async_save": (
            lambda: pending.append(later(checkpoint_id=folder / f"async-{next(saves)}")),
            lambda: pending.pop().result(),
        ),
        "torch.save": (
            lambda: torch.save({n: local(t) for n, t in state.items()}, folder / f"torch-{rank}.pt"), lambda: None,
        ),
    }  # fmt: skip
    waits: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    plain = []
    for _ in range(options.saves + 1):  # the first time of each is not counted
        for name, (save, finish) in ways.items():
            plain.append(step())
            dist.barrier()
            began = time.perf_counter()
            save()
            dist.barrier()
            waits[name].append((time.perf_counter() - began, step()))
            finish()
    if rank == 0:
        usual = statistics.median(plain[len(ways) :])
        print(f"a step: {usual:.3f} s\n\n| way | wait s | of a step | next step longer by |\n|---|---|---|---|")
        for name, of_way in waits.items():
            wait, after = (statistics.median(values) for values in zip(*of_way[1:], strict=True))
            print(f"| {name} | {wait:.3f} | {wait / usual:.1%} | {after / usual - 1:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_plan = commands.add_parser("plan")
    of_plan.set_defaults(run=plan)
    of_plan.add_argument("--preset", default="deepseek-v3")
    for name, default in (("ranks", 2048), ("tp", 8), ("ep", 64), ("dp-replicate", 1)):
        of_plan.add_argument(f"--{name}", type=int, default=default)
    of_stall = commands.add_parser("stall")
    of_stall.set_defaults(run=stall)
    of_stall.add_argument("--out", type=Path, required=True)
    of_stall.add_argument("--saves", type=int, default=7)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
