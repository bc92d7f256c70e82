"""AdamW as built here against torch's plain AdamW, and the promise that norms do not decay."""

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from law1 import BATCH, global_batch
from pool import Pool
from torch import Tensor, nn

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import (
    build_optimizer,
    older_names,
    set_learning_rate,
    share_step,
    training_state,
)
from moray.model import Decoder, ModelConfig, initialise
from moray.model.objective import MicroBatch
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import list_commits, read_tensors
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards

CONFIG = ModelConfig.preset(
    "demo-moe",
    n_layers=2,
    d_model=32,
    vocab_size=64,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    ffn={"width": 48},
    moe={"expert_width": 16},
    init={"std": 0.1},
)


def decoder() -> Decoder:
    module = Decoder(CONFIG)
    initialise(module, seed=0)
    return module


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_five_steps_equal_torchs_adamw() -> None:
    module = decoder()
    twin = copy.deepcopy(module)
    settings = OptimizerSection(lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    ours = build_optimizer(module, settings)
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.2},
            {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=False,
        foreach=False,
    )
    for step in range(5):
        set_learning_rate(ours, 1e-3 * (step + 1))
        set_learning_rate(theirs, 1e-3 * (step + 1))
        for each, optimizer in ((module, ours), (twin, theirs)):
            give_gradients(each, seed=step)
            optimizer.step()
    for (name, mine), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7, msg=name)


