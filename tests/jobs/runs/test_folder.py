"""A run's folder holds one run: it is taken up again, another is refused, and one driver works in it at a time."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY

from moray.data.dataset import Dataset
from moray.data.sources import Sources
from moray.data.tokenizer import load_tokenizer
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.folder import check_same_run, claimed
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import Commit, list_commits


def config_of(dataset: Path, run: Path, **changes: str) -> RunConfig:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    base = {name: str(value) for name, value in TINY.items()}
    return load_config(None, {**base, "data.path": str(dataset), "run.dir": str(run), **changed})


def claim(config: RunConfig) -> None:
    with claimed(config, Sources.open(config.data.folders), print):
        pass


def commit(config: RunConfig, step: int = 8, position: int = 32) -> Commit:
    """What a run of `step` steps at a global batch of 4 leaves behind."""
    folder = Path(config.run.dir) / "checkpoints"
    checkpointer = Checkpointer(folder, keep=1, keep_every=None, on_event=lambda kind, fields: None)
    fingerprint = Dataset.open(config.data.path).fingerprint
    data = {"position": position, "fingerprint": fingerprint}
    checkpointer.save(step, {"x": torch.zeros(1)}, {"config": config.model_dump(), "data": data})
    checkpointer.finish()
    return list_commits(folder)[-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__micro_batch": "1"}, "train.micro_batch=1 (there: 2)"),
        ({"layout__tp": "2", "cluster__workers": "2"}, "layout.tp=2 (there: 1)"),
        ({"train__exact": "false"}, "train.exact=False (there: True)"),
        ({"train__recompute": "selective"}, "train.recompute=selective (there: none)"),
        ({"layout__dispatcher": "allgather"}, "layout.dispatcher=allgather (there: alltoall)"),
    ],
)
def test_a_run_in_exact_mode_keeps_what_its_bits_depend_on(
    dataset: Path, tmp_path: Path, changes: dict[str, str], named: str
) -> None:
    exact = {"train__exact": "true", "cluster__launcher": "ray"}
    claim(config_of(dataset, tmp_path, **exact))
    commit(config_of(dataset, tmp_path, **exact))
    claim(config_of(dataset, tmp_path, **exact, cluster__workers="2"))
    with pytest.raises(ValueError, match="holds a different run") as error:
        claim(config_of(dataset, tmp_path, **exact | changes))
    assert named in str(error.value)


def test_a_new_folder_gets_config_and_tokenizer(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path / "new" / "run")
    claim(config)
    names = sorted(path.name for path in (tmp_path / "new" / "run").iterdir())
    assert names == [".lock", "config.toml", "tokenizer"]
    assert load_config(str(tmp_path / "new" / "run" / "config.toml"), {}) == config
    text = "def f(): return 3"
    assert load_tokenizer(tmp_path / "new" / "run" / "tokenizer").encode(text) == load_tokenizer(dataset).encode(text)


@pytest.mark.parametrize("has_config_toml", [True, False])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__seed": "1"}, "train.seed=1 (there: 0)"),
        ({"train__global_batch": "8"}, "train.global_batch=8 (there: 4)"),
        ({"train__seq_len": "32"}, "train.seq_len=32 (there: 64)"),
        ({"model__d_model": "64"}, "model.d_model=64 (there: 32)"),
        ({"train__exact": "true"}, "train.exact=True (there: False)"),
        ({"optimizer__kind": "muon"}, "optimizer.kind=muon (there: adamw)"),
        ({"optimizer__moments": "bfloat16"}, "optimizer.moments=bfloat16 (there: float32)"),
        ({"model__moe__bias_update_rate": "0.5"}, "model.moe.bias_update_rate=0.5 (there: 0.001)"),
    ],
)
def test_another_run_is_refused_with_both_values(
    dataset: Path, tmp_path: Path, changes: dict[str, str], named: str, has_config_toml: bool
) -> None:
    """The commit says what the run is; config.toml may be lost, or checkpoints/ be all that was restored."""
    claim(config_of(dataset, tmp_path))
    commit(config_of(dataset, tmp_path))
    before = (tmp_path / "config.toml").read_bytes()
    if not has_config_toml:
        (tmp_path / "config.toml").unlink()
    with pytest.raises(ValueError, match="holds a different run") as error:
        claim(config_of(dataset, tmp_path, **changes))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not has_config_toml or (tmp_path / "config.toml").read_bytes() == before


def test_until_something_is_committed_the_folder_is_bound_to_nothing(dataset: Path, tmp_path: Path) -> None:
    """The first try may have crashed at its first step, for a mistake in its model."""
    claim(config_of(dataset, tmp_path))
    corrected = config_of(dataset, tmp_path, model__d_model="64", train__seed="3")
    claim(corrected)
    assert load_config(str(tmp_path / "config.toml"), {}) == corrected


def test_a_commit_that_ended_elsewhere_in_the_stream_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path)
    wrong = commit(config, step=8, position=64)
    with pytest.raises(ValueError, match=r"step-000000008 was committed at data position 64, not at step 8 \* .* = 32"):
        check_same_run(wrong, config, Sources.open(config.data.folders))


def test_the_same_run_may_change_what_does_not_make_it_another(dataset: Path, tmp_path: Path) -> None:
    claim(config_of(dataset, tmp_path))
    commit(config_of(dataset, tmp_path))
    later = config_of(dataset, tmp_path, train__steps="2000", checkpoint__keep="1", train__micro_batch="1")
    claim(later)
    assert load_config(str(tmp_path / "config.toml"), {}) == later


def test_a_run_of_two_torchrun_processes_is_taken_up_by_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a commit says of its old layout is history: it need not fit today's number of workers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    commit(config_of(dataset, tmp_path, cluster__launcher="torchrun", layout__ep="2"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    for alone in (config_of(dataset, tmp_path, cluster__launcher="torchrun"), config_of(dataset, tmp_path)):
        claim(alone)
        assert load_config(str(tmp_path / "config.toml"), {}) == alone


def test_config_toml_is_replaced_whole_or_not_at_all(dataset: Path, tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC: the file that was there stays."""
    claim(config_of(dataset, tmp_path))
    before = (tmp_path / "config.toml").read_bytes()
    os.symlink("/dev/full", tmp_path / f"config.{os.getpid()}.partial")
    with pytest.raises(OSError, match="No space left"):
        claim(config_of(dataset, tmp_path, train__steps="2000"))
    assert (tmp_path / "config.toml").read_bytes() == before


