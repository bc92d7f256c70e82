"""A bit that flips in one rank: found by computing twice, and named. Real ranks, whose layouts the audit permits."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from poison import flipping, is_embedding
from pool import Pool
from rich.console import Console
from tiny import tiny
from torch import Tensor, nn

from moray.cluster.events import read_events
from moray.cluster.worker import WorkerContext, WrongResultError
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.training.batches import stream_of
from moray.jobs.training.begin import Training, set_up
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.trainer import take_step
from moray.jobs.training.wrong_results import outvoted
from moray.model.sharded import local
from moray.parallel.checkpoint.generations import take_generation

Flip = Callable[[Tensor], Tensor]


def config_of(data: str, run: str, **changes: object) -> RunConfig:
    plan = {"train__global_batch": 16, "train__steps": 9, "cluster__launcher": "ray", **changes}
    return load_config(*parse_settings(tiny(Path(data), Path(run), **plan)))


def begin(data: str, run: str, notes: dict[str, Any], **changes: object) -> Training:
    world_size = dist.get_world_size()
    context = WorkerContext(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=dist.get_rank(),
        local_world_size=world_size,
        generation=1,
        device=torch.device("cpu"),
        open_store=dist.HashStore,
        report=lambda step, status: None,
        should_stop=lambda: False,
        notes=notes,
        note=notes.__setitem__,
    )
    return set_up(context, config_of(data, run, cluster__workers=world_size, **changes))


def steps(training: Training, number: int) -> list[dict[str, Any] | None]:
    stream = stream_of(training.sources, training.config, training.lanes)
    with closing(stream.batches(training.step)) as batches:
        return [take_step(training, next(batches)) for _ in range(number)]


def bits(training: Training) -> list[Tensor]:
    moments = [state[name] for state in training.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [local(tensor).clone() for tensor in (*training.decoder.state_dict().values(), *moments)]


def alike(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def accused(training: Training, rank: int, calls: range) -> tuple[tuple[int, ...], bool]:
    """Whom a step accuses while bits flip, and whether it has left everything as it was."""
    before = bits(training)
    with flipping(rank, calls), pytest.raises(WrongResultError) as error:
        steps(training, 1)
    return error.value.ranks, alike(bits(training), before)


def audit(data: str, run: str, settings: dict[str, Any], rank: int) -> tuple[bool, list[tuple[tuple[int, ...], bool]]]:
    notes: dict[str, Any] = {}
    plain = begin(data, run, notes, **settings)
    audited = begin(data, run, notes, train__audit_every=1, **settings)
    rows = [steps(plain, 1), steps(audited, 1)]
    is_same = rows[0] == rows[1] and alike(bits(plain), bits(audited))
    # A rank computes another's micro-batch, its own ones, and for the decision another's again.
    own = range(1, 1 + len(audited.lanes) // audited.config.train.micro_batch)
    return is_same, [accused(audited, rank, calls) for calls in (own, range(99))]


@pytest.mark.parametrize(
    ("settings", "rank", "now_and_then", "always"),
    [
        ({}, 2, (2,), (2,)),
        ({"train__exact": True}, 2, (2,), (2,)),
        ({"layout__dp_replicate": 2, "layout__tp": 2, "layout__ep": 2}, 3, (3,), (1, 3)),
    ],
    ids=str,
)
def test_an_audit_changes_nothing_and_finds_a_bit_that_flips_in_a_gradient(
    pool: Pool, dataset: Path, tmp_path: Path, settings: dict[str, Any], rank: int, now_and_then: Any, always: Any
) -> None:
    """Of two groups that answer differently, time after time, it cannot tell which one is wrong."""
    take_generation(tmp_path / "checkpoints")
    for is_same, found in pool.run(audit, 4, str(dataset), str(tmp_path), settings, rank):
        assert is_same
        assert found == [(now_and_then, True), (always, True)]


@pytest.mark.parametrize(
    ("ranks", "answers", "suspects"),
    [
        ((4, 3, 2), "abb", [4]),
        ((4, 3, 2), "aba", [3]),
        ((4, 3, 2), "abc", [4, 3, 2]),
        ((1, 0, 1), "aba", [1, 0]),
        ((1, 0, 1), "abb", [1]),
        ((1, 0, 1), "abc", [1]),
    ],
)
def test_two_votes_outweigh_one(ranks: tuple[int, ...], answers: str, suspects: list[int]) -> None:
    own, second, third = answers
    assert list(outvoted(ranks, third == own, third == second)) == suspects


def test_a_bad_value_that_does_not_come_again_is_the_hardwares(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest bit of an exponent, in the first of two times that step 3 is computed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config, passes = config_of(str(dataset), str(tmp_path), cluster__launcher="local"), 0

    def spoil(module: nn.Module, arguments: tuple[Any, ...], x_BTD: Tensor) -> None:
        nonlocal passes
        if is_embedding(module, x_BTD):
            passes += 1
            if passes == 8 * 2 + 1:
                x_BTD.data.view(torch.int32)[0, 0, 0] |= 0x7F800000

    hook = nn.modules.module.register_module_forward_hook(spoil)
    try:
        with pytest.raises(WrongResultError) as error:
            drive(config, Console(quiet=True))
    finally:
        hook.remove()
    assert error.value.ranks == (0,)
    assert str(error.value).startswith(f"step 3: rank 0 on {socket.gethostname()} computed wrongly: loss nan, gradient")
    (event,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "wrong_result"]
    assert (event["step"], event["ranks"]) == (3, [{"rank": 0, "node": socket.gethostname()}])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2], "and the step was not applied"
