"""RunConfig: everything a training run depends on, and what of it does not go together."""

import math
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from moray import UserError
from moray.cluster.group import Group
from moray.data.mixture import Mixture
from moray.jobs.config.aligning import check_alignment, check_rollouts
from moray.jobs.config.alignment import ALIGNMENT, REINFORCEMENT, AlignSection, RLSection
from moray.jobs.config.sections import (
    AnyPath,
    CheckpointSection,
    ClusterSection,
    DataSection,
    EvalSection,
    LoRASection,
    OptimizerSection,
    RecoverySection,
    RunSection,
    Section,
    TrainSection,
)
from moray.model import ModelConfig
from moray.model.config.moe import MoEConfig
from moray.model.lora import TARGETS, LoRA, targets_in, without_balancing
from moray.parallel.layout import Layout

DEFAULT_PRESET = "demo-moe"
MAX_BETA2_IN_BF16 = 0.99


class RunConfig(Section):
    """Everything a training run depends on."""

    weights_from: AnyPath = ""
    """Set as `model.from`: the Hugging Face folder, run or commit whose architecture and weights it starts with."""
    model: ModelConfig = ModelConfig.preset(DEFAULT_PRESET)
    data: DataSection = DataSection()
    layout: Layout = Layout()
    train: TrainSection = Field(TrainSection(), validate_default=True)
    eval: EvalSection = EvalSection()
    optimizer: OptimizerSection = Field(OptimizerSection(), validate_default=True)
    lora: LoRASection = LoRASection()
    align: AlignSection = AlignSection()
    rl: RLSection = RLSection()
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
            return {"seq_len": min(TrainSection().seq_len, model.max_seq_len)} | stated
        if known.field_name == "optimizer" and train:
            return {"warmup_steps": min(OptimizerSection().warmup_steps, train.steps // 5)} | stated
        return stated

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.path and not self.data.mix:
            raise UserError("data.path is missing: the folder that `moray prepare` made; or data.mix, several of them")
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
        self._check_ways()
        self._check_bounds()
        check_alignment(self)
        if self.optimizer.moments == "bfloat16" and self.optimizer.beta2 > MAX_BETA2_IN_BF16:
            raise UserError(
                f"optimizer.moments=bfloat16 needs optimizer.beta2={self.optimizer.beta2} to be at most "
                f"{MAX_BETA2_IN_BF16}: what a step adds to a moment or takes from it would be rounded away"
            )
        if self.adapters:
            self._check_lora(self.adapters)
        elif self.lora != LoRASection():
            raise UserError("lora.rank=0 means no adapters, but lora.alpha or lora.targets is set: give a lora.rank")
        elif self.model.moe:
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
        if self.is_reinforcement:
            check_rollouts(self, layout)
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

    def _check_ways(self) -> None:
        """Of computing."""
        train = self.train
        if train.exact and train.zero_stage == 1:
            raise UserError("train.zero_stage=1 must be 3 or auto with train.exact=true, which adds up gradients")
        if train.exact and train.compile:
            raise UserError(
                "train.compile=true must be false with train.exact=true: a compiler orders sums as it likes"
            )
        if train.compile and train.recompute == "selective":
            raise UserError(
                "train.recompute=selective must be none or full with train.compile=true, which computes again what is "
                "cheap by itself"
            )

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

    def _check_lora(self, lora: LoRA) -> None:
        """Adapters need a base, which has what they are for; and stacked ones rows as grouped products want them."""
        if not self.weights_from:
            raise UserError(
                f"lora.rank={lora.rank} needs model.from, whose weights stay as they are: a Hugging Face folder, a run "
                "or a commit; or set lora.rank=0"
            )
        if self.model.head == "scalar":
            raise UserError(
                f"lora.rank={lora.rank} with model.head=scalar would leave the head as it is; set lora.rank=0"
            )
        has = targets_in(self.model)
        if missing := [target for target in lora.targets if target not in has]:
            raise UserError(
                f"lora.targets={','.join(missing)} matches nothing in this model, which has {','.join(has)}"
            )
        if "experts" in lora.targets and lora.rank % 8:
            raise UserError(
                f"lora.rank={lora.rank} must be a multiple of 8 for adapters of experts, or their bf16 rows are no "
                f"multiple of 16 bytes, as grouped matrix products need; try {lora.rank + -lora.rank % 8}, or "
                f"lora.targets={','.join(target for target in has if target != 'experts')}"
            )
        if self.layout.placement == "balanced":
            raise UserError(
                "layout.placement=balanced must be contiguous with lora.rank: frozen experts would have to move, and "
                "no commit holds where to"
            )

    def _check_router_learns(self, moe: MoEConfig) -> None:
        """A lone gate that is divided by itself has no gradient; published models load with it all the same."""
        of_scores = ("balance_loss", "device_loss", "communication_loss", "load_loss")
        if moe.top_k == 1 < moe.n_experts and moe.normalise_gates and not any(getattr(moe, name) for name in of_scores):
            raise UserError(
                "model.moe.top_k=1 with normalise_gates=true makes every gate 1, and no loss tells the router "
                "anything; set normalise_gates=false, a balance_loss, or a higher top_k"
            )

    @property
    def adapters(self) -> LoRA | None:
        """What learns in place of the weights, if that is asked for."""
        rank, asked = self.lora.rank, self.lora.targets
        if not rank:
            return None
        targets = targets_in(self.model) if "all" in asked else tuple(target for target in TARGETS if target in asked)
        return LoRA(rank, self.lora.alpha or 2.0 * rank, targets)

    @property
    def is_alignment(self) -> bool:
        return self.train.objective in ALIGNMENT

    @property
    def is_reinforcement(self) -> bool:
        return self.train.objective in REINFORCEMENT

    @property
    def most_prompt_tokens(self) -> int:
        """What leaves room for an answer."""
        return self.train.seq_len - self.rl.max_new_tokens

    @property
    def learnt(self) -> ModelConfig:
        """The model, as it learns: nothing balances experts while preferences are learnt."""
        is_balanced = not self.is_alignment or self.train.objective == "distill"
        return self.model if is_balanced else without_balancing(self.model)

    @property
    def frozen(self) -> dict[str, tuple[str, str]]:
        """The models beside it, by what they are: the setting that names each, and its folder."""
        named = self.align.reference
        reference = ("align.reference", named) if named else ("model.from", self.weights_from)
        beside = {"reference": reference}
        of = {"dpo": beside, "ipo": beside, "distill": {"teacher": ("align.teacher", self.align.teacher)}}
        if not self.is_reinforcement:
            return of.get(self.train.objective, {})
        return self._reward_models | (beside if self.rl.kl_coefficient else {})

    @property
    def _reward_models(self) -> dict[str, tuple[str, str]]:
        judges = [reward for reward in self.rl.parsed if reward.kind == "model"]
        return {reward.name: (f"rl.rewards={reward.name}", reward.argument) for reward in judges}

    @property
    def critic(self) -> tuple[str, str] | None:
        """What PPO's critic begins as: the setting that names it, and its folder."""
        if self.train.objective != "ppo":
            return None
        if self.rl.critic:
            return "rl.critic", self.rl.critic
        judges = [*self._reward_models.values()]
        return judges[0] if len(judges) == 1 else ("model.from", self.weights_from)

    @property
    def mixture(self) -> Mixture | None:
        """Which of several datasets each position is drawn from."""
        mixed = self.data.mixed
        return Mixture(mixed.phases_of(self.train.global_batch), self.train.seed) if mixed else None

    @property
    def resolved_layout(self) -> Layout:
        return self.layout.resolve(self.cluster.world_size)
