"""The folder of a run: what may go on in it, and what lies there."""

from pathlib import Path

from data.tokenizer import copy_tokenizer
from jobs.config import RunConfig, load_config, to_toml
from parallel.checkpoint import Commit, list_commits

# What decides on weights, data order or their meaning: a run that changed one would be another run.
_FIXED = ("train.seed", "train.global_batch", "train.seq_len")


def claim(config: RunConfig) -> None:
    """Makes the run's folder, or checks that what it holds is this run; writes config.toml and tokenizer/.

    Raises ValueError naming what differs when the folder holds a different model, seed, batch or sequence length.
    """
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.dir={folder} is a file; name a folder")
    path = folder / "config.toml"
    if path.exists():
        _check_same_run(load_config(str(path), {}), config, folder)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    copy_tokenizer(Path(config.data.path), folder / "tokenizer")
    partial = path.with_suffix(".partial")
    partial.write_text(to_toml(config))
    partial.replace(path)


def _check_same_run(before: RunConfig, now: RunConfig, folder: Path) -> None:
    old = {f"model.{name}": value for name, value in before.model}
    new = {f"model.{name}": value for name, value in now.model}
    for name in _FIXED:
        section, key = name.split(".")
        old[name], new[name] = (getattr(getattr(config, section), key) for config in (before, now))
    differing = [f"{name}={new[name]} (there: {old[name]})" for name in new if new[name] != old[name]]
    if differing:
        raise ValueError(
            f"run.dir={folder} holds a different run: {', '.join(differing)}; choose another run.dir or these settings"
        )


def newest_commit(run: Path) -> Commit:
    """The newest whole-looking commit of a run. Raises ValueError where there is none."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a run: there is no such folder")
    commits = list_commits(run / "checkpoints")
    if not commits:
        raise ValueError(f"{run} holds no commit yet; `moray pretrain --run.dir {run} …` makes them")
    return commits[-1]
