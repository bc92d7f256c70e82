"""RunConfig: everything a training run depends on. Command line over recipe over preset over default."""

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from moray import UserError
from moray.cluster.group import Group
from moray.cluster.launchers import Launcher
from moray.jobs.config.nearest import nearest
from moray.jobs.models.weights import check_changes, config_of, locate
from moray.model import ModelConfig
from moray.model.config.mistakes import in_one_line
from moray.model.config.moe import MoEConfig
from moray.model.config.parts import merge
from moray.model.presets import preset_fields
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.layout import Layout

DEFAULT_PRESET = "demo-moe"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _absolute(path: str) -> str:
    """A worker elsewhere need not start in this folder; a URL is absolute already."""
    return os.path.abspath(os.path.expanduser(path)) if path and "://" not in path else path


AnyPath = Annotated[str, AfterValidator(_absolute)]


class DataSection(Section):
    path: AnyPath = ""
    """A folder made by `moray prepare`."""


class TrainSection(Section):
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run; the learning rate's schedule ends here."""
    global_batch: int = Field(32, ge=1)
    """Sequences of one optimizer step, over all workers."""
    micro_batch: int = Field(8, ge=1)
    """Most sequences of one forward pass on one worker; the rest of its share is accumulated."""
    seq_len: int = Field(512, ge=1)
    """Tokens of a sequence; where it is not set, no more than model.max_seq_len."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides on the initial weights and on the order of the data."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the matrix products; weights, gradients' reduction and optimizer are float32 either way.

    auto: bfloat16 where all workers' devices have instructions for it; once chosen, it stays. bf16 and fp32 will do."""
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

    @field_validator("dtype", mode="before")
    @classmethod
    def _usual_names(cls, name: Any) -> Any:
        if name in ("float16", "fp16", "half", "16"):
            raise UserError(
                f"train.dtype={name} is not offered: its gradients vanish below 6e-8 without loss scaling; "
                "use bfloat16, or float32 where the device has no bf16"
            )
        return {"bf16": "bfloat16", "fp32": "float32"}.get(name, name)


class OptimizerSection(Section):
    """AdamW."""

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
    clip_norm: float = Field(1.0, gt=0)
    """Highest norm of the gradient of the global batch."""


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


def _default_launcher() -> Literal["ray", "torchrun"]:
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "ray"


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


def _default(section: type[Section], name: str) -> int:
    value: int = section.model_fields[name].default
    return value


