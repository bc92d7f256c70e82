"""PPO's critic: a second decoder on the same ranks, which learns what will have come of an answer in the end."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moray.jobs.config.run import RunConfig
from moray.jobs.models.weights import config_of, fill_shards
from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import Decoder, ModelConfig
from moray.model.accounting.cost import training_state_bytes
from moray.model.accounting.work import Work
from moray.model.alignment.value import Value
from moray.model.lora import without_balancing
from moray.parallel.layout import Meshes
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder

PREFIX = "critic."
"""Of its tensors in a commit: readers of a run's weights see the policy's alone."""


@dataclass(frozen=True)
class Critic:
    """A decoder with a scalar head, and what moves it."""

    decoder: Decoder
    optimizer: torch.optim.Optimizer
    reduction: Reduction
    objective: Value
    work: Work

    @property
    def state(self) -> dict[str, Tensor]:
        """What a commit holds of it."""
        return {PREFIX + name: tensor for name, tensor in training_state(self.decoder, self.optimizer).items()}

    def begin(self, config: RunConfig) -> None:
        """Fills its weights with those that it begins as. Collective. Raises UserError for a damaged commit."""
        assert config.critic
        fill_shards(self.decoder, Path(config.critic[1]), config.train.seed)


def critic_model(config: RunConfig) -> ModelConfig | None:
    """The critic's architecture; None where the run has none.

    Raises UserError of a model whose values would depend on neighbours or draws.
    """
    if config.critic is None:
        return None
    setting, folder = config.critic
    # A run does without model.from once it has committed.
    model = config.model if setting == "model.from" else config_of(Path(folder))
    if model.moe:
        model.moe.check_same_function(f"a critic, here {setting}={folder}, must value an answer alike each time")
    return without_balancing(model).but(head="scalar")


def committed_bytes(config: RunConfig) -> float:
    """What a commit takes at least: weights and moments of all that learns."""
    states, critic = [training_state_bytes(config.model, config.adapters)], critic_model(config)
    states += [training_state_bytes(critic)] if critic else []
    return sum(state.weights + state.optimizer for state in states)


def build_critic(config: RunConfig, meshes: Meshes, compute_dtype: torch.dtype, stage: Stage) -> Critic | None:
    """Without its weights. Collective."""
    if (model := critic_model(config)) is None:
        return None
    decoder = build_decoder(
        model, meshes, dtype=torch.float32, compute_dtype=compute_dtype, stage=stage, recompute=config.train.recompute
    )
    optimizer = build_optimizer(decoder, config.optimizer, copy=meshes.copy, dtype=compute_dtype)
    return Critic(decoder, optimizer, Reduction(decoder, meshes, stage), Value(config.rl.value_clip), Work.of(model))
