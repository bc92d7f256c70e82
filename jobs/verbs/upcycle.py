"""`moray upcycle`."""

from pathlib import Path

import tyro
from rich.console import Console

from moray.jobs.verbs.say import complain


def upcycle(
    source: tyro.conf.Positional[Path],
    *,
    out: Path,
    experts: int,
    top_k: int,
    shared: int = 0,
    noise: float = 0.0,
    granularity: int = 1,
    seed: int = 0,
) -> int:
    """Make experts of a dense model's networks: weights to start a MoE run from.

    Args:
        source: A run, or a Hugging Face folder.
        out: The folder to make; `moray pretrain --model.from` starts from it.
        experts: Routed experts of every layer.
        top_k: Routed experts per token.
        shared: Experts that every token passes.
        noise: Deviation of the noise on each expert's matrices, in deviations of the matrix itself.
        granularity: Experts that make up one dense network; each is that much narrower.
        seed: Decides on the noise and on the routers.
    """
    from moray.jobs.models.upcycle import upcycle as run_upcycle
    from moray.model.surgery.upcycle import Upcycling

    options = Upcycling(experts, top_k, shared, noise, granularity, seed)
    run_upcycle(source, options, out, Console(highlight=False), complain)
    return 0
