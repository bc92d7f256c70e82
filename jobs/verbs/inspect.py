"""`moray inspect`."""

from typing import Literal

import tyro
from rich.console import Console


def inspect(
    source: tyro.conf.Positional[str],
    *,
    seq_len: int | None = None,
    workers: int = 1,
    dp_replicate: int = 1,
    tp: int = 1,
    ep: int = 1,
    micro_batch: int = 8,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    json: bool = False,
) -> int:
    """Show a model's architecture, parameters, FLOPs and memory, without building it.

    Args:
        source: A preset, a run or a Hugging Face folder.
        seq_len: Tokens of a sequence; by default 4096, or the model's longest.
        workers: Workers that train it, of each of which the memory is shown.
        dp_replicate: Copies of the model that they hold.
        tp: Workers that share each matrix product.
        ep: Workers that share each layer's experts.
        micro_batch: Sequences of a forward pass on a worker.
        dtype: Dtype of the matrix products in training.
        json: Print everything as JSON.
    """
    from moray.jobs.models.inspect_model import inspect_model
    from moray.jobs.models.worker_memory import TrainingPlan
    from moray.parallel.layout import Layout

    layout = Layout(dp_replicate=dp_replicate, tp=tp, ep=ep).resolve(workers)
    training = TrainingPlan(layout, micro_batch, dtype)
    inspect_model(source, seq_len, training, as_json=json, console=Console(highlight=False))
    return 0
