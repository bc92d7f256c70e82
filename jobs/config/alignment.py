"""The settings of `moray align`, and what each objective learns from."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from moray.data.index import Kind
from moray.jobs.alignment.rewards import Reward, parse_rewards
from moray.jobs.config.sections import AnyPath, Section
from moray.model.alignment.policy import Policy

PREFERENCES = ("dpo", "ipo", "reward")
RL_METHODS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("variant", "deviation", "deviation_epsilon", "kl_estimator", "kl_correction"),
    "ppo": ("critic", "critic_lr", "discount", "gae_decay", "whiten", "value_clip"),
}
"""The methods that learn from answers of the model's own, and the settings of RLSection that are only theirs."""
REINFORCEMENT = tuple(RL_METHODS)
ALIGNMENT = (*PREFERENCES, "distill", *REINFORCEMENT)
"""The objectives of `moray align`."""
LEARNT_BY: Mapping[str, tuple[str, ...]] = {
    "reference": ("dpo", "ipo", *REINFORCEMENT),
    "beta": ("dpo", "ipo"),
    "label_smoothing": ("dpo",),
    "length_normalised": ("ipo",),
    "margin": ("reward",),
    "centring": ("reward",),
    **dict.fromkeys(("teacher", "direction", "temperature", "mix"), ("distill",)),
}
"""Which objectives a setting of `align` means something to."""
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "pretrain": ("text",),
    "sft": ("chat",),
    **dict.fromkeys(PREFERENCES, ("preference",)),
    "distill": ("text", "chat"),
    **dict.fromkeys(REINFORCEMENT, ("prompts",)),
}
"""What data an objective learns from."""
VERB_OF: Mapping[Kind, str] = {"text": "pretrain", "chat": "finetune", "preference": "align", "prompts": "align"}
"""Which verb learns from a kind of data."""


class AlignSection(Section):
    """What `moray align` learns by: train.objective names the method."""

    reference: AnyPath = ""
    """DPO and IPO: the model that the policy is compared with, a run, a commit or a Hugging Face folder of the same
    vocabulary; where it is not set, that of model.from. It stays as it is, which every start checks by its digest."""
    beta: float = Field(0.1, gt=0)
    """DPO and IPO: how closely the policy is held to the reference; the higher, the closer."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """DPO: the share of pairs that are taken to be labelled the wrong way round (conservative DPO)."""
    length_normalised: bool = False
    """IPO: log-probabilities are means over an answer's tokens (as TRL has it), not sums (the equation)."""
    margin: float = Field(0.0, ge=0)
    """Reward models: how far the score of a chosen answer shall lie above the rejected one's."""
    centring: float = Field(0.0, ge=0)
    """Reward models: factor of the squared sum of a pair's scores, which keeps them around 0; 0.01 is usual."""
    teacher: AnyPath = ""
    """Distillation: the model whose probabilities are learnt, a run, a commit or a Hugging Face folder of the same
    vocabulary and any architecture. It stays as it is, which every start checks by its digest."""
    direction: Literal["forward", "reverse"] = "forward"
    """Distillation: KL(teacher | student), which covers all that the teacher finds likely, or KL(student | teacher)."""
    temperature: float = Field(1.0, gt=0)
    """Distillation: both models' logits are divided by it, and the loss is multiplied with its square."""
    mix: float = Field(0.0, ge=0, le=1)
    """Distillation: the share of the plain cross-entropy in the loss."""


