"""Law 1: every layout computes what one process computes, over real gloo processes.

The truth is a plain Decoder in this process: logits, torch's cross_entropy, torch's clip_grad_norm_, torch's AdamW.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor
from torch.distributed.tensor import DTensor

import model.moe
from jobs.config import OptimizerSection
from jobs.optimizer import build_optimizer
from model import Decoder, ModelConfig, initialise
from model.grouped import grouped_linear, grouped_mm_linear
from model.moe import MoE, updated_bias
from parallel.gradients import MicroBatch, accumulate_gradients, clip_gradients, update_routing_bias
from parallel.layout import Layout
from parallel.shard import build_decoder, initialise_shards

STEPS, BATCH, TOKENS, SEED = 5, 8, 16, 3
MAX_NORM = 0.5
OPTIMIZER = OptimizerSection(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
NARROW: dict[str, Any] = {"n_layers": 3, "d_model": 32, "vocab_size": 64, "attention": HEADS, "ffn": {"width": 48}}
# A wide initialisation, so that routing and attention are far from uniform.
NARROW |= {"init": {"std": 0.2}}

MODELS = {
    "dense": ModelConfig.preset("minimind-3", **NARROW),
    "dense-untied": ModelConfig.preset("demo-dense", **{**NARROW, "attention": {**HEADS, "qk_norm": None}}, tied_embeddings=False),
    "moe-deepseek": ModelConfig.preset(
        "demo-moe",
        **NARROW,
        moe={"n_experts": 8, "top_k": 3, "expert_width": 16, "balance_loss": 0.1, "bias_update_rate": 0.05},
    ),
    "moe-softmax": ModelConfig.preset(
        "minimind-3-moe", **NARROW, moe={"n_experts": 4, "top_k": 2, "expert_width": 24, "balance_loss": 0.1}
    ),
}
IDLE_EXPERT = 1

LAYOUTS = [
    Layout(dp_shard=2),
    Layout(dp_replicate=2, dp_shard=1),
    Layout(dp_shard=1, tp=2),
    Layout(dp_replicate=2, dp_shard=2),
    Layout(dp_shard=2, tp=2),
    Layout(dp_shard=2, ep=2),
    Layout(dp_shard=4, ep=2),
    Layout(dp_shard=1, tp=2, ep=2),
    Layout(dp_replicate=2, dp_shard=2, ep=2),
    Layout(dp_shard=2, tp=2, ep=4),
    Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2),
]


def global_batch(step: int) -> dict[str, Tensor]:
    """Packed documents of uneven length, with very different numbers of targets on the lanes, and padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(64, (BATCH, TOKENS), generator=generator)
    targets = torch.randint(64, (BATCH, TOKENS), generator=generator)
    documents, positions = torch.zeros_like(tokens), torch.arange(TOKENS).repeat(BATCH, 1)
    for lane in range(BATCH):
        edge = 2 + lane
        documents[lane, edge:] = 1
        positions[lane, edge:] = torch.arange(TOKENS - edge)
        targets[lane, : lane * 2] = -100
    documents[0, -3:], targets[0, -3:] = -1, -100
    return {"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions, "documents_BT": documents}


def starve(decoder: torch.nn.Module) -> None:
    """One expert that no token ever chooses."""
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.router.bias_E[IDLE_EXPERT] = -1e3


def truth(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    decoder = Decoder(config).to(dtype)
    initialise(decoder, SEED)
    starve(decoder)
    matrices, vectors = ([p for p in decoder.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        inputs = {name: batch[name] for name in ("tokens_BT", "positions_BT", "documents_BT")}
        logits = decoder(**inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets_BT"].flatten(), ignore_index=-100)
        losses.append(loss.item())
        if config.moe:
            for module in decoder.modules():
                if isinstance(module, MoE):
                    module.tokens_E.zero_()
            loss = loss + decoder.loss(**inputs, targets_BT=batch["targets_BT"]).auxiliary / BATCH
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in decoder.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), MAX_NORM).item())
        optimizer.step()
        for module in decoder.modules():
            if isinstance(module, MoE):
                assert module.tokens_E[IDLE_EXPERT] == 0
                assert module.tokens_E.sum() == (BATCH * TOKENS - 3) * config.moe.top_k
                bias = updated_bias(module.router.bias_E, module.tokens_E, module.moe.bias_update_rate)
                module.router.bias_E.copy_(bias)
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": state(decoder)}


def state(decoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor.detach()) for name, tensor in decoder.state_dict().items()}


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def spread(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> dict[str, Any] | None:
    """The same steps on this rank's share of the lanes, in micro-batches of one and two.

    In fp32 the experts use the grouped kernel that GPUs use, in fp64, which it lacks, the loop over experts.
    """
    model.moe.grouped_linear = grouped_mm_linear if dtype == torch.float32 else grouped_linear
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=dtype, compute_dtype=compute_dtype or dtype)
    initialise_shards(decoder, SEED)
    starve(decoder)
    optimizer = build_optimizer(decoder, OPTIMIZER)
    lanes = BATCH // layout.dp
    first = layout.dp_rank(dist.get_rank()) * lanes
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        cuts = [slice(first, first + 1), slice(first + 1, first + lanes)][: 1 + (lanes > 1)]
        micro_batches = [MicroBatch.of(*(x[cut] for x in batch.values()), torch.device("cpu")) for cut in cuts]
        optimizer.zero_grad()
        losses.append(accumulate_gradients(decoder, micro_batches, layout.tp).cross_entropy)
        gradients = gradients or {name: full(p.grad) for name, p in decoder.named_parameters()}
        norms.append(clip_gradients(decoder.parameters(), MAX_NORM))
        optimizer.step()
        update_routing_bias(decoder)
    weights = state(decoder)
    if dist.get_rank():
        return None
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def cases() -> list[Any]:
    found = []
    for name, config in MODELS.items():
        for layout in LAYOUTS:
            if layout.ep > 1 and (not config.n_experts or config.n_experts % layout.ep):
                continue
            for dtype in (torch.float64, torch.float32):
                found.append(pytest.param(name, layout, dtype, id=f"{name}, {layout}, {str(dtype)[6:]}"))
    return found


TRUTHS: dict[tuple[str, torch.dtype], dict[str, Any]] = {}


@pytest.mark.parametrize(("name", "layout", "dtype"), cases())
def test_layout_computes_what_one_process_computes(pool: Pool, name: str, layout: Layout, dtype: torch.dtype) -> None:
    if (name, dtype) not in TRUTHS:
        TRUTHS[name, dtype] = truth(MODELS[name], dtype)
    expected = TRUTHS[name, dtype]
    found = pool.run(spread, layout.world_size, MODELS[name], layout, dtype)[0]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert expected["norms"][0] > MAX_NORM, "clipping must bite"
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=0)
    for key in ("gradients", "weights"):
        assert found[key].keys() == expected[key].keys()
        for weight, value in expected[key].items():
            torch.testing.assert_close(
                found[key][weight], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=weight: f"{n}: {m}"
            )


