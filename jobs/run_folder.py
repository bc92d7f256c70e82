"""The folder of a run: what may go on in it, and what lies there."""

import shutil
import tomllib
from pathlib import Path
from typing import Any

from data.tokenizer import copy_tokenizer
from jobs.config import RunConfig, TrainSection, to_toml
from model import ModelConfig
from model.cost import count_parameters
from parallel.checkpoint import Commit, list_commits

# What decides on weights, data order or their meaning: a run that changed one would be another run.
_FIXED = ("seed", "global_batch", "seq_len")


def claim(config: RunConfig) -> None:
    """Makes the run's folder, or checks that what it holds is this run; writes config.toml and tokenizer/.

    Raises ValueError naming what differs when the folder holds a different model, seed, batch or sequence length, and
    when its disk has no room for a commit.
    """
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.dir={folder} is a file; name a folder")
    path = folder / "config.toml"
    if path.exists():
        _check_same_run(path, config)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    _check_space(config.model, folder)
    copy_tokenizer(Path(config.data.path), folder / "tokenizer")
    partial = path.with_suffix(".partial")
    partial.write_text(to_toml(config))
    partial.replace(path)


def _check_same_run(path: Path, now: RunConfig) -> None:
    """Only what decides is read: the file's layout is history, and need not fit the workers there are today."""
    try:
        tables = tomllib.loads(path.read_text())
        before = _deciding(ModelConfig(**tables["model"]), TrainSection(**tables["train"]))
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}; restore it or choose another run.dir") from None
    wanted = _deciding(now.model, now.train)
    differing = [f"{name}={wanted[name]} (there: {before[name]})" for name in wanted if wanted[name] != before[name]]
    if differing:
        raise ValueError(
            f"run.dir={path.parent} holds a different run: {', '.join(differing)}; "
            "choose another run.dir or these settings"
        )


def _deciding(model: ModelConfig, train: TrainSection) -> dict[str, Any]:
    fixed = {f"train.{name}": getattr(train, name) for name in _FIXED}
    return {f"model.{name}": value for name, value in model} | fixed


def _check_space(model: ModelConfig, folder: Path) -> None:
    parameters, _ = count_parameters(model)
    needed, free = 12 * parameters, shutil.disk_usage(folder).free  # fp32 weights and two moments
    if free < needed:
        raise ValueError(
            f"run.dir={folder}: a commit takes at least {needed / 2**20:,.1f} MiB, but its disk has "
            f"{free / 2**20:,.1f} MiB left; free some or choose another"
        )


def newest_commit(run: Path) -> Commit:
    """The newest whole-looking commit of a run. Raises ValueError where there is none."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a run: there is no such folder")
    commits = list_commits(run / "checkpoints")
    if not commits:
        raise ValueError(f"{run} holds no commit yet; `moray pretrain --run.dir {run} …` makes them")
    return commits[-1]
