"""What a worker works on, and from where it goes on: built once, before its first step."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray import UserError
from moray.cluster.events import EventLog
from moray.cluster.host_memory import keep_freed_memory
from moray.cluster.worker import WorkerContext
from moray.data.sources import Sources
from moray.jobs.alignment.critic import Critic, build_critic
from moray.jobs.alignment.frozen import Frozen, build_frozen, load_frozen
from moray.jobs.alignment.objectives import objective_of
from moray.jobs.alignment.reinforcement import Reinforcement
from moray.jobs.config.run import RunConfig
from moray.jobs.config.sections import TrainSection
from moray.jobs.models.base import Base
from moray.jobs.models.weights import fill_shards
from moray.jobs.runs.folder import check_same_run
from moray.jobs.runs.words import describe
from moray.jobs.training.adapters import check_base, load_base, what_learns
from moray.jobs.training.choices import decided
from moray.jobs.training.memory import warn_of_too_little
from moray.jobs.training.metrics import worker_peak
from moray.jobs.training.optimizer import build_optimizer, older_names, share_step, training_state
from moray.jobs.training.recovery import make_room
from moray.jobs.training.vitals import Vitals
from moray.model import Decoder
from moray.model.accounting.work import Work
from moray.model.objective import Objective
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import Commit
from moray.parallel.checkpoint.generations import SEEN_WITHIN_S, sees_generation
from moray.parallel.checkpoint.snapshots import Snapshots
from moray.parallel.compiled import check_compiler, compile_layers
from moray.parallel.exact import GradientTree
from moray.parallel.gradients import world_sum
from moray.parallel.layout import Layout, Meshes
from moray.parallel.placement import adopt
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards
from moray.parallel.witness import Witness

WINDOW = 128
"""Applied steps that a spike is measured against."""


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
    """What the loop works on. Below `step` stands what changes: the rest keeps its identity.

    copy: the ranks that hold the model once. expert_load (L MoE layers, E experts): tokens since experts were placed,
    where they are placed by them.

    base: what adapters are trained beside, where they are what learns. frozen: other models that stay as they are, by
    what they are; beside: which weights these have. rl: what learning from its own answers takes. critic: PPO's.

    step: optimizer steps done. position: of the stream, behind the batch of the last one. committed: the newest step
    that was. applied: loss and gradient norm of the newest steps. skipped: the positions passed over since, and why.
    """

    context: WorkerContext
    pulse: Pulse
    vitals: Vitals
    config: RunConfig
    layout: Layout
    copy: dist.ProcessGroup
    sources: Sources
    decoder: Decoder
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    lanes: list[int]
    work: Work
    peak_flops: float
    objective: Objective[Any]
    witness: Witness | None
    reduction: Reduction
    on_event: Callable[[str, dict[str, Any]], None]
    base: Base | None = None
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    beside: Mapping[str, Base] = field(default_factory=dict)
    rl: Reinforcement | None = None
    critic: Critic | None = None
    snapshots: Snapshots | None = None
    step: int = 0
    position: int = 0
    committed: int = 0
    applied: list[tuple[float, float]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    expert_load: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The tensors that commits and snapshots hold: once they are filled, `share_step` is to be called."""
        return training_state(self.decoder, self.optimizer) | (self.critic.state if self.critic else {})

    def share_step(self) -> None:
        for optimizer in (self.optimizer, *([self.critic.optimizer] if self.critic else [])):
            share_step(optimizer)

    def close(self) -> None:
        """Ends what it has started."""
        if self.rl:
            self.rl.judge.close()

    def note(self, kind: str, **fields: Any) -> None:
        """An event of the whole group, which all ranks know of and rank 0 writes down."""
        if self.is_first_rank:
            self.on_event(kind, fields)

    def note_applied(self, loss: float, norm: float, position: int) -> list[dict[str, Any]]:
        """Counts a step that ended at `position`; returns what was skipped before it."""
        self.step, self.position = self.step + 1, position
        self.applied = [*self.applied[1 - WINDOW :], (loss, norm)]
        skipped, self.skipped = self.skipped, []
        return skipped

    @property
    def is_first_rank(self) -> bool:
        return self.context.rank == 0


