"""What a commit costs: its plan and its manifest at thousands of ranks, and the stall of a run that trains on.

    python benchmarks/commits.py plan [--preset deepseek-v3 --ranks 2048 --tp 8 --ep 64]

`plan` builds one rank's part of the model with torch's fake process group (no peer exists), and from its placements
what every other rank would hold. Rank 0's work on it is then the real one: read what 2,048 ranks say, decide who writes
what, write the manifest, read it back, and find the chunks that one rank needs.
"""

import argparse
import pickle
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from moray.jobs.config.run import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import ModelConfig
from moray.parallel.checkpoint.manifest import Manifest, StoredFile
from moray.parallel.checkpoint.plan import Held, assign, describe, file_name
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_plan = commands.add_parser("plan")
    of_plan.set_defaults(run=plan)
    of_plan.add_argument("--preset", default="deepseek-v3")
    for name, default in (("ranks", 2048), ("tp", 8), ("ep", 64), ("dp-replicate", 1)):
        of_plan.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
