"""The command `moray` where flock answers ENOLCK, as many network file systems do, and what its runs must be."""

from itertools import pairwise
from pathlib import Path

from moray.parallel.checkpoint.commits import list_commits

NO_LOCKS = """
import errno, fcntl

def flock(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
"""
WITHOUT_LOCKS = f"""
{NO_LOCKS}
from moray.jobs.cli import main
main()
"""


def assert_one_chain(run: Path) -> None:
    manifests = [commit.manifest for commit in list_commits(run / "checkpoints")]
    for before, after in pairwise(manifests):
        assert before.generation <= after.generation
        assert after.parent == before.digest
