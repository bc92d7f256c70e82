"""Distillation over several ranks equals one process: losses, metrics and gradients, with a teacher spread alike."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import MODELS
from law1 import BATCH, CPU, SEED, full, global_batch
from pool import Pool

from moray.model import Decoder, ModelConfig, initialise
from moray.model.alignment.distillation import Direction, Distillation
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards

STUDENT = MODELS["moe-deepseek"].but(z_loss=0.1, final_softcap=8.0)
TEACHERS: dict[Direction, ModelConfig] = {
    "forward": MODELS["dense-untied"].but(d_model=48, head_bias=True, final_softcap=5.0),
    "reverse": MODELS["moe-softmax"],
}
LAYOUTS = [
    (Layout(dp_shard=2), 3),
    (Layout(dp_shard=2), 1),
    (Layout(dp_replicate=2, dp_shard=1), 1),
    (Layout(dp_shard=1, tp=2), 3),
    (Layout(dp_shard=2, ep=2), 3),
    (Layout(dp_shard=2, tp=2), 3),
    (Layout(dp_replicate=2, dp_shard=2, ep=2), 3),
    (Layout(dp_shard=2, tp=2, ep=4), 1),
]
OPTIONS: dict[str, Any] = {"temperature": 2.0, "mix": 0.3}


def learn(decoder: Decoder, objective: Distillation, lanes: Any, size: int, reduction: Reduction | None) -> Any:
    """Losses and metrics of two steps, plain gradient descent between them, and the second one's gradients."""
    values = []
    for step in range(2):
        batch = {name: x[list(lanes)] for name, x in global_batch(step).items()}
        pieces = [MicroBatch.of(*parts, CPU) for parts in zip(*(x.split(size) for x in batch.values()), strict=True)]
        decoder.zero_grad()
        values.append(accumulate_gradients(decoder, pieces, reduction, objective=objective).values)
        if not step:
            torch.optim.SGD(decoder.parameters(), lr=0.1).step()
    return values, {name: full(weight.grad) for name, weight in decoder.named_parameters()}


def spread(layout: Layout, stage: Stage, direction: Direction, dtype: torch.dtype, products: torch.dtype) -> Any:
    meshes = layout.meshes("cpu")
    student, teacher = (
        build_decoder(config, meshes, dtype=dtype, compute_dtype=products, stage=stage)
        for config in (STUDENT, TEACHERS[direction])
    )
    initialise_shards(student, SEED)
    initialise_shards(teacher, SEED + 1)
    objective = Distillation(teacher.requires_grad_(False).eval(), direction, **OPTIONS)
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), BATCH, None)
    return learn(student, objective, lanes, 1, Reduction(student, meshes, stage))


def alone(direction: Direction, dtype: torch.dtype) -> Any:
    student, teacher = (Decoder(config).to(dtype) for config in (STUDENT, TEACHERS[direction]))
    initialise(student, SEED)
    initialise(teacher, SEED + 1)
    objective = Distillation(teacher.requires_grad_(False).eval(), direction, **OPTIONS)
    return learn(student, objective, range(BATCH), BATCH, None)


@pytest.mark.parametrize("direction", TEACHERS)
@pytest.mark.parametrize(("layout", "stage"), LAYOUTS, ids=str)
def test_a_layout_equals_one_process(pool: Pool, layout: Layout, stage: Stage, direction: Direction) -> None:
    expected, true = alone(direction, torch.float64)
    values, gradients = pool.run(spread, layout.world_size, layout, stage, direction, torch.float64, torch.float64)[0]
    for found, one in zip(values, expected, strict=True):
        assert found == pytest.approx(one, rel=1e-10)
        assert min(one[name] for name in ("kl", "z_loss", "auxiliary_loss")) > 0
    for name, gradient in true.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_bf16_products_stay_near_fp32(pool: Pool) -> None:
    layout = Layout(dp_shard=2, tp=2)
    expected, _ = alone("forward", torch.float32)
    values, _ = pool.run(spread, layout.world_size, layout, 3, "forward", torch.float32, torch.bfloat16)[0]
    assert [found["loss"] for found in values] == pytest.approx([one["loss"] for one in expected], rel=0.02)
