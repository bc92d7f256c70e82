"""Where experts live: planned from loads, moved between ranks, and without any say in what is computed."""

import random
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import MODELS
from law1 import CPU, SEED, global_batch
from pool import Pool

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import Decoder, ModelConfig, initialise
from moray.model.objective import MicroBatch
from moray.model.sharded import local
from moray.parallel.gradients import accumulate_gradients, update_routing_bias
from moray.parallel.layout import Layout
from moray.parallel.placement import (
    adopt,
    busiest,
    held_by,
    moe_layers,
    move,
    packed,
    placement_of,
    planned,
    sources,
)
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards


def best_of_all(loads: list[float]) -> float:
    """The smallest largest load of two bins with as many items in each, by trying all."""
    whole, half = sum(loads), len(loads) // 2
    return min(max(part, whole - part) for chosen in combinations(loads, half) if (part := sum(chosen)) is not None)


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_close_to_the_best_there_is(seed: int) -> None:
    loads = [random.Random(seed * 100 + i).expovariate(1) for i in range(10)]
    bins = packed(loads, 2)
    assert bins.count(0) == bins.count(1) == 5
    largest = max(sum(load for load, b in zip(loads, bins, strict=True) if b == which) for which in (0, 1))
    assert largest <= 1.1 * best_of_all(loads)


def test_two_hot_neighbours_come_to_different_devices_and_the_rest_stays() -> None:
    load_E, order = [9.0, 9, 1, 1, 1, 1, 1, 1], list(range(8))
    slots = planned(load_E, order, devices=2, groups=1)
    assert sorted(slots) == order
    assert busiest(load_E, order, 2) == pytest.approx(20 / 12)
    assert busiest(load_E, slots, 2) == pytest.approx(1)
    assert sum(slot // 4 != expert // 4 for expert, slot in enumerate(slots)) <= 4, "half of them stay"
    assert planned(load_E, slots, devices=2, groups=1) == slots, "what is even is left"


@pytest.mark.parametrize(("groups", "devices"), [(8, 4), (4, 4), (2, 4), (1, 4)])
def test_groups_stay_whole(groups: int, devices: int) -> None:
    load_E = [random.Random(i).random() ** 3 for i in range(16)]
    slot_E = planned(load_E, list(range(16)), devices, groups)
    assert sorted(slot_E) == list(range(16))
    device_E = [slot // (16 // devices) for slot in slot_E]
    size = 16 // groups
    for first in range(0, 16, size):
        assert len(set(device_E[first : first + size])) == max(1, devices // groups)
    assert busiest(load_E, slot_E, devices) <= busiest(load_E, list(range(16)), devices)


def moved_and_gathered(layout: Layout, optimizer: str) -> tuple[bool, int]:
    """Whether each row of each spread tensor is where it should be, and the bytes that came."""
    meshes, config = layout.meshes("cpu"), MODELS["moe-deepseek"]
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.float32)
    initialise_shards(decoder, SEED)
    built = build_optimizer(decoder, OptimizerSection(kind=optimizer), copy=meshes.copy, dtype=torch.float32)
    state = training_state(decoder, built)
    order = list(range(config.n_experts))
    new_E = order[::-1]
    is_right, came = True, 0
    for name in moe_layers(decoder):
        for key, tensor in state.items():
            if f"{name}.experts." not in key:
                continue
            local(tensor).copy_(torch.rand_like(local(tensor)) + dist.get_rank())
            before = tensor.full_tensor()
            came += move(tensor, sources(order, new_E), held_by(tensor, meshes.copy), meshes.copy)
            is_right &= torch.equal(tensor.full_tensor(), before.flip(0))
            move(tensor, sources(new_E, order), held_by(tensor, meshes.copy), meshes.copy)
            is_right &= torch.equal(tensor.full_tensor(), before)
    return is_right, came


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2),
        Layout(dp_shard=4, ep=2),
        Layout(dp_shard=2, tp=2, ep=4),
        Layout(dp_replicate=2, dp_shard=2, ep=2),
    ],
    ids=str,
)
def test_weights_and_moments_move_and_come_back_to_the_last_bit(pool: Pool, layout: Layout, optimizer: str) -> None:
    for is_right, came in pool.run(moved_and_gathered, layout.world_size, layout, optimizer):
        assert is_right
        assert came > 0


