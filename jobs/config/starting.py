"""A run's settings out of the words of a verb that trains, which start elsewhere for some than for others."""

import os
from collections.abc import Mapping, Sequence

from moray import UserError, nearest
from moray.jobs.config.alignment import ALIGNMENT, REINFORCEMENT
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config, read_recipe
from moray.jobs.config.run import RunConfig

TRAINING_VERBS = ("pretrain", "finetune", "align")
# The usual rates, for models of billions of parameters: TRL's, with a decay to a tenth.
_ONCE = {"train.epochs": 1.0, "optimizer.weight_decay": 0.0}
STARTS: Mapping[str, Mapping[str, object]] = {
    "pretrain": {},
    "finetune": {"train.objective": "sft", "train.epochs": 3.0, "optimizer.lr": 2e-5, "optimizer.weight_decay": 0.0},
    "dpo": {**_ONCE, "optimizer.lr": 1e-6},
    "ipo": {**_ONCE, "optimizer.lr": 1e-6},
    "reward": {**_ONCE, "optimizer.lr": 1e-5, "model.head": "scalar"},
    "distill": {**_ONCE, "optimizer.lr": 2e-5},
    "grpo": {**_ONCE, "optimizer.lr": 1e-6},
    "ppo": {**_ONCE, "optimizer.lr": 1e-6, "rl.kl_coefficient": 0.05},
}
"""By the name of the verb, or of the method of `moray align`: what settings are where neither command line nor recipe
says. Without `train.epochs` where the number of steps is said."""


def config_of(verb: str, arguments: Sequence[str]) -> RunConfig:
    """The validated config of `--setting value …`. Raises UserError, of one line."""
    recipe, overrides = parse_settings([*arguments])
    if verb != "align":
        return load_config(recipe, overrides, STARTS[verb])
    stated = read_recipe(recipe).get("train", {}) if recipe else {}
    method = overrides.pop("method", overrides.get("train.objective", stated.get("objective")))
    if method not in ALIGNMENT:
        what = f"--method {method}: {nearest(method, ALIGNMENT)}" if method else f"--method is missing: {_listed()}"
        raise UserError(what)
    here = {"rl.folder": os.getcwd()} if method in REINFORCEMENT else {}
    return load_config(recipe, overrides | {"train.objective": method}, {**STARTS[method], **here})


def _listed() -> str:
    return f"{', '.join(ALIGNMENT[:-1])} or {ALIGNMENT[-1]}"
