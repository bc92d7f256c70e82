"""A run's folder holds one run: the same is taken up again, another is refused, and config.toml is never half."""

import os
from pathlib import Path

import pytest
from tiny import TINY

from data.tokenizer import load_tokenizer
from jobs.config import RunConfig, load_config
from jobs.run_folder import claim, newest_commit


def config_of(dataset: Path, run: Path, **changes: str) -> RunConfig:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    base = {name: str(value) for name, value in TINY.items()}
    return load_config(None, {**base, "data.path": str(dataset), "run.dir": str(run), **changed})


def test_a_new_folder_gets_config_and_tokenizer(dataset: Path, tmp_path: Path) -> None:
    config = config_of(dataset, tmp_path / "new" / "run")
    claim(config)
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["config.toml", "tokenizer"]
    assert load_config(str(tmp_path / "new" / "run" / "config.toml"), {}) == config
    text = "def f(): return 3"
    assert load_tokenizer(tmp_path / "new" / "run" / "tokenizer").encode(text) == load_tokenizer(dataset).encode(text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__seed": "1"}, "train.seed=1 (there: 0)"),
        ({"train__global_batch": "8"}, "train.global_batch=8 (there: 4)"),
        ({"train__seq_len": "32"}, "train.seq_len=32 (there: 64)"),
        ({"model__d_model": "64"}, "model.d_model=64 (there: 32)"),
        ({"model__bias_update_rate": "0.5"}, "model.bias_update_rate=0.5 (there: 0.001)"),
    ],
)
def test_another_run_is_refused_with_both_values(
    dataset: Path, tmp_path: Path, changes: dict[str, str], named: str
) -> None:
    claim(config_of(dataset, tmp_path))
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="holds a different run") as error:
        claim(config_of(dataset, tmp_path, **changes))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "config.toml").read_bytes() == before


def test_the_same_run_may_change_what_does_not_make_it_another(dataset: Path, tmp_path: Path) -> None:
    claim(config_of(dataset, tmp_path))
    later = config_of(dataset, tmp_path, train__steps="2000", checkpoint__keep="1", train__micro_batch="1")
    claim(later)
    assert load_config(str(tmp_path / "config.toml"), {}) == later


def test_a_run_of_two_torchrun_processes_is_taken_up_by_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the folder says of its old layout is history: it need not fit today's number of workers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    claim(config_of(dataset, tmp_path, cluster__launcher="torchrun", layout__ep="2"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    claim(config_of(dataset, tmp_path, cluster__launcher="torchrun"))
    claim(config_of(dataset, tmp_path))


def test_config_toml_is_replaced_whole_or_not_at_all(dataset: Path, tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC: the file that was there stays."""
    claim(config_of(dataset, tmp_path))
    before = (tmp_path / "config.toml").read_bytes()
    os.symlink("/dev/full", tmp_path / "config.partial")
    with pytest.raises(OSError, match="No space left"):
        claim(config_of(dataset, tmp_path, train__steps="2000"))
    assert (tmp_path / "config.toml").read_bytes() == before


def test_a_file_is_no_folder(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.dir=.*file is a file; name a folder"):
        claim(config_of(dataset, tmp_path / "file"))


def test_a_damaged_config_toml_is_named(dataset: Path, tmp_path: Path) -> None:
    claim(config_of(dataset, tmp_path))
    for damage in ("[model\n", "[model]\n", "[model]\nn_layers = 'x'\n[train]\n", "model = 3\n"):
        (tmp_path / "config.toml").write_text(damage)
        with pytest.raises(ValueError, match=r"config\.toml is damaged: .*; restore it or choose another") as error:
            claim(config_of(dataset, tmp_path))
        assert "\n" not in str(error.value)


def test_where_there_is_no_commit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a run: there is no such folder"):
        newest_commit(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no commit yet"):
        newest_commit(tmp_path)
