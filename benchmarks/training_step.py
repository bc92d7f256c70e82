"""One training step (forward, backward, AdamW), moray against transformers, in the same run.

    python benchmarks/training_step.py [--rounds 5] [--batch 4] [--tokens 512]
    python benchmarks/training_step.py --device cuda --batch 4 --tokens 2048

On the CPU with MiniMind-3 shapes, on a GPU with a dense model and a MoE of a billion active parameters or so.
Both sides take turns, step by step, so that a drifting machine slows both; the ratio is the median over the pairs.
moray runs what `moray pretrain` runs on one worker: fp32 weights, packed rows without padding.
transformers runs with SDPA and the fused AdamW; in bf16 once under autocast (fp32 weights, as moray has) and once with
bf16 weights and optimizer (which loses updates, and is faster). The peak is a matrix product here and now.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers

from moray.cluster.host_memory import keep_freed_memory
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.metrics import matmul_peak
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.accounting.cost import forward_flops
from moray.parallel.gradients import MicroBatch, accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

Step = Callable[[], None]
DOCUMENT_TOKENS = 340
"""What a document of MiniMind's corpora has or so."""
LARGE = {
    "vocab_size": 32_000,
    "n_layers": 16,
    "d_model": 2048,
    "max_seq_len": 4096,
    "attention": {"n_heads": 16, "n_kv_heads": 8, "head_dim": 128},
    "ffn": {"width": 8192},
}
FINE = {"n_experts": 64, "top_k": 6, "expert_width": 304}
SHAPES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cpu": {
        "minimind-3": ("minimind-3", {}),
        "minimind-3-moe": ("minimind-3-moe", {}),
        "64 experts of 304, top 6": ("minimind-3-moe", {"moe": FINE}),
        "dense of 6 x 304": ("minimind-3", {"ffn": {"width": 6 * 304}}),
    },
    "cuda": {
        "dense": ("minimind-3", LARGE),
        "16 experts of 1,024, top 4": (
            "minimind-3-moe",
            {**LARGE, "moe": {"n_experts": 16, "top_k": 4, "expert_width": 1024}},
        ),
    },
}


def moray_step(
    config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, device: torch.device, packed: bool = False
) -> Step:
    meshes = Layout(dp_shard=1).meshes(device.type)
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=dtype)
    initialise_shards(decoder, seed=0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    places = torch.arange(inputs.shape[1]).expand_as(inputs)
    documents = places // DOCUMENT_TOKENS if packed else torch.zeros_like(inputs)
    positions = places % DOCUMENT_TOKENS if packed else places
    batch = MicroBatch.of(inputs, targets, positions, documents, device)

    def step() -> None:
        accumulate_gradients(decoder, [batch])
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_model(config: ModelConfig) -> torch.nn.Module:
    """Qwen3 or Qwen3-MoE of the same widths: without shared experts, and with a MoE in every layer."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn.width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.attention.n_heads,
        "num_key_value_heads": config.attention.n_kv_heads,
        "head_dim": config.attention.head_dim,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": False,
    }
    if not config.moe:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **common,
            num_experts=config.moe.n_experts,
            num_experts_per_tok=config.moe.top_k,
            moe_intermediate_size=config.moe.expert_width,
            norm_topk_prob=config.moe.normalise_gates,
            output_router_logits=True,
        )
    )


def transformers_step(
    config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, device: torch.device, autocast: bool
) -> Step:
    with device:
        peer = transformers_model(config)
    peer = peer if autocast else peer.to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)
    # transformers shifts the labels itself; as many positions are computed on either side.
    inputs = tokens_BT[:, :-1].to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=autocast):
            loss = peer(inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(ours: Step, theirs: Step, rounds: int, device: torch.device) -> tuple[float, float, float]:
    """Median seconds of each side, and the median of the pairwise ratios theirs / ours."""
    for _ in range(1 if device.type == "cpu" else 3):
        seconds(ours, device), seconds(theirs, device)
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--packed", action="store_true", help="moray's rows are documents of 340 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", default="", help="models whose name has one of these words, by commas")
    parser.add_argument("--give-back", action="store_true", help="freed memory goes back to the system, as by default")
    arguments = parser.parse_args()
    if not arguments.give_back:
        keep_freed_memory()  # as moray's workers do: on both sides, which take turns in this process
    device = torch.device(arguments.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    torch.manual_seed(0)
    count = arguments.batch * arguments.tokens
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| model | dtype | peer's weights | moray tokens/s | transformers tokens/s | ratio | share of peak: both |")
    print("|---|---|---|---|---|---|---|")
    for name, (preset, changes) in SHAPES[device.type].items():
        if not any(word in name for word in arguments.only.split(",")):
            continue
        config = ModelConfig.preset(preset, **changes)
        tokens_BT = torch.randint(config.vocab_size, (arguments.batch, arguments.tokens + 1))
        flops = 3 * sum(forward_flops(config, arguments.tokens).values()) * count
        for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
            if device.type == "cuda" and dtype == torch.float32:
                continue
            ours = moray_step(config, dtype, tokens_BT, device, arguments.packed)
            theirs = transformers_step(config, dtype, tokens_BT, device, autocast)
            a, b, ratio = compare(ours, theirs, arguments.rounds, device)
            peak = matmul_peak(device, dtype, 2.0)
            weights = "float32" if autocast or dtype == torch.float32 else "bfloat16"
            print(
                f"| {name} | {str(dtype)[6:]} | {weights} | {count / a:,.0f} | {count / b:,.0f} | {ratio:.2f} "
                f"| {flops / a / peak:.0%} {flops / b / peak:.0%} |",
                flush=True,
            )
            del ours, theirs
            gc.collect()  # modules refer to themselves, and a GPU has no room for two pairs
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
