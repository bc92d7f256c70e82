"""The texts of evaluation files, which a dataset should not hold."""

from collections.abc import Sequence
from pathlib import Path

from moray.jobs.evaluation.overlap import text_of
from moray.jobs.evaluation.tasks import read_task


def texts_of_tasks(files: Sequence[Path]) -> list[str]:
    """What of each item would give it away: what is asked, and the right answer.

    Raises UserError naming file and line for what is no task file (see `tasks.read_task`).
    """
    return [text_of(item) for file in files for item in read_task(file, shots=0, limit=None).items]
