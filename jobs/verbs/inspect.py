"""`moray inspect`."""

import tyro
from rich.console import Console


def inspect(source: tyro.conf.Positional[str], *, seq_len: int | None = None, json: bool = False) -> int:
    """Show a model's architecture, parameters, FLOPs and memory, without building it.

    Args:
        source: A preset, a run or a Hugging Face folder.
        seq_len: Tokens of a sequence; by default 4096, or the model's longest.
        json: Print everything as JSON.
    """
    from moray.jobs.models.inspect_model import inspect_model

    inspect_model(source, seq_len, as_json=json, console=Console(highlight=False))
    return 0
