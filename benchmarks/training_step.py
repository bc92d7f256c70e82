"""One training step (forward, backward, AdamW) of MiniMind-3 shapes, moray against transformers, in the same run.

    python benchmarks/training_step.py [--rounds 5] [--batch 4] [--tokens 512]

Both sides take turns, step by step, so that a drifting machine slows both; the ratio is the median over the pairs.
moray runs what `moray pretrain` runs on one worker: fp32 weights, packed rows without padding.
transformers runs with SDPA and the fused AdamW; in bf16 once under autocast (fp32 weights, as moray has) and once with
bf16 weights and optimizer (which loses updates, and is faster). The peak is a 1024 x 1024 matrix product here and now.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import transformers

from moray.jobs.config.run import OptimizerSection
from moray.jobs.training.metrics import matmul_peak
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.accounting.cost import train_flops_per_token
from moray.parallel.gradients import MicroBatch, accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

Step = Callable[[], None]


def moray_step(config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor) -> Step:
    meshes = Layout(dp_shard=1).meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=dtype)
    initialise_shards(decoder, seed=0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    batch = MicroBatch.of(inputs, targets, positions, torch.zeros_like(inputs), torch.device("cpu"))

    def step() -> None:
        accumulate_gradients(decoder, [batch], tp=1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, autocast: bool) -> Step:
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
    if config.moe:
        peer = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **common,
                num_experts=config.moe.n_experts,
                num_experts_per_tok=config.moe.top_k,
                moe_intermediate_size=config.moe.expert_width,
                norm_topk_prob=config.moe.normalise_gates,
                output_router_logits=True,
            )
        )
    else:
        peer = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    peer = peer if autocast else peer.to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)
    # transformers shifts the labels itself; 512 positions are computed on either side.
    inputs = tokens_BT[:, :-1]

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = peer(inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare(ours: Step, theirs: Step, rounds: int) -> tuple[float, float, float]:
    """Median seconds of each side, and the median of the pairwise ratios theirs / ours."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    tokens_BT = torch.randint(6400, (arguments.batch, arguments.tokens + 1))
    count = arguments.batch * arguments.tokens
    cpu = torch.device("cpu")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| model | dtype | peer's weights | moray tokens/s | transformers tokens/s | ratio | share of peak: both |")
    print("|---|---|---|---|---|---|---|")
    for preset in ("minimind-3", "minimind-3-moe"):
        config = ModelConfig.preset(preset)
        flops = train_flops_per_token(config, arguments.tokens) * count
        for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
            ours = moray_step(config, dtype, tokens_BT)
            theirs = transformers_step(config, dtype, tokens_BT, autocast)
            a, b, ratio = compare(ours, theirs, arguments.rounds)
            peak = matmul_peak(cpu, dtype, 2.0)
            weights = "float32" if autocast or dtype == torch.float32 else "bfloat16"
            print(
                f"| {preset} | {str(dtype)[6:]} | {weights} | {count / a:,.0f} | {count / b:,.0f} | {ratio:.2f} "
                f"| {flops / a / peak:.0%} {flops / b / peak:.0%} |",
                flush=True,
            )
            del ours, theirs
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