def test_a_folder_in_use_is_refused_and_its_holder_named(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path)
    with claimed(config, Sources.open({"": str(dataset)}), print):
        before = (tmp_path / "config.toml").read_bytes()
        with pytest.raises(ValueError, match=r"^run\.dir=.* is in use by") as error:
            claim(config_of(dataset, tmp_path, train__steps="2000"))
        assert str(tmp_path) in str(error.value)
        assert f"pid {os.getpid()} on {socket.gethostname()}; wait until" in str(error.value)
        assert (tmp_path / "config.toml").read_bytes() == before
    claim(config)


HOLDER = """
import sys, time
from moray.data.sources import Sources
from moray.jobs.config.load import load_config
from moray.jobs.runs.folder import claimed

config = load_config(sys.argv[1], {})
with claimed(config, Sources.open(config.data.folders), print):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_driver_killed_with_sigkill_lets_go_of_its_folder(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path)
    claim(config)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "config.toml")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ValueError, match=f"is in use by pid {holder.pid} on "):
            claim(config)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    claim(config)


def tokenizer_of(folder: Path) -> bytes:
    return (folder / "tokenizer.json").read_bytes()


def test_the_tokenizer_appears_whole_and_is_not_written_again(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.1234567.partial").mkdir()  # of a start that was killed while copying
    claim(config_of(dataset, tmp_path))
    assert not list(tmp_path.glob("*.partial"))
    commit(config_of(dataset, tmp_path))
    before = (tmp_path / "tokenizer" / "tokenizer.json").stat()
    assert tokenizer_of(tmp_path / "tokenizer") == tokenizer_of(dataset)
    claim(config_of(dataset, tmp_path))
    after = (tmp_path / "tokenizer" / "tokenizer.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    shutil.rmtree(tmp_path / "tokenizer")
    claim(config_of(dataset, tmp_path))
    assert tokenizer_of(tmp_path / "tokenizer") == tokenizer_of(dataset)


def test_a_tokenizer_that_is_not_that_of_the_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path)
    claim(config)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    claim(config)
    assert tokenizer_of(tmp_path / "tokenizer") == tokenizer_of(dataset), "nothing was committed with it"
    commit(config)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer is not the tokenizer of data\.path="):
        claim(config)


def test_a_file_is_no_folder(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.dir=.*file is a file; name a folder"):
        claim(config_of(dataset, tmp_path / "file"))
