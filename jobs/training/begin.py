"""What a worker works on, and from where it goes on: built once, before its first step."""

import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moray import UserError
from moray.cluster.events import EventLog
from moray.cluster.worker import WorkerContext
from moray.data.dataset import Dataset
from moray.jobs.config.run import RunConfig
from moray.jobs.models.weights import fill_shards
from moray.jobs.runs.folder import check_same_run
from moray.jobs.runs.watcher import describe
from moray.jobs.training.dtype import choose_dtype
from moray.jobs.training.metrics import worker_peak
from moray.jobs.training.optimizer import build_optimizer, older_names, share_step, training_state
from moray.jobs.training.vitals import Vitals
from moray.model import Decoder
from moray.model.accounting.work import Work
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.generations import SEEN_WITHIN_S, sees_generation
from moray.parallel.gradients import world_sum
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards


class Pulse:
    """This worker's heartbeat: `beat` after each step, `again` within long work between two, lest it count as hung."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._last: dict[str, Any] = {"step": 0}
        self._told: dict[str, Any] = {}

    def beat(self, row: dict[str, Any]) -> None:
        self._last = row
        self.again()

    def again(self) -> None:
        # The same words: a driver that has not heard them yet must not miss the step's numbers.
        self._context.heartbeat(**(self._last | self._told))

    def tell(self, line: str) -> None:
        """A line for whoever watches, which goes with every beat from the next one on."""
        self._told = {"told": line}


@dataclass
class Training:
    """What the loop works on. `step` counts the optimizer steps done; all else but it keeps its identity."""

    context: WorkerContext
    pulse: Pulse
    vitals: Vitals
    config: RunConfig
    layout: Layout
    dataset: Dataset
    decoder: Decoder
    optimizer: torch.optim.AdamW
    checkpointer: Checkpointer
    lanes: range
    work: Work
    peak_flops: float
    step: int = 0

    @property
    def is_first_rank(self) -> bool:
        return self.context.rank == 0


def set_up(context: WorkerContext, config: RunConfig) -> Training:
    """Builds model and optimizer under this group's layout and fills them from the newest commit, if there is one."""
    context.enter("opening")
    layout = config.layout.resolve(context.world_size)
    dataset = _open_storage(context, config)
    dtype = choose_dtype(config.train, context.device, None if context.rank else checkpoints_of(config))
    compute_dtype = getattr(torch, dtype)
    context.enter("building")
    decoder = build_decoder(
        config.model,
        layout.meshes(context.device.type),
        dtype=torch.float32,
        compute_dtype=compute_dtype,
    )
    # Of each rank its own, for what one measures while others are busy is lower: a restart must not change the MFU.
    peak = context.once(
        f"peak of {context.device} in {dtype}, rank {context.local_rank}",
        lambda: worker_peak(context.device, compute_dtype, context.local_world_size),
    )
    share = config.train.global_batch // layout.dp
    dp_rank = layout.dp_rank(context.rank)
    events = EventLog(Path(config.run.dir) / "events.jsonl")
    pulse = Pulse(context)
    on_event = partial(note_event, events, pulse, context.generation)
    training = Training(
        context=context,
        pulse=pulse,
        vitals=Vitals(context, on_event),
        config=config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})}),
        layout=layout,
        dataset=dataset,
        decoder=decoder,
        optimizer=build_optimizer(decoder, config.optimizer),
        checkpointer=Checkpointer(
            checkpoints_of(config),
            generation=context.generation,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            on_event=on_event,
            on_wait=pulse.again,
        ),
        lanes=range(dp_rank * share, (dp_rank + 1) * share),
        work=Work.of(config.model),
        peak_flops=world_sum(torch.tensor(peak)).item(),
    )
    context.enter("loading")
    resume(training, events)
    return training


def _open_storage(context: WorkerContext, config: RunConfig) -> Dataset:
    """Raises UserError naming this machine where it does not see the run or the data that the others see."""
    here = socket.gethostname()
    if not sees_generation(checkpoints_of(config), context.generation):
        raise UserError(
            f"on {here}: run.dir={config.run.dir} is not the folder that this run was started in, or shows more than "
            f"{SEEN_WITHIN_S:g} s late what others write; it must lie on storage that all nodes share"
        )
    try:
        return Dataset.open(config.data.path)
    except UserError as error:
        raise UserError(f"on {here}: {error}") from None


def resume(training: Training, events: EventLog) -> None:
    """Puts the newest whole commit into place, else the weights to start with.

    Raises UserError if the commit is of another run, or ended elsewhere.
    """
    state = training_state(training.decoder, training.optimizer)
    commit = training.checkpointer.load(state, older_names(training.decoder))
    share_step(training.optimizer)
    if commit is None and training.config.weights_from:
        fill_shards(training.decoder, Path(training.config.weights_from))
    elif commit is None:
        initialise_shards(training.decoder, training.config.train.seed)
    position = 0
    if commit:
        check_same_run(commit, training.config, training.dataset)
        training.step, position = commit.step, commit.manifest.metadata["data"]["position"]
    if training.is_first_rank:
        digest = commit.manifest.digest if commit else None
        found = {
            "step": training.step,
            "position": position,
            "layout": str(training.layout),
            "dtype": training.config.train.dtype,
            "digest": digest,
        }
        events.write("resume" if commit else "begin", generation=training.context.generation, **found)


def note_event(events: EventLog, pulse: Pulse, generation: int, kind: str, fields: dict[str, Any]) -> None:
    """Into the log, out of which the driver tells it; by heartbeat where the disk has no room for that either."""
    if not events.write(kind, generation=generation, **fields) and (line := describe(kind, fields)):
        pulse.tell(line)


def checkpoints_of(config: RunConfig) -> Path:
    return Path(config.run.dir) / "checkpoints"