def test_on_one_device_a_placement_changes_no_bit() -> None:
    """Of outputs, gradients of tokens, routing; weights' gradients are those of the same experts."""
    config = MODELS["moe-deepseek"]
    plain, placed = (Decoder(config) for _ in range(2))
    for decoder in (plain, placed):
        initialise(decoder, SEED)
    slots = torch.randperm(config.n_experts, generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        for layer in moe_layers(placed).values():
            for weight in layer.experts.parameters():
                weight.copy_(weight[sources(list(range(len(slots))), slots)])
    adopt(placed, dict.fromkeys(moe_layers(placed), slots))
    assert placement_of(placed) == dict.fromkeys(moe_layers(placed), slots)
    batch = MicroBatch.of(*global_batch(0).values(), CPU)
    losses = [accumulate_gradients(decoder, [batch]) for decoder in (plain, placed)]
    assert torch.equal(losses[0].own_MX, losses[1].own_MX)
    gradients = [dict(decoder.named_parameters()) for decoder in (plain, placed)]
    for name, weight in gradients[0].items():
        other = gradients[1][name].grad
        assert other is not None
        assert weight.grad is not None
        assert torch.equal(weight.grad, other[slots] if ".experts." in name else other), name
    loads = [update_routing_bias(decoder) for decoder in (plain, placed)]
    assert loads[0] is not None
    assert loads[1] is not None
    assert torch.equal(loads[0].tokens_LE, loads[1].tokens_LE), "counts are those of experts, wherever they are"


def steps(config: ModelConfig, layout: Layout, moves: bool) -> dict[str, Any]:
    """Losses of four steps, experts being moved after the second one; and what devices had to do in the last."""
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float64, compute_dtype=torch.float64)
    initialise_shards(decoder, SEED)
    reduction = Reduction(decoder, meshes, 3)
    optimizer = build_optimizer(decoder, OptimizerSection(), copy=meshes.copy, dtype=torch.float64)
    lanes, losses, load = layout.lanes(layout.dp_rank(dist.get_rank()), 8), [], None
    for step in range(4):
        batch = MicroBatch.of(*(x[lanes] for x in global_batch(step).values()), CPU)
        losses.append(accumulate_gradients(decoder, [batch], reduction).loss)
        optimizer.step()
        optimizer.zero_grad()
        load = update_routing_bias(decoder)
        if step == 1 and moves:
            order, new_E = list(range(config.n_experts)), [*range(1, config.n_experts), 0]
            for name in moe_layers(decoder):
                for key, tensor in training_state(decoder, optimizer).items():
                    if f"{name}.experts." in key:
                        move(tensor, sources(order, new_E), held_by(tensor, meshes.copy), meshes.copy)
            adopt(decoder, dict.fromkeys(moe_layers(decoder), new_E))
    assert load
    return {"losses": losses, "devices": load.devices_LP, "tokens": load.tokens_LE}


def test_under_expert_parallelism_it_changes_nothing_but_rounding(pool: Pool) -> None:
    config, layout = MODELS["moe-deepseek"].but(moe={"capacity_factor": None}), Layout(dp_shard=2, ep=2)
    plain, placed = (pool.run(steps, 2, config, layout, moves)[0] for moves in (False, True))
    assert placed["losses"] == pytest.approx(plain["losses"], rel=1e-12)
    assert torch.equal(placed["tokens"], plain["tokens"])
    held = config.n_experts // 2
    assert placed["devices"][0].tolist() == [
        plain["tokens"][0, [*range(held - 1), config.n_experts - 1]].sum(),
        plain["tokens"][0, held - 1 : -1].sum(),
    ]
