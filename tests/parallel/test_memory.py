"""What a rank is said to have in memory, against what its process has while it trains."""

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch.distributed.tensor import DTensor

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.accounting.cost import parameters_by_part
from moray.model.lora import LoRA, targets_in
from moray.model.objective import MicroBatch
from moray.model.recompute import Recompute
from moray.model.sharded import local
from moray.parallel.gradients import accumulate_gradients, clip_gradients
from moray.parallel.layout import Layout
from moray.parallel.memory import FP32_BYTES, rank_memory
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards

DEMO = ModelConfig.preset("demo-moe")


def held_elements(layout: Layout) -> list[int]:
    """Of this rank: in its shards, and in all weights as it computes with them."""
    decoder = build_decoder(DEMO, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32, stage=1)
    shards = sum(local(weight).numel() for weight in decoder.parameters())
    for module in decoder.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return [shards, sum(local(weight).numel() for weight in decoder.parameters())]


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_shard=2, ep=2)], ids=str)
def test_weights_are_those_that_a_rank_holds(pool: Pool, layout: Layout) -> None:
    settings: dict[str, Any] = {"seq_len": 64, "micro_batch": 1, "dtype": torch.float32, "recompute": "none"}
    expected = rank_memory(DEMO, layout, stage=1, **settings)
    experts = parameters_by_part(DEMO)["routed experts"].total
    # Its share of the experts, which no peer shares under expert parallelism, is not gathered.
    own = experts / 2 if layout.ep == 2 else 0
    for shards, whole in pool.run(held_elements, layout.world_size, layout):
        assert shards == pytest.approx(expected.weights / FP32_BYTES, rel=0.01)
        assert whole == pytest.approx(expected.gathered / (2 * FP32_BYTES) + own, rel=0.01)


def learning_elements(layout: Layout, lora: LoRA) -> list[int]:
    decoder = build_decoder(DEMO, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32, lora=lora)
    held = [(local(weight).numel(), weight.requires_grad) for weight in decoder.parameters()]
    return [sum(n for n, _ in held), sum(n for n, learns in held if learns)]


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_shard=2, ep=2)], ids=str)
def test_gradients_and_moments_are_those_of_what_learns(pool: Pool, layout: Layout) -> None:
    settings: dict[str, Any] = {"seq_len": 64, "micro_batch": 1, "dtype": torch.float32, "recompute": "none"}
    lora = LoRA(8, 16.0, targets_in(DEMO))
    expected = rank_memory(DEMO, layout, stage=3, lora=lora, **settings)
    for held, learning in pool.run(learning_elements, layout.world_size, layout, lora):
        assert held == pytest.approx(expected.weights / FP32_BYTES, rel=0.01)
        assert learning == pytest.approx(expected.gradients / FP32_BYTES, rel=0.01)
    assert expected.optimizer == 2 * expected.gradients
    assert expected.head == 0 < rank_memory(DEMO, layout, stage=3, **settings).head


def copied_elements(lora: LoRA) -> int:
    """Of what is frozen, that FSDP gathers anew for each use."""
    meshes = Layout(dp_shard=1).meshes("cpu")
    decoder = build_decoder(DEMO, meshes, dtype=torch.float32, compute_dtype=torch.bfloat16, lora=lora)
    frozen = {name: weight for name, weight in decoder.named_parameters() if not weight.requires_grad}
    return sum(
        weight.numel() for name, weight in frozen.items() if isinstance(weight, DTensor) and "router" not in name
    )


def test_a_lone_rank_has_no_second_copy_of_what_is_frozen(pool: Pool) -> None:
    lora = LoRA(8, 16.0, targets_in(DEMO))
    settings: dict[str, Any] = {"seq_len": 64, "micro_batch": 1, "dtype": torch.bfloat16, "recompute": "none"}
    assert pool.run(copied_elements, 1, lora) == [0]
    assert rank_memory(DEMO, Layout(dp_shard=1), stage=3, lora=lora, **settings).gathered == 0
    assert rank_memory(DEMO, Layout(dp_shard=2), stage=3, lora=lora, **settings).gathered > 0


