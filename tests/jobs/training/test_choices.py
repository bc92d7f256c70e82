"""The dtype and the stage of ZeRO of a run that leaves them to the machines: chosen once, said, recorded, and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from moray import UserError
from moray.cluster.events import read_events
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.sections import TrainSection
from moray.jobs.training import choices, memory
from moray.jobs.training.choices import has_fast_bf16
from moray.parallel.checkpoint.commits import list_commits


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
        monkeypatch.setattr(memory, "free_memory", lambda is_better=is_better: (64 << 30) if is_better else (1 << 20))
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


def test_a_run_that_cannot_fit_is_told_so_before_it_is_built(
    dataset: Path, tmp_path: Path, moray: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    outcome = moray("pretrain", *tiny(dataset, tmp_path, train__steps=2))
    assert outcome.code == 0, outcome.err
    events = list(read_events(tmp_path / "events.jsonl"))
    kinds = [event["kind"] for event in events]
    assert kinds.index("short_of_memory") < kinds.index("begin")
    (told,) = [event for event in events if event["kind"] == "short_of_memory"]
    assert (told["ranks"], told["least"]) == (1, 1 << 20)
    assert told["needed"] == pytest.approx(sum(told["parts"].values()), abs=6)
    assert (
        "a worker needs about 0.0 GiB, of which activations 0.0, but 1 of them have less, 0.0 GiB: try train.rec"
        in (outcome.err)
    )


def test_a_run_that_fits_is_told_nothing(dataset: Path, tmp_path: Path, moray: Callable[..., Any]) -> None:
    assert moray("pretrain", *tiny(dataset, tmp_path, train__steps=2)).code == 0
    assert "short_of_memory" not in [event["kind"] for event in read_events(tmp_path / "events.jsonl")]
