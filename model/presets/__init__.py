"""Named architectures with their published dimensions, one TOML file a family.

A file's `[base]` is what its presets share; `like = "NAME"` starts from one above it instead.
"""

import tomllib
from importlib import resources
from typing import Any

from moray import UserError, nearest
from moray.model.config.parts import merge


def read_family(text: str) -> dict[str, dict[str, Any]]:
    """The presets of one family's file."""
    tables = tomllib.loads(text)
    base = tables.pop("base", {})
    presets: dict[str, dict[str, Any]] = {}
    for name, fields in tables.items():
        start = presets[fields.pop("like")] if "like" in fields else base
        presets[name] = merge(start, fields)
    return presets


def _read_all() -> dict[str, dict[str, Any]]:
    files = sorted((file for file in resources.files(__name__).iterdir() if file.name.endswith(".toml")), key=str)
    return {name: fields for file in files for name, fields in read_family(file.read_text("utf-8")).items()}


PRESETS = _read_all()


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset. Raises UserError with the nearest name if there is none."""
    if name not in PRESETS:
        raise UserError(f"model.preset={name} is not known; {nearest(name, PRESETS)}")
    return PRESETS[name]
