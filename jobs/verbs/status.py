"""`moray status`."""

from pathlib import Path

import tyro
from rich.console import Console

from moray import UserError


def status(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    watch: bool = False,
    json: bool = False,
    exit_code: bool = False,
) -> int:
    """Tell how runs get on, from the files in their folders.

    Args:
        runs: Folders of runs, or folders with runs below; by default the folder `runs`.
        watch: Tell again every second, in place, until no run is running.
        json: Print each run as one JSON object on one line.
        exit_code: Of one run: exit with 0 if it is done, 3 running, 75 stopped or lost (the same command resumes),
            76 taken over by another attempt, 1 failed.
    """
    from moray.jobs.runs.show_status import show_status
    from moray.jobs.runs.status import find_runs

    folders = find_runs(runs)
    if exit_code and len(folders) != 1:
        raise UserError(f"--exit-code is that of one run, and here are {len(folders)}; name one")
    found = show_status(folders, watch=watch, as_json=json, console=Console())
    return found[0].exit_code if exit_code else 0
