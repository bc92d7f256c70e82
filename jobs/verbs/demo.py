"""`moray demo`."""

from pathlib import Path
from typing import Annotated

import tyro


def demo(*, dir: Annotated[Path, tyro.conf.arg(name="dir")] = Path("moray-demo")) -> int:
    """Train a small MoE on 4 workers, kill one, recover, and generate text.

    Args:
        dir: Where everything is put.
    """
    from moray.jobs.demo import demo as run

    return run(dir)
