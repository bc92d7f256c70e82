"""One training step (forward, backward, AdamW), moray against transformers or litgpt, in the same run.

    python benchmarks/training_step.py [--compiled] [--peer litgpt] [--rounds 5] [--batch 4] [--tokens 512]

On the CPU, with MiniMind-3 shapes (on GPUs: benchmarks/gpu.py). `pip install --no-deps litgpt lightning
lightning-utilities` is what litgpt's model needs.
Both sides take turns, step by step, so that a drifting machine slows both; the ratio is the median over the pairs.
moray runs what `moray pretrain` runs on one worker: fp32 weights, packed rows without padding.
Peers run with SDPA and the fused AdamW; in bf16 once under autocast (fp32 weights, as moray has) and once with
bf16 weights and optimizer (which loses updates, and is faster). The peak is a matrix product here and now.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
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
from moray.model.objective import MicroBatch
from moray.parallel.compiled import compile_layers
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

Step = Callable[[], None]
FINE = {"n_experts": 64, "top_k": 6, "expert_width": 304}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "minimind-3": ("minimind-3", {}),
    "minimind-3-moe": ("minimind-3-moe", {}),
    "64 experts of 304, top 6": ("minimind-3-moe", {"moe": FINE}),
    "dense of 6 x 304": ("minimind-3", {"ffn": {"width": 6 * 304}}),
}
CPU = torch.device("cpu")


def moray_step(config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, compiled: bool = False) -> Step:
    meshes = Layout(dp_shard=1).meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=dtype)
    if compiled:
        compile_layers(decoder, "cpu", dtype)
    initialise_shards(decoder, seed=0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    places = torch.arange(inputs.shape[1]).expand_as(inputs)
    batch = MicroBatch.of(inputs, targets, places, torch.zeros_like(inputs), CPU)

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


def transformers_step(config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, autocast: bool) -> Step:
    peer = transformers_model(config)
    # transformers shifts the labels itself; as many positions are computed on either side.
    inputs = tokens_BT[:, :-1]
    return _peer_step(peer, lambda: peer(inputs, labels=inputs).loss, dtype, autocast)


def litgpt_step(config: ModelConfig, dtype: torch.dtype, tokens_BT: torch.Tensor, autocast: bool) -> Step:
    """Its GPT with the parts of Qwen3, and the loss of its own training; a head of its own, which it cannot tie."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    attention = config.attention
    peer = GPT(
        Config(
            block_size=tokens_BT.shape[1] - 1,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_embd=config.d_model,
            n_head=attention.n_heads,
            n_query_groups=attention.n_kv_heads,
            head_size=attention.head_dim,
            intermediate_size=config.ffn.width,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_qk=attention.qk_norm == "head",
            mlp_class_name="LLaMAMLP",
        )
    )
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    return _peer_step(peer, lambda: chunked_cross_entropy(peer(inputs), targets, chunk_size=0), dtype, autocast)


PEERS = {"transformers": transformers_step, "litgpt": litgpt_step}


def _peer_step(peer: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype, autocast: bool) -> Step:
    if not autocast:
        peer.to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, device: torch.device = CPU) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(ours: Step, theirs: Step, rounds: int) -> tuple[float, float, float]:
    """Median seconds of each side, and the median of the pairwise ratios theirs / ours."""
    seconds(ours), seconds(theirs)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, default="transformers")
    parser.add_argument("--compiled", action="store_true", help="moray's layers are compiled (train.compile)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", default="", help="models whose name has one of these words, by commas")
    parser.add_argument("--give-back", action="store_true", help="freed memory goes back to the system, as by default")
    arguments = parser.parse_args()
    if not arguments.give_back:
        keep_freed_memory()  # as moray's workers do: on both sides, which take turns in this process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    peer, count = arguments.peer, arguments.batch * arguments.tokens
    versions = f"torch {torch.__version__}, {peer} {version(peer)}"
    print(f"{torch.get_num_threads()} threads, {versions}{', moray compiled' if arguments.compiled else ''}")
    print(f"| model | dtype | peer's weights | moray tokens/s | {peer} tokens/s | ratio | share of peak: both |")
    print("|---|---|---|---|---|---|---|")
    for name, (preset, changes) in SHAPES.items():
        config = ModelConfig.preset(preset, **changes)
        if not any(word in name for word in arguments.only.split(",")) or (config.moe and peer == "litgpt"):
            continue
        tokens_BT = torch.randint(config.vocab_size, (arguments.batch, arguments.tokens + 1))
        flops = 3 * sum(forward_flops(config, arguments.tokens).values()) * count
        for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
            ours = moray_step(config, dtype, tokens_BT, arguments.compiled)
            theirs = PEERS[peer](config, dtype, tokens_BT, autocast)
            a, b, ratio = compare(ours, theirs, arguments.rounds)
            peak = matmul_peak(CPU, dtype, 2.0)
            weights = "float32" if autocast or dtype == torch.float32 else "bfloat16"
            print(
                f"| {name} | {str(dtype)[6:]} | {weights} | {count / a:,.0f} | {count / b:,.0f} | {ratio:.2f} "
                f"| {flops / a / peak:.0%} {flops / b / peak:.0%} |",
                flush=True,
            )
            del ours, theirs
            gc.collect()  # modules refer to themselves
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
