"""`moray inspect`."""

from inspect import signature
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from moray import UserError


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
    samples: int = 3,
    seed: int = 0,
    step: int | None = None,
    position: int | None = None,
    lane: int | None = None,
    limit: int | None = None,
    json: bool = False,
) -> int:
    """Show a model before it is built, a dataset, or the text of a run's steps.

    Args:
        source: A preset, a run or a Hugging Face folder: architecture, parameters, FLOPs and memory. A dataset
            (or its fsspec URL): splits, sources, lengths, bytes a token, how full rows are, samples. A run with --step
            or --position: texts, with their documents, files and lines.
        seq_len: Tokens of a sequence; by default 4096, or the model's longest.
        workers: Of a model: workers that train it, of each of which the memory is shown.
        dp_replicate: Copies of the model that they hold.
        tp: Workers that share each matrix product.
        ep: Workers that share each layer's experts.
        micro_batch: Sequences of a forward pass on a worker.
        dtype: Dtype of the matrix products in training.
        samples: Of a dataset: so many documents are shown.
        seed: Which ones, and what is measured of a dataset that is too large for all of it.
        step: Of a run: the sequences of this step.
        position: Of a run: the sequence at this position of its stream, be it of a step or skipped.
        lane: Of a step: this sequence alone, 0 being the first.
        limit: Of a step: so many sequences, from the first on.
        json: Print everything as JSON; of a step, an object a sequence, each on its line.
    """
    given = locals()
    asked = {name for name, kind in signature(inspect).parameters.items() if given[name] != kind.default}
    if step is not None or position is not None:
        _refuse(asked - {"source", "json", "step", "position", "lane", "limit"}, source, "a step's text has no such")
        _show_sequences(Path(source), step, position, lane, limit, as_json=json)
        return 0
    _refuse(asked & {"lane", "limit"}, source, "it is of a run with --step")
    console = Console(highlight=False)
    if "://" in source or (Path(source) / "index.json").is_file():
        from moray.jobs.datasets.inspect_dataset import inspect_dataset

        _refuse(asked - {"source", "json", "seq_len", "samples", "seed"}, source, "a dataset has no such")
        inspect_dataset(source, 4096 if seq_len is None else seq_len, samples, seed, as_json=json, console=console)
        return 0
    from moray.jobs.models.inspect_model import inspect_model
    from moray.jobs.models.worker_memory import TrainingPlan
    from moray.parallel.layout import Layout

    _refuse(asked & {"samples", "seed"}, source, "it is of a dataset (a folder with index.json)")
    layout = Layout(dp_replicate=dp_replicate, tp=tp, ep=ep).resolve(workers)
    training = TrainingPlan(layout, micro_batch, dtype)
    inspect_model(source, seq_len, training, as_json=json, console=console)
    return 0


def _show_sequences(
    run: Path, step: int | None, position: int | None, lane: int | None, limit: int | None, *, as_json: bool
) -> None:
    from moray.jobs.training.inspect_step import show_position, show_step

    if step is None:
        if lane is not None or limit is not None:
            raise UserError("--lane and --limit are of --step; --position is one sequence")
        assert position is not None
        show_position(run, position, as_json=as_json)
        return
    if position is not None:
        raise UserError(f"--step {step} and --position {position} both say which sequences; leave one out")
    if lane is not None and limit is not None:
        raise UserError(f"--lane {lane} and --limit {limit} both say which sequences; leave one out")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be at least 1")
    lanes = range(limit) if limit is not None else None if lane is None else range(lane, lane + 1)
    show_step(run, step, lanes, as_json=as_json)


def _refuse(options: set[str], source: str, why: str) -> None:
    if options:
        name = min(options).replace("_", "-")
        raise UserError(f"--{name} says nothing of {source}: {why}")