class RunSection(Section):
    dir: AnyPath = ""
    """The folder that the run lives in; the same command resumes what it holds."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Who else gets every step's numbers, separated by commas; none: nobody but metrics.jsonl."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return () if value is None else tuple(dict.fromkeys(value.split(","))) if isinstance(value, str) else value


class RunConfig(Section):
    """Everything a training run depends on."""

    weights_from: AnyPath = ""
    """Set as `model.from`: the Hugging Face folder, run or commit whose architecture and weights it starts with."""
    model: ModelConfig = ModelConfig.preset(DEFAULT_PRESET)
    data: DataSection = DataSection()
    layout: Layout = Layout()
    train: TrainSection = Field(TrainSection(), validate_default=True)
    optimizer: OptimizerSection = Field(OptimizerSection(), validate_default=True)
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    run: RunSection = RunSection()

    @field_validator("train", "optimizer", mode="before")
    @classmethod
    def _fit_defaults(cls, section: Any, known: ValidationInfo) -> Any:
        """A default gives way where it would contradict what is set. What was wrong before is not known here."""
        stated = section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section
        model, train = known.data.get("model"), known.data.get("train")
        if known.field_name == "train" and model:
            return {"seq_len": min(_default(TrainSection, "seq_len"), model.max_seq_len)} | stated
        if known.field_name == "optimizer" and train:
            return {"warmup_steps": min(_default(OptimizerSection, "warmup_steps"), train.steps // 5)} | stated
        return stated

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.path:
            raise UserError("data.path is missing: the folder that `moray prepare` made")
        if not self.run.dir:
            raise UserError("run.dir is missing: the folder that the run shall live in")
        if self.train.seq_len > self.model.max_seq_len:
            raise UserError(
                f"train.seq_len={self.train.seq_len} must be at most model.max_seq_len={self.model.max_seq_len}"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be at most train.steps={self.train.steps}"
            )
        self._check_bounds()
        if self.model.moe:
            self._check_router_learns(self.model.moe)
        if not self.cluster.is_elastic:
            self.check_layout(self.resolved_layout)
        elif not self._arranges(self.cluster.min_workers):
            fit = [n for n in range(1, self.cluster.max_workers + 1) if self._arranges(n)]
            raise UserError(
                f"cluster.workers={self.cluster.workers}: no layout of {self.cluster.min_workers} workers suits the "
                f"model and train.global_batch={self.train.global_batch}; these numbers do: {fit}"
            )
        return self

    def check_layout(self, layout: Layout) -> None:
        """Raises UserError naming what to change where a resolved layout suits neither model nor global batch."""
        layout.validate_for(self.model, self.train.seq_len)
        if self.train.global_batch % layout.dp:
            nearest = round(self.train.global_batch / layout.dp) * layout.dp or layout.dp
            raise UserError(
                f"train.global_batch={self.train.global_batch} must be a multiple of the {layout.dp} data-parallel "
                f"ranks of layout {layout}; try {nearest}"
            )
        if self.train.audit_every and layout.dp <= layout.span:
            raise UserError(
                f"train.audit_every={self.train.audit_every} needs others who can compute the same: layout {layout} "
                "has no second group of data-parallel ranks; take twice the workers, smaller degrees, or 0"
            )
        if self.model.moe:
            self._check_routing_groups(self.model.moe, layout)
        if self.train.exact:
            self._check_exact(layout)

    def arrange(self, slots: int) -> Layout | None:
        """The layout for at most so many workers; None: there is none. Where their number is fixed, it is the one."""
        if not self.cluster.is_elastic:
            return self.resolved_layout if slots >= self.cluster.world_size else None
        return self.layout.fit(min(slots, self.cluster.max_workers), self._suits)

    def layout_on(self, world_size: int) -> Layout:
        """That of a group of exactly so many workers. Raises UserError where there is none."""
        layout = self.arrange(world_size) if self.cluster.is_elastic else None
        return layout or self.layout.resolve(world_size)

    def _arranges(self, workers: int) -> bool:
        """Whether there is a layout for exactly so many."""
        layout = self.arrange(workers)
        return layout is not None and layout.world_size == workers

    def _suits(self, layout: Layout) -> bool:
        try:
            self.check_layout(layout)
        except UserError:
            return False
        return True

    @property
    def group(self) -> Group:
        """What is asked of the launcher."""
        asked = self.cluster.model_dump(exclude={"launcher", "workers"})
        return Group(self.cluster.max_workers, self.cluster.min_workers, self.arrange, **asked)

    def _check_bounds(self) -> None:
        """Of what is done about bad steps and wrong results."""
        train, every = self.train, self.checkpoint.every
        least = {"stop": 0, "skip": 1, "rollback": every + 1}[train.on_bad_step]
        if train.max_skipped < least:
            why = f", as it may go back over checkpoint.every={every} steps" if least > 1 else ""
            raise UserError(
                f"train.on_bad_step={train.on_bad_step} needs a bound: train.max_skipped={train.max_skipped}, the most "
                f"batches in a row, must be at least {least}{why}"
            )
        if train.on_bad_step == "rollback" and self.checkpoint.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.checkpoint.keep} must be at least 2 with train.on_bad_step=rollback, which "
                "goes to an older commit"
            )

    def _check_routing_groups(self, moe: MoEConfig, layout: Layout) -> None:
        """A routing group lies within one rank's lanes and one micro-batch, or its statistics would depend on both."""
        lanes = self.train.global_batch // layout.dp
        together = math.gcd(lanes, min(lanes, self.train.micro_batch))
        if together % moe.group_size:
            fits = [size for size in range(1, together + 1) if together % size == 0]
            raise UserError(
                f"model.moe.group_size={moe.group_size} must divide train.micro_batch={self.train.micro_batch} and the "
                f"{lanes} sequences of each data-parallel rank; try one of {fits}, or larger batches"
            )

    def _check_exact(self, layout: Layout) -> None:
        """Sums along one tree need powers of two, and micro-batches that do not depend on the number of ranks."""
        train = self.train
        leaves, rest = divmod(train.global_batch, train.micro_batch)
        if rest or leaves & (leaves - 1):
            fit = train.micro_batch << max(round(math.log2(max(train.global_batch / train.micro_batch, 1))), 0)
            raise UserError(
                f"train.exact=true needs train.global_batch={train.global_batch} to be train.micro_batch="
                f"{train.micro_batch} times a power of two; try train.global_batch={fit}"
            )
        if layout.dp & (layout.dp - 1) or layout.dp > leaves:
            fits = [1 << i for i in range(leaves.bit_length())]
            raise UserError(
                f"train.exact=true needs a power of two of data-parallel ranks, with a micro-batch for each: layout "
                f"{layout} has {layout.dp}; try one of {fits}"
            )
        if (layout.tp, layout.ep) != (self.layout.tp, self.layout.ep):
            raise UserError(f"train.exact=true needs tp and ep as they are: layout {layout} is not {self.layout}")

    def _check_router_learns(self, moe: MoEConfig) -> None:
        """A lone gate that is divided by itself has no gradient; published models load with it all the same."""
        of_scores = ("balance_loss", "device_loss", "communication_loss", "load_loss")
        if moe.top_k == 1 < moe.n_experts and moe.normalise_gates and not any(getattr(moe, name) for name in of_scores):
            raise UserError(
                "model.moe.top_k=1 with normalise_gates=true makes every gate 1, and no loss tells the router "
                "anything; set normalise_gates=false, a balance_loss, or a higher top_k"
            )

    @property
    def resolved_layout(self) -> Layout:
        return self.layout.resolve(self.cluster.world_size)


