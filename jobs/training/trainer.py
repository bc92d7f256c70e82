"""The training loop, as one worker runs it: read it from top to bottom as the story of a step."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moray.cluster.devices import peak_memory_bytes
from moray.cluster.exit_codes import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SUPERSEDED
from moray.cluster.worker import WorkerContext
from moray.data.dataset import Dataset
from moray.data.stream import Batch, evaluation_batches
from moray.jobs.alignment.rl_step import learn_from, validate_policy
from moray.jobs.config.run import RunConfig
from moray.jobs.training.answers import answer_some
from moray.jobs.training.bad_steps import STEADIER, pass_over, what_is_wrong
from moray.jobs.training.batches import batches_of, micro_batches
from moray.jobs.training.begin import Training, checkpoints_of, set_up
from moray.jobs.training.commit import commit, finish_commits, progress
from moray.jobs.training.metrics import SAMPLES, MetricsLog, expert_metrics
from moray.jobs.training.optimizer import set_learning_rate
from moray.jobs.training.placing import note_load, place_experts
from moray.jobs.training.recovery import forgotten_if_wrong
from moray.jobs.training.schedule import learning_rate
from moray.jobs.training.tasks import ask_tasks
from moray.jobs.training.wrong_results import Computed, check_alike, compare, recomputed
from moray.model.objective import MicroBatch
from moray.parallel.checkpoint.generations import SupersededError, newest_generation
from moray.parallel.control_plane import meet
from moray.parallel.gradients import (
    accumulate_gradients,
    clip_gradients,
    drop_gradients,
    evaluate,
    update_routing_bias,
    world_sum,
)


def train(context: WorkerContext, config: RunConfig) -> int:
    """Trains from the newest commit (or the start) to the last step, or until it must leave. Every rank runs it."""
    with context.process_group():
        try:
            return agree_to_leave(context, config) or run_steps(set_up(context, config))
        except SupersededError:  # all ranks raise it: its commit was refused
            return EXIT_SUPERSEDED


def run_steps(training: Training) -> int:
    """The steps that are left, with all that comes between them; returns the exit code."""
    context, config, every = training.context, training.config, training.config.checkpoint.every
    first, started = training.step, time.perf_counter()
    leaving = agree_to_leave(context, config)
    log = None
    if training.is_first_rank:
        log = MetricsLog(Path(config.run.dir), training.step, context.generation)
    batches = batches_of(training)
    with closing(batches), closing(training), forgotten_if_wrong(training.snapshots):
        while training.step < config.train.steps and leaving is None:
            began = time.perf_counter()
            context.enter("step", is_long=False)
            row = next_step(training, batches)
            row |= speed(training, row, time.perf_counter() - began)
            row |= training.vitals.read(training.step)
            last = training.step == config.train.steps
            leaving = agree_to_leave(context, config)
            if leaving is None and (last or is_due(training.step, config.train.eval_every)):
                context.enter("validation")
                row |= validate(training)
                if config.train.objective == "sft":
                    row |= answer_some(training)
                leaving = agree_to_leave(context, config)
            every_tasks = config.eval.every or config.train.eval_every
            if config.eval.tasks and leaving is None and (last or is_due(training.step, every_tasks)):
                context.enter("tasks")
                row |= ask_tasks(training)
                leaving = agree_to_leave(context, config)
            if leaving == EXIT_SUPERSEDED:
                break
            if log:
                log.write(row)
            if not last and is_due(training.step, every):
                place_experts(training)
            if training.snapshots and not (last or leaving) and training.snapshots.is_due(training.step):
                training.snapshots.take(training.step, training.state(), progress(training, row), row["seconds"])
            # One that a fault cut off is made up for: a snapshot may be of a later step.
            if last or leaving or training.step // every > training.committed // every:
                context.enter("commit")
                commit(training, row, log)
            pace_s = (time.perf_counter() - started) / max(training.step - first, 1)
            left_s = (config.train.steps - training.step) * pace_s
            row.pop("answers", None)  # too long for a heartbeat
            training.pulse.beat(row | {"left_s": left_s} if training.is_first_rank else {"step": training.step})
    context.enter("leaving")
    if training.snapshots:
        training.snapshots.finish()
    finish_commits(training)
    # Schedulers take the first process that ends for the end of its group, and rank 0 may still have old commits to
    # remove: the others show meanwhile that they live.
    meet(training.pulse.again)
    if leaving == EXIT_SUPERSEDED:
        return EXIT_SUPERSEDED
    return EXIT_DONE if training.step >= config.train.steps else EXIT_INTERRUPTED


def next_step(training: Training, batches: Iterator[Any]) -> dict[str, Any]:
    """The next step that is applied, after those that are passed over."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        with training.vitals.measure(training.step + 1, fetching_s=time.perf_counter() - began):
            row = learn_from(training, training.rl, batch) if training.rl else take_step(training, batch)
        if row:
            return row
        training.context.enter("step", is_long=False)
        training.pulse.again()