@pytest.mark.parametrize("layout", [Layout(dp_shard=4, ep=2), Layout(dp_shard=2, tp=2, ep=4)], ids=str)
def test_bf16_products_keep_fp32_weights_and_stay_near_fp32(pool: Pool, layout: Layout) -> None:
    config = MODELS["moe-deepseek"]
    expected = truth(config, torch.float32)
    found = pool.run(spread, layout.world_size, config, layout, torch.float32, torch.bfloat16)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)
    for gradient in found["gradients"].values():
        assert gradient.dtype == torch.float32


def gradients_between_micro_batches(config: ModelConfig, layout: Layout) -> bool:
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32)
    initialise_shards(decoder, SEED)
    tensors = [x[:1] for x in global_batch(0).values()]
    micro_batches = [MicroBatch.of(*tensors, torch.device("cpu")) for _ in range(2)]
    held_early = []

    class Watched(list[MicroBatch]):
        def __iter__(self) -> Any:
            for number, batch in enumerate(list.__iter__(self)):
                if number:
                    held_early.append(all(p.grad is not None for p in decoder.parameters()))
                yield batch

    watched = Watched(micro_batches)
    accumulate_gradients(decoder, watched, layout.tp)
    return held_early[-1]


def test_accumulation_keeps_only_shards_of_the_gradient(pool: Pool) -> None:
    """Between micro-batches every sharded parameter has its (sharded) gradient: nothing waits unsharded."""
    assert all(pool.run(gradients_between_micro_batches, 2, MODELS["moe-softmax"], Layout(dp_shard=2)))