def load_config(recipe: str | None, overrides: Mapping[str, str]) -> RunConfig:
    """The validated config of a recipe (a name or a .toml file) and `section.key` -> value pairs that override it.

    Raises UserError of one line that names the setting, its value and what would be right.
    """
    sections: dict[str, Any] = {}
    for name, value in [*flatten(read_recipe(recipe) if recipe else {}), *overrides.items()]:
        *path, key = check_name(name).split(".")
        section = sections
        for part in path:
            # What sets a part to none is overruled by what sets one of its fields.
            section[part] = section = section.get(part) or {}
        section[key] = None if isinstance(value, str) and value.lower() == "none" else value
    model = sections.setdefault("model", {})
    source = _source(model, sections.get("run", {}).get("dir", ""))
    # The preset, or the model whose weights are taken, is where the architecture's fields start from; what they end as
    # is the config.
    fields = source[1].model_dump() if source else preset_fields(str(model.pop("preset", DEFAULT_PRESET)))
    sections["model"] = merge(fields, model)
    if source:
        sections["weights_from"] = str(source[0])
    try:
        config = RunConfig.model_validate(sections)
    except ValidationError as error:
        raise UserError(in_one_line(error, RunConfig)) from None
    if source:
        check_changes(source[1], config.model)
    return config


def _source(model: dict[str, Any], run: str) -> tuple[Path, ModelConfig] | None:
    """Takes `from` out of a recipe's model: whose weights the run starts with, and their architecture."""
    named = model.pop("from", None)
    if not named:
        return None
    if "preset" in model:
        raise UserError(
            f"model.preset={model['preset']} and model.from={named} are two models to start from; leave one out"
        )
    named = Path(_absolute(str(named)))
    # Once it has committed, a run does without what it started from.
    for commit in list_commits(Path(_absolute(run)) / "checkpoints")[-1:] if run else []:
        metadata = commit.manifest.metadata["config"]
        recorded = Path(metadata.get("weights_from") or "/")
        if recorded.is_relative_to(named):
            return recorded, ModelConfig.of(metadata["model"])
    try:
        path = locate(named)
        return path, config_of(path)
    except UserError as error:
        raise UserError(f"model.from={named}: {error}") from None


def read_recipe(recipe: str) -> dict[str, Any]:
    """The tables of a recipe. Raises UserError where there is none of that name, or where it is not TOML."""
    if recipe.endswith(".toml"):
        path: Any = Path(recipe)
        if not path.is_file():
            raise UserError(f"--recipe {recipe} does not exist")
    else:
        folder = resources.files("moray.jobs.config.recipes")
        path = folder / f"{recipe}.toml"
        known = sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))
        if recipe not in known:
            raise UserError(f"--recipe {recipe} is not known; {nearest(recipe, known)}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--recipe {recipe} is not TOML: {error}") from None


def check_name(name: str) -> str:
    """The name of a setting, or UserError with the nearest one that exists."""
    known = ["model.preset", *(found for found, _ in settings(RunConfig))]
    if name not in known:
        raise UserError(f"{name} is not a setting; {nearest(name, known)}")
    return name


def settings(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below a config by its dotted name; a part that may be none (`model.moe`) before its own."""
    for name, field in config.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        part = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if part is None or NoneType in kinds:
            yield "model.from" if name == "weights_from" else prefix + name, field
        if part:
            yield from settings(part, f"{prefix}{name}.")


def flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of a dotted name and a value."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
