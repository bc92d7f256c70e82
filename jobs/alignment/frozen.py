"""Models beside the one that learns, which stay as they are: spread over the same ranks, read anew at every start.

What they were is in each commit, by its digest: a resume that took the weights of its own start for the reference would
go on with another loss (NeMo-RL 2955).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moray.jobs.models.base import Base, check_same, identify
from moray.jobs.models.weights import config_of, fill_shards
from moray.model import Decoder
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.control_plane import ControlPlane
from moray.parallel.layout import Meshes
from moray.parallel.reduction import Stage
from moray.parallel.shard import build_decoder


@dataclass(frozen=True)
class Frozen:
    """setting: which names it, as `align.reference` does."""

    setting: str
    path: Path
    decoder: Decoder


def build_frozen(
    named: Mapping[str, tuple[str, str]], meshes: Meshes, compute_dtype: torch.dtype, stage: Stage
) -> dict[str, Frozen]:
    """Those that `RunConfig.frozen` names, without their weights. Collective."""
    kept: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": compute_dtype, "stage": stage, "frozen": True}
    return {
        name: Frozen(setting, Path(path), build_decoder(config_of(Path(path)), meshes, **kept).eval())
        for name, (setting, path) in named.items()
    }


def load_frozen(models: Mapping[str, Frozen], commits: Path) -> dict[str, Base]:
    """Fills their weights, and returns what these are. The newest of the run's `commits` says what they were.

    Collective. Raises UserError, on all ranks, where one is gone, damaged, or another than it was.
    """
    if not models:
        return {}
    ranks, found = ControlPlane(), {}
    recorded: dict[str, Any] = ranks.from_rank_0(lambda: recorded_in(commits))
    for name, model in models.items():
        known = Base.of(recorded[name]) if name in recorded else None
        found[name] = identify(model.path, known, ranks, model.setting)
        if known:
            check_same(found[name], known, model.setting, "the model that this run began beside")
        fill_shards(model.decoder, model.path)
    return found


def recorded_in(commits: Path) -> dict[str, Any]:
    """What the newest commit says of the models beside it."""
    newest = list_commits(commits)[-1:]
    found: dict[str, Any] = newest[0].manifest.metadata.get("frozen", {}) if newest else {}
    return found
