"""The sections of a RunConfig but for the model: what each setting means, its default and its bounds."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from moray import UserError
from moray.cluster.launchers import Launcher
from moray.data.rows import LongDialogues
from moray.jobs.config.mix import Mix, MixedSource, WeightsFrom
from moray.model.recompute import Recompute


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def absolute(path: str) -> str:
    """A worker elsewhere need not start in this folder; a URL is absolute already."""
    return os.path.abspath(os.path.expanduser(path)) if path and "://" not in path else path


AnyPath = Annotated[str, AfterValidator(absolute)]


class DataSection(Section):
    path: AnyPath = ""
    """A folder made by `moray prepare`."""
    mix: tuple[str, ...] = ()
    """Instead of one, several such folders, each with a name and a weight: web=0.6:DIR,poems=0.4:DIR. Of every 4,096
    sequences a source has exactly its share; one of weight 0 is only validated on. At a resume, weights may change."""
    phases: tuple[str, ...] = ()
    """Other weights of data.mix after so many steps: 2000:web=1,poems=3;2500:poems=1. A source that a phase does not
    name has weight 0 in it; batches that are skipped count as steps."""
    long_dialogues: LongDialogues = "cut"
    """What becomes of dialogues of more than train.seq_len tokens. cut: they lose whole turns, the first ones first,
    as many as it takes; drop: they are left out."""

    @field_validator("mix", mode="before")
    @classmethod
    def _read_mix(cls, value: Any) -> Any:
        entries = re.split(r",(?=[\w-]+=)", value) if isinstance(value, str) and value else value or ()
        sources = sorted(MixedSource.parse(str(entry).strip()) for entry in entries)
        return tuple(str(source._replace(folder=absolute(source.folder))) for source in sources)

    @field_validator("phases", mode="before")
    @classmethod
    def _read_phases(cls, value: Any) -> Any:
        entries = value.split(";") if isinstance(value, str) and value else value or ()
        return tuple(str(WeightsFrom.parse(str(entry).strip())) for entry in entries)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path and self.mix:
            raise UserError(f"data.path={self.path} and {self.told} are both data; leave one out")
        if self.phases and not self.mix:
            raise UserError(f"data.phases={';'.join(self.phases)} are of data.mix, which is missing")
        if self.mix:
            Mix.of(self.mix, self.phases).check()
        return self

    @property
    def mixed(self) -> Mix | None:
        """What data.mix and data.phases say, if they do."""
        return Mix.of(self.mix, self.phases) if self.mix else None

    @property
    def folders(self) -> dict[str, str]:
        """Every source's, by name: that of data.path has the name ''."""
        return self.mixed.folders if self.mixed else {"": self.path}

    @property
    def told(self) -> str:
        """The setting that says where the data are, as it is."""
        return f"data.mix={','.join(self.mix)}" if self.mix else f"data.path={self.path}"

    def going_on_from(self, recorded: Mapping[str, Any], batch: int) -> Self:
        """These data for a run that has a commit before this global batch: up to it, weights are as they were.

        recorded: the section as the commit has it.
        """
        if not self.mixed or not recorded.get("mix"):
            return self
        before = Mix.of(recorded["mix"], recorded["phases"])
        if not before.folders.keys() <= self.mixed.folders.keys():
            return self  # of which it is told where data are compared
        mix, phases = self.mixed.going_on_from(before, batch).texts
        return self.model_copy(update={"mix": mix, "phases": phases})


