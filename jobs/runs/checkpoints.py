"""`moray checkpoints`: what a run has committed, and whether it is still whole."""

from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moray import UserError
from moray.jobs.runs.ledger import ledger_problems, skipped_positions
from moray.parallel.checkpoint.commits import commit_paths, list_commits, sound_commit, verify

DAMAGED = "damaged: refused on resume"


def show_checkpoints(run: Path, check: bool, console: Console) -> int:
    """Prints a table of the commits, and what their history lacks; with `check`, reads every byte of them.

    Returns 1 if one is damaged, else 0.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} holds no checkpoints; `moray pretrain --run.dir {run} …` makes them")
    table = Table("step", "written", "size", "loss", "layout", "state", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[:4]:
        column.no_wrap = True
    current = {commit.path for commit in list_commits(folder)}
    wrong: list[str] = []
    for path in commit_paths(folder):
        commit = sound_commit(path)
        if commit is None:
            wrong.append(f"{path}: its manifest, or a file that it names, is missing or not as it was written")
            table.add_row(str(int(path.name.removeprefix("step-"))), "", "", "", "", DAMAGED)
            continue
        problems = verify(commit) if check else []
        wrong += problems
        manifest = commit.manifest
        stated = manifest.metadata.get("layout", {}).items()
        layout = [f"{name}={degree}" for name, degree in stated if isinstance(degree, int) and degree > 1]
        table.add_row(
            str(commit.step),
            datetime.fromisoformat(manifest.created).astimezone().strftime("%Y-%m-%d %H:%M"),
            f"{sum(file.size for file in manifest.files.values()) / 2**20:,.1f} MiB",
            f"{manifest.metadata['loss']:.3f}" if "loss" in manifest.metadata else "",
            " ".join(layout) or "one worker",
            DAMAGED if problems else _state(path in current, check),
        )
    console.print(table)
    lacks = [f"{run}: {line}" for line in ledger_problems(run) + skipped_positions(run)]
    for problem in wrong + lacks:  # below the table, whose columns would break a path
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    return int(bool(wrong))


def _state(is_current: bool, is_verified: bool) -> str:
    if not is_current:
        return "given up: a newer generation went on from an earlier step"
    return "verified" if is_verified else "whole by its manifest"
