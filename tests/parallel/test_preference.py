"""Preferences over several ranks equal one process, and begin at ln 2 on every layout."""

import math

import pytest
import torch
import torch.distributed as dist
from answered import lane, random_pairs
from architectures import MODELS
from law1 import full
from pool import Pool

from moray.model import Decoder, ModelConfig, initialise
from moray.model.alignment.pairs import PairBatch
from moray.model.alignment.preference import Preference
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards, load_shards

CPU = torch.device("cpu")
MOE, DENSE = "moe-deepseek", "dense"
SEEDS = {"policy": 3, "reference": 4}
LAYOUTS = [
    (MOE, Layout(dp_shard=2)),
    (MOE, Layout(dp_shard=4)),
    (MOE, Layout(dp_replicate=2, dp_shard=2)),
    (MOE, Layout(dp_shard=2, ep=2)),
    (MOE, Layout(dp_shard=4, ep=4)),
    (MOE, Layout(dp_shard=1, tp=2)),
    (MOE, Layout(dp_shard=2, tp=2, ep=4)),
    (DENSE, Layout(dp_shard=2)),
    (DENSE, Layout(dp_replicate=2, dp_shard=1)),
    (DENSE, Layout(dp_shard=1, tp=4)),
    (DENSE, Layout(dp_shard=2, tp=2)),
]
PAIRS = random_pairs(13)
LANES = [PAIRS[0:3], PAIRS[3:4], PAIRS[4:8], [], PAIRS[8:9], PAIRS[9:10], PAIRS[10:12], PAIRS[12:13]]
"""Of one pair to four, and one lane without."""


def micro_batches(lanes: list[int], size: int) -> list[PairBatch]:
    rows = torch.stack([lane(LANES[number]) for number in lanes], dim=1)
    return [PairBatch.of_lanes(*part, CPU) for part in zip(*(x.split(size) for x in rows), strict=True)]


def config_of(name: str) -> ModelConfig:
    return MODELS[name].but(vocab_size=24)


def weights_of(name: str, seed: int) -> Decoder:
    decoder = Decoder(config_of(name)).double()
    initialise(decoder, seed)
    return decoder


def spread(name: str, layout: Layout, kind: str) -> tuple[dict[str, float], dict[str, torch.Tensor], float]:
    """Values and gradients of a step, and the loss where the reference is the policy itself."""
    meshes = layout.meshes("cpu")
    fp64 = {"dtype": torch.float64, "compute_dtype": torch.float64}
    policy, reference, same = (build_decoder(config_of(name), meshes, **fp64, frozen=i > 0) for i in range(3))
    initialise_shards(policy, SEEDS["policy"])
    for decoder, seed in ((reference, SEEDS["reference"]), (same, SEEDS["policy"])):
        whole = weights_of(name, seed).state_dict()
        load_shards(decoder.eval(), lambda tensor, box, whole=whole: whole[tensor][box])
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), len(LANES), None)
    reduction = Reduction(policy, meshes, 3)
    pieces = micro_batches(lanes, 1)
    start = accumulate_gradients(policy, pieces, reduction, objective=Preference(same, beta=0.3)).values
    assert start["accuracy"] == start["margin"] == start["kl"] == 0
    policy.zero_grad()
    objective = Preference(reference, kind, beta=0.3)  # type: ignore[arg-type]
    found = accumulate_gradients(policy, pieces, reduction, objective=objective)
    assert not any(weight.grad is not None for weight in reference.parameters())
    gradients = {name: full(weight.grad) for name, weight in policy.named_parameters() if weight.grad is not None}
    return found.values, gradients, start["loss"]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_a_layout_equals_one_process(pool: Pool, name: str, layout: Layout) -> None:
    """Prime-rl 1957, TRL 3021, MiniMind 853 (no gradient was synchronised), NeMo-Aligner 227 (policy and reference
    differed under tensor parallelism).
    """
    kind = "ipo" if layout.dp_replicate > 1 else "dpo"
    alone = weights_of(name, SEEDS["policy"])
    reference = weights_of(name, SEEDS["reference"]).requires_grad_(False).eval()
    truth = accumulate_gradients(
        alone,
        micro_batches([*range(len(LANES))], len(LANES)),
        objective=Preference(reference, kind, beta=0.3),  # type: ignore[arg-type]
    )
    values, gradients, start = pool.run(spread, layout.world_size, name, layout, kind)[0]
    assert start == pytest.approx(math.log(2), rel=4e-16)
    assert values == pytest.approx(truth.values, rel=1e-10)
    for tensor, weight in alone.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[tensor], weight.grad, rtol=1e-10, atol=1e-12, msg=tensor)
