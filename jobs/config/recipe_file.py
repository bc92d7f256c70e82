"""A run's config as a recipe: TOML that `--recipe` reads."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moray.jobs.config.run import RunConfig


def to_toml(config: RunConfig) -> str:
    """The config as a recipe that gives the same one again."""
    tables = config.model_dump()
    if source := tables.pop("weights_from"):
        tables["model"] = {"from": source, **tables["model"]}
    return "\n".join(line for name, table in tables.items() for line in _toml_table(name, table))


def _toml_table(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    yield from (f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping))
    yield ""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _toml_table(f"{name}.{key}", value)


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'  # what is left out would fall back to the preset's
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(entry) for entry in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML one, control characters and all.
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