def _built(config: RunConfig, meshes: Meshes, compute_dtype: torch.dtype, stage: Stage) -> Decoder:
    decoder = build_decoder(
        config.learnt,
        meshes,
        dtype=torch.float32,
        compute_dtype=compute_dtype,
        stage=stage,
        recompute=config.train.recompute,
        lora=config.adapters,
    )
    if config.train.compile:
        check_compiler()
        compile_layers(decoder, meshes.dense.device_type, compute_dtype)
    return decoder


def set_up(context: WorkerContext, config: RunConfig) -> Training:
    """Builds model and optimizer under this group's layout and fills them from the newest commit, if there is one."""
    context.enter("opening")
    if context.device.type == "cpu":
        keep_freed_memory()
    _compute_reproducibly(config.train)
    layout = config.layout_on(context.world_size)
    sources = _open_storage(context, config)
    commits = None if context.rank else checkpoints_of(config)
    events, pulse = EventLog(Path(config.run.dir) / "events.jsonl"), Pulse(context)
    on_event = partial(note_event, events, pulse, context.generation)
    config = decided(config, context, layout, commits)
    warn_of_too_little(config, context, layout, on_event)
    compute_dtype: torch.dtype = getattr(torch, config.train.dtype)
    stage: Stage = 1 if config.train.zero_stage == 1 else 3
    context.enter("building")
    meshes = layout.meshes(context.device.type)
    decoder = _built(config, meshes, compute_dtype, stage)
    frozen = build_frozen(config.frozen, meshes, compute_dtype, stage)
    # Of each rank its own, for what one measures while others are busy is lower: a restart must not change the MFU.
    peak = context.once(
        f"peak of {context.device} in {config.train.dtype}, rank {context.local_rank}",
        lambda: worker_peak(context.device, compute_dtype, context.local_world_size),
    )
    optimizer = build_optimizer(
        decoder, config.optimizer, fused=not config.train.exact, copy=meshes.copy, dtype=compute_dtype
    )
    training = Training(
        context=context,
        pulse=pulse,
        vitals=Vitals(context, on_event),
        config=config,
        layout=layout,
        copy=meshes.copy,
        sources=sources,
        decoder=decoder,
        optimizer=optimizer,
        checkpointer=Checkpointer(
            checkpoints_of(config),
            generation=context.generation,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            on_event=on_event,
            on_wait=pulse.again,
        ),
        lanes=lanes_of(config.train, layout, layout.dp_rank(context.rank)),
        work=Work.of(config.model, config.adapters),
        peak_flops=world_sum(torch.tensor(peak)).item(),
        objective=objective_of(config, frozen),
        frozen=frozen,
        rl=Reinforcement.of(config) if config.is_reinforcement else None,
        critic=build_critic(config, meshes, compute_dtype, stage),
        witness=Witness(decoder) if config.train.audit_every else None,
        reduction=GradientTree(decoder, meshes) if config.train.exact else Reduction(decoder, meshes, stage),
        on_event=on_event,
    )
    training.snapshots = make_room(context, config, training.state(), on_event)
    context.enter("loading")
    resume(training, events)
    return training


def lanes_of(train: TrainSection, layout: Layout, dp_rank: int) -> list[int]:
    """Those of the global batch that a data-parallel rank computes."""
    return layout.lanes(dp_rank, train.global_batch, train.micro_batch if train.exact else None)


def _compute_reproducibly(train: TrainSection) -> None:
    """Where it is asked for: kernels of a GPU that add in any order do not give the same bits twice."""
    if not (train.audit_every or train.exact):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of which cuBLAS takes note as it begins
    torch.use_deterministic_algorithms(True, warn_only=True)
    if train.exact:
        torch.set_num_threads(1)  # their number decides the order in which products are summed


