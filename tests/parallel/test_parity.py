"""Law 1: every layout computes what one process computes, over real gloo processes."""

import warnings
from typing import Any

import pytest
import torch
from architectures import MODELS
from law1 import CPU, SEED, check, global_batch, spread, truth
from pool import Pool

from moray.model import ModelConfig
from moray.model.objective import MicroBatch
from moray.model.recompute import Recompute
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards

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
    Layout(dp_shard=2, ep=2, dispatcher="allgather"),
    Layout(dp_shard=4, ep=4, ep_nodes=2),
    Layout(dp_shard=2, tp=2, ep=4, ep_nodes=2, dispatcher="allgather"),
    Layout(dp_shard=2, tp=2, ep=4),
    Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2),
]


def cases() -> list[Any]:
    """Every layout with the model that has everything, in fp64 and with the kernels of fp32; the others in fp64."""
    found = []
    for name, config in MODELS.items():
        has_all = name == "moe-deepseek"
        for layout in LAYOUTS:
            if (layout.ep > 1 and not config.n_experts) or (layout.world_size > 4 and not has_all):
                continue
            kinds: list[tuple[torch.dtype, Stage]] = [(torch.float64, 3)]
            if has_all:
                kinds += [(torch.float64, 1), (torch.float32, 3)]
            elif layout == Layout(dp_replicate=2, dp_shard=1):
                kinds = [(torch.float64, 1)]  # the model is whole on every rank
            for dtype, stage in kinds:
                label = f"{name}, {layout}, {str(dtype)[6:]}, stage {stage}"
                found.append(pytest.param(name, layout, dtype, stage, id=label))
    return found


TRUTHS: dict[tuple[str, torch.dtype], dict[str, Any]] = {}


@pytest.mark.parametrize(("name", "layout", "dtype", "stage"), cases())
def test_layout_computes_what_one_process_computes(
    pool: Pool, name: str, layout: Layout, dtype: torch.dtype, stage: Stage
) -> None:
    if (name, dtype) not in TRUTHS:
        TRUTHS[name, dtype] = truth(MODELS[name], dtype)
    expected = TRUTHS[name, dtype]
    found = pool.run(spread, layout.world_size, MODELS[name], layout, dtype, None, CPU, stage)[0]
    check(found, expected, dtype)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp_replicate=2, dp_shard=1), Layout(dp_shard=2, ep=2), Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2)],
    ids=str,
)
def test_what_is_computed_again_is_what_one_process_computes(
    pool: Pool, layout: Layout, stage: Stage, recompute: Recompute
) -> None:
    """Dropped assignments, routing groups of two sequences, norms over all heads: what must be as it was before."""
    config = MODELS["moe-deepseek"].but(
        attention={"qk_norm": "full"}, moe={"capacity_factor": 1.0, "drop_by": "gate", "group_size": 2}
    )
    found = pool.run(spread, layout.world_size, config, layout, torch.float64, None, CPU, stage, recompute)[0]
    check(found, truth(config, torch.float64), torch.float64)


@pytest.mark.parametrize(
    ("layout", "stage", "recompute"),
    [
        (Layout(dp_shard=2, ep=2), 1, "none"),
        (Layout(dp_shard=2, ep=2), 3, "full"),
        (Layout(dp_shard=1, tp=2, ep=2), 3, "none"),
    ],
    ids=str,
)
def test_compiled_layers_compute_what_one_process_computes(
    pool: Pool, layout: Layout, stage: Stage, recompute: Recompute
) -> None:
    """As graphs, which torch runs as they are: what is cut where, and counted once. What inductor makes of graphs is
    tested on one process.
    """
    config = MODELS["moe-deepseek"].but(
        attention={"qk_norm": "full"}, moe={"capacity_factor": 1.0, "drop_by": "gate", "group_size": 2}
    )
    found = pool.run(
        spread, layout.world_size, config, layout, torch.float64, None, CPU, stage, recompute, "aot_eager"
    )[0]
    check(found, truth(config, torch.float64), torch.float64)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("layout", [Layout(dp_shard=4, ep=2), Layout(dp_shard=2, tp=2, ep=4)], ids=str)
def test_bf16_products_keep_fp32_weights_and_stay_near_fp32(pool: Pool, layout: Layout, stage: Stage) -> None:
    config = MODELS["moe-deepseek"]
    expected = truth(config, torch.float32)
    found = pool.run(spread, layout.world_size, config, layout, torch.float32, torch.bfloat16, CPU, stage)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)
    for gradient in found["gradients"].values():
        assert gradient.dtype == torch.float32


def warnings_of_a_step(config: ModelConfig, layout: Layout) -> list[str]:
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.bfloat16)
    initialise_shards(decoder, SEED)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        batches = [MicroBatch.of(*global_batch(0).values(), torch.device("cpu"))]
        accumulate_gradients(decoder, batches, Reduction(decoder, meshes, 3))
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("layout", [Layout(dp_shard=1), Layout(dp_shard=2), Layout(dp_shard=1, tp=2)], ids=str)
def test_a_step_in_bf16_warns_of_nothing(pool: Pool, layout: Layout) -> None:
    config = MODELS["moe-deepseek"].but(moe={"router_z_loss": 0.1, "importance_loss": 0.1})
    assert pool.run(warnings_of_a_step, layout.world_size, config, layout)[0] == []


def gradients_between_micro_batches(config: ModelConfig, layout: Layout) -> bool:
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.float32)
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
    accumulate_gradients(decoder, watched, Reduction(decoder, meshes, 3))
    return held_early[-1]


def test_accumulation_keeps_only_shards_of_the_gradient(pool: Pool) -> None:
    """Between micro-batches every sharded parameter has its (sharded) gradient: nothing waits unsharded."""
    assert all(pool.run(gradients_between_micro_batches, 2, MODELS["moe-softmax"], Layout(dp_shard=2)))
