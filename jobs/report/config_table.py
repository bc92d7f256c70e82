"""The settings of a run that differ from their defaults, out of its config.toml alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from moray.jobs.config.load import settings
from moray.jobs.config.run import RunConfig


class Setting(NamedTuple):
    name: str
    value: str
    default: str


def changed_settings(config: Mapping[str, Any]) -> list[Setting]:
    """Those of a config, by dotted name, that a run of defaults alone would not have.

    A model's defaults are those of its fields, not of a preset; "" is the default of what has none.
    """
    defaults = {name: field.get_default(call_default_factory=True) for name, field in settings(RunConfig)}
    found = []
    for name, value in config.items():
        default = defaults.get(name, PydanticUndefined)
        said, usual = _said(value), "" if default is PydanticUndefined else _said(default)
        if said != usual:
            found.append(Setting(name, said, usual))
    return found


def _said(value: Any) -> str:
    """As a person would type it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_said, value)) or "none"
    return str(value).lower() if isinstance(value, bool | None) else str(value)
