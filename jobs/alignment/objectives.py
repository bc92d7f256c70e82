"""What a run learns, as an objective."""

from collections.abc import Mapping
from typing import Any

from moray.jobs.alignment.frozen import Frozen
from moray.jobs.config.run import RunConfig
from moray.model.alignment.distillation import Distillation
from moray.model.alignment.preference import Preference
from moray.model.alignment.reward_model import RewardModel
from moray.model.objective import NextToken, Objective


def objective_of(config: RunConfig, frozen: Mapping[str, Frozen]) -> Objective[Any]:
    """frozen: the models that `config.frozen` names."""
    align, kind = config.align, config.train.objective
    if kind == "dpo" or kind == "ipo":
        return Preference(frozen["reference"].decoder, kind, align.beta, align.label_smoothing, align.length_normalised)
    if kind == "reward":
        return RewardModel(align.centring, align.margin)
    if config.is_reinforcement:
        return config.rl.policy(config.rl.kl_coefficient if kind == "grpo" else 0.0)  # PPO has its KL in the rewards
    plain = NextToken.of(config.learnt)
    if kind == "distill":
        teacher = frozen["teacher"].decoder
        return Distillation(teacher, align.direction, align.temperature, align.mix, plain.group_size)
    return plain
