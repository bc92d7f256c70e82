"""Law 1 for adapters: every layout computes what one process computes with matrices W + (alpha / rank) B A.

The truth is a plain Decoder that knows of no adapter: torch.func gives it the sums for weights, autograd finds the
gradients of A and B through them, and torch's AdamW moves these.
"""

import re
from typing import Any

import pytest
import torch
from architectures import BIAS, MODELS, PIECES
from law1 import (
    CPU,
    MAX_NORM,
    SEED,
    STEPS,
    check,
    drawn_adapter,
    full,
    global_batch,
    spread,
    starve,
)
from pool import Pool
from torch import Tensor, nn
from torch.func import functional_call

from moray.model import Decoder, ModelConfig, initialise
from moray.model.lora import LoRA, adapter_shapes, targets_in
from moray.model.recompute import Recompute
from moray.parallel.layout import Layout
from moray.parallel.reduction import Stage
from moray.parallel.shard import build_decoder, initialise_shards

EP, TP_EP = Layout(dp_shard=2, ep=2), Layout(dp_shard=1, tp=2, ep=2)
ALL = Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2)


def lora_of(config: ModelConfig, *targets: Any) -> LoRA:
    return LoRA(rank=8, alpha=12.0, targets=targets or targets_in(config))


class LossOf(nn.Module):
    """A decoder whose forward pass is its loss, as functional_call wants it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs: Tensor) -> Any:
        return self.decoder.loss(*inputs)


def matrix_of(name: str, weights: dict[str, Tensor]) -> str:
    """The one matrix that an adapter's B belongs to."""
    stem = re.escape(name.removesuffix("lora_b"))
    (found,) = (weight for weight in weights if re.fullmatch(stem + "(weight|E[DF]{2})", weight))
    return found


