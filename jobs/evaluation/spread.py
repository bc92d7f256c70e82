"""`moray evaluate` over several workers, under any layout: what one process finds, for models that it cannot hold."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE
from moray.cluster.group import Group, Hooks
from moray.cluster.launch import launch
from moray.cluster.launchers import Launcher
from moray.cluster.worker import WorkerContext
from moray.jobs.evaluation.evaluate import Asked, report_of, template_of, with_overlap
from moray.jobs.evaluation.ranks import Ranks
from moray.jobs.evaluation.scoring import Model
from moray.jobs.generation.generate import tokenizer_for
from moray.jobs.models.weights import config_of, fill_shards, open_weights, open_whole
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder


@dataclass(frozen=True)
class Spread:
    """How many workers, who starts them, and how they share the model."""

    workers: int = 1
    launcher: Launcher = "ray"
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class _Order:
    """What a worker is told. model: a commit or a Hugging Face folder."""

    model: Path
    asked: Asked
    layout: Layout


def evaluate_spread(
    source: Path, asked: Asked, spread: Spread, on_refused: Callable[[str], None]
) -> dict[str, Any] | None:
    """As `evaluate`; None where this process is another rank than the first. Raises UserError."""
    weights = open_whole(source, on_refused)
    layout = spread.layout.resolve(spread.workers)
    layout.validate_for(weights.config, layout.tp)
    found: list[dict[str, Any]] = []

    def on_status(rank: int, step: int, status: dict[str, Any]) -> None:
        if "report" in status:
            found[:] = [status["report"]]

    group = Group(spread.workers, max_restarts=0)
    order = _Order(weights.path, replace(asked, overlap=None), layout)
    launch(_evaluate, order, spread.launcher, group, Hooks(on_status=on_status))
    return with_overlap(found[0], asked) if found else None  # which needs no model, and takes its time


def _evaluate(context: WorkerContext, order: _Order) -> int:
    with context.process_group():
        layout, config = order.layout, config_of(order.model)
        if context.world_size != layout.world_size:
            raise UserError(f"workers={layout.world_size}, but {context.world_size} were started; say how many")
        decoder = build_decoder(
            config, layout.meshes(context.device.type), dtype=torch.float32, compute_dtype=torch.float32
        )
        fill_shards(decoder, order.model)
        ranks = Ranks(layout.dp_rank(context.rank), layout.dp, layout.tp, lambda: context.heartbeat(0))
        weights = open_weights(order.model)
        template = template_of(weights.tokenizer)
        model = Model(decoder.eval(), tokenizer_for(weights), order.asked.batch_tokens, ranks, template)
        report = report_of(model, weights, order.asked)
        context.heartbeat(1, **({"report": report} if context.rank == 0 else {}))
    return EXIT_DONE
