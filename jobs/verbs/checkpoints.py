"""`moray checkpoints`."""

from pathlib import Path

import tyro
from rich.console import Console


def checkpoints(run: tyro.conf.Positional[Path], *, verify: bool = False) -> int:
    """List a run's commits.

    Args:
        run: The run's folder.
        verify: Read every byte and compare it with the manifest.
    """
    from moray.jobs.runs.checkpoints import show_checkpoints

    return show_checkpoints(run, verify, Console())