SIZES: dict[str, Any] = {"n_layers": 4, "d_model": 384, "vocab_size": 1024, "max_seq_len": 256}
HEADS = {"n_heads": 6, "n_kv_heads": 6, "head_dim": 64}
MODELS = {
    "dense": ModelConfig.preset("demo-dense", **SIZES, attention=HEADS, ffn={"width": 1536}),
    "moe": ModelConfig.preset(
        "demo-moe", **SIZES, attention=HEADS, moe={"n_experts": 8, "top_k": 4, "expert_width": 384}
    ),
}
SEQ_LEN, MICRO_BATCH = 256, 4


def status(name: str) -> int:
    """Bytes, of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def take_step(config: ModelConfig, layout: Layout, stage: Stage, recompute: Recompute) -> object:
    """Of two micro-batches; returns what is to live on."""
    meshes = layout.meshes("cpu")
    generator = torch.Generator().manual_seed(dist.get_rank() // layout.tp)
    tokens = torch.randint(config.vocab_size, (MICRO_BATCH, SEQ_LEN), generator=generator)
    places = torch.arange(SEQ_LEN).expand_as(tokens)
    batches = [MicroBatch.of(tokens, tokens, places, torch.zeros_like(tokens), torch.device("cpu"))] * 2
    decoder = build_decoder(
        config, meshes, dtype=torch.float32, compute_dtype=torch.float32, stage=stage, recompute=recompute
    )
    initialise_shards(decoder, 0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    accumulate_gradients(decoder, batches, Reduction(decoder, meshes, stage))
    clip_gradients(decoder.parameters(), 1.0)
    optimizer.step()
    return decoder, optimizer


def peak(name: str, layout: Layout, stage: Stage, recompute: Recompute) -> int:
    """The most that this process had resident in a step, beyond what it had after one of a tiny model, by which time
    the code of all kernels is there.
    """
    glibc = ctypes.CDLL(None)
    glibc.mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD: what is freed is given back at once
    _kept = take_step(MODELS[name].but(n_layers=2, vocab_size=256), layout, stage, recompute)
    del _kept
    gc.collect()
    glibc.malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _kept = take_step(MODELS[name], layout, stage, recompute)
    return status("VmHWM") - before


CASES: list[tuple[str, Layout, Stage, Recompute]] = [
    ("dense", Layout(dp_shard=1), 3, "none"),
    ("dense", Layout(dp_shard=1), 3, "selective"),
    ("dense", Layout(dp_shard=1), 3, "full"),
    ("dense", Layout(dp_shard=2), 1, "none"),
    ("dense", Layout(dp_shard=2), 3, "none"),
    ("dense", Layout(dp_shard=1, tp=2), 3, "none"),
    ("dense", Layout(dp_shard=1, tp=2), 3, "selective"),
    ("moe", Layout(dp_shard=1), 3, "none"),
    ("moe", Layout(dp_shard=1), 3, "full"),
    ("moe", Layout(dp_shard=2), 3, "none"),
    ("moe", Layout(dp_replicate=2, dp_shard=1), 1, "selective"),
    ("moe", Layout(dp_shard=2, ep=2), 1, "selective"),
    ("moe", Layout(dp_shard=1, tp=2, ep=2), 3, "none"),
]


@pytest.mark.parametrize(("name", "layout", "stage", "recompute"), CASES, ids=lambda value: str(value))
def test_the_peak_is_what_was_said(pool: Pool, name: str, layout: Layout, stage: Stage, recompute: Recompute) -> None:
    expected = rank_memory(
        MODELS[name],
        layout.resolve(layout.world_size),
        seq_len=SEQ_LEN,
        micro_batch=MICRO_BATCH,
        dtype=torch.float32,
        stage=stage,
        recompute=recompute,
    )
    found = pool.run(peak, layout.world_size, name, layout, stage, recompute)
    mebibytes = {name: round(size / 2**20) for name, size in expected._asdict().items()}
    for bytes_found in found:
        assert bytes_found == pytest.approx(expected.total, rel=0.10), mebibytes
