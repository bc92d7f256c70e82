"""A training step on GPUs, moray beside transformers in the same run: compiled or not, packed, with windows, soft caps.

    torchrun --nproc-per-node=1 benchmarks/gpu.py [--rounds 5] [--batch 4] [--tokens 2048] [--only WORDS]

Without Ray. A dense model of 1.1 billion parameters, and a MoE of which a token takes as many, in bf16 with fp32
weights, gradients and moments on both sides, which FSDP2 shards on several GPUs. A step is forward, backward and AdamW.
All cases of a model take turns with transformers as it is; a ratio is the median over the rounds. MFU: what the
architecture asks for, documents and windows counted, over what a matrix product reaches here and now. Without a GPU,
models of two small layers show that the command works, and no more.
"""

import argparse
import gc
import os
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training_step import Step, seconds, transformers_model

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.metrics import matmul_peak
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.accounting.work import Work
from moray.model.objective import MicroBatch
from moray.parallel.compiled import compile_layers
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards

DOCUMENT_TOKENS = 340
"""What a document of MiniMind's corpora has or so."""
LARGE: dict[str, Any] = {
    "vocab_size": 32_000,
    "n_layers": 16,
    "d_model": 2048,
    "max_seq_len": 4096,
    "attention": {"n_heads": 16, "n_kv_heads": 8, "head_dim": 128},
    "ffn": {"width": 8192},
}
SMALL = {"n_layers": 2, "d_model": 128, "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}}
EXPERTS = {"n_experts": 16, "top_k": 8, "expert_width": 1024}
MODELS = {"dense": ("minimind-3", {}), "16 experts of 1,024, top 8": ("minimind-3-moe", {"moe": EXPERTS})}


@dataclass(frozen=True)
class Case:
    name: str
    attention: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("moray")


KINDS = (
    Case("transformers"),
    Case("moray"),
    Case(f"moray, documents of {DOCUMENT_TOKENS}", packed=True),
    Case("moray, window of 512", {"window": 512}),
    Case("moray, soft cap of 50", {"softcap": 50.0}),
)
CASES = [Case(kind.name, kind.attention, kind.packed, compiled) for kind in KINDS for compiled in (False, True)]


def moray_step(config: ModelConfig, batch: MicroBatch, device: torch.device, compiled: bool) -> Step:
    meshes = Layout(dp_shard=dist.get_world_size()).meshes(device.type)
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.bfloat16, stage=1)
    if compiled:
        compile_layers(decoder, device.type, torch.bfloat16)
    initialise_shards(decoder, 0)
    optimizer, reduction = build_optimizer(decoder, OptimizerSection()), Reduction(decoder, meshes, 1)

    def step() -> None:
        accumulate_gradients(decoder, [batch], reduction)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(config: ModelConfig, tokens_BT: torch.Tensor, device: torch.device, compiled: bool) -> Step:
    with device:
        peer: Any = transformers_model(config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in peer.model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(peer, mp_policy=policy)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)

    def step() -> None:
        peer(tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(model: str, options: argparse.Namespace, device: torch.device) -> None:
    """Prints a row for each case; rank 0 does. Collective."""
    preset, changes = MODELS[model]
    shape = LARGE if device.type == "cuda" else {**LARGE, **SMALL}
    tokens_BT = torch.randint(shape["vocab_size"], (options.batch, options.tokens + 1))
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    places = torch.arange(options.tokens).expand_as(inputs)
    peak = matmul_peak(device, torch.bfloat16, 2.0)
    base = None
    for case in CASES:
        if not all(word in f"{model}, {case.name}" for word in options.only.split(",")) and base:
            continue
        attention = {**shape["attention"], **case.attention}
        config = ModelConfig.preset(preset, **{**shape, **changes, "attention": attention})
        documents = places // DOCUMENT_TOKENS if case.packed else torch.zeros_like(inputs)
        if case.is_ours:
            positions = places % DOCUMENT_TOKENS if case.packed else places
            batch = MicroBatch.of(inputs, targets, positions, documents, device)
            step = moray_step(config, batch, device, case.compiled)
        else:
            step = transformers_step(config, inputs.to(device), device, case.compiled)
        base = base or step
        for _ in range(3):
            seconds(step, device)
        pairs = [(seconds(base, device), seconds(step, device)) for _ in range(options.rounds)]
        found = statistics.median(own for _, own in pairs)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        mfu = Work.of(config).flops(documents) / found / peak
        if dist.get_rank() == 0:
            speed = options.batch * options.tokens / found
            yes = "yes" if case.compiled else "no"
            print(f"| {model} | {case.name} | {yes} | {speed:,.0f} | {ratio:.2f} | {mfu:.0%} |", flush=True)
        del step
        gc.collect()  # modules refer to themselves, and a GPU has no room for all cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a GPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", default="", help="cases whose model and name have all of these words, by commas")
    options = parser.parse_args()
    has_gpu, rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", **alone)
    torch.manual_seed(dist.get_rank())
    if dist.get_rank() == 0:
        where = f"{dist.get_world_size()} x {torch.cuda.get_device_name() if has_gpu else 'CPU'}"
        print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}\n")
        print("| model | case | compiled | tokens/s a GPU | of transformers | MFU |\n|---|---|---|---|---|---|")
    for model in MODELS:
        compare(model, options, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
