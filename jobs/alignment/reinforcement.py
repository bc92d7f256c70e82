"""What reinforcement learning needs beside the training: how answers are drawn, who judges them, how ranks agree."""

from dataclasses import dataclass
from pathlib import Path

from moray.data.tokenizer import Tokenizer, load_tokenizer
from moray.jobs.alignment.judge import Judge
from moray.jobs.config.run import RunConfig
from moray.parallel.control_plane import ControlPlane
from moray.parallel.rollout import Sampling


@dataclass(frozen=True)
class Reinforcement:
    """judge: to be closed. sampling: of the training; of a validation, one answer each."""

    tokenizer: Tokenizer
    sampling: Sampling
    judge: Judge
    ranks: ControlPlane

    @classmethod
    def of(cls, config: RunConfig) -> "Reinforcement":
        """Collective. Raises UserError for rewards that cannot be imported."""
        rl, tokenizer = config.rl, load_tokenizer(Path(config.run.dir) / "tokenizer")
        sampling = Sampling(rl.temperature, rl.max_new_tokens, tokenizer.stop_ids, rl.group_size, rl.groups_per_batch)
        return cls(tokenizer, sampling, Judge(rl.parsed, rl.folder, rl.reward_timeout_s), ControlPlane())
