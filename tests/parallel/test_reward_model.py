"""Law 1 for reward models: scores, losses and gradients on every layout are those of answers scored one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import EP, FSDP, MODELS, TP, TP_4, TP_EP, TP_FSDP
from law1 import MAX_NORM, OPTIMIZER, SEED, full, plain_adamw, starve, state
from pairs import LENGTHS, answers, packed
from pool import Pool
from torch import Tensor

from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import Decoder, ModelConfig, initialise
from moray.model.alignment.reward_model import RewardModel, bradley_terry
from moray.model.tensors import tensor_shapes, whole
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.checkpoint.weights import CommitWeights
from moray.parallel.exact import GradientTree
from moray.parallel.gradients import accumulate_gradients, clip_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards

CENTRING = 0.3
CONFIGS = {name: MODELS[name].but(head="scalar") for name in ("dense", "moe-deepseek")}
EVERYTHING = Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2)


def margins(lane: int, n_pairs: int) -> Tensor:
    return 0.5 * lane + 0.1 * torch.arange(n_pairs).double()


def truth(config: ModelConfig) -> dict[str, Any]:
    decoder = Decoder(config).double()
    initialise(decoder, SEED)
    starve(decoder)
    scores = [
        torch.stack([torch.stack([decoder.values(tokens_T[None])[0, -1] for tokens_T in pair]) for pair in lane])
        for lane in answers()
    ]
    losses = [bradley_terry(x_P2, margins(lane, len(x_P2))) for lane, x_P2 in enumerate(scores)]
    all_P2 = torch.cat(scores)
    loss, centring = torch.cat(losses).mean(), CENTRING * all_P2.sum(1).square().mean()
    (loss + centring).backward()
    gradients = {name: weight.grad.clone() for name, weight in decoder.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), MAX_NORM).item()
    plain_adamw(decoder).step()
    apart_P = (all_P2[:, 0] - all_P2[:, 1]).detach()
    values = (loss, centring, (apart_P > 0).double().mean(), apart_P.mean(), *all_P2.mean(0))
    return {
        "scores": all_P2.detach(),
        "values": dict(zip(RewardModel.names, [value.item() for value in values], strict=True)),
        "gradients": gradients,
        "norm": norm,
        "weights": state(decoder),
    }


def spread(config: ModelConfig, layout: Layout, stage: Stage, exact: bool, folder: Path) -> dict[str, Any]:
    """A step, of a lane, which is two rows, a micro-batch; the lanes have one to three pairs. It is committed."""
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float64, compute_dtype=torch.float64, stage=stage)
    initialise_shards(decoder, SEED)
    starve(decoder)
    optimizer = build_optimizer(decoder, OPTIMIZER, fused=not exact, copy=meshes.copy, dtype=torch.float64)
    reduction = GradientTree(decoder, meshes) if exact else Reduction(decoder, meshes, stage)
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), len(answers()), 1 if exact else None)
    pieces = [packed([answers()[lane]], margins(lane, len(LENGTHS[lane]))) for lane in lanes]
    with torch.no_grad():
        p = packed(answers())
        scores = decoder.values(p.tokens_BT, p.positions_BT, p.documents).flatten()[p.ends_P2]
    found = accumulate_gradients(decoder, pieces, reduction, objective=RewardModel(CENTRING))
    gradients = {name: full(weight.grad) for name, weight in decoder.named_parameters()}
    norm = clip_gradients(decoder.parameters(), MAX_NORM, exact=exact)
    optimizer.step()
    commits = Checkpointer(folder, keep=1, keep_every=None, on_event=lambda name, fields: None)
    commits.save(1, training_state(decoder, optimizer), {})
    commits.finish()
    weights = state(decoder)
    return {"scores": scores, "values": found.values, "gradients": gradients, "norm": norm, "weights": weights}


TRUTHS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(
    ("name", "layout", "stage", "exact"),
    [
        ("dense", FSDP, 3, False),
        ("dense", FSDP, 3, True),
        ("dense", Layout(dp_replicate=2, dp_shard=1), 1, False),
        ("dense", TP, 3, False),
        ("dense", TP_4, 3, False),
        ("dense", Layout(dp_shard=2, tp=2), 1, False),
        ("moe-deepseek", EP, 3, False),
        ("moe-deepseek", TP_EP, 3, False),
        ("moe-deepseek", TP_FSDP, 3, False),
        ("moe-deepseek", EVERYTHING, 3, False),
        ("moe-deepseek", Layout(dp_shard=4, ep=2), 1, False),
    ],
    ids=str,
)
def test_layout_computes_what_one_process_computes(
    pool: Pool, name: str, layout: Layout, stage: Stage, exact: bool, tmp_path: Path
) -> None:
    if name not in TRUTHS:
        TRUTHS[name] = truth(CONFIGS[name])
    expected = TRUTHS[name]
    for found in pool.run(spread, layout.world_size, CONFIGS[name], layout, stage, exact, tmp_path):
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-10, atol=1e-10)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-10)
        assert expected["norm"] > MAX_NORM, "clipping must bite"
        for kind in ("gradients", "weights"):
            assert found[kind].keys() == expected[kind].keys()
            for weight, value in expected[kind].items():
                torch.testing.assert_close(
                    found[kind][weight], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=weight: f"{n}: {m}"
                )
    (commit,) = list_commits(tmp_path)
    read = CommitWeights(commit).read
    for weight, shape in tensor_shapes(CONFIGS[name]).items():
        torch.testing.assert_close(read(weight, whole(shape)), expected["weights"][weight], rtol=1e-10, atol=1e-10)
