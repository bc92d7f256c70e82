"""`moray checkpoints`: what a run has committed, and whether it is still whole."""

from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moray import UserError
from moray.parallel.checkpoint.commits import commit_paths, list_commits, sound_commit, verify


def show_checkpoints(run: Path, check: bool, console: Console) -> int:
    """Prints a table of the commits; with `check`, reads every byte of them. Returns 1 if one is damaged, else 0."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} holds no checkpoints; `moray pretrain --run.dir {run} …` makes them")
    table = Table("step", "written", "size", "loss", "layout", "state")
    current = {commit.path for commit in list_commits(folder)}
    wrong = False
    for path in commit_paths(folder):
        commit = sound_commit(path)
        if commit is None:
            table.add_row(path.name, "", "", "", "", "damaged: refused on resume")
            wrong = True
            continue
        problems = verify(commit) if check else []
        wrong |= bool(problems)
        manifest = commit.manifest
        layout = manifest.metadata.get("layout", {})
        table.add_row(
            str(commit.step),
            datetime.fromisoformat(manifest.created).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            f"{sum(file.size for file in manifest.files.values()) / 2**20:,.1f} MiB",
            f"{manifest.metadata['loss']:.3f}" if "loss" in manifest.metadata else "",
            " ".join(f"{name}={degree}" for name, degree in layout.items()),
            "; ".join(problems) or _state(path in current, check),
        )
    console.print(table)
    return int(wrong)


def _state(is_current: bool, is_verified: bool) -> str:
    if not is_current:
        return "given up: a newer generation went on from an earlier step"
    return "verified" if is_verified else "whole by its manifest"
