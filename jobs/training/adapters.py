"""Adapters of a run: the base that every start reads anew, and what is recorded and said of the two."""

from pathlib import Path
from typing import Any

from moray.jobs.config.run import RunConfig
from moray.jobs.models.base import Base, check_same, identify
from moray.jobs.models.weights import adapted_in, fill_shards
from moray.model import Decoder
from moray.model.accounting.cost import count_adapters, count_parameters
from moray.model.lora import balancing_of
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.control_plane import ControlPlane


def load_base(decoder: Decoder, config: RunConfig, commits: Path) -> Base | None:
    """Fills what is frozen, and returns what that is; None where all weights learn. The newest of the run's `commits`
    says what it was. Collective. Raises UserError, on all ranks, where it is gone or damaged.
    """
    if not config.adapters:
        return None
    ranks, path = ControlPlane(), Path(config.weights_from)
    recorded = ranks.from_rank_0(lambda: [adapted_in(commit) for commit in list_commits(commits)[-1:]])
    base = identify(path, next((adapted[1] for adapted in recorded if adapted), None), ranks)
    fill_shards(decoder, path)
    return base


def record_of(config: RunConfig, base: Base | None) -> dict[str, Any]:
    """What a reader of a commit needs to make weights of its adapters, if that is what it holds."""
    return {"lora": {**vars(config.adapters), "base": base.record()}} if config.adapters and base else {}


def check_base(config: RunConfig, base: Base | None, metadata: dict[str, Any]) -> None:
    """Raises UserError where the base is not the one that the adapters with this metadata were trained beside."""
    if base:
        of_adapters = f"what the adapters of {config.run.dir} were trained beside"
        check_same(base, Base.of(metadata["lora"]["base"]), "model.from", of_adapters)


def what_learns(config: RunConfig) -> dict[str, Any] | None:
    """Of an event: how much, beside how much, and which of the settings that balance experts are off, as their routers
    are frozen.
    """
    if not (lora := config.adapters):
        return None
    learn, of = count_adapters(config.model, lora).total, count_parameters(config.model).total
    return {"learn": learn, "of": of, "targets": lora.targets, "off": balancing_of(config.model)}
