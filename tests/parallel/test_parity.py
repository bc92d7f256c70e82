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
from model import Decoder, ModelConfig, initialise
from model.grouped import grouped_linear, grouped_mm_linear
from model.moe import MoE, updated_bias
from parallel.gradients import MicroBatch, accumulate_gradients, clip_gradients, update_routing_bias
from parallel.layout import Layout
from parallel.shard import build_decoder

STEPS, BATCH, TOKENS, SEED = 5, 8, 16, 3
MAX_NORM, LEARNING_RATE = 0.5, 1e-3
NARROW = {"n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
# A wide initialisation, so that routing and attention are far from uniform.
NARROW |= {"init_std": 0.2}

MODELS = {
    "dense": ModelConfig.preset("minimind-3", **NARROW),
    "dense-untied": ModelConfig.preset("demo-dense", **NARROW, tied_embeddings=False, qk_norm=False),
    "moe-deepseek": ModelConfig.preset(
        "demo-moe", **NARROW, n_experts=8, top_k=3, d_expert=16, balance_loss=0.1, bias_update_rate=0.05
    ),
    "moe-softmax": ModelConfig.preset("minimind-3-moe", **NARROW, n_experts=4, top_k=2, d_expert=24, balance_loss=0.1),
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
    initialise(decoder, config.init_std, SEED)
    starve(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        inputs = {name: batch[name] for name in ("tokens_BT", "positions_BT", "documents_BT")}
        logits = decoder(**inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets_BT"].flatten(), ignore_index=-100)
        losses.append(loss.item())
        if config.n_moe_layers:
            for module in decoder.modules():
                if isinstance(module, MoE):
                    module.tokens_E.zero_()
            balance = decoder.loss(**inputs, targets_BT=batch["targets_BT"]).balance
            loss = loss + config.balance_loss * balance / BATCH
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in decoder.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), MAX_NORM).item())
        optimizer.step()
        for module in decoder.modules():
            if isinstance(module, MoE):
                assert module.tokens_E[IDLE_EXPERT] == 0
                assert module.tokens_E.sum() == (BATCH * TOKENS - 3) * config.top_k
                bias = updated_bias(module.router.bias_E, module.tokens_E, config.bias_update_rate)
                module.router.bias_E.copy_(bias)
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": state(decoder)}


def state(decoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor.detach()) for name, tensor in decoder.state_dict().items()}


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def spread(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Any] | None:
    """The same steps on this rank's share of the lanes, in micro-batches of one and two.

    In fp32 the experts use the grouped kernel that GPUs use, in fp64, which it lacks, the loop over experts.
    """
    model.moe.grouped_linear = grouped_mm_linear if dtype == torch.float32 else grouped_linear
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=dtype, compute_dtype=dtype, seed=SEED)
    starve(decoder)
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in decoder.parameters():
        by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in by_mesh.values()], lr=LEARNING_RATE)
    lanes = BATCH // layout.dp
    first = layout.dp_rank(dist.get_rank()) * lanes
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        cuts = [slice(first, first + 1), slice(first + 1, first + lanes)][: 1 + (lanes > 1)]
        micro_batches = [MicroBatch(**{name: x[cut] for name, x in batch.items()}) for cut in cuts]
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
