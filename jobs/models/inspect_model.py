"""`moray inspect`: what a model is made of and what it costs, before anything is built or trained."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moray import UserError, nearest
from moray.jobs.config.load import load_config
from moray.jobs.models.describe import describe
from moray.jobs.models.units import binary, short
from moray.jobs.models.weights import config_of, locate
from moray.jobs.models.worker_memory import TrainingPlan
from moray.model import ModelConfig
from moray.model.accounting.cost import (
    PARTS,
    SCORES,
    cache_bytes,
    count_parameters,
    forward_flops,
    parameters_by_part,
    training_state_bytes,
)
from moray.model.accounting.saved import activation_bytes
from moray.model.presets import PRESETS
from moray.parallel.checkpoint.snapshots import FILES

USUAL_SEQ_LEN = 4096


def inspect_model(source: str, seq_len: int | None, training: TrainingPlan, *, as_json: bool, console: Console) -> None:
    """Prints the architecture that `source` names and its costs at a sequence length.

    Raises UserError for a source that is neither a preset nor a run nor a Hugging Face folder, for a length that the
    model has not, and for a layout that it cannot have.
    """
    config = find_config(source)
    seq_len = min(USUAL_SEQ_LEN, config.max_seq_len) if seq_len is None else seq_len
    if not 1 <= seq_len <= config.max_seq_len:
        raise UserError(f"seq_len={seq_len} must lie between 1 and max_seq_len={config.max_seq_len}")
    training.layout.validate_for(config, seq_len)
    costs, of_worker = costs_of(config, seq_len), training.memory(config, seq_len)
    if as_json:
        worker = training.to_json(of_worker)
        print(json.dumps({"source": source, "model": config.model_dump(), **costs, "worker": worker}, indent=2))
        return
    console.print(source, style="bold", markup=False, soft_wrap=True)
    for line in describe(config):
        console.print(line)
    total, active = count_parameters(config)
    console.print(f"{total:,} parameters" + (f", of which a token passes {active:,}" if active < total else ""))
    console.print(_table_of_parts(costs), _table_of_bytes(costs), training.table(of_worker))


def find_config(source: str) -> ModelConfig:
    """The architecture of a preset, of a run (its newest commit, or before that its config.toml) or of a folder."""
    if source in PRESETS:
        return ModelConfig.preset(source)
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source} is neither a preset nor a folder; {nearest(source, PRESETS)}")
    try:
        path = locate(folder)
    except UserError as error:
        if (folder / "config.toml").is_file():
            return load_config(str(folder / "config.toml"), {}).model
        raise UserError(
            f"{folder} is neither a run (config.toml), a Hugging Face folder (config.json) nor a dataset (index.json)"
        ) from error
    return config_of(path)


def costs_of(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Parameters, FLOPs a token and bytes, as `--json` prints them; shapes follow the parts of `model.cost`."""
    parts, flops = parameters_by_part(config), forward_flops(config, seq_len)
    activations, state = activation_bytes(config, seq_len), training_state_bytes(config)
    snapshots = FILES * (state.weights + state.optimizer)
    return {
        "seq_len": seq_len,
        "parameters": {**count_parameters(config)._asdict(), "parts": {name: x._asdict() for name, x in parts.items()}},
        "flops_per_token": {
            "forward": sum(flops.values()),
            "backward": 2 * sum(flops.values()),
            "forward_parts": flops,
        },
        "bytes": {
            **state._asdict(),
            "snapshots_on_one_node": snapshots,
            "snapshots_on_several_nodes": 2 * snapshots,  # each stands in for the one before it
            "activations_per_token": activations.total / seq_len,
            "activations_per_token_of_layers": [size / seq_len for size in activations.layers],
            # A convolution's inputs are held from the first token on, however many follow.
            "kv_cache_per_token": cache_bytes(config, 2) - cache_bytes(config, 1),
            "kv_cache": cache_bytes(config, seq_len),
        },
    }


def _table_of_parts(costs: dict[str, Any]) -> Table:
    parameters, flops = costs["parameters"], costs["flops_per_token"]
    table = Table(title=f"Parameters, and FLOPs a token at {costs['seq_len']:,} tokens", title_justify="left")
    for heading in ("part", "parameters", "active", "share", "forward", "backward"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in (*PARTS, SCORES):
        count, forward = parameters["parts"].get(part), flops["forward_parts"].get(part)
        if count or forward:
            held = _counts(count, parameters["total"]) if count else [""] * 3
            table.add_row(part, *held, *(_products(forward) if forward else [""] * 2))
    table.add_section()
    table.add_row("together", *_counts(parameters, parameters["total"]), *_products(flops["forward"]))
    return table


def _counts(count: dict[str, int], total: int) -> list[str]:
    return [short(count["total"], "kMBT"), short(count["active"], "kMBT"), f"{count['total'] / total:.1%}"]


def _products(forward: float) -> list[str]:
    return [short(forward, "kMGTP"), short(2 * forward, "kMGTP")]


def _table_of_bytes(costs: dict[str, Any]) -> Table:
    held = costs["bytes"]
    table = Table("of", title="Memory", title_justify="left")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    for name, size in (
        ("weights, fp32", held["weights"]),
        ("gradients, fp32", held["gradients"]),
        ("optimizer: two moments, fp32", held["optimizer"]),
        ("snapshots in a single node's memory", held["snapshots_on_one_node"]),
        ("snapshots in several nodes' together", held["snapshots_on_several_nodes"]),
        ("activations a token, bf16", held["activations_per_token"]),
        ("KV cache a token, bf16", held["kv_cache_per_token"]),
        (f"KV cache of {costs['seq_len']:,} tokens, bf16", held["kv_cache"]),
    ):
        table.add_row(name, f"{size:,.0f}", binary(size))
    return table