def test_only_matrices_decay() -> None:
    """With gradients of zero, Adam moves nothing: what is left is the decay, a factor of 1 - lr * weight_decay."""
    module = decoder()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(module, OptimizerSection(lr=0.5, weight_decay=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_the_state_exists_before_the_first_step_and_holds_all_a_commit_needs() -> None:
    module = decoder()
    state = training_state(module, build_optimizer(module, OptimizerSection()))
    names = dict(module.named_parameters())
    for name, parameter in names.items():
        assert state[f"model.{name}"].data_ptr() == parameter.data_ptr(), "not a copy: loading fills it in place"
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[f"optimizer.{name}.{key}"].shape == parameter.shape
    assert [name for name in state if name.endswith("step")] == ["optimizer.step"]
    assert "model.blocks.1.ffn.router.bias_E" in state
    assert not any("tokens_E" in name for name in state), "counts of a step begun belong to no commit"


def test_a_tied_head_is_the_embedding_and_an_untied_one_itself() -> None:
    for is_tied in (True, False):
        module = Decoder(CONFIG.but(tied_embeddings=is_tied))
        state = training_state(module, build_optimizer(module, OptimizerSection()))
        heads = {"model.head.weight", *(f"optimizer.head.weight.{key}" for key in ("exp_avg", "exp_avg_sq"))}
        assert heads & state.keys() == (set() if is_tied else heads)
        assert "model.embedding.weight" in state


def taken_up(folder: Path, layout: Layout, until: int, kind: Literal["adamw", "muon"]) -> None:
    """Goes on from the newest commit, if there is one, to step `until`, and commits it."""
    meshes = layout.meshes("cpu")
    decoder = build_decoder(CONFIG, meshes, dtype=torch.float64, compute_dtype=torch.float64)
    reduction, settings = Reduction(decoder, meshes, 3), OptimizerSection(kind=kind, lr=1e-2)
    optimizer = build_optimizer(decoder, settings, copy=meshes.copy, dtype=torch.float64)
    checkpointer = Checkpointer(folder, keep=9, keep_every=None, on_event=lambda kind, fields: None)
    state = training_state(decoder, optimizer)
    commit = checkpointer.load(state)
    share_step(optimizer)
    if not commit:
        initialise_shards(decoder, 0)
    rank, lanes = (dist.get_rank() if dist.is_initialized() else 0), BATCH // layout.dp
    held = slice(layout.dp_rank(rank) * lanes, (layout.dp_rank(rank) + 1) * lanes)
    for step in range(commit.step if commit else 0, until):
        tensors = [tensor[held] for tensor in global_batch(step).values()]
        accumulate_gradients(decoder, [MicroBatch.of(*tensors, torch.device("cpu"))], reduction)
        optimizer.step()
        optimizer.zero_grad()
    checkpointer.save(until, training_state(decoder, optimizer), {})
    checkpointer.finish()


def test_a_commit_that_counts_steps_for_each_weight_is_read(tmp_path: Path) -> None:
    module = decoder()
    state = training_state(module, build_optimizer(module, OptimizerSection()))
    older = dict(state)
    older |= {f"optimizer.{name}.step": torch.tensor(7.0) for name, _ in module.named_parameters()}
    del older["optimizer.step"]
    checkpointer = Checkpointer(tmp_path, keep=9, keep_every=None, on_event=lambda kind, fields: None)
    checkpointer.save(7, older, {})
    again = decoder()
    optimizer = build_optimizer(again, OptimizerSection())
    assert checkpointer.load(training_state(again, optimizer), older_names=older_names(again))
    share_step(optimizer)
    assert [float(state["step"]) for state in optimizer.state.values()] == [7.0] * len(optimizer.state)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_tied_model_goes_on_under_any_layout(pool: Pool, tmp_path: Path, kind: str) -> None:
    """Its weights and moments after three steps are those of one process that nobody interrupted."""
    assert CONFIG.tied_embeddings
    pool.run(taken_up, 1, tmp_path / "one", Layout(dp_shard=1), 3, kind)
    for until, layout in enumerate([Layout(dp_shard=1, tp=2), Layout(dp_shard=2, ep=2), Layout(dp_shard=1)], 1):
        pool.run(taken_up, layout.world_size, tmp_path / "many", layout, until, kind)
    (*_, ours), (theirs,) = (list_commits(tmp_path / name) for name in ("many", "one"))
    truth = dict(read_tensors(theirs))
    assert ours.manifest.tensors.keys() == truth.keys()
    assert "model.head.weight" not in truth
    for name, tensor in read_tensors(ours):
        torch.testing.assert_close(tensor, truth[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def moved(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    give_gradients(module, seed=9)
    optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_a_filled_state_goes_on_where_the_other_stopped() -> None:
    first = decoder()
    first_optimizer = build_optimizer(first, OptimizerSection())
    for step in range(3):
        give_gradients(first, seed=step)
        first_optimizer.step()
    second = decoder()
    second_optimizer = build_optimizer(second, OptimizerSection())
    source = training_state(first, first_optimizer)
    with torch.no_grad():
        for name, tensor in training_state(second, second_optimizer).items():
            tensor.copy_(source[name])
    share_step(second_optimizer)
    expected = moved(first, first_optimizer)
    for name, value in moved(second, second_optimizer).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_rate_reaches_every_group(rate: float) -> None:
    optimizer = build_optimizer(decoder(), OptimizerSection())
    set_learning_rate(optimizer, rate)
    assert len(optimizer.param_groups) == 2
    assert {group["lr"] for group in optimizer.param_groups} == {rate}


def test_biases_are_not_decayed_stacked_ones_of_experts_neither() -> None:
    biased = CONFIG.but(ffn={"bias": True}, attention={"qkv_bias": True})
    module = Decoder(biased)
    optimizer = build_optimizer(module, OptimizerSection(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in decayed}
    stacked = {name for name, parameter in module.named_parameters() if "bias" in name and parameter.ndim == 2}
    assert len(stacked) == 3
    assert not [name for name in names if "bias" in name or "norm" in name]
    assert "blocks.1.ffn.experts.down_EDF" in names


def test_moments_in_bf16_are_those_of_fp32_rounded_after_each_step() -> None:
    module = decoder()
    twin = copy.deepcopy(module)
    ours = build_optimizer(module, OptimizerSection(moments="bfloat16"))
    theirs = build_optimizer(twin, OptimizerSection())
    for step in range(4):
        for each, optimizer in ((module, ours), (twin, theirs)):
            give_gradients(each, seed=step)
            optimizer.step()
        for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, other)
            for name in ("exp_avg", "exp_avg_sq"):
                assert ours.state[mine][name].dtype == torch.bfloat16
                rounded = theirs.state[other][name].to(torch.bfloat16)
                assert torch.equal(ours.state[mine][name], rounded)
                theirs.state[other][name].copy_(rounded)
