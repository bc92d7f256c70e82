"""`moray report`."""

from pathlib import Path

import tyro


def report(run: tyro.conf.Positional[Path], *, out: Path | None = None, samples: int = 2) -> int:
    """Draw a run as one self-contained HTML page: curves, experts, faults, samples.

    Args:
        run: The run's folder.
        out: The file to write; by default report.html in the run's folder.
        samples: Continuations to write with the newest commit; 0: none, and no weights are read.
    """
    from moray.jobs.report.report import write_report

    print(write_report(run, out, samples))
    return 0
