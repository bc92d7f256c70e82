"""What `train.recompute` saves and costs: bytes that a forward pass leaves, and seconds of a step, relative to `none`.

    python benchmarks/recompute.py [--rounds 4]

Bytes are what glibc has allocated, of the two models in tests/allocated.py, in a process of its own each. Steps are of
MiniMind-3's shapes, 4 x 512 tokens; the three ways take turns, and a ratio is the median over the rounds.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from moray.cluster.host_memory import keep_freed_memory
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.objective import MicroBatch
from moray.model.recompute import Recompute
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

ALLOCATED = Path(__file__).parents[1] / "tests" / "allocated.py"
WAYS: tuple[Recompute, ...] = get_args(Recompute)
ROWS, TOKENS = 4, 512


def step_of(config: ModelConfig, dtype: torch.dtype, how: Recompute) -> Callable[[], None]:
    meshes = Layout(dp_shard=1).meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=dtype, recompute=how)
    initialise_shards(decoder, 0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    tokens = torch.randint(config.vocab_size, (ROWS, TOKENS))
    places = torch.arange(TOKENS).expand_as(tokens)
    batch = MicroBatch.of(tokens, tokens, places, torch.zeros_like(tokens), torch.device("cpu"))

    def step() -> None:
        accumulate_gradients(decoder, [batch])
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    print(f"| MiB that a forward pass leaves | {' | '.join(WAYS)} |\n|---|---|---|---|")
    for model in ("dense", "moe"):
        left = [subprocess.check_output([sys.executable, ALLOCATED, model, how], text=True) for how in WAYS]
        print(f"| {model} | {' | '.join(f'{int(x) / 2**20:,.0f}' for x in left)} |", flush=True)
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"\n| seconds a step, relative to none | {' | '.join(WAYS)} |\n|---|---|---|---|")
    for preset, dtype in (
        ("minimind-3", torch.float32),
        ("minimind-3", torch.bfloat16),
        ("minimind-3-moe", torch.float32),
    ):
        steps = [step_of(ModelConfig.preset(preset), dtype, how) for how in WAYS]
        rounds = [[seconds(step) for step in steps] for _ in range(options.rounds + 1)][1:]
        ratios = [statistics.median(each[i] / each[0] for each in rounds) for i in range(len(WAYS))]
        print(f"| {preset}, {str(dtype)[6:]} | {' | '.join(f'{x:.2f}' for x in ratios)} |", flush=True)
        del steps
        gc.collect()


if __name__ == "__main__":
    main()
