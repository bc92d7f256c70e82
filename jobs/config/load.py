"""A RunConfig out of words: command line over recipe over preset over default."""

import math
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moray import UserError, nearest
from moray.data.blocks import CACHE_BYTES
from moray.data.dataset import Dataset
from moray.data.prompts import Prompts
from moray.data.rows import rows_of
from moray.jobs.alignment.rewards import SETTING, Reward, parse_rewards
from moray.jobs.config.run import DEFAULT_PRESET, RunConfig
from moray.jobs.config.sections import absolute
from moray.jobs.models.weights import check_changes, config_of, locate
from moray.model import ModelConfig
from moray.model.config.mistakes import in_one_line
from moray.model.config.parts import merge
from moray.model.presets import preset_fields
from moray.parallel.checkpoint.commits import list_commits


def load_config(
    recipe: str | None, overrides: Mapping[str, str], start: Mapping[str, object] | None = None
) -> RunConfig:
    """The validated config of a recipe (a name or a .toml file) and `section.key` -> value pairs that override it.

    start: what holds where neither says anything, as far as it is not everywhere the same (`starting`).
    Raises UserError of one line that names the setting, its value and what would be right.
    """
    sections: dict[str, Any] = {}
    stated = dict(flatten(read_recipe(recipe) if recipe else {}))
    for name, value in _as_steps_or_epochs(dict(start or {}), stated, overrides).items():
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
    run = sections.get("run", {}).get("dir", "")
    for part, name in (("align", "reference"), ("align", "teacher"), ("rl", "critic")):
        if named := sections.get(part, {}).get(name):
            sections[part][name] = str(_pinned(f"{part}.{name}", named, run))
    if rewards := sections.get("rl", {}).get("rewards"):
        sections["rl"]["rewards"] = [str(_pinned_reward(reward, run)) for reward in parse_rewards(rewards)]
    config = _validated(sections)
    if source:
        check_changes(source[1], config.model)
    return config


def _as_steps_or_epochs(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, the last layer's over those before, of which the last one that says how long a run is decides it.

    A run's own record has both: the epochs, and the steps that they came to. Raises UserError where the last layer,
    the command line, has.
    """
    steps, epochs = "train.steps", "train.epochs"
    if {steps, epochs} <= layers[-1].keys():
        said = f"train.steps={layers[-1][steps]} and train.epochs={layers[-1][epochs]}"
        raise UserError(f"{said} both say how long the run is; leave one out")
    merged: dict[str, Any] = {}
    for layer in layers:
        for one, other in ((steps, epochs), (epochs, steps)):
            if one in layer and other not in layer:
                merged.pop(other, None)
        merged |= layer
    return merged


def _validated(sections: dict[str, Any]) -> RunConfig:
    train = sections.get("train", {})
    is_counted = train.get("epochs") is None or "steps" in train
    try:
        if is_counted:
            return RunConfig.model_validate(sections)
        endless = RunConfig.model_validate(sections | {"train": {**train, "steps": sys.maxsize}})
        return RunConfig.model_validate(sections | {"train": {**train, "steps": steps_of_epochs(endless)}})
    except ValidationError as error:
        raise UserError(in_one_line(error, RunConfig)) from None


def steps_of_epochs(config: RunConfig) -> int:
    """The optimizer steps in which a run sees all its data train.epochs times. Opens the data; raises as that does."""
    train, data = config.train, config.data
    if data.mix:
        raise UserError(
            f"train.epochs={train.epochs:g} is of one dataset, and each source of data.mix has epochs of its own; give "
            "train.steps, and the start says how many each comes to"
        )
    if "://" not in data.path and not Path(data.path).exists():
        raise UserError(
            f"data.path={data.path} is not here, and train.epochs={train.epochs:g} is counted from it; make it with "
            "`moray prepare`, or where it lies elsewhere give train.steps"
        )
    dataset = Dataset.open(data.path)
    if config.is_reinforcement:
        counts = Prompts(dataset, "train", config.most_prompt_tokens, CACHE_BYTES).counts
    else:
        counts = rows_of(dataset, "train", train.seq_len, CACHE_BYTES, data.long_dialogues).counts
    return math.ceil((train.epochs or 1.0) * int(counts.sum()) / train.global_batch)


def _source(model: dict[str, Any], run: str) -> tuple[Path, ModelConfig] | None:
    """Takes `from` out of a recipe's model: whose weights the run starts with, and their architecture."""
    named = model.pop("from", None)
    if not named:
        return None
    if "preset" in model:
        raise UserError(
            f"model.preset={model['preset']} and model.from={named} are two models to start from; leave one out"
        )
    path = _pinned("model.from", named, run)
    # Once it has committed, a run does without what it started from.
    for there in _recorded(run):
        if there.get("weights_from") == str(path):
            return path, ModelConfig.of(there["model"])
    try:
        return path, config_of(path)
    except UserError as error:
        raise UserError(f"model.from={named}: {error}") from None


def _pinned(setting: str, named: str, run: str) -> Path:
    """The Hugging Face folder or commit that a setting names: of a run, the one that was the newest at the start.

    Raises UserError where nothing is there.
    """
    folder = Path(absolute(str(named)))
    for recorded in (path for there in _recorded(run) for path in _folders(setting, there)):
        if Path(recorded).is_relative_to(folder):
            return Path(recorded)
    try:
        return locate(folder)
    except UserError as error:
        raise UserError(f"{setting}={folder}: {error}") from None


def _pinned_reward(reward: Reward, run: str) -> Reward:
    return replace(reward, name=f"model:{_pinned(SETTING, reward.argument, run)}") if reward.kind == "model" else reward


def _folders(setting: str, recorded: dict[str, Any]) -> list[str]:
    """What a run's record has for a setting that names models."""
    found = recorded.get("weights_from") if setting == "model.from" else dict(flatten(recorded)).get(setting)
    if setting == SETTING and found:
        return [reward.argument for reward in parse_rewards(found) if reward.kind == "model"]
    return [found] if found else []


def _recorded(run: str) -> list[dict[str, Any]]:
    """The settings of a run's newest commit, if it has one."""
    commits = list_commits(Path(absolute(run)) / "checkpoints")[-1:] if run else []
    return [commit.manifest.metadata["config"] for commit in commits]


def read_recipe(recipe: str, package: str = "moray.jobs.config.recipes") -> dict[str, Any]:
    """The tables of a recipe: a .toml file, or one of the package's by name.

    Raises UserError where there is none of that name, or where it is not TOML.
    """
    if recipe.endswith(".toml"):
        path: Any = Path(recipe)
        if not path.is_file():
            raise UserError(f"--recipe {recipe} does not exist")
    else:
        folder = resources.files(package)
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