class TrainSection(Section):
    objective: Literal["pretrain", "sft", "dpo", "ipo", "reward", "distill", "grpo", "ppo"] = "pretrain"
    """What is learnt. pretrain: the next token of texts; sft: the answers in dialogues (`moray finetune`); the rest are
    the methods of `moray align`."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run; the learning rate's schedule ends here."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, instead of steps: as many steps as that takes."""
    global_batch: int = Field(32, ge=1)
    """Sequences of one optimizer step, over all workers; of pairs, twice as many: a chosen and a rejected one each."""
    micro_batch: int = Field(8, ge=1)
    """Most sequences of one forward pass on one worker; the rest of its share is accumulated."""
    seq_len: int = Field(512, ge=1)
    """Tokens of a sequence; where it is not set, no more than model.max_seq_len."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides on the initial weights and on the order of the data."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the matrix products; weights, gradients' reduction and optimizer are float32 either way.

    auto: bfloat16 where all workers' devices have instructions for it; once chosen, it stays. bf16 and fp32 will do."""
    zero_stage: Literal["auto", 1, 3] = "auto"
    """How workers share weights and gradients (ZeRO). 3: each layer's are exchanged with every micro-batch. 1: once a
    step, and meanwhile each has all of them, which is faster. auto: 1 where half of the free memory holds that."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass, instead of kept. selective: what is cheap to compute (norms,
    activation functions, copies), for half the memory of activations or less. full: whole layers, for a tenth of it."""
    compile: bool = False
    """Layers are compiled by torch.compile, in their first step: on GPUs far fewer and larger kernels; on CPUs little
    is gained. Wants a C++ compiler on every node."""
    eval_every: int = Field(100, ge=0)
    """Steps between two passes over the validation split; 0: only at the end."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What becomes of a step whose loss or gradient is not finite, or a spike, twice: it is not applied, and the run
    stops; or skips its batch; or goes back to an older commit and skips all batches since."""
    max_skipped: int = Field(0, ge=0)
    """Most batches that skip and rollback leave out in a row, before the run stops after all."""
    spike_sigmas: float | None = Field(None, gt=0)
    """A loss or gradient norm counts as a spike this many deviations above the median of the last 128 steps; 6 is
    usual, none: never."""
    exact: bool = False
    """Every number of data-parallel workers computes the same bits: gradients are added in one fixed order. Wants
    powers of two: of data-parallel ranks, and of micro-batches in global_batch. Slower, and one thread a worker."""
    audit_every: int = Field(0, ge=0)
    """Steps between two in which other ranks compute a micro-batch again, to find hardware that computes wrongly."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _number(cls, stage: Any) -> Any:
        return int(stage) if isinstance(stage, str) and stage.isdecimal() else stage

    @field_validator("recompute", mode="before")
    @classmethod
    def _word(cls, how: Any) -> Any:
        return "none" if how is None else how  # as the word is read everywhere else

    @field_validator("dtype", mode="before")
    @classmethod
    def _usual_names(cls, name: Any) -> Any:
        if name in ("float16", "fp16", "half", "16"):
            raise UserError(
                f"train.dtype={name} is not offered: its gradients vanish below 6e-8 without loss scaling; "
                "use bfloat16, or float32 where the device has no bf16"
            )
        return {"bf16": "bfloat16", "fp32": "float32"}.get(name, name)


class EvalSection(Section):
    tasks: tuple[AnyPath, ...] = ()
    """Task files that the model is asked while it is trained, separated by commas: those of `moray evaluate`."""
    every: int = Field(0, ge=0)
    """Steps between two times; 0: whenever the validation split is read."""
    limit: int | None = Field(200, ge=1)
    """The most items of each file; none: all."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return () if value is None else tuple(value.split(",")) if isinstance(value, str) else value


class OptimizerSection(Section):
    """AdamW, or Muon."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: matrices within layers (each expert's, too) are moved by their momentum, made orthogonal, at rates that fit
    AdamW's; AdamW moves the rest."""
    lr: float = Field(1e-3, gt=0)
    """Highest learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate over the highest."""
    warmup_steps: int = Field(20, ge=0)
    """Steps in which the rate rises to lr; where it is not set, no more than a fifth of train.steps."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: a cosine to the end, or stable until a linear decay (warmup-stable-decay)."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which wsd decays."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices alone, not of norms."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's two moments between steps. bfloat16 halves them; beta2 must then be at most 0.99."""
    embedding_lr_scale: float = Field(1.0, ge=0)
    """Learning rate of embedding and head over lr."""
    router_lr_scale: float = Field(1.0, ge=0)
    """Learning rate of routers over lr."""
    expert_lr_scale: float = Field(1.0, ge=0)
    """Learning rate of routed experts over lr."""
    clip_norm: float = Field(1.0, gt=0)
    """Highest norm of the gradient of the global batch."""


