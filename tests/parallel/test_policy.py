"""Law 1 for policies and critics: values and gradients on every layout are those of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import MODELS
from law1 import full
from pool import Pool
from torch import Tensor

from moray.model import Decoder, ModelConfig, initialise
from moray.model.alignment.policy import Aggregation, Policy, PolicyBatch, aggregation
from moray.model.alignment.value import Value, ValueBatch
from moray.model.attention.documents import Documents
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards

CPU, VOCAB, WIDTH, LONGEST, SEED = torch.device("cpu"), 24, 24, 9, 3
MOE, DENSE = "moe-deepseek", "dense"
KINDS: list[Aggregation] = ["grpo", "dapo", "dr_grpo"]
OBJECTIVES = {
    "grpo": Policy(0.7, clip_low=0.2, clip_high=0.3, kl_coefficient=0.3),
    "dapo": Policy(0.7, "cispo", clip_high=0.1),
    "dr_grpo": Policy(0.7, kl_coefficient=0.3, kl_estimator="k1"),
}
CRITIC = Value(0.5)
LAYOUTS = [
    (MOE, "grpo", Layout(dp_shard=2)),
    (MOE, "dapo", Layout(dp_shard=4)),
    (MOE, "dr_grpo", Layout(dp_replicate=2, dp_shard=2)),
    (MOE, "grpo", Layout(dp_shard=2, ep=2)),
    (MOE, "dapo", Layout(dp_shard=4, ep=4)),
    (MOE, "dr_grpo", Layout(dp_shard=1, tp=2)),
    (MOE, "grpo", Layout(dp_shard=2, tp=2, ep=4)),
    (DENSE, "dapo", Layout(dp_shard=2)),
    (DENSE, "dr_grpo", Layout(dp_replicate=2, dp_shard=1)),
    (DENSE, "grpo", Layout(dp_shard=1, tp=4)),
    (DENSE, "dapo", Layout(dp_shard=2, tp=2)),
]
# Of each lane's samples, tokens of the prompt and of the answer; the last lane's sample is masked.
LANES = [[(3, 9), (2, 1)], [(5, 2)], [(1, 1), (2, 3), (4, 4)], [(6, 5)], [(2, 9), (3, 3)], [(1, 2)], [(4, 7)], [(9, 9)]]


def row(lane: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, positions and documents, int64 [4, T]; old and reference log-probabilities and advantages, fp64
    [3, T]; each token's weights by every aggregation [3, T].
    """
    draw = torch.Generator().manual_seed(lane)
    ids_4T = torch.tensor([[0], [-100], [0], [-1]]).repeat(1, WIDTH)
    numbers_3T, weights_3T = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
    at = 0
    for number, (asked, answered) in enumerate(LANES[lane]):
        length = asked + answered
        here, learnt = slice(at, at + length), slice(at + asked - 1, at + length - 1)
        tokens_T = torch.randint(0, VOCAB, (length,), generator=draw)
        ids_4T[0, here], ids_4T[1, learnt] = tokens_T, tokens_T[asked:]
        ids_4T[2, here], ids_4T[3, here] = torch.arange(length), number
        numbers_3T[:, learnt] = -3 + torch.randn(3, answered, generator=draw, dtype=torch.float64)
        numbers_3T[2, learnt] = (-1.0) ** number * (lane + 1)
        for i, kind in enumerate(KINDS):
            weights_3T[i, learnt] = own_count(kind, lane)[0][number]
        at += length
    return ids_4T, numbers_3T, weights_3T


def own_count(kind: Aggregation, lane: int) -> tuple[Tensor, float]:
    lengths_S = torch.tensor([answered for _, answered in LANES[lane]])
    return aggregation(kind, lengths_S, torch.full_like(lengths_S, lane + 1 < len(LANES)).bool(), LONGEST)


def pieces(kind: Aggregation, lanes: list[int]) -> tuple[PolicyBatch, ValueBatch]:
    ids_4BT, numbers_3BT, weights_3BT = (torch.stack(x, 1) for x in zip(*map(row, lanes), strict=True))
    packed: Any = (*ids_4BT[:3], Documents.of(ids_4BT[3], CPU), int((ids_4BT[1] != -100).sum()))
    weighed: Any = {
        "weights_BT": weights_3BT[KINDS.index(kind)],
        "n_own_count": sum(own_count(kind, lane)[1] for lane in lanes),
    }
    policy = PolicyBatch(
        *packed,
        **weighed,
        old_logp_BT=numbers_3BT[0],
        reference_logp_BT=numbers_3BT[1] if OBJECTIVES[kind].kl_coefficient else None,
        advantages_BT=numbers_3BT[2],
        n_samples=sum(len(LANES[lane]) for lane in lanes),
    )
    return policy, ValueBatch(*packed, **weighed, old_values_BT=numbers_3BT[0], returns_BT=numbers_3BT[2])


Found = list[tuple[dict[str, float], dict[str, Tensor]]]


def config_of(name: str, head: str) -> ModelConfig:
    return MODELS[name].but(vocab_size=VOCAB, head=head)


def both(kind: Aggregation, micro_batches: list[list[int]], policy: Any, critic: Any) -> Found:
    """Values and gradients of the policy and of the critic, each a decoder with what sums its gradients."""
    found, of_lanes = [], [pieces(kind, lanes) for lanes in micro_batches]
    for i, (objective, (decoder, reduction)) in enumerate(((OBJECTIVES[kind], policy), (CRITIC, critic))):
        micro: Any = [batches[i] for batches in of_lanes]
        values = accumulate_gradients(decoder, micro, reduction, objective=objective).values
        gradients = {n: full(w.grad) for n, w in decoder.named_parameters() if w.grad is not None}
        found.append((values, gradients))
    return found


def spread(name: str, kind: Aggregation, layout: Layout) -> Found:
    meshes, models = layout.meshes("cpu"), []
    for head in ("vocabulary", "scalar"):
        decoder = build_decoder(config_of(name, head), meshes, dtype=torch.float64, compute_dtype=torch.float64)
        initialise_shards(decoder, SEED)
        models.append((decoder, Reduction(decoder, meshes, 3)))
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), len(LANES), None)
    return both(kind, [[lane] for lane in lanes], *models)


def truth(name: str, kind: Aggregation) -> Found:
    models = []
    for head in ("vocabulary", "scalar"):
        decoder = Decoder(config_of(name, head)).double()
        initialise(decoder, SEED)
        models.append((decoder, None))
    return both(kind, [[*range(len(LANES))]], *models)


@pytest.mark.parametrize(("name", "kind", "layout"), LAYOUTS, ids=str)
def test_a_layout_equals_one_process(pool: Pool, name: str, kind: Aggregation, layout: Layout) -> None:
    """Prime-rl 1957, TRL 3021 and ms-swift 10117 (means of means), MiniMind 853 (no gradient was synchronised)."""
    expected = truth(name, kind)
    for found in pool.run(spread, layout.world_size, name, kind, layout):
        for (values, gradients), (true_values, true_gradients) in zip(found, expected, strict=True):
            assert values == pytest.approx(true_values, rel=1e-10)
            assert gradients.keys() == true_gradients.keys()
            for tensor, gradient in true_gradients.items():
                torch.testing.assert_close(gradients[tensor], gradient, rtol=1e-10, atol=1e-12, msg=tensor)
