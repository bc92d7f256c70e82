"""The dtype of a run that leaves it to the device: chosen once, said, recorded, and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from moray.cluster.events import read_events
from moray.jobs.config.sections import TrainSection
from moray.jobs.training import dtype
from moray.jobs.training.dtype import choose_dtype, has_fast_bf16
from moray.parallel.checkpoint.commits import list_commits

CPU = torch.device("cpu")


def test_a_cpu_has_fast_bf16_where_the_kernel_lists_such_instructions() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_fast_bf16(CPU) == bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & set(flags))


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_the_device_decides_where_nobody_has(has_bf16: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "has_fast_bf16", lambda device: has_bf16)
    assert choose_dtype(TrainSection(), CPU, None) == chosen
    assert choose_dtype(TrainSection(dtype="bfloat16"), CPU, None) == "bfloat16"
    assert choose_dtype(TrainSection(dtype="float32"), CPU, None) == "float32"


@pytest.mark.parametrize(("name", "meant"), [("bf16", "bfloat16"), ("fp32", "float32"), ("auto", "auto")])
def test_the_names_that_everybody_types(name: str, meant: str) -> None:
    assert TrainSection.model_validate({"dtype": name}).dtype == meant


def test_what_was_chosen_is_said_recorded_and_kept(
    dataset: Path, tmp_path: Path, moray: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt is on another machine, one whose CPU has bf16."""
    words = tiny(dataset, tmp_path, train__dtype="auto")
    for has_bf16, steps in ((False, 2), (True, 4)):
        monkeypatch.setattr(dtype, "has_fast_bf16", lambda device, has_bf16=has_bf16: has_bf16)
        outcome = moray("pretrain", *words, "--train.steps", steps)
        assert outcome.code == 0, outcome.err
        assert ("computing in float32" in outcome.err) == (steps == 2)
        assert "train.dtype" not in outcome.err
    (begin,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "begin"]
    (resume,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "resume"]
    assert begin["dtype"] == resume["dtype"] == "float32"
    configs = [commit.manifest.metadata["config"] for commit in list_commits(tmp_path / "checkpoints")]
    assert [config["train"]["dtype"] for config in configs] == ["float32"] * 2