def _open_storage(context: WorkerContext, config: RunConfig) -> Sources:
    """Raises UserError naming this machine where it does not see the run or the data that the others see."""
    here = socket.gethostname()
    if not sees_generation(checkpoints_of(config), context.generation):
        raise UserError(
            f"on {here}: run.dir={config.run.dir} is not the folder that this run was started in, or shows more than "
            f"{SEEN_WITHIN_S:g} s late what others write; it must lie on storage that all nodes share"
        )
    try:
        return Sources.open(config.data.folders)
    except UserError as error:
        raise UserError(f"on {here}: {error}") from None


def resume(training: Training, events: EventLog) -> None:
    """Puts the newest snapshot or whole commit into place, else the weights to start with.

    Raises UserError if the commit is of another run, or ended elsewhere.
    """
    source: str | None = "memory"
    config = training.config
    training.base = load_base(training.decoder, config, checkpoints_of(config))
    training.beside = load_frozen(training.frozen, checkpoints_of(config))
    digest = load_snapshot(training)
    if digest is None:
        commit = load_commit(training)
        source = "commit" if commit else None
        if commit:
            digest = commit.manifest.digest
            check_same_run(commit, config, training.sources)
            go_on_from(training, commit.step, commit.manifest.metadata)
        elif config.weights_from and not training.base:
            fill_shards(training.decoder, Path(config.weights_from), config.train.seed)
        else:
            initialise_shards(training.decoder, config.train.seed)
        if not commit and training.critic:
            training.critic.begin(config)
        if commit and [*config.data.phases] != commit.manifest.metadata["config"]["data"].get("phases", []):
            training.note("mixture", step=training.step, position=training.position, phases=config.data.phases)
        if not commit and (told := what_learns(config)):
            training.note("lora", **told)
    found = {
        "step": training.step,
        "position": training.position,
        "layout": str(training.layout),
        "dtype": config.train.dtype,
        "zero_stage": config.train.zero_stage,
        "digest": digest or None,
        "source": source,
        "snapshot_bytes": training.snapshots.most_bytes if training.snapshots else 0,
    }
    if training.is_first_rank:
        events.write("resume" if source else "begin", generation=training.context.generation, **found)


def load_snapshot(training: Training) -> str | None:
    """Goes on from what the generation before left in memory, if that is newer than the newest commit.

    Returns that commit's digest, "" where there is none yet, None where there is no such snapshot.
    """
    if not training.snapshots:
        return None
    newest = training.checkpointer.go_on_from_newest()
    record = training.snapshots.load(training.state(), at_least=newest.step)
    if record is None:
        training.snapshots.clear()
        return None
    training.share_step()
    training.committed = newest.step
    go_on_from(training, record.step, record.metadata)
    return newest.digest or ""


def load_commit(training: Training, among: Callable[[int], bool] = lambda step: True) -> Commit | None:
    """Fills weights and optimizer from the newest whole commit of these steps, if there is one."""
    commit = training.checkpointer.load(training.state(), among, older_names(training.decoder))
    training.committed = commit.step if commit else 0
    training.share_step()
    return commit


def go_on_from(training: Training, step: int, metadata: dict[str, Any]) -> None:
    """Takes up what a commit or snapshot holds beside the tensors."""
    check_base(training.config, training.base, metadata)
    training.step, training.position = step, metadata["data"]["position"]
    training.applied = [(loss, norm) for loss, norm in metadata.get("applied", [])]
    adopt(training.decoder, metadata.get("placement", {}))
    loads = metadata.get("expert_load") if training.layout.placement == "balanced" else None
    training.expert_load = None if loads is None else torch.tensor(loads, dtype=torch.float64)


def note_event(events: EventLog, pulse: Pulse, generation: int, kind: str, fields: dict[str, Any]) -> None:
    """Into the log, out of which the driver tells it; by heartbeat where the disk has no room for that either."""
    if not events.write(kind, generation=generation, **fields) and (line := describe(kind, fields)):
        pulse.tell(line)


def checkpoints_of(config: RunConfig) -> Path:
    return Path(config.run.dir) / "checkpoints"