def take_step(training: Training, batch: Batch) -> dict[str, Any] | None:
    """One optimizer step on one global batch: forward, backward, combine, clip, check, update; None: it was bad."""
    config, decoder = training.config, training.decoder
    decoder.train()
    losses, norm = found = compute(training, batch)
    if why := what_is_wrong(losses.loss, norm, training.applied, config.train.spike_sigmas):
        drop_gradients(decoder)
        check_alike(training, why, found, compute(training, batch))
        pass_over(training, batch, why)
        return None
    rate = learning_rate(training.step, config.train.steps, config.optimizer)
    set_learning_rate(training.optimizer, rate)
    training.optimizer.step()
    training.optimizer.zero_grad()
    load = update_routing_bias(decoder)
    note_load(training, load)
    skipped = training.note_applied(losses.loss, norm, batch.first + config.train.global_batch)
    return {
        "step": training.step,
        **losses.values,
        "tokens": losses.tokens,
        "flops": losses.flops,
        "positions": [batch.first, training.position],
        **({"skipped": skipped} if skipped else {}),
        "grad_norm": norm,
        "lr": rate,
        **expert_metrics(load, config.model.moe, sampled=is_due(training.step, -(-config.train.steps // SAMPLES))),
        "generation": training.context.generation,
        "layout": str(training.layout),
    }


def compute(training: Training, batch: Batch) -> Computed:
    """The losses of a global batch, and the norm of its gradient, which is clipped then; audited when that is due."""
    pieces = micro_batches(training, batch, training.lanes)
    is_audited = is_due(training.step + 1, training.config.train.audit_every)
    second_WX = recomputed(training, batch, pieces, groups=1) if is_audited else None
    losses = accumulate_gradients(
        training.decoder, pieces, training.reduction, training.witness, objective=training.objective
    )
    if second_WX is not None:
        compare(training, batch, pieces, losses.own_MX, second_WX)
    max_norm, exact = training.config.optimizer.clip_norm, training.config.train.exact
    return losses, clip_gradients(training.decoder.parameters(), max_norm, exact=exact)


def validate(training: Training) -> dict[str, float]:
    """The objective's loss over the whole validation split, and what else it tells of it; nothing where asked to stop
    on the way. Of several sources, over those of all, and of each.

    Raises FloatingPointError where it is not finite: the last update broke the weights, and no loss has told yet.
    """
    config = training.config
    if training.rl:
        return validate_policy(training, training.rl)
    was_stopped = False

    def pieces(dataset: Dataset) -> Iterator[MicroBatch]:
        nonlocal was_stopped
        for batch in evaluation_batches(
            dataset,
            "validation",
            seq_len=config.train.seq_len,
            global_batch=config.train.global_batch,
            lanes=training.lanes,
            long_dialogues=config.data.long_dialogues,
        ):
            yield from micro_batches(training, batch, training.lanes)
            training.pulse.again()
            if was_stopped := agree_to_leave(training.context, config) is not None:
                return

    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, dataset in training.sources.datasets.items():
        found[name] = evaluate(training.decoder, pieces(dataset), training.objective)
        if was_stopped:
            return {}
    told = {}
    for metric in training.objective.held_out:
        totals = {name: of_source[metric] for name, of_source in found.items()}
        total, count = map(math.fsum, zip(*totals.values(), strict=True))
        told[f"validation_{metric}"] = total / (count or 1)
        told |= {f"validation_{metric}/{name}": total / (count or 1) for name, (total, count) in totals.items() if name}
    if not math.isfinite(loss := told["validation_loss"]):
        raise FloatingPointError(
            f"step {training.step}: validation loss {loss}; the step broke the weights and is not committed. {STEADIER}"
        )
    return told


def speed(training: Training, row: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Tokens a second, those that teach and all that were computed; MFU; and memory. Of answers that the model writes
    itself, those that teach.

    MFU is the share of the measured matmul peak of all workers that goes into what the architecture asks for: real
    tokens, and attention within documents.
    """
    config = training.config
    sides = 2 if training.sources.kind == "preference" else 1
    processed = config.train.global_batch * config.train.seq_len * sides
    return {
        "seconds": seconds,
        "tokens_per_second": row["tokens"] / seconds,
        "processed_tokens_per_second": (row["tokens"] if training.rl else processed) / seconds,
        "mfu": row["flops"] / seconds / training.peak_flops,
        "memory_bytes": peak_memory_bytes(training.context.device),
    }


def agree_to_leave(context: WorkerContext, config: RunConfig) -> int | None:
    """The exit code with which all ranks leave after the same step; None: they go on.

    They leave when any of them was asked to stop, and when another attempt has taken the run over.
    """
    is_superseded = context.rank == 0 and newest_generation(checkpoints_of(config)) > context.generation
    stops, superseded = world_sum(torch.tensor([float(context.should_stop()), float(is_superseded)])).tolist()
    return EXIT_SUPERSEDED if superseded else EXIT_INTERRUPTED if stops else None


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) comes after this one."""
    return every > 0 and step % every == 0