class RLSection(Section):
    """What `moray align --method grpo|ppo` learns by: answers that the model writes itself, and what they are worth.

    A step takes train.global_batch prompts; answers are learnt from in rows of train.seq_len tokens.
    """

    rewards: tuple[str, ...] = ()
    """What judges an answer, as NAME=WEIGHT, separated by commas: exact, gsm8k, gsm8k:flexible, format:REGEX, a
    function of yours as module:function, or a reward model as model:RUN."""
    folder: AnyPath = ""
    """Where modules of rl.rewards are looked for first; where it is not set, the folder of the command."""
    reward_timeout_s: float = Field(10.0, gt=0)
    """Most seconds that a reward of one answer may take, before the run stops."""
    group_size: int = Field(8, ge=1)
    """Answers to each prompt; GRPO compares them with each other."""
    groups_per_batch: int = Field(4, ge=1)
    """Prompts whose answers are written at the same time. It decides on memory and speed, and on no layout's account on
    what is written."""
    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of an answer; prompts of more than train.seq_len less so many are left out."""
    temperature: float = Field(1.0, gt=0)
    """Of what is drawn, and of all probabilities that are learnt from."""
    variant: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"
    """GRPO: how the tokens' losses are added up (PPO: as dapo). dapo: the mean over all tokens; grpo: over answers of
    means over tokens; dr_grpo: the sum by max_new_tokens, and advantages that are divided by no deviation; cispo: as
    dapo, with clipped weights in place of clipped ratios, so that no token loses its gradient."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability may fall, by what it was when the answer was written, before it learns no more."""
    clip_high: float | None = Field(None, gt=0)
    """How far it may rise; none: clip_low, with cispo 4 (a weight of at most 5). DAPO has 0.28."""
    mask_overlong: bool = False
    """Answers that were cut at max_new_tokens are not learnt from."""
    deviation: Literal["sample", "population"] = "sample"
    """GRPO: what an answer's advantage over the mean of its group is divided by: n - 1 under the root (as TRL and verl
    have it), or n."""
    deviation_epsilon: float = Field(1e-4, gt=0)
    """Added to it; verl has 1e-6."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Factor of the KL divergence from align.reference: with GRPO in the loss, with PPO (0.05 where it is not set) in
    the rewards of tokens; 0: there is no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """GRPO: by which it is estimated (Schulman, 2020); PPO takes k1."""
    kl_correction: bool = True
    """GRPO; false: the estimator as it was published with it, whose gradient is not that of the divergence."""
    critic: AnyPath = ""
    """PPO: the model that the critic begins as, a run, a commit or a Hugging Face folder of the same vocabulary, with a
    new head if it has no scalar one; each start reads its architecture there. Where it is not set, the reward model of
    rl.rewards, if that is one, else the policy's own weights."""
    critic_lr: float = Field(1e-5, gt=0)
    """PPO: the critic's highest learning rate; its schedule is the policy's."""
    discount: float = Field(1.0, gt=0, le=1)
    """PPO: what a reward is worth a token before it (gamma)."""
    gae_decay: float = Field(0.95, ge=0, le=1)
    """PPO: the decay of what advantages know of later tokens (lambda): 1 trusts rewards alone, 0 the critic."""
    whiten: bool = True
    """PPO: the advantages of a step's tokens get mean 0 and variance 1."""
    value_clip: float = Field(0.2, gt=0)
    """PPO: how far a token's value may move from what it was when the answer was written, before it learns no more."""
    epochs: int = Field(1, ge=1)
    """How often a step's answers are learnt from."""
    minibatches: int = Field(1, ge=1)
    """Updates of an epoch, each of as many prompts."""
    replay_routing: bool = False
    """Tokens are learnt from through the experts that they passed when they were written: for bf16, in which routing
    may differ."""
    validation_prompts: int = Field(128, ge=1)
    """Most prompts of the validation split that are answered, once each, for validation_reward."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _read_rewards(cls, value: Any) -> Any:
        return tuple(map(str, parse_rewards(value))) if value else ()

    @property
    def parsed(self) -> tuple[Reward, ...]:
        return parse_rewards(self.rewards)

    @property
    def highest(self) -> float:
        """How far a token's probability may rise."""
        return self.clip_high or (4.0 if self.variant == "cispo" else self.clip_low)

    def policy(self, kl_coefficient: float) -> Policy:
        return Policy(
            temperature=self.temperature,
            surrogate="cispo" if self.variant == "cispo" else "clip",
            clip_low=self.clip_low,
            clip_high=self.highest,
            kl_coefficient=kl_coefficient,
            kl_estimator=self.kl_estimator,
            kl_correction=self.kl_correction,
        )