def summed(config: ModelConfig, lora: LoRA, dtype: torch.dtype) -> dict[str, Any]:
    """As `law1.truth`, of a base that stays as it is."""
    decoder = Decoder(config).to(dtype)
    initialise(decoder, SEED)
    starve(decoder)
    base = dict(decoder.requires_grad_(False).named_parameters())
    shapes = adapter_shapes(config, lora)
    adapters = {name: nn.Parameter(drawn_adapter(name, shape).to(dtype)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        sums = {
            f"decoder.{(matrix := matrix_of(name, base))}": base[matrix]
            + lora.alpha / lora.rank * torch.matmul(b, adapters[name.removesuffix("b") + "a"])
            for name, b in adapters.items()
            if name.endswith("lora_b")
        }
        assert 2 * len(sums) == len(adapters) > 0
        inputs = [batch[f"{name}_BT"] for name in ("tokens", "targets", "positions", "documents")]
        found = functional_call(LossOf(decoder), sums, tuple(inputs))
        count = (batch["targets_BT"] != -100).sum()
        losses.append(found.cross_entropy.item() / count.item())
        optimizer.zero_grad()
        ((found.cross_entropy + found.z) / count).backward()
        gradients = gradients or {
            name: weight.grad.clone() for name, weight in adapters.items() if weight.grad is not None
        }
        norms.append(torch.nn.utils.clip_grad_norm_(adapters.values(), MAX_NORM).item())
        optimizer.step()
    weights = decoder.state_dict() | {name: weight.detach() for name, weight in adapters.items()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def base_is_untouched(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        weight = found["weights"][name]
        assert "lora" in name or torch.equal(weight, value.to(weight.dtype)), name


LAYOUTS = [
    (Layout(dp_shard=1), 3),
    (Layout(dp_shard=2), 3),
    (Layout(dp_shard=2), 1),
    (Layout(dp_replicate=2, dp_shard=1), 1),
    (Layout(dp_replicate=2, dp_shard=2), 3),
    (Layout(dp_shard=1, tp=2), 3),
    (Layout(dp_shard=2, tp=2), 1),
    (EP, 3),
    (EP, 1),
    (TP_EP, 3),
    (Layout(dp_shard=2, ep=2, dispatcher="allgather"), 3),
    (Layout(dp_shard=4, ep=4, ep_nodes=2), 3),
    (ALL, 3),
    (ALL, 1),
]
CASES = [("moe-deepseek", layout, stage) for layout, stage in LAYOUTS] + [
    ("dense", Layout(dp_replicate=2, dp_shard=2), 3),
    ("dense", Layout(dp_shard=1, tp=4), 3),
    ("dense-untied", Layout(dp_shard=2, tp=2), 3),
    ("moe-softmax", EP, 3),
]


def test_the_kernels_of_fp32_compute_it_too(pool: Pool) -> None:
    config = MODELS["moe-deepseek"]
    found = pool.run(spread, 2, config, EP, torch.float32, None, CPU, 3, "none", None, lora_of(config))[0]
    check(found, summed(config, lora_of(config), torch.float32), torch.float32)


TRUTHS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(("name", "layout", "stage"), CASES, ids=str)
def test_layout_computes_what_one_process_computes(pool: Pool, name: str, layout: Layout, stage: Stage) -> None:
    config = MODELS[name]
    if name not in TRUTHS:
        TRUTHS[name] = summed(config, lora_of(config), torch.float64)
    found = pool.run(
        spread, layout.world_size, config, layout, torch.float64, None, CPU, stage, "none", None, lora_of(config)
    )[0]
    check(found, TRUTHS[name], torch.float64)
    base_is_untouched(found, TRUTHS[name])


@pytest.mark.parametrize(
    ("piece", "layout"),
    [
        ("latent attention", Layout(dp_shard=1, tp=2)),
        ("latent attention without query rank", Layout(dp_shard=1, tp=2)),
        ("multi-query", Layout(dp_shard=1, tp=4)),
        ("GPT: biases, learned positions, LayerNorm, z-loss", Layout(dp_shard=1, tp=2)),
        ("GPT: biases, learned positions, LayerNorm, z-loss", Layout(dp_shard=2)),
        ("capacity by gate, expert biases, every second layer", Layout(dp_shard=2, tp=2, ep=2)),
    ],
    ids=str,
)
def test_pieces_of_models(pool: Pool, piece: str, layout: Layout) -> None:
    config, _ = PIECES[piece]
    lora = lora_of(config)
    found = pool.run(spread, layout.world_size, config, layout, torch.float64, None, CPU, 3, "none", None, lora)[0]
    check(found, summed(config, lora, torch.float64), torch.float64)


@pytest.mark.parametrize("target", ["attention", "dense", "experts", "shared"])
def test_each_kind_of_matrix_alone(pool: Pool, target: str) -> None:
    """Layers before the first adapter have nothing that learns, and exchange nothing backward."""
    config = MODELS["moe-deepseek"]
    lora = lora_of(config, target)
    found = pool.run(spread, 4, config, Layout(dp_shard=2, tp=2, ep=4), torch.float64, None, CPU, 3, "none", None, lora)
    check(found[0], summed(config, lora, torch.float64), torch.float64)


@pytest.mark.parametrize(
    ("stage", "recompute", "backend"),
    [
        (1, "selective", None),
        (3, "selective", None),
        (1, "full", None),
        (3, "full", None),
        (3, "none", "aot_eager"),
        (3, "full", "aot_eager"),
    ],
)
def test_recomputed_and_compiled_layers(pool: Pool, stage: Stage, recompute: Recompute, backend: str | None) -> None:
    config = MODELS["moe-deepseek"].but(moe={"capacity_factor": 1.0, "drop_by": "gate"})
    lora = lora_of(config)
    found = pool.run(spread, 2, config, TP_EP, torch.float64, None, CPU, stage, recompute, backend, lora)[0]
    check(found, summed(config, lora, torch.float64), torch.float64)


@pytest.mark.parametrize("layout", [Layout(dp_shard=4, ep=2), Layout(dp_shard=2, tp=2, ep=4)], ids=str)
def test_bf16_products_keep_fp32_adapters_and_stay_near_fp32(pool: Pool, layout: Layout) -> None:
    config = MODELS["moe-deepseek"]
    expected = summed(config, lora_of(config), torch.float32)
    found = pool.run(spread, 4, config, layout, torch.float32, torch.bfloat16, CPU, 3, "none", None, lora_of(config))[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)
    assert {gradient.dtype for gradient in found["gradients"].values()} == {torch.float32}
    base_is_untouched(found, expected)


def exactly(config: ModelConfig, layout: Layout, lora: LoRA) -> Any:
    return spread(config, layout, torch.float32, lora=lora, exact=True)


def test_exact_sums_have_the_same_bits_on_any_number_of_ranks(pool: Pool) -> None:
    config = MODELS["moe-deepseek"]
    one, *others = (
        pool.run(exactly, layout.world_size, config, layout, lora_of(config))[0]
        for layout in (Layout(dp_shard=1), Layout(dp_shard=2), Layout(dp_replicate=2, dp_shard=2))
    )
    for other in others:
        assert (other["losses"], other["norms"]) == (one["losses"], one["norms"])
        for name, value in one["weights"].items():
            assert torch.equal(other["weights"][name], value), name


def begun(config: ModelConfig, layout: Layout, lora: LoRA) -> dict[str, Tensor]:
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.float32, lora=lora)
    initialise_shards(decoder, SEED)
    return {name: full(weight.detach()) for name, weight in decoder.named_parameters() if weight.requires_grad}


def test_every_layout_starts_with_the_same_adapters(pool: Pool) -> None:
    config = MODELS["moe-deepseek"].but(moe=BIAS)
    lora = lora_of(config)
    one, many = (pool.run(begun, n, config, layout, lora)[0] for n, layout in ((1, Layout(dp_shard=1)), (8, ALL)))
    assert {name: weight.shape for name, weight in one.items()} == adapter_shapes(config, lora)
    for name, weight in one.items():
        assert torch.equal(many[name], weight), name