class LoRASection(Section):
    """Low-rank adapters learn in place of the weights of model.from, which stay as they are (Hu et al., 2021)."""

    rank: int = Field(0, ge=0)
    """Of the adapters; 0: there are none, and all weights learn."""
    alpha: float | None = Field(None, gt=0)
    """What an adapter adds is multiplied with alpha / rank; where it is not set, alpha is twice the rank."""
    targets: tuple[Literal["all", "attention", "dense", "experts", "shared"], ...] = ("all",)
    """Whose matrices have adapters, separated by commas: attention; dense, the feed-forward networks of dense layers;
    experts, each routed one its own; shared, the shared experts. all: those of them that the model has."""

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value


class CheckpointSection(Section):
    every: int = Field(100, ge=1)
    """Steps between two commits; the last step is always committed."""
    keep: int = Field(3, ge=1)
    """Newest commits that are kept."""
    keep_every: int | None = Field(None, ge=1)
    """Commits at multiples of this step are kept for good."""


class RecoverySection(Section):
    snapshot_every: int | Literal["auto"] = "auto"
    """Steps between two copies of the state in memory of its node and of the next one, from which a fault is recovered.

    auto: as often as costs less than 2% of a step; 0: never. Under ray alone, whose workers something outlives."""

    @field_validator("snapshot_every", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if value != "auto" and not str(value).isdecimal():
            raise UserError(f"recovery.snapshot_every={value} must be auto, 0 for none, or a number of steps")
        return value


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _default_launcher() -> Literal["ray", "torchrun"]:
    return "torchrun" if is_under_torchrun() else "ray"


class ClusterSection(Section):
    launcher: Launcher = Field(default_factory=_default_launcher)
    """ray starts and watches the workers; under torchrun, and slurm (tasks of srun), this process is one of them;
    local is this process alone."""
    workers: int | str = 1
    """Worker processes: under ray one for each GPU or CPU slot, under slurm the tasks of srun; torchrun says itself how
    many it has started. MIN:MAX, under ray: as many as there are slots for now, more or fewer when that changes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What workers compute on. auto: GPUs, if the cluster has any when the run starts; cuda waits for them."""
    max_restarts: int = Field(3, ge=0)
    """How often within an hour the group may start again after a fault."""
    heartbeat_timeout_s: float = Field(60.0, gt=0)
    """Most seconds of a worker's silence before it counts as lost. Ten of its usual steps are enough, or 15 s if they
    are shorter; never less than three of its slowest."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """The same before its first steps, whose pace nobody knows yet: loading a commit and the first step may be long."""
    lease_timeout_s: float = Field(20.0, gt=0)
    """Seconds of the driver's silence after which workers end; a node silent for half as long again counts as lost."""
    placement_timeout_s: float = Field(60.0, ge=0)
    """Seconds to wait under ray for enough free slots: at the start, and when a lost node must be replaced."""

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        least, colon, most = str(value).partition(":")
        if not least.isdecimal() or int(least) < 1 or (colon and not most.isdecimal()):
            raise UserError(f"cluster.workers={value} must be a number of at least 1, or MIN:MAX")
        if colon and int(least) > int(most):
            raise UserError(f"cluster.workers={value} must have its minimum first: {most}:{least}")
        return f"{int(least)}:{int(most)}" if colon and int(least) < int(most) else int(least)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.launcher == "local" and self.workers != 1:
            raise UserError(f"cluster.workers={self.workers} must be 1 with cluster.launcher=local; or choose ray")
        if self.launcher == "ray" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and is_under_torchrun():
            raise UserError(
                "cluster.launcher=ray, but torchrun has started this process as one of several workers; choose torchrun"
            )
        if self.launcher != "ray" and self.is_elastic:
            raise UserError(
                f"cluster.workers={self.workers} must be one number with cluster.launcher={self.launcher}, which "
                "starts them all at once; or choose ray"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        return self.min_workers < self.max_workers

    @property
    def min_workers(self) -> int:
        return int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        return int(str(self.workers).rpartition(":")[2])

    @property
    def world_size(self) -> int:
        """Of all workers that are asked for; what torchrun has started is asked for."""
        if self.launcher == "torchrun":
            return int(os.environ.get("WORLD_SIZE", self.max_workers))
        return self.max_workers


class RunSection(Section):
    dir: AnyPath = ""
    """The folder that the run lives in; the same command resumes what it holds."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Who else gets every step's numbers, separated by commas; none: nobody but metrics.jsonl."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return () if value is None else tuple(dict.fromkeys(value.split(","))) if isinstance(value, str) else value
