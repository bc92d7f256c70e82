"""The dtype and the stage of ZeRO of a run that leaves them to the machines: chosen once, said, recorded, and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from tiny import tiny

from moray import UserError
from moray.cluster.events import read_events
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.sections import TrainSection
from moray.jobs.training import choices
from moray.jobs.training.choices import has_fast_bf16
from moray.model import ModelConfig
from moray.model.sharded import local
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.layout import Layout
from moray.parallel.memory import STATE_BYTES, rank_bytes
from moray.parallel.shard import build_decoder

MODEL = ModelConfig.preset("demo-moe")


def test_a_cpu_has_fast_bf16_where_the_kernel_lists_such_instructions() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_fast_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & set(flags))


@pytest.mark.parametrize(("name", "meant"), [("bf16", "bfloat16"), ("fp32", "float32"), ("auto", "auto")])
def test_the_names_that_everybody_types(name: str, meant: str) -> None:
    assert TrainSection.model_validate({"dtype": name}).dtype == meant


@pytest.mark.parametrize("is_better_first", [False, True])
def test_what_was_chosen_is_said_recorded_and_kept(
    dataset: Path, tmp_path: Path, moray: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, is_better_first: bool
) -> None:
    """The second attempt is on another machine, with bf16 and more memory or without, and computes as the first did."""
    words = tiny(dataset, tmp_path, train__dtype="auto")
    dtype, stage = ("bfloat16", 1) if is_better_first else ("float32", 3)
    for is_better, steps in ((is_better_first, 2), (not is_better_first, 4)):
        monkeypatch.setattr(choices, "free_memory", lambda is_better=is_better: (64 << 30) if is_better else (1 << 20))
        monkeypatch.setattr(choices, "has_fast_bf16", lambda device, is_better=is_better: is_better)
        outcome = moray("pretrain", *words, "--train.steps", steps)
        assert outcome.code == 0, outcome.err
        assert (f"computing in {dtype}" in outcome.err) == (steps == 2)
        assert "train.dtype" not in outcome.err
    told = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] in ("begin", "resume")]
    assert [(event["kind"], event["dtype"], event["zero_stage"]) for event in told] == [
        ("begin", dtype, stage),
        ("resume", dtype, stage),
    ]
    commits = list_commits(tmp_path / "checkpoints")
    recorded = [commit.manifest.metadata["config"]["train"] for commit in commits]
    assert [(train["dtype"], train["zero_stage"]) for train in recorded] == [(dtype, stage)] * 2


@pytest.mark.parametrize(("set_to", "chosen"), [({}, 1), ({"train__zero_stage": 3}, 3), ({"train__exact": "true"}, 3)])
def test_the_stage_is_1_where_there_is_room_and_nothing_needs_more(
    dataset: Path, tmp_path: Path, moray: Callable[..., Any], set_to: dict[str, object], chosen: int
) -> None:
    assert moray("pretrain", *tiny(dataset, tmp_path, train__steps=2, **set_to)).code == 0
    (begin,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "begin"]
    assert begin["zero_stage"] == chosen


def test_a_tree_of_gradients_is_not_for_stage_1(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train.zero_stage=1 must be 3 or auto with train.exact=true, which "):
        load_config(*parse_settings(tiny(dataset, tmp_path, train__zero_stage=1, train__exact="true")))


def held_elements(layout: Layout) -> list[int]:
    """Of this rank: in its shards, and in all weights as it computes with them."""
    decoder = build_decoder(MODEL, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32, stage=1)
    shards = sum(local(weight).numel() for weight in decoder.parameters())
    for module in decoder.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return [shards, sum(local(weight).numel() for weight in decoder.parameters())]


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=2), Layout(dp_shard=2, ep=2), Layout(dp_replicate=2, dp_shard=1)], ids=str
)
def test_what_a_rank_holds_is_what_it_is_said_to(pool: Pool, layout: Layout) -> None:
    expected = rank_bytes(MODEL, layout, 4)
    for shards, whole in pool.run(held_elements, layout.world_size, layout):
        assert shards * STATE_BYTES == pytest.approx(expected.state, rel=0.01)
        assert whole * 8 == pytest.approx(expected.whole, rel=0.01)
